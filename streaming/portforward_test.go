package streaming

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	clientspdy "k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// backend listens on loopback and hands connections to serve.
func backend(t testing.TB, serve func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// echoBackend sends back what it gets, and ends when that ends.
func echoBackend(t testing.TB) uint16 {
	return backend(t, func(c *net.TCPConn) {
		io.Copy(c, c)
		c.CloseWrite()
	})
}

// closedPort is a port that nothing listens on.
func closedPort(t testing.TB) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func dialLoopback(ctx context.Context, port uint16) (PortStream, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// backendOf is a backend that dials ports and nothing else.
func backendOf(dial func(context.Context, uint16) (PortStream, error)) PortForwardBackend {
	return PortForwardBackend{Dial: func(ctx context.Context, to Endpoint) (PortStream, error) { return dial(ctx, to.Port) }}
}

func servePortForward(t testing.TB, req PortForwardRequest, opts Options, dial func(context.Context, uint16) (PortStream, error)) *server {
	t.Helper()
	return newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServePortForward(w, r, req, opts, backendOf(dial))
	})
}

// forwardClients are client-go's ways to forward ports.
var forwardClients = map[string]func(t testing.TB, address string) httpstream.Dialer{
	"SPDY": func(t testing.TB, address string) httpstream.Dialer {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		transport, upgrader, err := clientspdy.RoundTripperFor(&rest.Config{Host: address})
		if err != nil {
			t.Fatal(err)
		}
		return clientspdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, "POST", u)
	},
	"tunnel": func(t testing.TB, address string) httpstream.Dialer {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		d, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, &rest.Config{Host: address})
		if err != nil {
			t.Fatal(err)
		}
		return d
	},
}

func eachForwardClient(t *testing.T, test func(t *testing.T, dialer func(t testing.TB, address string) httpstream.Dialer)) {
	for name, dialer := range forwardClients {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, dialer)
		})
	}
}

// forward runs client-go's port-forward to the ports and returns the local
// ones in that order. stop ends it and returns its error.
func forward(t testing.TB, dialer httpstream.Dialer, ports ...uint16) (local []uint16, stop func() error) {
	t.Helper()
	var specs []string
	for _, p := range ports {
		specs = append(specs, fmt.Sprintf("0:%d", p))
	}
	end, ready := make(chan struct{}), make(chan struct{})
	f, err := portforward.NewOnAddressesForStreaming(dialer, []string{"127.0.0.1"}, specs, end, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	var once sync.Once
	stop = func() error {
		var err error
		once.Do(func() {
			close(end)
			err = <-done
		})
		return err
	}
	t.Cleanup(func() { stop() })
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("port-forward ended: %v", err)
	case <-time.After(testTimeout):
		t.Fatal("port-forward isn't ready")
	}
	forwarded, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range forwarded {
		local = append(local, p.Local)
	}
	return local, stop
}

func dialTCP(t testing.TB, port uint16) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(testTimeout))
	return c.(*net.TCPConn)
}

// exchange sends data, half-closes, and returns what comes back.
func exchange(t testing.TB, port uint16, data []byte) []byte {
	t.Helper()
	c := dialTCP(t, port)
	var wg sync.WaitGroup
	wg.Go(func() {
		c.Write(data)
		c.CloseWrite()
	})
	got, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("reading back: %v", err)
	}
	wg.Wait()
	return got
}

func TestPortForwardEchoes(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		local, stop := forward(t, dialer(t, s.URL), echoBackend(t), echoBackend(t))
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				data := random(t, 700_000+i)
				if got := exchange(t, local[i%2], data); !bytes.Equal(got, data) {
					t.Errorf("got %d bytes back that differ from the %d sent", len(got), len(data))
				}
			})
		}
		wg.Wait()
		if err := stop(); err != nil {
			t.Errorf("client: %v", err)
		}
		if err := s.result(t); err != nil {
			t.Errorf("ServePortForward: %v", err)
		}
	})
}

func TestPortForwardHalfClosesBothWays(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		fromClient := make(chan string, 1)
		port := backend(t, func(c *net.TCPConn) {
			io.WriteString(c, "the backend is done")
			c.CloseWrite()
			all, _ := io.ReadAll(c)
			fromClient <- string(all)
		})
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		// client-go's port-forward closes the local connection as soon as the
		// backend is done; the protocol can do more.
		conn := dialSPDY(t, dialer, s.URL)
		data, errs := openPair(t, conn, port, "1", nil)
		if got, err := io.ReadAll(data); err != nil || string(got) != "the backend is done" {
			t.Errorf("got %q, %v", got, err)
		}
		if _, err := io.WriteString(data, "the client goes on"); err != nil {
			t.Fatal(err)
		}
		data.Close()
		if diff := cmp.Diff("the client goes on", wait(t, fromClient, "the backend")); diff != "" {
			t.Errorf("the backend got (-want +got):\n%s", diff)
		}
		if text, err := io.ReadAll(errs); err != nil || len(text) != 0 {
			t.Errorf("the error stream has %q, %v", text, err)
		}
	})
}

// openPair opens the streams of a connection as client-go does.
func openPair(t testing.TB, conn httpstream.Connection, port uint16, id string, extra http.Header) (data, errs httpstream.Stream) {
	t.Helper()
	h := http.Header{}
	h.Set("streamType", "error")
	h.Set("port", strconv.Itoa(int(port)))
	if id != "" {
		h.Set("requestID", id)
	}
	for k := range extra {
		h.Set(k, extra.Get(k))
	}
	errs, err := conn.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	errs.Close()
	h = h.Clone()
	h.Set("streamType", "data")
	if data, err = conn.CreateStream(h); err != nil {
		t.Fatal(err)
	}
	return data, errs
}

func dialSPDY(t testing.TB, dialer func(testing.TB, string) httpstream.Dialer, address string) httpstream.Connection {
	t.Helper()
	conn, protocol, err := dialer(t, address).Dial("portforward.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	if protocol != "portforward.k8s.io" {
		t.Errorf("negotiated %q", protocol)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestPortForwardRefusedPortLeavesOthersAlive(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		local, _ := forward(t, dialer(t, s.URL), echoBackend(t), closedPort(t))
		open := dialTCP(t, local[0])
		buf := make([]byte, 4)
		for range 3 {
			if got, err := io.ReadAll(dialTCP(t, local[1])); len(got) != 0 {
				t.Errorf("the closed port said %q, %v", got, err)
			}
			if _, err := open.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(open, buf); err != nil || string(buf) != "ping" {
				t.Fatalf("the open connection got %q, %v", buf, err)
			}
		}
		if got := exchange(t, local[0], []byte("new")); string(got) != "new" {
			t.Errorf("a new connection got %q", got)
		}
	})
}

func TestPortForwardErrorText(t *testing.T) {
	asked := http.Header{HeaderErrorText: {"true"}}
	cases := map[string]struct {
		extra http.Header
		port  uint16
		want  string
	}{
		"unasked there is none":       {nil, 81, ""},
		"asked for it is sent":        {asked, 81, "nothing listens there"},
		"an API status's own message": {asked, 82, "the agent is away"},
		"a port that was not listed":  {asked, 83, "port 83 is not one of those asked for"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := servePortForward(t, PortForwardRequest{Ports: []uint16{81, 82}}, Options{}, func(_ context.Context, port uint16) (PortStream, error) {
				if port == 82 {
					return nil, fmt.Errorf("dial: %w", apierrors.NewServiceUnavailable("the agent is away"))
				}
				return nil, errors.New("nothing listens there")
			})
			conn := dialSPDY(t, forwardClients["tunnel"], s.URL)
			for _, id := range []string{"1", "2", ""} { // the session goes on
				data, errs := openPair(t, conn, tc.port, id, tc.extra)
				text, err := io.ReadAll(errs)
				if err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff(tc.want, string(text)); diff != "" {
					t.Errorf("text (-want +got):\n%s", diff)
				}
				if got, err := io.ReadAll(data); len(got) != 0 || err != nil {
					t.Errorf("the data stream has %q, %v", got, err)
				}
			}
		})
	}
}

func TestPortForwardBackendResetIsAReset(t *testing.T) {
	port := backend(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	c := dialRawSPDY(t, s.URL, "portforward.k8s.io")
	number := strconv.Itoa(int(port))
	c.open(1, "streamtype", "error", "port", number, "requestid", "1")
	c.open(3, "streamtype", "data", "port", number, "requestid", "1")
	c.write(&spdy.DataFrame{StreamId: 3, Data: []byte("x")})
	if reset, ok := c.last(3).(*spdy.RstStreamFrame); !ok || reset.Status != spdy.Cancel {
		t.Errorf("the data stream ended with %v, want a reset", reset)
	}
	if end, ok := c.last(1).(*spdy.DataFrame); !ok || len(end.Data) != 0 {
		t.Errorf("the error stream ended with %v, want an empty end", end)
	}
}

// TestPortForwardCutIsAResetForThePort: it must not take what it has for all.
func TestPortForwardCutIsAResetForThePort(t *testing.T) {
	for name, cut := range map[string]func(httpstream.Connection, httpstream.Stream){
		"the client resets the stream":      func(_ httpstream.Connection, data httpstream.Stream) { data.Reset() },
		"the client's connection is closed": func(conn httpstream.Connection, _ httpstream.Stream) { conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
				arrived, ended := make(chan struct{}), make(chan error, 1)
				port := backend(t, func(c *net.TCPConn) {
					io.ReadFull(c, make([]byte, 1))
					close(arrived)
					_, err := io.Copy(io.Discard, c)
					ended <- err
				})
				s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
				conn := dialSPDY(t, dialer, s.URL)
				data, _ := openPair(t, conn, port, "1", nil)
				if _, err := data.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				wait(t, arrived, "the first byte")
				cut(conn, data)
				if err := wait(t, ended, "the backend's connection to end"); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the backend got %v, want %v", err, syscall.ECONNRESET)
				}
			})
		})
	}
	// What the client had ended in order stays so, and arrives whole.
	t.Run("but not after the client's end of file", func(t *testing.T) {
		eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
			sent := random(t, 1<<20)
			type result struct {
				got []byte
				err error
			}
			cut, ended := make(chan struct{}), make(chan result, 1)
			port := backend(t, func(c *net.TCPConn) {
				<-cut
				got, err := io.ReadAll(c)
				ended <- result{got, err}
			})
			s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
			conn := dialSPDY(t, dialer, s.URL)
			data, _ := openPair(t, conn, port, "1", nil)
			if _, err := data.Write(sent); err != nil {
				t.Fatal(err)
			}
			data.Close()
			data.Reset() // as client-go does at the end of each connection
			close(cut)
			if got := wait(t, ended, "the backend's connection to end"); got.err != nil || !bytes.Equal(got.got, sent) {
				t.Errorf("the backend got %d bytes, %v, want all %d", len(got.got), got.err, len(sent))
			}
		})
	})
}

func TestPortForwardStreamsThatDoNotFit(t *testing.T) {
	header := func(pairs ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			h.Set(pairs[i], pairs[i+1])
		}
		return h
	}
	cases := map[string][]http.Header{
		"no port":           {header("streamType", "error", "requestID", "9")},
		"port 0":            {header("streamType", "error", "requestID", "9", "port", "0")},
		"port 65536":        {header("streamType", "error", "requestID", "9", "port", "65536")},
		"no type":           {header("requestID", "9", "port", "80")},
		"an unknown type":   {header("streamType", "stdin", "requestID", "9", "port", "80")},
		"two error streams": {header("streamType", "error", "requestID", "9", "port", "80"), header("streamType", "error", "requestID", "9", "port", "80")},
		"a long request ID": {header("streamType", "error", "requestID", strings.Repeat("9", maxRequestID+1), "port", "80")},
		"two ports":         {header("streamType", "error", "requestID", "9", "port", "80"), header("streamType", "data", "requestID", "9", "port", "81")},
	}
	for name, headers := range cases {
		t.Run(name, func(t *testing.T) {
			s := servePortForward(t, PortForwardRequest{}, Options{SetupTimeout: time.Hour}, dialLoopback)
			conn := dialSPDY(t, forwardClients["SPDY"], s.URL)
			var last httpstream.Stream
			for _, h := range headers {
				var err error
				if last, err = conn.CreateStream(h); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := io.ReadAll(last); len(got) != 0 || err != nil {
				t.Errorf("got %q, %v", got, err)
			}
			data, _ := openPair(t, conn, echoBackend(t), "10", nil)
			io.WriteString(data, "fine")
			data.Close()
			if got, err := io.ReadAll(data); string(got) != "fine" {
				t.Errorf("another connection got %q, %v", got, err)
			}
		})
	}
}

func TestPortForwardHalfAConnectionExpires(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		s := servePortForward(t, PortForwardRequest{}, Options{SetupTimeout: 50 * time.Millisecond, MaxForwards: 1}, dialLoopback)
		conn := dialSPDY(t, dialer, s.URL)
		h := http.Header{}
		h.Set("streamType", "error")
		h.Set("port", "80")
		h.Set("requestID", "1")
		half, err := conn.CreateStream(h)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(half); len(got) != 0 || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		data, _ := openPair(t, conn, echoBackend(t), "2", nil) // there is room again
		io.WriteString(data, "fine")
		data.Close()
		if got, err := io.ReadAll(data); string(got) != "fine" {
			t.Errorf("another connection got %q, %v", got, err)
		}
	})
}

func TestPortForwardBoundsConnections(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		var open, most atomic.Int32
		port := backend(t, func(c *net.TCPConn) {
			n := open.Add(1)
			defer open.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			io.Copy(c, c)
		})
		const limit = 4
		s := servePortForward(t, PortForwardRequest{}, Options{MaxForwards: limit}, dialLoopback)
		conn := dialSPDY(t, dialer, s.URL)
		var held []httpstream.Stream
		for i := range limit {
			data, _ := openPair(t, conn, port, fmt.Sprint("held", i), nil)
			if _, err := data.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			held = append(held, data)
		}
		surplus, errs := openPair(t, conn, port, "surplus", http.Header{HeaderErrorText: {"true"}})
		if got, err := io.ReadAll(surplus); len(got) != 0 || err != nil {
			t.Errorf("the surplus connection got %q, %v", got, err)
		}
		if text, _ := io.ReadAll(errs); string(text) != "more than 4 connections at a time" {
			t.Errorf("the error stream has %q", text)
		}
		for _, data := range held {
			if _, err := data.Write([]byte("y")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if got := most.Load(); got > limit {
			t.Errorf("%d connections were open at a time", got)
		}
	})
}

func TestPortForwardEndsWithItsClient(t *testing.T) {
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		for name, tc := range map[string]struct {
			leave func(conn httpstream.Connection, proxy *blackhole)
			want  error
		}{
			"in order":          {func(conn httpstream.Connection, _ *blackhole) { conn.Close() }, nil},
			"by a lost network": {func(_ httpstream.Connection, proxy *blackhole) { close(proxy.dark) }, ErrPeerTimeout},
		} {
			t.Run(name, func(t *testing.T) {
				ended := make(chan struct{}, 1)
				port := backend(t, func(c *net.TCPConn) {
					io.Copy(c, c)
					ended <- struct{}{}
				})
				dialCtx := make(chan context.Context, 1)
				opts := Options{PingInterval: 50 * time.Millisecond, PeerTimeout: 400 * time.Millisecond}
				s := servePortForward(t, PortForwardRequest{}, opts, func(ctx context.Context, port uint16) (PortStream, error) {
					dialCtx <- ctx
					return dialLoopback(ctx, port)
				})
				proxy := newBlackhole(t, s.addr())
				conn := dialSPDY(t, dialer, proxy.address())
				data, _ := openPair(t, conn, port, "1", nil)
				if _, err := data.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
				tc.leave(conn, proxy)
				if err := s.result(t); !errors.Is(err, tc.want) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
				wait(t, ended, "the backend's connection to end")
				if ctx := wait(t, dialCtx, "dial"); ctx.Err() == nil {
					t.Error("dial's context has not ended")
				}
			})
		}
	})
}

func TestPortForwardEndsWithItsRequest(t *testing.T) {
	drain := errors.New("draining")
	eachForwardClient(t, func(t *testing.T, dialer func(testing.TB, string) httpstream.Dialer) {
		ctx, cancel := context.WithCancelCause(t.Context())
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServePortForward(w, r.WithContext(ctx), PortForwardRequest{}, Options{}, backendOf(dialLoopback))
		})
		conn := dialSPDY(t, dialer, s.URL)
		data, _ := openPair(t, conn, echoBackend(t), "1", nil)
		if _, err := data.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		cancel(drain)
		wait(t, conn.CloseChan(), "the connection to close")
		conn.Close()
		if err := s.result(t); !errors.Is(err, drain) {
			t.Errorf("got %v, want %v", err, drain)
		}
	})
}

func TestPortForwardLegacy(t *testing.T) {
	encode := map[string]func(channel int, data string) message{
		"v4.channel.k8s.io": func(channel int, data string) message {
			return message{websocket.BinaryMessage, string(rune(channel)) + data}
		},
		"v4.base64.channel.k8s.io": func(channel int, data string) message {
			return message{websocket.TextMessage, string(rune('0'+channel)) + base64.StdEncoding.EncodeToString([]byte(data))}
		},
		"": func(channel int, data string) message {
			return message{websocket.BinaryMessage, string(rune(channel)) + data}
		},
	}
	for protocol, encode := range encode {
		t.Run("protocol "+protocol, func(t *testing.T) {
			echo, closed := echoBackend(t), uint16(1)
			s := servePortForward(t, PortForwardRequest{Ports: []uint16{echo, closed}}, Options{}, func(ctx context.Context, port uint16) (PortStream, error) {
				if port == closed {
					return nil, errors.New("nothing listens there")
				}
				return dialLoopback(ctx, port)
			})
			var protocols []string
			if protocol != "" {
				protocols = []string{protocol}
			}
			c := mustDialWebSocket(t, s.URL, protocols...)
			number := func(port uint16) string { return string(binary.LittleEndian.AppendUint16(nil, port)) }
			want := map[message]bool{
				encode(0, number(echo)): true, encode(1, number(echo)): true,
				encode(2, number(closed)): true, encode(3, number(closed)): true,
				encode(3, "nothing listens there"): true,
			}
			for len(want) > 0 {
				kind, data, err := c.ReadMessage()
				if err != nil {
					t.Fatalf("%v; still waiting for %v", err, want)
				}
				if m := (message{kind, string(data)}); !want[m] {
					t.Errorf("unexpected message %v", m)
				} else {
					delete(want, m)
				}
			}
			for _, m := range []message{encode(0, "hello"), encode(2, "to nobody"), encode(1, "ignored"), encode(40, "ignored")} {
				if err := c.WriteMessage(m.Type, []byte(m.Data)); err != nil {
					t.Fatal(err)
				}
			}
			kind, data, err := c.ReadMessage()
			if diff := cmp.Diff(encode(0, "hello"), message{kind, string(data)}); err != nil || diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			c.Close()
			if err := s.result(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPortForwardSaysWhenItStands, by every protocol: once it is answered, before
// anything is forwarded, and not if it is refused.
func TestPortForwardSaysWhenItStands(t *testing.T) {
	webSocket := func(protocols ...string) func(*testing.T, string) {
		return func(t *testing.T, address string) { mustDialWebSocket(t, address, protocols...) }
	}
	spdy := func(protocol string) func(*testing.T, string) {
		return func(t *testing.T, address string) {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {protocol}}
			response, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { response.Body.Close() })
		}
	}
	for name, tc := range map[string]struct {
		begin func(t *testing.T, address string)
		want  bool
	}{
		"SPDY":                 {spdy("portforward.k8s.io"), true},
		"SPDY in a WebSocket":  {webSocket("SPDY/3.1+portforward.k8s.io"), true},
		"mux":                  {webSocket(MuxProtocol), true},
		"the legacy protocol":  {webSocket("v4.channel.k8s.io"), true},
		"SPDY of another kind": {spdy("portforward.example"), false},
		"no upgrade at all": {func(t *testing.T, address string) {
			response, err := http.Get(address)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
		}, false},
		"an unknown subprotocol": {func(t *testing.T, address string) { dialWebSocket(t, address, nil, "v9.channel.k8s.io") }, false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			begun := make(chan struct{}, 2)
			s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
				return ServePortForward(w, r.WithContext(ctx), PortForwardRequest{Ports: []uint16{80}}, Options{closeGrace: time.Millisecond}, PortForwardBackend{
					Begun: func() { begun <- struct{}{} },
					Dial: func(ctx context.Context, _ Endpoint) (PortStream, error) {
						if len(begun) != 1 {
							t.Error("it dials before it stands")
						}
						<-ctx.Done()
						return nil, context.Cause(ctx)
					},
				})
			})
			tc.begin(t, s.URL)
			if tc.want {
				eventually(t, "a session that stands", func() bool { return len(begun) > 0 })
			}
			end()
			s.result(t)
			if want := map[bool]int{true: 1}[tc.want]; len(begun) != want {
				t.Errorf("it stood %d times, want %d", len(begun), want)
			}
		})
	}
}

func TestPortForwardRefusals(t *testing.T) {
	many := make([]uint16, 100)
	for i := range many {
		many[i] = uint16(i + 1)
	}
	for name, tc := range map[string]struct {
		req       PortForwardRequest
		protocols []string
		origin    string
		want      int
	}{
		"the legacy protocol without ports":   {PortForwardRequest{}, []string{"v4.channel.k8s.io"}, "", 400},
		"the legacy protocol with many ports": {PortForwardRequest{Ports: many}, []string{"v4.channel.k8s.io"}, "", 400},
		"an unknown subprotocol":              {PortForwardRequest{Ports: []uint16{80}}, []string{"v5.channel.k8s.io"}, "", 400},
		"a foreign origin":                    {PortForwardRequest{}, []string{"SPDY/3.1+portforward.k8s.io"}, "https://evil.example", 403},
	} {
		t.Run(name, func(t *testing.T) {
			s := servePortForward(t, tc.req, Options{}, dialLoopback)
			header := http.Header{}
			if tc.origin != "" {
				header.Set("Origin", tc.origin)
			}
			_, resp, err := dialWebSocket(t, s.URL, header, tc.protocols...)
			if err == nil || resp.StatusCode != tc.want {
				t.Errorf("got %v, %v, want %d", err, resp, tc.want)
			}
			if err := s.result(t); err == nil {
				t.Error("ServePortForward returned nil")
			}
		})
	}
}
