//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/spdystream/spdy"
	"k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"aaserver.io/aaserver/streaming"
)

// Idle sessions are measured on a real standalone server, a process of its own,
// by what it occupies more with them than without. The client is this process,
// which keeps no more of a session than its connection.

const (
	idleTarget = "idle" // the target's name
	// settleTime is how long a server is left alone before it is looked at:
	// goroutines end, and what they had is given back.
	settleTime = 2 * time.Second
)

// idleKind is one way to have a session.
type idleKind struct {
	name     string
	path     string // after the target's
	sessions int
	open     func(conn net.Conn, host, path string) error
}

// How many sessions are opened: execs are fewer, as each has a process of its
// own, and that process a shim.
const (
	idleAttaches = 5000
	idleExecs    = 300
	idleForwards = 5000
)

func idleKinds() []idleKind {
	const (
		attach = "/attach?stdin=true&stdout=true&stderr=true"
		exec   = "/exec?stdin=true&stdout=true&stderr=true&command=sleep&command=100000"
	)
	return []idleKind{
		{"attach, WebSocket v5, TLS", attach, idleAttaches, idleWebSocket},
		{"attach, SPDY v4, TLS", attach, idleAttaches, idleSPDY},
		{"exec, WebSocket v5, TLS", exec, idleExecs, idleWebSocket},
		{"exec, SPDY v4, TLS", exec, idleExecs, idleSPDY},
		{"port-forward, mux, TLS", "/portforward", idleForwards, idleMux},
		{"port-forward, SPDY, TLS", "/portforward", idleForwards, idleForwardSPDY},
	}
}

func upgrade(conn net.Conn, method, host, path, headers string) (*bufio.Reader, error) {
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nConnection: Upgrade\r\n%s\r\n", method, path, host, headers); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return r, nil
}

func upgradeWebSocket(conn net.Conn, host, path, subprotocol string) (*bufio.Reader, error) {
	return upgrade(conn, http.MethodGet, host, path, "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: "+subprotocol+"\r\n")
}

func upgradeSPDY(conn net.Conn, host, path, protocol string) (*bufio.Reader, error) {
	return upgrade(conn, http.MethodPost, host, path, "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: "+protocol+"\r\nContent-Length: 0\r\n")
}

func idleWebSocket(conn net.Conn, host, path string) error {
	r, err := upgradeWebSocket(conn, host, path, "v5.channel.k8s.io")
	if err != nil {
		return err
	}
	// The first message is empty but for its channel: the session stands.
	_, err = io.ReadFull(r, make([]byte, 3))
	return err
}

func idleSPDY(conn net.Conn, host, path string) error {
	r, err := upgradeSPDY(conn, host, path, "v4.channel.k8s.io")
	if err != nil {
		return err
	}
	framer, err := spdy.NewFramer(conn, r)
	if err != nil {
		return err
	}
	streams := []string{"error", "stdin", "stdout", "stderr"}
	for i, kind := range streams {
		frame := &spdy.SynStreamFrame{StreamId: spdy.StreamId(2*i + 1), Headers: http.Header{"Streamtype": {kind}}}
		if err := framer.WriteFrame(frame); err != nil {
			return err
		}
	}
	for range streams {
		if _, err := framer.ReadFrame(); err != nil { // a reply
			return err
		}
	}
	return nil
}

// A session of port-forward stands once it is answered.

func idleMux(conn net.Conn, host, path string) error {
	_, err := upgradeWebSocket(conn, host, path, streaming.MuxProtocol)
	return err
}

func idleForwardSPDY(conn net.Conn, host, path string) error {
	_, err := upgradeSPDY(conn, host, path, portforward.PortForwardV1Name)
	return err
}

// occupied is what a process has, in bytes, after a garbage collection.
type occupied struct {
	heap, stacks, rss float64
	goroutines        float64
}

// standalone is a standalone server with a target that does nothing.
type standalone struct {
	*process
	config *rest.Config
	tls    *tls.Config
	http   *http.Client
}

func startStandalone(ctx context.Context, program, dir string, args ...string) (_ *standalone, err error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "standalone")
	s := &standalone{}
	s.process, err = startProcess("aaserver standalone", filepath.Join(dir, "standalone.log"), syscall.SIGKILL, program,
		append([]string{"standalone", "--data-dir=" + data, "--secure-port=" + strconv.Itoa(port), "--profiling", "--max-sessions=100000"}, args...)...)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.process.stop()
		}
	}()
	err = s.wait(ctx, func(ctx context.Context) error {
		if s.config == nil {
			config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(data, "kubeconfig"))
			if err != nil {
				return err
			}
			if s.tls, err = rest.TLSConfigFor(config); err != nil {
				return err
			}
			if s.http, err = rest.HTTPClientFor(config); err != nil {
				return err
			}
			s.config = config
		}
		_, err := s.request(ctx, http.MethodGet, "/readyz", "")
		return err
	})
	if err != nil {
		return nil, err
	}
	target := fmt.Sprintf(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":%q},"spec":{"process":{"command":["sleep","100000"],"stdin":true}}}`, idleTarget)
	// The default class is made just after the server is ready.
	err = s.wait(ctx, func(ctx context.Context) error {
		_, err := s.request(ctx, http.MethodPost, "/apis/streaming.aaserver.io/v1/namespaces/default/targets", target)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, s.wait(ctx, func(ctx context.Context) error {
		text, err := s.request(ctx, http.MethodGet, idlePath, "")
		if err == nil && !bytes.Contains(text, []byte(`"readyReplicas":1`)) {
			err = errors.New("the target isn't ready")
		}
		return err
	})
}

const idlePath = "/apis/streaming.aaserver.io/v1/namespaces/default/targets/" + idleTarget

func (s *standalone) request(ctx context.Context, method, path, body string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.config.Host+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %.1000s", method, path, resp.Status, text)
	}
	return text, err
}

var memStat = regexp.MustCompile(`(?m)^# (HeapAlloc|Stack) = (\d+)`)

// occupied looks at the server after it was left alone for a while.
func (s *standalone) occupied(ctx context.Context) (o occupied, err error) {
	for range 2 { // what pools keep survives one collection
		select {
		case <-time.After(settleTime / 2):
		case <-ctx.Done():
			return o, context.Cause(ctx)
		}
		text, err := s.request(ctx, http.MethodGet, "/debug/pprof/heap?gc=1&debug=1", "")
		if err != nil {
			return o, err
		}
		for _, m := range memStat.FindAllSubmatch(text, -1) {
			n, err := strconv.ParseFloat(string(m[2]), 64)
			if err != nil {
				return o, err
			}
			if string(m[1]) == "Stack" {
				o.stacks = n
			} else {
				o.heap = n
			}
		}
	}
	goroutines, err := s.request(ctx, http.MethodGet, "/debug/pprof/goroutine?debug=1", "")
	if err != nil {
		return o, err
	}
	// "goroutine profile: total 123"
	if _, err := fmt.Sscanf(string(goroutines), "goroutine profile: total %f", &o.goroutines); err != nil {
		return o, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return o, err
	}
	kib, err := metric(status, "VmRSS:")
	o.rss = kib * 1024
	return o, err
}

// measureIdle measures what a session costs in which nothing happens.
func measureIdle(ctx context.Context, o options, dir string, out io.Writer) error {
	rows := [][]string{{"idle sessions", "number", "heap, kB", "stacks, kB", "both, kB", "RSS, kB", "goroutines"}}
	for _, kind := range idleKinds() {
		row, err := kind.measure(ctx, o, filepath.Join(dir, "idle-"+strconv.Itoa(len(rows))))
		if err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		rows = append(rows, row)
	}
	fmt.Fprint(out, "What an idle session occupies in a standalone server, in kB (1000 bytes) for each: the difference to the same server without them, each time after a garbage collection. RSS has what the collector leaves room for besides.\n\n")
	table(out, rows)
	return nil
}

// measure starts a server for each kind: what one leaves behind isn't the
// next's.
func (k idleKind) measure(ctx context.Context, o options, dir string) ([]string, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s, err := startStandalone(ctx, filepath.Join(o.bin, "aaserver"), dir)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	defer s.http.CloseIdleConnections()
	host := strings.TrimPrefix(s.config.Host, "https://")
	conns := make([]net.Conn, k.sessions)
	defer func() {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
	}()
	config := s.tls.Clone()
	config.NextProtos = []string{"http/1.1"}
	open := func(ctx context.Context, i int) error {
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", host)
		if err != nil {
			return err
		}
		conns[i] = conn
		return k.open(conn, host, idlePath+k.path)
	}
	// What is made once, for the first of them, isn't a session's.
	const first = 10
	for i := range first {
		if err := open(ctx, i); err != nil {
			return nil, err
		}
	}
	before, err := s.occupied(ctx)
	if err != nil {
		return nil, err
	}
	if err := inParallel(ctx, k.sessions-first, func(ctx context.Context, i int) error { return open(ctx, first+i) }); err != nil {
		return nil, err
	}
	after, err := s.occupied(ctx)
	if err != nil {
		return nil, err
	}
	if o.profiles != "" {
		for _, name := range []string{"heap", "goroutine"} {
			profile, err := s.request(ctx, http.MethodGet, "/debug/pprof/"+name, "")
			if err != nil {
				return nil, err
			}
			file := strings.NewReplacer(", ", "-", " ", "-").Replace("idle " + k.name + " " + name)
			if err := os.WriteFile(filepath.Join(o.profiles, file+".pb.gz"), profile, 0o644); err != nil {
				return nil, err
			}
		}
	}
	each := func(of func(occupied) float64) float64 { return (of(after) - of(before)) / float64(k.sessions-first) }
	kb := func(of func(occupied) float64) string { return number(each(of) / 1000) }
	return []string{
		k.name, strconv.Itoa(k.sessions),
		kb(func(o occupied) float64 { return o.heap }),
		kb(func(o occupied) float64 { return o.stacks }),
		kb(func(o occupied) float64 { return o.heap + o.stacks }),
		kb(func(o occupied) float64 { return o.rss }),
		number(each(func(o occupied) float64 { return o.goroutines })),
	}, nil
}
