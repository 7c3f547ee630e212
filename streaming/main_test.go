package streaming

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	// The clients log what the tests do to them.
	flags := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Set("logtostderr", "false")
	flags.Set("stderrthreshold", "FATAL")
	klog.SetOutput(io.Discard)
	const client = "k8s.io/client-go/tools/remotecommand."
	goleak.VerifyTestMain(m,
		// What client-go leaves behind: a heartbeat that ends at its next
		// beat, and goroutines of the first version that nobody waits for.
		goleak.IgnoreAnyFunction(client+"(*heartbeat).start"),
		goleak.IgnoreAnyFunction(client+"(*streamProtocolV1).stream.func2"),
		// Its SPDY library, which waits a second for somebody to ask how
		// closing went.
		goleak.IgnoreAnyFunction("github.com/moby/spdystream.(*Connection).shutdown"))
}

// testTimeout is when a test that hangs fails.
const testTimeout = 20 * time.Second

// server serves one handler on loopback and collects what it returns.
type server struct {
	*httptest.Server
	results chan error
}

func newServer(t testing.TB, handle func(http.ResponseWriter, *http.Request) error) *server {
	t.Helper()
	s := &server{results: make(chan error, 100)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.results <- handle(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// result waits for the handler's return.
func (s *server) result(t testing.TB) error {
	t.Helper()
	select {
	case err := <-s.results:
		return err
	case <-time.After(testTimeout):
		t.Fatal("the handler has not returned")
		return nil
	}
}

func (s *server) addr() string { return s.Listener.Addr().String() }

// wait waits for c to be closed or to deliver.
func wait[T any](t testing.TB, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(testTimeout):
		t.Fatalf("timed out waiting for %s", what)
	}
	return v
}

// execClient is one way for a client to run a command.
type execClient struct {
	name string
	// half says that the client can close its stdin, status that it reliably
	// learns of failures, codes that it learns exit codes, resize that it can
	// resize. client-go's first version has the bugs that led to the second.
	half, status, codes, resize bool
	executor                    func(t testing.TB, address string) remotecommand.Executor
}

func wsExecutor(protocol string) func(testing.TB, string) remotecommand.Executor {
	return func(t testing.TB, address string) remotecommand.Executor {
		t.Helper()
		e, err := remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{Host: address}, "GET", address, protocol)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
}

func spdyExecutor(protocol string) func(testing.TB, string) remotecommand.Executor {
	return func(t testing.TB, address string) remotecommand.Executor {
		t.Helper()
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		config := &rest.Config{Host: address}
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			t.Fatal(err)
		}
		e, err := remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, "POST", u, protocol)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
}

var execClients = []execClient{
	{"WebSocket v5", true, true, true, true, wsExecutor("v5.channel.k8s.io")},
	{"WebSocket v4", false, true, true, true, wsExecutor("v4.channel.k8s.io")},
	{"WebSocket v1", false, false, false, false, wsExecutor("channel.k8s.io")},
	{"SPDY v4", true, true, true, true, spdyExecutor("v4.channel.k8s.io")},
	{"SPDY v3", true, true, false, true, spdyExecutor("v3.channel.k8s.io")},
	{"SPDY v2", true, true, false, false, spdyExecutor("v2.channel.k8s.io")},
	{"SPDY v1", false, false, false, false, spdyExecutor("channel.k8s.io")},
}

// blackhole is a proxy that can stop forwarding without closing anything.
type blackhole struct {
	net.Listener
	target string
	// dark, once it is closed, has it swallow what comes, and frozen read no
	// more. Either way its kernel goes on to acknowledge.
	dark, frozen chan struct{}
	over         chan struct{} // closed at the test's end
	wg           sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newBlackhole(t testing.TB, target string) *blackhole {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &blackhole{Listener: l, target: target, dark: make(chan struct{}), frozen: make(chan struct{}), over: make(chan struct{})}
	b.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			backend, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			b.mu.Lock()
			b.conns = append(b.conns, client, backend)
			b.mu.Unlock()
			b.wg.Go(func() { b.copy(client, backend) })
			b.wg.Go(func() { b.copy(backend, client) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		close(b.over)
		b.mu.Lock()
		for _, c := range b.conns {
			c.Close()
		}
		b.mu.Unlock()
		b.wg.Wait()
	})
	return b
}

func (b *blackhole) copy(dst, src net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			select {
			case <-b.dark:
			default:
				dst.Close()
			}
			return
		}
		select {
		case <-b.dark:
		case <-b.frozen:
			<-b.over
			return
		default:
			dst.Write(buf[:n])
		}
	}
}

func (b *blackhole) address() string { return "http://" + b.Addr().String() }

// dialWebSocket connects with gorilla; the response is that of a failure.
func dialWebSocket(t testing.TB, address string, header http.Header, protocols ...string) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.Scheme = "ws"
	dialer := websocket.Dialer{Subprotocols: protocols, HandshakeTimeout: testTimeout, WriteBufferSize: 64 << 10}
	c, resp, err := dialer.Dial(u.String(), header)
	if c != nil {
		t.Cleanup(func() { c.Close() })
		c.SetReadDeadline(time.Now().Add(testTimeout))
		c.SetWriteDeadline(time.Now().Add(testTimeout))
	}
	return c, resp, err
}

func mustDialWebSocket(t testing.TB, address string, protocols ...string) *websocket.Conn {
	t.Helper()
	c, _, err := dialWebSocket(t, address, nil, protocols...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// testContext ends before the test's own timeout does.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(context.Background(), testTimeout, errors.New("the test took too long"))
	t.Cleanup(cancel)
	return ctx
}
