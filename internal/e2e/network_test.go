//go:build linux

package e2e

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
)

// network is the way from a client to a server, which can be cut.
type network struct {
	to       string
	listener net.Listener

	mu    sync.Mutex
	state condition
	// conns are the connections in both halves, each with what its end closes.
	conns map[*hop]struct{}
	wg    sync.WaitGroup
}

// condition is what a network does with connections.
type condition int

const (
	// passing is how it should be.
	passing condition = iota
	// refusing closes the connections that there are in order, and new ones too.
	refusing
	// resetting resets them.
	resetting
	// losing drops what is sent without a word, in both directions. What was
	// open when it began stays lost, as behind a gateway that has forgotten it.
	losing
)

// hop is one connection through the network.
type hop struct {
	client, server *net.TCPConn // server is nil until it is dialled
	lost           chan struct{}
	once           sync.Once
}

// newNetwork listens on loopback, and leads to an address.
func newNetwork(t testing.TB, to string) *network {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &network{to: to, listener: listener, conns: map[*hop]struct{}{}}
	n.wg.Go(n.accept)
	t.Cleanup(func() {
		listener.Close()
		n.set(resetting)
		n.wg.Wait()
	})
	return n
}

func (n *network) address() string { return n.listener.Addr().String() }

func (n *network) accept() {
	for {
		conn, err := n.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		h := &hop{client: conn.(*net.TCPConn), lost: make(chan struct{})}
		n.mu.Lock()
		n.conns[h] = struct{}{}
		state := n.state
		n.mu.Unlock()
		h.meet(state)
		n.wg.Go(func() {
			n.carry(h)
			n.mu.Lock()
			delete(n.conns, h)
			n.mu.Unlock()
		})
	}
}

// carry copies both ways until both have ended.
func (n *network) carry(h *hop) {
	defer h.client.Close()
	conn, err := net.Dial("tcp", n.to)
	if err != nil {
		h.client.SetLinger(0)
		return
	}
	n.mu.Lock()
	h.server = conn.(*net.TCPConn)
	state := n.state
	n.mu.Unlock()
	defer h.server.Close()
	h.meet(state)
	var both sync.WaitGroup
	both.Go(func() { h.copy(h.server, h.client) })
	both.Go(func() { h.copy(h.client, h.server) })
	both.Wait()
}

// copy passes on what comes, and the end of it, unless the connection is lost:
// then neither.
func (h *hop) copy(to, from *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		read, err := from.Read(buf)
		select {
		case <-h.lost:
			if err != nil {
				return
			}
			continue
		default:
		}
		if read > 0 {
			if _, err := to.Write(buf[:read]); err != nil {
				h.end(true)
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			to.CloseWrite()
			return
		case err != nil:
			h.end(true)
			return
		}
	}
}

// end closes the connection, with a reset if there is more to it than an end.
func (h *hop) end(reset bool) {
	for _, conn := range []*net.TCPConn{h.client, h.server} {
		if conn == nil {
			continue
		}
		if reset {
			conn.SetLinger(0)
		}
		conn.Close()
	}
}

// meet puts a connection into what is the network's state.
func (h *hop) meet(state condition) {
	switch state {
	case refusing, resetting:
		h.end(state == resetting)
	case losing:
		h.once.Do(func() { close(h.lost) })
	}
}

// set changes the network's condition, for the connections that there are, too.
func (n *network) set(state condition) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state = state
	for h := range n.conns {
		h.meet(state)
	}
}
