package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/utils/clock"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/fake"
	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"k8s.io/utils/ptr"
)

var targetsResource = v1.SchemeGroupVersion.WithResource("targets")

// fakeAPI does what a server does to a target: UIDs, resource versions with
// conflicts, generations, a status of its own, times of whole seconds,
// finalizers.
type fakeAPI struct {
	*fake.Clientset
	t testing.TB

	mu      sync.Mutex
	version int
	// statusWrites and patches count what was asked for.
	statusWrites, patches int
	// refuse is what the next writes of a status are answered with.
	refuse []error
}

func newFakeAPI(t testing.TB) *fakeAPI {
	api := &fakeAPI{Clientset: fake.NewSimpleClientset(), t: t}
	api.PrependReactor("*", "targets", api.react)
	return api
}

func (api *fakeAPI) react(action clienttesting.Action) (bool, runtime.Object, error) {
	api.mu.Lock()
	defer api.mu.Unlock()
	switch action := action.(type) {
	case clienttesting.CreateActionImpl:
		target := action.Object.(*v1.Target).DeepCopy()
		target.Generation = 1
		if target.UID == "" {
			target.UID = types.UID(fmt.Sprintf("uid-%d", api.version+1))
		}
		return api.save(target, api.Tracker().Create)
	case clienttesting.UpdateActionImpl:
		update := action.Object.(*v1.Target).DeepCopy()
		current, err := api.current(action.Namespace, update.Name)
		if err != nil {
			return true, nil, err
		}
		if action.Subresource == "status" {
			api.statusWrites++
			if len(api.refuse) > 0 {
				err := api.refuse[0]
				api.refuse = api.refuse[1:]
				return true, nil, err
			}
		}
		if update.UID != current.UID || update.ResourceVersion != "" && update.ResourceVersion != current.ResourceVersion {
			return true, nil, apierrors.NewConflict(targetsResource.GroupResource(), update.Name, errors.New("the object has been modified"))
		}
		if action.Subresource == "status" {
			current.Status = update.Status
		} else {
			current.Spec = update.Spec
			current.Generation++
		}
		return api.save(current, api.update)
	case clienttesting.PatchActionImpl:
		api.patches++
		current, err := api.current(action.Namespace, action.Name)
		if err != nil {
			return true, nil, err
		}
		// On a tracker of its own, so that watchers see the result alone.
		scratch := clienttesting.NewObjectTracker(scheme.Scheme, scheme.Codecs.UniversalDecoder())
		if err := scratch.Add(current); err != nil {
			return true, nil, err
		}
		_, obj, err := clienttesting.ObjectReaction(scratch)(action)
		if err != nil {
			return true, nil, err
		}
		patched := obj.(*v1.Target)
		if patched.DeletionTimestamp != nil && len(patched.Finalizers) == 0 && *patched.DeletionGracePeriodSeconds == 0 {
			return true, patched, api.Tracker().Delete(targetsResource, action.Namespace, action.Name)
		}
		return api.save(patched, api.update)
	case clienttesting.DeleteActionImpl:
		current, err := api.current(action.Namespace, action.Name)
		if err != nil {
			return true, nil, err
		}
		if len(current.Finalizers) == 0 {
			return true, nil, api.Tracker().Delete(targetsResource, action.Namespace, action.Name)
		}
		// As the generic store does for our strategy: the spec's grace period
		// unless another is asked for, and only ever a shorter one.
		grace := action.DeleteOptions.GracePeriodSeconds
		if grace == nil {
			grace = cmp.Or(current.Spec.TerminationGracePeriodSeconds, ptr.To(v1.DefaultTerminationGracePeriodSeconds))
		}
		if current.DeletionTimestamp == nil {
			current.DeletionTimestamp = &metav1.Time{Time: time.Unix(1000, 0)}
			current.Generation++
		} else if *grace >= *current.DeletionGracePeriodSeconds {
			return true, current, nil
		}
		current.DeletionGracePeriodSeconds = grace
		return api.save(current, api.update)
	}
	return false, nil, nil
}

func (api *fakeAPI) current(namespace, name string) (*v1.Target, error) {
	obj, err := api.Tracker().Get(targetsResource, namespace, name)
	if err != nil {
		return nil, err
	}
	return obj.(*v1.Target).DeepCopy(), nil
}

func (api *fakeAPI) update(gvr schema.GroupVersionResource, obj runtime.Object, namespace string, opts ...metav1.CreateOptions) error {
	return api.Tracker().Update(gvr, obj, namespace)
}

func (api *fakeAPI) save(target *v1.Target, write func(schema.GroupVersionResource, runtime.Object, string, ...metav1.CreateOptions) error) (bool, runtime.Object, error) {
	api.version++
	target.ResourceVersion = strconv.Itoa(api.version)
	// To JSON and back, as on the way to a store.
	data, err := runtime.Encode(scheme.Codecs.LegacyCodec(v1.SchemeGroupVersion), target)
	if err != nil {
		return true, nil, err
	}
	saved := &v1.Target{}
	if err := runtime.DecodeInto(scheme.Codecs.UniversalDecoder(), data, saved); err != nil {
		return true, nil, err
	}
	saved.TypeMeta = metav1.TypeMeta{}
	return true, saved, write(targetsResource, saved, target.Namespace)
}

func (api *fakeAPI) writes() int {
	api.mu.Lock()
	defer api.mu.Unlock()
	return api.statusWrites + api.patches
}

func (api *fakeAPI) create(target *v1.Target) *v1.Target {
	api.t.Helper()
	created, err := api.StreamingV1().Targets(target.Namespace).Create(context.Background(), target, metav1.CreateOptions{})
	if err != nil {
		api.t.Fatal(err)
	}
	return created
}

// get returns a target, nil if there is none.
func (api *fakeAPI) get(name string) *v1.Target {
	api.t.Helper()
	target, err := api.current("shop", name)
	if err != nil && !apierrors.IsNotFound(err) {
		api.t.Fatal(err)
	}
	if err != nil {
		return nil
	}
	return target
}

func (api *fakeAPI) change(name string, change func(*v1.TargetSpec)) {
	api.t.Helper()
	target := api.get(name)
	change(&target.Spec)
	target.ResourceVersion = ""
	if _, err := api.StreamingV1().Targets("shop").Update(context.Background(), target, metav1.UpdateOptions{}); err != nil {
		api.t.Fatal(err)
	}
}

func (api *fakeAPI) delete(name string) {
	api.t.Helper()
	if err := api.StreamingV1().Targets("shop").Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
		api.t.Fatal(err)
	}
}

// deleteWithin is a deletion that gives instances so many seconds.
func (api *fakeAPI) deleteWithin(name string, seconds int64) {
	api.t.Helper()
	if err := api.StreamingV1().Targets("shop").Delete(context.Background(), name, metav1.DeleteOptions{GracePeriodSeconds: &seconds}); err != nil {
		api.t.Fatal(err)
	}
}

// vanish is a removal by force.
func (api *fakeAPI) vanish(name string) {
	api.t.Helper()
	if err := api.Tracker().Delete(targetsResource, "shop", name); err != nil {
		api.t.Fatal(err)
	}
}

// fakeHost runs nothing, and notes what it is asked for.
type fakeHost struct {
	t       testing.TB
	clock   clock.PassiveClock
	changes chan types.UID

	mu        sync.Mutex
	instances map[driver.InstanceID]*driver.InstanceStatus
	specs     map[driver.InstanceID]*v1.Target
	// events are the calls since they were last taken.
	events []string
	lists  int
	// stubborn instances don't end when they are asked to.
	stubborn bool
	// brief instances end as soon as they have started.
	brief bool
	// startErr, stopErr and listErr are what Start, Stop and List fail with.
	startErr         func(driver.Instance) error
	stopErr, listErr error
	retained         []types.UID
	// busy are the targets that a call is under way for.
	busy map[types.UID]bool
}

var _ driver.Host = (*fakeHost)(nil)

func newFakeHost(t testing.TB, clock clock.PassiveClock) *fakeHost {
	return &fakeHost{
		t: t, clock: clock,
		changes:   make(chan types.UID, 10000),
		instances: map[driver.InstanceID]*driver.InstanceStatus{},
		specs:     map[driver.InstanceID]*v1.Target{},
		busy:      map[types.UID]bool{},
	}
}

// enter notes a call; two at once for one target fail the test.
func (f *fakeHost) enter(uid types.UID, format string, args ...any) (leave func()) {
	f.mu.Lock()
	if f.busy[uid] {
		f.t.Errorf("two calls at once for target %s", uid)
	}
	f.busy[uid] = true
	f.mu.Unlock()
	// Here another worker would get in.
	f.mu.Lock()
	f.events = append(f.events, fmt.Sprintf(format, args...))
	return func() {
		delete(f.busy, uid)
		f.mu.Unlock()
	}
}

func (f *fakeHost) Start(_ context.Context, instance driver.Instance) error {
	id := instance.ID()
	defer f.enter(id.Target, "start %s", id.Name)()
	if s := f.instances[id]; s != nil && s.State.Running != nil {
		f.t.Errorf("instance %s was started while it ran", id.Name)
	}
	if f.startErr != nil {
		if err := f.startErr(instance); err != nil {
			return err
		}
	}
	f.specs[id] = instance.Target
	f.instances[id] = &driver.InstanceStatus{ID: id, Ports: instance.Ports, State: v1.InstanceState{
		Running: &v1.InstanceStateRunning{StartedAt: metav1.NewTime(f.clock.Now())},
	}}
	f.changes <- id.Target
	if f.brief {
		f.endLocked(id, v1.InstanceStateTerminated{ExitCode: 1, Reason: "Error"})
	}
	return nil
}

func (f *fakeHost) Stop(_ context.Context, id driver.InstanceID, grace time.Duration) error {
	defer f.enter(id.Target, "stop %s within %s", id.Name, grace)()
	if f.stopErr != nil {
		return f.stopErr
	}
	if !f.stubborn || grace == 0 {
		f.endLocked(id, v1.InstanceStateTerminated{ExitCode: 143, Signal: 15, Reason: "Killed"})
	}
	return nil
}

func (f *fakeHost) Remove(_ context.Context, id driver.InstanceID) error {
	defer f.enter(id.Target, "remove %s", id.Name)()
	if s := f.instances[id]; s != nil && s.State.Running != nil {
		f.t.Errorf("instance %s was removed while it ran", id.Name)
		return driver.Errorf(driver.Internal, "instance %s runs", id.Name)
	}
	delete(f.instances, id)
	return nil
}

func (f *fakeHost) Retain(_ context.Context, targets []types.UID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retained = slices.Clone(targets)
	return nil
}

func (f *fakeHost) List(context.Context) ([]driver.InstanceStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists++
	if f.listErr != nil {
		return nil, f.listErr
	}
	var list []driver.InstanceStatus
	for _, s := range f.instances {
		s := *s
		s.State = *s.State.DeepCopy()
		list = append(list, s)
	}
	return list, nil
}

func (f *fakeHost) Changes() <-chan types.UID { return f.changes }

func (f *fakeHost) Shutdown(context.Context) error { return nil }

func (f *fakeHost) Close() error { return nil }

func (f *fakeHost) Open(context.Context, driver.Request) (driver.Conn, error) {
	return nil, driver.Errorf(driver.Unsupported, "the fake can't be opened")
}

// exit ends an instance.
func (f *fakeHost) exit(name string, code int32) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	how := v1.InstanceStateTerminated{ExitCode: code, Reason: "Error"}
	if code == 0 {
		how.Reason = "Completed"
	}
	for id := range f.instances {
		if id.Name == name && f.instances[id].State.Running != nil {
			f.endLocked(id, how)
			return
		}
	}
	f.t.Fatalf("instance %s doesn't run", name)
}

func (f *fakeHost) endLocked(id driver.InstanceID, how v1.InstanceStateTerminated) {
	s := f.instances[id]
	if s == nil || s.State.Running == nil {
		return
	}
	how.StartedAt = s.State.Running.StartedAt
	how.FinishedAt = metav1.NewTime(f.clock.Now())
	s.State = v1.InstanceState{Terminated: &how}
	f.changes <- id.Target
}

// complain sets the message of an instance.
func (f *fakeHost) complain(name, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, s := range f.instances {
		if id.Name == name {
			s.Message = message
			f.changes <- id.Target
		}
	}
}

// running returns the names of what runs, sorted.
func (f *fakeHost) running() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for id, s := range f.instances {
		if s.State.Running != nil {
			names = append(names, id.Name)
		}
	}
	slices.Sort(names)
	return names
}

// commands returns the command that each instance runs, by name.
func (f *fakeHost) commands() map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	commands := map[string]string{}
	for id, s := range f.instances {
		if s.State.Running != nil {
			commands[id.Name] = f.specs[id].Spec.Process.Command[0]
		}
	}
	return commands
}

func (f *fakeHost) listed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lists
}

// take returns the calls since the last time.
func (f *fakeHost) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	events := f.events
	f.events = nil
	return events
}

// restart is what happens to the host when the agent restarts: nothing runs.
func (f *fakeHost) restart() {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.instances, func(driver.InstanceID, *driver.InstanceStatus) bool { return true })
	f.events = nil
}
