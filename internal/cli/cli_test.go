package cli

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestASignalThatComesTwiceIsOneWish: timeout(1) signals its command, and then
// the group that the command is in.
func TestASignalThatComesTwiceIsOneWish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		signals := make(chan os.Signal, 1)
		stopped := make(chan time.Time, 1)
		begun := time.Now()
		go endOn(signals, cancel, func() { stopped <- time.Now() })
		synctest.Wait()
		if ctx.Err() != nil {
			t.Fatalf("it ended before a signal came: %v", context.Cause(ctx))
		}
		signals <- syscall.SIGTERM
		synctest.Wait()
		signals <- syscall.SIGINT
		if cause := (terminated{}); !errors.As(context.Cause(ctx), &cause) || cause.signal != syscall.SIGTERM {
			t.Errorf("cause %v, want that of SIGTERM", context.Cause(ctx))
		}
		if after := (<-stopped).Sub(begun); after != oneWish {
			t.Errorf("a signal ends the process at once after %v, want %v", after, oneWish)
		}
	})
}
