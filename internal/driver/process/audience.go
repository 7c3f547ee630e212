package process

import (
	"context"
	"io"
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
)

// audience is the clients that are attached to an instance.
type audience struct {
	mu      sync.Mutex // protects what follows
	members map[*member]struct{}
	closed  bool
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

// join lets a client have what is written from now on.
func (a *audience) join() *member {
	m := &member{ready: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	a.mu.Lock()
	defer a.mu.Unlock()
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
}

// write hands data to each client. A client that is far behind holds it up for
// a bounded time.
func (a *audience) write(stream v1.LogStream, data []byte) {
	if len(data) == 0 {
		return
	}
	a.mu.Lock()
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
