package process

import (
	"bytes"
	"context"
	"io"
	"slices"
	"sync"
	"time"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

const (
	// memberBuffer is how many bytes an attached client may be behind.
	memberBuffer = 1 << 20
	// memberPatience is how long the instance's output waits altogether for a
	// client that is that far behind, until the client has caught up. Then the
	// client has to go.
	memberPatience = 2 * time.Second
	// chunkSize is how much is delivered at once, about.
	chunkSize = 64 << 10
	// replayBuffer is how much of an instance's last output is kept for those
	// who attach later, at least. It is kept in blocks, and takes no memory
	// before there is output.
	replayBuffer = 64 << 10
	replayBlock  = 8 << 10
	// maxReplayBlocks bounds what is kept of output that changes between stdout
	// and stderr with each few bytes: a block has one stream.
	maxReplayBlocks = 512
)

// audience is the clients that are attached to an instance.
type audience struct {
	mu      sync.Mutex // protects what follows
	members map[*member]struct{}
	last    recent
	holders int // who may still want last after the end
	closed  bool
}

// recent is the last that an instance has written.
type recent struct {
	blocks []chunk
	size   int // of blocks, in bytes
	// cut says that the first block doesn't begin where a line does.
	cut bool
}

// add appends data, and forgets what is more than there is to be kept.
func (r *recent) add(stream v1.LogStream, data []byte) {
	over := max(len(data)-replayBuffer, 0)
	afresh := over > 0 // not all of it follows what is there
	cut := afresh && data[over-1] != '\n'
	data = data[over:]
	for len(data) > 0 {
		last := len(r.blocks) - 1
		if afresh || last < 0 || r.blocks[last].stream != stream || len(r.blocks[last].data) == replayBlock {
			var spare []byte
			if last >= 0 && (r.size-len(r.blocks[0].data) >= replayBuffer || len(r.blocks) == maxReplayBlocks) {
				dropped := r.drop()
				// With many small blocks, memory of a large one would be wasted.
				if len(r.blocks) <= replayBuffer/replayBlock+1 {
					spare = dropped[:0]
				}
			}
			r.blocks = append(r.blocks, chunk{stream, spare})
			last, afresh = len(r.blocks)-1, false
		}
		block := &r.blocks[last]
		n := min(len(data), replayBlock-len(block.data))
		block.data = append(block.data, data[:n]...)
		r.size += n
		data = data[n:]
	}
	if over > 0 {
		for r.size > replayBuffer {
			r.drop()
		}
		r.cut = cut
	}
}

// drop forgets the first block, and returns its memory.
func (r *recent) drop() []byte {
	data := r.blocks[0].data
	r.size -= len(data)
	r.cut = data[len(data)-1] != '\n'
	r.blocks = slices.Delete(r.blocks, 0, 1)
	return data
}

// lines returns copies of the last lines, so many; what comes after the last
// newline is one. The first one is whole, unless no beginning is kept.
func (r *recent) lines(n int64) []chunk {
	if n <= 0 || len(r.blocks) == 0 {
		return nil
	}
	block, at := 0, 0 // where to begin
	last := len(r.blocks) - 1
	for i := last; i >= 0 && n > 0; i-- {
		data := r.blocks[i].data
		if i == last {
			data = bytes.TrimSuffix(data, []byte{'\n'})
		}
		for newline := 0; n > 0; n-- {
			if newline = bytes.LastIndexByte(data, '\n'); newline < 0 {
				break
			}
			block, at = i, newline+1
			data = data[:newline]
		}
	}
	if n > 0 && !r.cut {
		block, at = 0, 0
	}
	var chunks []chunk
	for ; block <= last; block, at = block+1, 0 {
		if data := r.blocks[block].data[at:]; len(data) > 0 {
			chunks = append(chunks, chunk{r.blocks[block].stream, bytes.Clone(data)})
		}
	}
	return chunks
}

// member is one client's share of the output.
type member struct {
	mu     sync.Mutex // protects what follows
	chunks []chunk
	size   int           // of chunks, in bytes
	waited time.Duration // how long output waited since the client had all of it
	err    error         // what next returns after the chunks

	ready chan struct{} // has a place for one: look for chunks or err
	room  chan struct{} // has a place for one: look for room
}

type chunk struct {
	stream v1.LogStream
	data   []byte
}

func newAudience() *audience {
	return &audience{members: make(map[*member]struct{})}
}

// join lets a client have the last lines, so many, and what is written from now
// on.
func (a *audience) join(replay int64) *member {
	m := &member{ready: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	a.mu.Lock()
	defer a.mu.Unlock()
	m.chunks = a.last.lines(replay)
	for _, c := range m.chunks {
		m.size += len(c.data)
	}
	if a.closed {
		m.end(io.EOF)
		return m
	}
	a.members[m] = struct{}{}
	return m
}

func (a *audience) leave(m *member) {
	a.mu.Lock()
	delete(a.members, m)
	a.mu.Unlock()
	m.end(io.EOF) // nobody waits for room any more
}

// close ends the clients' streams.
func (a *audience) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for m := range a.members {
		m.end(io.EOF)
	}
	a.members = nil
	a.forget()
}

// hold keeps the last output past the instance's end, for a client that is about
// to join, until release. It returns false if the end was before.
func (a *audience) hold() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closed {
		a.holders++
	}
	return !a.closed
}

func (a *audience) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.holders--
	a.forget()
}

// forget lets go of what nobody can want any more. a.mu is held.
func (a *audience) forget() {
	if a.closed && a.holders == 0 {
		a.last = recent{}
	}
}

// write hands data to each client. A client that is far behind holds it up for
// a bounded time.
func (a *audience) write(stream v1.LogStream, data []byte) {
	if len(data) == 0 {
		return
	}
	// Who joins after this has data as part of the replay, and isn't among the
	// members that get it now: no byte is lost or comes twice.
	a.mu.Lock()
	a.last.add(stream, data)
	members := make([]*member, 0, len(a.members))
	for m := range a.members {
		members = append(members, m)
	}
	a.mu.Unlock()
	for _, m := range members {
		m.put(stream, data)
	}
}

func (m *member) put(stream v1.LogStream, data []byte) {
	for {
		m.mu.Lock()
		if m.err != nil {
			m.mu.Unlock()
			return
		}
		if m.size+len(data) <= memberBuffer {
			break
		}
		patience := memberPatience - m.waited
		m.mu.Unlock()
		since := time.Now()
		timer := time.NewTimer(patience)
		select {
		case <-m.room:
			timer.Stop()
			m.mu.Lock()
			m.waited += time.Since(since)
			m.mu.Unlock()
		case <-timer.C:
			m.end(driver.Errorf(driver.Unavailable, "the client fell 1 MiB behind the instance's output and was detached: attach again, or read the log"))
			return
		}
	}
	defer m.mu.Unlock()
	m.size += len(data)
	if last := len(m.chunks) - 1; last >= 0 && m.chunks[last].stream == stream && len(m.chunks[last].data)+len(data) <= chunkSize {
		m.chunks[last].data = append(m.chunks[last].data, data...)
	} else {
		m.chunks = append(m.chunks, chunk{stream, append([]byte(nil), data...)})
	}
	notify(m.ready)
}

// end has next return err after what there is.
func (m *member) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
	}
	notify(m.ready)
	notify(m.room)
}

// next returns the next piece of output.
func (m *member) next(ctx context.Context) (chunk, error) {
	for {
		if ctx.Err() != nil {
			return chunk{}, context.Cause(ctx)
		}
		m.mu.Lock()
		if len(m.chunks) > 0 {
			c := m.chunks[0]
			m.chunks = m.chunks[1:]
			m.size -= len(c.data)
			notify(m.room)
			m.mu.Unlock()
			return c, nil
		}
		m.waited = 0
		err := m.err
		m.mu.Unlock()
		if err != nil {
			return chunk{}, err
		}
		select {
		case <-m.ready:
		case <-ctx.Done():
		}
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
