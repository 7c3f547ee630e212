package streaming

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"
)

// deafen makes the kernel drop all that arrives at a socket, so that it
// acknowledges nothing any more: a lost network, as the peer sees it.
func deafen(t *testing.T, conn net.Conn) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]})
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}

func TestPeerThatDoesNotRead(t *testing.T) {
	flood := func(ctx context.Context, stdio Stdio) error {
		for buf := make([]byte, chunkSize); ; {
			if _, err := stdio.Stdout.Write(buf); err != nil {
				return err
			}
		}
	}
	idle := func(ctx context.Context, stdio Stdio) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	opts := Options{PingInterval: 50 * time.Millisecond, PeerTimeout: 400 * time.Millisecond, StallTimeout: time.Hour}
	short := opts
	short.StallTimeout = 1500 * time.Millisecond
	// A busy machine may not let the client ping for some time.
	patient := short
	patient.PeerTimeout, patient.StallTimeout = 2500*time.Millisecond, 2500*time.Millisecond
	type client = func(t *testing.T, c *websocket.Conn, stop <-chan struct{})
	paused := client(func(*testing.T, *websocket.Conn, <-chan struct{}) {})
	pinging := client(func(t *testing.T, c *websocket.Conn, stop <-chan struct{}) {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				c.WriteControl(websocket.PingMessage, nil, time.Now().Add(time.Second))
			}
		}
	})
	deaf := client(func(t *testing.T, c *websocket.Conn, _ <-chan struct{}) { deafen(t, c.NetConn()) })
	cases := map[string]struct {
		opts   Options
		run    func(context.Context, Stdio) error
		client client
		// lives says that the session has to survive for some seconds.
		lives bool
	}{
		"a paused client lives":                        {opts, flood, paused, true},
		"a paused client that pings lives":             {patient, flood, pinging, true},
		"a paused client has StallTimeout":             {short, flood, paused, false},
		"a lost network is found while writing":        {opts, flood, deaf, false},
		"a lost network is found while idle":           {opts, idle, deaf, false},
		"a client that answers no ping while it could": {opts, idle, paused, false},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, tc.opts, tc.run)
			c := mustDialWebSocket(t, s.URL, "v5.channel.k8s.io")
			stop, done := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(done)
				tc.client(t, c, stop)
			}()
			defer func() { close(stop); <-done }()
			if tc.lives {
				select {
				case err := <-s.results:
					t.Errorf("the session ended: %v", err)
				case <-time.After(4 * time.Second):
				}
				// It isn't merely that nobody looks: it can be read on.
				c.SetReadDeadline(time.Now().Add(testTimeout))
				var n int64
				for n < 32<<20 {
					_, r, err := c.NextReader()
					if err != nil {
						t.Fatal(err)
					}
					m, _ := io.Copy(io.Discard, r)
					n += m
				}
				c.Close()
				s.result(t)
				return
			}
			if err := s.result(t); !errors.Is(err, ErrPeerTimeout) {
				t.Errorf("got %v, want %v", err, ErrPeerTimeout)
			}
		})
	}
}

func TestLostNetworkIsFoundWhileStdinIsNotRead(t *testing.T) {
	opts := Options{PingInterval: 50 * time.Millisecond, PeerTimeout: 400 * time.Millisecond}
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, opts, func(ctx context.Context, stdio Stdio) error {
		<-ctx.Done()
		return context.Cause(ctx)
	})
	c := mustDialWebSocket(t, s.URL, "v5.channel.k8s.io")
	c.SetWriteDeadline(time.Now().Add(time.Second))
	for c.WriteMessage(websocket.BinaryMessage, make([]byte, chunkSize)) == nil {
	}
	deafen(t, c.NetConn())
	if err := s.result(t); !errors.Is(err, ErrPeerTimeout) {
		t.Errorf("got %v, want %v", err, ErrPeerTimeout)
	}
}
