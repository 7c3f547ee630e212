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
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// udpConn is a connected UDP socket as a PortStream.
type udpConn struct{ *net.UDPConn }

func (udpConn) CloseWrite() error { return nil }

// dialUDP is a backend that dials UDP, and tells when a connection is closed.
func dialUDP(closed chan<- struct{}) PortForwardBackend {
	return PortForwardBackend{Dial: func(_ context.Context, to Endpoint) (PortStream, error) {
		c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(to.Port)})
		if err != nil {
			return nil, err
		}
		return &closeTeller{PortStream: udpConn{c}, closed: closed}, nil
	}}
}

type closeTeller struct {
	PortStream
	closed chan<- struct{}
	once   sync.Once
}

func (c *closeTeller) Close() error {
	c.once.Do(func() { c.closed <- struct{}{} })
	return c.PortStream.Close()
}

// udpEcho answers each datagram by itself.
func udpEcho(t testing.TB) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFromUDP(buf)
			if err != nil {
				return
			}
			c.WriteToUDP(buf[:n], from)
		}
	})
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

func TestMuxKeepsDatagramsApart(t *testing.T) {
	port, closed := udpEcho(t), make(chan struct{}, 1)
	s := serveMuxWith(t, PortForwardRequest{}, Options{}, dialUDP(closed))
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	stream, err := c.Dial(testContext(t), Endpoint{Network: "udp", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxDatagram)
	for _, size := range []int{1, 0, 1200, 40_000, 65_507, 2} { // 65,507 is the most of UDP over IPv4
		want := random(t, size)
		if n, err := stream.Write(want); n != size || err != nil {
			t.Fatalf("writing %d bytes: %d, %v", size, n, err)
		}
		n, err := stream.Read(buf)
		if err != nil || !bytes.Equal(buf[:n], want) {
			t.Fatalf("of %d bytes came %d that differ, %v", size, n, err)
		}
	}
	// The rest of one that doesn't fit isn't the next one.
	stream.Write([]byte("a long one"))
	stream.Write([]byte("next"))
	if n, err := stream.Read(buf[:6]); err != nil || string(buf[:n]) != "a long" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	if n, err := stream.Read(buf); err != nil || string(buf[:n]) != "next" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	if _, err := stream.Write(make([]byte, maxDatagram+1)); err == nil {
		t.Error("a datagram of 64 KiB was taken")
	}
	stream.CloseWrite() // a client that sends no more has gone: nothing else ends a UDP connection
	wait(t, closed, "the backend to be closed")
	if _, err := stream.Read(buf); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
}

func TestMuxIdleDatagramsEnd(t *testing.T) {
	port, closed := udpEcho(t), make(chan struct{}, 1)
	s := serveMuxWith(t, PortForwardRequest{}, Options{IdleDatagrams: 500 * time.Millisecond}, dialUDP(closed))
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	stream, err := c.Dial(testContext(t), Endpoint{Network: "udp", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	for began := time.Now(); time.Since(began) < 1200*time.Millisecond; { // it lives while something passes
		stream.Write([]byte("x"))
		if _, err := stream.Read(buf); err != nil {
			t.Fatalf("after %v: %v", time.Since(began), err)
		}
	}
	if _, err := stream.Read(buf); err != io.EOF {
		t.Errorf("got %v, want an end of file", err)
	}
	wait(t, closed, "the backend to be closed")
	if _, err := stream.Write([]byte("x")); err == nil {
		eventually(t, "an error of writing", func() bool {
			_, err = stream.Write([]byte("x"))
			return err != nil
		})
	}
}

// TestMuxIdleDatagramsEndWithAFullWindow: a client that takes nothing has no
// connection for longer than one that is told nothing.
func TestMuxIdleDatagramsEndWithAFullWindow(t *testing.T) {
	for name, leave := range map[string]func(*MuxStream){
		"of a client that says nothing more": func(*MuxStream) {},
		"of a client that ends its half":     func(s *MuxStream) { s.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			closed := make(chan struct{}, 2)
			flooding := &floodingStream{closed: make(chan struct{}), told: closed}
			backend := PortForwardBackend{Dial: func(context.Context, Endpoint) (PortStream, error) { return flooding, nil }}
			s := serveMuxWith(t, PortForwardRequest{}, Options{IdleDatagrams: 100 * time.Millisecond, MaxForwards: 1}, backend)
			c := dialMux(t, s.URL, MuxOptions{})
			defer c.Close()
			stream, err := c.Dial(testContext(t), Endpoint{Network: "udp", Port: 1})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "a full window", func() bool {
				stream.mu.Lock()
				defer stream.mu.Unlock()
				return stream.left == 0
			})
			leave(stream)
			wait(t, closed, "the backend to be closed")
			eventually(t, "room for another connection", func() bool {
				other, err := c.Dial(testContext(t), Endpoint{Network: "udp", Port: 1})
				if err == nil {
					other.Close()
				}
				return err == nil
			})
			for buf := make([]byte, maxDatagram); err == nil; {
				_, err = stream.Read(buf)
			}
			if !errors.Is(err, ErrStreamReset) {
				t.Errorf("the client that took nothing got %v in the end, want %v", err, ErrStreamReset)
			}
		})
	}
}

// floodingStream has datagrams without end.
type floodingStream struct {
	once   sync.Once
	closed chan struct{}
	told   chan<- struct{}
}

func (f *floodingStream) Read(p []byte) (int, error) {
	select {
	case <-f.closed:
		return 0, net.ErrClosed
	default:
		return 10_000, nil
	}
}

func (f *floodingStream) Write(p []byte) (int, error) { return len(p), nil }
func (f *floodingStream) CloseWrite() error           { return nil }

func (f *floodingStream) Close() error {
	f.once.Do(func() {
		close(f.closed)
		f.told <- struct{}{}
	})
	return nil
}

func TestMuxDatagramsThatNobodyTakes(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	port, closed := uint16(c.LocalAddr().(*net.UDPAddr).Port), make(chan struct{}, 1)
	c.Close()
	s := serveMuxWith(t, PortForwardRequest{}, Options{}, dialUDP(closed))
	client := dialMux(t, s.URL, MuxOptions{})
	defer client.Close()
	stream, err := client.Dial(testContext(t), Endpoint{Network: "udp", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	// The kernel tells the server's next call, whichever it is.
	eventually(t, "an error of writing", func() bool {
		_, err := stream.Write([]byte("anybody?"))
		return err != nil
	})
	wait(t, closed, "the backend to be closed")
	if _, err := stream.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("reading: %v", err)
	}
}

// tcpListener is a PortListener on loopback.
type tcpListener struct{ *net.TCPListener }

func (l tcpListener) Accept() (PortStream, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (l tcpListener) Endpoint() Endpoint {
	return Endpoint{Network: "tcp", Port: uint16(l.Addr().(*net.TCPAddr).Port)}
}

// listening is a backend that listens on loopback, and tells of its listeners.
func listening(made chan<- tcpListener) PortForwardBackend {
	return PortForwardBackend{Dial: nil, Listen: func(_ context.Context, at Endpoint) (PortListener, error) {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(at.Port)})
		if err != nil {
			return nil, err
		}
		made <- tcpListener{l}
		return tcpListener{l}, nil
	}}
}

func TestMuxReverse(t *testing.T) {
	made := make(chan tcpListener, 1)
	s := serveMuxWith(t, PortForwardRequest{}, Options{}, listening(made))
	c := dialMux(t, s.URL, MuxOptions{})
	defer c.Close()
	l, err := c.Listen(testContext(t), Endpoint{Network: "tcp"})
	if err != nil {
		t.Fatal(err)
	}
	port := wait(t, made, "the listener").Endpoint().Port
	if diff := cmp.Diff(Endpoint{Network: "tcp", Port: port}, l.Endpoint()); diff != "" {
		t.Errorf("the endpoint (-want +got):\n%s", diff)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			stream, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("Accept ended with %v", err)
				}
				return
			}
			wg.Go(func() {
				defer stream.Close()
				io.Copy(stream, stream)
				stream.CloseWrite()
			})
		}
	})
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			data := random(t, 300_000+i)
			if got := exchange(t, port, data); !bytes.Equal(got, data) {
				t.Errorf("got %d bytes back that differ from the %d sent", len(got), len(data))
			}
		})
	}
	clients.Wait()

	// Connections go on without their listener.
	lasting := dialTCP(t, port)
	lasting.Write([]byte("one"))
	buf := make([]byte, 3)
	if _, err := io.ReadFull(lasting, buf); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	eventually(t, "an end of listening", func() bool {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	lasting.Write([]byte("two"))
	if _, err := io.ReadFull(lasting, buf); err != nil || string(buf) != "two" {
		t.Errorf("after the listener's end: %q, %v", buf, err)
	}
	lasting.Close()
}

// readTCP connects and reads. A reset may come while it connects.
func readTCP(t testing.TB, port uint16) error {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(testTimeout))
	_, err = conn.Read(make([]byte, 1))
	return err
}

func TestMuxReverseRefusals(t *testing.T) {
	t.Run("a port that can't be had", func(t *testing.T) {
		taken := echoBackend(t)
		s := serveMuxWith(t, PortForwardRequest{}, Options{}, listening(make(chan tcpListener, 1)))
		c := dialMux(t, s.URL, MuxOptions{})
		defer c.Close()
		_, err := c.Listen(testContext(t), Endpoint{Network: "tcp", Port: taken})
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("got %v", err)
		}
		c.mu.Lock()
		if len(c.listeners) != 0 {
			t.Error("the listener is still known")
		}
		c.mu.Unlock()
	})
	t.Run("a listener that fails says why", func(t *testing.T) {
		made := make(chan tcpListener, 1)
		s := serveMuxWith(t, PortForwardRequest{}, Options{}, listening(made))
		c := dialMux(t, s.URL, MuxOptions{})
		defer c.Close()
		l, err := c.Listen(testContext(t), Endpoint{Network: "tcp"})
		if err != nil {
			t.Fatal(err)
		}
		wait(t, made, "the listener").Close()
		var status apierrors.APIStatus
		if _, err = l.Accept(); !errors.As(err, &status) || !strings.Contains(err.Error(), "no longer listening") {
			t.Errorf("Accept: %v", err)
		}
		l.Close()
	})
	t.Run("connections that nobody accepts", func(t *testing.T) {
		made := make(chan tcpListener, 1)
		s := serveMuxWith(t, PortForwardRequest{}, Options{}, listening(made))
		c := dialMux(t, s.URL, MuxOptions{})
		defer c.Close()
		l, err := c.Listen(testContext(t), Endpoint{Network: "tcp"})
		if err != nil {
			t.Fatal(err)
		}
		port := wait(t, made, "the listener").Endpoint().Port
		// Those that are too many are reset, the others when the listener ends.
		reset := make(chan error, muxBacklog+20)
		var readers sync.WaitGroup
		defer readers.Wait()
		for range cap(reset) {
			readers.Go(func() { reset <- readTCP(t, port) })
		}
		for range 20 {
			if err := wait(t, reset, "a surplus connection's end"); err == nil {
				t.Error("a connection has data")
			}
		}
		select {
		case err := <-reset:
			t.Errorf("another connection ended: %v", err)
		default:
		}
		l.Close()
		for range muxBacklog {
			wait(t, reset, "a waiting connection's end")
		}
	})
	t.Run("connections beyond the session's bound", func(t *testing.T) {
		made := make(chan tcpListener, 1)
		s := serveMuxWith(t, PortForwardRequest{}, Options{MaxForwards: 2}, listening(made))
		c := dialMux(t, s.URL, MuxOptions{})
		defer c.Close()
		l, err := c.Listen(testContext(t), Endpoint{Network: "tcp"})
		if err != nil {
			t.Fatal(err)
		}
		port := wait(t, made, "the listener").Endpoint().Port
		first := dialTCP(t, port)
		stream, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := readTCP(t, port); err == nil || err == io.EOF {
			t.Errorf("the second: %v, want a reset", err)
		}
		stream.Close()
		first.Close()
	})
	t.Run("the session's end", func(t *testing.T) {
		made := make(chan tcpListener, 1)
		ctx, cancel := context.WithCancelCause(context.Background())
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServePortForward(w, r.WithContext(ctx), PortForwardRequest{}, Options{}, listening(made))
		})
		c := dialMux(t, s.URL, MuxOptions{})
		defer c.Close()
		l, err := c.Listen(testContext(t), Endpoint{Network: "tcp"})
		if err != nil {
			t.Fatal(err)
		}
		cancel(errors.New("that's all"))
		if _, err := l.Accept(); err == nil {
			t.Error("Accept goes on")
		}
		wait(t, c.Done(), "the session's end")
		s.result(t)
		if _, err := wait(t, made, "the listener").Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the server still listens: %v", err)
		}
	})
}
