package streaming

import (
	"io"
	"sync"
	"time"
)

const (
	// chunkSize is the unit of buffering. It is what io.Copy and client-go use.
	chunkSize = 32 << 10
	// frameSize is the most data that goes into one message or frame: all that a
	// pipe holds. In base64 it is chunkSize.
	frameSize = 64 << 10
)

type chunk struct {
	data       [chunkSize]byte
	start, end int // data[start:end] waits to be read
	next       *chunk
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

// buffer is scratch space: a chunk's worth of data with room for headers, also
// in base64.
type buffer [chunkSize*4/3 + 64]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// limits bound an inbox.
type limits struct {
	// soft is how many bytes are taken without the reader reading any.
	soft int
	// hard is how many are taken in all, drip bytes in every interval.
	hard, drip int
	interval   time.Duration
}

// inbox is the data of one stream on its way from the connection, where one
// goroutine receives it, to one reader. It is bounded: receive blocks while
// the reader is slow, and discards what comes after Close.
type inbox struct {
	limits limits

	readable, writable chan struct{} // capacity 1: look again
	done               chan struct{} // closed by Close

	mu         sync.Mutex // protects all below, and the chunks' start and end
	head, tail *chunk
	size       int   // bytes that wait to be read
	dripped    int   // how far above the soft limit size may be
	filling    bool  // the receiver writes to tail beyond its end
	err        error // what the reader gets after the data; nil if more may come
	closed     bool
}

var (
	_ io.ReadCloser = (*inbox)(nil)
	_ io.WriterTo   = (*inbox)(nil)
)

func newInbox(l limits) *inbox {
	return &inbox{
		limits:   l,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		done:     make(chan struct{}),
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// receive takes n bytes from r, or all up to its end if n is negative. An
// error is r's: the connection's, that is.
func (b *inbox) receive(r io.Reader, n int64) error {
	for n != 0 {
		space := b.reserve()
		if space == nil { // nobody will read it
			if n < 0 {
				_, err := io.Copy(io.Discard, r)
				return err
			}
			_, err := io.CopyN(io.Discard, r, n)
			return err
		}
		if n > 0 && int64(len(space)) > n {
			space = space[:n]
		}
		m, err := r.Read(space)
		if n > 0 {
			n -= int64(m)
		}
		// The rest of a frame is on its way: waking the reader for each part of
		// it costs more than reading it. A message may never end.
		b.commit(m, n <= 0 || m == len(space) || err != nil)
		if err == io.EOF && n <= 0 {
			return nil
		}
		if err == io.EOF {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// reserve waits for room and returns it, nil if nobody will read any more. It
// is the receiver's until it calls commit.
func (b *inbox) reserve() []byte {
	var drip <-chan time.Time
	for {
		b.mu.Lock()
		if b.closed || b.err != nil {
			b.mu.Unlock()
			return nil
		}
		if b.size < b.limits.soft {
			b.dripped = 0
		}
		if b.size < max(b.limits.soft, b.dripped) {
			if b.tail == nil || b.tail.end == chunkSize {
				c := chunks.Get().(*chunk)
				c.start, c.end, c.next = 0, 0, nil
				if b.tail == nil {
					b.head = c
				} else {
					b.tail.next = c
				}
				b.tail = c
			}
			b.filling = true
			space := b.tail.data[b.tail.end:]
			b.mu.Unlock()
			return space
		}
		b.mu.Unlock()
		signal(b.readable) // it may not have been told of all that there is

		if drip == nil && b.limits.drip > 0 {
			timer := time.NewTicker(b.limits.interval)
			defer timer.Stop()
			drip = timer.C
		}
		select {
		case <-b.writable:
		case <-b.done:
		case <-drip:
			b.mu.Lock()
			b.dripped = min(b.size+b.limits.drip, b.limits.hard)
			b.mu.Unlock()
		}
	}
}

// commit adds what was written to the room that reserve gave. wake says
// whether the reader is to look at once.
func (b *inbox) commit(n int, wake bool) {
	b.mu.Lock()
	b.tail.end += n
	b.size += n
	b.filling = false
	b.release()
	b.mu.Unlock()
	if wake {
		signal(b.readable)
	}
}

// release gives chunks back that have been read. mu is held.
func (b *inbox) release() {
	for c := b.head; c != nil && c.start == c.end; c = b.head {
		if c == b.tail && b.filling {
			return
		}
		b.head = c.next
		if b.head == nil {
			b.tail = nil
		}
		chunks.Put(c)
	}
}

// end ends the inbox: the reader gets err after what is in it. Only the first
// call counts.
func (b *inbox) end(err error) {
	b.mu.Lock()
	if b.err == nil {
		b.err = err
	}
	b.mu.Unlock()
	signal(b.readable)
	signal(b.writable)
}

// next waits for data and returns the first of it, which is the reader's until
// it calls took.
func (b *inbox) next() ([]byte, error) {
	for {
		b.mu.Lock()
		if b.closed {
			b.mu.Unlock()
			return nil, io.ErrClosedPipe
		}
		if b.size > 0 {
			data := b.head.data[b.head.start:b.head.end]
			b.mu.Unlock()
			return data, nil
		}
		err := b.err
		b.mu.Unlock()
		if err != nil {
			return nil, err
		}
		select {
		case <-b.readable:
		case <-b.done:
		}
	}
}

func (b *inbox) took(n int) {
	b.mu.Lock()
	b.head.start += n
	b.size -= n
	b.release()
	b.mu.Unlock()
	signal(b.writable)
}

func (b *inbox) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	data, err := b.next()
	if err != nil {
		return 0, err
	}
	n := copy(p, data)
	b.took(n)
	return n, nil
}

// WriteTo spares io.Copy its buffer.
func (b *inbox) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		data, err := b.next()
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(data)
		b.took(n)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// Close says that nothing more is wanted. It unblocks a Read and the receiver,
// and may be called from anywhere.
func (b *inbox) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.closed = true
		close(b.done)
	}
	return nil
}
