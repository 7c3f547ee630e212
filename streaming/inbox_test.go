package streaming

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"
)

func TestInboxPassesBytesOn(t *testing.T) {
	data := random(t, 5<<20+1)
	for name, read := range map[string]func(*inbox) ([]byte, error){
		"by Read": func(b *inbox) ([]byte, error) { return io.ReadAll(struct{ io.Reader }{b}) },
		"by WriteTo": func(b *inbox) ([]byte, error) {
			var out bytes.Buffer
			_, err := b.WriteTo(&out)
			return out.Bytes(), err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newInbox(limits{soft: 100_000, hard: 100_000})
			done := make(chan error, 1)
			go func() {
				r := bytes.NewReader(data)
				for n := int64(1); r.Len() > 0; n = n*3 + 1 {
					if err := b.receive(r, min(n, int64(r.Len()))); err != nil {
						done <- err
						return
					}
				}
				b.end(io.EOF)
				done <- nil
			}()
			got, err := read(b)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %d bytes of %d, %v", len(got), len(data), err)
			}
			if err := wait(t, done, "the receiver"); err != nil {
				t.Error(err)
			}
			if b.head != nil || b.tail != nil || b.size != 0 {
				t.Error("an inbox that was read holds memory")
			}
		})
	}
}

func TestInboxIsBounded(t *testing.T) {
	cases := map[string]struct {
		limits limits
		want   int
	}{
		"without a drip at the soft limit": {limits{soft: 4 * chunkSize, hard: 4 * chunkSize}, 4 * chunkSize},
		"with one at the hard limit":       {limits{soft: 4 * chunkSize, hard: 12 * chunkSize, drip: chunkSize + 1, interval: time.Millisecond}, 12 * chunkSize},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			b := newInbox(tc.limits)
			done := make(chan error, 1)
			go func() { done <- b.receive(io.LimitReader(endless{}, 100*chunkSize), 100*chunkSize) }()
			size := func() int {
				b.mu.Lock()
				defer b.mu.Unlock()
				return b.size
			}
			for deadline := time.Now().Add(testTimeout); size() < tc.want; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("it has taken %d bytes, want %d", size(), tc.want)
				}
			}
			for range 20 { // it stays there
				if got := size(); got > tc.want {
					t.Fatalf("it has taken %d bytes, want %d", got, tc.want)
				}
				time.Sleep(time.Millisecond)
			}
			b.Close() // the rest is discarded
			if err := wait(t, done, "the receiver"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestInboxEnds(t *testing.T) {
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		end  func(*inbox)
		want error
	}{
		"with EOF":                  {func(b *inbox) { b.end(io.EOF) }, io.EOF},
		"with the first error":      {func(b *inbox) { b.end(broken); b.end(io.EOF) }, broken},
		"when its reader closes it": {func(b *inbox) { b.Close(); b.Close() }, io.ErrClosedPipe},
	} {
		t.Run(name, func(t *testing.T) {
			b := newInbox(streamLimits)
			done := make(chan error, 1)
			go func() {
				_, err := b.Read(make([]byte, 1))
				done <- err
			}()
			tc.end(b)
			if err := wait(t, done, "Read"); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}
