package validation

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	api "aaserver.io/aaserver/apis/streaming"
)

func TestRatchetTarget(t *testing.T) {
	const nul = "must not contain NUL bytes"
	type change = func(*api.Target)
	processWith := func(change func(*api.ProcessSource)) change {
		return func(t *api.Target) { change(t.Spec.Process) }
	}
	ports := func(ports ...api.TargetPort) change {
		return func(t *api.Target) { t.Spec.Ports = ports }
	}
	endpoints := func(endpoints ...api.Endpoint) change {
		return func(t *api.Target) { t.Spec.TCP.Endpoints = endpoints }
	}
	limits := func(limits corev1.ResourceList) change {
		return func(t *api.Target) { t.Spec.Container.Resources.Limits = limits }
	}
	wrong := api.TargetPort{Name: "a", Port: 70000, Protocol: "TCP"}
	fixed := api.TargetPort{Name: "a", Port: 1, Protocol: "TCP", HostPort: 80}
	long := strings.Repeat("a", 128<<10)
	replicas := func(n int32) change { return func(t *api.Target) { t.Spec.Replicas = ptr.To(n) } }
	label := func(t *api.Target) { t.Labels = map[string]string{"tier": "front"} }
	badAgent := func(t *api.Target) { t.Spec.AgentName = "edge_17" }

	cases := map[string]struct {
		make     func(...change) *api.Target
		old, new []change
		want     []string
	}{
		"another field changes": {
			make: process, old: []change{badAgent, ports(wrong)}, new: []change{badAgent, ports(wrong), replicas(3), label},
		},
		"the wrong field itself changes to another wrong value": {
			make: process, old: []change{replicas(257)}, new: []change{replicas(258)},
			want: []string{`spec.replicas: Invalid value: 258: must be between 0 and 256, inclusive`},
		},
		"the wrong field is mended": {
			make: process, old: []change{replicas(257)}, new: []change{replicas(1)},
		},
		"the wrong field is mended and another becomes wrong": {
			make: process, old: []change{replicas(257)}, new: []change{replicas(1), ports(wrong)},
			want: []string{`spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive`},
		},
		"an item with a key moves": {
			make: process, old: []change{ports(wrong)}, new: []change{ports(api.TargetPort{Name: "b", Port: 2, Protocol: "TCP"}, wrong)},
		},
		"another field of a wrong item changes": {
			make: process, old: []change{ports(wrong)}, new: []change{ports(api.TargetPort{Name: "a", Port: 70000, Protocol: "UDP"})},
		},
		"an item of another key is as wrong": {
			make: process, old: []change{ports(wrong)}, new: []change{ports(api.TargetPort{Name: "b", Port: 70000, Protocol: "TCP"})},
			want: []string{`spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive`},
		},
		"a second item is wrong in the same way": {
			make: process, old: []change{ports(api.TargetPort{})}, new: []change{ports(api.TargetPort{}, api.TargetPort{})},
			want: []string{
				`spec.ports[1].name: Required value`,
				`spec.ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive`,
				`spec.ports[1].protocol: Required value`,
			},
		},
		"a list that is too long stays": {
			make: process, old: []change{ports(make([]api.TargetPort, 65)...)}, new: []change{ports(make([]api.TargetPort, 65)...), label, replicas(3)},
		},
		"an item of a list that is too long changes": {
			make: process, old: []change{ports(make([]api.TargetPort, 65)...)}, new: []change{ports(append(make([]api.TargetPort, 64), wrong)...)},
			want: []string{`spec.ports: Too many: 65: must have at most 64 items`},
		},
		"duplicates stay": {
			make: tcp,
			old:  []change{endpoints(api.Endpoint{Name: "a", Host: "a", Port: 1}, api.Endpoint{Name: "a", Host: "b", Port: 1})},
			new:  []change{endpoints(api.Endpoint{Name: "a", Host: "a", Port: 1}, api.Endpoint{Name: "a", Host: "b", Port: 1}), label, func(t *api.Target) { t.Spec.ClassName = "standard" }},
		},
		"a list with duplicates changes": {
			make: tcp,
			old:  []change{endpoints(api.Endpoint{Name: "a", Host: "a", Port: 1}, api.Endpoint{Name: "a", Host: "b", Port: 1})},
			new:  []change{endpoints(api.Endpoint{Name: "a", Host: "a", Port: 1}, api.Endpoint{Name: "a", Host: "c", Port: 1})},
			want: []string{`spec.tcp.endpoints[1].name: Duplicate value: "a"`},
		},
		"replicas change beside a fixed port": {
			make: process, old: []change{ports(fixed), replicas(2)}, new: []change{ports(fixed), replicas(3)},
			want: []string{"spec.ports[0].hostPort: Forbidden: may only be set when `replicas` is at most 1: the instances share their host's ports"},
		},
		"a fixed port changes beside replicas": {
			make: process, old: []change{ports(fixed)}, new: []change{ports(api.TargetPort{Name: "a", Port: 1, Protocol: "TCP", HostPort: 81})},
			want: []string{"spec.ports[0].hostPort: Forbidden: may only be set when `replicas` is at most 1: the instances share their host's ports"},
		},
		"a fixed port and replicas stay": {
			make: process, old: []change{ports(fixed)}, new: []change{ports(fixed), label, processWith(func(p *api.ProcessSource) { p.Args = []string{"-v"} })},
		},
		"a terminal loses its stdin": {
			make: process, old: []change{processWith(func(p *api.ProcessSource) { p.TTY, p.Stdin = true, true })}, new: []change{processWith(func(p *api.ProcessSource) { p.TTY = true })},
			want: []string{"spec.process.tty: Forbidden: may only be true when `stdin` is true"},
		},
		"a terminal without stdin stays": {
			make: process, old: []change{processWith(func(p *api.ProcessSource) { p.TTY = true })}, new: []change{processWith(func(p *api.ProcessSource) { p.TTY = true; p.User = "web" })},
		},
		"args that are too long stay while the user changes": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{long} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{long}; p.User = "web" })},
		},
		"args that are too long become as many others": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{long} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{strings.Repeat("b", len(long))} })},
			want: []string{"spec.process: Too long: `command`, `args` and `env` together may not be more than 131072 bytes"},
		},
		"a variable is added to args that are too long": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{long} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{long}; p.Env = []api.EnvVar{{Name: "A"}} })},
			want: []string{"spec.process: Too long: `command`, `args` and `env` together may not be more than 131072 bytes"},
		},
		"one wrong argument doesn't excuse another": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{"a\x00"} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Args = []string{"a\x00", "b\x00"} })},
			want: []string{`spec.process.args[0]: Invalid value: ` + nul},
		},
		"a variable's wrong value changes, though the error doesn't show it": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A", Value: "\x00"}} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A", Value: "\x00\x00"}} })},
			want: []string{`spec.process.env[0].value: Invalid value: ` + nul},
		},
		"a variable's wrong value stays while another comes before it": {
			make: process,
			old:  []change{processWith(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A", Value: "\x00"}} })},
			new:  []change{processWith(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "B"}, {Name: "A", Value: "\x00"}} })},
		},
		"a limit that is wrong is written otherwise": {
			make: container,
			old:  []change{limits(corev1.ResourceList{"cpu": resource.MustParse("-1")})},
			new:  []change{limits(corev1.ResourceList{"cpu": resource.MustParse("-1000m"), "memory": resource.MustParse("1Gi")})},
		},
		"one limit that isn't known doesn't excuse another": {
			make: container,
			old:  []change{limits(corev1.ResourceList{"a": resource.MustParse("1")})},
			new:  []change{limits(corev1.ResourceList{"a": resource.MustParse("1"), "b": resource.MustParse("1")})},
			want: []string{`spec.container.resources.limits: Unsupported value: "a": supported values: "cpu", "memory"`},
		},
		"text that isn't UTF-8 stays, in metadata too, while a finalizer goes": {
			make: process,
			old: []change{processWith(func(p *api.ProcessSource) { p.Args = []string{"\xff"} }), func(t *api.Target) {
				t.Annotations, t.Finalizers = map[string]string{"a": "\xff"}, []string{"a/b"}
			}},
			new: []change{processWith(func(p *api.ProcessSource) { p.Args = []string{"\xff"} }), func(t *api.Target) {
				t.Annotations = map[string]string{"a": "\xff"}
			}},
		},
		"text that isn't UTF-8 is added beside other such text": {
			make: process,
			old:  []change{func(t *api.Target) { t.Annotations = map[string]string{"a": "\xff"} }},
			new: []change{processWith(func(p *api.ProcessSource) { p.Args = []string{"\xff"} }), func(t *api.Target) {
				t.Annotations = map[string]string{"a": "\xff", "b": "\xff"}
			}},
			want: []string{
				`metadata.annotations: Invalid value: the value of "a" must be valid UTF-8`,
				`spec.process.args[0]: Invalid value: must be valid UTF-8`,
			},
		},
		"two sources stay, and what depends on the source isn't said": {
			make: process, old: []change{func(t *api.Target) { t.Spec.TCP = tcp().Spec.TCP }}, new: []change{func(t *api.Target) { t.Spec.TCP = tcp().Spec.TCP }, label},
		},
		"anything else of a target with two sources changes": {
			make: process, old: []change{func(t *api.Target) { t.Spec.TCP = tcp().Spec.TCP }}, new: []change{func(t *api.Target) { t.Spec.TCP = tcp().Spec.TCP }, replicas(1000)},
			want: []string{"spec: Invalid value: \"{process, tcp}\": must specify exactly one of: `process`, `container`, `ssh`, `tcp`"},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			oldTarget, newTarget := tc.make(tc.old...), tc.make(tc.new...)
			if len(ValidateTarget(oldTarget)) == 0 && len(tc.want) == 0 {
				t.Error("the old target is valid: there is nothing to be left out")
			}
			if diff := cmp.Diff(tc.want, messages(ValidateTargetUpdate(newTarget, oldTarget))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRatchetStatus(t *testing.T) {
	wrong := api.InstanceStatus{Name: "web-0", RestartCount: -1}
	cases := map[string]struct {
		old, new api.TargetStatus
		want     []string
	}{
		"another instance changes": {
			old: api.TargetStatus{Instances: []api.InstanceStatus{wrong}},
			new: api.TargetStatus{Instances: []api.InstanceStatus{{Name: "web-1", Ready: true}, wrong}},
		},
		"a port of an instance stays wrong while another is added": {
			old: api.TargetStatus{Instances: []api.InstanceStatus{{Name: "web-0", Ports: []api.InstancePort{{Name: "a", Port: 0}}}}},
			new: api.TargetStatus{Instances: []api.InstanceStatus{{Name: "web-0", Ports: []api.InstancePort{{Name: "b", Port: 1}, {Name: "a", Port: 0}}}}},
		},
		"a port is as wrong as one of another instance": {
			old:  api.TargetStatus{Instances: []api.InstanceStatus{{Name: "web-0", Ports: []api.InstancePort{{Name: "a", Port: 0}}}}},
			new:  api.TargetStatus{Instances: []api.InstanceStatus{{Name: "web-1", Ports: []api.InstancePort{{Name: "a", Port: 0}}}}},
			want: []string{`status.instances[0].ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive`},
		},
		"fewer replicas make the ready ones more of a fault": {
			old:  api.TargetStatus{Replicas: 1, ReadyReplicas: 2},
			new:  api.TargetStatus{Replicas: 0, ReadyReplicas: 2},
			want: []string{"status.readyReplicas: Invalid value: 2: must not be greater than `replicas` (0)"},
		},
		"counts that don't fit stay": {
			old: api.TargetStatus{Replicas: 1, ReadyReplicas: 2},
			new: api.TargetStatus{Replicas: 1, ReadyReplicas: 2, ObservedGeneration: 1},
		},
		"a condition stays incomplete while another comes": {
			old: api.TargetStatus{Conditions: []metav1.Condition{{Type: "Ready"}}},
			new: api.TargetStatus{Conditions: []metav1.Condition{{Type: "Progressing", Status: "True", Reason: "A", LastTransitionTime: metav1.Now()}, {Type: "Ready"}}},
		},
		"a condition of another type is incomplete": {
			old:  api.TargetStatus{Conditions: []metav1.Condition{{Type: "Ready", Status: "True", Reason: "A"}}},
			new:  api.TargetStatus{Conditions: []metav1.Condition{{Type: "Progressing", Status: "True", Reason: "A"}}},
			want: []string{`status.conditions[0].lastTransitionTime: Required value`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			with := func(status api.TargetStatus) *api.Target {
				return process(func(t *api.Target) { t.Status = status })
			}
			if diff := cmp.Diff(tc.want, messages(ValidateTargetStatusUpdate(with(tc.new), with(tc.old)))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}
