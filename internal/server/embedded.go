package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/agent"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process"
	"aaserver.io/aaserver/internal/recorder"
)

// How the Lease of an embedded agent passes on. A holder that can't renew it
// gives up at renewDeadline and has the rest of leaseDuration to kill what it
// runs; only then does another begin. A main API that is away for less than
// renewDeadline ends nothing.
const (
	leaseDuration = 40 * time.Second
	renewDeadline = 30 * time.Second
	retryPeriod   = 2 * time.Second
)

// embeddedAgent is an agent in this server.
type embeddedAgent struct {
	name        string
	host        process.Options
	stopTimeout time.Duration
	agent       *agent.Agent
	events      *recorder.Recorder

	mu      sync.RWMutex
	running *process.Driver // guarded by mu; nil while the agent doesn't run here
}

// newEmbeddedAgent returns an agent that keeps the logs of its targets in a
// directory.
func newEmbeddedAgent(name, logs string, options StreamOptions, config *genericapiserver.RecommendedConfig) (*embeddedAgent, error) {
	client, err := versioned.NewForConfig(config.LoopbackClientConfig)
	if err != nil {
		return nil, err
	}
	events, err := newRecorder(config, corev1.EventSource{Component: "aaserver-agent", Host: name})
	if err != nil {
		return nil, err
	}
	embedded, err := agent.New(agent.Options{Name: name, Client: client, Recorder: events})
	if err != nil {
		return nil, err
	}
	if err := embedded.Register(legacyregistry.Register); err != nil {
		return nil, err
	}
	return &embeddedAgent{
		name:        name,
		host:        process.Options{Dir: logs, LogFileSize: options.LogFileSize.Value(), LogFiles: options.LogFiles},
		stopTimeout: options.StopTimeout,
		agent:       embedded,
		events:      events,
	}, nil
}

// newServerRecorder returns the recorder of what the server itself has to tell.
func newServerRecorder(config *genericapiserver.RecommendedConfig) (*recorder.Recorder, error) {
	hostname, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return newRecorder(config, corev1.EventSource{Component: "aaserver", Host: hostname})
}

// newRecorder returns a recorder of events, which its Run writes to the main
// API, or without one to this server.
func newRecorder(config *genericapiserver.RecommendedConfig, source corev1.EventSource) (*recorder.Recorder, error) {
	api := config.ClientConfig
	if api == nil {
		api = config.LoopbackClientConfig
	}
	// With limits of its own: no event waits for what else is asked, or the
	// other way round. They are those of a kubelet.
	api = rest.CopyConfig(api)
	api.RateLimiter, api.QPS, api.Burst = nil, 50, 100
	client, err := kubernetes.NewForConfig(api)
	if err != nil {
		return nil, fmt.Errorf("a client for events: %w", err)
	}
	return recorder.New(recorder.Options{Client: client.CoreV1(), Source: source})
}

// driver finds the driver of a target, if this agent hosts it.
func (e *embeddedAgent) driver(target *v1.Target) (driver.Driver, error) {
	if target.Spec.AgentName != e.name {
		return nil, driver.Errorf(driver.Unavailable, "agent %q is not connected: this server has the agent %q alone", target.Spec.AgentName, e.name)
	}
	if source := target.Spec.Source(); source != v1.SourceProcess {
		return nil, driver.Errorf(driver.Unsupported, "agent %q runs no targets of source %s", e.name, source)
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.running == nil {
		return nil, driver.Errorf(driver.Unavailable, "agent %q doesn't run here at the moment: it starts, ends, or runs in another replica of this server", e.name)
	}
	return e.running, nil
}

// runOptions say what else an embedded agent goes by, beside its context.
type runOptions struct {
	// held ends when the agent has become another server's: everything of it is
	// then ended at once. nil if it can't.
	held context.Context
	// served is closed when the API server has ended, and its streams with it.
	served <-chan struct{}
}

// run runs the agent until ctx ends. Then, once the API server has ended, its
// processes get a chance to end by themselves; it returns when nothing of them
// is left.
func (e *embeddedAgent) run(ctx context.Context, opts runOptions) (err error) {
	held := opts.held
	if held == nil {
		held = context.WithoutCancel(ctx)
	}
	// Events of the agent's end are still written, while its processes end.
	telling, told := context.WithCancel(context.WithoutCancel(ctx))
	var writing sync.WaitGroup
	writing.Go(func() { e.events.Run(telling) })
	defer writing.Wait()
	defer told()

	host, err := process.New(e.host)
	if err != nil {
		return err
	}
	e.set(host)
	defer func() {
		e.set(nil)
		err = errors.Join(err, host.Close())
	}()
	agentCtx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(held, stop)()
	if err := e.agent.Run(agentCtx, map[string]driver.Host{v1.SourceProcess: host}); err != nil {
		return err
	}
	told()
	select {
	case <-opts.served: // its streams were told that the server ends, not their instances
	case <-held.Done():
		return nil
	}
	graceCtx, cancel := context.WithTimeout(held, e.stopTimeout)
	defer cancel()
	if err := host.Shutdown(graceCtx); err != nil {
		klog.FromContext(ctx).Info("Killing the processes that have not ended in time", "agent", e.name, "timeout", e.stopTimeout)
	}
	return nil
}

func (e *embeddedAgent) set(host *process.Driver) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running = host
}

// runLeased runs the agent whenever this server holds the agent's Lease, so that
// of several servers only one runs its processes.
func (e *embeddedAgent) runLeased(ctx context.Context, served <-chan struct{}, client kubernetes.Interface, namespace string) error {
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: "aaserver-agent-" + e.name},
		Client:     client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: hostname + "_" + string(uuid.NewUUID())},
	}
	for ctx.Err() == nil {
		if err := e.lead(ctx, served, lock); err != nil {
			return err
		}
	}
	return nil
}

// lead waits for the Lease, runs the agent until ctx ends or the Lease is lost,
// and lets go of the Lease when nothing of the agent is left.
func (e *embeddedAgent) lead(ctx context.Context, served <-chan struct{}, lock resourcelock.Interface) error {
	log := klog.FromContext(ctx)
	leading := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name:          e.name,
		Lock:          lock,
		LeaseDuration: leaseDuration,
		RenewDeadline: renewDeadline,
		RetryPeriod:   retryPeriod,
		// ReleaseOnCancel would ask the main API for as long again before it
		// says that the Lease is lost, while another server takes it.
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) { leading <- ctx },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("the Lease: %w", err)
	}
	// Renewing goes on when ctx has ended, until the processes have.
	leaseCtx, release := context.WithCancel(context.WithoutCancel(ctx))
	var electing sync.WaitGroup
	electing.Go(func() { elector.Run(leaseCtx) })
	lost := false
	defer func() {
		release()
		electing.Wait()
		if !lost {
			letGo(leaseCtx, lock)
		}
	}()

	select {
	case <-ctx.Done():
		return nil
	case held := <-leading:
		log.Info("This server holds the agent's Lease", "agent", e.name)
		err := e.run(ctx, runOptions{held: held, served: served})
		lost = held.Err() != nil
		if ctx.Err() == nil {
			log.Info("This server has lost the agent's Lease: its processes were ended", "agent", e.name)
		}
		return err
	}
}

// letGoTimeout bounds how long a server that ends tries to let go of a Lease.
// Without it, the next holder waits until the Lease is over.
const letGoTimeout = 5 * time.Second

// letGo ends a Lease that this server holds, if it does.
func letGo(ctx context.Context, lock resourcelock.Interface) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), letGoTimeout)
	defer cancel()
	record, _, err := lock.Get(ctx)
	if err == nil && record.HolderIdentity == lock.Identity() {
		now := metav1.Now()
		err = lock.Update(ctx, resourcelock.LeaderElectionRecord{
			LeaderTransitions:    record.LeaderTransitions,
			LeaseDurationSeconds: 1,
			AcquireTime:          now,
			RenewTime:            now,
		})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		klog.FromContext(ctx).Error(err, "The agent's Lease can't be let go", "lease", lock.Describe())
	}
}
