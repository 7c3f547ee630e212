package streaming

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
)

func TestWebSocketCloseIsAnswered(t *testing.T) {
	idle := func(ctx context.Context, stdio Stdio) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	yes := func(ctx context.Context, stdio Stdio) error {
		for {
			if _, err := stdio.Stdout.Write([]byte(strings.Repeat("y\n", 1000))); err != nil {
				return err
			}
		}
	}
	run := func(run func(context.Context, Stdio) error) func(http.ResponseWriter, *http.Request) error {
		return func(w http.ResponseWriter, r *http.Request) error {
			return ServeCommand(w, r, CommandRequest{Stdin: true, Stdout: true}, Options{}, run)
		}
	}
	forward := func(w http.ResponseWriter, r *http.Request) error {
		return ServePortForward(w, r, PortForwardRequest{Ports: []uint16{80}}, Options{}, backendOf(func(ctx context.Context, _ uint16) (PortStream, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}))
	}
	log := func(w http.ResponseWriter, r *http.Request) error {
		return ServeLog(w, r, true, Options{}, func(ctx context.Context, out io.Writer) error {
			io.WriteString(out, "line\n")
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}
	cases := map[string]struct {
		protocol string
		serve    func(http.ResponseWriter, *http.Request) error
		want     error
	}{
		"a command, v5":                {"v5.channel.k8s.io", run(idle), ErrClientGone},
		"a command, v4":                {"v4.channel.k8s.io", run(idle), ErrClientGone},
		"a command, the first version": {"channel.k8s.io", run(idle), ErrClientGone},
		"a command amid its output":    {"v5.channel.k8s.io", run(yes), ErrClientGone},
		"forwarding, the tunnel":       {"SPDY/3.1+portforward.k8s.io", forward, nil},
		"forwarding, the mux protocol": {MuxProtocol, forward, nil},
		"forwarding, the legacy form":  {"v4.channel.k8s.io", forward, nil},
		"a log":                        {"binary.k8s.io", log, ErrClientGone},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			for _, code := range []int{websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived} {
				s := newServer(t, tc.serve)
				c := mustDialWebSocket(t, s.URL, tc.protocol)
				if err := c.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(code, "")); err != nil {
					t.Fatal(err)
				}
				if _, got := readMessages(t, c); got != code {
					t.Errorf("a close with %d was answered with %d", code, got)
				}
				if _, err := c.NetConn().Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("after the close frame there is %v, want %v", err, io.EOF)
				}
				if err := s.result(t); err != tc.want { //nolint:errorlint // in order, there is nothing to add
					t.Errorf("got %v, want %v", err, tc.want)
				}
			}
		})
	}
}

func TestWebSocketThatJustEndsIsACleanCause(t *testing.T) {
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
		<-ctx.Done()
		return context.Cause(ctx)
	})
	c := mustDialWebSocket(t, s.URL, "v5.channel.k8s.io")
	if _, _, err := c.ReadMessage(); err != nil { // unread, it would become a reset
		t.Fatal(err)
	}
	c.Close()
	if err := s.result(t); err != ErrClientGone { //nolint:errorlint // there is nothing to add
		t.Errorf("got %v, want %v", err, ErrClientGone)
	}
}

// rawSession is a way to open a session without a client's library.
type rawSession struct {
	// serve has work write to the client for as long as the session lasts.
	serve   func(w http.ResponseWriter, r *http.Request, work work) error
	headers string
	open    func(io.Writer) error
	goodbye string // "" if there is none
}

type work func(ctx context.Context, out io.Writer) error

// dial opens the session on a connection.
func (s rawSession) dial(t *testing.T, conn net.Conn) {
	t.Helper()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\n%s\r\n", s.headers)
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode >= 400 {
		t.Fatal(err, resp)
	}
	if s.open != nil {
		if err := s.open(conn); err != nil {
			t.Fatal(err)
		}
	}
}

// rawSessions are sessions of every kind and transport.
func rawSessions(opts Options) map[string]rawSession {
	upgrade := func(headers string) string {
		return "Connection: Upgrade\r\nOrigin: http://x\r\n" + headers
	}
	overWebSocket := func(protocol string) string {
		return upgrade("Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: " + protocol + "\r\n")
	}
	overSPDY := func(protocol string) string {
		return upgrade("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: " + protocol + "\r\n")
	}
	command := func(w http.ResponseWriter, r *http.Request, work work) error {
		return ServeCommand(w, r, CommandRequest{Stdin: true, Stdout: true}, opts, func(ctx context.Context, stdio Stdio) error {
			return work(ctx, stdio.Stdout)
		})
	}
	forward := func(w http.ResponseWriter, r *http.Request, work work) error {
		return ServePortForward(w, r, PortForwardRequest{Ports: []uint16{80}}, opts, backendOf(func(ctx context.Context, _ uint16) (PortStream, error) {
			here, there := net.Pipe()
			go work(ctx, there) // until join closes the other end
			return pipeStream{here}, nil
		}))
	}
	log := func(w http.ResponseWriter, r *http.Request, work work) error {
		return ServeLog(w, r, true, opts, func(ctx context.Context, out io.Writer) error {
			out.(http.Flusher).Flush()
			return work(ctx, out)
		})
	}
	spdyStreams := func(headers ...http.Header) func(w io.Writer) error {
		return func(w io.Writer) error {
			framer, err := spdy.NewFramer(w, nil)
			for i, h := range headers {
				if err == nil {
					err = framer.WriteFrame(&spdy.SynStreamFrame{StreamId: spdy.StreamId(2*i + 1), Headers: h})
				}
			}
			return err
		}
	}
	commandStreams := spdyStreams(http.Header{"streamtype": {"error"}}, http.Header{"streamtype": {"stdin"}}, http.Header{"streamtype": {"stdout"}})
	forwardStreams := spdyStreams(
		http.Header{"streamtype": {"error"}, "port": {"80"}, "requestid": {"1"}},
		http.Header{"streamtype": {"data"}, "port": {"80"}, "requestid": {"1"}})
	goAway := string([]byte{0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0})
	closeFrame := string(rawFrame(0x88, "\x03\xe8"))
	tunnelled := func(w io.Writer) error {
		var frames strings.Builder
		if err := forwardStreams(&frames); err != nil {
			return err
		}
		_, err := w.Write(rawFrame(0x82, frames.String()))
		return err
	}
	multiplexed := func(w io.Writer) error {
		_, err := w.Write(rawFrame(0x82, muxFrame(muxData, muxSYN, 1, opening(`{"network":"tcp","port":80}`))+muxFrame(muxUpdate, 0, 1, "", 1<<30)))
		return err
	}
	return map[string]rawSession{
		"a command over WebSocket": {command, overWebSocket("v5.channel.k8s.io"), nil, closeFrame},
		"a command over SPDY":      {command, overSPDY("v4.channel.k8s.io"), commandStreams, goAway},
		"forwarding over SPDY":     {forward, overSPDY("portforward.k8s.io"), forwardStreams, goAway},
		"forwarding by the tunnel": {forward, overWebSocket("SPDY/3.1+portforward.k8s.io"), tunnelled, closeFrame},
		"forwarding by mux":        {forward, overWebSocket(MuxProtocol), multiplexed, closeFrame},
		"the legacy forwarding":    {forward, overWebSocket("v4.channel.k8s.io"), nil, closeFrame},
		"a log over WebSocket":     {log, overWebSocket("binary.k8s.io"), nil, closeFrame},
		"a log over HTTP":          {log, "", nil, ""},
	}
}

// TestDeadClientIsFoundInTime: a client behind a proxy that goes on to
// acknowledge everything, or merely reads no more, is given up within
// PeerTimeout, on every protocol that has pings.
func TestDeadClientIsFoundInTime(t *testing.T) {
	opts := Options{PingInterval: 100 * time.Millisecond, PeerTimeout: 2 * time.Second}
	idle := func(ctx context.Context, _ io.Writer) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	flood := func(_ context.Context, out io.Writer) error {
		for buf := make([]byte, chunkSize); ; {
			if _, err := out.Write(buf); err != nil {
				return err
			}
		}
	}
	loses := func(b *blackhole) { close(b.dark) }
	stalls := func(b *blackhole) { close(b.frozen) }
	pong, ping := string(rawFrame(0x8a, "")), string(rawFrame(0x89, ""))
	spdyPong := string([]byte{0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2})
	for what, tc := range map[string]struct {
		work work
		dies func(*blackhole)
		// pings says that the client sends pings of its own, which is as much as
		// can be known of one that reads nothing.
		pings bool
	}{
		"nothing happens and the network swallows all": {idle, loses, false},
		"nothing happens and the network stalls":       {idle, stalls, false},
		"the network stalls amid output for who pings": {flood, stalls, true},
	} {
		for name, session := range rawSessions(opts) {
			overWebSocket := strings.Contains(session.headers, "websocket")
			if session.headers == "" || tc.pings && !overWebSocket {
				continue
			}
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
					r.Host = "x"
					return session.serve(w, r, tc.work)
				})
				proxy := newBlackhole(t, s.addr())
				conn, err := net.Dial("tcp", proxy.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				session.dial(t, conn)
				sign := spdyPong
				if tc.pings {
					sign = ping
				} else if overWebSocket {
					sign = pong
				}
				// It takes nothing, and shows that it lives.
				done := make(chan struct{})
				go func() {
					defer close(done)
					ticker := time.NewTicker(opts.PeerTimeout / 10)
					defer ticker.Stop()
					for err == nil {
						<-ticker.C
						_, err = io.WriteString(conn, sign)
					}
				}()
				t.Cleanup(func() { conn.Close(); <-done })
				select {
				case err := <-s.results:
					t.Fatalf("the session ended with its client alive: %v", err)
				case <-time.After(3 * opts.PeerTimeout / 2):
				}
				tc.dies(proxy)
				began := time.Now()
				if err := s.result(t); !errors.Is(err, ErrPeerTimeout) {
					t.Errorf("got %v, want %v", err, ErrPeerTimeout)
				}
				if took := time.Since(began); took > opts.PeerTimeout+time.Second {
					t.Errorf("it took %v", took)
				}
			})
		}
	}
}

// slowConn is a connection on which a write takes long, by the link's clock, and
// sends nothing.
type slowConn struct {
	*net.TCPConn
	link *link
}

func (c slowConn) Write(p []byte) (int, error) {
	c.link.start = c.link.start.Add(-2 * slowWrite)
	return len(p), nil
}

// TestWritesOfABusyMachine: a client is taken for slow, and then believed in for
// StallTimeout, only if it is the client who is slow.
func TestWritesOfABusyMachine(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	peer, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tcp := conn.(*net.TCPConn)
	l := &link{raw: tcp, tcp: tcp, start: time.Now(), departed: ErrClientGone}
	l.conn = slowConn{tcp, l}
	l.ctx, l.cancel = context.WithCancelCause(t.Context())
	defer l.cancel(nil)
	if err := l.write([]byte("a ping"), nil); err != nil {
		t.Fatal(err)
	}
	if l.congested.Load() != 0 {
		t.Error("a client is taken for slow that isn't")
	}
	// The peer reads nothing: more is written than the kernels hold at its end.
	tcp.SetWriteDeadline(time.Now().Add(time.Second))
	for buf := make([]byte, 1<<20); err == nil; {
		_, err = tcp.Write(buf)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if err := l.write([]byte("a ping"), nil); err != nil {
		t.Fatal(err)
	}
	if l.congested.Load() == 0 {
		t.Error("a slow client isn't taken for one")
	}
}

// TestPausedClientHoldsNothingUp: whatever ends a session, a client that reads
// nothing delays that by closeGrace at most, on every protocol, with TLS and
// without.
func TestPausedClientHoldsNothingUp(t *testing.T) {
	opts := Options{closeGrace: 300 * time.Millisecond}
	const (
		byServer = "the server ends it"
		byClient = "the client says goodbye"
	)
	for name, tc := range rawSessions(opts) {
		for _, secure := range []bool{false, true} {
			for _, end := range []string{byServer, byClient} {
				if end == byClient && tc.goodbye == "" {
					continue
				}
				t.Run(fmt.Sprintf("%s, TLS %t, %s", name, secure, end), func(t *testing.T) {
					t.Parallel()
					drain := errors.New("drained")
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					var written atomic.Int64
					flood := func(_ context.Context, w io.Writer) error {
						for buf := make([]byte, chunkSize); ; {
							n, err := w.Write(buf)
							written.Add(int64(n))
							if err != nil {
								return err
							}
						}
					}
					s := &server{results: make(chan error, 1)}
					s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						r.Host = "x"
						s.results <- tc.serve(w, r.WithContext(mergeValues{ctx, r.Context()}), flood)
					}))
					if secure {
						s.StartTLS()
					} else {
						s.Start()
					}
					t.Cleanup(s.Close)
					conn, err := net.Dial("tcp", s.addr())
					if err != nil {
						t.Fatal(err)
					}
					if secure {
						conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
					}
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(testTimeout))
					tc.dial(t, conn)
					for before := int64(-1); before <= 0 || before != written.Load(); {
						before = written.Load()
						time.Sleep(300 * time.Millisecond) // that it gets no further shows only by waiting
					}
					began := time.Now()
					if end == byClient {
						io.WriteString(conn, tc.goodbye)
					} else {
						cancel(drain)
					}
					err = s.result(t)
					if took := time.Since(began); took > opts.closeGrace+2*time.Second {
						t.Errorf("it took %v", took)
					}
					if end == byServer && !errors.Is(err, drain) {
						t.Errorf("got %v, want %v", err, drain)
					}
					if end == byClient && err != nil && !errors.Is(err, ErrClientGone) {
						t.Errorf("got %v, want %v", err, ErrClientGone)
					}
				})
			}
		}
	}
}

// pipeStream is the server's end of a net.Pipe, which has no half-close.
type pipeStream struct{ net.Conn }

func (pipeStream) CloseWrite() error { return nil }

// mergeValues is a context with another's values.
type mergeValues struct {
	context.Context
	values context.Context
}

func (m mergeValues) Value(key any) any {
	if v := m.Context.Value(key); v != nil {
		return v
	}
	return m.values.Value(key)
}

// serveSPDY serves a connection whose insides the test sees.
func serveSPDY(t *testing.T, opts Options, accept acceptFunc) (*spdyConn, *rawSPDY) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	client.SetDeadline(time.Now().Add(testTimeout))
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), "POST", "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	l := newLink(r, opts.withDefaults(), "")
	l.conn, l.raw = conn, conn
	c := newSPDYConn(l, bufio.NewReader(conn))
	c.beat(func(bool) error { return nil })
	c.serve(accept)
	t.Cleanup(func() {
		c.cancel(nil)
		c.close()
	})
	framer, err := spdy.NewFramer(client, bufio.NewReader(client))
	if err != nil {
		t.Fatal(err)
	}
	return c, &rawSPDY{t, client, framer, map[spdy.StreamId]spdy.Frame{}, map[spdy.StreamId]string{}}
}

func (c *spdyConn) open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

func TestPortForwardForgetsStreamsThatTheClientDoesNotEnd(t *testing.T) {
	large := strings.Repeat("x", 4000)
	cases := map[string]struct {
		dial func(context.Context, uint16) (PortStream, error)
		// open opens streams from id on, and returns the last that will end.
		open func(c *rawSPDY, id spdy.StreamId) spdy.StreamId
		held int // how many are opened before and stay
	}{
		"there is no room": {nil, func(c *rawSPDY, id spdy.StreamId) spdy.StreamId {
			c.open(id, "streamtype", "error", "port", "80", "requestid", strconv.Itoa(int(id)), "x-error-text", "true", "x-large", large)
			return id
		}, 2},
		"a port that refuses": {func(context.Context, uint16) (PortStream, error) { return nil, errors.New("nothing listens there") },
			func(c *rawSPDY, id spdy.StreamId) spdy.StreamId {
				c.open(id, "streamtype", "error", "port", "80", "requestid", strconv.Itoa(int(id)), "x-error-text", "true", "x-large", large)
				c.open(id+2, "streamtype", "data", "port", "80", "requestid", strconv.Itoa(int(id)), "x-large", large)
				return id
			}, 0},
		"a port that takes no more": {func(context.Context, uint16) (PortStream, error) { return closedStream{}, nil },
			func(c *rawSPDY, id spdy.StreamId) spdy.StreamId {
				c.open(id, "streamtype", "error", "port", "80", "requestid", strconv.Itoa(int(id)))
				c.open(id+2, "streamtype", "data", "port", "80", "requestid", strconv.Itoa(int(id)))
				c.write(&spdy.DataFrame{StreamId: id + 2, Data: []byte("x")})
				return id
			}, 0},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			opts := Options{MaxForwards: 2}.withDefaults()
			f := &forwarder{opts: opts, backend: backendOf(tc.dial), pairs: map[string]*pair{}}
			s, c := serveSPDY(t, opts, f.accept)
			id := spdy.StreamId(1)
			for range tc.held {
				c.open(id, "streamtype", "error", "port", "80", "requestid", strconv.Itoa(int(id)))
				id += 2
			}
			for range 500 {
				c.last(tc.open(c, id))
				id += 4
			}
			// The client hears of it before the stream is forgotten.
			for deadline := time.Now().Add(testTimeout); s.open() > tc.held; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d streams are kept, want %d", s.open(), tc.held)
				}
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, p := range f.pairs {
				p.timer.Stop()
			}
		})
	}
}

// closedStream is a port that has said all and takes nothing.
type closedStream struct{}

func (closedStream) Read([]byte) (int, error)  { return 0, io.EOF }
func (closedStream) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
func (closedStream) CloseWrite() error         { return nil }
func (closedStream) Close() error              { return nil }

func TestSPDYStreamsAreBounded(t *testing.T) {
	opts := Options{MaxForwards: 3}
	s, c := serveSPDY(t, opts, func(*spdyConn, *spdyStream, http.Header) bool { return true })
	bound := maxStreams(opts)
	for i := range bound + 1 {
		c.open(spdy.StreamId(2*i+1), "streamtype", "data")
	}
	surplus := spdy.StreamId(2*bound + 1)
	if f, ok := c.last(surplus).(*spdy.RstStreamFrame); !ok || f.Status != spdy.RefusedStream {
		t.Errorf("the surplus stream ended with %v, want a refusal", c.ended[surplus])
	}
	if got := s.open(); got != bound {
		t.Errorf("%d streams are kept, want %d", got, bound)
	}
}

func TestNothingFollowsACloseFrame(t *testing.T) {
	for name, frame := range map[string][]byte{
		"the server's, for a fault":   {0x82, 2, 0, 'x'},
		"the server's, in answer":     rawFrame(0x88, "\x03\xe8"),
		"the server's, for bad codes": rawFrame(0x88, "\x00\x01"),
	} {
		t.Run(name, func(t *testing.T) {
			s := serveCommand(t, CommandRequest{Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				<-ctx.Done()
				return errors.New("the status says so")
			})
			c, err := net.Dial("tcp", s.addr())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testTimeout))
			fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
				"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n")
			r := bufio.NewReader(c)
			if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
				t.Fatal(err, resp)
			}
			if _, err := c.Write(frame); err != nil {
				t.Fatal(err)
			}
			frames, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			// They are short: a byte for the type, one for the length.
			for len(frames) > 1 && frames[0] != 0x88 {
				frames = frames[2+int(frames[1]):]
			}
			if len(frames) < 2 || len(frames) != 2+int(frames[1]) {
				t.Errorf("want a close frame and no more, got %q", frames)
			}
			if err := s.result(t); err == nil {
				t.Error("the session ended without an error")
			}
		})
	}
}

func TestCloseDoesNotWaitForTLS(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	raw, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	borrowed := httptest.NewTLSServer(nil) // for its certificate
	defer borrowed.Close()
	conn := tls.Server(raw, borrowed.TLS)
	done := make(chan error, 1)
	go func() { done <- tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake() }()
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, done, "the handshake"); err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), "GET", "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	l := newLink(r, Options{}.withDefaults(), "")
	l.conn, l.raw = conn, raw
	l.beat(func(bool) error { return nil })
	for _, size := range []int{chunkSize, 1} { // until not even a byte fits
		raw.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		for err = nil; err == nil; {
			_, err = raw.Write(make([]byte, size))
		}
	}
	began := time.Now()
	l.close()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
}
