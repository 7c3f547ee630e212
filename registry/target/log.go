package target

import (
	"bufio"
	"container/heap"
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/utils/clock"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// LogREST is the log subresource. It is a Connecter, unlike the log of pods, so
// that admission sees its options and it owns its upgrade.
type LogREST struct {
	*connector
	watch func(ctx context.Context, options *internalversion.ListOptions) (watch.Interface, error)
}

var (
	_ rest.Connecter       = (*LogREST)(nil)
	_ rest.StorageMetadata = (*LogREST)(nil)
)

// New implements rest.Storage.
func (*LogREST) New() runtime.Object { return &v1.TargetLogOptions{} }

// Destroy implements rest.Storage.
func (*LogREST) Destroy() {}

// ConnectMethods implements rest.Connecter.
func (*LogREST) ConnectMethods() []string { return []string{http.MethodGet} }

// NewConnectOptions implements rest.Connecter.
func (*LogREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &v1.TargetLogOptions{}, false, ""
}

// ProducesMIMETypes implements rest.StorageMetadata.
func (*LogREST) ProducesMIMETypes(string) []string { return []string{"text/plain"} }

// ProducesObject implements rest.StorageMetadata.
func (*LogREST) ProducesObject(string) any { return "" }

// Connect implements rest.Connecter.
func (r *LogREST) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	opts := options.(*v1.TargetLogOptions)
	v1.SetDefaults_TargetLogOptions(opts)
	if err := badOptions(validation.ValidateTargetLogOptions(opts)); err != nil {
		return nil, err
	}
	selected, err := driverOptions(opts, clock.RealClock{})
	if err != nil {
		return nil, err
	}
	to, err := r.access(ctx, name)
	if err != nil {
		return nil, err
	}

	var instance string
	if !opts.AllInstances {
		if instance, err = pick(to.target, opts.Instance, true); err != nil {
			return nil, err
		}
	}
	return r.stream(responder, to, instance, "log", func(w http.ResponseWriter, req *http.Request, s *session.Session, stands func()) error {
		logs := &logStream{connector: r.connector, watch: r.watch, to: to, selected: selected}
		if opts.ResumeAfter != "" {
			logs.resumed = &resumed{cursor: selected.After.Add(1)}
		}
		defer logs.close()
		names := []string{instance}
		if opts.AllInstances {
			names = instances(to.target)
		}
		// With all instances, those of the log so far are merged by time first,
		// and followed afterwards.
		first := selected
		if opts.AllInstances {
			first.Follow = false
		}
		without, err := logs.openAll(req.Context(), names, first, opts.AllInstances)
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		if len(without) > 0 {
			// Not to the recorder of the filters, which the session has left.
			header, err := utilnet.NewWarningHeader(299, "-", "without a log of a previous run: "+enumerated(without, maxWarned))
			if err != nil {
				responder.Error(err)
				return err
			}
			w.Header().Add("Warning", header)
		}
		if !opts.AllInstances {
			w.Header().Set(v1.LogInstanceHeader, instance)
			if cursor := logs.cursor(); cursor != "" {
				w.Header().Set(v1.LogCursorHeader, cursor)
			}
		}
		return streaming.ServeLog(w, req, opts.Follow, r.opts.Streaming, func(ctx context.Context, out io.Writer) error {
			out = s.CountOut(out)
			if opts.Follow {
				out = &begunWriter{out, stands}
			}
			if opts.LimitBytes != nil {
				out = &limitedWriter{out, *opts.LimitBytes}
			}
			format := &formatter{prefix: opts.Prefix, timestamps: opts.Timestamps}
			err := statusError(logs.copy(ctx, out, format, opts.AllInstances))
			if errors.Is(err, errLimit) {
				return nil
			}
			return err
		})
	}), nil
}

// maxWarned is how many instances a warning names: a header is no place for many.
const maxWarned = 50

// openAll opens the logs of instances. Of all that a target has, those that had
// no previous run where that is asked for are returned and left out, unless none
// had one.
func (l *logStream) openAll(ctx context.Context, names []string, selected driver.LogOptions, all bool) (without []string, err error) {
	for _, name := range names {
		err := l.open(ctx, name, selected)
		switch {
		case err == nil:
		case all && selected.Previous && len(names) > 1 && driver.KindOf(err) == driver.NotFound:
			without = append(without, name)
		default:
			return nil, err
		}
	}
	if len(without) > 0 && len(l.sources) == 0 {
		return nil, driver.Errorf(driver.NotFound, "none of the %d instances of target %q has a log of a previous run", len(without), l.to.target.Name)
	}
	return without, nil
}

// begunWriter says with the first write, which sends the headers or upgrades the
// connection, that a log is being answered.
type begunWriter struct {
	io.Writer
	begun func()
}

func (w *begunWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err == nil {
		w.begun()
	}
	return n, err
}

// driverOptions translates the query for drivers, which know no seconds ago.
func driverOptions(opts *v1.TargetLogOptions, c clock.PassiveClock) (driver.LogOptions, error) {
	selected := driver.LogOptions{
		Previous: opts.Previous,
		Follow:   opts.Follow,
		Tail:     opts.TailLines,
		Stream:   opts.Stream,
	}
	switch {
	case opts.SinceSeconds != nil:
		selected.Since = c.Now().Add(-time.Duration(*opts.SinceSeconds) * time.Second)
	case opts.SinceTime != nil:
		selected.Since = opts.SinceTime.Time
	case opts.ResumeAfter != "":
		after, err := time.Parse(time.RFC3339Nano, opts.ResumeAfter)
		if err != nil {
			return driver.LogOptions{}, apierrors.NewBadRequest(err.Error())
		}
		if start := time.Unix(0, 0); after.Before(start) {
			after = start // a log's beginning, also for who says year 1
		}
		// The line of the cursor itself tells what else of it the client has:
		// see resumed.
		selected.After = after.Add(-1)
	}
	return selected, nil
}

// resumed leaves out the line that the client has already: the one whose time
// is the cursor. All its parts are meant, as the client was shown the time of
// the first one alone.
type resumed struct {
	cursor time.Time
	// begun says that a line of the cursor's time was left out, and stream and
	// run are its; over that no more will be.
	begun, over bool
	stream      v1.LogStream
	run         int
}

// skips says whether the next line is left out.
func (r *resumed) skips(line driver.LogLine) bool {
	if r.over {
		return false
	}
	if r.begun {
		r.over = line.Stream != r.stream || line.Run != r.run
	} else {
		r.over = !line.Time.Equal(r.cursor)
	}
	if r.over {
		return false
	}
	r.begun, r.stream, r.run = true, line.Stream, line.Run
	r.over = !line.Partial
	return true
}

// cursor returns the time with which a client resumes that had no line yet, ""
// if it can't be told: for the previous run, as a client that resumes reads on
// through all of them.
func (l *logStream) cursor() string {
	if l.selected.Previous {
		return ""
	}
	before := l.selected.After.Add(1)
	if l.resumed == nil {
		reader, ok := l.sources[0].reader.(driver.LogCursor)
		if !ok {
			return ""
		}
		before = reader.Before()
	}
	return before.UTC().Format(driver.LogTime)
}

// logStream reads the logs of one request.
type logStream struct {
	*connector
	watch    func(ctx context.Context, options *internalversion.ListOptions) (watch.Interface, error)
	to       *access
	selected driver.LogOptions
	sources  []*logSource
	// resumed is nil unless the client goes on where it was cut off.
	resumed *resumed
}

// logSource is the log of one instance.
type logSource struct {
	instance string
	conn     driver.Conn
	reader   driver.LogReader
	// line is the next one, read but not yet written.
	line driver.LogLine
	// last is the time of the last line that was written, or one before the
	// first that is wanted: the cursor from which to go on.
	last time.Time
}

func (s *logSource) close() {
	if s.reader != nil {
		s.reader.Close()
		s.conn.Close()
		s.reader, s.conn = nil, nil
	}
}

func (l *logStream) close() {
	for _, source := range l.sources {
		source.close()
	}
}

// open adds an instance's log.
func (l *logStream) open(ctx context.Context, instance string, selected driver.LogOptions) error {
	source := &logSource{instance: instance}
	if err := l.reopen(ctx, source, selected); err != nil {
		return err
	}
	l.sources = append(l.sources, source)
	return nil
}

func (l *logStream) reopen(ctx context.Context, source *logSource, selected driver.LogOptions) error {
	conn, err := l.connector.open(ctx, l.to, source.instance)
	if err != nil {
		return err
	}
	logger, err := ability[driver.Logger](conn, l.to.target, "log")
	if err != nil {
		conn.Close()
		return err
	}
	reader, err := logger.Logs(ctx, selected)
	if err != nil {
		conn.Close()
		return err
	}
	source.conn, source.reader = conn, reader
	if reader, ok := reader.(driver.LogCursor); ok && source.last.IsZero() {
		source.last = reader.Before()
	}
	return nil
}

// copy writes the logs until they end, or ctx does.
func (l *logStream) copy(ctx context.Context, out io.Writer, format *formatter, all bool) error {
	if l.selected.Follow && all && !l.selected.Previous {
		if err := l.merge(ctx, out, format); err != nil {
			return err
		}
		l.close()
		return l.followAll(ctx, out, format)
	}
	if !l.selected.Follow || all {
		return l.merge(ctx, out, format)
	}
	source := l.sources[0]
	if reader, ok := source.reader.(driver.LogBatcher); ok {
		// The headers go out now: the first line may be long in coming.
		if _, err := out.Write(nil); err != nil {
			return err
		}
		return l.copyBatches(ctx, out, format, source, reader)
	}
	return batched(ctx, out, func(ctx context.Context, batch *batch) error {
		return source.follow(ctx, batch, format, l.resumed)
	})
}

// batchBuffers are for those who have lines to write: a follower that waits has
// none.
var batchBuffers = sync.Pool{New: func() any { return new([]byte) }}

// copyBatches writes a log as it is read: one that is shared with other clients,
// who want it in the same form, was made into text by the first of them.
func (l *logStream) copyBatches(ctx context.Context, out io.Writer, format *formatter, source *logSource, reader driver.LogBatcher) error {
	for {
		batch, err := reader.NextBatch(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if batch.Shared != nil && (l.resumed == nil || l.resumed.over) {
			key := renderKey{format.prefix, format.timestamps, source.instance, l.selected.Stream, format.pending}
			made := batch.Shared.Do(key, func() any { return format.render(nil, source.instance, batch, nil) }).(rendered)
			format.pending, source.last = made.pending, made.last
			_, err = out.Write(made.text)
		} else {
			buf := batchBuffers.Get().(*[]byte)
			made := format.render((*buf)[:0], source.instance, batch, l.resumed)
			if !made.last.IsZero() {
				source.last = made.last
				_, err = out.Write(made.text)
			}
			*buf = made.text
			batchBuffers.Put(buf)
		}
		if err != nil {
			return err
		}
	}
}

// merge writes what the open logs hold by now, in the order of the lines'
// times.
func (l *logStream) merge(ctx context.Context, out io.Writer, format *formatter) error {
	if len(l.sources) == 1 {
		if reader, ok := l.sources[0].reader.(driver.LogBatcher); ok {
			return l.copyBatches(ctx, out, format, l.sources[0], reader)
		}
	}
	buffered := bufio.NewWriterSize(out, 32<<10)
	var scratch []byte
	var ahead byTime
	next := func(source *logSource) error {
		line, err := source.reader.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		source.line = line
		heap.Push(&ahead, source)
		return nil
	}
	for _, source := range l.sources {
		if err := next(source); err != nil {
			return err
		}
	}
	for len(ahead) > 0 {
		source := heap.Pop(&ahead).(*logSource)
		if l.resumed == nil || !l.resumed.skips(source.line) {
			scratch = format.append(scratch[:0], source.instance, source.line)
			if _, err := buffered.Write(scratch); err != nil {
				return err
			}
		}
		source.last = source.line.Time
		if err := next(source); err != nil {
			return err
		}
	}
	return buffered.Flush()
}

// byTime is a heap of logs by the times of their next lines.
type byTime []*logSource

func (h byTime) Len() int           { return len(h) }
func (h byTime) Less(i, j int) bool { return h[i].line.Time.Before(h[j].line.Time) }
func (h byTime) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byTime) Push(x any)        { *h = append(*h, x.(*logSource)) }
func (h *byTime) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	*h = (*h)[:last]
	return x
}

// follow adds an instance's lines to the batch until its log ends.
func (s *logSource) follow(ctx context.Context, batch *batch, format *formatter, resumed *resumed) error {
	for {
		line, err := s.reader.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if resumed != nil && resumed.skips(line) {
			continue
		}
		if err := batch.add(ctx, format, s.instance, line); err != nil {
			return err
		}
		s.last = line.Time
	}
}

// resume returns the options that go on after what was written of an instance.
func (l *logStream) resume(source *logSource) driver.LogOptions {
	selected := l.selected
	if !source.last.IsZero() {
		selected = driver.LogOptions{Follow: true, After: source.last, Stream: selected.Stream}
	}
	return selected
}

// followAll follows all instances, those too that come while it does. It ends
// when the target is gone, or when all its instances have ended for good.
func (l *logStream) followAll(ctx context.Context, out io.Writer, format *formatter) error {
	states := make(chan *v1.Target)
	return batched(ctx, out, func(ctx context.Context, batch *batch) error {
		ctx, cancel := context.WithCancelCause(ctx)
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel(nil)

		running.Go(func() {
			if err := l.observe(ctx, states); err != nil {
				cancel(err)
			}
		})

		known := map[string]*logSource{} // by instance
		for _, source := range l.sources {
			known[source.instance] = source
		}
		open := map[string]bool{}
		ended := make(chan string)
		follow := func(name string) error {
			source := known[name]
			if source == nil {
				// It is new, and so is all of its log.
				source = &logSource{instance: name, last: time.Unix(0, 0)}
				known[name] = source
			}
			if err := l.reopen(ctx, source, l.resume(source)); err != nil {
				if driver.KindOf(err) == driver.NotFound {
					return nil // it may come yet
				}
				return err
			}
			open[name] = true
			running.Go(func() {
				err := source.follow(ctx, batch, format, nil)
				source.close()
				if err != nil {
					cancel(err)
					return
				}
				select {
				case ended <- name:
				case <-ctx.Done():
				}
			})
			return nil
		}

		target := l.to.target
		for {
			select {
			case target = <-states:
				if target == nil {
					break
				}
				for _, name := range instances(target) {
					if open[name] {
						continue
					}
					if err := follow(name); err != nil {
						return err
					}
				}
			case name := <-ended:
				delete(open, name)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if len(open) == 0 && (target == nil || finished(target)) {
				return nil
			}
		}
	})
}

// observe sends each state of the target, and nil once it is gone.
func (l *logStream) observe(ctx context.Context, states chan<- *v1.Target) error {
	send := func(target *v1.Target) {
		select {
		case states <- target:
		case <-ctx.Done():
		}
	}
	// The watch goes by the namespace in its context.
	ctx = request.WithNamespace(ctx, l.to.target.Namespace)
	for ctx.Err() == nil {
		watcher, err := l.watch(ctx, &internalversion.ListOptions{
			FieldSelector: fields.OneTermEqualSelector("metadata.name", l.to.target.Name),
		})
		if err != nil {
			return err
		}
		for event := range watcher.ResultChan() {
			switch object := event.Object.(type) {
			case *api.Target:
				target, err := toV1(object)
				if err != nil {
					watcher.Stop()
					return err
				}
				if event.Type == watch.Deleted || target.UID != l.to.target.UID {
					watcher.Stop()
					send(nil)
					return nil
				}
				send(target)
			case *metav1.Status:
				watcher.Stop()
				return apierrors.FromObject(object)
			}
		}
		watcher.Stop()
	}
	return nil
}

// finished says that no instance of a target runs or will run again, as long as
// nobody changes its spec.
func finished(target *v1.Target) bool {
	if !target.Spec.Hosted() {
		return true
	}
	for _, instance := range target.Status.Instances {
		ended := instance.State.Terminated
		if ended == nil || target.Spec.RestartPolicy.Restarts(ended.ExitCode) {
			return false
		}
	}
	return len(target.Status.Instances) > 0
}

// formatter writes lines as the client wants them.
type formatter struct {
	prefix, timestamps bool
	stamp              driver.LogStamp
	pending            pendingLine
}

// pendingLine says whether the last line isn't complete, and whose it is.
type pendingLine struct {
	begun    bool
	instance string
	stream   v1.LogStream
	run      int
}

// append adds a line to buf. Lines of different instances, runs or streams never
// mix: a line that was begun is ended by another's.
func (f *formatter) append(buf []byte, instance string, line driver.LogLine) []byte {
	goesOn := false
	if f.pending.begun {
		goesOn = f.pending == pendingLine{true, instance, line.Stream, line.Run}
		if !goesOn {
			buf = append(buf, '\n')
		}
	}
	if !goesOn {
		if f.prefix {
			buf = append(buf, '[')
			buf = append(buf, instance...)
			buf = append(buf, "] "...)
		}
		if f.timestamps {
			buf = f.stamp.Append(buf, line.Time)
			buf = append(buf, ' ')
		}
	}
	buf = append(buf, line.Data...)
	if line.Partial {
		f.pending = pendingLine{true, instance, line.Stream, line.Run}
	} else {
		buf = append(buf, '\n')
		f.pending = pendingLine{}
	}
	return buf
}

// rendered is a batch as a client gets it. last is the time of its last line,
// and pending what the next one may go on with.
type rendered struct {
	text    []byte
	last    time.Time
	pending pendingLine
}

// renderKey is all that the text of a batch depends on, besides its lines.
type renderKey struct {
	prefix, timestamps bool
	instance           string
	stream             v1.LogStream
	pending            pendingLine
}

// render appends the lines of a batch to buf.
func (f *formatter) render(buf []byte, instance string, batch driver.LogBatch, resumed *resumed) rendered {
	var last time.Time
	for line := range batch.Lines {
		if resumed != nil && resumed.skips(line) {
			continue
		}
		buf = f.append(buf, instance, line)
		last = line.Time
	}
	return rendered{buf, last, f.pending}
}

// batch gathers lines while the client is written to: a client that keeps up
// gets each line at once, one that doesn't gets them in large writes, and a
// slow one holds its producers back at batchSize bytes.
type batch struct {
	mu     sync.Mutex
	room   sync.Cond // on mu: buf was emptied, or the context has ended
	buf    []byte    // guarded by mu
	filled chan struct{}
}

const batchSize = 64 << 10

// add formats a line into the batch, waiting for room.
func (b *batch) add(ctx context.Context, format *formatter, instance string, line driver.LogLine) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.buf) >= batchSize && ctx.Err() == nil {
		b.room.Wait()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	b.buf = format.append(b.buf, instance, line)
	select {
	case b.filled <- struct{}{}:
	default: // the writer has been told
	}
	return nil
}

// take exchanges what was gathered for an empty buffer.
func (b *batch) take(empty []byte) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	full := b.buf
	b.buf = empty[:0]
	b.room.Broadcast()
	return full
}

// batched writes to out what produce adds to a batch, until produce returns.
func batched(ctx context.Context, out io.Writer, produce func(context.Context, *batch) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b := &batch{filled: make(chan struct{}, 1)}
	b.room.L = &b.mu
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.room.Broadcast()
	})
	defer stop()

	produced := make(chan error, 1)
	go func() { produced <- produce(ctx, b) }()

	// The headers go out now: the first line may be long in coming.
	_, err := out.Write(nil)
	var spare []byte
	for err == nil {
		select {
		case <-b.filled:
			spare = b.take(spare)
			_, err = out.Write(spare)
		case err := <-produced:
			if rest := b.take(nil); len(rest) > 0 {
				if _, err := out.Write(rest); err != nil {
					return err
				}
			}
			return err
		}
	}
	cancel(err)
	<-produced
	return err
}

// limitedWriter writes so many bytes, and then fails with errLimit.
type limitedWriter struct {
	out  io.Writer
	left int64
}

var errLimit = errors.New("the limit of bytes is reached")

func (w *limitedWriter) Write(p []byte) (int, error) {
	if int64(len(p)) < w.left {
		n, err := w.out.Write(p)
		w.left -= int64(n)
		return n, err
	}
	n, err := w.out.Write(p[:w.left])
	w.left -= int64(n)
	if err == nil {
		err = errLimit
	}
	return n, err
}
