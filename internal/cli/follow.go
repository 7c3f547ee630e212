package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	// drainTime is how long the streams of a target that was deleted may go on,
	// for its last lines.
	drainTime = 5 * time.Second
	// maxRetryDelay bounds the growing pauses between attempts to resume.
	maxRetryDelay = 30 * time.Second
)

// follower follows the logs of the targets that a selector selects, with one
// stream for each instance:
//
//	           added, or runs anew           ended, removed
//	instance ─────────────────────▶ stream ─────────────────▶ ended
//	                                 │  ▲                       │
//	                      broke off  ▼  │ resumed               │ runs anew
//	                                 pause           stream ◀───┘
//
// Lines carry their times, which strictly increase for an instance: a stream
// that broke off is resumed after the last line that was printed, so that none
// is lost and none comes twice.
type follower struct {
	conn   *connection
	out    *merger
	query  *v1.TargetLogOptions
	errOut io.Writer
	// retryDelay is the first pause before a stream is resumed.
	retryDelay time.Duration

	ctx     context.Context
	cancel  context.CancelCauseFunc
	streams sync.WaitGroup

	// mu protects targets and what they hold.
	mu      sync.Mutex
	targets map[types.UID]*followedTarget
}

// followedTarget is a target for as long as it exists: one that was created
// anew under its name is another.
type followedTarget struct {
	target *v1.Target
	ctx    context.Context
	cancel context.CancelFunc
	// instances are those that have or had a stream.
	instances map[string]*followedInstance
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
	// opened says that a stream has been opened before.
	opened bool
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
		targets:    map[types.UID]*followedTarget{},
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
		t.cancel()
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
	t, ok := f.targets[target.UID]
	if !ok {
		t = &followedTarget{instances: map[string]*followedInstance{}}
		t.ctx, t.cancel = context.WithCancel(f.ctx)
		f.targets[target.UID] = t
	}
	t.target = target
	f.reconcile(t)
}

// remove lets the streams of a target that has gone drain.
func (f *follower) remove(uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t, ok := f.targets[uid]
	if !ok {
		return
	}
	delete(f.targets, uid)
	t.target = nil
	if !t.streaming() {
		t.cancel()
		return
	}
	f.streams.Go(func() {
		timer := time.NewTimer(drainTime)
		defer timer.Stop()
		defer t.cancel()
		select {
		case <-timer.C:
		case <-t.ctx.Done():
		}
	})
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
	if !f.query.AllInstances && t.streaming() {
		return
	}
	for _, status := range f.candidates(t.target) {
		instance, known := t.instances[status.Name]
		if known && (instance.streaming || runOf(&status) == "" || runOf(&status) == instance.run) {
			continue
		}
		if !known {
			instance = &followedInstance{}
			t.instances[status.Name] = instance
		}
		instance.streaming = true
		name := t.target.Name
		f.streams.Go(func() { f.follow(t, name, status.Name, instance) })
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

// follow streams an instance's log until it has ended, and resumes it when it
// breaks off.
func (f *follower) follow(t *followedTarget, target, name string, instance *followedInstance) {
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		instance.streaming = false
		if t.target == nil {
			if !t.streaming() {
				t.cancel() // drained
			}
			return
		}
		for i := range t.target.Status.Instances {
			if status := &t.target.Status.Instances[i]; status.Name == name {
				instance.run = runOf(status)
			}
		}
		f.reconcile(t)
	}()
	delay, broken := f.retryDelay, false
	for {
		before := instance.last
		err := f.conn.copyLog(t.ctx, target, f.resume(name, instance), func(body io.Reader) error {
			instance.opened = true
			return f.out.copy(body, f.print(t, name, instance))
		})
		var output *outputError
		switch {
		case err == nil || t.ctx.Err() != nil:
			return
		case errors.As(err, &output):
			f.cancel(output)
			return
		case apierrors.IsNotFound(err) && !f.query.Previous:
			// The status may be ahead of the log, or behind it.
			if !f.lists(t, name) {
				return
			}
		case transient(err):
			if instance.last != before {
				delay, broken = f.retryDelay, false
			}
			if !broken {
				fmt.Fprintf(f.errOut, "warning: the log of %s/%s is resumed: %v\n", target, name, err)
			}
			broken = true
		default:
			message, _ := describe(err)
			fmt.Fprintf(f.errOut, "%s (target %q)\n", message, target)
			return
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-t.ctx.Done():
			timer.Stop()
			return
		}
		delay = min(2*delay, maxRetryDelay)
	}
}

// lists says whether an instance is in the status of its target.
func (f *follower) lists(t *followedTarget, name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return t.target != nil && slices.ContainsFunc(t.target.Status.Instances, func(i v1.InstanceStatus) bool { return i.Name == name })
}

// transient says whether trying again may help: the server wasn't reached,
// isn't up to it now, or the log broke off.
func transient(err error) bool {
	var status *apierrors.StatusError
	if !errors.As(err, &status) {
		return true
	}
	return status.ErrStatus.Code >= 500 || apierrors.IsTooManyRequests(err)
}

// resume returns the options of the next stream of an instance.
func (f *follower) resume(name string, instance *followedInstance) *v1.TargetLogOptions {
	query := f.query.DeepCopy()
	query.Instance = name
	query.AllInstances = false
	// The client needs the times, and writes what was asked for itself.
	query.Timestamps = true
	query.Prefix = false
	query.LimitBytes = nil
	if instance.cursor != "" {
		query.ResumeAfter = instance.cursor
		query.TailLines, query.SinceSeconds, query.SinceTime = nil, nil, nil
		query.Previous = false
	} else if instance.opened && ptr.Deref(query.TailLines, 0) > 0 {
		// There were no lines. All that came since are wanted.
		query.TailLines = nil
	}
	return query
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
				t.cancel()
				text = text[:max(left, 0)]
			}
			return prefix, text, left > 0
		}
		return prefix, text, true
	}
}
