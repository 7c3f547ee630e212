package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// badNetwork is a way to the server that can be cut.
type badNetwork struct {
	listener net.Listener
	server   string
	done     sync.WaitGroup

	mu     sync.Mutex // protects what follows
	resume chan struct{}
	conns  []*net.TCPConn
}

// badNetwork has the server's connections lead through a network of the test's.
func (s *testServer) badNetwork() *badNetwork {
	s.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	n := &badNetwork{listener: listener, server: s.srv.Listener.Addr().String()}
	s.srv.URL = "https://" + listener.Addr().String()
	n.done.Go(n.serve)
	s.t.Cleanup(func() {
		listener.Close()
		n.unstall()
		n.cut(0)
		n.done.Wait()
	})
	return n
}

func (n *badNetwork) serve() {
	for {
		client, err := n.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", n.server)
		if err != nil {
			client.Close()
			continue
		}
		n.mu.Lock()
		n.conns = append(n.conns, client.(*net.TCPConn), server.(*net.TCPConn))
		n.mu.Unlock()
		pass := func(to, from net.Conn) {
			defer to.Close()
			buf := make([]byte, 32<<10)
			for {
				count, err := from.Read(buf)
				n.mu.Lock()
				resume := n.resume
				n.mu.Unlock()
				if resume != nil {
					<-resume
				}
				if _, writeErr := to.Write(buf[:count]); err != nil || writeErr != nil {
					return
				}
			}
		}
		n.done.Go(func() { pass(server, client) })
		n.done.Go(func() { pass(client, server) })
	}
}

// opened returns how many connections there have been, counted at both ends.
func (n *badNetwork) opened() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns)
}

// stall lets nothing through, and closes nothing.
func (n *badNetwork) stall() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resume = make(chan struct{})
}

func (n *badNetwork) unstall() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.resume != nil {
		close(n.resume)
		n.resume = nil
	}
}

// cut ends all connections: with linger 0 by a reset, below it in good order.
func (n *badNetwork) cut(linger int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, conn := range n.conns {
		conn.SetLinger(linger)
		conn.Close()
	}
	n.conns = nil
}

func TestLostConnection(t *testing.T) {
	const patience = 600 * time.Millisecond
	forEachTransport(t, func(t *testing.T) {
		for name, test := range map[string]struct {
			args []string
			cut  func(n *badNetwork)
			want string
		}{
			"the network is silent": {
				args: []string{"exec", "-i", "web", "--", "sh"},
				cut:  (*badNetwork).stall,
				want: "the server hasn't answered for 600ms; the server ends the command",
			},
			"the connection is reset": {
				args: []string{"exec", "web", "--", "sh"},
				cut:  func(n *badNetwork) { n.cut(0) },
				want: "; the server ends the command",
			},
			"the connection is closed": {
				args: []string{"exec", "web", "--", "sh"},
				cut:  func(n *badNetwork) { n.cut(-1) },
				want: "it was closed without a word; the server ends the command",
			},
			"an attach is told how to go on": {
				args: []string{"attach", "web/web-0"},
				cut:  func(n *badNetwork) { n.cut(-1) },
				want: "; what runs in target web goes on: attach again with 'kubectl target attach web/web-0'",
			},
		} {
			t.Run(name, func(t *testing.T) {
				server := newTestServer(t, process("web"))
				network := server.badNetwork()
				started, ended := make(chan struct{}), make(chan struct{})
				run := func(ctx context.Context, stdio streaming.Stdio) error {
					fmt.Fprintln(stdio.Stdout, "begun")
					close(started)
					defer close(ended)
					<-ctx.Done()
					return ctx.Err()
				}
				server.serveExec(new(v1.TargetExecOptions), run)
				server.serveAttach(new(v1.TargetAttachOptions), run)
				stdin, typing := io.Pipe()
				defer typing.Close()
				cmd := server.start(stdin, append([]string{"--peer-timeout", patience.String()}, test.args...)...)
				<-started
				until(t, "the output", func() bool { return cmd.out.String() == "begun\n" })
				test.cut(network)
				if code := cmd.wait(); code != exitBroken {
					t.Errorf("exit code %d, want %d", code, exitBroken)
				}
				if got := cmd.errOut.String(); !strings.HasPrefix(got, "error: the connection to the server was lost: ") || !strings.Contains(got, test.want) {
					t.Errorf("stderr %q lacks %q", got, test.want)
				}
				network.unstall()
				<-ended
			})
		}
	})
}

func TestQuietCommandIsNoLostConnection(t *testing.T) {
	const patience = 500 * time.Millisecond
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
			select {
			case <-time.After(4 * patience):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
		cmd := server.start(nil, "--peer-timeout", patience.String(), "exec", "web", "--", "sleep", "2")
		if code := cmd.wait(); code != 0 {
			t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
		}
	})
}

// stuckOutput takes nothing until it is released.
type stuckOutput struct {
	output
	begun   chan struct{}
	once    sync.Once
	release chan struct{}
}

func (s *stuckOutput) Write(p []byte) (int, error) {
	s.once.Do(func() { close(s.begun) })
	<-s.release
	return s.output.Write(p)
}

func TestPausedOutputIsNoLostConnection(t *testing.T) {
	const patience = 300 * time.Millisecond
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		data := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
		server.serveExec(new(v1.TargetExecOptions), func(_ context.Context, stdio streaming.Stdio) error {
			_, err := stdio.Stdout.Write(data)
			return err
		})
		out := &stuckOutput{begun: make(chan struct{}), release: make(chan struct{})}
		cmd := startWith(t, genericiooptions.IOStreams{Out: out}, "--kubeconfig", server.kubeconfig(),
			"--peer-timeout", patience.String(), "exec", "web", "--", "cat", "file")
		<-out.begun
		select {
		case <-cmd.done:
			t.Errorf("it has ended with exit code %d: %s", cmd.code, cmd.errOut)
		case <-time.After(3 * patience):
		}
		close(out.release)
		if code := cmd.wait(); code != 0 || out.String() != string(data) {
			t.Errorf("exit code %d, %d bytes of %d; stderr %q", code, len(out.String()), len(data), cmd.errOut)
		}
	})
}

// TestInterruptWithPausedOutput has a user end a command in front of a pager
// that takes nothing.
func TestInterruptWithPausedOutput(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
			fmt.Fprintln(stdio.Stdout, "page")
			<-ctx.Done()
			return context.Cause(ctx)
		})
		out := &stuckOutput{begun: make(chan struct{}), release: make(chan struct{})}
		defer close(out.release)
		cmd := startWith(t, genericiooptions.IOStreams{Out: out}, "--kubeconfig", server.kubeconfig(), "exec", "web", "--", "cat")
		<-out.begun
		cmd.cancel(terminated{syscall.SIGINT})
		if code := cmd.wait(); code != 130 {
			t.Errorf("exit code %d, want 130", code)
		}
	})
}

func TestServerThatDoesNotAnswer(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		for _, test := range []struct {
			args     []string
			wantCode int
		}{
			{[]string{"exec", "web", "--", "ls"}, exitBroken}, // it may have been started
			{[]string{"attach", "web"}, 1},                    // which looks at the target first
		} {
			args := test.args
			server := newTestServer(t, process("web"))
			network := server.badNetwork()
			network.stall()
			cmd := server.start(nil, append([]string{"--peer-timeout=300ms"}, args...)...)
			if code := cmd.wait(); code != test.wantCode {
				t.Errorf("%v: exit code %d, want %d", args, code, test.wantCode)
			}
			want := "error: the server doesn't answer: nothing has come from " + server.srv.URL + " for 300ms (--peer-timeout)\n"
			if diff := cmp.Diff(want, cmd.errOut.String()); diff != "" {
				t.Errorf("%v: stderr (-want +got):\n%s", args, diff)
			}

			before := network.opened()
			cmd = server.start(nil, args...)
			until(t, "the connection", func() bool { return network.opened() > before })
			cmd.cancel(terminated{syscall.SIGINT})
			if code := cmd.wait(); code != 130 {
				t.Errorf("%v: exit code %d after ^C, want 130", args, code)
			}
		}
	})
}

func TestServerEndsTheSession(t *testing.T) {
	for name, test := range map[string]struct {
		err      error
		want     string
		wantCode int
	}{
		"it shuts down": {
			err:      apierrors.NewServiceUnavailable("the server is shutting down: connect again"),
			want:     "error: the server is shutting down: connect again\n",
			wantCode: exitBroken,
		},
		"the session has lasted long enough": {
			err:      apierrors.NewTimeoutError("the session was ended after 1h0m0s, the longest that it may last: connect again", 0),
			want:     "error: Timeout: the session was ended after 1h0m0s, the longest that it may last: connect again\n",
			wantCode: exitBroken,
		},
		"the command couldn't be started": {
			err:      apierrors.NewBadRequest("permission denied"),
			want:     "error: permission denied\n",
			wantCode: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			forEachTransport(t, func(t *testing.T) {
				server := newTestServer(t, process("web"))
				server.serveExec(new(v1.TargetExecOptions), func(context.Context, streaming.Stdio) error { return test.err })
				cmd := server.start(nil, "exec", "web", "--", "sh")
				if code := cmd.wait(); code != test.wantCode {
					t.Errorf("exit code %d, want %d", code, test.wantCode)
				}
				if diff := cmp.Diff(test.want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestServerWithoutHalfClose(t *testing.T) {
	const path = "/apis/streaming.aaserver.io/v1/namespaces/shop/targets/web/exec"
	for name, test := range map[string]struct {
		args []string
		want []string
	}{
		"v4 will do without stdin":   {args: []string{"exec", "web", "--", "cat"}, want: []string{"GET " + path}},
		"SPDY can end stdin, v4 not": {args: []string{"exec", "-i", "web", "--", "cat"}, want: []string{"GET " + path, "POST " + path}},
	} {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, process("web"))
			server.serveExec(new(v1.TargetExecOptions), func(_ context.Context, stdio streaming.Stdio) error {
				if stdio.Stdin == nil {
					return &streaming.ExitError{Code: 7}
				}
				_, err := io.Copy(stdio.Stdout, stdio.Stdin)
				return errors.Join(err, &streaming.ExitError{Code: 7})
			})
			server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				const header = "Sec-Websocket-Protocol"
				if offered := r.Header.Get(header); offered != "" {
					r.Header.Set(header, strings.TrimPrefix(strings.TrimPrefix(offered, "v5.channel.k8s.io"), ", "))
				}
				if r.Method == http.MethodGet && r.Header.Get(header) == "" {
					http.Error(w, "no such protocol", http.StatusBadRequest)
					return true
				}
				return false
			}
			cmd := server.start(strings.NewReader("in"), test.args...)
			if code := cmd.wait(); code != 7 {
				t.Errorf("exit code %d, want 7; stderr %q", code, cmd.errOut)
			}
			if diff := cmp.Diff(test.want, server.seen()); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
		})
	}
}

func TestInputOfAllSizes(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		server.serveExec(new(v1.TargetExecOptions), func(_ context.Context, stdio streaming.Stdio) error {
			_, err := io.Copy(stdio.Stdout, stdio.Stdin)
			return err
		})
		data := make([]byte, 3<<20+17)
		for i := range data {
			data[i] = byte(i * i >> 7)
		}
		cmd := server.start(bytes.NewReader(data), "exec", "-i", "web", "--", "cat")
		if code := cmd.wait(); code != 0 || cmd.out.String() != string(data) {
			t.Errorf("exit code %d, %d bytes of %d came back; stderr %q", code, len(cmd.out.String()), len(data), cmd.errOut)
		}
	})
}

// TestCommandWithoutATerminal runs the plugin as a shell does.
func TestCommandWithoutATerminal(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		server.serveExec(new(v1.TargetExecOptions), func(_ context.Context, stdio streaming.Stdio) error {
			n, err := io.Copy(stdio.Stdout, stdio.Stdin)
			fmt.Fprintf(stdio.Stderr, "%d bytes\n", n)
			return err
		})
		config := server.kubeconfig()
		for name, redirect := range map[string]string{
			"a file":    "<" + config,
			"a pipe":    "< <(cat " + config + ")",
			"/dev/null": "</dev/null",
			"closed":    "<&-",
		} {
			for _, flags := range []string{"-i", "-it", "-qit"} {
				want := "0 bytes\n"
				if info, err := os.Stat(config); err == nil && strings.Contains(redirect, config) {
					want = fmt.Sprintf("%d bytes\n", info.Size())
				}
				if flags == "-it" {
					want = "Unable to use a TTY - input is not a terminal or the right kind of file\n" + want
				}
				cmd := plugin(t, config, "exec", flags, "web", "--", "cat")
				cmd.Args = append([]string{"bash", "-c", `"$0" "$@" ` + redirect}, cmd.Args...)
				cmd.Path = bash(t)
				var stderr strings.Builder
				cmd.Stderr = &stderr
				if err := cmd.Run(); err != nil {
					t.Errorf("%s, %s: %v", name, flags, err)
				}
				if diff := cmp.Diff(want, stderr.String()); diff != "" {
					t.Errorf("%s, %s: stderr (-want +got):\n%s", name, flags, diff)
				}
			}
		}
	})
}

// TestReaderThatLeaves is "exec … | head -1".
func TestReaderThatLeaves(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		ended := make(chan struct{})
		server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
			defer close(ended)
			for {
				if _, err := fmt.Fprintln(stdio.Stdout, "y"); err != nil {
					return err
				}
			}
		})
		cmd := plugin(t, server.kubeconfig(), "exec", "web", "--", "yes")
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr strings.Builder
		cmd.Stdout, cmd.Stderr = w, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := io.ReadFull(r, make([]byte, 2)); err != nil {
			t.Error(err)
		}
		r.Close()
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGPIPE) || stderr.Len() > 0 {
			t.Errorf("exit code %d, want 141; stderr %q", code, stderr.String())
		}
		<-ended
	})
}
