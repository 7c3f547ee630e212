package streaming

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/portforward"
)

// HeaderErrorText on the error stream of a forwarded connection asks for the
// text of its failure, by the value "true". It isn't sent unasked: client-go
// ends all forwards of its session when it gets such a text.
const HeaderErrorText = "X-Error-Text"

// PortStream is a connection whose directions end independently.
// *net.TCPConn is one.
type PortStream interface {
	io.ReadWriteCloser
	// CloseWrite ends the direction to the port; reading goes on.
	CloseWrite() error
}

// PortForwardRequest says what the client asked for.
type PortForwardRequest struct {
	// Ports, if there are any, are the only ones that may be dialled, by TCP or
	// UDP; then there are no unix sockets and no reverse forwards, either. The
	// legacy WebSocket protocol needs them: it forwards one connection to each.
	Ports []uint16
}

// Endpoint is what a forwarded connection leads to, or, of a reverse forward,
// where it comes from.
type Endpoint struct {
	// Network is "tcp", "udp" or "unix". Protocols other than the mux protocol
	// know "tcp" alone.
	Network string
	// Port is that of "tcp" and "udp".
	Port uint16
	// Path is that of "unix".
	Path string
	// Instance names an instance of the target; "" is the session's.
	Instance string
}

// PortForwardBackend makes the connections of a port-forward session. Its
// functions may be called from several goroutines at once. Their context ends
// with the session, and bounds dialling and listening only.
type PortForwardBackend struct {
	// Dial connects to an endpoint. A connection of "udp" keeps datagrams
	// apart: each Read returns one, each Write sends one.
	Dial func(ctx context.Context, to Endpoint) (PortStream, error)
	// Check says whether Dial would be allowed to connect to an endpoint, as far
	// as that can be known without doing so. nil leaves all of it to Dial.
	Check func(ctx context.Context, to Endpoint) error
	// Listen has the target's side listen, and the client take the connections:
	// a reverse forward. nil refuses that.
	Listen func(ctx context.Context, at Endpoint) (PortListener, error)
	// Begun, unless it is nil, is called once the client has been answered and
	// the session goes on: by ServePortForward itself, before the others.
	Begun func()
}

// PortListener accepts the connections of a reverse forward.
type PortListener interface {
	// Accept waits for the next connection. It fails once the listener is
	// closed.
	Accept() (PortStream, error)
	// Endpoint is where it listens, with the port that was chosen if 0 was
	// asked for.
	Endpoint() Endpoint
	// Close ends Accept; connections go on.
	Close() error
}

// The subprotocols of port-forwarding over WebSocket: our own, the tunnel, and
// the legacy form.
var portForwardSubprotocols = []string{
	MuxProtocol,
	portforward.WebsocketsSPDYTunnelingPortForwardV1,
	"v4.channel.k8s.io", "v4.base64.channel.k8s.io", "",
}

// ServePortForward upgrades the request to one of the protocols of
// port-forward, has the backend dial for each connection that the client opens,
// and copies until the client goes or r's context ends. When it returns, all that it
// started has ended. It returns what ended the session, nil if the client
// closed it in order.
//
// A failure before the upgrade is answered as a metav1.Status, and returned. A
// failure to dial ends that connection alone; see HeaderErrorText.
func ServePortForward(w http.ResponseWriter, r *http.Request, req PortForwardRequest, opts Options, backend PortForwardBackend) error {
	opts = opts.withDefaults()
	f := &forwarder{allowed: req.Ports, opts: opts, backend: backend, pairs: map[string]*pair{}}
	if !isWebSocket(r) {
		protocol, err := negotiateSPDY(w, r, []string{portforward.PortForwardV1Name})
		if err != nil {
			return refuse(w, err)
		}
		c, err := upgradeSPDY(w, r, opts, "spdy/"+protocol, protocol)
		if err != nil {
			return err
		}
		return f.serve(c)
	}
	subprotocol, err := chooseSubprotocol(r, portForwardSubprotocols)
	if err != nil {
		return refuse(w, err)
	}
	tunnel := subprotocol == portforward.WebsocketsSPDYTunnelingPortForwardV1
	mux := subprotocol == MuxProtocol
	if !tunnel && !mux && (len(req.Ports) == 0 || len(req.Ports) > min(maxLegacyPorts, opts.MaxForwards)) {
		return refuse(w, httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"this WebSocket protocol needs 1 to %d ports in the query: ports=80", min(maxLegacyPorts, opts.MaxForwards)))
	}
	ws, err := upgradeWebSocket(w, r, opts, subprotocol)
	if err != nil {
		return err
	}
	if mux {
		return f.serveMux(ws)
	}
	if tunnel {
		return f.serve(tunnelSPDY(ws))
	}
	return f.serveLegacy(ws)
}

// forwarder forwards the connections of one session.
type forwarder struct {
	allowed []uint16
	opts    Options
	backend PortForwardBackend

	mu    sync.Mutex // protects all below; never held while writing
	pairs map[string]*pair
	count int // connections, those in pairs included
	// surplus is how many error streams are being told that count is too large.
	surplus int
}

// maxRequestID bounds the name that a client gives a connection. client-go's is
// a number.
const maxRequestID = 128

// pair is a connection of which not all streams have come yet.
type pair struct {
	port         uint16
	errors, data *spdyStream
	text         bool // HeaderErrorText
	timer        *time.Timer
}

// begin says that the session stands.
func (f *forwarder) begin() {
	if f.backend.Begun != nil {
		f.backend.Begun()
	}
}

func (f *forwarder) serve(c *spdyConn) error {
	defer c.close()
	f.begin()
	reader := c.serve(f.accept)
	<-c.ctx.Done()
	cause := context.Cause(c.ctx)
	if cause == ErrClientGone { //nolint:errorlint // wrapped, it says that something went wrong
		cause = nil
	}

	f.mu.Lock()
	for _, p := range f.pairs {
		p.timer.Stop()
	}
	f.mu.Unlock()
	if c.over() == nil && c.finish(cause) == nil {
		c.linger(reader)
	}
	return cause
}

// accept takes a stream, and starts to forward when it has both of a
// connection.
func (f *forwarder) accept(c *spdyConn, s *spdyStream, headers http.Header) bool {
	kind := headers.Get("streamType")
	port, err := strconv.ParseUint(headers.Get("port"), 10, 16)
	if err != nil || port == 0 || kind != "error" && kind != "data" {
		return false
	}
	text := kind == "error" && headers.Get(HeaderErrorText) == "true"
	if kind == "error" {
		s.in.Close() // nothing is to come on it
	}
	id := strings.Clone(headers.Get("requestID")) // it may be a small part of a header
	if len(id) > maxRequestID {
		return false
	}
	if id == "" {
		// A client from before there were such IDs opens both streams one
		// after the other, error first.
		n := s.id
		if kind == "data" {
			n -= 2
		}
		id = "stream " + strconv.FormatUint(uint64(n), 10)
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.pairs[id]
	if p == nil {
		if f.count >= f.opts.MaxForwards {
			if text && f.surplus < f.opts.MaxForwards {
				f.surplus++
				c.wg.Go(func() {
					fmt.Fprintf(s, "more than %d connections at a time", f.opts.MaxForwards)
					s.Close()
					f.mu.Lock()
					defer f.mu.Unlock()
					f.surplus--
				})
				return true
			}
			return false
		}
		p = &pair{port: uint16(port)}
		p.timer = time.AfterFunc(f.opts.SetupTimeout, func() { f.expire(c, id, p) })
		f.pairs[id] = p
		f.count++
	}
	if uint16(port) != p.port || kind == "error" && p.errors != nil || kind == "data" && p.data != nil {
		return false
	}
	if kind == "error" {
		p.errors, p.text = s, text
	} else {
		p.data = s
	}
	if p.errors == nil || p.data == nil {
		return true
	}
	p.timer.Stop()
	delete(f.pairs, id)
	c.wg.Go(func() {
		f.forward(c, p)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.count--
	})
	return true
}

// expire gives up a connection whose second stream hasn't come.
func (f *forwarder) expire(c *spdyConn, id string, p *pair) {
	f.mu.Lock()
	if f.pairs[id] != p || c.ctx.Err() != nil {
		f.mu.Unlock()
		return
	}
	delete(f.pairs, id)
	f.count--
	c.wg.Add(1)
	f.mu.Unlock()
	defer c.wg.Done()
	for _, s := range []*spdyStream{p.errors, p.data} {
		if s != nil {
			s.Reset()
		}
	}
}

// forward serves one connection from dialling to its end.
func (f *forwarder) forward(c *spdyConn, p *pair) {
	defer p.errors.Close()
	backend, err := f.open(c.ctx, p.port)
	if err != nil {
		if p.text {
			io.WriteString(p.errors, truncate(statusOf(err).Message, maxStatus))
		}
		p.data.Reset()
		return
	}
	// Reset before the error stream is closed: client-go waits for that one.
	join(c.ctx, p.data.in, p.data, backend)
	p.data.Close()
}

func (f *forwarder) open(ctx context.Context, port uint16) (PortStream, error) {
	if len(f.allowed) > 0 && !slices.Contains(f.allowed, port) {
		return nil, fmt.Errorf("port %d is not one of those asked for", port)
	}
	return f.backend.Dial(ctx, Endpoint{Network: "tcp", Port: port})
}

// out is the way to the client.
type out interface {
	io.Writer
	CloseWrite() error
	Reset() error
}

// join copies both ways until both have ended, and closes the backend. A
// half-close is passed on. What fails on the side of the backend resets the
// client's stream; what fails on the client's, and the session's end, resets the
// backend, unless the client's half has been passed on whole.
func join(ctx context.Context, in *inbox, client out, backend PortStream) {
	var whole atomic.Bool
	if _, ok := client.(legacyOut); ok {
		whole.Store(true) // it has no half-close: its client just goes
	}
	var once sync.Once
	closeBackend := func() {
		once.Do(func() {
			if whole.Load() {
				backend.Close()
			} else {
				hangUp(backend)
			}
		})
	}
	defer closeBackend()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		closeBackend()
	})
	defer func() {
		if !stop() {
			<-ended
		}
	}()

	var wg sync.WaitGroup
	wg.Go(func() {
		w := &markedWriter{w: backend}
		_, err := in.WriteTo(w)
		switch {
		case err == nil:
			whole.Store(true)
			if backend.CloseWrite() != nil {
				closeBackend()
			}
		case w.err != nil:
			// The backend takes no more; what it still says is passed on.
			whole.Store(true)
		default:
			closeBackend()
		}
		in.Close()
	})

	buf := chunks.Get().(*chunk)
	for {
		n, err := backend.Read(buf.data[:])
		if n > 0 {
			if _, err := client.Write(buf.data[:n]); err != nil {
				closeBackend()
				break
			}
		}
		if errors.Is(err, io.EOF) {
			client.CloseWrite()
			break
		}
		if err != nil {
			client.Reset()
			in.Close()
			break
		}
	}
	chunks.Put(buf)
	wg.Wait()
}

// markedWriter remembers that it was the writer that failed.
type markedWriter struct {
	w   io.Writer
	err error
}

func (m *markedWriter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.err = err
	return n, err
}

// maxLegacyPorts is what fits the legacy protocol's channel byte, in base64
// too, where it is a printable character.
const maxLegacyPorts = 32

// serveLegacy forwards one connection to each port: channel 2i carries its
// data, channel 2i+1 an error text; each begins with the port, in two bytes,
// the lower one first.
func (f *forwarder) serveLegacy(c *wsConn) error {
	defer c.close()
	f.begin()
	inboxes := make([]*inbox, len(f.allowed))
	for i, port := range f.allowed {
		inboxes[i] = newInbox(streamLimits)
		number := binary.LittleEndian.AppendUint16(nil, port)
		for _, channel := range []int{2 * i, 2*i + 1} {
			if err := c.send(channel, number); err != nil {
				return err
			}
		}
	}
	reader := make(chan struct{})
	c.wg.Go(func() {
		defer close(reader)
		err := c.gone(f.readLegacy(c, inboxes))
		for _, in := range inboxes {
			in.end(err)
		}
	})
	var wg sync.WaitGroup
	for i, port := range f.allowed {
		wg.Go(func() {
			defer inboxes[i].Close()
			backend, err := f.open(c.ctx, port)
			if err != nil {
				c.send(2*i+1, []byte(truncate(statusOf(err).Message, maxStatus)))
				return
			}
			join(c.ctx, inboxes[i], legacyOut{channelWriter{c, 2 * i}}, backend)
		})
	}
	wg.Wait()
	cause := context.Cause(c.ctx)
	if errors.Is(cause, ErrClientGone) {
		cause = nil
	}
	if c.over() == nil && c.finish(closing(cause)) == nil {
		c.linger(reader)
	}
	return cause
}

func (f *forwarder) readLegacy(c *wsConn, inboxes []*inbox) error {
	for {
		channel, r, err := c.next(true)
		if err != nil {
			return err
		}
		if i := int(channel / 2); channel%2 == 0 && i < len(inboxes) {
			if err := inboxes[i].receive(r, -1); err != nil {
				return c.protocolError(err)
			}
		}
	}
}

// legacyOut has no way to say that one connection has ended.
type legacyOut struct{ channelWriter }

func (legacyOut) CloseWrite() error { return nil }
func (legacyOut) Reset() error      { return nil }
