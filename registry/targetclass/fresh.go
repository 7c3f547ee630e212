package targetclass

import (
	"context"
	"sync"
	"time"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// readTimeout bounds a read that many may wait for.
const readTimeout = 10 * time.Second

// freshReads reads classes for many callers at once. Each gets what a read found
// that began after it asked: who has seen a write acknowledged sees it, and a
// thousand creations in a second cost the storage no thousand reads.
type freshReads struct {
	read func(ctx context.Context, name string) (*v1.TargetClass, error)

	mu sync.Mutex
	// next are the reads that haven't begun, by name. guarded by mu
	next map[string]*freshRead
	// busy has the names that are being read. guarded by mu
	busy map[string]bool
}

// freshRead is the read of one class, which all who asked before it began share.
type freshRead struct {
	done  chan struct{}
	class *v1.TargetClass // set before done is closed, as is err
	err   error
}

func newFreshReads(read func(ctx context.Context, name string) (*v1.TargetClass, error)) *freshReads {
	return &freshReads{read: read, next: map[string]*freshRead{}, busy: map[string]bool{}}
}

// get returns a class, which nobody may change. It waits for one read, and for
// one that is under way before that.
func (f *freshReads) get(ctx context.Context, name string) (*v1.TargetClass, error) {
	f.mu.Lock()
	r := f.next[name]
	if r == nil {
		r = &freshRead{done: make(chan struct{})}
		f.next[name] = r
	}
	if !f.busy[name] {
		f.busy[name] = true
		// It outlives its caller, whom others don't depend on, but not for long.
		go f.run(name)
	}
	f.mu.Unlock()
	select {
	case <-r.done:
		return r.class, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// run reads a class until nobody waits for it any more.
func (f *freshReads) run(name string) {
	for {
		f.mu.Lock()
		r := f.next[name]
		delete(f.next, name)
		if r == nil {
			delete(f.busy, name)
		}
		f.mu.Unlock()
		if r == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
		r.class, r.err = f.read(ctx, name)
		cancel()
		close(r.done)
	}
}
