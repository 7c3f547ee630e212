package targetclass

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// TestReadsAreSharedAndFresh writes a number again and again while many read it:
// none may read one that is older than what was there when it asked.
func TestReadsAreSharedAndFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stored, reads atomic.Int64
		f := newFreshReads(func(context.Context, string) (*v1.TargetClass, error) {
			reads.Add(1)
			generation := stored.Load() // the storage answers by what it has now
			time.Sleep(time.Millisecond)
			return &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{Generation: generation}}, nil
		})
		const readers, rounds = 50, 40
		var wg sync.WaitGroup
		for i := range readers {
			wg.Go(func() {
				for range rounds {
					time.Sleep(time.Duration(i) * 37 * time.Microsecond)
					least := stored.Load()
					class, err := f.get(t.Context(), "standard")
					if err != nil {
						t.Error(err)
						return
					}
					if class.Generation < least {
						t.Errorf("generation %d was read after %d had been written", class.Generation, least)
					}
				}
			})
		}
		wg.Go(func() {
			for range 1000 {
				time.Sleep(50 * time.Microsecond)
				stored.Add(1)
			}
		})
		wg.Wait()
		if got := reads.Load(); got > readers*rounds/4 {
			t.Errorf("%d reads for %d callers: they aren't shared", got, readers*rounds)
		}
		synctest.Wait()
		if len(f.next) != 0 || len(f.busy) != 0 {
			t.Errorf("%d reads are remembered, and %d names", len(f.next), len(f.busy))
		}
	})
}

func TestReadsFailForThoseWhoShareThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("the storage is away")
		f := newFreshReads(func(ctx context.Context, name string) (*v1.TargetClass, error) {
			if name == "stuck" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("%s: %w", name, gone)
		})
		if _, err := f.get(t.Context(), "a"); !errors.Is(err, gone) {
			t.Errorf("got %v, want what the storage said", err)
		}
		// Who leaves takes nobody along, and waits no longer than it likes.
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := f.get(impatient, "stuck"); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		if _, err := f.get(t.Context(), "stuck"); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 2*readTimeout {
			t.Errorf("after %s: %v, want the reads' own end", time.Since(began), err)
		}
	})
}
