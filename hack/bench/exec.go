//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/pprof"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	criremotecommand "k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"

	"aaserver.io/aaserver/streaming"
)

// Exec is measured beside k8s.io/cri-streaming: the same client, command and
// protocol, and each server a process of its own, which is this program again,
// so that its processor time isn't mixed with the client's.

const (
	execOurs = "ours"
	execPeer = "cri-streaming"

	// execChunk is what is written at once: io.Copy's buffer, and client-go's.
	execChunk    = 32 << 10
	execProtocol = "v4.channel.k8s.io" // the best that the peer speaks
)

// execAddresses is what a server says of itself on its standard output, as
// JSON.
type execAddresses struct {
	Plain, TLS string
	CA         []byte // PEM
}

// runExecServer is the process of a server, whose name is the argument. It ends
// with its standard input.
func runExecServer(args []string) error {
	klog.SetLogger(logr.Discard()) // the peer tells of every connection's end
	if len(args) != 1 {
		return errors.New("the name of a server is needed")
	}
	handler, err := execHandler(args[0])
	if err != nil {
		return err
	}
	plain, secure := httptest.NewServer(handler), httptest.NewUnstartedServer(handler)
	defer plain.Close()
	secure.EnableHTTP2 = false
	secure.StartTLS()
	defer secure.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	if err := json.NewEncoder(os.Stdout).Encode(execAddresses{plain.URL, secure.URL, ca}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// execCommand is what a server's command does: paths are "/one", which writes a
// byte, and "/output/N" and "/input/N", which write and read N chunks.
func execCommand(path string) func(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	what, number, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	n, _ := strconv.Atoi(number)
	return func(_ context.Context, stdin io.Reader, stdout io.Writer) error {
		switch what {
		case "one":
			_, err := stdout.Write([]byte("x"))
			return err
		case "output":
			chunk := make([]byte, execChunk)
			for range n {
				if _, err := stdout.Write(chunk); err != nil {
					return err
				}
			}
			// Until the client has it all: cri-streaming resets its streams at the
			// end, and what is on its way is lost.
			_, err := io.ReadFull(stdin, chunk[:1])
			return err
		case "input":
			_, err := io.CopyN(io.Discard, stdin, int64(n)*execChunk)
			return err
		}
		return fmt.Errorf("there is no %s", path)
	}
}

func execHandler(name string) (http.Handler, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("/usage", func(w http.ResponseWriter, _ *http.Request) {
		var usage syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, usage.Utime.Nano()+usage.Stime.Nano())
	})
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	switch name {
	case execOurs:
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			run := execCommand(r.URL.Path)
			streaming.ServeCommand(w, r, streaming.CommandRequest{Stdin: true, Stdout: true}, streaming.Options{}, func(ctx context.Context, stdio streaming.Stdio) error {
				return run(ctx, stdio.Stdin, stdio.Stdout)
			})
		})
	case execPeer:
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			criremotecommand.ServeExec(w, r, criExec(execCommand(r.URL.Path)), "", "", "", nil,
				&criremotecommand.Options{Stdin: true, Stdout: true}, time.Hour, time.Minute, criremotecommand.SupportedStreamingProtocols)
		})
	default:
		return nil, fmt.Errorf("there is no server %q", name)
	}
	return mux, nil
}

type criExec func(ctx context.Context, stdin io.Reader, stdout io.Writer) error

func (run criExec) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader, out, _ io.WriteCloser, _ bool, _ <-chan criremotecommand.TerminalSize, _ time.Duration) error {
	return run(ctx, in, out)
}

// execServer is a server, seen from here.
type execServer struct {
	execAddresses
	cmd   *exec.Cmd
	stdin io.Closer
}

// startExecServer starts this program as a server. It ends with the thread that
// started it.
func startExecServer(name string) (_ *execServer, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &execServer{cmd: exec.Command(self, "role-exec", name)}

	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.execAddresses)
	}
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("the server %s didn't start: %w", name, err)
	}
	return s, nil
}

func (s *execServer) stop() {
	s.stdin.Close()
	timer := time.AfterFunc(stopTimeout, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	s.cmd.Wait() // how it ends, now that it was measured, is of no interest
}

// cpu is the processor time that the server has used.
func (s *execServer) cpu(ctx context.Context) (time.Duration, error) {
	text, err := s.get(ctx, "/usage")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(string(text), 10, 64)
	return time.Duration(n), err
}

func (s *execServer) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Plain+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return io.ReadAll(resp.Body)
}

// execClient runs one command over one transport.
type execClient struct {
	name string
	run  func(ctx context.Context, s *execServer, secure bool, path string, chunks int) error
}

var execClients = []execClient{{"WebSocket v4", execWebSocket}, {"SPDY v4", execSPDY}}

func (s *execServer) config(secure bool) *rest.Config {
	if secure {
		return &rest.Config{Host: s.TLS, TLSClientConfig: rest.TLSClientConfig{CAData: s.CA}}
	}
	return &rest.Config{Host: s.Plain}
}

// execWebSocket uses gorilla itself, as client-go's executor would take most of
// the time. A whole exec is client-go's.
func execWebSocket(ctx context.Context, s *execServer, secure bool, path string, chunks int) error {
	if chunks == 0 {
		e, err := remotecommand.NewWebSocketExecutorForProtocols(s.config(secure), http.MethodGet, s.config(secure).Host+path, execProtocol)
		if err != nil {
			return err
		}
		return streamOne(ctx, e)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	dialer := websocket.Dialer{
		Subprotocols: []string{execProtocol}, TLSClientConfig: &tls.Config{RootCAs: roots},
		ReadBufferSize: 64 << 10, WriteBufferSize: 64 << 10,
	}
	conn, _, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(s.config(secure).Host, "http")+path, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if strings.HasPrefix(path, "/input") {
		message := make([]byte, 1+execChunk)
		for range chunks {
			if err := conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
				return err
			}
		}
	}
	const stdin, stdout, status = 0, 1, 3
	buf := make([]byte, 64<<10)
	left := int64(chunks) * execChunk
	for {
		_, r, err := conn.NextReader()
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r, buf[:1]); err != nil {
			return err
		}
		switch buf[0] {
		case status:
			text, err := io.ReadAll(r)
			if err != nil || !bytes.Contains(text, []byte(`"Success"`)) {
				return fmt.Errorf("the command failed: %s, %w", text, err)
			}
			return nil
		case stdout:
			n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{r}, buf)
			if err != nil {
				return err
			}
			if left -= n; left == 0 && n > 0 {
				if err := conn.WriteMessage(websocket.BinaryMessage, []byte{stdin, 'x'}); err != nil {
					return err
				}
			}
		}
	}
}

func execSPDY(ctx context.Context, s *execServer, secure bool, path string, chunks int) error {
	config := s.config(secure)
	u, err := url.Parse(config.Host + path)
	if err != nil {
		return err
	}
	transport, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return err
	}
	e, err := remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, http.MethodPost, u, execProtocol)
	if err != nil {
		return err
	}
	total := int64(chunks) * execChunk
	switch {
	case chunks == 0:
		return streamOne(ctx, e)
	case strings.HasPrefix(path, "/input"):
		return e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: io.LimitReader(zeros{}, total), Stdout: io.Discard})
	}
	r, w := io.Pipe()
	defer w.Close()
	return e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: r, Stdout: &allOf{left: total, then: func() {
		go w.Write([]byte("x")) // until somebody reads it, or w is closed
	}}})
}

// streamOne runs a command that writes a byte.
func streamOne(ctx context.Context, e remotecommand.Executor) error {
	var out bytes.Buffer
	if err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: &out}); err != nil {
		return err
	}
	if out.String() != "x" {
		return fmt.Errorf("the command wrote %q", out.String())
	}
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// allOf calls then when so many bytes were written.
type allOf struct {
	left int64
	then func()
}

func (w *allOf) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left == 0 {
		w.then()
	}
	return len(p), nil
}

// What is done in a round: chunks that go in or out, a gibibyte of them, and
// whole execs.
const (
	execChunks = 1 << 30 / execChunk
	execWhole  = 300
)

// measureExec measures exec beside cri-streaming.
func measureExec(ctx context.Context, o options, _ string, out io.Writer) error {
	servers := map[string]*execServer{}
	names := []string{execPeer, execOurs}
	for _, name := range names {
		s, err := startExecServer(name)
		if err != nil {
			return err
		}
		defer s.stop()
		servers[name] = s
	}
	type row struct {
		title  string
		secure bool
		whole  bool
		do     func(ctx context.Context, s *execServer) error
		got    map[string][]sample
	}
	var rows []*row
	for _, whole := range []bool{false, true} {
		for _, c := range execClients {
			for _, secure := range []bool{false, true} {
				over := c.name
				if secure {
					over += ", TLS"
				}
				add := func(title string, do func(ctx context.Context, s *execServer) error) {
					rows = append(rows, &row{title + ", " + over, secure, whole, do, map[string][]sample{}})
				}
				if whole {
					add("a whole exec", func(ctx context.Context, s *execServer) error {
						for range execWhole {
							if err := c.run(ctx, s, secure, "/one", 0); err != nil {
								return err
							}
						}
						return nil
					})
					continue
				}
				for _, direction := range []string{"output", "input"} {
					add(direction, func(ctx context.Context, s *execServer) error {
						return c.run(ctx, s, secure, fmt.Sprintf("/%s/%d", direction, execChunks), execChunks)
					})
				}
			}
		}
	}
	for round := range o.rounds {
		for _, r := range rows {
			order := slices.Clone(names)
			if round%2 == 1 { // no one is always the first
				slices.Reverse(order)
			}
			for _, name := range order {
				s := servers[name]
				before, err := s.cpu(ctx)
				if err != nil {
					return err
				}
				begin := time.Now()
				if err := r.do(ctx, s); err != nil {
					return fmt.Errorf("%s, %s: %w", r.title, name, err)
				}
				wall := time.Since(begin)
				after, err := s.cpu(ctx)
				if err != nil {
					return err
				}
				r.got[name] = append(r.got[name], sample{wall.Seconds(), (after - before).Seconds()})
			}
		}
	}

	gib := float64(execChunks) * execChunk / (1 << 30)
	moved := [][]string{{"exec", "MiB/s, " + execPeer, "MiB/s, ours", "ratio", "CPU s/GiB, " + execPeer, "CPU s/GiB, ours", "ratio"}}
	short := [][]string{{"exec", "ms, " + execPeer, "ms, ours", "ratio", "CPU ms, " + execPeer, "CPU ms, ours", "ratio"}}
	for _, r := range rows {
		wall := func(s sample) float64 { return gib * 1024 / s.wall }
		cpu := func(s sample) float64 { return s.cpu / gib }
		to := &moved
		if r.whole {
			wall = func(s sample) float64 { return s.wall * 1e3 / execWhole }
			cpu = func(s sample) float64 { return s.cpu * 1e3 / execWhole }
			to = &short
		}
		cells := []string{r.title}
		for _, of := range []func(sample) float64{wall, cpu} {
			peer, ours := column(r.got[execPeer], of), column(r.got[execOurs], of)
			cells = append(cells, number(median(peer)), number(median(ours)), ratio(ratios(ours, peer)))
		}
		*to = append(*to, cells)
	}
	fmt.Fprintf(out, "Exec beside k8s.io/cri-streaming, each server a process of its own, on loopback, in chunks of %d KiB. Medians of %d rounds; processor time is the server's alone. More MiB/s and less processor time are better.\n\n", execChunk>>10, o.rounds)
	table(out, moved)
	fmt.Fprint(out, "A whole exec, from the connection to its end, of a command that writes one byte:\n\n")
	table(out, short)
	if o.profiles == "" {
		return nil
	}
	for _, r := range rows {
		s := servers[execOurs]
		work, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() {
			for work.Err() == nil {
				if err := r.do(work, s); err != nil && work.Err() == nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		profile, err := s.get(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%d", profileSeconds))
		cancel()
		if err := errors.Join(err, <-done); err != nil {
			return err
		}
		name := strings.NewReplacer(", ", "-", " ", "-").Replace("exec " + r.title)
		if err := os.WriteFile(filepath.Join(o.profiles, name+".pb.gz"), profile, 0o644); err != nil {
			return err
		}
	}
	return nil
}
