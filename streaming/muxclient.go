package streaming

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// muxBacklog is how many connections of a listener wait for Accept; more are
// refused.
const muxBacklog = 64

// muxIncoming is how many streams of the server may be without a header at a
// time.
const muxIncoming = 256

// muxCloseTime is how long Close waits for the server's answer.
const muxCloseTime = time.Second

// MuxOptions bound the client's end of a mux session. The zero value is safe.
type MuxOptions struct {
	// PingInterval is how often the server is pinged; 0 is 15 s.
	PingInterval time.Duration
	// PeerTimeout is how long the server may give no sign of life before it is
	// taken for dead; 0 is 60 s. It is also how long it may take to name the
	// listener of a connection that it opens.
	PeerTimeout time.Duration
	// MaxMemory bounds, in bytes, by how much the receive windows of all
	// streams may grow together, beyond 256 KiB for each; 0 is 32 MiB. Memory
	// is taken only for what was received and not read.
	MaxMemory int64
}

// MuxClient is the client's end of a mux session. Its methods may be called
// from several goroutines at once.
type MuxClient struct {
	conn   *muxConn
	opts   MuxOptions
	reader <-chan struct{} // closed when nothing more is read

	closing   sync.Once
	mu        sync.Mutex // protects the two below
	listeners map[uint32]*muxListener
	incoming  int // streams whose header hasn't come yet
}

// NewMuxClient starts a session on a WebSocket that was dialled with the
// subprotocol MuxProtocol, as client-go's websocket.Negotiate does it. It
// takes the WebSocket over, also if it fails.
func NewMuxClient(ws *websocket.Conn, opts MuxOptions) (*MuxClient, error) {
	if ws.Subprotocol() != MuxProtocol {
		ws.Close()
		return nil, fmt.Errorf("the server has chosen the subprotocol %q: %s is needed", ws.Subprotocol(), MuxProtocol)
	}
	linkOptions := Options{PingInterval: opts.PingInterval, PeerTimeout: opts.PeerTimeout}.withDefaults()
	opts.PeerTimeout = linkOptions.PeerTimeout
	l := &link{opts: linkOptions, parent: context.Background(), start: time.Now(), departed: ErrServerGone, conn: ws.NetConn()}
	l.ctx, l.cancel = context.WithCancelCause(l.parent)
	l.raw = l.conn
	if c, ok := l.conn.(*tls.Conn); ok {
		l.raw = c.NetConn()
	}
	l.tcp, _ = l.raw.(*net.TCPConn)
	l.conn.SetDeadline(time.Time{})

	c := newMuxConn(&wsConn{link: l, ws: ws}, true, opts.MaxMemory)
	m := &MuxClient{conn: c, opts: opts, listeners: map[uint32]*muxListener{}}
	c.accept = m.accept
	ws.SetReadLimit(maxMessage)
	ws.SetPingHandler(func(payload string) error {
		c.heard()
		if c.pongs.CompareAndSwap(false, true) {
			c.wg.Go(func() {
				c.signal(websocket.PongMessage, []byte(payload))
				c.pongs.Store(false)
			})
		}
		return nil
	})
	ws.SetPongHandler(func(string) error {
		c.heard()
		return nil
	})
	ws.SetCloseHandler(func(code int, text string) error {
		// What comes next is the end; this is its reason.
		c.farewell(c.failure(&websocket.CloseError{Code: code, Text: text}), func() {
			hurry := time.AfterFunc(muxCloseTime, func() { c.raw.Close() })
			defer hurry.Stop()
			c.signal(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""))
		})
		return nil
	})
	c.readStart.Store(c.now()) // the reader never waits for anybody else
	c.beat(func(bool) error { return c.signal(websocket.PingMessage, nil) })
	m.reader = c.serve(func(err error) error {
		if c.ctx.Err() == nil && errors.Is(err, ErrProtocol) {
			c.signal(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseProtocolError, ""))
		}
		c.fail(err)
		return m.Err()
	})
	return m, nil
}

// serverError says of the server what an error says of the client.
type serverError struct {
	text string
	of   error
}

func (e *serverError) Error() string { return e.text }
func (e *serverError) Unwrap() error { return e.of }

// ofServer makes a serverError of those that need it.
func ofServer(err error) error {
	for _, of := range []error{ErrPeerTimeout, ErrProtocol} {
		if errors.Is(err, of) {
			return &serverError{strings.Replace(err.Error(), "the client", "the server", 1), of}
		}
	}
	return err
}

// heard notes that the peer lives.
func (c *muxConn) heard() { c.lastRead.Store(c.now()) }

// signal writes a control frame of the WebSocket. A close frame is the last.
func (c *muxConn) signal(opcode int, payload []byte) error {
	var buf [muxWebSocketHeader + 125]byte
	n := copy(buf[muxWebSocketHeader:], payload)
	msg := c.seal(opcode, buf[:], n)
	c.wmu.Lock()
	defer c.wmu.Unlock()
	err := c.write(msg, nil)
	c.last = c.last || opcode == websocket.CloseMessage
	return err
}

// Done is closed when the session has ended.
func (m *MuxClient) Done() <-chan struct{} { return m.conn.ctx.Done() }

// Err says why the session has ended: ErrServerGone, with the server's reason
// if it gave one, ErrPeerTimeout, ErrProtocol, or net.ErrClosed after Close. It
// is nil before.
func (m *MuxClient) Err() error {
	if m.conn.ctx.Err() == nil {
		return nil
	}
	return ofServer(context.Cause(m.conn.ctx))
}

// Close ends the session with all its streams, and waits for what it had
// started.
func (m *MuxClient) Close() error {
	m.closing.Do(m.close)
	return nil
}

func (m *MuxClient) close() {
	c := m.conn
	c.quiet()
	hurry := time.AfterFunc(muxCloseTime, func() { c.raw.Close() })
	defer hurry.Stop()
	c.cancel(net.ErrClosed)
	c.drain()
	c.signal(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
	<-m.reader
	c.close()
}

// Dial connects to an endpoint at the target's side. If the server refuses
// that, the error is an APIStatus. Of "udp" each Read of the stream returns a
// datagram, and each Write sends one.
func (m *MuxClient) Dial(ctx context.Context, to Endpoint) (*MuxStream, error) {
	s, _, err := m.begin(ctx, muxOpening{Network: to.Network, Port: to.Port, Path: to.Path, Instance: to.Instance}, nil)
	if err != nil {
		return nil, err
	}
	s.datagrams = to.Network == "udp"
	return s, nil
}

// Check asks the server whether Dial would be allowed to connect to an
// endpoint, which isn't connected to. If it would not, the error is an
// APIStatus. A server that doesn't know the question says what it thinks of an
// endpoint when that is dialled; until then there is no error.
func (m *MuxClient) Check(ctx context.Context, to Endpoint) error {
	s, _, err := m.begin(ctx, muxOpening{Network: to.Network, Port: to.Port, Path: to.Path, Instance: to.Instance, Check: true}, nil)
	if err == nil {
		return s.Reset()
	}
	if apierrors.IsBadRequest(err) && strings.Contains(err.Error(), `unknown field "check"`) {
		return nil
	}
	return err
}

// begin opens a stream and waits for the server's answer.
func (m *MuxClient) begin(ctx context.Context, o muxOpening, prepare func(*MuxStream)) (*MuxStream, metav1.Status, error) {
	header, err := json.Marshal(o)
	if err == nil && len(header) > maxMuxHeader {
		err = httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"a header of %d bytes: %d is the most", len(header), maxMuxHeader)
	}
	if err != nil {
		return nil, metav1.Status{}, err
	}
	if ctx.Err() != nil {
		return nil, metav1.Status{}, context.Cause(ctx)
	}
	s, err := m.conn.open(prefixed(header), prepare)
	if err != nil {
		return nil, metav1.Status{}, err
	}
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	status, err := readAnswer(s)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		return s, status, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if errors.Is(err, ErrStreamReset) {
		err = fmt.Errorf("the server doesn't take the connection: %w", err)
	} else if err == io.EOF {
		err = ofServer(fmt.Errorf("%w: an answer is missing", ErrProtocol))
	}
	s.Reset()
	return nil, status, err
}

// muxListener is the client's end of a reverse forward.
type muxListener struct {
	client    *MuxClient
	stream    *MuxStream
	at        Endpoint
	datagrams bool
	pending   chan *MuxStream
	done      chan struct{} // closed after err was set
	err       error
}

// Listen has the target's side listen, and takes its connections: a reverse
// forward. The listener's endpoint has the port that was chosen.
func (m *MuxClient) Listen(ctx context.Context, at Endpoint) (PortListener, error) {
	l := &muxListener{client: m, at: at, datagrams: at.Network == "udp", pending: make(chan *MuxStream, muxBacklog), done: make(chan struct{})}
	var id uint32
	s, status, err := m.begin(ctx, muxOpening{Network: at.Network, Port: at.Port, Path: at.Path, Instance: at.Instance, Listen: true}, func(s *MuxStream) {
		// The first connections may come with the answer.
		id = s.id
		m.mu.Lock()
		defer m.mu.Unlock()
		m.listeners[id] = l
	})
	if err != nil {
		l.err = err
		l.end(id)
		return nil, err
	}
	l.stream = s
	if status.Details != nil {
		for _, cause := range status.Details.Causes {
			if cause.Type == listenPortCause {
				port, _ := strconv.ParseUint(cause.Message, 10, 16)
				l.at.Port = uint16(port)
			}
		}
	}
	if !m.conn.spawn(func() {
		_, err := readAnswer(s)
		switch {
		case err == nil, err == io.EOF:
			err = fmt.Errorf("%w: the server has stopped to listen", net.ErrClosed)
		case errors.Is(err, io.ErrClosedPipe):
			err = net.ErrClosed // by Close
		}
		l.err = err
		s.Reset()
		l.end(id)
	}) {
		l.err = net.ErrClosed
		l.end(id)
		return nil, l.err
	}
	return l, nil
}

// end lets go of a listener whose err was set. Whoever still waits to be
// accepted is refused.
func (l *muxListener) end(id uint32) {
	m := l.client
	m.mu.Lock()
	delete(m.listeners, id)
	m.mu.Unlock()
	close(l.done)
	for {
		select {
		case s := <-l.pending:
			s.Reset()
		default:
			return
		}
	}
}

// Accept implements PortListener.
func (l *muxListener) Accept() (PortStream, error) {
	for {
		select {
		case <-l.done:
			return nil, l.err
		case s := <-l.pending:
			if s.answer(nil) == nil {
				s.datagrams = l.datagrams
				return s, nil
			}
			s.Reset() // the server has given it up
		}
	}
}

// Endpoint implements PortListener.
func (l *muxListener) Endpoint() Endpoint { return l.at }

// Close implements PortListener.
func (l *muxListener) Close() error {
	err := l.stream.Close()
	<-l.done
	return err
}

// accept takes a stream that the server opens. It is called by the reader.
func (m *MuxClient) accept(s *MuxStream) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.listeners) == 0 || m.incoming >= muxIncoming {
		return false
	}
	m.incoming++
	m.conn.wg.Go(func() {
		o, err := readOpening(s, m.opts.PeerTimeout)
		if err == nil {
			err = m.enqueue(s, o.Listener)
		}
		if err != nil {
			s.answer(err)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.incoming--
	})
	return true
}

// enqueue hands a stream to its listener.
func (m *MuxClient) enqueue(s *MuxStream, listener uint32) error {
	m.mu.Lock() // so that a listener that ends sees all that wait
	defer m.mu.Unlock()
	l := m.listeners[listener]
	if l == nil {
		return httpErrorf(http.StatusGone, metav1.StatusReasonGone, "nobody listens any more")
	}
	select {
	case l.pending <- s:
		return nil
	default:
		return httpErrorf(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable,
			"%d connections wait to be accepted already", muxBacklog)
	}
}
