package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/ptr"

	informers "aaserver.io/aaserver/apis/generated/informers/externalversions/streaming/v1"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// drainTime is how long the streams of a target that was deleted, or isn't
	// selected any more, may go on, for its last lines.
	drainTime = 5 * time.Second
	// maxRemembered is of how many such targets it is known what was printed,
	// in case they are selected again.
	maxRemembered = 256
	// maxRetryDelay bounds the growing pauses between attempts to resume.
	maxRetryDelay = 30 * time.Second
)

var (
	// errLimit ends the streams of a target of which --limit-bytes were
	// printed.
	errLimit = errors.New("the limit of bytes is reached")
	// errOver ends the follower of one target, whose log has ended.
	errOver = errors.New("the log has ended")
)

// lockedWriter lets many streams report.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// follower follows the logs of the targets that a selector selects, or of one
// target, with one stream for each instance:
//
//	           added, or runs anew           ended, removed
//	instance ─────────────────────▶ stream ─────────────────▶ ended
//	                                 │  ▲                       │
//	                      broke off  ▼  │ resumed               │ runs anew,
//	                                 pause           stream ◀───┘ selected again
//
// A stream that broke off is resumed at its position, so that no line is lost
// and none comes twice. Of many instances that are there at the beginning, what
// they have written is read first, to its end, and merged by time; then each is
// followed from there.
type follower struct {
	conn   *logClient
	out    *merger
	query  *v1.TargetLogOptions
	errOut io.Writer
	quiet  bool
	// only is the one target that is followed, "" with a selector. What is
	// wrong with it ends the command.
	only string
	// retryDelay is the first pause before a stream is resumed.
	retryDelay time.Duration
	drainTime  time.Duration
	// started is when it began to look, by the server's clock if that is known.
	started time.Time

	ctx     context.Context
	cancel  context.CancelCauseFunc
	streams sync.WaitGroup

	// mu protects what follows, and what the targets hold. It is taken before
	// the merger's.
	mu      sync.Mutex
	targets map[types.UID]*followedTarget
	// removed are the targets that have gone, the first one first.
	removed []types.UID
	// beginning is set while the targets are added that are there at first.
	beginning bool
	// lost has what isn't connected: instances, and the follower itself for its
	// watch. The user is told when the first one comes, and when the last one
	// is connected again.
	lost map[any]bool
}

// followedTarget is a target for as long as it exists: one that was created
// anew under its name is another.
type followedTarget struct {
	// target is the last state known, nil once it has gone.
	target *v1.Target
	// ctx is that of the streams. It is another one when the target is selected
	// again.
	ctx    context.Context
	cancel context.CancelCauseFunc
	// drain ends the streams of a target that has gone.
	drain *time.Timer
	// instances are those that have or had a stream.
	instances map[string]*followedInstance
	// listed are the instances of the states known.
	listed map[string]bool
	// limit is how much is printed of it, nil if all is.
	limit *byteLimit
}

type followedInstance struct {
	streaming bool
	// run is the run of the instance that was the last one known when its
	// stream ended.
	run string
	// fresh says that it came while its target was followed: all it wrote is
	// new.
	fresh bool
	position
	// opened is when its first stream was opened, zero if none was.
	opened time.Time
}

// followSelected follows the targets that a selector selects, until ctx ends.
func (f *follower) followSelected(selector string) error {
	return f.followAll(metav1.ListOptions{LabelSelector: selector})
}

// followTarget follows one target until its log ends: the log of an instance,
// or those of all, the ones that come later too.
func (f *follower) followTarget(name string) error {
	f.only = name
	if f.query.AllInstances {
		return f.followAll(metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	}
	t := f.newTarget()
	instance := f.query.Instance
	if instance == "" {
		// Its name is needed to resume. Who may read logs alone has it from the
		// lines' prefix.
		target, err := f.conn.clientset.StreamingV1().Targets(f.conn.namespace).Get(f.ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsForbidden(err):
		case err != nil:
			return err
		default:
			if best := f.candidates(target); len(best) > 0 {
				instance = best[0].Name
			}
		}
	}
	f.mu.Lock()
	t.instances[instance] = &followedInstance{}
	f.stream(t, instance, t.instances[instance])
	f.mu.Unlock()
	go f.out.run()
	f.streams.Wait()
	return f.over()
}

// over returns why it has ended.
func (f *follower) over() error {
	err := context.Cause(f.ctx)
	if err == nil || errors.Is(err, errOver) {
		return f.out.finish()
	}
	f.out.abort()
	return err
}

func newFollower(ctx context.Context, conn *logClient, out *merger, errOut io.Writer, query *v1.TargetLogOptions) *follower {
	ctx, cancel := context.WithCancelCause(ctx)
	f := &follower{
		ctx:        ctx,
		cancel:     cancel,
		conn:       conn,
		out:        out,
		query:      query,
		errOut:     &lockedWriter{w: errOut},
		retryDelay: time.Second,
		drainTime:  drainTime,
		started:    time.Now().Truncate(time.Second),
		targets:    map[types.UID]*followedTarget{},
		lost:       map[any]bool{},
	}
	out.failed = func(err error) { f.cancel(err) }
	context.AfterFunc(ctx, func() {
		if !errors.Is(context.Cause(ctx), errOver) {
			out.end(errMergerEnded) // streams may wait for it
		}
	})
	return f
}

func (f *follower) newTarget() *followedTarget {
	t := &followedTarget{instances: map[string]*followedInstance{}, listed: map[string]bool{}}
	t.ctx, t.cancel = context.WithCancelCause(f.ctx)
	if f.query.LimitBytes != nil {
		t.limit = &byteLimit{left: *f.query.LimitBytes, reached: func() { t.cancel(errLimit) }}
	}
	return t
}

// finished says that no instance of a target runs or will run again, as long as
// nobody changes its spec.
func finished(target *v1.Target) bool {
	if !target.Spec.Hosted() {
		return true
	}
	for i := range target.Status.Instances {
		ended := target.Status.Instances[i].State.Terminated
		if ended == nil || target.Spec.RestartPolicy.Restarts(ended.ExitCode) {
			return false
		}
	}
	return len(target.Status.Instances) > 0
}

// disconnected notes what isn't connected any more, and tells the user of the
// first: when a server goes, all streams break off.
func (f *follower) disconnected(who any, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	first := len(f.lost) == 0
	f.lost[who] = true
	if !first || f.quiet {
		return
	}
	fmt.Fprintf(f.errOut, "warning: the connection to the server was lost and is being retried%s\n", reason(err))
}

// connected notes what is connected again. mu is held.
func (f *follower) connected(who any) {
	if !f.lost[who] {
		return
	}
	delete(f.lost, who)
	if len(f.lost) == 0 && !f.quiet {
		fmt.Fprintln(f.errOut, "The connection to the server stands again: the log goes on where it was.")
	}
}

// reason is what is known of why a stream broke off.
func reason(err error) string {
	var status *apierrors.StatusError
	var broken *brokenLog
	switch {
	case errors.As(err, &status):
		return ": " + status.ErrStatus.Message
	case errors.Is(err, errUnheard):
		return ": " + errUnheard.Error()
	case errors.As(err, &broken) && broken.told:
		return ": " + broken.err.Error()
	}
	return ""
}

// sleep says whether ctx let it.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// verbose tells who wants to know, by -v.
func (f *follower) verbose(format string, args ...any) {
	if klog.V(1).Enabled() {
		fmt.Fprintf(f.errOut, format+"\n", args...)
	}
}

// followAll follows what is listed until the context ends, the output can't be
// written any more, or the log of the one target has ended.
func (f *follower) followAll(list metav1.ListOptions) error {
	defer f.cancel(nil)
	// The informer below keeps trying whatever the error. What is wrong from
	// the beginning is told, and ends the command.
	var resp *http.Response
	found, err := listTargets(context.WithValue(f.ctx, responseKey{}, &resp), f.conn.connection, list)
	if err != nil {
		return err
	}
	if resp != nil {
		if now, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			f.started = now
		}
	}
	if len(found) == 0 {
		if f.only != "" {
			return apierrors.NewNotFound(v1.Resource("targets"), f.only)
		}
		fmt.Fprintf(f.errOut, "No resources found in %s namespace. Waiting for them.\n", f.conn.namespace)
	}
	informer := informers.NewFilteredTargetInformer(f.conn.clientset, f.conn.namespace, 0, cache.Indexers{},
		func(options *metav1.ListOptions) {
			options.LabelSelector, options.FieldSelector = list.LabelSelector, list.FieldSelector
		})
	told := ""
	if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		// A watch ends now and then, and begins anew.
		if errors.Is(err, io.EOF) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || f.ctx.Err() != nil {
			return
		}
		if transient(err) {
			f.mu.Lock()
			watched := len(f.targets) > len(f.removed) // or nobody would tell that it is back
			f.mu.Unlock()
			if watched {
				f.disconnected(f, err)
			}
			return
		}
		if f.only != "" {
			f.cancel(err)
			return
		}
		if message, _ := describe(err); message != told {
			told = message
			fmt.Fprintf(f.errOut, "warning: watching targets failed and is tried again: %s\n", message)
		}
	}); err != nil {
		return err
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { f.update(obj.(*v1.Target)) },
		UpdateFunc: func(old, obj any) {
			// A deletion and a creation that were missed look like an update.
			if before, now := old.(*v1.Target), obj.(*v1.Target); before.UID != now.UID {
				f.remove(before.UID)
			}
			f.update(obj.(*v1.Target))
		},
		DeleteFunc: func(obj any) {
			if tombstone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = tombstone.Obj
			}
			if target, ok := obj.(*v1.Target); ok {
				f.remove(target.UID)
			}
		},
	}); err != nil {
		return err
	}
	f.mu.Lock()
	f.beginning = true
	f.mu.Unlock()
	for i := range found {
		f.update(&found[i])
	}
	f.mu.Lock()
	f.beginning = false
	f.mu.Unlock()
	go f.out.run()
	informer.RunWithContext(quiet(f.ctx))
	// No handler may add a stream while we wait.
	f.mu.Lock()
	for uid, t := range f.targets {
		t.end()
		delete(f.targets, uid)
	}
	f.mu.Unlock()
	f.streams.Wait()
	return f.over()
}

// update starts the streams that a new state of a target calls for.
func (f *follower) update(target *v1.Target) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return
	}
	f.connected(f)
	t, ok := f.targets[target.UID]
	switch {
	case !ok:
		t = f.newTarget()
		f.targets[target.UID] = t
	case t.target == nil:
		// It is selected again: its streams go on if they haven't ended, and
		// are resumed after what was printed if they have.
		if t.drain != nil {
			t.drain.Stop()
		}
		f.removed = slices.DeleteFunc(f.removed, func(uid types.UID) bool { return uid == target.UID })
		if t.ctx.Err() != nil && !errors.Is(context.Cause(t.ctx), errLimit) {
			t.ctx, t.cancel = context.WithCancelCause(f.ctx)
		}
	}
	known := ok || f.beginning
	if !known && !target.CreationTimestamp.Time.Before(f.started) {
		known = true
	}
	t.target = target
	f.reconcile(t, known)
	for i := range target.Status.Instances {
		t.listed[target.Status.Instances[i].Name] = true
	}
	f.endOnly(t)
}

// endOnly ends the follower when the log of its one target has ended. mu is
// held.
func (f *follower) endOnly(t *followedTarget) {
	if f.only != "" && !t.streaming() && (t.target == nil || t.ctx.Err() != nil || f.query.AllInstances && finished(t.target)) {
		f.cancel(errOver)
	}
}

// remove lets the streams of a target that has gone drain. What was printed of
// it is remembered: it may still exist, and be selected again.
func (f *follower) remove(uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.connected(f)
	t, ok := f.targets[uid]
	if !ok || t.target == nil {
		return
	}
	t.target = nil
	f.removed = append(f.removed, uid)
	if len(f.removed) > maxRemembered {
		f.targets[f.removed[0]].end()
		delete(f.targets, f.removed[0])
		f.removed = slices.Delete(f.removed, 0, 1)
	}
	if !t.streaming() {
		t.cancel(nil)
		f.endOnly(t)
		return
	}
	t.drain = time.AfterFunc(f.drainTime, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if t.target == nil {
			t.cancel(nil)
		}
	})
}

// end ends the streams of a target for good.
func (t *followedTarget) end() {
	t.cancel(nil)
	if t.drain != nil {
		t.drain.Stop()
	}
}

func (t *followedTarget) streaming() bool {
	for _, instance := range t.instances {
		if instance.streaming {
			return true
		}
	}
	return false
}

// run identifies a run of an instance, "" if it doesn't run.
func runOf(instance *v1.InstanceStatus) string {
	if instance.State.Running == nil {
		return ""
	}
	return fmt.Sprintf("%d@%s", instance.RestartCount, instance.State.Running.StartedAt.UTC().Format(time.RFC3339))
}

// reconcile starts a stream for each instance that has none and that was never
// followed, or has begun to run anew. watched says that the target has been
// looked at all the time, so that an instance that wasn't listed before is new.
// mu is held.
func (f *follower) reconcile(t *followedTarget, watched bool) {
	if t.target == nil || t.ctx.Err() != nil || !f.query.AllInstances && t.streaming() {
		return
	}
	for _, status := range f.candidates(t.target) {
		instance, known := t.instances[status.Name]
		if known && (instance.streaming || runOf(&status) == "" || runOf(&status) == instance.run) {
			continue
		}
		if !known {
			instance = &followedInstance{fresh: watched && !f.beginning && !t.listed[status.Name]}
			t.instances[status.Name] = instance
		}
		f.stream(t, status.Name, instance)
		if !f.query.AllInstances {
			return
		}
	}
}

// candidates returns the instances to follow, the best ones first: of a target
// of which one instance is followed it is the first ready one, or else the
// first.
func (f *follower) candidates(target *v1.Target) []v1.InstanceStatus {
	instances := slices.Clone(target.Status.Instances)
	if !f.query.AllInstances {
		slices.SortStableFunc(instances, func(a, b v1.InstanceStatus) int {
			switch {
			case a.Ready == b.Ready:
				return 0
			case a.Ready:
				return -1
			}
			return 1
		})
		if len(instances) > 0 && !instances[0].Ready {
			// The others aren't better.
			instances = instances[:1]
		}
	}
	return instances
}

// stream starts the stream of an instance. mu is held.
func (f *follower) stream(t *followedTarget, name string, instance *followedInstance) {
	instance.streaming = true
	target := f.only
	if target == "" {
		target = t.target.Name
	}
	state := sourceAway
	if f.beginning {
		state = sourcePast
	}
	s := &instanceStream{follower: f, t: t, ctx: t.ctx, instance: instance, past: f.beginning,
		origin: &origin{target: target, instance: name, limit: t.limit}, to: f.out.source(state)}
	f.streams.Go(s.run)
}

// instanceStream follows an instance until its log has ended.
type instanceStream struct {
	*follower
	t        *followedTarget
	ctx      context.Context
	instance *followedInstance
	origin   *origin
	to       *lineSource
	// past is set until what there was at the beginning has been read.
	past bool
	// stands is since when there is a connection, zero if there was none.
	stands time.Time
}

func (s *instanceStream) run() {
	defer s.ended()
	delay := time.Duration(0)
	for {
		s.stands = time.Time{}
		before := s.instance.position
		err := s.once()
		var output *outputError
		var broken *brokenLog
		switch {
		case s.ctx.Err() != nil:
			return
		case err == nil && s.past:
			s.past = false
			s.to.set(sourceLive)
			continue
		case err == nil:
			return
		case errors.As(err, &output):
			s.cancel(output)
			return
		case errors.Is(err, errUnheard) && errors.As(err, &broken) && s.instance.cursor() != "":
			// Over HTTP/1.1 nobody knows whether a log is quiet or its server
			// gone: it is opened anew, where it was.
			continue
		case apierrors.IsNotFound(err):
			// The status may be ahead of the log, or behind it.
			listed, gone := s.listed()
			if !listed {
				if s.only != "" && gone == nil && !s.query.AllInstances {
					gone = err
				}
				if gone != nil {
					s.cancel(gone)
				}
				return
			}
		case s.only != "" && s.instance.opened.IsZero() && !s.query.AllInstances:
			s.cancel(err) // it never was there
			return
		case transient(err):
			if s.instance.position != before {
				delay = 0
			}
			s.disconnected(s.instance, err)
		case s.only != "":
			s.cancel(err)
			return
		default:
			message, _ := describe(err)
			fmt.Fprintf(s.errOut, "%s (target %q)\n", message, s.origin.target)
			return
		}
		s.past = false // the others don't wait
		s.to.set(sourceAway)
		stood := time.Duration(0)
		if !s.stands.IsZero() {
			stood = time.Since(s.stands)
		}
		delay = nextDelay(s.retryDelay, delay, stood)
		// A server that is lost is lost to many at once.
		if !sleep(s.ctx, delay/2+rand.N(delay)) {
			return
		}
	}
}

// nextDelay returns about how long to wait before a stream is resumed, after the
// last such pause, 0 if there was none that matters, and after it stood for some
// time. A log may be quiet: a connection that outlives the pause before it was
// a success, too.
func nextDelay(first, last, stood time.Duration) time.Duration {
	if last == 0 || stood > last {
		return first
	}
	return min(2*last, maxRetryDelay)
}

// once streams until the log ends or breaks off.
func (s *instanceStream) once() error {
	query := s.resume(s.origin.instance, s.instance)
	query.Follow = !s.past
	return s.conn.stream(s.ctx, s.origin.target, query, func(resp *http.Response, body io.Reader) error {
		s.stands = time.Now()
		s.mu.Lock()
		s.connected(s.instance)
		s.mu.Unlock()
		if name := resp.Header.Get(v1.LogInstanceHeader); name != "" && s.origin.instance == "" {
			named := *s.origin
			named.instance = name
			s.origin = &named
		}
		if s.instance.opened.IsZero() {
			s.instance.opened = time.Now()
			s.verbose("Following %s.", s.origin)
		}
		if s.instance.cursor() == "" {
			s.instance.before = resp.Header.Get(cursorHeader)
		}
		if !s.past {
			s.to.set(sourceLive)
		}
		from := func([]byte) *origin { return s.origin }
		if query.Prefix {
			from = func(name []byte) *origin {
				if s.origin.instance == "" {
					named := *s.origin
					named.instance = string(name)
					s.origin = &named
				}
				return s.origin
			}
		}
		lines := &logReader{to: s.to, from: from, prefixed: query.Prefix, max: lineBuffer, goesOn: s.past}
		return lines.read(body, &s.instance.position)
	})
}

// ended is called when nothing more is streamed.
func (s *instanceStream) ended() {
	s.to.close()
	if s.ctx.Err() == nil {
		s.verbose("The log of %s has ended.", s.origin)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t, instance := s.t, s.instance
	instance.streaming = false
	if s.ctx.Err() == nil {
		s.connected(instance) // by what has said that there is nothing more
	}
	delete(s.lost, instance)
	switch {
	case s.only != "" && !s.query.AllInstances:
		return
	case t.target == nil:
		if !t.streaming() {
			t.cancel(nil) // drained
		}
	default:
		instance.run = ""
		for i := range t.target.Status.Instances {
			// A stream that was cut off hasn't seen the run's end.
			if status := &t.target.Status.Instances[i]; status.Name == s.origin.instance && s.ctx.Err() == nil {
				instance.run = runOf(status)
			}
		}
		s.reconcile(t, true)
	}
	s.endOnly(t)
}

// listed says whether an instance is in the status of its target, or why the
// target is gone.
func (s *instanceStream) listed() (bool, error) {
	s.mu.Lock()
	target := s.t.target
	s.mu.Unlock()
	if s.only != "" {
		var err error
		target, err = s.conn.clientset.StreamingV1().Targets(s.conn.namespace).Get(s.ctx, s.only, metav1.GetOptions{})
		if err != nil {
			return transient(err), err
		}
	}
	return target != nil && slices.ContainsFunc(target.Status.Instances, func(i v1.InstanceStatus) bool { return i.Name == s.origin.instance }), nil
}

// resume returns the options of the next stream of an instance.
func (f *follower) resume(name string, instance *followedInstance) *v1.TargetLogOptions {
	query := f.query.DeepCopy()
	query.Instance = name
	query.AllInstances = false
	// The client needs the times, and writes what was asked for itself.
	query.Timestamps = true
	query.Prefix = name == ""
	query.LimitBytes = nil
	whole := func() { query.TailLines, query.SinceSeconds, query.SinceTime = nil, nil, nil }
	switch {
	case instance.cursor() != "" && name != "":
		query.ResumeAfter = instance.cursor()
		whole()
	case instance.fresh:
		whole()
	case !instance.opened.IsZero():
		// There were no lines, and an old server. All that came since are
		// wanted, rather one too many than one too few.
		elapsed := int64(time.Since(instance.opened)/time.Second) + 1
		switch {
		case ptr.Deref(query.TailLines, -1) == 0:
			query.SinceSeconds, query.SinceTime = ptr.To(elapsed), nil
		case query.SinceSeconds != nil:
			query.SinceSeconds = ptr.To(*query.SinceSeconds + elapsed)
		}
		query.TailLines = nil
	}
	return query
}
