package streaming

import (
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

// MuxProtocol is the WebSocket subprotocol that carries any number of
// connections, each with its own flow control: docs/protocol.md. Its frames are
// yamux's (github.com/hashicorp/yamux, spec.md).
const MuxProtocol = "v1.mux.streaming.aaserver.io"

const (
	muxHeader = 12 // a frame's

	// muxWindow is what may be sent on a stream before the peer has said more.
	muxWindow = 256 << 10
	// muxMaxWindow bounds what a window grows to: 1 Gbit/s at 100 ms is 12 MiB.
	muxMaxWindow = 16 << 20
	// muxReport is how much is read, at most, before the peer is told.
	muxReport = 1 << 20
	// muxMemory is the default bound on the growth of all windows together.
	muxMemory = 32 << 20

	// muxMessage is the largest WebSocket message that is sent, its header
	// included: four full TLS records.
	muxMessage = 64 << 10
	// muxSmall is what a connection that has sent little is read into, so that
	// one that waits holds no more.
	muxSmall = 2 << 10
	// muxRoom is kept free before a frame's payload, for its header and the
	// WebSocket's.
	muxRoom = muxWebSocketHeader + muxHeader
	// muxWebSocketHeader is that of a masked message of less than 64 KiB.
	muxWebSocketHeader = 8

	// muxOwed bounds, in bytes, the answers that a peer is owed and doesn't take.
	muxOwed = 1024 * muxHeader
)

// Types and flags of frames.
const (
	muxData   = 0
	muxUpdate = 1 // the window of a stream
	muxPing   = 2
	muxGoAway = 3

	muxSYN = 1
	muxACK = 2
	muxFIN = 4
	muxRST = 8
)

// muxBuffer is a message that is being made: its payload begins at
// muxWebSocketHeader, that of a frame with data at muxRoom.
type muxBuffer [muxMessage + muxWebSocketHeader]byte

var (
	muxBuffers   = sync.Pool{New: func() any { return new(muxBuffer) }}
	muxSmalls    = sync.Pool{New: func() any { return new([muxRoom + muxSmall]byte) }}
	muxDatagrams = sync.Pool{New: func() any { return new([maxDatagram]byte) }}
)

// maxDatagram is the largest datagram: what its length's two bytes can say.
const maxDatagram = 1<<16 - 1

// muxConn is one end of a mux session. It has one goroutine, the reader, which
// never waits for a stream's user, as no peer may send more than a stream's
// window, and never writes: what it has to say is queued. Writers write their
// own frames.
type muxConn struct {
	*wsConn
	client bool // this end is the client's: its messages are masked

	// accept takes a stream that the peer opened, or refuses it. It is called
	// by the reader, and must not block.
	accept func(*MuxStream) bool

	growth atomic.Int64 // by how much windows may still grow, in bytes
	rtt    atomic.Int64 // in nanoseconds; 0 is unknown
	pingAt atomic.Int64 // when the ping that is under way was sent; 0 if none is
	rttAt  atomic.Int64 // when rtt was measured

	mu      sync.Mutex // protects the three below; taken before qmu
	streams map[uint32]*MuxStream
	nextID  uint32
	ended   error // why no more streams can be opened

	lastID uint32 // the peer's last stream; the reader's

	qmu      sync.Mutex // protects the three below; never held while writing
	queue    []byte     // frames that wait to be written: those without data, and openings
	flushing bool       // a goroutine writes them
	stopped  bool       // nothing more is queued or spawned
	taken    chan struct{}
}

// newMuxConn makes one end of a session. memory bounds the growth of windows.
func newMuxConn(ws *wsConn, client bool, memory int64) *muxConn {
	c := &muxConn{wsConn: ws, client: client, streams: map[uint32]*MuxStream{}, nextID: 2, taken: make(chan struct{}, 1)}
	if client {
		c.nextID = 1
	}
	if memory <= 0 {
		memory = muxMemory
	}
	c.growth.Store(memory)
	return c
}

// serve reads frames on a goroutine of its own until the connection ends;
// then the channel that it returns is closed.
func (c *muxConn) serve(why func(error) error) <-chan struct{} {
	done := make(chan struct{})
	c.wg.Go(func() {
		defer close(done)
		err := why(c.read(&muxReader{conn: c}))
		c.mu.Lock()
		streams := c.streams
		c.streams, c.ended = map[uint32]*MuxStream{}, err
		c.mu.Unlock()
		for _, s := range streams {
			s.end(err)
		}
	})
	return done
}

// muxReader reads the messages of a WebSocket as one stream.
type muxReader struct {
	conn *muxConn
	msg  io.Reader
}

func (m *muxReader) Read(p []byte) (int, error) {
	for {
		if m.msg == nil {
			kind, r, err := m.conn.ws.NextReader()
			if err != nil {
				return 0, m.conn.failure(err)
			}
			if kind != websocket.BinaryMessage {
				return 0, fmt.Errorf("%w: a message of text", ErrProtocol)
			}
			m.msg = r
		}
		n, err := m.msg.Read(p)
		if m.conn.client { // the server's link sees its reads itself
			m.conn.lastRead.Store(m.conn.now())
		}
		if err == io.EOF {
			m.msg, err = nil, nil
		} else if err != nil {
			err = m.conn.failure(err)
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *muxConn) read(r io.Reader) error {
	var head [muxHeader]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return err
		}
		kind, flags := head[1], binary.BigEndian.Uint16(head[2:])
		id, value := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[8:])
		if head[0] != 0 || kind > muxGoAway || flags > muxSYN|muxACK|muxFIN|muxRST {
			return fmt.Errorf("%w: a frame of version %d, type %d with flags %#x", ErrProtocol, head[0], kind, flags)
		}
		var err error
		switch {
		case kind == muxGoAway:
			return c.departed
		case kind == muxPing && flags&muxSYN != 0:
			err = c.owe(muxPing, muxACK, 0, value)
		case kind == muxPing:
			c.pong(value)
		default:
			err = c.readStream(r, kind, flags, id, value)
		}
		if err != nil {
			return err
		}
	}
}

// readStream takes a frame of a stream. Frames of streams that are no more are
// still on their way when those end.
func (c *muxConn) readStream(r io.Reader, kind byte, flags uint16, id, value uint32) error {
	s, err := c.lookup(id, flags)
	if err != nil {
		return err
	}
	switch {
	case kind == muxUpdate:
		// One that resets may have a code for a value.
		if s != nil && flags&muxRST == 0 && !s.grant(value) {
			return fmt.Errorf("%w: a window of more than 2 GiB", ErrProtocol)
		}
	case s == nil:
		if value > muxMaxWindow {
			return fmt.Errorf("%w: a frame of %d bytes for a stream that isn't open", ErrProtocol, value)
		}
		if _, err := io.CopyN(io.Discard, r, int64(value)); err != nil {
			return err
		}
	default:
		if !s.admit(value) {
			return fmt.Errorf("%w: more than the stream's window", ErrProtocol)
		}
		if err := s.in.receive(r, int64(value)); err != nil {
			return err
		}
		if value > 0 && s.abandoned() {
			s.Reset()
			return nil
		}
	}
	if s != nil && flags&muxRST != 0 {
		s.end(ErrStreamReset)
		c.forget(s)
	} else if s != nil && flags&muxFIN != 0 {
		s.remoteClosed()
	}
	return nil
}

// lookup returns the stream of a frame, nil if it is no more. It opens those
// that the peer opens.
func (c *muxConn) lookup(id uint32, flags uint16) (*MuxStream, error) {
	theirs := id != 0 && (id%2 == 0) == c.client
	c.mu.Lock()
	s := c.streams[id]
	known := s != nil || theirs && id <= c.lastID || !theirs && id != 0 && id < c.nextID
	c.mu.Unlock()
	if flags&muxSYN == 0 {
		if !known {
			return nil, fmt.Errorf("%w: a frame of stream %d, which was never opened", ErrProtocol, id)
		}
		return s, nil
	}
	if known || !theirs {
		return nil, fmt.Errorf("%w: stream %d can't be opened", ErrProtocol, id)
	}
	c.lastID = id
	s = newMuxStream(c, id)
	s.ack = true
	c.mu.Lock()
	c.streams[id] = s
	c.mu.Unlock()
	if c.accept != nil && c.accept(s) {
		return s, nil
	}
	s.end(ErrStreamReset)
	c.forget(s)
	return nil, c.owe(muxUpdate, muxRST, id, 0)
}

// open opens a stream, whose first data is header: less than its window.
// Before that prepare is called, which must not block. It doesn't block
// either: the frame is queued.
func (c *muxConn) open(header []byte, prepare func(*MuxStream)) (*MuxStream, error) {
	c.mu.Lock()
	defer c.mu.Unlock() // until it is queued, so that IDs go up on the wire
	if c.ended != nil {
		return nil, c.ended
	}
	if c.nextID > 1<<32-3 {
		return nil, errors.New("this connection has opened all the streams that it can")
	}
	s := newMuxStream(c, c.nextID)
	s.credit -= int64(len(header))
	c.streams[s.id] = s
	c.nextID += 2
	if prepare != nil {
		prepare(s)
	}
	c.enqueue(appendMuxHeader(nil, muxData, muxSYN, s.id, uint32(len(header))), header)
	return s, nil
}

// forget is called when nothing more is to come of a stream, which was ended
// before.
func (c *muxConn) forget(s *MuxStream) {
	c.mu.Lock()
	known := c.streams[s.id] == s
	if known {
		delete(c.streams, s.id)
	}
	c.mu.Unlock()
	if known {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forgotten = true
		s.giveBack()
	}
}

// owe queues an answer for the peer, and waits while too many are queued
// already. Whoever isn't the reader uses say.
func (c *muxConn) owe(kind byte, flags uint16, id, value uint32) error {
	for {
		c.qmu.Lock()
		full := len(c.queue) >= muxOwed
		c.qmu.Unlock()
		if !full {
			c.say(kind, flags, id, value)
			return nil
		}
		select {
		case <-c.taken:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

// say queues a frame without data. It doesn't block.
func (c *muxConn) say(kind byte, flags uint16, id, value uint32) {
	var head [muxHeader]byte
	c.enqueue(appendMuxHeader(head[:0], kind, flags, id, value), nil)
}

// enqueue queues a frame.
func (c *muxConn) enqueue(head, data []byte) {
	c.qmu.Lock()
	defer c.qmu.Unlock()
	if c.stopped {
		return
	}
	c.queue = append(append(c.queue, head...), data...)
	if !c.flushing {
		c.flushing = true
		c.wg.Go(c.flush)
	}
}

// flush writes what is queued, as much as there is in one message.
func (c *muxConn) flush() {
	buf := muxBuffers.Get().(*muxBuffer)
	defer muxBuffers.Put(buf)
	for {
		c.qmu.Lock()
		n := wholeFrames(c.queue, muxHeader+c.most())
		copy(buf[muxWebSocketHeader:], c.queue[:n])
		c.queue = c.queue[n:]
		if len(c.queue) == 0 {
			c.queue = nil
		}
		c.flushing = n > 0
		c.qmu.Unlock()
		if n == 0 {
			return
		}
		signal(c.taken)
		c.put(websocket.BinaryMessage, buf[:], n) // its error ends the session
	}
}

// spawn starts a goroutine that the session's end waits for, unless it has
// come.
func (c *muxConn) spawn(f func()) bool {
	c.qmu.Lock()
	defer c.qmu.Unlock()
	if !c.stopped {
		c.wg.Go(f)
	}
	return !c.stopped
}

// wholeFrames is the length of the first frames of a queue that fit: others may
// be written between two messages.
func wholeFrames(queue []byte, most int) int {
	for n := 0; ; {
		if n == len(queue) {
			return n
		}
		size := muxHeader
		if queue[n+1] == muxData {
			size += int(binary.BigEndian.Uint32(queue[n+8:]))
		}
		if n+size > most {
			return n
		}
		n += size
	}
}

// drain writes what is queued and lets nothing more be.
func (c *muxConn) drain() {
	c.qmu.Lock()
	c.stopped = true
	idle := !c.flushing
	c.flushing = true
	c.qmu.Unlock()
	if idle {
		c.flush()
	}
}

func appendMuxHeader(b []byte, kind byte, flags uint16, id, value uint32) []byte {
	b = append(b, 0, kind)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, id)
	return binary.BigEndian.AppendUint32(b, value)
}

// data writes a frame with n bytes of data, which begin at buf[muxRoom].
func (c *muxConn) data(buf []byte, flags uint16, id uint32, n int) error {
	appendMuxHeader(buf[muxWebSocketHeader:muxWebSocketHeader], muxData, flags, id, uint32(n))
	return c.put(websocket.BinaryMessage, buf, muxHeader+n)
}

// put writes a message of less than 64 KiB, which begins at
// buf[muxWebSocketHeader], in one piece.
func (c *muxConn) put(opcode int, buf []byte, n int) error {
	msg := c.seal(opcode, buf, n)
	c.wmu.Lock()
	defer c.wmu.Unlock()
	err := c.over()
	if err == nil {
		err = c.write(msg, nil)
	}
	if err != nil && c.client {
		err = ofServer(err)
	}
	if err == nil {
		c.lastData.Store(c.now())
	}
	return err
}

// seal puts the WebSocket's header before a message, and masks the client's.
func (c *muxConn) seal(opcode int, buf []byte, n int) []byte {
	size := 2
	if n > 125 {
		size = 4
	}
	if c.client {
		size += 4
	}
	msg := buf[muxWebSocketHeader-size : muxWebSocketHeader+n]
	msg[0] = 0x80 | byte(opcode)
	if n > 125 {
		msg[1] = 126
		binary.BigEndian.PutUint16(msg[2:], uint16(n))
	} else {
		msg[1] = byte(n)
	}
	if c.client {
		msg[1] |= 0x80
		key := rand.Uint32()
		binary.LittleEndian.PutUint32(msg[size-4:], key)
		mask(msg[size:], key)
	}
	return msg
}

// mask applies a WebSocket's mask, by the block.
func mask(p []byte, key uint32) {
	var block [512]byte
	for i := 0; i < min(len(block), len(p)); i += 4 {
		binary.LittleEndian.PutUint32(block[i:], key)
	}
	for len(p) > 0 {
		p = p[subtle.XORBytes(p, p, block[:]):]
	}
}

// failure is what an error of reading means.
func (c *muxConn) failure(err error) error {
	if !c.client {
		return c.protocolError(err)
	}
	var closed *websocket.CloseError
	switch {
	case errors.As(err, &closed) && closed.Text != "":
		return fmt.Errorf("%w: %s", ErrServerGone, closed.Text)
	case errors.Is(err, io.EOF), websocket.IsCloseError(err, websocket.CloseAbnormalClosure):
		return fmt.Errorf("%w: %w", ErrServerGone, io.ErrUnexpectedEOF)
	default:
		return fmt.Errorf("%w: %w", ErrServerGone, err)
	}
}

// measure sends a ping to learn how long the way is, if that isn't known.
func (c *muxConn) measure(now int64) {
	if last := c.rttAt.Load(); last != 0 && now-last < int64(time.Second) {
		return
	}
	if c.pingAt.CompareAndSwap(0, now) {
		c.say(muxPing, muxSYN, 0, uint32(now))
	}
}

func (c *muxConn) pong(value uint32) {
	at := c.pingAt.Load()
	if at == 0 || uint32(at) != value {
		return
	}
	now := c.now()
	rtt, sample := c.rtt.Load(), max(now-at, 1)
	if rtt != 0 {
		sample = (rtt + sample) / 2
	}
	c.rtt.Store(sample)
	c.rttAt.Store(now)
	c.pingAt.Store(0)
}

// MuxStream is one connection of a mux session. Its halves end by CloseWrite,
// both at once by Reset. Reads, writes and what ends them may come from
// different goroutines.
type MuxStream struct {
	conn *muxConn
	id   uint32
	in   *inbox

	// datagrams says that each is prefixed with its length.
	datagrams bool

	turn     sync.Mutex    // held by a Write, so that it is written in one piece
	wmu      sync.Mutex    // held while a frame is written, so that FIN comes last
	writable chan struct{} // capacity 1: look again

	mu          sync.Mutex // protects all below; never held while writing
	ack         bool       // the next frame says that the stream was accepted
	credit      int64      // what may be written
	err         error      // why nothing can be written any more
	sent, ended bool       // our half, the peer's half has ended
	dropped     bool       // closed before the peer's half ended
	broken      error      // why both halves ended at once
	onEnd       func(error)

	window int   // the receive window
	left   int   // how much of it the peer may still use
	taken  int   // what was read and the peer hasn't been told of
	since  int64 // when the peer was last told
	grown  int   // by how much the window has grown, until that is given back

	forgotten bool // nothing more is to come
	discarded bool // nothing more is read
}

var (
	_ PortStream    = (*MuxStream)(nil)
	_ io.ReaderFrom = (*MuxStream)(nil)
	_ io.WriterTo   = (*MuxStream)(nil)
)

func newMuxStream(c *muxConn, id uint32) *MuxStream {
	return &MuxStream{
		conn: c, id: id,
		// The window bounds it; the reader never waits.
		in:       newInbox(limits{soft: 1 << 30, hard: 1 << 30}),
		writable: make(chan struct{}, 1),
		credit:   muxWindow,
		window:   muxWindow, left: muxWindow,
		since: c.now(),
	}
}

// Read reads what there is. Of "udp" it returns one datagram, whose rest is
// lost if p is too small for it.
func (s *MuxStream) Read(p []byte) (int, error) {
	if s.datagrams {
		return s.readDatagram(p)
	}
	n, err := s.in.Read(p)
	s.consumed(n)
	return n, err
}

func (s *MuxStream) readDatagram(p []byte) (int, error) {
	var prefix [2]byte
	if _, err := s.readFull(prefix[:]); err != nil {
		return 0, err
	}
	size := int(binary.BigEndian.Uint16(prefix[:]))
	n, err := s.readFull(p[:min(len(p), size)])
	if err == nil && n < size {
		var m int64
		m, err = io.CopyN(io.Discard, s.in, int64(size-n))
		s.consumed(int(m))
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (s *MuxStream) readFull(p []byte) (int, error) {
	n, err := io.ReadFull(s.in, p)
	s.consumed(n)
	return n, err
}

// WriteTo writes what is read, each datagram by itself, until the peer's half
// has ended.
func (s *MuxStream) WriteTo(w io.Writer) (int64, error) {
	if !s.datagrams {
		return s.in.WriteTo(consumer{s, w})
	}
	buf := muxDatagrams.Get().(*[maxDatagram]byte)
	defer muxDatagrams.Put(buf)
	var total int64
	for {
		n, err := s.readDatagram(buf[:])
		if err == io.EOF {
			return total, nil
		}
		if err == nil {
			n, err = w.Write(buf[:n])
			total += int64(n)
		}
		if err != nil {
			return total, err
		}
	}
}

// consumer notes what was written of a stream's data.
type consumer struct {
	stream *MuxStream
	w      io.Writer
}

func (c consumer) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.stream.consumed(n)
	return n, err
}

// consumed notes that n bytes were read, and tells the peer if they are many.
// If the peer had to wait for that, or would have if it were much faster, the
// window grows: it should be some times of what is read in the time of a round
// trip, as both vary.
func (s *MuxStream) consumed(n int) {
	if n == 0 {
		return
	}
	s.mu.Lock()
	s.taken += n
	if s.ended || s.taken < min(s.window/2, muxReport) {
		s.giveBack()
		s.mu.Unlock()
		return
	}
	now := s.conn.now()
	delta, elapsed := s.taken, max(now-s.since, 1)
	rtt := s.conn.rtt.Load()
	// In floats, as the products are large.
	if s.window < muxMaxWindow && 8*float64(delta)*float64(rtt) > float64(s.window)*float64(elapsed) {
		more := s.conn.grow(min(s.window, muxMaxWindow-s.window))
		s.window += more
		s.grown += more
		delta += more
	}
	s.taken, s.since = 0, now
	s.left += delta
	flags := s.flags()
	s.mu.Unlock()
	s.conn.say(muxUpdate, flags, s.id, uint32(delta))
	s.conn.measure(now)
}

// grow takes n bytes of what windows may grow by, or 0. No stream takes more
// than half of what there is, so that something is left for the next one.
func (c *muxConn) grow(n int) int {
	for {
		room := c.growth.Load()
		if int64(n) > room/2 {
			return 0
		}
		if c.growth.CompareAndSwap(room, room-int64(n)) {
			return n
		}
	}
}

// giveBack lets other windows grow by what this one has, once that holds no
// memory any more: nothing is to come, and what came and waits to be read isn't
// more than any stream may have. mu is held.
func (s *MuxStream) giveBack() {
	if s.forgotten && (s.discarded || s.window-s.left-s.taken <= muxWindow) {
		s.conn.growth.Add(int64(s.grown))
		s.grown = 0
	}
}

// discard says that nothing more is read.
func (s *MuxStream) discard() {
	s.in.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.discarded = true
	s.giveBack()
}

// flags are those of the stream's next frame. mu is held.
func (s *MuxStream) flags() (flags uint16) {
	if s.ack {
		flags = muxACK
	}
	s.ack = false
	return flags
}

// admit says whether the peer may send n bytes.
func (s *MuxStream) admit(n uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil { // just now; it will be thrown away
		return n <= muxMaxWindow
	}
	if s.ended || int64(n) > int64(s.left) {
		return n == 0
	}
	s.left -= int(n)
	return true
}

// grant notes that the peer takes n bytes more.
func (s *MuxStream) grant(n uint32) bool {
	s.mu.Lock()
	s.credit += int64(n)
	ok := s.credit < 1<<31
	s.mu.Unlock()
	signal(s.writable)
	return ok
}

// take waits until something may be written and takes at most most of it.
// Frames are written under wmu, which is held when take returns no error.
func (s *MuxStream) take(most int) (n int, flags uint16, err error) {
	for {
		s.wmu.Lock()
		s.mu.Lock()
		if s.err != nil {
			err = s.err
			s.mu.Unlock()
			s.wmu.Unlock()
			signal(s.writable) // for the next one
			return 0, 0, err
		}
		if n = int(min(int64(most), s.credit)); n > 0 || most == 0 {
			s.credit -= int64(n)
			if s.credit > 0 {
				signal(s.writable)
			}
			flags = s.flags()
			s.mu.Unlock()
			return n, flags, nil
		}
		s.mu.Unlock()
		s.wmu.Unlock()
		<-s.writable
	}
}

// Write writes all of p, of "udp" as one datagram. It blocks while the peer
// has no room for it.
func (s *MuxStream) Write(p []byte) (int, error) {
	if !s.datagrams {
		return s.write(nil, p)
	}
	if len(p) > maxDatagram {
		return 0, fmt.Errorf("a datagram of %d bytes: %d is the most", len(p), maxDatagram)
	}
	n, err := s.write(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p)
	return max(n-2, 0), err
}

// writing says whether a Write is under way.
func (s *MuxStream) writing() bool {
	if !s.turn.TryLock() {
		return true
	}
	s.turn.Unlock()
	return false
}

func (s *MuxStream) write(prefix, p []byte) (int, error) {
	s.turn.Lock()
	defer s.turn.Unlock()
	var written int
	for total := len(prefix) + len(p); written < total; {
		n, flags, err := s.take(min(total-written, s.conn.most()))
		if err != nil {
			return written, err
		}
		buf, free := muxScratch(n)
		m := copy(buf[muxRoom:muxRoom+n], prefix)
		prefix = prefix[m:]
		m = copy(buf[muxRoom+m:muxRoom+n], p)
		p = p[m:]
		err = s.conn.data(buf, flags, s.id, n)
		s.wmu.Unlock()
		free()
		if err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// most is how much data fits a frame.
func (c *muxConn) most() int {
	if c.client {
		return muxMessage - muxRoom
	}
	return muxMessage - muxRoom + 4
}

// muxScratch returns a buffer for n bytes of payload.
func muxScratch(n int) (buf []byte, free func()) {
	if n <= muxSmall {
		small := muxSmalls.Get().(*[muxRoom + muxSmall]byte)
		return small[:], func() { muxSmalls.Put(small) }
	}
	large := muxBuffers.Get().(*muxBuffer)
	return large[:], func() { muxBuffers.Put(large) }
}

// ReadFrom writes what it reads until r ends; each Read of datagrams is one.
// It reads into the messages themselves, small ones until one is full: a
// connection that waits for data holds little.
func (s *MuxStream) ReadFrom(r io.Reader) (int64, error) {
	if s.datagrams {
		buf := muxDatagrams.Get().(*[maxDatagram]byte)
		defer muxDatagrams.Put(buf)
		var total int64
		for {
			n, err := r.Read(buf[:])
			if err == nil || n > 0 {
				n, err := s.Write(buf[:n])
				total += int64(n)
				if err != nil {
					return total, err
				}
			}
			if err != nil {
				return total, ended(err)
			}
		}
	}
	s.turn.Lock()
	defer s.turn.Unlock()
	var total int64
	size := muxSmall
	for {
		credit, err := s.writableNow()
		if err != nil {
			return total, err
		}
		buf, free := muxScratch(size)
		n, err := r.Read(buf[muxRoom : muxRoom+min(size, credit)])
		if n > 0 {
			// The credit is still there: turn is held.
			_, flags, err := s.take(n)
			if err == nil {
				err = s.conn.data(buf, flags, s.id, n)
				s.wmu.Unlock()
			}
			if err != nil {
				free()
				return total, err
			}
			total += int64(n)
		}
		free()
		if err != nil {
			return total, ended(err)
		}
		if n == size {
			size = s.conn.most()
		} else if n < muxSmall {
			size = muxSmall
		}
	}
}

// ended makes nil of io.EOF.
func ended(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// writableNow waits until something may be written, and returns how much.
func (s *MuxStream) writableNow() (int, error) {
	for {
		s.mu.Lock()
		credit, err := s.credit, s.err
		s.mu.Unlock()
		if err != nil {
			signal(s.writable)
			return 0, err
		}
		if credit > 0 {
			return int(credit), nil
		}
		<-s.writable
	}
}

// CloseWrite ends our half; the peer reads an end of file. Reading goes on. It
// does nothing if that has ended.
func (s *MuxStream) CloseWrite() error {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil
	}
	s.sent, s.err = true, io.ErrClosedPipe
	both, flags := s.ended, s.flags()
	s.mu.Unlock()
	signal(s.writable)
	s.wmu.Lock()
	var buf [muxRoom]byte
	appendMuxHeader(buf[muxWebSocketHeader:muxWebSocketHeader], muxUpdate, flags|muxFIN, s.id, 0)
	err := s.conn.put(websocket.BinaryMessage, buf[:], muxHeader)
	s.wmu.Unlock()
	if both {
		s.conn.forget(s)
	}
	return err
}

// Close ends our half, and reading. What the peer still sends resets the
// stream, as with TCP.
func (s *MuxStream) Close() error {
	err := s.CloseWrite()
	s.mu.Lock()
	s.dropped = true
	unread := !s.ended && s.left+s.taken < s.window
	s.mu.Unlock()
	s.discard()
	if unread {
		return s.Reset()
	}
	return err
}

func (s *MuxStream) abandoned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// Reset ends the stream at once; the peer's reads and writes fail with
// ErrStreamReset.
func (s *MuxStream) Reset() error {
	s.mu.Lock()
	over := s.broken != nil || s.sent && s.ended
	s.mu.Unlock()
	s.end(ErrStreamReset)
	s.discard()
	s.conn.forget(s)
	if !over {
		s.conn.say(muxUpdate, muxRST, s.id, 0)
	}
	return nil
}

// watch calls f when both halves end at once, now if they have.
func (s *MuxStream) watch(f func(error)) {
	s.mu.Lock()
	err := s.broken
	s.onEnd = f
	s.mu.Unlock()
	if err != nil && f != nil {
		f(err)
	}
}

// end ends both halves on this side. Only the first call counts.
func (s *MuxStream) end(err error) {
	s.mu.Lock()
	if s.broken != nil {
		s.mu.Unlock()
		return
	}
	s.broken, s.ended = err, true
	if s.err == nil {
		s.err = err
	}
	f := s.onEnd
	s.mu.Unlock()
	s.in.end(err)
	signal(s.writable)
	if f != nil {
		f(err)
	}
}

// remoteClosed notes the peer's FIN.
func (s *MuxStream) remoteClosed() {
	s.mu.Lock()
	s.ended = true
	both := s.sent
	s.mu.Unlock()
	s.in.end(io.EOF)
	if both {
		s.conn.forget(s)
	}
}
