package validation

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "aaserver.io/aaserver/apis/streaming"
)

func TestValidateTargetStatusUpdate(t *testing.T) {
	now := metav1.Now()
	ready := func() metav1.Condition {
		return metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "AllReady", LastTransitionTime: now}
	}
	instances := func(instances ...api.InstanceStatus) api.TargetStatus {
		return api.TargetStatus{Instances: instances}
	}
	state := func(state api.InstanceState) api.TargetStatus {
		return instances(api.InstanceStatus{Name: "web-0", State: state})
	}
	ports := func(ports ...api.InstancePort) api.TargetStatus {
		return instances(api.InstanceStatus{Name: "web-0", Ports: ports})
	}
	instance := func(i int) api.InstanceStatus {
		return api.InstanceStatus{Name: fmt.Sprint("web-", i)}
	}

	cases := map[string]struct {
		status api.TargetStatus
		want   []string
	}{
		"every field may be set": {
			status: api.TargetStatus{
				ObservedGeneration: 3,
				Replicas:           2,
				ReadyReplicas:      2,
				Instances: []api.InstanceStatus{{
					Name:         "web-0",
					Ready:        true,
					RestartCount: 1,
					State:        api.InstanceState{Running: &api.InstanceStateRunning{StartedAt: now}},
					LastState:    api.InstanceState{Terminated: &api.InstanceStateTerminated{ExitCode: 137, Signal: 9, Reason: "Killed", Message: "it was", StartedAt: now, FinishedAt: now}},
					Ports:        []api.InstancePort{{Name: "http", Port: 8080, HostPort: 31021}},
				}, {
					Name:  "web-a",
					State: api.InstanceState{Waiting: &api.InstanceStateWaiting{Reason: "CrashLoopBackOff", Message: "in a minute"}},
				}, {
					Name: "web-1",
				}},
				Conditions: []metav1.Condition{ready()},
			},
		},
		"counts aren't negative": {
			status: api.TargetStatus{ObservedGeneration: -1, Replicas: -1, ReadyReplicas: -2},
			want: []string{
				`status.observedGeneration: Invalid value: -1: must be greater than or equal to 0`,
				`status.replicas: Invalid value: -1: must be between 0 and 256, inclusive`,
				`status.readyReplicas: Invalid value: -2: must be greater than or equal to 0`,
			},
		},
		"there are at most 256 replicas": {
			status: api.TargetStatus{Replicas: 257},
			want:   []string{`status.replicas: Invalid value: 257: must be between 0 and 256, inclusive`},
		},
		"no more replicas are ready than there are": {
			status: api.TargetStatus{Replicas: 1, ReadyReplicas: 2},
			want:   []string{`status.readyReplicas: Invalid value: 2: must not be greater than ` + "`replicas` (1)"},
		},
		"256 instances are the most": {
			status: instances(many(256, instance)...),
		},
		"257 instances are too many": {
			status: instances(many(257, instance)...),
			want:   []string{`status.instances: Too many: 257: must have at most 256 items`},
		},
		"an instance has a name": {
			status: instances(api.InstanceStatus{}),
			want:   []string{`status.instances[0].name: Required value`},
		},
		"an instance's name is a label": {
			status: instances(api.InstanceStatus{Name: "web-A"}),
			want:   []string{`status.instances[0].name: Invalid value: "web-A": ` + labelText},
		},
		"an instance's name is bounded": {
			status: instances(api.InstanceStatus{Name: "web-" + strings.Repeat("a", 60)}),
			want:   []string{`status.instances[0].name: Too long: may not be more than 63 bytes`},
		},
		"an instance's name is made of the target's": {
			status: instances(api.InstanceStatus{Name: "webshop-0"}),
			want:   []string{`status.instances[0].name: Invalid value: "webshop-0": must begin with the target's name and a dash ("web-")`},
		},
		"an instance's name is unique": {
			status: instances(instance(0), instance(1), instance(0)),
			want:   []string{`status.instances[2].name: Duplicate value: "web-0"`},
		},
		"an instance isn't restarted less than never": {
			status: instances(api.InstanceStatus{Name: "web-0", RestartCount: -1}),
			want:   []string{`status.instances[0].restartCount: Invalid value: -1: must be greater than or equal to 0`},
		},
		"an instance is in one state": {
			status: state(api.InstanceState{Waiting: &api.InstanceStateWaiting{}, Running: &api.InstanceStateRunning{}, Terminated: &api.InstanceStateTerminated{}}),
			want:   []string{"status.instances[0].state: Invalid value: \"{waiting, running, terminated}\": must specify at most one of: `waiting`, `running`, `terminated`"},
		},
		"an instance was in one state": {
			status: instances(api.InstanceStatus{Name: "web-0", LastState: api.InstanceState{Running: &api.InstanceStateRunning{}, Terminated: &api.InstanceStateTerminated{}}}),
			want:   []string{"status.instances[0].lastState: Invalid value: \"{running, terminated}\": must specify at most one of: `waiting`, `running`, `terminated`"},
		},
		"reasons and messages may be long": {
			status: state(api.InstanceState{Terminated: &api.InstanceStateTerminated{Reason: strings.Repeat("a", 256), Message: strings.Repeat("a", 4096)}}),
		},
		"what an instance waits for is bounded": {
			status: state(api.InstanceState{Waiting: &api.InstanceStateWaiting{Reason: strings.Repeat("a", 257), Message: strings.Repeat("a", 4097)}}),
			want: []string{
				`status.instances[0].state.waiting.reason: Too long: may not be more than 256 bytes`,
				`status.instances[0].state.waiting.message: Too long: may not be more than 4096 bytes`,
			},
		},
		"how an instance ended is bounded": {
			status: state(api.InstanceState{Terminated: &api.InstanceStateTerminated{Signal: -9, Reason: strings.Repeat("a", 257), Message: strings.Repeat("a", 4097)}}),
			want: []string{
				`status.instances[0].state.terminated.signal: Invalid value: -9: must be greater than or equal to 0`,
				`status.instances[0].state.terminated.reason: Too long: may not be more than 256 bytes`,
				`status.instances[0].state.terminated.message: Too long: may not be more than 4096 bytes`,
			},
		},
		"an instance's ports are ports": {
			status: ports(api.InstancePort{Name: "a", Port: 0, HostPort: -1}, api.InstancePort{Name: "b", Port: 65536, HostPort: 65536}),
			want: []string{
				`status.instances[0].ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive`,
				`status.instances[0].ports[0].hostPort: Invalid value: -1: must be between 1 and 65535, inclusive`,
				`status.instances[0].ports[1].port: Invalid value: 65536: must be between 1 and 65535, inclusive`,
				`status.instances[0].ports[1].hostPort: Invalid value: 65536: must be between 1 and 65535, inclusive`,
			},
		},
		"an instance's port is named once": {
			status: ports(api.InstancePort{Name: "http", Port: 1}, api.InstancePort{Name: "http", Port: 2}),
			want:   []string{`status.instances[0].ports[1].name: Duplicate value: "http"`},
		},
		"an instance may have 64 ports": {
			status: ports(many(64, func(i int) api.InstancePort {
				return api.InstancePort{Name: fmt.Sprint("p", i), Port: int32(i + 1)}
			})...),
		},
		"an instance has at most 64 ports": {
			status: ports(make([]api.InstancePort, 65)...),
			want:   []string{`status.instances[0].ports: Too many: 65: must have at most 64 items`},
		},
		"conditions are complete": {
			status: api.TargetStatus{Conditions: []metav1.Condition{{Type: "Ready"}}},
			want: []string{
				`status.conditions[0].status: Required value`,
				`status.conditions[0].lastTransitionTime: Required value`,
				`status.conditions[0].reason: Required value`,
			},
		},
		"conditions are unique": {
			status: api.TargetStatus{Conditions: []metav1.Condition{ready(), ready()}},
			want:   []string{`status.conditions[1]: Duplicate value: "Ready"`},
		},
		"there may be 32 conditions": {
			status: api.TargetStatus{Conditions: many(32, func(i int) metav1.Condition {
				condition := ready()
				condition.Type = fmt.Sprint("C", i)
				return condition
			})},
		},
		"there are at most 32 conditions": {
			status: api.TargetStatus{Conditions: make([]metav1.Condition, 33)},
			want:   []string{`status.conditions: Too many: 33: must have at most 32 items`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			changed := process(func(t *api.Target) { t.Status = tc.status })
			if diff := cmp.Diff(tc.want, messages(ValidateTargetStatusUpdate(changed, process()))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
			if errs := ValidateTargetStatusUpdate(changed, changed); len(errs) > 0 {
				t.Errorf("a status that stays as it is: %v", errs)
			}
		})
	}

	t.Run("metadata is checked", func(t *testing.T) {
		want := []string{`metadata.resourceVersion: Invalid value: "": must be specified for an update`}
		got := ValidateTargetStatusUpdate(process(func(t *api.Target) { t.ResourceVersion = "" }), process())
		if diff := cmp.Diff(want, messages(got)); diff != "" {
			t.Errorf("errors (-want +got):\n%s", diff)
		}
	})
}
