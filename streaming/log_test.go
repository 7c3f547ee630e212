package streaming

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func serveLog(t testing.TB, follow bool, opts Options, write func(context.Context, io.Writer) error) *server {
	t.Helper()
	return newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServeLog(w, r, follow, opts, write)
	})
}

func get(t testing.TB, s *server) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(testContext(t), "GET", s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func TestLogOverHTTP(t *testing.T) {
	broken := errors.New("the log file is gone")
	cases := map[string]struct {
		write   func(context.Context, io.Writer) error
		want    string
		wantErr error // of reading the body
		code    int
	}{
		"a log": {func(_ context.Context, out io.Writer) error {
			io.WriteString(out, "one\n")
			_, err := io.WriteString(out, "two\n")
			return err
		}, "one\ntwo\n", nil, 200},
		"an empty log":    {func(context.Context, io.Writer) error { return nil }, "", nil, 200},
		"an early error":  {func(context.Context, io.Writer) error { return broken }, "", nil, 500},
		"an early status": {func(context.Context, io.Writer) error { return apierrors.NewBadRequest("no") }, "", nil, 400},
		"an error after the first line": {func(_ context.Context, out io.Writer) error {
			io.WriteString(out, "one\n")
			return broken
		}, "one\n", io.ErrUnexpectedEOF, 200},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := serveLog(t, false, Options{}, tc.write)
			resp := get(t, s)
			body, err := io.ReadAll(resp.Body)
			if !errors.Is(err, tc.wantErr) {
				t.Errorf("reading ended with %v, want %v", err, tc.wantErr)
			}
			if resp.StatusCode != tc.code {
				t.Errorf("code %d, want %d", resp.StatusCode, tc.code)
			}
			if tc.code != 200 {
				var status metav1.Status
				if err := json.Unmarshal(body, &status); err != nil || int(status.Code) != tc.code {
					t.Errorf("%v: %s", err, body)
				}
				if s.result(t) == nil {
					t.Error("ServeLog returned nil")
				}
				return
			}
			if diff := cmp.Diff(tc.want, string(body)); diff != "" {
				t.Errorf("log (-want +got):\n%s", diff)
			}
			if got := resp.Header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
				t.Errorf("content type %q", got)
			}
		})
	}
}

func TestLogErrorOverHTTP2CutsTheResponseOff(t *testing.T) {
	broken := errors.New("the log file is gone")
	s := &server{results: make(chan error, 1)}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.results <- ServeLog(w, r, true, Options{}, func(_ context.Context, out io.Writer) error {
			io.WriteString(out, "one\n")
			return broken
		})
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	resp := get(t, s)
	body, err := io.ReadAll(resp.Body)
	if resp.ProtoMajor != 2 || string(body) != "one\n" || err == nil {
		t.Errorf("HTTP/%d: %q, %v; want a line and an error", resp.ProtoMajor, body, err)
	}
	if err := s.result(t); !errors.Is(err, broken) {
		t.Error(err)
	}
}

func TestLogFollows(t *testing.T) {
	for name, follow := range map[string]bool{"followed, each write is flushed": true, "else Flush is": false} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan struct{})
			s := serveLog(t, follow, Options{}, func(ctx context.Context, out io.Writer) error {
				if Protocol(ctx) != "http" {
					t.Errorf("protocol %q", Protocol(ctx))
				}
				for range 3 {
					io.WriteString(out, "line\n")
					if !follow {
						out.(http.Flusher).Flush()
					}
					select {
					case <-seen:
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
				return nil
			})
			lines := bufio.NewReader(get(t, s).Body)
			for range 3 {
				if line, err := lines.ReadString('\n'); line != "line\n" {
					t.Fatalf("got %q, %v", line, err)
				}
				seen <- struct{}{}
			}
			if _, err := lines.ReadByte(); err != io.EOF {
				t.Errorf("got %v, want %v", err, io.EOF)
			}
		})
	}
}

func TestLogOverWebSocket(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 5000)
	b64 := func(s string) message {
		return message{websocket.TextMessage, base64.StdEncoding.EncodeToString([]byte(s))}
	}
	raw := func(s string) message { return message{websocket.BinaryMessage, s} }
	cases := map[string]struct {
		protocols []string
		err       error
		want      []message
		code      int
	}{
		"binary":         {[]string{"binary.k8s.io"}, nil, []message{raw(""), raw("one\n"), raw(long[:frameSize]), raw(long[frameSize:])}, 1000},
		"base64":         {[]string{"base64.binary.k8s.io"}, nil, []message{b64(""), b64("one\n"), b64(long[:chunkSize]), b64(long[chunkSize : 2*chunkSize]), b64(long[2*chunkSize:])}, 1000},
		"no subprotocol": {nil, nil, []message{raw(""), raw("one\n"), raw(long[:frameSize]), raw(long[frameSize:])}, 1000},
		"an error later": {[]string{"binary.k8s.io"}, errors.New("the log file is gone"), []message{raw(""), raw("one\n"), raw(long[:frameSize]), raw(long[frameSize:])}, 1011},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := serveLog(t, true, Options{}, func(_ context.Context, out io.Writer) error {
				io.WriteString(out, "one\n")
				io.WriteString(out, long)
				return tc.err
			})
			c := mustDialWebSocket(t, s.URL, tc.protocols...)
			got, code := readMessages(t, c)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("messages (-want +got):\n%s", diff)
			}
			if code != tc.code {
				t.Errorf("close code %d, want %d", code, tc.code)
			}
			if err := s.result(t); !errors.Is(err, tc.err) {
				t.Errorf("got %v, want %v", err, tc.err)
			}
		})
	}
}

func TestLogRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		protocols []string
		origin    string
		want      int
	}{
		"an early error":         {[]string{"binary.k8s.io"}, "", 409},
		"a foreign origin":       {nil, "https://evil.example", 403},
		"an unknown subprotocol": {[]string{"channel.k8s.io"}, "", 400},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveLog(t, true, Options{}, func(context.Context, io.Writer) error {
				if name != "an early error" {
					t.Error("write was called")
				}
				return apierrors.NewConflict(metav1.SchemeGroupVersion.WithResource("x").GroupResource(), "web", errors.New("it has not started"))
			})
			header := http.Header{}
			if tc.origin != "" {
				header.Set("Origin", tc.origin)
			}
			_, resp, err := dialWebSocket(t, s.URL, header, tc.protocols...)
			if err == nil || resp.StatusCode != tc.want {
				t.Fatalf("got %v, %v, want %d", err, resp, tc.want)
			}
			body, _ := io.ReadAll(resp.Body)
			if !bytes.Contains(body, []byte(`"kind":"Status"`)) {
				t.Errorf("body %q", body)
			}
			if s.result(t) == nil {
				t.Error("ServeLog returned nil")
			}
		})
	}
}

func TestLogEndsWithItsClient(t *testing.T) {
	for name, start := range map[string]func(t *testing.T, s *server) (leave func()){
		"HTTP": func(t *testing.T, s *server) func() {
			resp := get(t, s)
			resp.Body.Read(make([]byte, 5))
			return func() { resp.Body.Close() }
		},
		"WebSocket": func(t *testing.T, s *server) func() {
			c := mustDialWebSocket(t, s.URL, "binary.k8s.io")
			return func() { c.Close() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveLog(t, true, Options{}, func(ctx context.Context, out io.Writer) error {
				io.WriteString(out, "line\n")
				<-ctx.Done()
				return context.Cause(ctx)
			})
			start(t, s)()
			if err := s.result(t); err == nil || name == "WebSocket" && !errors.Is(err, ErrClientGone) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestLogEndsWithItsRequest(t *testing.T) {
	drain := errors.New("draining")
	for _, kind := range []string{"HTTP", "WebSocket"} {
		t.Run(kind, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
				return ServeLog(w, r.WithContext(ctx), true, Options{}, func(ctx context.Context, out io.Writer) error {
					io.WriteString(out, "line\n")
					<-ctx.Done()
					return ctx.Err()
				})
			})
			if kind == "HTTP" {
				resp := get(t, s)
				resp.Body.Read(make([]byte, 5))
				cancel(drain)
				if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("the body ended with %v, want %v", err, io.ErrUnexpectedEOF)
				}
			} else {
				c := mustDialWebSocket(t, s.URL)
				cancel(drain)
				var closed *websocket.CloseError
				for {
					if _, _, err := c.ReadMessage(); err != nil {
						if !errors.As(err, &closed) || closed.Code != websocket.CloseInternalServerErr || closed.Text != "draining" {
							t.Errorf("got %v", err)
						}
						break
					}
				}
			}
			if err := s.result(t); !errors.Is(err, drain) {
				t.Errorf("got %v, want %v", err, drain)
			}
		})
	}
}

func TestLogOfASlowReaderIsBounded(t *testing.T) {
	// Nobody reads; the writer must get stuck rather than fill the memory.
	const size = 256 << 20
	for _, kind := range []string{"HTTP", "WebSocket"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			written := make(chan int, 1)
			s := serveLog(t, true, Options{}, func(ctx context.Context, out io.Writer) error {
				n := 0
				defer func() { written <- n }()
				for buf := make([]byte, 64<<10); n < size; n += len(buf) {
					if _, err := out.Write(buf); err != nil {
						return err
					}
				}
				return nil
			})
			var leave func() error
			if kind == "HTTP" {
				leave = get(t, s).Body.Close
			} else {
				leave = mustDialWebSocket(t, s.URL).Close
			}
			select {
			case n := <-written:
				t.Errorf("%d bytes went to a client that reads none", n)
			case <-time.After(500 * time.Millisecond):
			}
			leave()
			if n := wait(t, written, "the writer"); n >= size {
				t.Errorf("%d bytes went to a client that reads none", n)
			}
			s.result(t)
		})
	}
}

// pausedLog serves a log that never ends, and the word "again" at /again.
func pausedLog(t *testing.T, http2 bool, opts Options, cause *error) *server {
	t.Helper()
	s := &server{results: make(chan error, 1)}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/again" {
			io.WriteString(w, "again")
			return
		}
		s.results <- ServeLog(w, r, true, opts, func(ctx context.Context, out io.Writer) error {
			for buf := make([]byte, chunkSize); ; {
				if _, err := out.Write(buf); err != nil {
					<-ctx.Done()
					*cause = context.Cause(ctx)
					return err
				}
			}
		})
	}))
	s.EnableHTTP2 = http2
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func TestLogOverHTTPGivesUpAClientThatTakesNothing(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var cause error
			s := pausedLog(t, http2, Options{PeerTimeout: 200 * time.Millisecond, StallTimeout: 300 * time.Millisecond}, &cause)
			resp := get(t, s)
			if err := s.result(t); !errors.Is(err, ErrPeerTimeout) {
				t.Errorf("got %v, want %v", err, ErrPeerTimeout)
			}
			if !errors.Is(cause, ErrPeerTimeout) {
				t.Errorf("the context ended with %v, want %v", cause, ErrPeerTimeout)
			}
			if !http2 {
				return
			}
			// The connection, which is that of many, goes on.
			var reused bool
			r, err := http.NewRequestWithContext(httptrace.WithClientTrace(testContext(t), &httptrace.ClientTrace{
				GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused },
			}), "GET", s.URL+"/again", nil)
			if err != nil {
				t.Fatal(err)
			}
			again, err := s.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Body.Close()
			if body, err := io.ReadAll(again.Body); string(body) != "again" || err != nil || !reused {
				t.Errorf("another request got %q, %v, on the same connection: %t", body, err, reused)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err == nil {
				t.Error("the log ended as if it were whole")
			}
		})
	}
}

func TestLogOverHTTPWaitsForAPager(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const stall = 400 * time.Millisecond
			s := &server{results: make(chan error, 1)}
			s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				s.results <- ServeLog(w, r, true, Options{PeerTimeout: stall, StallTimeout: stall}, func(ctx context.Context, out io.Writer) error {
					for range 3 { // between writes, no time counts
						if _, err := out.Write(make([]byte, chunkSize)); err != nil {
							return err
						}
						select {
						case <-time.After(2 * stall):
						case <-ctx.Done():
							return context.Cause(ctx)
						}
					}
					return nil
				})
			}))
			s.EnableHTTP2 = http2
			s.StartTLS()
			t.Cleanup(s.Close)
			if n, err := io.Copy(io.Discard, get(t, s).Body); n != 3*chunkSize || err != nil {
				t.Errorf("got %d bytes, %v", n, err)
			}
			if err := s.result(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLogTellsHowItEnded goes through the proxy that kube-aggregator's is made
// of, too.
func TestLogTellsHowItEnded(t *testing.T) {
	draining := apierrors.NewServiceUnavailable("the server is shutting down:\nconnect again")
	for name, tt := range map[string]struct {
		err  error
		want string
	}{
		"the end of the log": {nil, "200 this is the end of the log"},
		"a status":           {draining, "503 the server is shutting down: connect again"},
		"another error":      {errors.New("the log file is gone"), "500 the log file is gone"},
		"a long error":       {errors.New(strings.Repeat("x", 2*maxLogEnd)), "500 " + strings.Repeat("x", maxLogEnd-4-len("…")) + "…"},
	} {
		for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
			for _, proxied := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %s, proxied %t", name, proto, proxied), func(t *testing.T) {
					start := func(handler http.Handler) *httptest.Server {
						s := httptest.NewUnstartedServer(handler)
						s.EnableHTTP2 = proto == "HTTP/2.0"
						s.StartTLS()
						t.Cleanup(s.Close)
						return s
					}
					s := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("X-Log-Cursor", "some time")
						ServeLog(w, r, true, Options{}, func(_ context.Context, out io.Writer) error {
							io.WriteString(out, "one\n")
							return tt.err
						})
					}))
					if proxied {
						backend := s
						location, err := url.Parse(backend.URL)
						if err != nil {
							t.Fatal(err)
						}
						handler := httputil.NewSingleHostReverseProxy(location)
						handler.Transport = backend.Client().Transport
						s = start(handler)
					}
					r, err := http.NewRequestWithContext(testContext(t), "GET", s.URL, nil)
					if err != nil {
						t.Fatal(err)
					}
					r.Header.Set(HeaderLogEnd, "trailer")
					resp, err := s.Client().Do(r)
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					body, err := io.ReadAll(resp.Body)
					if string(body) != "one\n" || err != nil || resp.Proto != proto {
						t.Errorf("%s: %q, %v", resp.Proto, body, err)
					}
					if got := resp.Trailer.Get(HeaderLogEnd); got != tt.want {
						t.Errorf("the trailer is %q, want %q", got, tt.want)
					}
					if got := resp.Header.Get("X-Log-Cursor"); got != "some time" {
						t.Errorf("the header is %q", got)
					}
				})
			}
		}
	}
}

func TestLogHeadersOfAWebSocket(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("X-Log-Cursor", "some time")
		w.Header().Set("X-Other", "not ours")
		return ServeLog(w, r, true, Options{}, func(_ context.Context, out io.Writer) error { return nil })
	})
	c, resp, err := dialWebSocket(t, s.URL, nil, "binary.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	readMessages(t, c)
	if got := resp.Header.Get("X-Log-Cursor"); got != "some time" {
		t.Errorf("the header is %q", got)
	}
	if got := resp.Header.Get("X-Other"); got != "" {
		t.Errorf("another header is %q, want none", got)
	}
	if c.Subprotocol() != "binary.k8s.io" {
		t.Errorf("subprotocol %q", c.Subprotocol())
	}
	if err := s.result(t); err != nil {
		t.Error(err)
	}
}
