package agent

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"

	listers "aaserver.io/aaserver/apis/generated/listers/streaming/v1"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// bench calls sync by hand, so that each step is known: no goroutine, no time
// but that of its clock.
type bench struct {
	*testing.T
	api     *fakeAPI
	host    *fakeHost
	clock   *clocktesting.FakeClock
	indexer cache.Indexer
	r       *reconciler
	told    *fakeRecorder
	// taken are the ports that other programs use.
	taken map[int32]bool
}

var began = time.Unix(1_700_000_000, 123_456_789)

func newBench(t *testing.T) *bench {
	fake := clocktesting.NewFakeClock(began)
	b := &bench{T: t, api: newFakeAPI(t), clock: fake, host: newFakeHost(t, fake), told: &fakeRecorder{}, taken: map[int32]bool{}}
	b.newAgent()
	return b
}

// newAgent is a restart of the agent alone.
func (b *bench) newAgent() {
	b.Helper()
	agent, err := New(Options{
		Name: "local", Client: b.api, Clock: b.clock, Recorder: b.told,
		PortRange: utilnet.PortRange{Base: 20000, Size: 5},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.indexer = cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	b.r = newReconciler(agent.opts, map[string]driver.Host{v1.SourceProcess: b.host}, agent.metrics, listers.NewTargetLister(b.indexer))
	b.Cleanup(b.r.queue.ShutDown)
	b.r.ports.next = 0
	b.r.ports.inUse = func(p hostPort) bool { return b.taken[p.number] }
	b.fetch()
	if err := b.r.adopt(); err != nil {
		b.Fatal(err)
	}
	for _, h := range b.r.hosts {
		if err := b.r.prepare(b.Context(), h); err != nil {
			b.Log(err)
		}
	}
}

// fetch is what the informer does.
func (b *bench) fetch() {
	b.Helper()
	var objs []any
	for _, name := range []string{"web", "db"} {
		if target := b.api.get(name); target != nil {
			objs = append(objs, target)
		}
	}
	if err := b.indexer.Replace(objs, ""); err != nil {
		b.Fatal(err)
	}
}

// settle sees to a target until nothing changes any more, and returns after
// how long it wants to be seen to again.
func (b *bench) settle(names ...string) time.Duration {
	b.Helper()
	wake := time.Duration(0)
	for _, name := range names {
		for range 100 {
			b.fetch()
			writes, events := b.api.writes(), len(b.host.events)
			var err error
			wake, err = b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: name})
			if err != nil {
				b.Fatal(err)
			}
			if writes == b.api.writes() && events == len(b.host.events) {
				break
			}
		}
	}
	return wake
}

func (b *bench) want(what string, got, want any) {
	b.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		b.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// instances tells of each instance in a line.
func (b *bench) instances(name string) []string {
	b.Helper()
	var lines []string
	for _, i := range b.api.get(name).Status.Instances {
		line := i.Name
		if i.Ready {
			line += " ready"
		}
		line += " " + stateLine(i.State)
		if last := stateLine(i.LastState); last != "" {
			line += ", before " + last
		}
		if i.RestartCount > 0 {
			line += fmt.Sprintf(", restarts %d", i.RestartCount)
		}
		lines = append(lines, line)
	}
	return lines
}

func stateLine(s v1.InstanceState) string {
	switch {
	case s.Running != nil:
		return "Running"
	case s.Terminated != nil:
		return fmt.Sprintf("%s %d", s.Terminated.Reason, s.Terminated.ExitCode)
	case s.Waiting != nil && s.Waiting.Message != "":
		return fmt.Sprintf("%s (%s)", s.Waiting.Reason, s.Waiting.Message)
	case s.Waiting != nil:
		return s.Waiting.Reason
	}
	return ""
}

func (b *bench) condition(name, kind string) string {
	b.Helper()
	c := meta.FindStatusCondition(b.api.get(name).Status.Conditions, kind)
	if c == nil {
		b.Fatalf("no condition %s", kind)
	}
	return fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
}

func web(replicas int32) *v1.Target {
	return &v1.Target{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Finalizers: []string{"other/one", v1.FinalizerInstances}},
		Spec: v1.TargetSpec{
			AgentName:                     "local",
			Replicas:                      ptr.To(replicas),
			RestartPolicy:                 v1.RestartAlways,
			TerminationGracePeriodSeconds: ptr.To[int64](30),
			Process:                       &v1.ProcessSource{Command: []string{"v1"}},
		},
	}
}

func withPorts(target *v1.Target, ports ...v1.TargetPort) *v1.Target {
	target.Spec.Ports = ports
	return target
}

func withPolicy(target *v1.Target, policy v1.RestartPolicy) *v1.Target {
	target.Spec.RestartPolicy = policy
	return target
}

func named(target *v1.Target, name string) *v1.Target {
	target.Name = name
	return target
}

func TestStatusOfANewTarget(t *testing.T) {
	b := newBench(t)
	b.api.create(withPorts(web(2), v1.TargetPort{Name: "http", Port: 8080}))
	if wake := b.settle("web"); wake != 0 {
		t.Errorf("wants to be seen to again after %s", wake)
	}
	second := metav1.NewTime(began.Truncate(time.Second))
	running := v1.InstanceState{Running: &v1.InstanceStateRunning{StartedAt: second}}
	want := v1.TargetStatus{
		ObservedGeneration: 1, Replicas: 2, ReadyReplicas: 2,
		Instances: []v1.InstanceStatus{
			{Name: "web-0", Ready: true, State: running, Ports: []v1.InstancePort{{Name: "http", Port: 8080, HostPort: 20000}}},
			{Name: "web-1", Ready: true, State: running, Ports: []v1.InstancePort{{Name: "http", Port: 8080, HostPort: 20001}}},
		},
		Conditions: []metav1.Condition{
			{Type: "Ready", Status: "True", ObservedGeneration: 1, LastTransitionTime: second,
				Reason: "AllInstancesReady", Message: "2 of 2 instances are ready"},
			{Type: "Progressing", Status: "False", ObservedGeneration: 1, LastTransitionTime: second,
				Reason: "UpToDate", Message: "every instance is of the present spec"},
			{Type: "AgentConnected", Status: "True", ObservedGeneration: 1, LastTransitionTime: second,
				Reason: "Connected", Message: "agent local runs the instances"},
		},
	}
	b.want("status", b.api.get("web").Status, want)
	if writes := b.api.writes(); writes != 1 {
		t.Errorf("the status was written %d times, want once", writes)
	}
}

// Each sentence is a life of one target, or two.
func TestReconcile(t *testing.T) {
	tests := map[string]func(*bench){
		"scaling up starts the new ones, scaling down ends the highest first": func(b *bench) {
			b.api.create(withPorts(web(1), v1.TargetPort{Name: "http", Port: 8080}))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](3) })
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0", "start web-1", "start web-2"})
			b.want("ready", b.condition("web", "Ready"), "True AllInstancesReady: 3 of 3 instances are ready")

			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](1) })
			b.settle("web")
			b.want("events", b.host.take(), []string{"stop web-2 within 30s", "stop web-1 within 30s", "remove web-2", "remove web-1"})
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
			b.want("ports that are held", len(b.r.ports.owner), 1)
			b.want("generation", b.api.get("web").Status.ObservedGeneration, int64(3))
		},
		"an instance that is scaled away is shown until it has ended": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(2))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](1) })
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running", "web-1 Running"})
			b.want("replicas", b.api.get("web").Status.Replicas, int32(2))
			b.want("ready", b.condition("web", "Ready"), "True AllInstancesReady: 1 of 1 instances are ready")
			b.want("progressing", b.condition("web", "Progressing"), "True StoppingInstances: instances to be stopped: 1")
			b.host.exit("web-1", 0)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
			b.want("events", b.host.take(), []string{"start web-0", "start web-1", "stop web-1 within 30s", "remove web-1"})
		},
		"an instance that is wanted again while it is stopped comes back as a new one": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(2))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](1) })
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) })
			b.settle("web")
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 1 of 2 instances are ready; web-1 is stopping")
			b.host.exit("web-1", 0)
			b.host.take()
			b.settle("web")
			b.want("events", b.host.take(), []string{"remove web-1", "start web-1"})
			b.want("instances", b.instances("web"), []string{"web-0 ready Running", "web-1 ready Running"})
		},
		"no replicas are ready": func(b *bench) {
			b.api.create(web(0))
			b.settle("web")
			b.want("ready", b.condition("web", "Ready"), "True NoReplicas: no instances are wanted")
			b.want("instances", b.instances("web"), []string{})
		},
		"a crash is restarted after a back-off and counted": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.host.exit("web-0", 3)
			b.want("wake", b.settle("web"), time.Second)
			const waiting = "back-off 1s: exited with code 3"
			b.want("instances", b.instances("web"), []string{"web-0 CrashLoopBackOff (" + waiting + "), before Error 3"})
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 0 of 1 instances are ready; web-0: "+waiting)
			b.clock.Step(time.Second - 1)
			b.settle("web")
			b.want("running before the back-off is over", b.host.running(), []string{})
			b.clock.Step(1)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running, before Error 3, restarts 1"})
		},
		"the back-off doubles up to five minutes, and begins anew after a run of ten": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			for _, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300} {
				b.host.exit("web-0", 1)
				b.want("back-off", b.settle("web"), want*time.Second)
				b.clock.Step(want * time.Second)
				b.settle("web")
			}
			b.clock.Step(10*time.Minute - 1)
			b.host.exit("web-0", 1)
			b.want("back-off after less", b.settle("web"), 5*time.Minute)
			b.clock.Step(5 * time.Minute)
			b.settle("web")
			b.clock.Step(10 * time.Minute)
			b.host.exit("web-0", 1)
			b.want("back-off after a long run", b.settle("web"), time.Second)
			b.want("restarts", b.api.get("web").Status.Instances[0].RestartCount, int32(12))
		},
		"an instance that ends as soon as it has started is restarted after a back-off too": func(b *bench) {
			b.host.brief = true
			b.api.create(web(1))
			b.want("wake", b.settle("web"), time.Second)
			b.clock.Step(time.Second)
			b.want("wake", b.settle("web"), 2*time.Second)
			b.want("instances", b.instances("web"), []string{
				"web-0 CrashLoopBackOff (back-off 2s: exited with code 1), before Error 1, restarts 1"})
		},
		"a server that was restored from a backup is believed after a minute": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.host.complain("web-0", "something to write")
			b.settle("web")
			b.api.version = 0
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) })
			b.clock.Step(informerLag)
			b.settle("web")
			b.want("running", b.host.running(), []string{"web-0", "web-1"})
		},
		"an instance killed by a signal says by which": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.host.mu.Lock()
			for id := range b.host.instances {
				b.host.endLocked(id, v1.InstanceStateTerminated{ExitCode: 137, Signal: 9, Reason: "Killed", Message: "out of memory"})
			}
			b.host.mu.Unlock()
			b.settle("web")
			b.want("instances", b.instances("web"), []string{
				"web-0 CrashLoopBackOff (back-off 1s: ended by SIGKILL: out of memory), before Killed 137"})
		},
		"what can't be started says why, and is tried again": func(b *bench) {
			b.host.startErr = func(driver.Instance) error { return driver.Errorf(driver.Invalid, "no such command: v1") }
			b.api.create(web(1))
			b.want("wake", b.settle("web"), time.Second)
			b.want("instances", b.instances("web"), []string{"web-0 StartError (no such command: v1 (back-off 1s)), before StartError 128"})
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 0 of 1 instances are ready; web-0: no such command: v1 (back-off 1s)")
			b.clock.Step(time.Second)
			b.want("wake", b.settle("web"), 2*time.Second)
			b.host.startErr = nil
			b.clock.Step(2 * time.Second)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running, before StartError 128"})
		},
		"what can't be started and never restarts is left": func(b *bench) {
			b.host.startErr = func(driver.Instance) error { return errors.New("no such command") }
			b.api.create(withPolicy(web(1), v1.RestartNever))
			b.want("wake", b.settle("web"), time.Duration(0))
			b.want("instances", b.instances("web"), []string{"web-0 StartError 128"})
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 0 of 1 instances are ready; web-0 has ended: no such command")
		},
		"a very long error is cut": func(b *bench) {
			b.host.startErr = func(driver.Instance) error { return errors.New(strings.Repeat("é", 5000)) }
			b.api.create(web(5))
			b.settle("web")
			status := b.api.get("web").Status
			for _, length := range []int{
				len(status.Instances[0].State.Waiting.Message), len(status.Instances[0].LastState.Terminated.Message), len(b.condition("web", "Ready")) / 4,
			} {
				if length > maxMessage+100 {
					b.Errorf("a message of %d bytes", length)
				}
			}
			if ready := b.condition("web", "Ready"); !strings.HasSuffix(ready, "; and 2 more") || strings.ContainsRune(ready, '\uFFFD') {
				b.Errorf("got %q", ready)
			}
		},
		"a target of a source that the agent has no host for says so, and can be deleted": func(b *bench) {
			target := web(1)
			target.Spec.Process, target.Spec.Container = nil, &v1.ContainerSource{Image: "nginx"}
			b.api.create(target)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{
				"web-0 StartError (agent local can't run container targets: use another agent (back-off 1s)), before StartError 128"})
			b.api.delete("web")
			b.settle("web")
			b.want("finalizers", b.api.get("web").Finalizers, []string{"other/one"})
		},
		"targets of other agents, and those that are reached, are left alone": func(b *bench) {
			target := web(1)
			target.Spec.AgentName = "other"
			b.api.create(target)
			reached := named(web(1), "db")
			reached.Spec.Process, reached.Spec.TCP = nil, &v1.TCPSource{Endpoints: []v1.Endpoint{{Name: "a", Host: "h", Port: 1}}}
			b.api.create(reached)
			b.settle("web", "db")
			b.want("events", b.host.take(), []string(nil))
			b.want("writes", b.api.writes(), 0)
		},
		"something wrong that doesn't end the instance is told with its readiness": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.host.complain("web-0", "its log can't be written: no space left on device")
			b.settle("web")
			b.want("ready", b.condition("web", "Ready"),
				"True AllInstancesReady: 1 of 1 instances are ready; web-0: its log can't be written: no space left on device")
			b.host.complain("web-0", "")
			b.settle("web")
			b.want("ready", b.condition("web", "Ready"), "True AllInstancesReady: 1 of 1 instances are ready")
		},
		"changes to replicas, restart policy and grace period restart nothing": func(b *bench) {
			b.api.create(web(2))
			b.settle("web")
			b.host.take()
			b.api.change("web", func(s *v1.TargetSpec) {
				s.Replicas = ptr.To[int32](3)
				s.RestartPolicy = v1.RestartNever
				s.TerminationGracePeriodSeconds = ptr.To[int64](5)
				s.ClassName = "other"
			})
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-2"})
			b.want("generation", b.api.get("web").Status.ObservedGeneration, int64(2))
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) })
			b.settle("web")
			b.want("events", b.host.take(), []string{"stop web-2 within 5s", "remove web-2"})
		},
		"a policy that is changed counts for what has ended": func(b *bench) {
			b.api.create(withPolicy(web(1), v1.RestartNever))
			b.settle("web")
			b.host.exit("web-0", 3)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 Error 3"})
			b.clock.Step(time.Hour)
			b.api.change("web", func(s *v1.TargetSpec) { s.RestartPolicy = v1.RestartOnFailure })
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running, before Error 3, restarts 1"})
		},
		"a conflict is no more than a reason to look again": func(b *bench) {
			b.api.create(web(1))
			conflict := apierrors.NewConflict(targetsResource.GroupResource(), "web", errors.New("modified"))
			b.api.refuse = []error{conflict}
			b.fetch()
			_, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"})
			if !isConflict(err) {
				b.Errorf("got %v, want a conflict", err)
			}
			if isConflict(errors.Join(err, errors.New("another"))) {
				b.Error("an error beside a conflict is taken for one")
			}
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
			b.want("events", b.host.take(), []string{"start web-0"})
		},
		"an informer that lags behind the agent's own write leads to no other": func(b *bench) {
			b.api.create(web(1))
			b.fetch()
			for range 3 { // without what the first has written
				if _, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err != nil {
					b.Fatal(err)
				}
			}
			b.want("writes", b.api.writes(), 1)
		},
		"a restart of the server is no end of the world: what fails to be written is written later": func(b *bench) {
			b.api.create(web(1))
			b.api.refuse = []error{apierrors.NewServiceUnavailable("starting")}
			b.fetch()
			if _, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err == nil || isConflict(err) {
				b.Errorf("got %v, want an error", err)
			}
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
		},
		"other conditions are kept, and a transition keeps its time": func(b *bench) {
			target := b.api.create(web(1))
			target.Status.Conditions = []metav1.Condition{{Type: "Other", Status: "True", Reason: "R", LastTransitionTime: metav1.NewTime(began)}}
			if _, err := b.api.StreamingV1().Targets("shop").UpdateStatus(b.Context(), target, metav1.UpdateOptions{}); err != nil {
				b.Fatal(err)
			}
			b.settle("web")
			b.clock.Step(time.Minute)
			b.host.complain("web-0", "something new to write")
			b.settle("web")
			conditions := b.api.get("web").Status.Conditions
			b.want("number", len(conditions), 4)
			ready := meta.FindStatusCondition(conditions, "Ready")
			if !strings.HasSuffix(ready.Message, "something new to write") || ready.LastTransitionTime.Unix() != began.Unix() {
				b.Errorf("got %v", ready)
			}
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(newBench(t)) })
	}
}

func TestRestartPolicy(t *testing.T) {
	tests := map[string]struct {
		policy   v1.RestartPolicy
		exitCode int32
		want     string
	}{
		"Always restarts what failed":            {v1.RestartAlways, 3, "web-0 ready Running, before Error 3, restarts 1"},
		"Always restarts what completed":         {v1.RestartAlways, 0, "web-0 ready Running, before Completed 0, restarts 1"},
		"OnFailure restarts what failed":         {v1.RestartOnFailure, 3, "web-0 ready Running, before Error 3, restarts 1"},
		"OnFailure leaves what completed":        {v1.RestartOnFailure, 0, "web-0 Completed 0"},
		"Never leaves what failed":               {v1.RestartNever, 3, "web-0 Error 3"},
		"Never leaves what completed":            {v1.RestartNever, 0, "web-0 Completed 0"},
		"no policy at all is taken to be Always": {"", 0, "web-0 ready Running, before Completed 0, restarts 1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.api.create(withPolicy(web(1), test.policy))
			b.settle("web")
			b.host.exit("web-0", test.exitCode)
			b.settle("web")
			b.clock.Step(time.Hour)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{test.want})
		})
	}
}

func TestRollout(t *testing.T) {
	change := func(command string) func(*v1.TargetSpec) {
		return func(s *v1.TargetSpec) { s.Process.Command = []string{command} }
	}
	tests := map[string]func(*bench){
		"a changed source replaces one instance after another, the highest first, each once the last has run for a second": func(b *bench) {
			b.api.create(web(3))
			b.settle("web")
			b.host.take()
			b.api.change("web", change("v2"))
			b.want("wake", b.settle("web"), time.Second)
			b.want("events", b.host.take(), []string{"stop web-2 within 30s", "start web-2"})
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v1", "web-2": "v2"})
			b.want("progressing", b.condition("web", "Progressing"), "True ReplacingInstances: instances still on an earlier spec: 2; next is web-1")
			b.want("ready", b.condition("web", "Ready"), "True AllInstancesReady: 3 of 3 instances are ready")

			b.clock.Step(time.Second - 1)
			b.want("wake", b.settle("web"), time.Duration(1))
			b.want("events", b.host.take(), []string(nil))
			b.clock.Step(1)
			b.settle("web")
			b.want("events", b.host.take(), []string{"stop web-1 within 30s", "start web-1"})
			b.clock.Step(time.Second)
			b.want("wake", b.settle("web"), time.Duration(0))
			b.want("events", b.host.take(), []string{"stop web-0 within 30s", "start web-0"})
			b.want("progressing", b.condition("web", "Progressing"), "False UpToDate: every instance is of the present spec")
			b.want("instances", b.instances("web"), []string{
				"web-0 ready Running, before Killed 143", "web-1 ready Running, before Killed 143", "web-2 ready Running, before Killed 143"})
		},
		"the next waits for the last to have ended": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(2))
			b.settle("web")
			b.api.change("web", change("v2"))
			b.settle("web")
			b.clock.Step(time.Minute)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running", "web-1 Running"})
			b.want("events", b.host.take(), []string{"start web-0", "start web-1", "stop web-1 within 30s"})
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 1 of 2 instances are ready; web-1 is stopping")
			b.host.exit("web-1", 0)
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v2"})
		},
		"changed ports replace instances too": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Ports = []v1.TargetPort{{Name: "http", Port: 80}} })
			b.settle("web")
			b.want("ports", b.api.get("web").Status.Instances[0].Ports, []v1.InstancePort{{Name: "http", Port: 80, HostPort: 20000}})
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s", "start web-0"})
		},
		"a spec that crashes stops at the first instance, and a correct one goes on": func(b *bench) {
			b.api.create(web(3))
			b.settle("web")
			b.api.change("web", change("bad"))
			b.settle("web")
			b.host.exit("web-2", 2)
			b.settle("web")
			for range 5 {
				// It runs for less than it has to, each time.
				b.clock.Step(backoffMax)
				b.settle("web")
				b.clock.Step(settleTimeCrashed - 1)
				b.settle("web")
				if got := b.condition("web", "Progressing"); !strings.HasPrefix(got, "False RolloutStopped") {
					b.Errorf("while it runs for a moment: got %q", got)
				}
				b.host.exit("web-2", 2)
				b.settle("web")
			}
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v1"})
			b.want("progressing", b.condition("web", "Progressing"),
				"False RolloutStopped: the rollout stopped at web-2 (exited with code 2); instances still on an earlier spec: 2; correct the spec to go on")

			b.api.change("web", change("v3"))
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v1", "web-2": "v3"})
			b.want("restarts", b.api.get("web").Status.Instances[2].RestartCount, int32(0))
			for range 2 {
				b.clock.Step(time.Second)
				b.settle("web")
			}
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v3", "web-1": "v3", "web-2": "v3"})
			b.want("progressing", b.condition("web", "Progressing"), "False UpToDate: every instance is of the present spec")
		},
		"a spec that can't be started stops at the first instance, and the former one goes on": func(b *bench) {
			b.host.startErr = func(i driver.Instance) error {
				if i.Target.Spec.Process.Command[0] == "bad" {
					return driver.Errorf(driver.Invalid, "no such command")
				}
				return nil
			}
			b.api.create(web(2))
			b.settle("web")
			b.api.change("web", change("bad"))
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1"})
			b.want("progressing", b.condition("web", "Progressing"),
				"False RolloutStopped: the rollout stopped at web-1 (no such command); instances still on an earlier spec: 1; correct the spec to go on")
			b.host.take()
			b.clock.Step(time.Second)
			b.api.change("web", change("v1"))
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-1"})
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v1"})
		},
		"an instance that waits for its turn and crashes is restarted by its own spec": func(b *bench) {
			b.api.create(web(2))
			b.settle("web")
			b.api.change("web", change("bad"))
			b.settle("web")
			b.host.exit("web-1", 2)
			b.host.exit("web-0", 1)
			b.settle("web")
			b.clock.Step(time.Second)
			b.settle("web")
			b.host.exit("web-1", 2)
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1"})
		},
		"what doesn't run is replaced at once, whatever its back-off": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			for range 8 {
				b.host.exit("web-0", 1)
				b.settle("web")
				b.clock.Step(backoffMax)
				b.settle("web")
			}
			b.host.exit("web-0", 1)
			b.settle("web")
			b.api.change("web", change("v2"))
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running, before Error 1"})
		},
		"what has completed runs again by a new spec, one after another": func(b *bench) {
			b.api.create(withPolicy(web(2), v1.RestartNever))
			b.settle("web")
			b.host.exit("web-0", 0)
			b.host.exit("web-1", 0)
			b.settle("web")
			b.host.take()
			b.api.change("web", change("v2"))
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-1"})
			b.host.exit("web-1", 0)
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0"})
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 Completed 0, before Completed 0", "web-1 Completed 0, before Completed 0"})
			b.want("ready", b.condition("web", "Ready"), "False InstancesNotReady: 0 of 2 instances are ready; web-0 has completed; web-1 has completed")
		},
		"a run that fails for good stops the rollout": func(b *bench) {
			b.api.create(withPolicy(web(2), v1.RestartNever))
			b.settle("web")
			b.api.change("web", change("bad"))
			b.settle("web")
			b.host.exit("web-1", 4)
			b.settle("web")
			b.clock.Step(time.Hour)
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1"})
			if got := b.condition("web", "Progressing"); !strings.HasPrefix(got, "False RolloutStopped") {
				b.Errorf("got %q", got)
			}
		},
		"a spec that changes again while an instance is stopped starts the newest": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(1))
			b.settle("web")
			b.api.change("web", change("v2"))
			b.settle("web")
			b.api.change("web", change("v3"))
			b.settle("web")
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v3"})
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s", "start web-0"})
		},
		"a spec that is taken back while an instance is stopped starts that one again, and replaces no other": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(2))
			b.settle("web")
			b.clock.Step(time.Minute)
			b.api.change("web", change("v2"))
			b.settle("web")
			b.api.change("web", change("v1"))
			b.settle("web")
			b.want("progressing", b.condition("web", "Progressing"), "True ReplacingInstances: instances still on an earlier spec: 1; next is web-1")
			b.host.exit("web-1", 0)
			b.settle("web")
			b.clock.Step(time.Minute)
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0", "start web-1", "stop web-1 within 30s", "start web-1"})
		},
		"an instance that can't be asked to end is asked again": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.host.take()
			b.host.stopErr = errors.New("the daemon is busy")
			b.api.change("web", change("v2"))
			b.fetch()
			if _, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); !errors.Is(err, b.host.stopErr) {
				b.Errorf("got %v, want %v", err, b.host.stopErr)
			}
			b.host.stopErr = nil
			b.settle("web")
			b.want("events", b.host.take(), []string{"stop web-0 within 30s", "stop web-0 within 30s", "start web-0"})
		},
		"an instance that is scaled up during a rollout runs the new spec": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { change("v2")(s); s.Replicas = ptr.To[int32](2) })
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v1", "web-1": "v2"})
			b.clock.Step(time.Second)
			b.settle("web")
			b.want("commands", b.host.commands(), map[string]string{"web-0": "v2", "web-1": "v2"})
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(newBench(t)) })
	}
}

func TestPorts(t *testing.T) {
	http := v1.TargetPort{Name: "http", Port: 8080}
	hostPorts := func(b *bench, name string) map[string][]int32 {
		got := map[string][]int32{}
		for _, i := range b.api.get(name).Status.Instances {
			for _, p := range i.Ports {
				got[i.Name] = append(got[i.Name], p.HostPort)
			}
		}
		return got
	}
	tests := map[string]func(*bench){
		"ports that other programs use are not given": func(b *bench) {
			b.taken[20000], b.taken[20002] = true, true
			b.api.create(withPorts(web(2), http))
			b.settle("web")
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {20001}, "web-1": {20003}})
		},
		"an instance keeps its port when it is restarted, and gets another if that is taken meanwhile": func(b *bench) {
			b.api.create(withPorts(web(1), http))
			b.settle("web")
			restart := func() {
				b.host.exit("web-0", 1)
				b.settle("web")
				b.clock.Step(backoffMax)
				b.settle("web")
			}
			restart()
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {20000}})
			b.taken[20000] = true
			restart()
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {20001}})
		},
		"an instance that is down keeps its port from others": func(b *bench) {
			b.api.create(withPorts(web(1), http))
			b.settle("web")
			b.host.exit("web-0", 1)
			b.settle("web")
			b.r.ports.next = 0
			b.api.create(withPorts(named(web(1), "db"), http))
			b.settle("db")
			b.want("ports", hostPorts(b, "db"), map[string][]int32{"db-0": {20001}})
		},
		"a fixed host port is honoured, and refused with a reason if it is taken by another instance": func(b *bench) {
			fixed := http
			fixed.HostPort = 9000
			b.api.create(withPorts(web(1), fixed))
			b.api.create(withPorts(named(web(1), "db"), fixed))
			b.settle("web", "db")
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {9000}})
			b.want("instances", b.instances("db"), []string{
				"db-0 StartError (port http: port 9000/TCP of the host is in use by instance shop/web-0 (back-off 1s)), before StartError 128"})
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](0) })
			b.settle("web")
			b.clock.Step(time.Second)
			b.settle("db")
			b.want("ports", hostPorts(b, "db"), map[string][]int32{"db-0": {9000}})
		},
		"a fixed host port is refused with a reason if it is taken by another program": func(b *bench) {
			b.taken[9000] = true
			fixed := http
			fixed.HostPort = 9000
			b.api.create(withPorts(web(1), fixed))
			b.settle("web")
			b.want("instances", b.instances("web"), []string{
				"web-0 StartError (port http: port 9000/TCP of the host is in use by another program (back-off 1s)), before StartError 128"})
		},
		"TCP and UDP have the same number": func(b *bench) {
			b.api.create(withPorts(web(1), v1.TargetPort{Name: "dns", Port: 53, HostPort: 5300}, v1.TargetPort{Name: "dns-udp", Port: 53, HostPort: 5300, Protocol: "UDP"}))
			b.settle("web")
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {5300, 5300}})
		},
		"when no port is free, the instance says so": func(b *bench) {
			b.api.create(withPorts(web(6), http))
			b.settle("web")
			b.want("last", b.instances("web")[5], "web-5 StartError (port http: none of the host ports 20000-20004 is free: "+
				"stop some instances, or give the agent a wider range (back-off 1s)), before StartError 128")
		},
		"a port that was given up is the last to be given again": func(b *bench) {
			b.api.create(withPorts(web(1), http))
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](0) })
			b.settle("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](5) })
			b.settle("web")
			b.want("ports", hostPorts(b, "web"), map[string][]int32{
				"web-0": {20001}, "web-1": {20002}, "web-2": {20003}, "web-3": {20004}, "web-4": {20000}})
		},
		"a restarted agent gives each instance the port that it had": func(b *bench) {
			b.api.create(withPorts(web(2), http))
			b.settle("web")
			b.api.create(withPorts(named(web(1), "db"), http))
			b.host.restart()
			b.newAgent()
			b.settle("db", "web")
			b.want("ports", hostPorts(b, "web"), map[string][]int32{"web-0": {20000}, "web-1": {20001}})
			b.want("ports", hostPorts(b, "db"), map[string][]int32{"db-0": {20002}})
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(newBench(t)) })
	}
}

func TestDeletion(t *testing.T) {
	http := v1.TargetPort{Name: "http", Port: 8080}
	tests := map[string]func(*bench){
		"all instances end before the finalizer goes, and the status shows them going": func(b *bench) {
			b.host.stubborn = true
			b.api.create(withPorts(web(2), http))
			b.settle("web")
			b.host.take()
			b.api.delete("web")
			b.settle("web")
			b.want("events", b.host.take(), []string{"stop web-1 within 30s", "stop web-0 within 30s"})
			b.want("instances", b.instances("web"), []string{"web-0 Running", "web-1 Running"})
			b.want("ready", b.condition("web", "Ready"), "False Deleting: the target is being deleted; instances that haven't ended: 2")
			b.want("progressing", b.condition("web", "Progressing"), "True Deleting: the instances are being stopped")
			b.host.exit("web-1", 0)
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 Running"})
			b.want("finalizers", b.api.get("web").Finalizers, []string{"other/one", v1.FinalizerInstances})
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("events", b.host.take(), []string{"remove web-1", "remove web-0"})
			b.want("finalizers", b.api.get("web").Finalizers, []string{"other/one"})
			b.want("status", b.api.get("web").Status.Replicas, int32(0))
			b.want("ports that are held", len(b.r.ports.owner), 0)
			b.want("patches", b.api.patches, 1)
		},
		"without another finalizer, the target is gone and forgotten": func(b *bench) {
			target := web(1)
			target.Finalizers = []string{v1.FinalizerInstances}
			b.api.create(target)
			b.settle("web")
			b.api.delete("web")
			b.settle("web")
			if got := b.api.get("web"); got != nil {
				b.Errorf("still there: %v", got)
			}
			b.want("tracked", len(b.r.byUID)+len(b.r.byKey), 0)
		},
		"what isn't scaled or restarted any more once it is deleted": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(1))
			b.settle("web")
			b.api.delete("web")
			b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](5); s.Process.Command = []string{"v2"} })
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s"})
		},
		"a shorter grace period brings the end forward": func(b *bench) {
			b.host.stubborn = true
			b.api.create(web(1))
			b.settle("web")
			b.api.delete("web")
			b.settle("web")
			b.clock.Step(time.Second)
			b.settle("web")
			b.api.deleteWithin("web", 2)
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s", "stop web-0 within 2s"})
		},
		"a target that was removed by force is ended too": func(b *bench) {
			b.host.stubborn = true
			b.api.create(withPorts(web(1), http))
			b.settle("web")
			b.api.vanish("web")
			b.settle("web")
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s"})
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("events", b.host.take(), []string{"remove web-0"})
			b.want("tracked", len(b.r.byUID)+len(b.r.byKey)+len(b.r.ports.owner), 0)
		},
		"a target of the same name waits for its predecessor's instances": func(b *bench) {
			b.host.stubborn = true
			fixed := http
			fixed.HostPort = 9000
			b.api.create(withPorts(web(1), fixed))
			b.settle("web")
			b.api.vanish("web")
			b.api.create(withPorts(web(1), fixed))
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 Pending (instances of the deleted target of this name haven't ended yet)"})
			b.want("progressing", b.condition("web", "Progressing"), "True StartingInstances: instances to be started: 1")
			b.want("events", b.host.take(), []string{"start web-0", "stop web-0 within 30s"})
			b.host.exit("web-0", 0)
			b.settle("web")
			b.want("events", b.host.take(), []string{"remove web-0", "start web-0"})
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
			b.want("tracked", len(b.r.byUID), 1)
		},
		"the finalizer of a target that came to have the name is left": func(b *bench) {
			b.api.create(web(1))
			b.settle("web")
			b.api.delete("web")
			b.fetch() // the agent sees the deletion, and not what comes after it
			b.api.vanish("web")
			b.api.create(web(1))
			_, err := b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"})
			for err == nil && len(b.r.tracked(types.NamespacedName{Namespace: "shop", Name: "web"})[0].instances) > 0 {
				_, err = b.r.sync(b.Context(), types.NamespacedName{Namespace: "shop", Name: "web"})
			}
			if err == nil {
				b.Error("got no error")
			}
			b.want("finalizers", b.api.get("web").Finalizers, []string{"other/one", v1.FinalizerInstances})
			b.settle("web")
			b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(newBench(t)) })
	}
}

func TestGracePeriod(t *testing.T) {
	tests := map[string]struct {
		spec, deletion *int64
		want           time.Duration
	}{
		"is the spec's":                         {spec: ptr.To[int64](5), want: 5 * time.Second},
		"is the default without one":            {want: 30 * time.Second},
		"may be none":                           {spec: ptr.To[int64](0), want: 0},
		"is the deletion's if that is shorter":  {spec: ptr.To[int64](5), deletion: ptr.To[int64](1), want: time.Second},
		"is the deletion's if that is longer":   {spec: ptr.To[int64](5), deletion: ptr.To[int64](9), want: 9 * time.Second},
		"is none if the deletion asks for that": {spec: ptr.To[int64](5), deletion: ptr.To[int64](0), want: 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			target := web(1)
			target.Spec.TerminationGracePeriodSeconds = test.spec
			target.DeletionGracePeriodSeconds = test.deletion
			if got := (&hosted{target: target}).gracePeriod(); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestAgentRestart(t *testing.T) {
	tests := map[string]struct {
		policy v1.RestartPolicy
		// exit is how the instance ends before the agent does; nil if it runs.
		exit *int32
		want string
	}{
		"Always runs again what ran":             {v1.RestartAlways, nil, "web-0 ready Running, before AgentLost 137, restarts 1"},
		"OnFailure runs again what ran":          {v1.RestartOnFailure, nil, "web-0 ready Running, before AgentLost 137, restarts 1"},
		"Never leaves what ran":                  {v1.RestartNever, nil, "web-0 AgentLost 137"},
		"Always goes on restarting what crashed": {v1.RestartAlways, ptr.To[int32](3), "web-0 ready Running, before Error 3, restarts 1"},
		"OnFailure leaves what completed":        {v1.RestartOnFailure, ptr.To[int32](0), "web-0 Completed 0"},
		"Never leaves what failed":               {v1.RestartNever, ptr.To[int32](3), "web-0 Error 3"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.api.create(withPolicy(web(1), test.policy))
			b.settle("web")
			if test.exit != nil {
				b.host.exit("web-0", *test.exit)
				b.settle("web")
			}
			b.host.restart()
			b.newAgent()
			b.settle("web")
			b.want("instances", b.instances("web"), []string{test.want})
			writes := b.api.writes()
			b.settle("web")
			b.want("writes once that is told", b.api.writes(), writes)
		})
	}

	t.Run("restarts go on being counted, and the spec may have changed", func(t *testing.T) {
		b := newBench(t)
		b.api.create(web(2))
		b.settle("web")
		b.host.exit("web-1", 3)
		b.settle("web")
		b.clock.Step(time.Second)
		b.settle("web")
		b.host.restart()
		b.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{"v2"}; s.Replicas = ptr.To[int32](3) })
		b.newAgent()
		b.settle("web")
		b.want("instances", b.instances("web"), []string{
			"web-0 ready Running, before AgentLost 137, restarts 1",
			"web-1 ready Running, before AgentLost 137, restarts 2",
			"web-2 ready Running",
		})
		b.want("commands", b.host.commands(), map[string]string{"web-0": "v2", "web-1": "v2", "web-2": "v2"})
	})
	t.Run("what the host still runs is taken up again", func(t *testing.T) {
		b := newBench(t)
		b.api.create(withPorts(web(2), v1.TargetPort{Name: "http", Port: 80}))
		b.settle("web")
		b.host.take()
		writes := b.api.writes()
		b.newAgent()
		b.settle("web")
		b.want("events", b.host.take(), []string(nil))
		b.want("writes", b.api.writes(), writes)
	})
	t.Run("what the host runs of targets that are gone is ended, and its logs are kept until then", func(t *testing.T) {
		b := newBench(t)
		gone := b.api.create(web(1))
		b.settle("web")
		b.host.take()
		b.api.vanish("web")
		kept := b.api.create(named(web(0), "db"))
		b.newAgent()
		b.want("retained", b.host.retained, []types.UID{kept.UID, gone.UID})
		key, ok := b.r.keyOf(gone.UID)
		if !ok {
			t.Fatal("the orphan isn't known")
		}
		for range 3 {
			if _, err := b.r.sync(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		b.want("events", b.host.take(), []string{"stop web-0 within 30s", "remove web-0"})
		b.want("tracked", len(b.r.byUID), 1)
	})
	t.Run("logs of what has completed are removed with the target", func(t *testing.T) {
		b := newBench(t)
		b.api.create(withPolicy(web(1), v1.RestartNever))
		b.settle("web")
		b.host.exit("web-0", 0)
		b.settle("web")
		b.host.restart()
		b.newAgent()
		b.api.delete("web")
		b.settle("web")
		b.want("events", b.host.take(), []string{"remove web-0"})
	})
	t.Run("nothing is started or told while the host can't be asked", func(t *testing.T) {
		b := newBench(t)
		b.api.create(web(1))
		b.host.listErr = driver.Errorf(driver.Unavailable, "the daemon isn't running")
		b.newAgent()
		b.fetch()
		if _, err := b.r.sync(t.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err == nil {
			t.Error("got no error")
		}
		b.want("events", b.host.take(), []string(nil))
		b.want("writes", b.api.writes(), 0)
		b.host.listErr = nil
		if err := b.r.prepare(t.Context(), b.r.hosts[v1.SourceProcess]); err != nil {
			t.Fatal(err)
		}
		b.settle("web")
		b.want("instances", b.instances("web"), []string{"web-0 ready Running"})
	})
}

// Whatever happens, in whatever order: in the end there is what the last spec
// asks for, no port was given twice, and the status tells the truth.
func TestAnythingEndsAsTheSpecAsks(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			b := newBench(t)
			b.host.stubborn = random.IntN(2) == 0
			b.api.create(withPorts(web(3), v1.TargetPort{Name: "http", Port: 80}))
			command := "v1"
			for range 40 {
				switch random.IntN(8) {
				case 0:
					b.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To(random.Int32N(5)) })
				case 1:
					command = fmt.Sprint("v", random.IntN(3))
					b.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{command} })
				case 2, 3, 4:
					if running := b.host.running(); len(running) > 0 {
						b.host.exit(running[random.IntN(len(running))], random.Int32N(2))
					}
				case 5:
					b.clock.Step(time.Duration(random.IntN(5000)) * time.Millisecond)
				case 6:
					b.host.restart()
					b.newAgent()
				case 7:
					b.settle("web")
				}
			}
			b.host.stubborn = false
			for range 50 {
				// What was asked to end while it was stubborn ends now.
				for _, i := range b.api.get("web").Status.Instances {
					if i.State.Running != nil && !i.Ready && slices.Contains(b.host.running(), i.Name) {
						b.host.exit(i.Name, 0)
					}
				}
				b.settle("web")
				b.clock.Step(backoffMax)
			}
			b.settle("web")

			target := b.api.get("web")
			want, ports := map[string]string{}, map[int32]string{}
			for _, name := range target.InstanceNames() {
				want[name] = command
			}
			b.want("commands", b.host.commands(), want)
			b.want("ready replicas", int(target.Status.ReadyReplicas), len(want))
			b.want("replicas", int(target.Status.Replicas), len(want))
			for _, i := range target.Status.Instances {
				if other, given := ports[i.Ports[0].HostPort]; given {
					t.Errorf("%s and %s have one port", i.Name, other)
				}
				ports[i.Ports[0].HostPort] = i.Name
			}
			b.want("ports that are held", len(b.r.ports.owner), len(want))
			if got := b.condition("web", "Ready"); !strings.HasPrefix(got, "True") {
				t.Errorf("got %q", got)
			}
			b.want("progressing", b.condition("web", "Progressing"), "False UpToDate: every instance is of the present spec")
		})
	}
}

func TestClaim(t *testing.T) {
	b := newBench(t)
	target := web(1)
	target.Finalizers = []string{"other/one"}
	b.api.create(target)
	b.settle("web")
	b.want("finalizers", b.api.get("web").Finalizers, []string{"other/one", v1.FinalizerInstances})
	b.want("events", b.host.take(), []string{"start web-0"})

	// Nothing runs of a target that can't be claimed: it could go unnoticed.
	b = newBench(t)
	target = web(1)
	target.Finalizers = nil
	b.api.create(target)
	b.api.PrependReactor("patch", "targets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("no")
	})
	b.fetch()
	if _, err := b.r.sync(t.Context(), types.NamespacedName{Namespace: "shop", Name: "web"}); err == nil {
		t.Error("got no error")
	}
	b.want("events", b.host.take(), []string(nil))
}
