// Package agent is to targets what a kubelet is to pods. It watches the hosted
// targets that are bound to its name, has their instances run by a driver.Host
// for each source, and reports their status. It uses nothing but the API and
// its hosts, so that it works the same inside a server and far from it.
//
// What it does with each instance:
//
//	Pending ── Start ──▶ Running ── ends ──▶ Terminated: its policy leaves it
//	   ▲                  │   ▲ └── ends ──▶ Waiting: CrashLoopBackOff
//	   │   spec changed   │   │                 │
//	   └───── Stop ◀──────┘   └── Start ◀───────┘ back-off is over
//
// A start that fails is an end with exit code 128 and reason StartError.
//
// Back-off is 1 s and doubles with each end or failed start, up to 5 minutes;
// a run of 10 minutes makes it begin anew, and so does a restart of the agent.
//
// Processes end with their agent. An instance that ran when its agent ended,
// and that the host doesn't have any more, is terminated with reason AgentLost
// and exit code 137 (they are killed), at the time that this is noticed. Its
// restart policy then decides, as for any other end: Always and OnFailure run
// it again at once and count a restart, Never leaves it.
//
// A change to the source or the ports replaces instances one at a time, the
// highest ordinal first; the next one's turn comes when the last has run for a
// second (ten, once it has crashed). Until then the others stay on the spec
// that they were started with, restarts included, for as long as this agent
// runs. An instance that has been replaced counts its restarts from 0. Changes
// to replicas, restartPolicy and terminationGracePeriodSeconds restart nothing.
package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-base/metrics"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	informers "aaserver.io/aaserver/apis/generated/informers/externalversions"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// DefaultPortRange is where host ports are taken from. It ends below 32768,
// where Linux begins to take the local ports of outgoing connections from: a
// port above could be taken at any moment. Below 20000, too many programs have
// a port of their own.
var DefaultPortRange = utilnet.PortRange{Base: 20000, Size: 12768}

// DefaultWorkers is how many targets are seen to at once.
const DefaultWorkers = 8

// prepareRetry is how long to wait before asking a host again that can't be
// reached.
const prepareRetry = 5 * time.Second

// Options of an Agent. Name and Client are needed.
type Options struct {
	// Name is the agent's name, the spec.agentName of its targets.
	Name string
	// Client reads targets and writes their status and finalizer.
	Client versioned.Interface
	// Recorder tells of what happens to targets; nothing is told if nil. It must
	// not block.
	Recorder record.EventRecorder
	// PortRange is where host ports are taken from; DefaultPortRange if empty.
	PortRange utilnet.PortRange
	// Workers is how many targets are seen to at once; DefaultWorkers if 0.
	Workers int
	// Clock tells the time; the real one if nil.
	Clock clock.WithTicker
}

// Agent runs the instances of the targets bound to its name.
type Agent struct {
	opts    Options
	metrics *agentMetrics
}

// New returns an Agent that doesn't run yet.
func New(opts Options) (*Agent, error) {
	switch {
	case opts.Name == "":
		return nil, errors.New("an agent needs a name")
	case opts.Client == nil:
		return nil, errors.New("an agent needs a client")
	}
	if opts.PortRange.Size == 0 {
		opts.PortRange = DefaultPortRange
	}
	if first, last := opts.PortRange.Base, opts.PortRange.Base+opts.PortRange.Size-1; first < 1 || last > 65535 {
		return nil, fmt.Errorf("the range of host ports, %d to %d, must be within 1 to 65535", first, last)
	}
	if opts.Workers <= 0 {
		opts.Workers = DefaultWorkers
	}
	if opts.Clock == nil {
		opts.Clock = clock.RealClock{}
	}
	return &Agent{opts: opts, metrics: newMetrics()}, nil
}

// Register registers the metrics. It is called before Run, with
// legacyregistry.Register or the Register of a registry of one's own.
func (a *Agent) Register(register func(metrics.Registerable) error) error {
	for _, metric := range a.metrics.all() {
		if err := register(metric); err != nil {
			return fmt.Errorf("registering the metrics of the agent: %w", err)
		}
	}
	return nil
}

// Run runs the instances of the agent's targets on hosts, by the name of their
// source, until ctx ends, and returns when nothing of the agent goes on. The
// instances run on: that their host is closed, by its owner, ends them. It may
// be called again, with other hosts, when it has returned.
func (a *Agent) Run(ctx context.Context, hosts map[string]driver.Host) error {
	ctx = klog.NewContext(ctx, klog.FromContext(ctx).WithValues("agent", a.opts.Name))
	log := klog.FromContext(ctx)

	selector := fields.OneTermEqualSelector("spec.agentName", a.opts.Name).String()
	factory := informers.NewSharedInformerFactoryWithOptions(a.opts.Client, 0,
		informers.WithTweakListOptions(func(options *metav1.ListOptions) { options.FieldSelector = selector }))
	targets := factory.Streaming().V1().Targets()

	r := newReconciler(a.opts, hosts, a.metrics, targets.Lister())
	if _, err := targets.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { r.enqueue(obj) },
		UpdateFunc: func(_, obj any) { r.enqueue(obj) },
		DeleteFunc: func(obj any) { r.enqueue(obj) },
	}); err != nil {
		r.queue.ShutDown()
		return fmt.Errorf("watching targets: %w", err)
	}

	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer func() {
		cancel()
		r.queue.ShutDown()
		running.Wait()
		factory.Shutdown()
	}()
	factory.StartWithContext(ctx)
	if synced := factory.WaitForCacheSyncWithContext(ctx); synced.Err != nil {
		return nil // ctx has ended
	}
	if err := r.adopt(); err != nil {
		return fmt.Errorf("listing targets: %w", err)
	}
	for _, h := range r.hosts {
		// Once here, so that the first syncs find their hosts ready.
		if err := r.prepare(ctx, h); err != nil && ctx.Err() == nil {
			log.Error(err, "The host can't be used yet", "source", h.source)
		}
		running.Go(func() { r.watch(ctx, h) })
	}
	for range a.opts.Workers {
		running.Go(func() { r.work(ctx) })
	}
	log.Info("Agent started")
	<-ctx.Done()
	return nil
}

func (r *reconciler) enqueue(obj any) {
	key, err := cache.DeletionHandlingObjectToName(obj)
	if err != nil {
		klog.Background().Error(err, "Object of the informer without a name")
		return
	}
	r.queue.Add(types.NamespacedName(key))
}

// adopt takes up what the status of each target tells of an earlier agent of
// this name, before anything starts: instances keep their ports.
func (r *reconciler) adopt() error {
	targets, err := r.targets()
	if err != nil {
		return err
	}
	for _, target := range targets {
		r.track(target)
	}
	return nil
}

// prepare finds what a host has from before, and has it forget what belongs to
// targets that are gone. Nothing is started on it before that.
func (r *reconciler) prepare(ctx context.Context, h *host) error {
	list, err := h.List(ctx)
	if err != nil {
		return fmt.Errorf("listing the instances: %w", err)
	}
	targets, err := r.targets()
	if err != nil {
		return err
	}
	var keep []types.UID
	exists := map[types.UID]bool{}
	for _, target := range targets {
		keep = append(keep, target.UID)
		exists[target.UID] = true
	}
	for _, instance := range list {
		if uid := instance.ID.Target; !exists[uid] {
			exists[uid] = true
			keep = append(keep, uid)
			r.trackOrphan(uid, h)
		}
	}
	// No target at all may be a database that was lost or mistaken: the logs
	// stay, in case the right one comes back.
	if len(keep) == 0 {
		klog.FromContext(ctx).V(2).Info("There are no targets: what is left of earlier ones is kept", "source", h.source)
	} else if err := h.Retain(ctx, keep); err != nil {
		// A disk that can't be cleaned is no reason to run nothing.
		klog.FromContext(ctx).Error(err, "What deleted targets left can't be deleted", "source", h.source)
	}
	h.ready.Store(true)
	for _, key := range r.keysOn(h) {
		r.queue.Add(key)
	}
	return nil
}

// watch has targets looked at when something changes on their host.
func (r *reconciler) watch(ctx context.Context, h *host) {
	for !h.ready.Load() {
		select {
		case <-ctx.Done():
			return
		case <-r.clock.After(prepareRetry):
		}
		if err := r.prepare(ctx, h); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "The host can't be used yet", "source", h.source)
		}
	}
	changes := h.Changes()
	for {
		select {
		case <-ctx.Done():
			return
		case uid, ok := <-changes:
			if !ok {
				return
			}
			if key, ok := r.keyOf(uid); ok {
				r.queue.Add(key)
			}
		}
	}
}

// work sees to one target after another.
func (r *reconciler) work(ctx context.Context) {
	for {
		key, shutdown := r.queue.Get()
		if shutdown {
			return
		}
		if ctx.Err() == nil {
			r.workOn(ctx, key)
		}
		r.queue.Done(key)
	}
}

func (r *reconciler) workOn(ctx context.Context, key types.NamespacedName) {
	log := klog.FromContext(ctx).WithValues("target", klog.KRef(key.Namespace, key.Name))
	began := r.clock.Now()
	wake, err := r.sync(klog.NewContext(ctx, log), key)
	r.metrics.synced(err, r.clock.Since(began))
	if wake > 0 {
		// Whatever failed doesn't keep an instance from its restart in time.
		r.queue.AddAfter(key, wake)
	}
	if err == nil {
		r.queue.Forget(key)
		return
	}
	if ctx.Err() != nil {
		return
	}
	if isConflict(err) {
		log.V(4).Info("The target has changed meanwhile", "err", err.Error())
	} else {
		log.Error(err, "The target couldn't be seen to: trying again")
	}
	r.queue.AddRateLimited(key)
}

// targets returns the hosted targets of this agent.
func (r *reconciler) targets() ([]*v1.Target, error) {
	all, err := r.lister.List(everything)
	if err != nil {
		return nil, err
	}
	var ours []*v1.Target
	for _, target := range all {
		if r.ours(target) {
			ours = append(ours, target)
		}
	}
	return ours, nil
}

// ours says whether the agent runs a target's instances. That the server
// selects by name is checked: nothing may ever run on two agents.
func (r *reconciler) ours(target *v1.Target) bool {
	return target.Spec.AgentName == r.name && target.Spec.Hosted()
}
