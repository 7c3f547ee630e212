package streaming

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
)

// serveCommand serves run to every request.
func serveCommand(t testing.TB, req CommandRequest, opts Options, run func(context.Context, Stdio) error) *server {
	t.Helper()
	return newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServeCommand(w, r, req, opts, run)
	})
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	data := make([]byte, n)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data
}

// oneSize is a queue of one terminal size.
type oneSize struct{ sizes []remotecommand.TerminalSize }

func (q *oneSize) Next() *remotecommand.TerminalSize {
	if len(q.sizes) == 0 {
		return nil
	}
	size := q.sizes[0]
	q.sizes = q.sizes[1:]
	return &size
}

func eachExecClient(t *testing.T, test func(t *testing.T, c execClient)) {
	for _, c := range execClients {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			test(t, c)
		})
	}
}

func TestCommandEchoesBytes(t *testing.T) {
	eachExecClient(t, func(t *testing.T, c execClient) {
		data := random(t, 3<<20+17)
		s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true, Stderr: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			if _, err := io.Copy(stdio.Stdout, io.LimitReader(stdio.Stdin, int64(len(data)))); err != nil {
				return err
			}
			_, err := io.WriteString(stdio.Stderr, "apart")
			return err
		})
		var out, errOut bytes.Buffer
		err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{
			Stdin: bytes.NewReader(data), Stdout: &out, Stderr: &errOut,
		})
		if err != nil {
			t.Errorf("executor: %v", err)
		}
		if err := s.result(t); err != nil {
			t.Errorf("ServeCommand: %v", err)
		}
		if !bytes.Equal(out.Bytes(), data) {
			t.Errorf("got %d bytes of stdout that differ from the %d sent", out.Len(), len(data))
		}
		if diff := cmp.Diff("apart", errOut.String()); diff != "" {
			t.Errorf("stderr (-want +got):\n%s", diff)
		}
	})
}

func TestCommandSeesTheEndOfStdin(t *testing.T) {
	eachExecClient(t, func(t *testing.T, c execClient) {
		if !c.half {
			t.Skip("the protocol has no half-close")
		}
		data := random(t, 200_000)
		s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			all, err := io.ReadAll(stdio.Stdin)
			if err != nil {
				return err
			}
			_, err = stdio.Stdout.Write(all)
			return err
		})
		var out bytes.Buffer
		err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{
			Stdin: bytes.NewReader(data), Stdout: &out,
		})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), data) {
			t.Errorf("got %d bytes back that differ from the %d sent", out.Len(), len(data))
		}
	})
}

func TestCommandOutcome(t *testing.T) {
	long := strings.Repeat("é\"", 5000)
	cases := map[string]struct {
		err      error
		wantCode int    // 0 if there is none
		wantText string // part of the error's
	}{
		"success":                      {},
		"an exit code":                 {err: &ExitError{7}, wantCode: 7, wantText: "exit code 7"},
		"a wrapped exit code":          {err: fmt.Errorf("run: %w", &ExitError{255}), wantCode: 255, wantText: "exit code 255"},
		"an exit code that can't be":   {err: &ExitError{-1}, wantCode: 255, wantText: "exit code"},
		"an error":                     {err: errors.New("the disk is on fire"), wantText: "the disk is on fire"},
		"an API status":                {err: fmt.Errorf("x: %w", apierrors.NewServiceUnavailable("the agent is away")), wantText: "the agent is away"},
		"an error of ten thousand é's": {err: errors.New(long), wantText: "é"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			eachExecClient(t, func(t *testing.T, c execClient) {
				s := serveCommand(t, CommandRequest{Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
					io.WriteString(stdio.Stdout, "output")
					return tc.err
				})
				var out bytes.Buffer
				err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{Stdout: &out})
				if got := s.result(t); !errors.Is(got, tc.err) {
					t.Errorf("ServeCommand returned %v, want %v", got, tc.err)
				}
				if !c.status {
					return
				}
				if out.String() != "output" {
					t.Errorf("stdout is %q", out.String())
				}
				if tc.err == nil {
					if err != nil {
						t.Errorf("executor: %v", err)
					}
					return
				}
				if err == nil {
					t.Fatal("the executor reported success")
				}
				if len(err.Error()) > 1100 {
					t.Errorf("the client was sent %d bytes", len(err.Error()))
				}
				if tc.wantCode != 0 && c.codes {
					var exit exec.CodeExitError
					if !errors.As(err, &exit) || exit.Code != tc.wantCode {
						t.Errorf("got %v, want exit code %d", err, tc.wantCode)
					}
				} else if !strings.Contains(err.Error(), tc.wantText) {
					t.Errorf("got %q, want it to contain %q", err, tc.wantText)
				}
			})
		})
	}
}

func TestCommandIsTerminal(t *testing.T) {
	eachExecClient(t, func(t *testing.T, c execClient) {
		if c.name == "WebSocket v1" {
			t.Skip("client-go sends no size by this protocol")
		}
		sizes := make(chan TerminalSize, 1)
		s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true, TTY: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			if stdio.Stderr != nil {
				return errors.New("a terminal has a stderr")
			}
			select {
			case size := <-stdio.Resize:
				sizes <- size
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			return nil
		})
		err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{
			Stdin: nopReader{t.Context()}, Stdout: io.Discard, Tty: true,
			TerminalSizeQueue: &oneSize{[]remotecommand.TerminalSize{{Width: 132, Height: 43}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		want := TerminalSize{Width: 132, Height: 43}
		if !c.resize {
			want = TerminalSize{} // the channel is closed
		}
		if diff := cmp.Diff(want, <-sizes); diff != "" {
			t.Errorf("size (-want +got):\n%s", diff)
		}
	})
}

// nopReader blocks until its context ends.
type nopReader struct{ ctx context.Context }

func (r nopReader) Read([]byte) (int, error) {
	<-r.ctx.Done()
	return 0, io.EOF
}

func TestCommandEndsWithItsClient(t *testing.T) {
	cases := map[string]struct {
		leave func(cancel func(), proxy *blackhole)
		want  error
	}{
		"the client cancels": {func(cancel func(), _ *blackhole) { cancel() }, ErrClientGone},
		"the connection breaks": {func(_ func(), proxy *blackhole) {
			proxy.mu.Lock()
			defer proxy.mu.Unlock()
			for _, conn := range proxy.conns {
				conn.(*net.TCPConn).SetLinger(0) // a reset, not an orderly end
				conn.Close()
			}
		}, ErrClientGone},
		"the network is lost": {func(_ func(), proxy *blackhole) { close(proxy.dark) }, ErrPeerTimeout},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			eachExecClient(t, func(t *testing.T, c execClient) {
				var stdinErr error
				opts := Options{PingInterval: 50 * time.Millisecond, PeerTimeout: 400 * time.Millisecond}
				s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, opts, func(ctx context.Context, stdio Stdio) error {
					if _, err := stdio.Stdout.Write([]byte("running")); err != nil {
						return err
					}
					_, stdinErr = stdio.Stdin.Read(make([]byte, 1))
					<-ctx.Done()
					if _, err := stdio.Stdout.Write([]byte("nobody hears")); err == nil {
						return errors.New("a write to nobody succeeded")
					}
					return context.Cause(ctx)
				})
				proxy := newBlackhole(t, s.addr())
				ctx, cancel := context.WithCancel(t.Context())
				running := make(chan struct{}, 1)
				done := make(chan struct{})
				go func() {
					defer close(done)
					c.executor(t, proxy.address()).StreamWithContext(ctx, remotecommand.StreamOptions{
						Stdin: nopReader{t.Context()}, Stdout: writerFunc(func([]byte) { signal(running) }),
					})
				}()
				wait(t, running, "the command to start")
				tc.leave(cancel, proxy)
				if err := s.result(t); !errors.Is(err, tc.want) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
				// client-go over SPDY may end its stdin in order as it is cancelled.
				orderly := name == "the client cancels" && strings.HasPrefix(c.name, "SPDY")
				if stdinErr == nil || stdinErr == io.EOF && !orderly {
					t.Errorf("stdin ended with %v, want an error", stdinErr)
				}
				cancel()
				wait(t, done, "the executor")
			})
		})
	}
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestCommandEndsWithItsRequest(t *testing.T) {
	drain := errors.New("the server is shutting down: try again in a minute")
	eachExecClient(t, func(t *testing.T, c execClient) {
		ctx, cancel := context.WithCancelCause(t.Context())
		running := make(chan struct{})
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServeCommand(w, r.WithContext(ctx), CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				close(running)
				if _, err := stdio.Stdin.Read(make([]byte, 1)); !errors.Is(err, drain) {
					return fmt.Errorf("stdin ended with %w", err)
				}
				<-ctx.Done()
				return errors.New("killed")
			})
		})
		errs := make(chan error, 1)
		go func() {
			errs <- c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{Stdin: nopReader{t.Context()}, Stdout: io.Discard})
		}()
		wait(t, running, "the command to start")
		cancel(drain)
		if err := wait(t, errs, "the executor"); c.status && (err == nil || !strings.Contains(err.Error(), drain.Error())) {
			t.Errorf("the client got %v, want %q", err, drain)
		}
		if err := s.result(t); !errors.Is(err, drain) {
			t.Errorf("ServeCommand returned %v, want %v", err, drain)
		}
	})
}

func TestCommandClientThatTakesNothingDoesNotHoldUpADrain(t *testing.T) {
	eachExecClient(t, func(t *testing.T, c execClient) {
		ctx, cancel := context.WithCancelCause(t.Context())
		stuck := make(chan struct{}, 1)
		drain := errors.New("drained")
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServeCommand(w, r.WithContext(ctx), CommandRequest{Stdout: true}, Options{closeGrace: 300 * time.Millisecond}, func(ctx context.Context, stdio Stdio) error {
				data := make([]byte, 1<<20)
				timer := time.AfterFunc(300*time.Millisecond, func() { signal(stuck) })
				defer timer.Stop()
				for {
					timer.Reset(300 * time.Millisecond)
					if _, err := stdio.Stdout.Write(data); err != nil {
						return err
					}
				}
			})
		})
		client, cancelClient := context.WithCancel(t.Context())
		release := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.executor(t, s.URL).StreamWithContext(client, remotecommand.StreamOptions{Stdout: stuckWriter{release}})
		}()
		wait(t, stuck, "the output to get stuck")
		cancel(drain)
		if err := s.result(t); !errors.Is(err, drain) {
			t.Errorf("got %v, want %v", err, drain)
		}
		cancelClient()
		close(release)
		wait(t, done, "the executor")
	})
}

// stuckWriter blocks until it is released, and then fails.
type stuckWriter struct{ release chan struct{} }

func (w stuckWriter) Write([]byte) (int, error) {
	<-w.release
	return 0, io.ErrClosedPipe
}

func TestCommandRefusals(t *testing.T) {
	websocketHeaders := http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	with := func(base http.Header, pairs ...string) http.Header {
		h := base.Clone()
		for i := 0; i < len(pairs); i += 2 {
			h.Set(pairs[i], pairs[i+1])
		}
		return h
	}
	spdyHeaders := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}}
	cases := map[string]struct {
		req          CommandRequest
		method       string
		header       http.Header
		wantCode     int
		wantAccepted int
	}{
		"no upgrade at all":                {CommandRequest{Stdout: true}, "POST", http.Header{}, 400, 0},
		"an unknown upgrade":               {CommandRequest{Stdout: true}, "POST", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"h2c"}}, 400, 0},
		"a terminal with stderr":           {CommandRequest{Stdout: true, Stderr: true, TTY: true}, "GET", websocketHeaders, 400, 0},
		"no stream asked for":              {CommandRequest{}, "GET", websocketHeaders, 400, 0},
		"a foreign origin by WebSocket":    {CommandRequest{Stdout: true}, "GET", with(websocketHeaders, "Origin", "https://evil.example"), 403, 0},
		"a foreign origin by SPDY":         {CommandRequest{Stdout: true}, "POST", with(spdyHeaders, "Origin", "https://evil.example", "X-Stream-Protocol-Version", "v4.channel.k8s.io"), 403, 0},
		"an unknown subprotocol":           {CommandRequest{Stdout: true}, "GET", with(websocketHeaders, "Sec-Websocket-Protocol", "v9.channel.k8s.io"), 400, 0},
		"a long list of subprotocols":      {CommandRequest{Stdout: true}, "GET", with(websocketHeaders, "Sec-Websocket-Protocol", strings.Repeat("x, ", 2000)+"y"), 400, 0},
		"a WebSocket without a key":        {CommandRequest{Stdout: true}, "GET", with(websocketHeaders, "Sec-Websocket-Key", "short"), 400, 0},
		"a WebSocket of another version":   {CommandRequest{Stdout: true}, "GET", with(websocketHeaders, "Sec-Websocket-Version", "7"), 400, 0},
		"a WebSocket by POST":              {CommandRequest{Stdout: true}, "POST", websocketHeaders, 405, 0},
		"SPDY without a protocol":          {CommandRequest{Stdout: true}, "POST", spdyHeaders, 400, 0},
		"SPDY with an empty protocol":      {CommandRequest{Stdout: true}, "POST", with(spdyHeaders, "X-Stream-Protocol-Version", " , "), 400, 0},
		"SPDY with unknown protocols only": {CommandRequest{Stdout: true}, "POST", with(spdyHeaders, "X-Stream-Protocol-Version", "v5.channel.k8s.io, v9"), 403, 4},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := serveCommand(t, tc.req, Options{}, func(context.Context, Stdio) error {
				t.Error("run was called")
				return nil
			})
			r, err := http.NewRequest(tc.method, s.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = tc.header
			resp, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			var status metav1.Status
			if err := json.Unmarshal(body, &status); err != nil {
				t.Fatalf("%v in %q", err, body)
			}
			if resp.StatusCode != tc.wantCode || int(status.Code) != tc.wantCode || status.Kind != "Status" {
				t.Errorf("got %d and %s, want %d", resp.StatusCode, body, tc.wantCode)
			}
			if len(body) > 1024 {
				t.Errorf("the status has %d bytes", len(body))
			}
			if got := resp.Header.Values("X-Accepted-Stream-Protocol-Versions"); len(got) != tc.wantAccepted {
				t.Errorf("accepted protocols: %q", got)
			}
			if err := s.result(t); err == nil {
				t.Error("ServeCommand returned nil")
			}
		})
	}
}

func TestCommandAllowsOrigins(t *testing.T) {
	for name, tc := range map[string]struct {
		origin func(s *server) string
		check  func(*http.Request) bool
	}{
		"its own": {func(s *server) string { return s.URL }, nil},
		"one that is allowed by the caller": {
			func(*server) string { return "https://console.example" },
			func(r *http.Request) bool { return r.Header.Get("Origin") == "https://console.example" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveCommand(t, CommandRequest{Stdout: true}, Options{CheckOrigin: tc.check}, func(context.Context, Stdio) error { return nil })
			c, _, err := dialWebSocket(t, s.URL, http.Header{"Origin": {tc.origin(s)}}, "v5.channel.k8s.io")
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			s.result(t)
		})
	}
}

// message is a WebSocket message that a test expects.
type message struct {
	Type int
	Data string
}

// readMessages reads up to the close frame, whose code it returns.
func readMessages(t testing.TB, c *websocket.Conn) ([]message, int) {
	t.Helper()
	var got []message
	for {
		kind, data, err := c.ReadMessage()
		var closed *websocket.CloseError
		if errors.As(err, &closed) {
			return got, closed.Code
		}
		if err != nil {
			t.Fatalf("after %v: %v", got, err)
		}
		got = append(got, message{kind, string(data)})
	}
}

func TestCommandWebSocketForms(t *testing.T) {
	const success = `{"metadata":{},"status":"Success"}`
	b64 := func(channel, s string) message {
		return message{websocket.TextMessage, channel + base64.StdEncoding.EncodeToString([]byte(s))}
	}
	raw := func(s string) message { return message{websocket.BinaryMessage, s} }
	cases := map[string]struct {
		protocols    []string
		send         []message
		wantProtocol string
		want         []message
	}{
		"v5": {
			[]string{"v5.channel.k8s.io"}, []message{raw("\x00hello"), raw("\xff\x00")},
			"v5.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
		"v5 in base64": {
			[]string{"v5.base64.channel.k8s.io"}, []message{b64("0", "hello"), raw("\xff\x00")},
			"v5.base64.channel.k8s.io", []message{b64("1", ""), b64("1", "hello"), b64("3", success)},
		},
		"v4": {
			[]string{"v4.channel.k8s.io"}, []message{raw("\x00hello"), raw("\x00.")},
			"v4.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
		"v4 in base64": {
			[]string{"v4.base64.channel.k8s.io"}, []message{b64("0", "hello"), b64("0", ".")},
			"v4.base64.channel.k8s.io", []message{b64("1", ""), b64("1", "hello"), b64("3", success)},
		},
		"the first version says nothing of success": {
			[]string{"channel.k8s.io"}, []message{raw("\x00hello"), raw("\x00.")},
			"channel.k8s.io", []message{raw("\x01"), raw("\x01hello")},
		},
		"the first version in base64": {
			[]string{"base64.channel.k8s.io"}, []message{b64("0", "hello"), b64("0", ".")},
			"base64.channel.k8s.io", []message{b64("1", ""), b64("1", "hello")},
		},
		"no subprotocol is the first version": {
			nil, []message{raw("\x00hello"), raw("\x00.")},
			"", []message{raw("\x01"), raw("\x01hello")},
		},
		"a browser's token among the subprotocols": {
			[]string{"base64url.bearer.authorization.k8s.io.c2VjcmV0", "v4.channel.k8s.io"}, []message{raw("\x00hello"), raw("\x00.")},
			"v4.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
		"the client's preference": {
			[]string{"v9.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"}, []message{raw("\x00hello"), raw("\x00.")},
			"v4.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
		"what means nothing is ignored": {
			[]string{"v4.channel.k8s.io"},
			[]message{raw(""), raw("\x01no"), raw("\x02no"), raw("\x03no"), raw("\x04{}"), raw("\x07no"), raw("\xff\x00"), raw("\x00hello"), raw("\x00.")},
			"v4.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
		"a CLOSE of nothing": {
			[]string{"v5.channel.k8s.io"}, []message{raw("\xff"), raw("\xff\x01"), raw("\xff\x63"), raw("\x00hello"), raw("\xff\x00")},
			"v5.channel.k8s.io", []message{raw("\x01"), raw("\x01hello"), raw("\x03" + success)},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				// Up to a dot where the protocol has no half-close.
				var got []byte
				for buf := make([]byte, 64); !bytes.HasSuffix(got, []byte(".")); {
					n, err := stdio.Stdin.Read(buf)
					got = append(got, buf[:n]...)
					if err == io.EOF {
						break
					} else if err != nil {
						return err
					}
				}
				_, err := stdio.Stdout.Write(bytes.TrimSuffix(got, []byte(".")))
				return err
			})
			c := mustDialWebSocket(t, s.URL, tc.protocols...)
			if diff := cmp.Diff(tc.wantProtocol, c.Subprotocol()); diff != "" {
				t.Errorf("subprotocol (-want +got):\n%s", diff)
			}
			for _, m := range tc.send {
				if err := c.WriteMessage(m.Type, []byte(m.Data)); err != nil {
					t.Fatal(err)
				}
			}
			got, code := readMessages(t, c)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("messages (-want +got):\n%s", diff)
			}
			if code != websocket.CloseNormalClosure {
				t.Errorf("close code %d", code)
			}
			if err := s.result(t); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCommandFirstMessageIsOnTheLowestChannel(t *testing.T) {
	for name, tc := range map[string]struct {
		req  CommandRequest
		want string
	}{
		"stdout":     {CommandRequest{Stdout: true, Stderr: true}, "\x01"},
		"stderr":     {CommandRequest{Stderr: true}, "\x02"},
		"stdin only": {CommandRequest{Stdin: true}, "\x03"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveCommand(t, tc.req, Options{}, func(context.Context, Stdio) error { return nil })
			got, _ := readMessages(t, mustDialWebSocket(t, s.URL, "v5.channel.k8s.io"))
			if diff := cmp.Diff(message{websocket.BinaryMessage, tc.want}, got[0]); diff != "" {
				t.Errorf("first message (-want +got):\n%s", diff)
			}
		})
	}
}

// rawFrames writes masked WebSocket frames with a mask of zeros.
func rawFrame(first byte, payload string) []byte {
	frame := []byte{first}
	switch {
	case len(payload) < 126:
		frame = append(frame, 0x80|byte(len(payload)))
	default:
		frame = append(frame, 0x80|126, byte(len(payload)>>8), byte(len(payload)))
	}
	return append(append(frame, 0, 0, 0, 0), payload...)
}

func TestCommandTakesFragments(t *testing.T) {
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
		_, err := io.Copy(stdio.Stdout, stdio.Stdin)
		return err
	})
	c := mustDialWebSocket(t, s.URL, "v5.channel.k8s.io")
	var frames []byte
	for _, f := range [][]byte{
		rawFrame(0x02, ""), rawFrame(0x00, "\x00one"), rawFrame(0x89, "ping"), rawFrame(0x00, "\x01two"), rawFrame(0x80, "three"),
		rawFrame(0x02, "\xff"), rawFrame(0x80, "\x00"),
	} {
		frames = append(frames, f...)
	}
	for i := range frames { // byte by byte, as a network may deliver it
		if _, err := c.NetConn().Write(frames[i : i+1]); err != nil {
			t.Fatal(err)
		}
	}
	got, _ := readMessages(t, c)
	var out string
	for _, m := range got {
		if m.Data[0] == 1 {
			out += m.Data[1:]
		}
	}
	if diff := cmp.Diff("one\x01twothree", out); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

func TestCommandWebSocketFaults(t *testing.T) {
	cases := map[string]struct {
		protocol string
		frames   []byte
		wantCode int // of the close frame
	}{
		"a message of more than 32 MiB":  {"v5.channel.k8s.io", []byte{0x82, 0x80 | 127, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0}, websocket.CloseMessageTooBig},
		"a message of 2^63 bytes":        {"v5.channel.k8s.io", []byte{0x82, 0x80 | 127, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, websocket.CloseProtocolError},
		"an unmasked frame":              {"v5.channel.k8s.io", []byte{0x82, 2, 0, 'x'}, websocket.CloseProtocolError},
		"a continuation of nothing":      {"v5.channel.k8s.io", rawFrame(0x80, "x"), websocket.CloseProtocolError},
		"a compressed frame":             {"v5.channel.k8s.io", rawFrame(0xc2, "x"), websocket.CloseProtocolError},
		"what is no base64":              {"v4.base64.channel.k8s.io", rawFrame(0x81, "0!!!!"), websocket.CloseProtocolError},
		"base64 that breaks off":         {"v4.base64.channel.k8s.io", rawFrame(0x81, "0YWJ"), websocket.CloseProtocolError},
		"a ping of more than 125 bytes":  {"v5.channel.k8s.io", rawFrame(0x89, strings.Repeat("x", 126)), websocket.CloseProtocolError},
		"a close frame with a bad code":  {"v5.channel.k8s.io", rawFrame(0x88, "\x00\x01"), websocket.CloseProtocolError},
		"a close frame with broken text": {"v5.channel.k8s.io", rawFrame(0x88, "\x03\xe8\xff"), websocket.CloseProtocolError},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				io.Copy(io.Discard, stdio.Stdin)
				<-ctx.Done()
				return context.Cause(ctx)
			})
			c := mustDialWebSocket(t, s.URL, tc.protocol)
			if _, err := c.NetConn().Write(tc.frames); err != nil {
				t.Fatal(err)
			}
			if code := s.closeAfterFault(t, c); code != tc.wantCode {
				t.Errorf("close code %d, want %d", code, tc.wantCode)
			}
			if err := s.result(t); !errors.Is(err, ErrProtocol) {
				t.Errorf("got %v, want %v", err, ErrProtocol)
			}
		})
	}
}

// closeAfterFault reads to the end and returns the close code, 0 if there is
// none.
func (s *server) closeAfterFault(t testing.TB, c *websocket.Conn) int {
	t.Helper()
	for {
		if _, _, err := c.ReadMessage(); err != nil {
			var closed *websocket.CloseError
			if errors.As(err, &closed) {
				return closed.Code
			}
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				t.Fatal("the connection stayed open")
			}
			return 0
		}
	}
}

func TestCommandResizeIsBounded(t *testing.T) {
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true, TTY: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
		for size := range stdio.Resize {
			if size == (TerminalSize{Width: 80, Height: 25}) {
				return nil
			}
		}
		return errors.New("the size has not come")
	})
	c := mustDialWebSocket(t, s.URL, "v5.channel.k8s.io")
	for _, m := range []string{
		"nonsense", `{"Width":`, `"x"}`, `{"Width":70000,"Height":1}`, `[1,2]`,
		strings.Repeat("{", 100_000), strings.Repeat(" ", 5000),
		`{"Width":80,"Hei`, `ght":24}{"Width":80`, `,"Height":25}`,
	} {
		if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x04"+m)); err != nil {
			t.Fatal(err)
		}
	}
	readMessages(t, c)
	if err := s.result(t); err != nil {
		t.Error(err)
	}
}

func TestCommandKeepsWhatThePausedClientHasNotRead(t *testing.T) {
	// The command ends while the client still sends and hasn't read a thing.
	// If the server closed its socket now, the kernel would reset the
	// connection and throw the output away.
	eachExecClient(t, func(t *testing.T, c execClient) {
		output := random(t, 1<<20)
		s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			_, err := stdio.Stdout.Write(output)
			return err
		})
		var out bytes.Buffer
		err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{
			Stdin:  endless{},
			Stdout: &slowStart{w: &out, wait: 300 * time.Millisecond},
		})
		if err != nil {
			t.Error(err)
		}
		if !bytes.Equal(out.Bytes(), output) {
			t.Errorf("got %d bytes of %d", out.Len(), len(output))
		}
		if err := s.result(t); err != nil {
			t.Error(err)
		}
	})
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// slowStart is a writer that takes its time once.
type slowStart struct {
	w    io.Writer
	wait time.Duration
}

func (s *slowStart) Write(p []byte) (int, error) {
	time.Sleep(s.wait)
	s.wait = 0
	return s.w.Write(p)
}

// TestCommandThatDoesNotReadItsStdin takes more than a minute: client-go gives
// up after 61 s without a pong, or 60 s without progress of a write, and its
// times can't be changed.
func TestCommandThatDoesNotReadItsStdin(t *testing.T) {
	if testing.Short() {
		t.Skip("takes more than a minute")
	}
	t.Parallel()
	for _, c := range execClients {
		if !c.half {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const size = 64 << 20
			s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				select {
				case <-time.After(150 * time.Second):
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				n, err := io.Copy(io.Discard, stdio.Stdin)
				fmt.Fprint(stdio.Stdout, n)
				return err
			})
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			var out bytes.Buffer
			err := c.executor(t, s.URL).StreamWithContext(ctx, remotecommand.StreamOptions{
				Stdin: io.LimitReader(endless{}, size), Stdout: &out,
			})
			if err != nil {
				t.Errorf("executor: %v", err)
			}
			if err := s.result(t); err != nil {
				t.Errorf("ServeCommand: %v", err)
			}
			if diff := cmp.Diff(fmt.Sprint(size), out.String()); diff != "" {
				t.Errorf("bytes read (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCommandOverTLS(t *testing.T) {
	data := random(t, 1<<20+5)
	s := &server{results: make(chan error, 1)}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.results <- ServeCommand(w, r, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			_, err := io.Copy(stdio.Stdout, stdio.Stdin)
			return err
		})
	}))
	t.Cleanup(s.Close)
	config := &rest.Config{Host: s.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	e, err := remotecommand.NewWebSocketExecutor(config, "GET", s.URL)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := e.StreamWithContext(testContext(t), remotecommand.StreamOptions{Stdin: bytes.NewReader(data), Stdout: &out}); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(out.Bytes(), data) {
		t.Errorf("got %d bytes back that differ from the %d sent", out.Len(), len(data))
	}
	if err := s.result(t); err != nil {
		t.Error(err)
	}
}
