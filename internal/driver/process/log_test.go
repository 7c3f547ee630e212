package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// newLog opens a log of its own.
func newLog(t testing.TB, dir string, change func(*logSettings)) *instanceLog {
	t.Helper()
	settings := &logSettings{fileSize: 1 << 20, files: 5, clock: clock.RealClock{}, create: createLogFile}
	if change != nil {
		change(settings)
	}
	l, err := openLog(settings, dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close(nil) })
	return l
}

func write(t testing.TB, l *instanceLog, run int, stream v1.LogStream, text string) {
	t.Helper()
	if n, err := l.write(run, stream, []byte(text), true); err != nil || n != len(text) {
		t.Fatalf("write: %d of %d bytes, %v", n, len(text), err)
	}
}

// record is a log line that can be kept.
type record struct {
	Time    int64
	Stderr  bool
	Text    string
	Partial bool
}

func readAll(t testing.TB, l *instanceLog, opts driver.LogOptions) []record {
	t.Helper()
	r, err := l.read(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []record
	for {
		line, err := r.Next(t.Context())
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, record{line.Time.UnixNano(), line.Stream == v1.LogStreamStderr, string(line.Data), line.Partial})
	}
}

func readBatches(t testing.TB, l *instanceLog, opts driver.LogOptions) []record {
	t.Helper()
	r, err := l.read(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []record
	for {
		batch, err := r.NextBatch(t.Context())
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		before := len(all)
		for line := range batch.Lines {
			all = append(all, record{line.Time.UnixNano(), line.Stream == v1.LogStreamStderr, string(line.Data), line.Partial})
		}
		if len(all) == before {
			t.Error("a batch is empty")
		}
	}
}

func texts(records []record) (all []string) {
	for _, r := range records {
		all = append(all, r.Text)
	}
	return all
}

func TestRecordsAreInTheFormatOfContainerRuntimes(t *testing.T) {
	at := time.Date(2024, 2, 29, 23, 59, 59, 1000, time.UTC)
	dir := t.TempDir()
	l := newLog(t, dir, func(s *logSettings) { s.clock = clocktesting.NewFakeClock(at) })
	run := l.begin()
	write(t, l, run, v1.LogStreamStdout, "one\r\n\xff\n")
	write(t, l, run, v1.LogStreamStderr, "two")
	want := "2024-02-29T23:59:59.000001000Z stdout F one\r\n" +
		"2024-02-29T23:59:59.000001001Z stdout F \xff\n" +
		"2024-02-29T23:59:59.000001002Z stderr P two\n"
	got, err := os.ReadFile(filepath.Join(dir, "1.0.log"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("file (-want +got):\n%s", diff)
	}
}

func TestLinesTellRunsApart(t *testing.T) {
	l := newLog(t, t.TempDir(), nil)
	for _, text := range []string{"no newline", "next\n"} {
		write(t, l, l.begin(), v1.LogStreamStdout, text)
	}
	r, err := l.read(driver.LogOptions{After: time.Unix(0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	first, err := r.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	partial, run := first.Partial, first.Run
	second, err := r.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !partial || second.Partial || second.Run == run {
		t.Errorf("partial %t of run %d, then %t of run %d; want a partial line, and a whole one of another run", partial, run, second.Partial, second.Run)
	}
}

func TestTimesAreReadAsTheyAreWritten(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var s driver.LogStamp
	var p parser
	at := time.Unix(0, 0)
	for i := range 20000 {
		if i%2 == 0 {
			at = time.Unix(at.Unix(), random.Int64N(1e9))
		} else {
			at = time.Unix(random.Int64N(8e9), random.Int64N(1e9))
		}
		text := s.Append(nil, at)
		if want := at.UTC().Format(recordTime); string(text) != want {
			t.Fatalf("written %s, want %s", text, want)
		}
		h, ok := parseHeader(append(text, " stdout F "...))
		if !ok || h.time != at.UnixNano() {
			t.Fatalf("%s is read as %v, %t", text, time.Unix(0, h.time).UTC(), ok)
		}
		for _, tail := range []string{" stdout F ", " stderr P ", " stdout X ", " stdxxx F ", " stdout F", "Z"} {
			record := append(text[:len(text):len(text)], tail...)
			want, wantOK := parseHeader(record)
			if got, ok := p.header(record); ok != wantOK || ok && got != want {
				t.Fatalf("%q is read as %+v, %t by who has read others before, want %+v, %t", record, got, ok, want, wantOK)
			}
		}
	}
}

func TestTimesIncreaseWhateverTheClockDoes(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	fake := clocktesting.NewFakeClock(at)
	dir := t.TempDir()
	change := func(s *logSettings) { s.clock, s.fileSize = fake, 200 }
	l := newLog(t, dir, change)
	for i, step := range []time.Duration{0, time.Second, -time.Hour, 0, time.Minute, -24 * time.Hour, 48 * time.Hour} {
		fake.SetTime(fake.Now().Add(step))
		if i%3 == 2 {
			l.close(nil)
			l = newLog(t, dir, change) // the agent has restarted
		}
		write(t, l, l.begin(), v1.LogStreamStdout, fmt.Sprint("a", i, "\nb", i, "\n"))
	}
	all := readAll(t, l, driver.LogOptions{After: time.Unix(1, 0)})
	if len(all) < 10 {
		t.Fatalf("%d lines", len(all))
	}
	for i := 1; i < len(all); i++ {
		if all[i].Time <= all[i-1].Time {
			t.Errorf("line %d: %v isn't after %v", i, all[i], all[i-1])
		}
	}
	if last := all[len(all)-1]; last.Time < fake.Now().UnixNano() {
		t.Errorf("the last line's time, %d, is behind the clock", last.Time)
	}
}

// TestSelection compares what readers find by searching with what is found by
// looking at each line.
func TestSelection(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	fake := clocktesting.NewFakeClock(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	dir := t.TempDir()
	l := newLog(t, dir, func(s *logSettings) { s.clock, s.fileSize, s.files = fake, 700<<10, 9 })
	for range 3 {
		run := l.begin()
		for size := 0; size < 2<<20; {
			fake.Step(time.Duration(random.IntN(1e6)))
			stream := v1.LogStreamStdout
			if random.IntN(4) == 0 {
				stream = v1.LogStreamStderr
			}
			text := fmt.Sprint(size, strings.Repeat(".", random.IntN(300)), "\n")
			if random.IntN(300) == 0 {
				text = strings.Repeat("long", 10000) + "\n"
			}
			write(t, l, run, stream, text)
			size += len(text)
		}
	}
	every := readAll(t, l, driver.LogOptions{After: time.Unix(1, 0)})
	present := readAll(t, l, driver.LogOptions{})
	previous := readAll(t, l, driver.LogOptions{Previous: true})
	if len(present) < 5000 || len(previous) < 5000 || len(every) <= len(present)+len(previous) {
		t.Fatalf("%d lines, %d present, %d previous", len(every), len(present), len(previous))
	}
	choose := func(from []record, opts driver.LogOptions) []record {
		var some []record
		for _, r := range from {
			if (opts.Since.IsZero() || r.Time >= opts.Since.UnixNano()) &&
				(opts.After.IsZero() || r.Time > opts.After.UnixNano()) &&
				(opts.Stream == "" || (opts.Stream == v1.LogStreamStderr) == r.Stderr) {
				some = append(some, r)
			}
		}
		if opts.Tail == nil {
			return some
		}
		i, lines := len(some), int64(0)
		for ; i > 0; i-- {
			if !some[i-1].Partial {
				lines++
			}
			if lines > *opts.Tail {
				break
			}
		}
		return some[i:]
	}
	check := func(from []record, opts driver.LogOptions) {
		t.Helper()
		want, got := choose(from, opts), readAll(t, l, opts)
		if diff := cmp.Diff(len(want), len(got)); diff != "" {
			t.Fatalf("options %+v, number of lines (-want +got):\n%s", opts, diff)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("options %+v (-want +got):\n%s", opts, diff)
		}
		if got := readBatches(t, l, opts); !slices.Equal(want, got) {
			t.Fatalf("options %+v, by batches (-want +got):\n%s", opts, cmp.Diff(want, got))
		}
		if opts.Previous {
			return
		}
		// A client that resumes where the reader began gets the same.
		r, err := l.read(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got := readAll(t, l, driver.LogOptions{After: r.Before(), Stream: opts.Stream}); !slices.Equal(want, got) {
			t.Fatalf("options %+v, resumed from %v (-want +got):\n%s", opts, r.Before(), cmp.Diff(want, got))
		}
	}
	for range 150 {
		opts := driver.LogOptions{Stream: []v1.LogStream{"", v1.LogStreamStdout, v1.LogStreamStderr}[random.IntN(3)]}
		if random.IntN(2) == 0 {
			opts.Tail = ptr.To(random.Int64N(10))
			if random.IntN(2) == 0 {
				opts.Tail = ptr.To(random.Int64N(20000))
			}
		}
		from := every
		at := time.Unix(0, every[random.IntN(len(every))].Time+int64(random.IntN(2)))
		switch random.IntN(4) {
		case 0:
			opts.After = at
		case 1:
			from, opts.Since = present, time.Unix(0, present[random.IntN(len(present))].Time)
		case 2:
			from, opts.Previous, opts.Since = previous, true, at
		case 3:
			from = present
		}
		check(from, opts)
	}
	// The same from the disk.
	l.close(nil)
	l = newLog(t, dir, func(s *logSettings) { s.fileSize, s.files = 700<<10, 9 })
	check(present, driver.LogOptions{})
	check(previous, driver.LogOptions{Previous: true, Tail: ptr.To[int64](7)})
	check(every, driver.LogOptions{After: time.Unix(0, every[1000].Time)})
}

func TestFollowersGetEachLineOnceThroughRotation(t *testing.T) {
	t.Run("line by line", func(t *testing.T) { testFollowers(t, (*logReader).nextLines) })
	t.Run("by batches", func(t *testing.T) { testFollowers(t, (*logReader).nextBatch) })
}

func (r *logReader) nextLines(ctx context.Context, see func(driver.LogLine)) error {
	line, err := r.Next(ctx)
	if err == nil {
		see(line)
	}
	return err
}

func (r *logReader) nextBatch(ctx context.Context, see func(driver.LogLine)) error {
	batch, err := r.NextBatch(ctx)
	if err != nil {
		return err
	}
	for line := range batch.Lines {
		see(line)
	}
	return nil
}

func testFollowers(t *testing.T, next func(r *logReader, ctx context.Context, see func(driver.LogLine)) error) {
	const lines, followers, writers = 20000, 8, 2
	dir := t.TempDir()
	// So many lines fill more files than are kept, but not so many more that a
	// follower could lose its hold.
	l := newLog(t, dir, func(s *logSettings) { s.fileSize, s.files = 64<<10, 60 })
	var all sync.WaitGroup
	run := l.begin()
	for range followers {
		r, err := l.read(driver.LogOptions{Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer r.Close()
			var seen [writers]int
			var last time.Time
			for seen[0]+seen[1] < lines*writers && !t.Failed() {
				err := next(r, t.Context(), func(line driver.LogLine) {
					if !line.Time.After(last) {
						t.Errorf("time %v isn't after %v", line.Time, last)
					}
					last = line.Time
					var w, n int
					if fmt.Sscanf(string(line.Data), "%d %d", &w, &n); n != seen[w] {
						t.Errorf("line %d of writer %d, want %d", n, w, seen[w])
					}
					seen[w]++
				})
				if err != nil {
					t.Errorf("reading on: %v", err)
					return
				}
			}
		})
	}
	for w := range writers {
		all.Go(func() {
			for i := 0; i < lines; i += 10 {
				var b strings.Builder
				for j := range 10 {
					fmt.Fprintf(&b, "%d %d %s\n", w, i+j, strings.Repeat(".", i%200))
				}
				write(t, l, run, v1.LogStreamStdout, b.String())
			}
		})
	}
	all.Wait()
	if _, err := os.Stat(filepath.Join(dir, "1.0.log")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first file wasn't deleted: %v", err)
	}
}

// countedFile counts how often it is read.
type countedFile struct {
	logFile
	reads *atomic.Int64
}

func (f countedFile) ReadAt(p []byte, offset int64) (int, error) {
	f.reads.Add(1)
	return f.logFile.ReadAt(p, offset)
}

// follow opens a follower of what is written from now on.
func follow(t *testing.T, l *instanceLog) *logReader {
	t.Helper()
	r, err := l.read(driver.LogOptions{Follow: true, Tail: ptr.To[int64](0)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// awaitWaiting waits until so many followers wait for more.
func awaitWaiting(t *testing.T, l *instanceLog, n int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		l.mu.Lock()
		waiting := l.waiting
		l.mu.Unlock()
		if waiting == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d followers wait, want %d", waiting, n)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestALineThatManyFollowIsReadOnce(t *testing.T) {
	const followers, lines = 100, 20
	var reads atomic.Int64
	l := newLog(t, t.TempDir(), func(s *logSettings) {
		s.create = func(name string) (logFile, error) {
			f, err := createLogFile(name)
			return countedFile{f, &reads}, err
		}
	})
	run := l.begin()
	write(t, l, run, v1.LogStreamStdout, "first\n")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var shares sync.Map
	var all sync.WaitGroup
	var seen [lines]sync.WaitGroup
	for i := range seen {
		seen[i].Add(followers)
	}
	for range followers {
		r := follow(t, l)
		all.Go(func() {
			next := 0
			defer func() { // it has failed
				for ; next < lines; next++ {
					seen[next].Done()
				}
			}()
			for i := range lines {
				batch, err := r.NextBatch(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				for line := range batch.Lines {
					if want := fmt.Sprint("line ", i); string(line.Data) != want {
						t.Errorf("line %q, want %q", line.Data, want)
					}
				}
				made := batch.Shared.Do("key", func() any { return i })
				shares.Store(batch.Shared, true)
				if made != i {
					t.Errorf("shared is %v, want %d", made, i)
				}
				seen[i].Done()
				next++
			}
		})
	}
	reads.Store(0)
	for i := range lines {
		awaitWaiting(t, l, followers)
		write(t, l, run, v1.LogStreamStdout, fmt.Sprintf("line %d\n", i))
		seen[i].Wait()
	}
	all.Wait()
	if n := reads.Load(); n != lines {
		t.Errorf("%d reads of the file for %d lines", n, lines)
	}
	n := 0
	shares.Range(func(any, any) bool { n++; return true })
	if n != lines {
		t.Errorf("%d batches were shared, want %d", n, lines)
	}
}

func TestWhatFollowersShareIsBounded(t *testing.T) {
	l := newLog(t, t.TempDir(), func(s *logSettings) { s.fileSize, s.files = 300<<10, 100 })
	run := l.begin()
	stalled, quick := follow(t, l), follow(t, l)
	var want, got []string
	see := func(line driver.LogLine) { got = append(got, string(line.Data)) }
	occupied := func() (blocks, size int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, b := range l.blocks {
			size += len(b.data)
		}
		return len(l.blocks), size
	}
	for i := range 400 {
		text := fmt.Sprint(i, " ", strings.Repeat("x", i*16), "\n")
		want = append(want, strings.TrimSuffix(text, "\n"))
		write(t, l, run, v1.LogStreamStdout, text)
		for len(got) < len(want) {
			if err := quick.nextBatch(t.Context(), see); err != nil {
				t.Fatal(err)
			}
		}
		if blocks, size := occupied(); blocks == 0 || blocks > maxBlocks || size > maxBlocksSize {
			t.Fatalf("after %d lines, %d bytes in %d blocks are kept", i, size, blocks)
		}
	}
	// The one that is behind reads the files.
	got = nil
	for len(got) < len(want) {
		if err := stalled.nextBatch(t.Context(), see); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines of the one that was behind (-want +got):\n%s", diff)
	}
	stalled.Close()
	if blocks, _ := occupied(); blocks != 0 {
		t.Errorf("%d blocks are kept for a single follower", blocks)
	}
}

func TestAFollowerWithoutLinesResumesThroughRestarts(t *testing.T) {
	for name, before := range map[string]string{"in a log without any": "", "behind what there was": "old\n"} {
		t.Run(name, func(t *testing.T) {
			l := newLog(t, t.TempDir(), nil)
			if before != "" {
				write(t, l, l.begin(), v1.LogStreamStdout, before)
			}
			run := l.begin()
			l.create(run)
			r, err := l.read(driver.LogOptions{Follow: true})
			if err != nil {
				t.Fatal(err)
			}
			cursor := r.Before()
			r.Close()
			write(t, l, run, v1.LogStreamStdout, "one\n")
			write(t, l, l.begin(), v1.LogStreamStdout, "two\n")
			if cursor.IsZero() {
				t.Error("the cursor is the zero time, which selects nothing")
			}
			if diff := cmp.Diff([]string{"one", "two"}, texts(readAll(t, l, driver.LogOptions{After: cursor}))); diff != "" {
				t.Errorf("resumed (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDiskUseIsBounded(t *testing.T) {
	dir := t.TempDir()
	l := newLog(t, dir, func(s *logSettings) { s.fileSize, s.files = 10000, 3 })
	for range 3 {
		run := l.begin()
		for range 50 {
			write(t, l, run, v1.LogStreamStdout, strings.Repeat("x", 1000)+"\n")
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 3 {
		t.Errorf("%d files, want 3", len(entries))
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 10000 {
			t.Errorf("%s has %d bytes", e.Name(), info.Size())
		}
	}
}

func TestReadersKeepWhatRotationDeletes(t *testing.T) {
	l := newLog(t, t.TempDir(), func(s *logSettings) { s.fileSize, s.files = 1000, 3 })
	run := l.begin()
	line := strings.Repeat("x", 900) + "\n" // a file each
	write(t, l, run, v1.LogStreamStdout, line)
	open := func() *logReader {
		r, err := l.read(driver.LogOptions{Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	held, lost := open(), open()
	defer held.Close()
	defer lost.Close()
	for range 6 {
		write(t, l, run, v1.LogStreamStdout, line)
	}
	for i := range 7 {
		if _, err := held.Next(t.Context()); err != nil {
			t.Fatalf("line %d: %v", i, err)
		}
	}
	// One more is too many for who has read nothing.
	write(t, l, run, v1.LogStreamStdout, line)
	if _, err := lost.Next(t.Context()); !errors.Is(err, errLost) {
		t.Errorf("error %v, want that it is too slow", err)
	}
	if _, err := held.Next(t.Context()); err != nil {
		t.Errorf("the other reader: %v", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := l.segments[0]; s != nil; s = s.next {
		if (s.file != nil) != (s.holds > 0) || (s.holds > 0) != (s == l.tail) {
			t.Errorf("segment %d.%d: %d holds, open %t", s.run, s.part, s.holds, s.file != nil)
		}
	}
}

func TestTornEndsAreRepaired(t *testing.T) {
	whole := "2026-01-01T00:00:00.000000001Z stdout F one\n2026-01-01T00:00:00.000000002Z stderr F two\n"
	for name, torn := range map[string]string{
		"nothing torn":              "",
		"a torn text":               "2026-01-01T00:00:00.000000003Z stdout F thr",
		"a torn time":               "2026-01-01T00:0",
		"zeros after a power cut":   strings.Repeat("\x00", 5000),
		"zeros in a line":           "2026-01-01T00:00:00.000000003Z st\x00\x00\x00\n",
		"garbage of several lines":  "garbage\nmore\n\n",
		"a header and nothing more": "2026-01-01T00:00:00.000000003Z stdout F ",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "7.0.log")
			if err := os.WriteFile(file, []byte(whole+torn), 0o600); err != nil {
				t.Fatal(err)
			}
			l := newLog(t, dir, nil)
			if diff := cmp.Diff([]string{"one", "two"}, texts(readAll(t, l, driver.LogOptions{}))); diff != "" {
				t.Errorf("lines (-want +got):\n%s", diff)
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != whole {
				t.Errorf("the file is %q, %v", got, err)
			}
			run := l.begin()
			if run != 8 {
				t.Errorf("the next run is %d, want 8", run)
			}
			write(t, l, run, v1.LogStreamStdout, "next\n")
			if diff := cmp.Diff([]string{"one", "two"}, texts(readAll(t, l, driver.LogOptions{Previous: true}))); diff != "" {
				t.Errorf("the previous run (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("only a torn record", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "1.0.log"), []byte("2026-01-01T00:00:00"), 0o600); err != nil {
			t.Fatal(err)
		}
		l := newLog(t, dir, nil)
		if got := readAll(t, l, driver.LogOptions{}); got != nil {
			t.Errorf("lines %v", got)
		}
	})
}

func TestForeignFilesAreLeftAlone(t *testing.T) {
	const precious = "nothing of ours\n"
	for name, plant := range map[string]func(name, elsewhere string) error{
		"a symbolic link": func(name, elsewhere string) error { return os.Symlink(elsewhere, name) },
		"a hard link":     func(name, elsewhere string) error { return os.Link(elsewhere, name) },
		"a file":          func(name, _ string) error { return os.WriteFile(name, []byte(precious), 0o600) },
		"a named pipe":    func(name, _ string) error { return syscall.Mkfifo(name, 0o600) },
		"a directory":     func(name, _ string) error { return os.Mkdir(name, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			elsewhere := filepath.Join(t.TempDir(), "precious.txt")
			if err := os.WriteFile(elsewhere, []byte(precious), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			planted := filepath.Join(dir, "7.0.log")
			if err := plant(planted, elsewhere); err != nil {
				t.Fatal(err)
			}
			l := newLog(t, dir, func(s *logSettings) { s.fileSize, s.files = 100, 2 })
			run := l.begin()
			if run != 8 {
				t.Errorf("the next run is %d, want 8", run)
			}
			for _, line := range []string{"one\n", "two\n", "three\n", "four\n", "five\n", "six\n"} {
				write(t, l, run, v1.LogStreamStdout, line)
			}
			if got := texts(readAll(t, l, driver.LogOptions{})); len(got) == 0 || got[len(got)-1] != "six" {
				t.Errorf("lines %q", got)
			}
			info, err := os.Lstat(planted)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode().IsRegular() {
				if got, err := os.ReadFile(planted); err != nil || string(got) != precious {
					t.Errorf("the file is %q, %v", got, err)
				}
			}
			if got, err := os.ReadFile(elsewhere); err != nil || string(got) != precious {
				t.Errorf("the other file is %q, %v", got, err)
			}
		})
	}
}

// fullDisk makes files that take only so many bytes altogether.
type fullDisk struct {
	mu   sync.Mutex // protects room
	room int
}

func (d *fullDisk) create(name string) (logFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.room <= 0 {
		return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOSPC}
	}
	f, err := createLogFile(name)
	return fullFile{f, d}, err
}

func (d *fullDisk) add(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.room += n
}

type fullFile struct {
	logFile
	disk *fullDisk
}

func (f fullFile) Write(p []byte) (int, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	n, err := f.logFile.Write(p[:min(len(p), f.disk.room)])
	f.disk.room -= n
	if err == nil && n < len(p) {
		err = &os.PathError{Op: "write", Path: "log", Err: syscall.ENOSPC}
	}
	return n, err
}

func TestFullDiskHoldsOutputBack(t *testing.T) {
	disk := &fullDisk{room: 3333}
	dir := t.TempDir()
	d := newDriver(t, Options{Dir: dir, LogFileSize: 20000, LogFiles: 100, createLogFile: disk.create})
	const lines = 20000
	target := newTarget(script(fmt.Sprintf("seq %d; echo end >&2; exec sleep 1000", lines)))
	id := start(t, d, target)
	status := await(t, d, "a message", func(s driver.InstanceStatus) bool { return s.Message != "" })
	if want := "its log can't be written: no space left on device; output is held back until it can"; status.Message != want {
		t.Errorf("message %q, want %q", status.Message, want)
	}
	if status.State.Running == nil {
		t.Errorf("state %+v, want running", status.State)
	}
	c := open(t, d, target)
	follower, err := c.Logs(t.Context(), driver.LogOptions{Follow: true, Stream: v1.LogStreamStdout})
	if err != nil {
		t.Fatal(err)
	}
	defer follower.Close()
	for i := 1; i <= lines; i++ {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		stop := make(chan struct{})
		go func() {
			// There is room for a little more whenever the reader waits.
			for {
				select {
				case <-time.After(20 * time.Millisecond):
					disk.add(300_000)
				case <-stop:
					return
				}
			}
		}()
		line, err := follower.Next(ctx)
		close(stop)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprint(i); string(line.Data) != want {
			t.Fatalf("line %q, want %q", line.Data, want)
		}
	}
	disk.add(1 << 30)
	await(t, d, "no message", func(s driver.InstanceStatus) bool { return s.Message == "" && s.State.Running != nil })
	files, err := filepath.Glob(filepath.Join(dir, string(id.Target), id.Name, "*.log"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for record := range bytes.Lines(data) {
			if _, ok := parseHeader(record); !ok {
				t.Fatalf("%s: torn record %q", name, record)
			}
		}
	}
}

func TestFullDiskDoesNotKeepAnInstanceFromEnding(t *testing.T) {
	disk := &fullDisk{room: 100}
	d, err := New(Options{Dir: t.TempDir(), createLogFile: disk.create})
	if err != nil {
		t.Fatal(err)
	}
	target := newTarget(script("seq 100000; sleep 1000"))
	id := start(t, d, target)
	await(t, d, "a message", func(s driver.InstanceStatus) bool { return s.Message != "" })
	if err := d.Stop(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, d, id)
	if err := d.Start(t.Context(), driver.Instance{Target: target, Name: id.Name}); driver.KindOf(err) != driver.Unavailable {
		t.Errorf("starting again: %v, want Unavailable", err)
	}
	if err := d.Close(); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("Close: %v, want what is lost", err)
	}
}

func TestFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		skip(t, "mounting a small file system: ", err)
	}
	defer syscall.Unmount(dir, 0)
	d, err := New(Options{Dir: dir, LogFileSize: 16 << 10, LogFiles: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	target := newTarget(script("seq 20000; exec sleep 1000"))
	id := start(t, d, target)
	await(t, d, "a message", func(s driver.InstanceStatus) bool { return strings.Contains(s.Message, "no space left on device") })
	follower, err := open(t, d, target).Logs(t.Context(), driver.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer follower.Close()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= 20000; i++ {
		line, err := follower.Next(t.Context())
		if err != nil || string(line.Data) != fmt.Sprint(i) {
			t.Fatalf("line %d is %q, %v", i, line.Data, err)
		}
	}
	follower.Close()
	if err := d.Stop(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, d, id)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestLogsOutliveTheAgent(t *testing.T) {
	dir := t.TempDir()
	target := newTarget(script("echo $AASERVER_INSTANCE says hello"))
	var times []time.Time
	for range 3 {
		d := newDriver(t, Options{Dir: dir})
		if len(times) > 0 {
			// Before it runs again, the last run is the agent's before.
			r, err := open(t, d, target).Logs(t.Context(), driver.LogOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if line, err := r.Next(t.Context()); err != nil || !line.Time.Equal(times[len(times)-1]) {
				t.Errorf("%+v, %v", line, err)
			}
			r.Close()
		}
		awaitEnd(t, d, start(t, d, target))
		r, err := open(t, d, target).Logs(t.Context(), driver.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		line, err := r.Next(t.Context())
		if err != nil || string(line.Data) != "web-0 says hello" {
			t.Fatalf("%q, %v", line.Data, err)
		}
		times = append(times, line.Time)
		r.Close()
		r, err = open(t, d, target).Logs(t.Context(), driver.LogOptions{Previous: true})
		if len(times) == 1 {
			if driver.KindOf(err) != driver.NotFound {
				t.Errorf("previous: %v", err)
			}
		} else if err != nil {
			t.Error(err)
		} else {
			if line, err := r.Next(t.Context()); err != nil || !line.Time.Equal(times[len(times)-2]) {
				t.Errorf("previous: %+v, %v", line, err)
			}
			r.Close()
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
