//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/moby/spdystream/spdy"
	"k8s.io/apimachinery/pkg/util/portforward"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// Idle sessions are measured on a real standalone server, a process of its own,
// by what it occupies more with them than without. The client is this process,
// which keeps no more of a session than its connection.

// idleTarget is the target's name.
const idleTarget = "idle"

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

// measureIdle measures what a session costs in which nothing happens.
func measureIdle(ctx context.Context, o options, dir string, out io.Writer) error {
	rows := [][]string{{"idle sessions", "number", "heap, kB", "stacks, kB", "both, kB", "RSS, kB", "goroutines"}}
	for _, kind := range idleKinds() {
		row, err := kind.measure(ctx, o, dir)
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
func (k idleKind) measure(ctx context.Context, o options, dir string) (row []string, err error) {
	s, err := startStandalone(ctx, o.bin, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.run(ctx, idleTarget, &v1.ProcessSource{Command: []string{"sleep", "100000"}, Stdin: true}); err != nil {
		return nil, err
	}
	host := strings.TrimPrefix(s.base, "https://")
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
		return k.open(conn, host, defaultTargetPath(idleTarget)+k.path)
	}
	// What is made once, for the first of them, isn't a session's.
	const first = 10
	for i := range first {
		if err := open(ctx, i); err != nil {
			return nil, err
		}
	}
	before, err := s.settled(ctx)
	if err != nil {
		return nil, err
	}
	if err := inParallel(ctx, k.sessions-first, func(ctx context.Context, i int) error { return open(ctx, first+i) }); err != nil {
		return nil, err
	}
	after, err := s.settled(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"heap", "goroutine"} {
		if err := s.profile(ctx, o.profiles, "idle "+k.name+" "+name, "/debug/pprof/"+name); err != nil {
			return nil, err
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
