package streaming

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/streaming/pkg/httpstream"
	k8sspdy "k8s.io/streaming/pkg/httpstream/spdy"
)

// Limits of what a SPDY client may send. The largest data frame of a client of
// the Kubernetes API is an io.Copy's buffer; frames are streamed, not collected.
const (
	maxControlFrame = 16 << 10
	maxHeaderField  = 4 << 10
	maxHeaderCount  = 32
)

// maxStreams bounds the streams that a connection keeps. Those of commands are
// four; those of forwarded connections come in pairs, and as many error streams
// again may be being told that there is no room.
func maxStreams(opts Options) int { return 3*opts.MaxForwards + 4 }

// streamLimits bound what a stream has been sent and hasn't read. SPDY as
// Kubernetes speaks it has no flow control for each stream: a stream that is
// full holds up the others.
var streamLimits = limits{soft: 1 << 20, hard: 1 << 20}

// negotiateSPDY chooses the protocol of a SPDY upgrade as upstream's Handshake
// does, and prepares the response's headers.
func negotiateSPDY(w http.ResponseWriter, r *http.Request, supported []string) (string, error) {
	if !httpstream.IsUpgradeRequest(r) || !strings.EqualFold(r.Header.Get(httpstream.HeaderUpgrade), k8sspdy.HeaderSpdy31) {
		return "", httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"an upgrade to websocket or %s is needed", k8sspdy.HeaderSpdy31)
	}
	var offered []string
	for _, value := range r.Header.Values(httpstream.HeaderProtocolVersion) {
		for p := range strings.SplitSeq(value, ",") {
			if p = strings.TrimSpace(p); p != "" {
				offered = append(offered, p)
			}
		}
	}
	if len(offered) == 0 {
		return "", httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"the header %s is needed: one of %s", httpstream.HeaderProtocolVersion, strings.Join(supported, ", "))
	}
	for _, p := range offered {
		if slices.Contains(supported, p) {
			return p, nil
		}
	}
	for _, p := range supported {
		w.Header().Add(httpstream.HeaderAcceptedProtocolVersions, p)
	}
	return "", httpErrorf(http.StatusForbidden, metav1.StatusReasonForbidden,
		"none of the protocols %s is supported: use one of %s",
		truncate(fmt.Sprintf("%q", offered), 256), strings.Join(supported, ", "))
}

// spdyConn is the server's side of a SPDY/3.1 connection, of which Kubernetes
// uses a part: only the client opens streams, replies have no headers, there
// is no flow control. Upstream's takes 13 goroutines and near a megabyte for
// each connection, buffers up to 250 frames of 16 MiB, and writes a frame in
// three system calls; this one has a single goroutine, that of serve.
type spdyConn struct {
	*link
	ws *wsConn // below, if the connection is tunnelled; nil if not

	r      *bufio.Reader
	framer *spdy.Framer // decodes headers; nil once no more streams are taken. The reader's

	replied bool   // the header compressor's state; wmu protects it
	lastID  uint32 // the reader's
	refuse  bool   // no more streams are taken; the reader's

	mu      sync.Mutex // protects streams; never held while writing
	streams map[uint32]*spdyStream
}

// upgradeSPDY upgrades the request, or answers it with a Status. The caller
// closes the connection, which is being pinged.
func upgradeSPDY(w http.ResponseWriter, r *http.Request, opts Options, name, protocol string) (*spdyConn, error) {
	if err := checkOrigin(r, opts); err != nil {
		return nil, refuse(w, err)
	}
	l := newLink(r, opts, name)
	w.Header().Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	w.Header().Set(httpstream.HeaderUpgrade, k8sspdy.HeaderSpdy31)
	w.Header().Set(httpstream.HeaderProtocolVersion, protocol)
	w.WriteHeader(http.StatusSwitchingProtocols)
	rw, err := l.hijack(w)
	if err != nil {
		l.cancel(err)
		return nil, err
	}
	c := newSPDYConn(l, rw.Reader)
	c.beat(func(bool) error { return c.control(spdyPing, 0, 2) })
	return c, nil
}

// tunnelSPDY is SPDY in the binary messages of a WebSocket, which is being
// pinged itself.
func tunnelSPDY(ws *wsConn) *spdyConn {
	c := newSPDYConn(ws.link, bufio.NewReader(&messageReader{ws: ws}))
	c.ws = ws
	return c
}

func newSPDYConn(l *link, r *bufio.Reader) *spdyConn {
	c := &spdyConn{link: l, r: r, streams: map[uint32]*spdyStream{}}
	// Its writing half isn't used, and its error is that of a nil option.
	c.framer, _ = spdy.NewFramerWithOptions(io.Discard, c.r,
		spdy.WithMaxControlFramePayloadSize(maxControlFrame),
		spdy.WithMaxHeaderFieldSize(maxHeaderField),
		spdy.WithMaxHeaderCount(maxHeaderCount))
	return c
}

// messageReader reads the messages of a WebSocket as one stream.
type messageReader struct {
	ws  *wsConn
	msg io.Reader
}

func (m *messageReader) Read(p []byte) (int, error) {
	for {
		if m.msg == nil {
			_, r, err := m.ws.next(false)
			if err != nil {
				return 0, err
			}
			m.msg = r
		}
		n, err := m.msg.Read(p)
		if err == io.EOF {
			m.msg, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Types of control frames.
const (
	spdySynStream = 1
	spdySynReply  = 2
	spdyRstStream = 3
	spdyPing      = 6
	spdyGoAway    = 7
	spdyHeaders   = 8
)

const (
	spdyFlagFin = 1
	// Statuses of RST_STREAM.
	spdyProtocolError = 1
	spdyRefusedStream = 3
	spdyCancel        = 5
)

// acceptFunc decides on a new stream. It is called by the reader, and must not
// block. A stream doesn't keep its headers, as those can be large.
type acceptFunc func(c *spdyConn, s *spdyStream, headers http.Header) bool

// serve reads frames on a goroutine of its own until the connection ends;
// then the channel it returns is closed.
func (c *spdyConn) serve(accept acceptFunc) <-chan struct{} {
	done := make(chan struct{})
	c.wg.Go(func() {
		defer close(done)
		err := c.gone(c.read(accept))
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, s := range c.streams {
			s.in.end(err)
		}
		clear(c.streams)
	})
	return done
}

func (c *spdyConn) read(accept acceptFunc) error {
	for {
		head, err := c.r.Peek(8)
		if err != nil {
			return err
		}
		first, second := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:])
		flags, length := byte(second>>24), int64(second&0xffffff)
		if first&(1<<31) == 0 {
			c.r.Discard(8)
			if err := c.readData(first, flags, length); err != nil {
				return err
			}
			continue
		}
		if version := first >> 16 & 0x7fff; version != spdy.Version || length > maxControlFrame {
			return fmt.Errorf("%w: a control frame of version %d with %d bytes", ErrProtocol, version, length)
		}
		kind := first & 0xffff
		if (kind == spdySynStream || kind == spdyHeaders) && c.framer != nil {
			err = c.readHeaders(accept)
		} else {
			c.r.Discard(8)
			err = c.readControl(kind, length)
		}
		if err != nil {
			return err
		}
	}
}

// readData delivers a frame to its stream. Frames of streams that are no more
// are still on their way when those end.
func (c *spdyConn) readData(id uint32, flags byte, length int64) error {
	s := c.stream(id)
	if s == nil {
		_, err := io.CopyN(io.Discard, c.r, length)
		return err
	}
	if err := s.in.receive(c.r, length); err != nil {
		return err
	}
	if flags&spdyFlagFin != 0 {
		s.remoteClosed()
	}
	return nil
}

// readHeaders reads a frame with headers, which share one compressor, and
// opens a stream if it is a SYN_STREAM.
func (c *spdyConn) readHeaders(accept acceptFunc) error {
	frame, err := c.framer.ReadFrame()
	if err != nil {
		if network := (*spdy.Error)(nil); errors.As(err, &network) {
			return fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		return err
	}
	syn, ok := frame.(*spdy.SynStreamFrame)
	if !ok {
		return nil
	}
	id := uint32(syn.StreamId)
	if id&1 == 0 || id <= c.lastID || id >= 1<<31 {
		return c.control(spdyRstStream, id, spdyProtocolError)
	}
	c.lastID = id
	s := &spdyStream{conn: c, id: id, in: newInbox(streamLimits)}
	c.mu.Lock()
	full := len(c.streams) >= maxStreams(c.opts)
	if !full {
		c.streams[id] = s
	}
	c.mu.Unlock()
	if full {
		return c.control(spdyRstStream, id, spdyRefusedStream)
	}
	if syn.CFHeader.Flags&spdy.ControlFlagFin != 0 {
		s.remoteClosed()
	}
	// The reply goes before anything that accept's goroutines may write.
	if err := c.reply(id); err != nil {
		return err
	}
	if !accept(c, s, syn.Headers) {
		return s.abort(spdyRefusedStream)
	}
	if c.refuse {
		c.framer = nil
	}
	return nil
}

func (c *spdyConn) readControl(kind uint32, length int64) error {
	var payload [8]byte
	n := min(length, int64(len(payload)))
	if _, err := io.ReadFull(c.r, payload[:n]); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, c.r, length-n); err != nil {
		return err
	}
	if n < 4 {
		return nil
	}
	id := binary.BigEndian.Uint32(payload[:])
	switch kind {
	case spdySynStream: // too late for it
		return c.control(spdyRstStream, id, spdyRefusedStream)
	case spdyRstStream:
		if s := c.stream(id); s != nil {
			c.forget(s)
			s.end(ErrStreamReset)
		}
	case spdyPing:
		if id&1 == 1 && c.pongs.CompareAndSwap(false, true) { // an even one answers ours
			c.wg.Go(func() {
				c.control(spdyPing, 0, id)
				c.pongs.Store(false)
			})
		}
	case spdyGoAway:
		return ErrClientGone
	}
	return nil
}

// refuseStreams makes the connection reset all further streams. It is called
// by accept.
func (c *spdyConn) refuseStreams() { c.refuse = true }

func (c *spdyConn) stream(id uint32) *spdyStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[id]
}

func (c *spdyConn) forget(s *spdyStream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s.id)
}

// begin begins a write of length bytes in l.head: with the header of a message
// if the connection is tunnelled. wmu is held.
func (c *spdyConn) begin(length int) []byte {
	if c.ws != nil {
		return c.frame(websocket.BinaryMessage, length)
	}
	return c.head[:0]
}

// control writes a frame with at most two numbers, the first of which is left
// out in a PING.
func (c *spdyConn) control(kind uint32, id, value uint32) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	length := 8
	if kind == spdyPing {
		length = 4
	}
	head := c.begin(8 + length)
	head = binary.BigEndian.AppendUint32(head, 1<<31|spdy.Version<<16|kind)
	head = binary.BigEndian.AppendUint32(head, uint32(length))
	if kind != spdyPing {
		head = binary.BigEndian.AppendUint32(head, id)
	}
	return c.write(binary.BigEndian.AppendUint32(head, value), nil)
}

// reply writes a SYN_REPLY without headers. They are compressed all the same:
// a zlib stream that begins with the first reply of the connection, names
// SPDY/3's dictionary by its checksum, and has for each reply a stored block
// with the count of headers, 0, and an empty one, which makes decoders give out
// what they have. That spares a compressor of 800 KiB.
func (c *spdyConn) reply(id uint32) error {
	const start = "\x78\xbb\xe3\xc6\xa7\xc2"
	const block = "\x00\x04\x00\xfb\xff\x00\x00\x00\x00" + "\x00\x00\x00\xff\xff"
	c.wmu.Lock()
	defer c.wmu.Unlock()
	headers := block
	if !c.replied {
		headers = start + block
	}
	c.replied = true
	head := c.begin(12 + len(headers))
	head = binary.BigEndian.AppendUint32(head, 1<<31|spdy.Version<<16|spdySynReply)
	head = binary.BigEndian.AppendUint32(head, uint32(4+len(headers)))
	head = binary.BigEndian.AppendUint32(head, id)
	return c.write(append(head, headers...), nil)
}

// data writes a data frame of at most frameSize bytes.
func (c *spdyConn) data(id uint32, flags byte, p []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.over(); err != nil {
		return err
	}
	head := c.begin(8 + len(p))
	head = binary.BigEndian.AppendUint32(head, id)
	head = binary.BigEndian.AppendUint32(head, uint32(flags)<<24|uint32(len(p)))
	return c.write(head, p)
}

// finish says goodbye; no more pings follow. A tunnel has a place for why it ends
// early, cause.
func (c *spdyConn) finish(cause error) error {
	c.quiet()
	if err := c.control(spdyGoAway, c.lastID, 0); err != nil || c.ws == nil {
		return err
	}
	return c.ws.finish(closing(cause))
}

// spdyStream is a stream that the client opened. Its halves end by FIN, both
// at once by a reset.
type spdyStream struct {
	conn *spdyConn
	id   uint32
	in   *inbox

	mu          sync.Mutex // protects all below; never held while writing
	sent, ended bool       // our half, the client's half has ended
	err         error      // why nothing can be written any more
}

var _ PortStream = (*spdyStream)(nil)

func (s *spdyStream) Read(p []byte) (int, error) { return s.in.Read(p) }

func (s *spdyStream) Write(p []byte) (int, error) {
	var n int
	for n < len(p) {
		s.mu.Lock()
		err := s.err
		s.mu.Unlock()
		if err != nil {
			return n, err
		}
		part := p[n:min(len(p), n+frameSize)]
		if err := s.conn.data(s.id, 0, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// CloseWrite ends our half. It does nothing if that has ended.
func (s *spdyStream) CloseWrite() error {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil
	}
	s.sent, s.err = true, io.ErrClosedPipe
	both := s.ended
	s.mu.Unlock()
	if both {
		s.conn.forget(s)
	}
	return s.conn.data(s.id, spdyFlagFin, nil)
}

// Close ends the stream: both halves are done with. The client may never end
// its half, so that the stream isn't kept for that; what still comes for it is
// thrown away.
func (s *spdyStream) Close() error {
	s.in.Close()
	err := s.CloseWrite()
	s.conn.forget(s)
	return err
}

// Reset tells the client that the stream failed.
func (s *spdyStream) Reset() error { return s.abort(spdyCancel) }

func (s *spdyStream) abort(status uint32) error {
	s.conn.forget(s)
	s.mu.Lock()
	over := s.err != nil && s.ended
	s.mu.Unlock()
	s.end(ErrStreamReset)
	if over {
		return nil
	}
	return s.conn.control(spdyRstStream, s.id, status)
}

// end ends both halves on this side.
func (s *spdyStream) end(err error) {
	s.mu.Lock()
	s.ended = true
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	s.in.end(err)
}

// remoteClosed notes the client's FIN.
func (s *spdyStream) remoteClosed() {
	s.mu.Lock()
	s.ended = true
	both := s.sent
	s.mu.Unlock()
	if both {
		s.conn.forget(s)
	}
	s.in.end(io.EOF)
}
