package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
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
	// pollInterval is the time between looks at a single target, for instances
	// that come later.
	pollInterval = 2 * time.Second
	// maxRetryDelay bounds the growing pauses between attempts to resume.
	maxRetryDelay = 30 * time.Second
)

// errLimit ends the streams of a target of which --limit-bytes were printed.
var errLimit = errors.New("the limit of bytes is reached")

// follower follows the logs of the targets that a selector selects, or of one
// target from when its stream broke off, with one stream for each instance:
//
//	           added, or runs anew           ended, removed
//	instance ─────────────────────▶ stream ─────────────────▶ ended
//	                                 │  ▲                       │
//	                      broke off  ▼  │ resumed               │ runs anew,
//	                                 pause           stream ◀───┘ selected again
//
// Lines carry their times, which strictly increase for an instance: a stream
// that broke off is resumed after the last line that was printed, so that none
// is lost and none comes twice.
type follower struct {
	conn   *connection
	out    *merger
	query  *v1.TargetLogOptions
	errOut io.Writer
	// only is the one target that is followed, "" with a selector. What is
	// wrong with it ends the command.
	only string
	// retryDelay is the first pause before a stream is resumed.
	retryDelay time.Duration
	drainTime  time.Duration

	ctx     context.Context
	cancel  context.CancelCauseFunc
	streams sync.WaitGroup
	// ended is told when a stream has ended.
	ended chan struct{}

	// mu protects what follows, and what the targets hold.
	mu      sync.Mutex
	targets map[types.UID]*followedTarget
	// removed are the targets that have gone, the first one first.
	removed []types.UID
	// lost has what isn't connected: instances, targets that are looked for,
	// and the follower itself for its watch. The user is told when the first
	// one comes.
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
	// opened is when a stream of all instances was opened, zero if none was.
	opened time.Time
	// printed counts the bytes that were, where there is a limit to them.
	printed atomic.Int64
}

type followedInstance struct {
	streaming bool
	// run is the run of the instance that was the last one known when its
	// stream ended.
	run string
	// cursor is the time of the last line that was printed.
	cursor string
	last   time.Time
	// opened is when its first stream was opened, zero if none was.
	opened time.Time
}

// followSelected follows until ctx ends.
func followSelected(ctx context.Context, c *client, conn *connection, out *merger, selector string, query *v1.TargetLogOptions) error {
	// The informer below keeps trying whatever the error. What is wrong from
	// the beginning is told, and ends the command.
	list, err := conn.clientset.StreamingV1().Targets(conn.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector, Limit: 1})
	if err != nil {
		return err
	}
	if len(list.Items) == 0 {
		fmt.Fprintf(c.ErrOut, "No resources found in %s namespace. Waiting for them.\n", conn.namespace)
	}
	f := newFollower(ctx, conn, out, &lockedWriter{w: c.ErrOut}, query)
	return f.run(selector)
}

// followTarget follows one target until its log ends. The server merges the
// logs of all instances: there is one stream, until it breaks off.
func followTarget(ctx context.Context, c *client, conn *connection, out *merger, target string, query *v1.TargetLogOptions) error {
	f := newFollower(ctx, conn, out, &lockedWriter{w: c.ErrOut}, query)
	defer f.cancel(nil)
	f.only = target
	t := f.newTarget()
	defer t.cancel(nil)

	options := f.options()
	// The names of the instances, to know what to resume.
	options.Prefix = true
	err := conn.copyLog(t.ctx, target, options, func(body io.Reader) error {
		t.opened = time.Now()
		return out.copy(body, f.printAll(t))
	})
	var broken *brokenLog
	switch {
	case errors.Is(context.Cause(t.ctx), errLimit):
		return nil
	case err == nil || ctx.Err() != nil || !errors.As(err, &broken):
		return err
	}
	return f.resumeTarget(t, err)
}

func newFollower(ctx context.Context, conn *connection, out *merger, errOut io.Writer, query *v1.TargetLogOptions) *follower {
	ctx, cancel := context.WithCancelCause(ctx)
	return &follower{
		ctx:        ctx,
		cancel:     cancel,
		conn:       conn,
		out:        out,
		query:      query,
		errOut:     errOut,
		retryDelay: time.Second,
		drainTime:  drainTime,
		ended:      make(chan struct{}, 1),
		targets:    map[types.UID]*followedTarget{},
		lost:       map[any]bool{},
	}
}

func (f *follower) newTarget() *followedTarget {
	t := &followedTarget{instances: map[string]*followedInstance{}}
	t.ctx, t.cancel = context.WithCancelCause(f.ctx)
	return t
}

// resumeTarget goes on where the stream of the one target broke off.
func (f *follower) resumeTarget(t *followedTarget, err error) error {
	defer f.streams.Wait()
	defer f.cancel(nil)
	f.disconnected(t, err)
	if !sleep(f.ctx, f.retryDelay) {
		return context.Cause(f.ctx)
	}
	f.mu.Lock()
	if name := f.query.Instance; name != "" && t.instances[name] == nil {
		t.instances[name] = &followedInstance{opened: t.opened}
	}
	for name, instance := range t.instances {
		f.stream(t, name, instance)
	}
	if !f.query.AllInstances && len(t.instances) > 0 {
		// Nobody looks for more.
		delete(f.lost, t)
	}
	f.mu.Unlock()
	for {
		f.mu.Lock()
		look := f.query.AllInstances || len(t.instances) == 0
		f.mu.Unlock()
		if look {
			if err := f.look(t); err != nil {
				f.drain(t)
				return err
			}
		}
		f.mu.Lock()
		over := len(t.instances) > 0 && !t.streaming() && (!look || !f.query.AllInstances || t.target != nil && finished(t.target))
		f.mu.Unlock()
		if over || f.ctx.Err() != nil || errors.Is(context.Cause(t.ctx), errLimit) {
			return context.Cause(f.ctx)
		}
		timer := time.NewTimer(pollInterval)
		select {
		case <-f.ended:
		case <-timer.C:
		case <-f.ctx.Done():
		}
		timer.Stop()
	}
}

// look finds the instances of the one target that aren't followed yet. It fails
// if the target is gone, or the server refuses to show it.
func (f *follower) look(t *followedTarget) error {
	target, err := f.conn.clientset.StreamingV1().Targets(f.conn.namespace).Get(f.ctx, f.only, metav1.GetOptions{})
	if f.ctx.Err() != nil {
		return context.Cause(f.ctx)
	}
	if err != nil {
		if transient(err) {
			f.disconnected(t, err)
			return nil
		}
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if t.target != nil && t.target.UID != target.UID {
		return apierrors.NewNotFound(v1.Resource("targets"), f.only)
	}
	t.target = target
	f.reconcile(t)
	if len(t.instances) > 0 {
		delete(f.lost, t)
	}
	return nil
}

// drain waits for the last lines of the one target, which is gone.
func (f *follower) drain(t *followedTarget) {
	timer := time.NewTimer(f.drainTime)
	defer timer.Stop()
	for {
		f.mu.Lock()
		t.target = nil
		streaming := t.streaming()
		f.mu.Unlock()
		if !streaming {
			return
		}
		select {
		case <-f.ended:
		case <-timer.C:
			return
		case <-f.ctx.Done():
			return
		}
	}
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
	first := len(f.lost) == 0
	f.lost[who] = true
	f.mu.Unlock()
	if !first {
		return
	}
	reason := ""
	var status *apierrors.StatusError
	if errors.As(err, &status) {
		reason = ": " + status.ErrStatus.Message
	}
	fmt.Fprintf(f.errOut, "warning: the connection to the server was lost and is being retried%s\n", reason)
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

// run follows until the context ends, or the output can't be written any more.
func (f *follower) run(selector string) error {
	defer f.cancel(nil)
	informer := informers.NewFilteredTargetInformer(f.conn.clientset, f.conn.namespace, 0, cache.Indexers{},
		func(options *metav1.ListOptions) { options.LabelSelector = selector })
	told := ""
	if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		// A watch ends now and then, and begins anew.
		if errors.Is(err, io.EOF) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || f.ctx.Err() != nil {
			return
		}
		if transient(err) {
			f.disconnected(f, err)
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
	informer.RunWithContext(quiet(f.ctx))
	// No handler may add a stream while we wait.
	f.mu.Lock()
	for uid, t := range f.targets {
		t.end()
		delete(f.targets, uid)
	}
	f.mu.Unlock()
	f.streams.Wait()
	return context.Cause(f.ctx)
}

// update starts the streams that a new state of a target calls for.
func (f *follower) update(target *v1.Target) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return
	}
	delete(f.lost, f)
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
	t.target = target
	f.reconcile(t)
}

// remove lets the streams of a target that has gone drain. What was printed of
// it is remembered: it may still exist, and be selected again.
func (f *follower) remove(uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
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
// followed, or has begun to run anew. f.mu is held.
func (f *follower) reconcile(t *followedTarget) {
	if t.target == nil || t.ctx.Err() != nil {
		return
	}
	if !f.query.AllInstances && (t.streaming() || f.only != "" && len(t.instances) > 0) {
		return
	}
	for _, status := range f.candidates(t.target) {
		instance, known := t.instances[status.Name]
		if known && (instance.streaming || runOf(&status) == "" || runOf(&status) == instance.run) {
			continue
		}
		if !known {
			instance = &followedInstance{opened: t.opened}
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

// stream starts the stream of an instance. f.mu is held.
func (f *follower) stream(t *followedTarget, name string, instance *followedInstance) {
	instance.streaming = true
	if f.lost[t] {
		// The user knows.
		f.lost[instance] = true
	}
	ctx, target := t.ctx, f.only
	if target == "" {
		target = t.target.Name
	}
	f.streams.Go(func() { f.follow(ctx, t, target, name, instance) })
}

// follow streams an instance's log until it has ended, and resumes it when it
// breaks off.
func (f *follower) follow(ctx context.Context, t *followedTarget, target, name string, instance *followedInstance) {
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		instance.streaming = false
		delete(f.lost, instance)
		select {
		case f.ended <- struct{}{}:
		default: // it has been told
		}
		if t.target == nil {
			if f.only == "" && !t.streaming() {
				t.cancel(nil) // drained
			}
			return
		}
		instance.run = ""
		for i := range t.target.Status.Instances {
			// A stream that was cut off hasn't seen the run's end.
			if status := &t.target.Status.Instances[i]; status.Name == name && ctx.Err() == nil {
				instance.run = runOf(status)
			}
		}
		f.reconcile(t)
	}()
	delay := f.retryDelay
	for {
		before := instance.last
		err := f.conn.copyLog(ctx, target, f.resume(name, instance), func(body io.Reader) error {
			f.mu.Lock()
			delete(f.lost, instance)
			f.mu.Unlock()
			if instance.opened.IsZero() {
				instance.opened = time.Now()
			}
			return f.out.copy(body, f.print(t, name, instance))
		})
		var output *outputError
		switch {
		case err == nil || ctx.Err() != nil:
			return
		case errors.As(err, &output):
			f.cancel(output)
			return
		case apierrors.IsNotFound(err) && !f.query.Previous:
			// The status may be ahead of the log, or behind it.
			if !f.lists(t, name) {
				if f.only != "" && !f.query.AllInstances {
					f.cancel(err)
				}
				return
			}
		case transient(err):
			if instance.last != before {
				delay = f.retryDelay
			}
			f.disconnected(instance, err)
		case f.only != "":
			f.cancel(err)
			return
		default:
			message, _ := describe(err)
			fmt.Fprintf(f.errOut, "%s (target %q)\n", message, target)
			return
		}
		if !sleep(ctx, delay) {
			return
		}
		delay = min(2*delay, maxRetryDelay)
	}
}

// lists says whether an instance is in the status of its target.
func (f *follower) lists(t *followedTarget, name string) bool {
	f.mu.Lock()
	target := t.target
	f.mu.Unlock()
	if f.only != "" {
		var err error
		target, err = f.conn.clientset.StreamingV1().Targets(f.conn.namespace).Get(f.ctx, f.only, metav1.GetOptions{})
		if err != nil {
			return transient(err)
		}
	}
	return target != nil && slices.ContainsFunc(target.Status.Instances, func(i v1.InstanceStatus) bool { return i.Name == name })
}

// transient says whether trying again may help: the server wasn't reached,
// isn't up to it now, or the log broke off.
func transient(err error) bool {
	var status *apierrors.StatusError
	if !errors.As(err, &status) {
		return true
	}
	switch code := status.ErrStatus.Code; code {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooManyRequests:
		return true
	default:
		return code >= http.StatusInternalServerError
	}
}

// options returns those of the first stream. The client needs the times, and
// writes what was asked for itself.
func (f *follower) options() *v1.TargetLogOptions {
	query := f.query.DeepCopy()
	query.Timestamps = true
	query.Prefix = false
	query.LimitBytes = nil
	return query
}

// resume returns the options of the next stream of an instance.
func (f *follower) resume(name string, instance *followedInstance) *v1.TargetLogOptions {
	query := f.options()
	query.Instance = name
	query.AllInstances = false
	switch {
	case instance.cursor != "":
		query.ResumeAfter = instance.cursor
		query.TailLines, query.SinceSeconds, query.SinceTime = nil, nil, nil
		query.Previous = false
	case !instance.opened.IsZero():
		// There were no lines. All that came since are wanted, rather one too
		// many than one too few.
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

// printAll returns what becomes of the lines of a stream of any instances, each
// with its instance.
func (f *follower) printAll(t *followedTarget) edit {
	edits := map[string]edit{}
	return func(line []byte) ([]byte, []byte, bool) {
		name, rest, ok := bytes.Cut(bytes.TrimPrefix(line, []byte{'['}), []byte("] "))
		if !ok || line[0] != '[' {
			return nil, line, true
		}
		edit, ok := edits[string(name)]
		if !ok {
			instance := &followedInstance{opened: t.opened}
			t.instances[string(name)] = instance
			edit = f.print(t, string(name), instance)
			edits[string(name)] = edit
		}
		return edit(rest)
	}
}

// print returns what becomes of the lines of an instance.
func (f *follower) print(t *followedTarget, name string, instance *followedInstance) edit {
	var prefix []byte
	if f.query.Prefix {
		prefix = f.out.paint(name)
	}
	return func(line []byte) ([]byte, []byte, bool) {
		stamp, text, ok := bytes.Cut(line, []byte{' '})
		if !ok {
			return prefix, line, true
		}
		at, err := time.Parse(time.RFC3339Nano, string(stamp))
		if err != nil {
			return prefix, line, true
		}
		if !at.After(instance.last) {
			return nil, nil, false
		}
		instance.last, instance.cursor = at, string(stamp)
		if f.query.Timestamps {
			text = line
		}
		if limit := f.query.LimitBytes; limit != nil {
			left := *limit - t.printed.Add(int64(len(text))) + int64(len(text))
			if left <= int64(len(text)) {
				t.cancel(errLimit)
				text = text[:max(left, 0)]
			}
			return prefix, text, left > 0
		}
		return prefix, text, true
	}
}
