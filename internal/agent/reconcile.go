package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	streamingclient "aaserver.io/aaserver/apis/generated/clientset/versioned/typed/streaming/v1"
	listers "aaserver.io/aaserver/apis/generated/listers/streaming/v1"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

var everything = labels.Everything()

// How long a replaced instance has to run before the next one's turn comes; an
// instance that has crashed on this spec has to prove itself for longer.
const (
	settleTime        = time.Second
	settleTimeCrashed = 10 * time.Second
)

// informerLag is for how long after a write the informer may have an older
// version of the target. Not for ever: a server that was restored from a backup
// counts versions from an earlier one on.
const informerLag = time.Minute

// reconciler makes what runs match the targets. The queue hands out each key
// to one worker at a time; so all that is hosted under a key is that worker's.
type reconciler struct {
	name    string
	client  streamingclient.TargetsGetter
	lister  listers.TargetLister
	clock   clock.WithTicker
	metrics *agentMetrics
	events  record.EventRecorder
	ports   *portTable
	hosts   map[string]*host
	queue   workqueue.TypedRateLimitingInterface[types.NamespacedName]

	// mu protects the two maps. What is in them is protected by the queue.
	mu    sync.Mutex
	byKey map[types.NamespacedName][]*hosted
	byUID map[types.UID]*hosted
}

func newReconciler(opts Options, hosts map[string]driver.Host, metrics *agentMetrics, lister listers.TargetLister) *reconciler {
	r := &reconciler{
		name:    opts.Name,
		client:  opts.Client.StreamingV1(),
		lister:  lister,
		clock:   opts.Clock,
		metrics: metrics,
		events:  opts.Recorder,
		ports:   newPortTable(opts.PortRange),
		hosts:   map[string]*host{},
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](100*time.Millisecond, 30*time.Second),
			workqueue.TypedRateLimitingQueueConfig[types.NamespacedName]{Name: "agent", Clock: opts.Clock}),
		byKey: map[types.NamespacedName][]*hosted{},
		byUID: map[types.UID]*hosted{},
	}
	for source, h := range hosts {
		r.hosts[source] = &host{Host: h, source: source}
	}
	return r
}

// host is a driver.Host and the source that it is for.
type host struct {
	driver.Host
	source string
	// ready says that it has forgotten what no target is left of.
	ready atomic.Bool
}

// hosted is what is run of one target. A target that was deleted and created
// again has two under its key, until the instances of the first have ended.
type hosted struct {
	uid types.UID
	key types.NamespacedName
	// host is nil if the agent has none for the source.
	host *host
	// target is the newest that is known; nil if the target was gone before
	// the agent came. written is when the agent wrote to it.
	target    *v1.Target
	written   time.Time
	instances map[string]*instance
	// observed says that the host has been asked what runs.
	observed bool
	// waits says that instances of the target's predecessor haven't ended.
	waits bool
	// rollout is what the last sync found.
	rollout rollout
	// told is what events have told of.
	told told
}

// rollout is how far the instances are on their way to the present spec.
type rollout struct {
	// outdated are the instances that run by an earlier spec, highest first.
	outdated []*instance
	// stoppedAt is the instance that is broken by the present spec.
	stoppedAt *instance
}

func (r *reconciler) track(target *v1.Target) *hosted {
	h := &hosted{
		uid:       target.UID,
		key:       types.NamespacedName{Namespace: target.Namespace, Name: target.Name},
		host:      r.hosts[target.Spec.Source()],
		target:    target,
		instances: map[string]*instance{},
		told:      told{replicas: unknown},
	}
	hash := hashOf(&target.Spec)
	for i := range target.Status.Instances {
		status := &target.Status.Instances[i]
		ordinal, ok := ordinalOf(target.Name, status.Name)
		if !ok {
			continue
		}
		instance := restoreInstance(status, ordinal)
		instance.target, instance.hash = target, hash
		h.instances[instance.name] = instance
		r.ports.reserve(h.owner(instance), target.Spec.Ports, status.Ports)
	}
	switch target.Status.ObservedGeneration {
	case 0: // new
	case target.Generation:
		h.told.replicas = len(target.InstanceNames())
	default:
		h.told.replicas = len(h.instances)
	}
	r.add(h)
	return h
}

// trackOrphan takes up what a host runs of a target that is gone. No target
// has its key, so that the next sync ends it.
func (r *reconciler) trackOrphan(uid types.UID, on *host) {
	r.mu.Lock()
	_, known := r.byUID[uid]
	r.mu.Unlock()
	if !known {
		r.add(&hosted{uid: uid, key: types.NamespacedName{Name: string(uid)}, host: on, instances: map[string]*instance{}})
	}
}

func (r *reconciler) add(h *hosted) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byKey[h.key] = append(r.byKey[h.key], h)
	r.byUID[h.uid] = h
}

func (r *reconciler) forget(h *hosted) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byUID, h.uid)
	rest := slices.DeleteFunc(slices.Clone(r.byKey[h.key]), func(other *hosted) bool { return other == h })
	if len(rest) == 0 {
		delete(r.byKey, h.key)
		return
	}
	r.byKey[h.key] = rest
}

func (r *reconciler) tracked(key types.NamespacedName) []*hosted {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byKey[key]
}

func (r *reconciler) keyOf(uid types.UID) (types.NamespacedName, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, ok := r.byUID[uid]
	if !ok {
		return types.NamespacedName{}, false
	}
	return h.key, true
}

// keysOn returns the keys of what is run on a host.
func (r *reconciler) keysOn(on *host) []types.NamespacedName {
	r.mu.Lock()
	defer r.mu.Unlock()
	var keys []types.NamespacedName
	for _, h := range r.byUID {
		if h.host == on {
			keys = append(keys, h.key)
		}
	}
	return keys
}

// sync makes what runs match the target of a key, and its status tell so. It
// returns after how long it wants to be called again, 0 if it needn't be.
func (r *reconciler) sync(ctx context.Context, key types.NamespacedName) (time.Duration, error) {
	target, err := r.lister.Targets(key.Namespace).Get(key.Name)
	switch {
	case apierrors.IsNotFound(err):
		target = nil
	case err != nil:
		return 0, err
	case !r.ours(target):
		target = nil
	}

	// First what is gone: removed by force, or replaced by one of its name.
	var current *hosted
	var errs []error
	waits := false
	for _, h := range r.tracked(key) {
		if target != nil && h.uid == target.UID {
			current = h
			continue
		}
		gone, err := r.end(ctx, h)
		errs = append(errs, err)
		if gone {
			r.forget(h)
		} else {
			waits = true
		}
	}
	if target == nil {
		return 0, errors.Join(errs...)
	}
	if current == nil {
		current = r.track(target)
	}
	if r.clock.Since(current.written) < informerLag {
		target = newer(target, current.target)
	}
	current.target = target
	current.waits = waits

	if current.target.DeletionTimestamp != nil {
		gone, err := r.end(ctx, current)
		errs = append(errs, err, r.report(ctx, current))
		if gone {
			errs = append(errs, r.finalize(ctx, current))
		}
		return 0, errors.Join(errs...)
	}
	if err := r.claim(ctx, current); err != nil {
		return 0, errors.Join(append(errs, err)...)
	}
	wake, err := r.run(ctx, current)
	errs = append(errs, err, r.report(ctx, current))
	return wake, errors.Join(errs...)
}

// newer returns the newer of two versions of a target.
func newer(a, b *v1.Target) *v1.Target {
	if c, err := resourceversion.CompareResourceVersion(a.ResourceVersion, b.ResourceVersion); err == nil && c < 0 {
		return b
	}
	return a
}

// end stops and removes all that is run of a target, and says whether nothing
// is left.
func (r *reconciler) end(ctx context.Context, h *hosted) (gone bool, err error) {
	if err := r.observe(ctx, h); err != nil {
		return false, err
	}
	h.rollout = rollout{}
	why := whyGone
	if h.target != nil && h.target.DeletionTimestamp != nil {
		why = whyDeleted
	}
	var errs []error
	for _, i := range h.descending() {
		if i.run != nil {
			errs = append(errs, r.stop(ctx, h, i, why))
		} else {
			errs = append(errs, r.remove(ctx, h, i))
		}
	}
	return len(h.instances) == 0, errors.Join(errs...)
}

// run makes the instances match the spec.
func (r *reconciler) run(ctx context.Context, h *hosted) (time.Duration, error) {
	if err := r.observe(ctx, h); err != nil {
		return 0, err
	}
	var errs []error
	names := h.target.InstanceNames()
	r.tellScaled(h, len(names))
	for _, i := range h.descending() {
		switch {
		case i.ordinal < len(names) && !i.removing:
		case i.run != nil:
			i.removing = true
			errs = append(errs, r.stop(ctx, h, i, whyScaledDown))
		default:
			errs = append(errs, r.remove(ctx, h, i))
		}
	}
	hash := hashOf(&h.target.Spec)
	for ordinal, name := range names {
		if _, exists := h.instances[name]; !exists {
			h.instances[name] = &instance{name: name, ordinal: ordinal, target: h.target, hash: hash, pending: true}
		}
	}
	wake, err := r.rollOut(ctx, h, hash)
	errs = append(errs, err)

	started := false
	for _, i := range h.ascending() {
		if h.waits || !i.startable(h.target.Spec.RestartPolicy) {
			continue
		}
		if wait := i.retryAt.Sub(r.clock.Now()); wait > 0 {
			wake = sooner(wake, wait)
			continue
		}
		if err := r.start(ctx, h, i); err != nil {
			return 0, err // ctx has ended
		}
		if i.run != nil {
			started = true
		} else if i.startable(h.target.Spec.RestartPolicy) {
			wake = sooner(wake, i.retryAt.Sub(r.clock.Now()))
		}
	}
	if started {
		// With the times that the host knows, so that the status needn't be
		// written twice.
		errs = append(errs, r.observe(ctx, h))
		for _, i := range h.instances {
			if i.run == nil && i.startable(h.target.Spec.RestartPolicy) {
				wake = sooner(wake, max(i.retryAt.Sub(r.clock.Now()), time.Millisecond))
			}
		}
		if len(h.rollout.outdated) > 0 {
			wake = sooner(wake, settleTime)
		}
	}
	r.tellBackoffs(h)
	r.tellRolledOut(h)
	return wake, errors.Join(errs...)
}

// rollOut replaces one instance of an earlier spec, if it is time for it.
func (r *reconciler) rollOut(ctx context.Context, h *hosted, hash string) (wake time.Duration, err error) {
	h.rollout = rollout{}
	wait := h.waits
	var errs []error
	for _, i := range h.descending() {
		if i.removing {
			continue
		}
		if i.replacing && i.run == nil {
			i.renew(h.target, hash)
		}
		switch {
		case i.replacing:
			// Also if its spec is the present one again: it was asked to end.
			wait = true
			h.rollout.outdated = append(h.rollout.outdated, i)
			// Once more, in case that it failed or the grace period is shorter.
			errs = append(errs, r.stop(ctx, h, i, whyReplaced))
		case i.hash != hash:
			h.rollout.outdated = append(h.rollout.outdated, i)
		default:
			i.target = h.target
			if settled, after := i.settled(h.target.Spec.RestartPolicy, r.clock.Now()); !settled {
				wait = true
				wake = sooner(wake, after)
				if i.broken() && h.rollout.stoppedAt == nil {
					h.rollout.stoppedAt = i
				}
			}
		}
	}
	if len(h.rollout.outdated) == 0 {
		h.rollout.stoppedAt = nil
		return 0, nil
	}
	r.tellRollout(h, hash)
	if wait {
		return wake, errors.Join(errs...)
	}
	i := h.rollout.outdated[0]
	if i.run == nil {
		h.rollout.outdated = h.rollout.outdated[1:]
		i.renew(h.target, hash)
		return 0, nil
	}
	klog.FromContext(ctx).Info("Replacing instance", "instance", i.name)
	i.replacing = true
	return 0, r.stop(ctx, h, i, whyReplaced)
}

// observe takes in what the host knows of the instances.
func (r *reconciler) observe(ctx context.Context, h *hosted) error {
	seen := map[string]driver.InstanceStatus{}
	if h.host != nil {
		if !h.host.ready.Load() {
			return r.hostError(ctx, h, fmt.Errorf("the host for %s instances isn't ready yet", h.host.source))
		}
		list, err := h.host.List(ctx)
		if err != nil {
			return r.hostError(ctx, h, fmt.Errorf("listing the instances: %w", err))
		}
		for _, status := range list {
			if status.ID.Target == h.uid {
				seen[status.ID.Name] = status
			}
		}
	}
	for name, status := range seen {
		if _, known := h.instances[name]; known {
			continue
		}
		i := &instance{name: name, ports: status.Ports}
		if h.target != nil {
			i.target, i.hash = h.target, hashOf(&h.target.Spec)
			ordinal, ok := ordinalOf(h.target.Name, name)
			// One that no spec can ask for is removed.
			i.ordinal, i.removing = ordinal, !ok
		}
		h.instances[name] = i
	}
	h.observed = true
	now := r.clock.Now()
	for _, i := range h.ascending() { // events are in this order
		status, listed := seen[i.name]
		if status.Message != "" && status.Message != i.message {
			r.tell(h, corev1.EventTypeWarning, eventImpaired, "Instance %s: %s", i.name, bounded(status.Message))
		}
		i.message = status.Message
		asked := !i.stopBy.IsZero()
		switch {
		case listed && status.State.Running != nil:
			if i.run == nil || i.since.IsZero() {
				i.since = status.State.Running.StartedAt.Time
			}
			i.run = status.State.Running
			i.pending = false
		case listed && status.State.Terminated != nil && (i.run != nil || i.ended == nil && !i.pending):
			i.exited(status.State.Terminated, now)
			r.logExit(ctx, i)
			r.tellExited(h, i, asked)
		case !listed && i.run != nil:
			i.lost(now)
			r.logExit(ctx, i)
			r.tell(h, corev1.EventTypeWarning, eventAgentLost, "Instance %s is lost: %s", i.name, i.ended.Message)
		}
	}
	return nil
}

func (r *reconciler) logExit(ctx context.Context, i *instance) {
	klog.FromContext(ctx).V(2).Info("Instance ended", "instance", i.name,
		"exitCode", i.ended.ExitCode, "reason", i.ended.Reason, "restarts", i.restarts)
}

// start starts an instance, and notes it if that fails. It returns an error
// only if ctx has ended.
func (r *reconciler) start(ctx context.Context, h *hosted, i *instance) error {
	err := r.tryStart(ctx, h, i)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	r.metrics.start(i.target.Spec.Source(), err)
	now := r.clock.Now()
	if err != nil {
		i.failedToStart(err, now)
		klog.FromContext(ctx).Info("Instance can't be started", "instance", i.name, "err", err.Error())
		reason := eventStartError
		if _, ok := errors.AsType[*portError](err); ok {
			reason = eventPortUnavailable
		}
		r.tell(h, corev1.EventTypeWarning, reason, "Instance %s can't be started: %s", i.name, i.ended.Message)
		return nil
	}
	i.started(now)
	r.tell(h, corev1.EventTypeNormal, eventStarted, "Started instance %s", i.name)
	klog.FromContext(ctx).V(2).Info("Instance started", "instance", i.name, "restarts", i.restarts)
	return nil
}

func (r *reconciler) tryStart(ctx context.Context, h *hosted, i *instance) error {
	if h.host == nil {
		return driver.Errorf(driver.Invalid, "agent %s can't run %s targets: use another agent", r.name, h.target.Spec.Source())
	}
	ports, err := r.ports.assign(h.owner(i), i.target.Spec.Ports, i.ports)
	if err != nil {
		return err
	}
	i.ports = ports
	return h.host.Start(ctx, driver.Instance{Target: i.target, Name: i.name, Ports: ports})
}

// stop asks an instance to end within the grace period, and tells why. Asked
// again, it brings the end forward, never back.
func (r *reconciler) stop(ctx context.Context, h *hosted, i *instance, why string) error {
	grace := h.gracePeriod()
	by := r.clock.Now().Add(grace)
	if !i.stopBy.IsZero() && !by.Before(i.stopBy) {
		return nil
	}
	klog.FromContext(ctx).V(2).Info("Stopping instance", "instance", i.name, "grace", grace)
	if err := h.host.Stop(ctx, h.id(i), grace); err != nil {
		return r.hostError(ctx, h, fmt.Errorf("stopping instance %s: %w", i.name, err))
	}
	if i.stopBy.IsZero() {
		r.tell(h, corev1.EventTypeNormal, eventStopping, "Stopping instance %s within %s: %s", i.name, grace, why)
	}
	i.stopBy = by
	return nil
}

// remove forgets an instance that doesn't run.
func (r *reconciler) remove(ctx context.Context, h *hosted, i *instance) error {
	if h.host != nil {
		if err := h.host.Remove(ctx, h.id(i)); err != nil && driver.KindOf(err) != driver.NotFound {
			return r.hostError(ctx, h, fmt.Errorf("removing instance %s: %w", i.name, err))
		}
	}
	r.ports.release(h.id(i))
	delete(h.instances, i.name)
	return nil
}

// claim puts the finalizer on a target before anything of it runs. A target
// that no agent has taken up has none, and can be deleted at once.
func (r *reconciler) claim(ctx context.Context, h *hosted) error {
	if slices.Contains(h.target.Finalizers, v1.FinalizerInstances) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		// Of this object and version only: the list replaces what is there.
		"uid":             h.uid,
		"resourceVersion": h.target.ResourceVersion,
		"finalizers":      append(slices.Clone(h.target.Finalizers), v1.FinalizerInstances),
	}})
	if err != nil {
		return err
	}
	target, err := r.client.Targets(h.key.Namespace).Patch(ctx, h.key.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("putting the finalizer on: %w", err)
	}
	h.target, h.written = target, r.clock.Now()
	return nil
}

// finalize says that nothing of a target runs any more, so that it can go.
func (r *reconciler) finalize(ctx context.Context, h *hosted) error {
	at := slices.Index(h.target.Finalizers, v1.FinalizerInstances)
	if at < 0 {
		return nil
	}
	targets := r.client.Targets(h.key.Namespace)
	// An object whose grace period isn't over stays when its last finalizer
	// goes. First, then: with the finalizer off there would be nobody to do it.
	if grace := h.target.DeletionGracePeriodSeconds; grace != nil && *grace > 0 {
		err := targets.Delete(ctx, h.key.Name, metav1.DeleteOptions{
			GracePeriodSeconds: new(int64),
			Preconditions:      &metav1.Preconditions{UID: &h.uid},
		})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("ending the grace period: %w", err)
		}
	}
	// Not an Update: it would drop the fields that a newer server knows and
	// this agent doesn't. The tests see to it that nothing else is hit.
	path := "/metadata/finalizers/" + strconv.Itoa(at)
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/metadata/uid", "value": h.uid},
		{"op": "test", "path": path, "value": v1.FinalizerInstances},
		{"op": "remove", "path": path},
	})
	if err != nil {
		return err
	}
	target, err := targets.Patch(ctx, h.key.Name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("taking the finalizer off: %w", err)
	}
	klog.FromContext(ctx).Info("Nothing of the target runs any more")
	h.target, h.written = target, r.clock.Now()
	return nil
}

// isConflict says that a write came too late: the next sync sees why.
func isConflict(err error) bool {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		for _, e := range joined.Unwrap() {
			if !isConflict(e) {
				return false
			}
		}
		return true
	}
	return apierrors.IsConflict(err)
}

func (h *hosted) id(i *instance) driver.InstanceID {
	return driver.InstanceID{Target: h.uid, Name: i.name}
}

func (h *hosted) owner(i *instance) portOwner {
	return portOwner{id: h.id(i), namespace: h.key.Namespace}
}

// gracePeriod is how long an instance may take to end.
func (h *hosted) gracePeriod() time.Duration {
	target := h.target
	if target == nil {
		target = &v1.Target{} // an orphan
	}
	if seconds := target.DeletionGracePeriodSeconds; seconds != nil {
		// The spec's, unless whoever deletes the target asked for another.
		return time.Duration(*seconds) * time.Second
	}
	return target.Spec.GracePeriod()
}

func (h *hosted) ascending() []*instance {
	sorted := make([]*instance, 0, len(h.instances))
	for _, i := range h.instances {
		sorted = append(sorted, i)
	}
	slices.SortFunc(sorted, func(a, b *instance) int { return a.ordinal - b.ordinal })
	return sorted
}

func (h *hosted) descending() []*instance {
	sorted := h.ascending()
	slices.Reverse(sorted)
	return sorted
}

// hashOf tells specs apart whose instances have to be replaced.
func hashOf(spec *v1.TargetSpec) string {
	relevant, err := json.Marshal(v1.TargetSpec{Process: spec.Process, Container: spec.Container, Ports: spec.Ports})
	if err != nil {
		panic(err) // there is nothing in a spec that JSON can't say
	}
	sum := sha256.Sum256(relevant)
	return hex.EncodeToString(sum[:])
}

// ordinalOf returns N of an instance named <target>-N.
func ordinalOf(target, instance string) (int, bool) {
	if len(instance) < len(target)+2 || instance[:len(target)+1] != target+"-" {
		return 0, false
	}
	ordinal, err := strconv.Atoi(instance[len(target)+1:])
	if err != nil || ordinal < 0 || instance[len(target)+1:] != strconv.Itoa(ordinal) {
		return 0, false
	}
	return ordinal, true
}

// sooner returns the earlier of two times to wake up after; 0 is never.
func sooner(a, b time.Duration) time.Duration {
	if a <= 0 {
		return b
	}
	if b <= 0 {
		return a
	}
	return min(a, b)
}
