package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/agent"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process"
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
	logs        string
	stopTimeout time.Duration
	agent       *agent.Agent

	mu   sync.RWMutex
	host *process.Driver // guarded by mu; nil while the agent doesn't run here
}

// newEmbeddedAgent returns an agent that keeps the logs of its targets in a
// directory, and gives their processes stopTimeout at most when the server ends.
func newEmbeddedAgent(name, logs string, stopTimeout time.Duration, config *genericapiserver.RecommendedConfig) (*embeddedAgent, error) {
	client, err := versioned.NewForConfig(config.LoopbackClientConfig)
	if err != nil {
		return nil, err
	}
	embedded, err := agent.New(agent.Options{Name: name, Client: client})
	if err != nil {
		return nil, err
	}
	if err := embedded.Register(legacyregistry.Register); err != nil {
		return nil, err
	}
	return &embeddedAgent{name: name, logs: logs, stopTimeout: stopTimeout, agent: embedded}, nil
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
	if e.host == nil {
		return nil, driver.Errorf(driver.Unavailable, "agent %q doesn't run here at the moment: it starts, ends, or runs in another replica of this server", e.name)
	}
	return e.host, nil
}

// run runs the agent until ctx ends. Then, once served is closed, its processes
// get a chance to end by themselves; it returns when nothing of them is left.
// That held ends means that the agent is another server's: it ends everything at once.
func (e *embeddedAgent) run(ctx, held context.Context, served <-chan struct{}) (err error) {
	host, err := process.New(process.Options{Dir: e.logs})
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
	select {
	case <-served: // its streams were told that the server ends, not their instances
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
	e.host = host
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
		Name:            e.name,
		Lock:            lock,
		LeaseDuration:   leaseDuration,
		RenewDeadline:   renewDeadline,
		RetryPeriod:     retryPeriod,
		ReleaseOnCancel: true,
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
	defer electing.Wait()
	defer release()

	select {
	case <-ctx.Done():
		return nil
	case held := <-leading:
		log.Info("This server holds the agent's Lease", "agent", e.name)
		err := e.run(ctx, held, served)
		if ctx.Err() == nil {
			log.Info("This server has lost the agent's Lease: its processes were ended", "agent", e.name)
		}
		return err
	}
}
