package process

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func text(chunks []chunk) string {
	var b strings.Builder
	for _, c := range chunks {
		b.Write(c.data)
	}
	return b.String()
}

func TestReplayedLines(t *testing.T) {
	full := strings.Repeat(strings.Repeat("x", 99)+"\n", 2000)
	tests := map[string]struct {
		written []string
		lines   int64
		want    string
	}{
		"nothing was written":                {lines: 10},
		"no lines are wanted":                {written: []string{"a\n"}},
		"the last line":                      {written: []string{"a\nb\n", "c\n"}, lines: 1, want: "c\n"},
		"a prompt is a line":                 {written: []string{"a\nb\n$ "}, lines: 2, want: "b\n$ "},
		"an empty line is a line":            {written: []string{"a\n\n"}, lines: 2, want: "a\n\n"},
		"a line written in pieces":           {written: []string{"a\nb", "c", "d\n"}, lines: 1, want: "bcd\n"},
		"as many as there are":               {written: []string{"a\n", "b\n"}, lines: 2, want: "a\nb\n"},
		"more than there are":                {written: []string{"a\n", "b"}, lines: 1 << 62, want: "a\nb"},
		"all, of more than is kept":          {written: []string{"0123456789", full}, lines: 1 << 62, want: full[len(full)-replayBuffer/100*100:]},
		"one line, longer than what is kept": {written: []string{strings.Repeat("y", 2*replayBuffer)}, lines: 5, want: strings.Repeat("y", replayBuffer)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var r recent
			for _, data := range test.written {
				r.add(v1.LogStreamStdout, []byte(data))
			}
			if diff := cmp.Diff(test.want, text(r.lines(test.lines))); diff != "" {
				t.Errorf("lines (-want +got):\n%s", diff)
			}
		})
	}
}

// TestRecentKeepsTheEnd compares with a buffer that has no end.
func TestRecentKeepsTheEnd(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	streams := []v1.LogStream{v1.LogStreamStdout, v1.LogStreamStderr}
	for _, most := range []int{3, 300, 10_000, 3 * replayBuffer} {
		t.Run(fmt.Sprint("writes of up to ", most), func(t *testing.T) {
			var r recent
			var all bytes.Buffer
			stream := 0
			for writes := 0; all.Len() < 5*replayBuffer; writes++ {
				data := make([]byte, 1+random.IntN(most))
				for i := range data {
					data[i] = "abcdefghi\n"[random.IntN(10)]
				}
				if random.IntN(3) == 0 {
					stream = 1 - stream
				}
				r.add(streams[stream], data)
				all.Write(data)
				if most < 1000 && writes%499 != 0 {
					continue // to look costs more than to write
				}

				kept, size := text(r.blocks), 0
				for _, block := range r.blocks {
					size += cap(block.data)
				}
				if len(kept) != r.size || size > 3*replayBuffer || len(r.blocks) > maxReplayBlocks {
					t.Fatalf("%d bytes are kept, counted as %d, in %d blocks of %d bytes", len(kept), r.size, len(r.blocks), size)
				}
				if len(kept) < min(all.Len(), replayBuffer) && len(r.blocks) < maxReplayBlocks {
					t.Fatalf("%d bytes are kept of %d", len(kept), all.Len())
				}
				if !bytes.HasSuffix(all.Bytes(), []byte(kept)) {
					t.Fatalf("what is kept isn't the end of what was written")
				}
				before := all.Bytes()[:all.Len()-len(kept)]
				if cut := len(before) > 0 && before[len(before)-1] != '\n'; cut != r.cut {
					t.Fatalf("cut is %t, want %t", r.cut, cut)
				}
			}
		})
	}
}

// TestReplayLosesNothing has clients join while two streams are written: what
// each gets of a stream is all from some line on.
func TestReplayLosesNothing(t *testing.T) {
	a := newAudience()
	const lines = 3000
	streams := []v1.LogStream{v1.LogStreamStdout, v1.LogStreamStderr}
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	var writers, readers, joined sync.WaitGroup
	read := func(m *member, check func(stream v1.LogStream, got string)) {
		defer a.leave(m)
		got := map[v1.LogStream]*strings.Builder{v1.LogStreamStdout: {}, v1.LogStreamStderr: {}}
		for {
			c, err := m.next(t.Context())
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Error(err)
				return
			}
			got[c.stream].Write(c.data)
		}
		for stream, text := range got {
			check(stream, text.String())
		}
	}
	first := a.join(1 << 62)
	readers.Go(func() {
		read(first, func(stream v1.LogStream, got string) {
			if got != want.String() {
				t.Errorf("%s: who was there first got %d bytes of %d", stream, len(got), want.Len())
			}
		})
	})
	for _, stream := range streams {
		writers.Go(func() {
			for i := range lines {
				a.write(stream, fmt.Appendf(nil, "line %d\n", i))
			}
		})
	}
	for range 20 {
		joined.Add(1)
		readers.Go(func() {
			m := a.join(1 << 62)
			joined.Done()
			read(m, func(stream v1.LogStream, got string) {
				if !strings.HasPrefix(got, "line ") || !strings.HasSuffix(want.String(), got) {
					t.Errorf("%s: %d bytes that aren't all from some line on: %.100q…", stream, len(got), got)
				}
			})
		})
	}
	joined.Wait()
	writers.Wait()
	a.close()
	readers.Wait()
}

// TestReplayOutlivesTheInstanceForWhoIsAboutToJoin: between Attach and Run lies
// an upgrade, in which a short command ends.
func TestReplayOutlivesTheInstanceForWhoIsAboutToJoin(t *testing.T) {
	d := newDriver(t, Options{})
	source := script("echo out; echo err >&2; read line; exit 5")
	source.Stdin = true
	target := newTarget(source)
	target.Spec.RestartPolicy = v1.RestartNever
	id := start(t, d, target)
	c := open(t, d, target)
	defer c.Close()
	late, err := c.Attach(t.Context(), driver.AttachOptions{Replay: 10})
	if err != nil {
		t.Fatal(err)
	}
	ending, err := c.Attach(t.Context(), driver.AttachOptions{Stdin: true, CloseStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	_ = ending(t.Context(), driver.Stdio{Stdin: io.NopCloser(strings.NewReader(""))})
	awaitEnd(t, d, id)

	r := d.instances[id].run
	var out, errOut bytes.Buffer
	err = late(context.Background(), driver.Stdio{Stdout: &out, Stderr: &errOut})
	if exit, ok := err.(*driver.ExitError); !ok || exit.Code != 5 || out.String() != "out\n" || errOut.String() != "err\n" {
		t.Errorf("error %v, stdout %q, stderr %q", err, out.String(), errOut.String())
	}
	if len(r.audience.last.blocks) == 0 {
		t.Error("the output is forgotten before the client is done")
	}
	c.Close()
	if len(r.audience.last.blocks) != 0 {
		t.Error("the output is kept for nobody")
	}
	if _, err := c.Attach(t.Context(), driver.AttachOptions{Replay: 10}); driver.KindOf(err) != driver.NotRunning {
		t.Errorf("error %v, want NotRunning", err)
	}
}

// TestReplayOfAnInstanceThatEndedMeanwhile: what has ended after it was looked up
// may have been started again, which is another's output.
func TestReplayOfAnInstanceThatEndedMeanwhile(t *testing.T) {
	d := newDriver(t, Options{})
	target := newTarget(script("sleep 1000"))
	id := start(t, d, target)
	d.instances[id].run.audience.close()
	c := open(t, d, target)
	defer c.Close()
	run, err := c.Attach(t.Context(), driver.AttachOptions{Replay: 10})
	if run != nil || driver.KindOf(err) != driver.NotRunning {
		t.Errorf("a run: %v, error %v, want NotRunning", run != nil, err)
	}
}
