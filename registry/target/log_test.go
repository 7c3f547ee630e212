package target

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	apifilters "k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/tools/record"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/session"
)

// fakeDriver keeps logs in memory.
type fakeDriver struct {
	mu   sync.Mutex
	cond *sync.Cond
	logs map[string]*fakeLog
}

type fakeLog struct {
	lines   []driver.LogLine
	removed bool
}

func newFakeDriver() *fakeDriver {
	d := &fakeDriver{logs: map[string]*fakeLog{}}
	d.cond = sync.NewCond(&d.mu)
	return d
}

func (d *fakeDriver) write(instance string, lines ...driver.LogLine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.logs[instance] == nil {
		d.logs[instance] = &fakeLog{}
	}
	d.logs[instance].lines = append(d.logs[instance].lines, lines...)
	d.cond.Broadcast()
}

func (d *fakeDriver) remove(instance string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logs[instance].removed = true
	d.cond.Broadcast()
}

func (d *fakeDriver) Open(_ context.Context, req driver.Request) (driver.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.logs[req.Instance] == nil {
		return nil, driver.Errorf(driver.NotFound, "no instance %s", req.Instance)
	}
	return fakeConn{d, d.logs[req.Instance]}, nil
}

type fakeConn struct {
	d   *fakeDriver
	log *fakeLog
}

func (fakeConn) Close() error { return nil }

func (c fakeConn) Logs(_ context.Context, opts driver.LogOptions) (driver.LogReader, error) {
	r := &fakeReader{fakeConn: c, opts: opts}
	if opts.Tail != nil {
		r.next = max(0, len(c.log.lines)-int(*opts.Tail))
	}
	return r, nil
}

type fakeReader struct {
	fakeConn
	opts driver.LogOptions
	next int
}

func (r *fakeReader) Before() time.Time {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	if r.next == 0 {
		return time.Unix(0, 0)
	}
	return r.log.lines[r.next-1].Time
}

func (r *fakeReader) Next(ctx context.Context) (driver.LogLine, error) {
	stop := context.AfterFunc(ctx, func() {
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		r.d.cond.Broadcast()
	})
	defer stop()
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	for {
		for r.next < len(r.log.lines) {
			line := r.log.lines[r.next]
			r.next++
			if line.Time.After(r.opts.After) {
				return line, nil
			}
		}
		switch {
		case ctx.Err() != nil:
			return driver.LogLine{}, context.Cause(ctx)
		case !r.opts.Follow || r.log.removed:
			return driver.LogLine{}, io.EOF
		}
		r.d.cond.Wait()
	}
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func at(ms int, text string) driver.LogLine {
	return driver.LogLine{Time: epoch.Add(time.Duration(ms) * time.Millisecond), Stream: v1.LogStreamStdout, Data: []byte(text)}
}

func part(ms int, stream v1.LogStream, text string) driver.LogLine {
	line := at(ms, text)
	line.Stream, line.Partial = stream, true
	return line
}

func logsOf(d *fakeDriver, selected driver.LogOptions) *logStream {
	target := &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "1"}}
	target.Spec.Process = &v1.ProcessSource{Command: []string{"x"}}
	target.Spec.RestartPolicy = v1.RestartAlways
	return &logStream{
		connector: &connector{opts: Options{Recorder: record.NewFakeRecorder(100), Drivers: func(*v1.Target) (driver.Driver, error) { return d, nil }}},
		to:        &access{target: target},
		selected:  selected,
	}
}

func TestLogsOfManyInstancesAreMergedByTime(t *testing.T) {
	d := newFakeDriver()
	d.write("web-0", at(1, "a"), at(4, "d"), at(5, "e"))
	d.write("web-1", at(2, "b"), at(3, "c"), at(6, "f"))
	logs := logsOf(d, driver.LogOptions{})
	defer logs.close()
	for _, name := range []string{"web-0", "web-1"} {
		if err := logs.open(t.Context(), name, logs.selected); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := logs.copy(t.Context(), &out, &formatter{prefix: true}, true); err != nil {
		t.Fatal(err)
	}
	want := "[web-0] a\n[web-1] b\n[web-1] c\n[web-0] d\n[web-0] e\n[web-1] f\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

func TestPreviousRunsOfAllInstances(t *testing.T) {
	many := make([]string, 60)
	for i := range many {
		many[i] = fmt.Sprint("web-", i)
	}
	for name, tt := range map[string]struct {
		instances []string
		// had are those with a previous run.
		had         []string
		want        string
		wantWarning string
		wantCode    int32
		wantErr     string
	}{
		"all had one":      {instances: many[:2], had: many[:2], want: "[web-0] was web-0\n[web-1] was web-1\n"},
		"one had none":     {instances: many[:3], had: []string{"web-1"}, want: "[web-1] was web-1\n", wantWarning: `299 - "without a log of a previous run: web-0, web-2"`},
		"none had one":     {instances: many[:2], wantCode: http.StatusNotFound, wantErr: `none of the 2 instances of target "web" has a log of a previous run`},
		"the only one":     {instances: many[:1], wantCode: http.StatusNotFound, wantErr: "web-0: none"},
		"most had none":    {instances: many, had: []string{"web-9"}, want: "[web-9] was web-9\n", wantWarning: `web-49, web-50 and 9 more"`},
		"the driver fails": {instances: append([]string{"broken"}, many[:2]...), had: many[:2], wantCode: http.StatusServiceUnavailable, wantErr: "the disk is broken"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newPorts()
			f, _ := d.begin(t, "")
			opts := f.opts
			opts.Sessions = session.NewManager(session.Options{})
			had := newFakeDriver()
			for i, name := range tt.had {
				had.write(name, at(i, "was "+name))
			}
			opts.Drivers = func(*v1.Target) (driver.Driver, error) { return previousRuns{had}, nil }
			d.target.Status.Instances = nil
			for _, name := range tt.instances {
				d.target.Status.Instances = append(d.target.Status.Instances, v1.InstanceStatus{Name: name})
			}
			ctx := request.WithNamespace(t.Context(), "shop")
			responder := &refusals{}
			handler, err := (&LogREST{connector: &connector{targets: d, opts: opts}}).Connect(ctx, "web", &v1.TargetLogOptions{Previous: true, AllInstances: true, Prefix: true}, responder)
			if err != nil {
				t.Fatal(err)
			}
			recorded := httptest.NewRecorder()
			// As behind the server's filters, which a session leaves.
			DetachedSessions(apifilters.WithWarningRecorder(handler)).ServeHTTP(recorded, httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil))
			if tt.wantErr != "" {
				wantStatus(t, responder.err, tt.wantCode, tt.wantErr)
			} else if responder.err != nil {
				t.Error(responder.err)
			}
			if diff := cmp.Diff(tt.want, recorded.Body.String()); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
			if got := recorded.Header().Get("Warning"); (got == "") != (tt.wantWarning == "") || !strings.HasSuffix(got, tt.wantWarning) {
				t.Errorf("warning %q, want %q", got, tt.wantWarning)
			}
		})
	}
}

// previousRuns are the logs of instances that had one before.
type previousRuns struct{ *fakeDriver }

func (p previousRuns) Open(ctx context.Context, req driver.Request) (driver.Conn, error) {
	if req.Instance == "broken" {
		return nil, driver.Errorf(driver.Unavailable, "the disk is broken")
	}
	p.mu.Lock()
	had := p.logs[req.Instance] != nil
	p.mu.Unlock()
	if !had {
		return withoutPrevious{req.Instance}, nil
	}
	return p.fakeDriver.Open(ctx, req)
}

type withoutPrevious struct{ instance string }

func (withoutPrevious) Close() error { return nil }

func (w withoutPrevious) Logs(context.Context, driver.LogOptions) (driver.LogReader, error) {
	return nil, driver.Errorf(driver.NotFound, "%s: none", w.instance)
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not yet: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func targetWith(instances ...string) *api.Target {
	target := &api.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "1"}}
	target.Spec.Process = &api.ProcessSource{Command: []string{"x"}}
	target.Spec.RestartPolicy = api.RestartAlways
	for _, name := range instances {
		target.Status.Instances = append(target.Status.Instances, api.InstanceStatus{
			Name: name, State: api.InstanceState{Running: &api.InstanceStateRunning{}},
		})
	}
	return target
}

func TestFollowingAllInstances(t *testing.T) {
	d := newFakeDriver()
	d.write("web-0", at(1, "one"), at(2, "two"))
	logs := logsOf(d, driver.LogOptions{Follow: true})
	defer logs.close()
	watcher := watch.NewFakeWithOptions(watch.FakeOptions{ChannelSize: 10})
	logs.watch = func(context.Context, *internalversion.ListOptions) (watch.Interface, error) { return watcher, nil }

	first := logs.selected
	first.Follow = false
	if err := logs.open(t.Context(), "web-0", first); err != nil {
		t.Fatal(err)
	}
	out := &lockedBuffer{}
	done := make(chan error, 1)
	go func() { done <- logs.copy(t.Context(), out, &formatter{prefix: true}, true) }()

	watcher.Add(targetWith("web-0"))
	d.write("web-0", at(3, "three"))
	waitFor(t, "the line that came while following", func() bool { return strings.Contains(out.String(), "three") })

	d.write("web-1", at(4, "joined"))
	watcher.Modify(targetWith("web-0", "web-1"))
	waitFor(t, "the line of the instance that came", func() bool { return strings.Contains(out.String(), "joined") })

	d.remove("web-1")
	watcher.Modify(targetWith("web-0"))
	d.write("web-0", at(5, "last"))
	waitFor(t, "a line after the other instance left", func() bool { return strings.Contains(out.String(), "last") })

	d.remove("web-0")
	watcher.Delete(targetWith())
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("following didn't end with the target")
	}
	want := "[web-0] one\n[web-0] two\n[web-0] three\n[web-1] joined\n[web-0] last\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

// What is written while the logs so far are read, and by instances that come
// later, is new: it isn't cut to the last lines.
func TestFollowingTheTailOfAllInstances(t *testing.T) {
	d := newFakeDriver()
	d.write("web-0", at(1, "old"))
	d.write("web-1")
	logs := logsOf(d, driver.LogOptions{Follow: true, Tail: ptr.To(int64(0))})
	defer logs.close()
	watcher := watch.NewFakeWithOptions(watch.FakeOptions{ChannelSize: 10})
	logs.watch = func(context.Context, *internalversion.ListOptions) (watch.Interface, error) { return watcher, nil }
	first := logs.selected
	first.Follow = false
	for _, name := range []string{"web-0", "web-1"} {
		if err := logs.open(t.Context(), name, first); err != nil {
			t.Fatal(err)
		}
	}
	if err := logs.merge(t.Context(), io.Discard, &formatter{}); err != nil {
		t.Fatal(err)
	}
	d.write("web-0", at(2, "a"))
	d.write("web-1", at(3, "b"))
	d.write("web-2", at(4, "c"), at(5, "d"))

	out := &lockedBuffer{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- logs.followAll(ctx, out, &formatter{prefix: true}) }()
	watcher.Add(targetWith("web-0", "web-1", "web-2"))
	defer func() {
		cancel()
		watcher.Stop()
		<-done
	}()
	for _, want := range []string{"[web-0] a\n", "[web-1] b\n", "[web-2] c\n", "[web-2] d\n"} {
		waitFor(t, want, func() bool { return strings.Contains(out.String(), want) })
	}
	if strings.Contains(out.String(), "old") {
		t.Errorf("output %q has a line that isn't wanted", out.String())
	}
}

// The previous runs have ended: there is nothing to follow.
func TestFollowingThePreviousRunsOfAllInstancesEnds(t *testing.T) {
	d := newFakeDriver()
	d.write("web-0", at(1, "a"))
	logs := logsOf(d, driver.LogOptions{Follow: true, Previous: true})
	defer logs.close()
	logs.watch = func(context.Context, *internalversion.ListOptions) (watch.Interface, error) {
		return nil, errors.New("it is watched")
	}
	first := logs.selected
	first.Follow = false
	if err := logs.open(t.Context(), "web-0", first); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := logs.copy(t.Context(), &out, &formatter{}, true); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "a\n" {
		t.Errorf("output %q, want the previous run's", got)
	}
}

func TestFollowingEndsWithTheClient(t *testing.T) {
	d := newFakeDriver()
	d.write("web-0", at(1, "one"))
	logs := logsOf(d, driver.LogOptions{Follow: true})
	defer logs.close()
	if err := logs.open(t.Context(), "web-0", logs.selected); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("the client has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	out := &lockedBuffer{}
	done := make(chan error, 1)
	go func() { done <- logs.copy(ctx, out, &formatter{}, false) }()
	waitFor(t, "the first line", func() bool { return out.String() == "one\n" })
	cancel(gone)
	if err := <-done; !errors.Is(err, gone) {
		t.Errorf("copy returned %v, want %v", err, gone)
	}
}

// A client that stops reading holds the producers back: what waits for it is
// bounded.
func TestASlowClientHoldsProducersBack(t *testing.T) {
	d := newFakeDriver()
	const lines = 10000
	payload := strings.Repeat("x", 100)
	for i := range lines {
		d.write("web-0", at(i, payload))
	}
	logs := logsOf(d, driver.LogOptions{Follow: true})
	defer logs.close()
	if err := logs.open(t.Context(), "web-0", logs.selected); err != nil {
		t.Fatal(err)
	}
	reader := logs.sources[0].reader.(*fakeReader)
	read := func() int {
		d.mu.Lock()
		defer d.mu.Unlock()
		return reader.next
	}

	ctx, cancel := context.WithCancel(t.Context())
	in, out := io.Pipe() // a client that reads nothing
	done := make(chan error, 1)
	go func() { done <- logs.copy(ctx, out, &formatter{}, false) }()
	if _, err := in.Read(make([]byte, 0)); err != nil { // the headers' empty write
		t.Fatal(err)
	}
	most := 2*batchSize/len(payload) + 2
	waitFor(t, "the producer has filled the batch", func() bool { return read() > batchSize/len(payload)/2 })
	if n := read(); n > most {
		t.Errorf("%d lines were read for a client that takes none, want at most %d", n, most)
	}
	cancel()
	in.Close()
	<-done
}

func TestFormatter(t *testing.T) {
	stdout, stderr := v1.LogStreamStdout, v1.LogStreamStderr
	end := at(9, "end")
	nextRun := end
	nextRun.Run = 1
	endOfErr := at(9, "err end")
	endOfErr.Stream = stderr
	for name, tt := range map[string]struct {
		format formatter
		lines  []driver.LogLine
		want   string
	}{
		"a line is ended by a newline": {
			lines: []driver.LogLine{at(1, "a")},
			want:  "a\n",
		},
		"the prefix comes before the time, and times have nine digits": {
			format: formatter{prefix: true, timestamps: true},
			lines:  []driver.LogLine{at(120, "a")},
			want:   "[web-0] 2026-01-02T03:04:05.120000000Z a\n",
		},
		"the parts of a long line are joined": {
			format: formatter{prefix: true},
			lines:  []driver.LogLine{part(1, stdout, "abc"), part(2, stdout, "def"), end},
			want:   "[web-0] abcdefend\n",
		},
		"a line of the other stream doesn't get into a long line": {
			format: formatter{prefix: true},
			lines:  []driver.LogLine{part(1, stdout, "abc"), endOfErr, end},
			want:   "[web-0] abc\n[web-0] err end\n[web-0] end\n",
		},
		"a run that ended without a newline doesn't run into the next": {
			lines: []driver.LogLine{part(1, stdout, "last words"), nextRun},
			want:  "last words\nend\n",
		},
		"bytes that are no text stay": {
			lines: []driver.LogLine{at(1, "\x00\xff\r")},
			want:  "\x00\xff\r\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []byte
			for _, line := range tt.lines {
				got = tt.format.append(got, "web-0", line)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLimitedWriter(t *testing.T) {
	for _, tt := range []struct {
		limit  int64
		writes []string
		want   string
		full   bool
	}{
		{10, []string{"abc", "def"}, "abcdef", false},
		{6, []string{"abc", "def"}, "abcdef", true},
		{4, []string{"abc", "def"}, "abcd", true},
		{1, []string{"abc"}, "a", true},
	} {
		t.Run(fmt.Sprint(tt.limit, tt.writes), func(t *testing.T) {
			var out bytes.Buffer
			w := &limitedWriter{&out, tt.limit}
			var err error
			for _, text := range tt.writes {
				if _, err = w.Write([]byte(text)); err != nil {
					break
				}
			}
			if out.String() != tt.want {
				t.Errorf("wrote %q, want %q", out.String(), tt.want)
			}
			if got := errors.Is(err, errLimit); got != tt.full {
				t.Errorf("err = %v, want errLimit: %t", err, tt.full)
			}
		})
	}
}

func TestDriverOptions(t *testing.T) {
	now := clocktesting.NewFakePassiveClock(epoch)
	for name, tt := range map[string]struct {
		opts v1.TargetLogOptions
		want driver.LogOptions
	}{
		"seconds count back from now": {
			opts: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](90)},
			want: driver.LogOptions{Since: epoch.Add(-90 * time.Second)},
		},
		"a time stands as it is": {
			opts: v1.TargetLogOptions{SinceTime: &metav1.Time{Time: epoch}},
			want: driver.LogOptions{Since: epoch},
		},
		"the cursor keeps its nanoseconds, and its line is read, too": {
			opts: v1.TargetLogOptions{ResumeAfter: "2026-01-02T03:04:05.000000001Z"},
			want: driver.LogOptions{After: epoch},
		},
		"a cursor before all time selects all": {
			opts: v1.TargetLogOptions{ResumeAfter: "0001-01-01T00:00:00Z"},
			want: driver.LogOptions{After: time.Unix(0, -1)},
		},
		"the rest passes": {
			opts: v1.TargetLogOptions{Previous: true, Follow: true, TailLines: ptr.To[int64](0), Stream: v1.LogStreamStderr},
			want: driver.LogOptions{Previous: true, Follow: true, Tail: ptr.To[int64](0), Stream: v1.LogStreamStderr},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := driverOptions(&tt.opts, now)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}

// batchReader is a reader that has its lines in batches.
type batchReader struct {
	driver.LogReader
	batches []driver.LogBatch
}

func (r *batchReader) NextBatch(context.Context) (driver.LogBatch, error) {
	if len(r.batches) == 0 {
		return driver.LogBatch{}, io.EOF
	}
	batch := r.batches[0]
	r.batches = r.batches[1:]
	return batch, nil
}

// TestBatchesAreWhatLinesAre compares what comes of lines one by one, by batches
// of any size, and by batches that others have had before.
func TestBatchesAreWhatLinesAre(t *testing.T) {
	stderr := part(4, v1.LogStreamStderr, "error ")
	nextRun := at(7, "next run")
	nextRun.Run = 1
	lines := []driver.LogLine{
		at(1, "one"), part(2, v1.LogStreamStdout, "long "), part(3, v1.LogStreamStdout, "longer "), stderr,
		at(5, "longest"), part(6, v1.LogStreamStdout, "cut"), nextRun, at(8, "last"),
	}
	for name, format := range map[string]formatter{
		"plain":             {},
		"with times":        {timestamps: true},
		"with all there is": {prefix: true, timestamps: true},
	} {
		for size := 1; size <= len(lines); size++ {
			t.Run(fmt.Sprint(name, ", batches of ", size), func(t *testing.T) {
				var want []byte
				each := format
				for _, line := range lines {
					want = each.append(want, "web-0", line)
				}
				var own, shared []driver.LogBatch
				for some := range slices.Chunk(lines, size) {
					own = append(own, driver.LogBatch{Lines: slices.Values(some)})
					shared = append(shared, driver.LogBatch{Lines: slices.Values(some), Shared: &driver.LogShare{}})
				}
				for name, batches := range map[string][]driver.LogBatch{"its own": own, "shared": shared} {
					for range 2 {
						logs := logsOf(newFakeDriver(), driver.LogOptions{Follow: true})
						source := &logSource{instance: "web-0", reader: &batchReader{batches: batches}}
						logs.sources = []*logSource{source}
						var out bytes.Buffer
						f := format
						if err := logs.copy(t.Context(), &out, &f, false); err != nil {
							t.Fatal(err)
						}
						if diff := cmp.Diff(string(want), out.String()); diff != "" {
							t.Errorf("%s batches (-want +got):\n%s", name, diff)
						}
						if last := lines[len(lines)-1].Time; !source.last.Equal(last) {
							t.Errorf("%s batches: the last line is of %v, want %v", name, source.last, last)
						}
					}
				}
			})
		}
	}
}

// A client resumes after a line that it has, whose time is that of its first
// part, or just before one that it has a part of.
func TestResuming(t *testing.T) {
	stdout := v1.LogStreamStdout
	stderr := at(4, "err")
	stderr.Stream = v1.LogStreamStderr
	nextRun := at(6, "next run")
	nextRun.Run = 1
	log := []driver.LogLine{
		at(1, "one"), part(2, stdout, "long "), at(3, "end"), stderr,
		part(5, stdout, "no newline"), nextRun, part(7, stdout, "begun "), stderr, at(9, "gone on"),
	}
	log[6].Run, log[8].Run, log[7].Run = 1, 1, 1
	log[7].Time = at(8, "").Time
	stamp := func(ms int) string { return at(ms, "").Time.Format(driver.LogTime) }
	line := func(ms int, text string) string { return stamp(ms) + " " + text + "\n" }
	after := func(ms, nanoseconds int) string {
		return at(ms, "").Time.Add(time.Duration(nanoseconds)).Format(time.RFC3339Nano)
	}
	one, long, err := line(1, "one"), line(2, "long end"), line(4, "err")
	cut, next, begun, err2, rest := line(5, "no newline"), line(6, "next run"), line(7, "begun "), line(8, "err"), line(9, "gone on")
	for name, tt := range map[string]struct {
		after string
		want  string
	}{
		"from before all":                {"0001-01-01T00:00:00Z", one + long + err + cut + next + begun + err2 + rest},
		"from the epoch":                 {"1970-01-01T00:00:00Z", one + long + err + cut + next + begun + err2 + rest},
		"after a line":                   {after(1, 0), long + err + cut + next + begun + err2 + rest},
		"after a time that is no line's": {after(1, 7), long + err + cut + next + begun + err2 + rest},
		"after a line of several parts":  {after(2, 0), err + cut + next + begun + err2 + rest},
		"just before a line of several parts, which the client has the beginning of": {after(2, -1), long + err + cut + next + begun + err2 + rest},
		"after the last of a run, without a newline":                                 {after(5, 0), next + begun + err2 + rest},
		"after a beginning that another stream's line came into":                     {after(7, 0), err2 + rest},
		"after that line": {after(8, 0), rest},
		"after all":       {after(9, 0), ""},
	} {
		t.Run(name, func(t *testing.T) {
			selected, err := driverOptions(&v1.TargetLogOptions{ResumeAfter: tt.after}, clocktesting.NewFakePassiveClock(epoch))
			if err != nil {
				t.Fatal(err)
			}
			for _, follow := range []bool{false, true} {
				d := newFakeDriver()
				d.write("web-0", log...)
				d.remove("web-0")
				selected.Follow = follow
				logs := logsOf(d, selected)
				defer logs.close()
				if err := logs.open(t.Context(), "web-0", logs.selected); err != nil {
					t.Fatal(err)
				}
				logs.resumed = &resumed{cursor: selected.After.Add(1)}
				var out bytes.Buffer
				if err := logs.copy(t.Context(), &out, &formatter{timestamps: true}, false); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, out.String()); diff != "" {
					t.Errorf("follow %t, output (-want +got):\n%s", follow, diff)
				}
				var batched []driver.LogLine
				for _, line := range log {
					if line.Time.After(selected.After) {
						batched = append(batched, line)
					}
				}
				logs = logsOf(d, selected)
				logs.resumed = &resumed{cursor: selected.After.Add(1)}
				reader := &batchReader{}
				for some := range slices.Chunk(batched, 2) {
					reader.batches = append(reader.batches, driver.LogBatch{Lines: slices.Values(some), Shared: &driver.LogShare{}})
				}
				logs.sources = []*logSource{{instance: "web-0", reader: reader}}
				out.Reset()
				if err := logs.copy(t.Context(), &out, &formatter{timestamps: true}, false); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, out.String()); diff != "" {
					t.Errorf("follow %t, by batches, output (-want +got):\n%s", follow, diff)
				}
			}
		})
	}
}
