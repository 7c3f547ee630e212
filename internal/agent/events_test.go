package agent

import (
	"fmt"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/tools/reference"
	"k8s.io/utils/clock"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// fakeRecorder keeps what is told, and what that is about.
type fakeRecorder struct {
	mu    sync.Mutex
	lines []string
	about []corev1.ObjectReference
}

var _ record.EventRecorder = (*fakeRecorder)(nil)

func (f *fakeRecorder) Eventf(object runtime.Object, kind, reason, format string, args ...any) {
	f.Event(object, kind, reason, fmt.Sprintf(format, args...))
}

func (f *fakeRecorder) AnnotatedEventf(object runtime.Object, _ map[string]string, kind, reason, format string, args ...any) {
	f.Eventf(object, kind, reason, format, args...)
}

func (f *fakeRecorder) Event(object runtime.Object, kind, reason, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, kind+" "+reason+": "+message)
	about, err := reference.GetReference(scheme.Scheme, object)
	if err != nil {
		panic(err) // nobody could record it
	}
	f.about = append(f.about, *about)
}

// take returns what was told since the last time.
func (f *fakeRecorder) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	lines := f.lines
	f.lines, f.about = nil, nil
	return lines
}

// Each sentence is a story, and all that is told of it.
func TestEvents(t *testing.T) {
	tests := map[string]func(*bench){
		"a new target is told of by its starts, and not again when nothing happens": func(b *bench) {
			b.api.create(web(2))
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Normal Started: Started instance web-0",
				"Normal Started: Started instance web-1",
			})
			b.settle("web")
			b.want("events later", b.told.take(), []string{})
		},
		"a crash is told with its code, its back-off once, and its restart": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.host.exit("web-0", 3)
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Warning Exited: Instance web-0 exited with code 3",
				"Warning BackOff: Back-off 1s before instance web-0 is started again: exited with code 3",
			})
			for range 9 {
				b.clock.Step(100 * time.Millisecond)
				b.settle("web")
			}
			b.want("events during the back-off", b.told.take(), []string{})
			b.clock.Step(100 * time.Millisecond)
			b.settle("web")
			b.want("events after it", b.told.take(), []string{"Normal Started: Started instance web-0"})
			b.host.exit("web-0", 3)
			b.settle("web")
			b.want("events of the next crash", b.told.take(), []string{
				"Warning Exited: Instance web-0 exited with code 3",
				"Warning BackOff: Back-off 2s before instance web-0 is started again: exited with code 3",
			})
		},
		"an instance that ends as soon as it has started": func(b *bench) {
			b.host.brief = true
			b.api.create(web(1))
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Normal Started: Started instance web-0",
				"Warning Exited: Instance web-0 exited with code 1",
				"Warning BackOff: Back-off 1s before instance web-0 is started again: exited with code 1",
			})
		},
		"an end by a signal warns": func(b *bench) {
			b.api.create(withPolicy(web(1), v1.RestartNever))
			b.settle("web")
			b.told.take()
			b.host.mu.Lock()
			for id := range b.host.instances {
				b.host.endLocked(id, v1.InstanceStateTerminated{ExitCode: 137, Signal: 9, Reason: "Killed"})
			}
			b.host.mu.Unlock()
			b.settle("web")
			b.want("events", b.told.take(), []string{"Warning Exited: Instance web-0 ended by SIGKILL"})
		},
		"work that is done doesn't warn, and isn't backed off where it isn't to run again": func(b *bench) {
			b.api.create(withPolicy(web(1), v1.RestartOnFailure))
			b.settle("web")
			b.told.take()
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("events", b.told.take(), []string{"Normal Exited: Instance web-0 exited with code 0"})
		},
		"a start that fails says why": func(b *bench) {
			b.host.startErr = func(driver.Instance) error { return driver.Errorf(driver.Invalid, `command "v1" not found`) }
			b.api.create(web(1))
			b.settle("web")
			b.want("events", b.told.take(), []string{
				`Warning StartError: Instance web-0 can't be started: command "v1" not found`,
				"Warning BackOff: Back-off 1s before instance web-0 is started again: it couldn't be started",
			})
		},
		"a start that fails and isn't tried again has no back-off": func(b *bench) {
			b.host.startErr = func(driver.Instance) error { return driver.Errorf(driver.Invalid, `command "v1" not found`) }
			b.api.create(withPolicy(web(1), v1.RestartNever))
			b.settle("web")
			b.want("events", b.told.take(), []string{`Warning StartError: Instance web-0 can't be started: command "v1" not found`})
		},
		"a port that is taken has a reason of its own": func(b *bench) {
			b.taken[20001] = true
			b.api.create(withPorts(web(1), v1.TargetPort{Name: "http", Port: 8080, HostPort: 20001}))
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Warning PortUnavailable: Instance web-0 can't be started: port http: port 20001/TCP of the host is in use by another program",
				"Warning BackOff: Back-off 1s before instance web-0 is started again: it couldn't be started",
			})
		},
		"a source that the agent has no host for": func(b *bench) {
			target := web(1)
			target.Spec.Process, target.Spec.Container = nil, &v1.ContainerSource{Image: "nginx"}
			b.api.create(target)
			b.settle("web")
			b.want("events", b.told.take()[:1], []string{
				"Warning StartError: Instance web-0 can't be started: agent local can't run container targets: use another agent",
			})
		},
		"scaling": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](3) })
			b.settle("web")
			b.want("events of scaling up", b.told.take(), []string{
				"Normal Scaled: Scaled up from 1 to 3 instances",
				"Normal Started: Started instance web-1",
				"Normal Started: Started instance web-2",
			})
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) })
			b.settle("web")
			// What was asked to end is no reason to warn.
			b.want("events of scaling down", b.told.take(), []string{
				"Normal Scaled: Scaled down from 3 to 2 instances",
				"Normal Stopping: Stopping instance web-2 within 30s: the target was scaled down",
				"Normal Exited: Instance web-2 ended by SIGTERM",
			})
		},
		"an instance that doesn't end is told to stop once": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.api.delete("web")
			b.settle("web")
			b.clock.Step(time.Second)
			b.api.deleteWithin("web", 5)
			b.settle("web")
			b.want("events", b.told.take(), []string{"Normal Stopping: Stopping instance web-0 within 30s: the target is being deleted"})
		},
		"a deletion": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.api.deleteWithin("web", 7)
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Normal Stopping: Stopping instance web-0 within 7s: the target is being deleted",
				"Normal Exited: Instance web-0 ended by SIGTERM",
			})
		},
		"a removal by force": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.api.vanish("web")
			b.fetch()
			for range 2 {
				if _, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err != nil {
					b.Fatal(err)
				}
			}
			b.want("events", b.told.take(), []string{
				"Normal Stopping: Stopping instance web-0 within 30s: the target is gone",
				"Normal Exited: Instance web-0 ended by SIGTERM",
			})
		},
		"a rollout": func(b *bench) {
			b.api.create(web(2))
			b.settle("web")
			b.clock.Step(settleTime)
			b.told.take()
			b.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{"v2"} })
			b.settle("web")
			b.want("events of the first", b.told.take(), []string{
				"Normal RolloutStarted: Instances to be replaced by the present spec, one at a time: 2",
				"Normal Stopping: Stopping instance web-1 within 30s: its spec has changed",
				"Normal Exited: Instance web-1 ended by SIGTERM",
				"Normal Started: Started instance web-1",
			})
			b.clock.Step(settleTime)
			b.settle("web")
			b.want("events of the second", b.told.take(), []string{
				"Normal Stopping: Stopping instance web-0 within 30s: its spec has changed",
				"Normal Exited: Instance web-0 ended by SIGTERM",
				"Normal Started: Started instance web-0",
				"Normal RolloutComplete: Every instance is of the present spec",
			})
			b.clock.Step(settleTime)
			b.settle("web")
			b.want("events later", b.told.take(), []string{})
		},
		"a rollout that stops, and goes on with a corrected spec": func(b *bench) {
			b.host.startErr = func(i driver.Instance) error {
				if i.Target.Spec.Process.Command[0] == "bad" {
					return driver.Errorf(driver.Invalid, `command "bad" not found`)
				}
				return nil
			}
			b.api.create(web(2))
			b.settle("web")
			b.clock.Step(settleTime)
			b.told.take()
			b.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{"bad"} })
			b.settle("web")
			b.settle("web") // the status that tells so was written; this finds it stopped
			b.want("events of the bad one", b.told.take(), []string{
				"Normal RolloutStarted: Instances to be replaced by the present spec, one at a time: 2",
				"Normal Stopping: Stopping instance web-1 within 30s: its spec has changed",
				"Normal Exited: Instance web-1 ended by SIGTERM",
				`Warning StartError: Instance web-1 can't be started: command "bad" not found`,
				"Warning BackOff: Back-off 1s before instance web-1 is started again: it couldn't be started",
				`Warning RolloutStopped: the rollout stopped at web-1 (command "bad" not found); instances still on an earlier spec: 1; correct the spec to go on`,
			})
			b.clock.Step(time.Second)
			b.settle("web")
			b.want("events of the next try", b.told.take(), []string{
				`Warning StartError: Instance web-1 can't be started: command "bad" not found`,
				"Warning BackOff: Back-off 2s before instance web-1 is started again: it couldn't be started",
			})
			b.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{"v3"} })
			b.settle("web")
			b.clock.Step(settleTime)
			b.settle("web")
			b.want("events of the good one", b.told.take(), []string{
				"Normal RolloutStarted: Instances to be replaced by the present spec, one at a time: 2",
				"Normal Started: Started instance web-1",
				"Normal Stopping: Stopping instance web-0 within 30s: its spec has changed",
				"Normal Exited: Instance web-0 ended by SIGTERM",
				"Normal Started: Started instance web-0",
				"Normal RolloutComplete: Every instance is of the present spec",
			})
		},
		"what is wrong with an instance that runs on is told when it changes": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.host.complain("web-0", "the log can't be written: no space left on device")
			b.settle("web")
			b.settle("web")
			b.want("events", b.told.take(), []string{"Warning Impaired: Instance web-0: the log can't be written: no space left on device"})
			b.host.complain("web-0", "")
			b.settle("web")
			b.want("events when all is well", b.told.take(), []string{})
			b.host.complain("web-0", "the log can't be written: no space left on device")
			b.settle("web")
			b.want("events when it comes back", b.told.take(), []string{"Warning Impaired: Instance web-0: the log can't be written: no space left on device"})
		},
		"instances that ended with their agent": func(b *bench) {
			b.api.create(web(2))
			b.settle("web")
			b.told.take()
			b.host.restart()
			b.newAgent()
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Warning AgentLost: Instance web-0 is lost: the agent that ran it ended, and the instance with it",
				"Warning AgentLost: Instance web-1 is lost: the agent that ran it ended, and the instance with it",
				"Normal Started: Started instance web-0",
				"Normal Started: Started instance web-1",
			})
		},
		"scaling while the agent was away": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			b.host.restart()
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) })
			b.newAgent()
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Warning AgentLost: Instance web-0 is lost: the agent that ran it ended, and the instance with it",
				"Normal Scaled: Scaled up from 1 to 2 instances",
				"Normal Started: Started instance web-0",
				"Normal Started: Started instance web-1",
			})
		},
		"a host that can't be asked, or doesn't stop what it should": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.told.take()
			fails := func(what string) {
				b.Helper()
				b.fetch()
				if _, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err == nil {
					b.Errorf("no error: %s", what)
				}
			}
			b.host.listErr = driver.Errorf(driver.Unavailable, "the daemon isn't running")
			fails("listing")
			b.want("events", b.told.take(), []string{"Warning HostError: Agent local: listing the instances: the daemon isn't running"})
			b.host.listErr, b.host.stopErr = nil, driver.Errorf(driver.Internal, "it doesn't hear")
			b.api.delete("web")
			fails("stopping")
			b.want("events", b.told.take(), []string{"Warning HostError: Agent local: stopping instance web-0: it doesn't hear"})
			b.host.stopErr = nil
			b.r.hosts[v1.SourceProcess].ready.Store(false)
			fails("a host that hasn't begun")
			b.want("events", b.told.take(), []string{"Warning HostError: Agent local: the host for process instances isn't ready yet"})
			b.r.hosts[v1.SourceProcess].ready.Store(true)
			b.settle("web")
			b.want("events", b.told.take(), []string{
				"Normal Stopping: Stopping instance web-0 within 30s: the target is being deleted",
				"Normal Exited: Instance web-0 ended by SIGTERM",
			})
		},
	}
	for name, story := range tests {
		t.Run(name, func(t *testing.T) { story(newBench(t)) })
	}
}

// `kubectl describe` finds events by name, namespace, kind and UID.
func TestEventsAreAboutTheTarget(t *testing.T) {
	b := newBench(t)
	created := b.api.create(web(1))
	b.settle("web")
	if len(b.told.about) != 1 {
		t.Fatalf("got %v", b.told.lines)
	}
	got := b.told.about[0]
	got.ResourceVersion = ""
	b.want("what it is about", got, corev1.ObjectReference{
		APIVersion: "streaming.aaserver.io/v1", Kind: "Target", Namespace: "shop", Name: "web", UID: created.UID,
	})
}

// An agent that nobody gave a recorder does its work.
func TestEventsAreNotNeeded(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	target := web(1)
	target.Finalizers = nil
	l.api.create(target)
	l.ready("web", 1)
	l.api.delete("web")
	eventually(t, "the target is gone", func() bool { return l.api.get("web") == nil })
}
