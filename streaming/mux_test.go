package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// dialMux starts a session with a server.
func dialMux(t testing.TB, address string, opts MuxOptions) *MuxClient {
	t.Helper()
	c, err := NewMuxClient(mustDialWebSocket(t, address, MuxProtocol), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() }) // a test whose ports wait for their connections has to do it before
	return c
}

func mustDial(t testing.TB, c *MuxClient, port uint16) *MuxStream {
	t.Helper()
	s, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMuxEchoes(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	port := echoBackend(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			stream := mustDial(t, c, port)
			data := random(t, 2_700_000+i)
			var writer sync.WaitGroup
			writer.Go(func() {
				if _, err := stream.Write(data); err != nil {
					t.Error(err)
				}
				stream.CloseWrite()
			})
			got, err := io.ReadAll(stream)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %d bytes back that differ from the %d sent, %v", len(got), len(data), err)
			}
			writer.Wait()
			stream.Close()
		})
	}
	wg.Wait()
	c.mu.Lock()
	if n := len(c.conn.streams); n != 0 {
		t.Errorf("%d streams are left", n)
	}
	c.mu.Unlock()
	c.Close()
	if err := s.result(t); err != nil {
		t.Errorf("ServePortForward: %v", err)
	}
}

// serveMuxWith serves port-forwards with a whole backend.
func serveMuxWith(t testing.TB, req PortForwardRequest, opts Options, backend PortForwardBackend) *server {
	t.Helper()
	return newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServePortForward(w, r, req, opts, backend)
	})
}

func TestMuxIsChosenBeforeTheTunnel(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	for name, test := range map[string]struct {
		offered []string
		want    string
	}{
		"by a client that offers both, mux first": {[]string{MuxProtocol, "SPDY/3.1+portforward.k8s.io"}, MuxProtocol},
		"not by one that knows the tunnel alone":  {[]string{"SPDY/3.1+portforward.k8s.io"}, "SPDY/3.1+portforward.k8s.io"},
		"not by one that has a newer one":         {[]string{"v2.mux.streaming.aaserver.io", MuxProtocol}, MuxProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			ws := mustDialWebSocket(t, s.URL, test.offered...)
			if got := ws.Subprotocol(); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			c, err := NewMuxClient(ws, MuxOptions{})
			if (err == nil) != (test.want == MuxProtocol) {
				t.Errorf("NewMuxClient: %v", err)
			}
			if err == nil {
				c.Close()
				if err := c.Err(); err != net.ErrClosed { //nolint:errorlint // nothing else
					t.Errorf("it ended with %v", err)
				}
			}
			s.result(t)
		})
	}
}

func TestMuxProtocolIsTold(t *testing.T) {
	told := make(chan string, 1)
	s := servePortForward(t, PortForwardRequest{}, Options{}, func(ctx context.Context, _ uint16) (PortStream, error) {
		told <- Protocol(ctx)
		return nil, errors.New("enough")
	})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	c.Dial(testContext(t), Endpoint{Network: "tcp", Port: 1})
	if got := wait(t, told, "the dial"); got != "websocket/"+MuxProtocol {
		t.Errorf("got %q", got)
	}
}

func TestMuxHeaderReachesTheBackend(t *testing.T) {
	s := serveMuxWith(t, PortForwardRequest{}, Options{}, PortForwardBackend{Dial: func(_ context.Context, to Endpoint) (PortStream, error) {
		return nil, apierrors.NewConflict(schema.GroupResource{Resource: "targets"}, fmt.Sprintf("%+v", to), errors.New("seen"))
	}})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	for _, to := range []Endpoint{
		{Network: "tcp", Port: 80},
		{Network: "udp", Port: 53, Instance: "web-1"},
		{Network: "unix", Path: "/run/app.sock"},
	} {
		_, err := c.Dial(testContext(t), to)
		if !apierrors.IsConflict(err) || !strings.Contains(err.Error(), fmt.Sprintf("%+v", to)) {
			t.Errorf("%+v: got %v", to, err)
		}
	}
}

func TestMuxRefusesToDial(t *testing.T) {
	answered := func(status apierrors.APIStatus) string {
		return fmt.Sprintf("%d %s: %s", status.Status().Code, status.Status().Reason, status.Status().Message)
	}
	for name, test := range map[string]struct {
		request PortForwardRequest
		opts    Options
		to      Endpoint
		listen  bool
		want    string
	}{
		"what the backend refuses, in its words": {
			to:   Endpoint{Network: "tcp", Port: 7},
			want: `403 Forbidden: targets "web" is forbidden: not that port`,
		},
		"what fails for a reason that is no status": {
			to:   Endpoint{Network: "tcp", Port: 8},
			want: "500 InternalError: connection refused",
		},
		"a port that the session isn't for": {
			request: PortForwardRequest{Ports: []uint16{80}},
			to:      Endpoint{Network: "udp", Port: 7},
			want:    "403 Forbidden: this session is for connections to the ports [80]",
		},
		"a unix socket in a session for ports": {
			request: PortForwardRequest{Ports: []uint16{80}},
			to:      Endpoint{Network: "unix", Path: "/x"},
			want:    "403 Forbidden: this session is for connections to the ports [80]",
		},
		"a reverse forward in a session for ports": {
			request: PortForwardRequest{Ports: []uint16{80}},
			to:      Endpoint{Network: "tcp", Port: 80}, listen: true,
			want: "403 Forbidden: this session is for connections to the ports [80]",
		},
		"a reverse forward from a backend that has none": {
			to: Endpoint{Network: "tcp"}, listen: true,
			want: "400 BadRequest: there are no reverse forwards here",
		},
		"an unknown network": {
			to:   Endpoint{Network: "sctp", Port: 7},
			want: `400 BadRequest: the network "sctp" is unknown: use tcp, udp or unix`,
		},
		"no port":                 {to: Endpoint{Network: "udp"}, want: "400 BadRequest: port is needed, 1 to 65535"},
		"no path":                 {to: Endpoint{Network: "unix"}, want: "400 BadRequest: path is needed, without a NUL"},
		"a path with a NUL":       {to: Endpoint{Network: "unix", Path: "a\x00b"}, want: "400 BadRequest: path is needed, without a NUL"},
		"a port of a unix socket": {to: Endpoint{Network: "unix", Port: 1, Path: "/x"}, want: "400 BadRequest: port is for the networks tcp and udp"},
		"a path of a port":        {to: Endpoint{Network: "tcp", Port: 1, Path: "/x"}, want: "400 BadRequest: path is for the network unix"},
		"a header that is too long": {
			to:   Endpoint{Network: "unix", Path: strings.Repeat("x", 5000)},
			want: "400 BadRequest: a header of 5028 bytes: 4096 is the most",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serveMuxWith(t, test.request, test.opts, PortForwardBackend{Dial: func(_ context.Context, to Endpoint) (PortStream, error) {
				if to.Port == 7 {
					return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "targets"}, "web", errors.New("not that port"))
				}
				return nil, errors.New("connection refused")
			}})
			c := dialMux(t, s.URL, MuxOptions{})
			defer c.Close()
			var err error
			if test.listen {
				_, err = c.Listen(testContext(t), test.to)
			} else {
				_, err = c.Dial(testContext(t), test.to)
			}
			var status apierrors.APIStatus
			if !errors.As(err, &status) {
				t.Fatalf("got %v, which is no status", err)
			}
			if diff := cmp.Diff(test.want, answered(status)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			c.Close()
			s.result(t)
		})
	}
}

func TestMuxChecksWithoutDialling(t *testing.T) {
	s := serveMuxWith(t, PortForwardRequest{}, Options{}, PortForwardBackend{
		Dial: func(_ context.Context, to Endpoint) (PortStream, error) {
			t.Errorf("%+v was dialled", to)
			return nil, errors.New("it is only to be checked")
		},
		Check: func(_ context.Context, to Endpoint) error {
			switch to {
			case Endpoint{Network: "udp", Port: 53, Instance: "web-1"}:
				return apierrors.NewForbidden(schema.GroupResource{Resource: "targets"}, "web", errors.New("no datagrams"))
			case Endpoint{Network: "tcp", Port: 1}:
				// As from a server that doesn't know the question.
				return apierrors.NewBadRequest(`the header can't be read: json: unknown field "check"`)
			case Endpoint{Network: "tcp", Port: 2}:
				return apierrors.NewBadRequest("a target of source ssh has no such thing")
			}
			return nil
		},
	})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	for _, test := range []struct {
		to   Endpoint
		want string
	}{
		{to: Endpoint{Network: "tcp", Port: 80}},
		{to: Endpoint{Network: "unix", Path: "/run/app.sock"}},
		{to: Endpoint{Network: "tcp", Port: 1}},
		{to: Endpoint{Network: "udp", Port: 53, Instance: "web-1"}, want: `targets "web" is forbidden: no datagrams`},
		{to: Endpoint{Network: "tcp", Port: 2}, want: "a target of source ssh has no such thing"},
		{to: Endpoint{Network: "udp"}, want: "port is needed, 1 to 65535"},
	} {
		got := ""
		if err := c.Check(testContext(t), test.to); err != nil {
			got = err.Error()
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", test.to, diff)
		}
	}

	narrow := serveMuxWith(t, PortForwardRequest{Ports: []uint16{80}}, Options{}, PortForwardBackend{})
	n := dialMux(t, narrow.URL, MuxOptions{})
	defer n.Close()
	if err := n.Check(testContext(t), Endpoint{Network: "tcp", Port: 80}); err != nil {
		t.Errorf("a backend that leaves it to Dial: %v", err)
	}
	if err := n.Check(testContext(t), Endpoint{Network: "tcp", Port: 81}); !apierrors.IsForbidden(err) {
		t.Errorf("a port that the session isn't for: %v", err)
	}
}

func TestMuxBoundsConnections(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{MaxForwards: 2}, dialLoopback)
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	port := echoBackend(t)
	first := mustDial(t, c, port)
	mustDial(t, c, port)
	_, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port})
	if !apierrors.IsTooManyRequests(err) {
		t.Errorf("the third: %v", err)
	}
	first.CloseWrite()
	if _, err := io.ReadAll(first); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room for another", func() bool {
		stream, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port})
		if err == nil {
			stream.Reset()
		}
		return err == nil
	})
}

// eventually polls until something is so.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("there never was %s", what)
		}
	}
}

func TestMuxDialEndsWithItsContext(t *testing.T) {
	gone := make(chan error, 1)
	s := servePortForward(t, PortForwardRequest{}, Options{}, func(ctx context.Context, _ uint16) (PortStream, error) {
		<-ctx.Done()
		gone <- context.Cause(ctx)
		return nil, context.Cause(ctx)
	})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	ctx, cancel := context.WithCancelCause(testContext(t))
	enough := errors.New("enough")
	time.AfterFunc(10*time.Millisecond, func() { cancel(enough) })
	if _, err := c.Dial(ctx, Endpoint{Network: "tcp", Port: 1}); !errors.Is(err, enough) {
		t.Errorf("Dial: %v", err)
	}
	if err := wait(t, gone, "the backend's dial to end"); !errors.Is(err, ErrStreamReset) {
		t.Errorf("the backend's dial ended with %v", err)
	}
}

func TestMuxHalfClosesBothWays(t *testing.T) {
	fromClient := make(chan string, 1)
	port := backend(t, func(c *net.TCPConn) {
		io.WriteString(c, "the backend is done")
		c.CloseWrite()
		all, _ := io.ReadAll(c)
		fromClient <- string(all)
	})
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
	if got, err := io.ReadAll(stream); err != nil || string(got) != "the backend is done" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := io.WriteString(stream, "the client goes on"); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseWrite(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff("the client goes on", wait(t, fromClient, "the backend")); diff != "" {
		t.Errorf("the backend got (-want +got):\n%s", diff)
	}
	if _, err := stream.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("writing after CloseWrite: %v", err)
	}
}

func TestMuxPassesResetsOn(t *testing.T) {
	t.Run("from the port", func(t *testing.T) {
		port := backend(t, func(c *net.TCPConn) {
			io.WriteString(c, "all there is")
			io.ReadFull(c, make([]byte, 1)) // until the client has read it
			c.SetLinger(0)
		})
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
		if _, err := io.ReadFull(stream, make([]byte, len("all there is"))); err != nil {
			t.Fatal(err)
		}
		stream.Write([]byte("x"))
		if n, err := io.Copy(io.Discard, stream); n != 0 || !errors.Is(err, ErrStreamReset) {
			t.Errorf("reading: %d bytes, %v, want %v", n, err, ErrStreamReset)
		}
		if _, err := stream.Write([]byte("x")); !errors.Is(err, ErrStreamReset) {
			t.Errorf("writing: %v, want %v", err, ErrStreamReset)
		}
	})
	t.Run("from a port that has said its last word", func(t *testing.T) {
		port := backend(t, func(c *net.TCPConn) {}) // closes; the kernel resets what still comes
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
		if got, err := io.ReadAll(stream); len(got) != 0 || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
		var err error
		eventually(t, "an end of writing", func() bool {
			_, err = stream.Write([]byte("x"))
			return err != nil
		})
		if !errors.Is(err, ErrStreamReset) {
			t.Errorf("writing: %v, want %v", err, ErrStreamReset)
		}
	})
	t.Run("from the client", func(t *testing.T) {
		read := make(chan error, 1)
		port := backend(t, func(c *net.TCPConn) {
			io.WriteString(c, "hello")
			_, err := io.Copy(io.Discard, c)
			read <- err
		})
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
		if _, err := io.ReadFull(stream, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		stream.Reset()
		if err := wait(t, read, "the backend"); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the backend got %v, want %v", err, syscall.ECONNRESET)
		}
		if _, err := stream.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("reading after Reset: %v", err)
		}
	})
	t.Run("from a client that closes without reading", func(t *testing.T) {
		written := make(chan error, 1)
		port := backend(t, func(c *net.TCPConn) {
			_, err := io.Copy(c, endless{})
			written <- err
		})
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
		if _, err := io.ReadFull(stream, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		stream.Close()
		if err := wait(t, written, "the backend"); err == nil {
			t.Error("the backend could write all")
		}
	})
}

func TestMuxClosedStreamTakesNoMore(t *testing.T) {
	closed, written := make(chan struct{}), make(chan error, 1)
	port := backend(t, func(c *net.TCPConn) {
		io.WriteString(c, "hello")
		<-closed
		_, err := io.Copy(c, endless{})
		written <- err
	})
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	stream := mustDial(t, dialMux(t, s.URL, MuxOptions{}), port)
	if _, err := io.ReadFull(stream, make([]byte, 5)); err != nil { // all there is
		t.Fatal(err)
	}
	if err := stream.Close(); err != nil {
		t.Error(err)
	}
	close(closed)
	if err := wait(t, written, "the backend to see that nobody reads"); err == nil {
		t.Error("the backend could write all")
	}
}

// countedBackend produces without end and takes nothing; it counts what was
// taken from it.
type countedBackend struct {
	produced atomic.Int64
	closed   chan struct{}
	once     sync.Once
}

func newCountedBackend() *countedBackend { return &countedBackend{closed: make(chan struct{})} }

func (c *countedBackend) Read(p []byte) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
		c.produced.Add(int64(len(p)))
		return len(p), nil
	}
}

func (c *countedBackend) Write(p []byte) (int, error) {
	<-c.closed
	return 0, net.ErrClosed
}

func (c *countedBackend) CloseWrite() error { return nil }

func (c *countedBackend) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func TestMuxStalledStreamCostsItsWindowAlone(t *testing.T) {
	const stalledPort = 1
	var stalled []*countedBackend
	for range 16 {
		stalled = append(stalled, newCountedBackend())
	}
	var next atomic.Int32
	s := servePortForward(t, PortForwardRequest{}, Options{}, func(ctx context.Context, port uint16) (PortStream, error) {
		if port == stalledPort {
			return stalled[next.Add(1)-1], nil
		}
		return dialLoopback(ctx, port)
	})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	before, _ := inUse()

	// Nothing of a gigabyte each is read, either way.
	var writers sync.WaitGroup
	defer writers.Wait()
	var written [16]atomic.Int64
	for i := range stalled {
		stream := mustDial(t, c, stalledPort)
		defer stream.Reset()
		writers.Go(func() {
			buf := make([]byte, 32<<10)
			for range 1 << 30 / len(buf) {
				n, err := stream.Write(buf)
				written[i].Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}
	full := func() bool {
		for i, b := range stalled {
			// The header and its answer have taken some, too, and a Write
			// that isn't done isn't counted.
			if b.produced.Load() < muxWindow-1<<10 || written[i].Load() < muxWindow-32<<10 {
				return false
			}
		}
		return true
	}
	eventually(t, "a full window of all", full)

	// A hundred others go on at the same time, for many times what a window
	// holds.
	port := echoBackend(t)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			stream := mustDial(t, c, port)
			const size = 1 << 20
			wg.Go(func() {
				io.CopyN(stream, endless{}, size)
				stream.CloseWrite()
			})
			if n, err := io.Copy(io.Discard, stream); n != size || err != nil {
				t.Errorf("%d bytes came back, %v", n, err)
			}
		})
	}
	wg.Wait()

	for i, b := range stalled {
		if n := b.produced.Load(); n > muxWindow {
			t.Errorf("%d bytes were taken of a port whose client reads nothing, more than %d", n, muxWindow)
		}
		if n := written[i].Load(); n > muxWindow {
			t.Errorf("%d bytes were taken of a client whose port reads nothing, more than %d", n, muxWindow)
		}
	}
	after, _ := inUse()
	// Both ends, both directions, and a message that each is about to write.
	if most := int64(16*2*(muxWindow+2*muxMessage) + 8<<20); after-before > most {
		t.Errorf("the heap grew by %d bytes, more than %d", after-before, most)
	} else {
		t.Logf("%d kB for 16 connections stalled both ways, both ends", (after-before)>>10)
	}
}

// delayed is a proxy whose way is long: what comes is passed on later.
func delayed(t testing.TB, target string, delay time.Duration) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	type packet struct {
		at   time.Time
		data []byte
	}
	var wg sync.WaitGroup
	pass := func(dst, src net.Conn) {
		way := make(chan packet, 4096) // the product of delay and rate has to fit
		wg.Go(func() {
			defer dst.Close()
			for p := range way {
				time.Sleep(time.Until(p.at))
				dst.Write(p.data)
			}
		})
		wg.Go(func() {
			defer close(way)
			for {
				buf := make([]byte, 64<<10)
				n, err := src.Read(buf)
				if n > 0 {
					way <- packet{time.Now().Add(delay), buf[:n]}
				}
				if err != nil {
					return
				}
			}
		})
	}
	wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			pass(far, near)
			pass(near, far)
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return "http://" + l.Addr().String()
}

func TestMuxWindowsGrowOnALongWay(t *testing.T) {
	const size, delay = 48 << 20, 20 * time.Millisecond
	for name, test := range map[string]struct {
		memory   int64
		toPort   bool
		wantGrow bool
	}{
		"from the port":                        {memory: 0, wantGrow: true},
		"to the port":                          {memory: 0, toPort: true, wantGrow: true},
		"not when there is no memory, from it": {memory: 1},
		"not when there is no memory, to it":   {memory: 1, toPort: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			amount := int64(size)
			if !test.wantGrow {
				amount = 8 * muxWindow
			}
			took := make(chan int64, 1)
			port := backend(t, func(c *net.TCPConn) {
				if test.toPort {
					n, _ := io.Copy(io.Discard, c)
					took <- n
					return
				}
				io.CopyN(c, endless{}, amount)
				c.CloseWrite()
				io.Copy(io.Discard, c)
			})
			opts, muxOpts := Options{}, MuxOptions{}
			if test.toPort {
				opts.MaxWindows = test.memory
			} else {
				muxOpts.MaxMemory = test.memory
			}
			s := servePortForward(t, PortForwardRequest{}, opts, dialLoopback)
			c := dialMux(t, delayed(t, s.addr(), delay), muxOpts)
			defer c.Close()
			stream := mustDial(t, c, port)
			began := time.Now()
			var n int64
			if test.toPort {
				if _, err := io.CopyN(stream, endless{}, amount); err != nil {
					t.Fatal(err)
				}
				stream.CloseWrite()
				n = wait(t, took, "the port to take all")
			} else {
				n, _ = io.Copy(io.Discard, stream)
			}
			elapsed := time.Since(began)
			if n != amount {
				t.Errorf("%d bytes came of %d", n, amount)
			}
			// Each initial window takes a round trip.
			fixed := time.Duration(amount/muxWindow) * 2 * delay
			t.Logf("%v, %.0f MiB/s; windows that don't grow would take %v", elapsed, float64(amount)/(1<<20)/elapsed.Seconds(), fixed)
			if test.wantGrow && elapsed > fixed/3 {
				t.Errorf("it took %v, more than a third of the %v of windows that don't grow", elapsed, fixed)
			}
			if !test.wantGrow && elapsed < fixed/2 {
				t.Errorf("it took %v, less than it can without more memory", elapsed)
			}
			if !test.toPort {
				stream.mu.Lock()
				if grown := stream.window > muxWindow; grown != test.wantGrow {
					t.Errorf("the window is %d", stream.window)
				}
				stream.mu.Unlock()
				stream.Close()
				eventually(t, "all memory back", func() bool {
					want := test.memory
					if want == 0 {
						want = muxMemory
					}
					return c.conn.growth.Load() == want
				})
			}
		})
	}
}

// TestMuxGrowthIsHeldByWhatIsUnread: a stream that has ended may still hold all
// that its window has let in.
func TestMuxGrowthIsHeldByWhatIsUnread(t *testing.T) {
	const memory = 32 << 20
	for name, test := range map[string]struct {
		done func(*testing.T, *MuxStream)
	}{
		"until it is read": {func(t *testing.T, s *MuxStream) {
			if _, err := io.Copy(io.Discard, s); !errors.Is(err, ErrStreamReset) {
				t.Errorf("reading: %v", err)
			}
		}},
		"until nobody will read it": {func(t *testing.T, s *MuxStream) { s.Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			c := newMuxConn(&wsConn{link: &link{start: time.Now()}}, false, memory)
			c.stopped = true // nothing is sent
			c.rtt.Store(int64(time.Hour))
			s := newMuxStream(c, 1)
			c.streams[1] = s
			receive := func(n int) {
				t.Helper()
				if !s.admit(uint32(n)) {
					t.Fatalf("%d bytes aren't admitted", n)
				}
				if err := s.in.receive(endless{}, int64(n)); err != nil {
					t.Fatal(err)
				}
			}
			for s.window < muxMaxWindow {
				n := s.left
				receive(n)
				if _, err := io.CopyN(io.Discard, s, int64(n)); err != nil {
					t.Fatal(err)
				}
			}
			receive(s.left)
			s.end(ErrStreamReset)
			c.forget(s)
			if got, want := c.growth.Load(), int64(memory-(muxMaxWindow-muxWindow)); got != want {
				t.Errorf("with all of its window unread, windows may grow by %d, want %d", got, want)
			}
			test.done(t, s)
			if got := c.growth.Load(); got != memory {
				t.Errorf("after it, windows may grow by %d, want %d", got, memory)
			}
		})
	}
}

func TestMuxSessionsEndIsTold(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServePortForward(w, r.WithContext(ctx), PortForwardRequest{}, Options{}, backendOf(dialLoopback))
	})
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	port := backend(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	stream := mustDial(t, c, port)
	if err := c.Err(); err != nil {
		t.Errorf("it has ended already: %v", err)
	}
	cancel(errors.New("the server is being updated"))
	wait(t, c.Done(), "the session's end")
	if err := c.Err(); !errors.Is(err, ErrServerGone) || !strings.Contains(err.Error(), "the server is being updated") {
		t.Errorf("the client got %v", err)
	}
	if _, err := stream.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("reading from a stream: %v", err)
	}
	if _, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port}); !errors.Is(err, ErrServerGone) {
		t.Errorf("dialling after the end: %v", err)
	}
	if err := s.result(t); err == nil || err.Error() != "the server is being updated" {
		t.Errorf("ServePortForward: %v", err)
	}
}

func TestMuxFindsDeadPeers(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{PingInterval: 20 * time.Millisecond, PeerTimeout: 400 * time.Millisecond}, dialLoopback)
	proxy := newBlackhole(t, s.addr())
	c := dialMux(t, proxy.address(), MuxOptions{PingInterval: 20 * time.Millisecond, PeerTimeout: 400 * time.Millisecond})
	defer c.Close()
	stream := mustDial(t, c, backend(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) }))
	close(proxy.dark)
	wait(t, c.Done(), "the client to find out")
	if err := c.Err(); !errors.Is(err, ErrPeerTimeout) || err.Error() != "the server no longer answers" {
		t.Errorf("the client: %v", err)
	}
	if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, ErrPeerTimeout) {
		t.Errorf("a stream: %v", err)
	}
	if err := s.result(t); !errors.Is(err, ErrPeerTimeout) {
		t.Errorf("the server: %v", err)
	}
}

func TestMuxQuietOrStalledIsNotDead(t *testing.T) {
	opts := Options{PingInterval: 10 * time.Millisecond, PeerTimeout: 300 * time.Millisecond}
	stalled := newCountedBackend()
	s := servePortForward(t, PortForwardRequest{}, opts, func(context.Context, uint16) (PortStream, error) { return stalled, nil })
	c := dialMux(t, s.URL, MuxOptions{PingInterval: opts.PingInterval, PeerTimeout: opts.PeerTimeout})
	defer c.Close()
	stream := mustDial(t, c, 1)
	var writer sync.WaitGroup
	writer.Go(func() { io.Copy(stream, endless{}) })
	defer writer.Wait()
	defer stream.Reset()
	select { // nothing is to happen, which takes time
	case <-c.Done():
		t.Errorf("the session ended: %v", c.Err())
	case <-time.After(5 * opts.PeerTimeout):
	}
	if _, err := io.ReadFull(stream, make([]byte, 2*muxWindow)); err != nil {
		t.Errorf("reading at last: %v", err)
	}
}

func TestMuxCloseDoesNotWaitForAStuckServer(t *testing.T) {
	upgrader := websocket.Upgrader{Subprotocols: []string{MuxProtocol}}
	end := make(chan struct{})
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return err
		}
		defer ws.Close()
		// It accepts a stream, gives it a gigabyte, and reads no more.
		ws.ReadMessage()
		ws.WriteMessage(websocket.BinaryMessage, []byte(muxFrame(muxData, muxACK, 1, opening(`{"status":"Success"}`))+muxFrame(muxUpdate, 0, 1, "", 1<<30)))
		<-end
		return nil
	})
	defer close(end)
	c := dialMux(t, s.URL, MuxOptions{})
	stream := mustDial(t, c, 1)
	var writer sync.WaitGroup
	writer.Go(func() { io.Copy(stream, endless{}) })
	eventually(t, "a write that is stuck", func() bool {
		at := c.conn.sendStart.Load()
		return at != 0 && c.conn.now()-at > int64(slowWrite)
	})
	began := time.Now()
	c.Close()
	if took := time.Since(began); took > muxCloseTime+2*time.Second {
		t.Errorf("Close took %v", took)
	}
	writer.Wait()
	if err := c.Err(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ended with %v", err)
	}
	if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a stream: %v", err)
	}
}

func TestMuxDialEndsWithItsContextOnAStuckConnection(t *testing.T) {
	upgrader := websocket.Upgrader{Subprotocols: []string{MuxProtocol}}
	end := make(chan struct{})
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return err
		}
		defer ws.Close()
		<-end
		return nil
	})
	defer close(end)
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	c.conn.wmu.Lock() // as a write that gets no further does
	defer c.conn.wmu.Unlock()
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 20*time.Millisecond, enough)
	defer cancel()
	for range 3 {
		if _, err := c.Dial(ctx, Endpoint{Network: "tcp", Port: 1}); !errors.Is(err, enough) {
			t.Errorf("got %v", err)
		}
	}
}

func TestMuxQueuedFramesAreWrittenWhole(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{MaxForwards: 500}, dialLoopback)
	port := echoBackend(t)
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	first := mustDial(t, c, port)
	instance := strings.Repeat("x", 3000)
	c.conn.wmu.Lock() // until more wait than fits a message
	var dials, echo sync.WaitGroup
	for range 100 {
		dials.Go(func() {
			stream, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port, Instance: instance})
			if err != nil {
				t.Error(err)
				return
			}
			stream.Reset()
		})
	}
	data := random(t, 2<<20)
	echo.Go(func() {
		first.Write(data)
		first.CloseWrite()
	})
	eventually(t, "a long queue", func() bool {
		c.conn.qmu.Lock()
		defer c.conn.qmu.Unlock()
		return len(c.conn.queue) > 3*muxMessage
	})
	c.conn.wmu.Unlock()
	dials.Wait()
	if got, err := io.ReadAll(first); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back that differ from the %d sent, %v", len(got), len(data), err)
	}
	echo.Wait()
}
