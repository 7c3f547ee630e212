package admission

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission/classpolicy"
)

func use(class string) []authorizer.AttributesRecord {
	return []authorizer.AttributesRecord{{
		User: jane, Verb: "use", APIGroup: "streaming.aaserver.io", APIVersion: "v1", Resource: "targetclasses", Name: class, ResourceRequest: true,
	}}
}

// outcome is what became of a request.
type outcome struct {
	asked []authorizer.AttributesRecord
	read  []string
	err   error
}

// judge asks TargetClassPolicy, and proves that it changed nothing.
func judge(t *testing.T, authz *answers, objs *objects, r request) outcome {
	t.Helper()
	copies := func() []any {
		var all []any
		for _, obj := range []runtime.Object{r.object, r.old} {
			if obj != nil {
				all = append(all, obj.DeepCopyObject())
			}
		}
		for _, target := range objs.targets {
			all = append(all, target.DeepCopy())
		}
		return all
	}
	before := copies()
	err := validate(newPlugin(t, classpolicy.PluginName, authz, objs.options()), r)
	if diff := cmp.Diff(before, copies()); diff != "" {
		t.Errorf("an object was changed (-before +after):\n%s", diff)
	}
	return outcome{authz.asked, objs.read, err}
}

func TestTargetClassPolicyOnWrites(t *testing.T) {
	unnamed := func(target *api.Target) { target.Spec.ClassName = "" }
	update := func(change func(*api.Target)) request {
		return request{operation: admission.Update, object: process(change), old: process(nil)}
	}
	command := func(target *api.Target) { target.Spec.Process.Command = []string{"/usr/bin/other"} }
	closed := standard(func(class *v1.TargetClass) { class.Spec = v1.TargetClassSpec{} })
	for name, tt := range map[string]struct {
		classes   []any
		authz     *answers // allows everything if not given
		request   request
		wantAsked []authorizer.AttributesRecord
		wantRead  []string
		wantErr   []string // nil: it is allowed
	}{
		"what the class allows is created by who may use it": {
			classes:   []any{standard(nil)},
			request:   request{operation: admission.Create, object: process(nil)},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
		},
		"a dry run is judged alike": {
			classes:   []any{closed},
			request:   request{operation: admission.Create, object: process(nil), dryRun: true},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{"spec.process"},
		},
		"a class that doesn't exist fails closed": {
			classes:   []any{standard(defaultOne)},
			request:   request{operation: admission.Create, object: process(func(target *api.Target) { target.Spec.ClassName = "gone" })},
			wantAsked: use("gone"),
			wantRead:  []string{"class gone"},
			wantErr:   []string{`targets.streaming.aaserver.io "web" is forbidden`, `"gone"`, "create the class", "spec.className"},
		},
		"who may not use a class isn't told whether there is one": {
			authz:     &answers{decision: authorizer.DecisionNoOpinion},
			request:   request{operation: admission.Create, object: process(func(target *api.Target) { target.Spec.ClassName = "gone" })},
			wantAsked: use("gone"),
			wantErr:   []string{`may not use targetclasses.streaming.aaserver.io "gone"`, "!exist"},
		},
		"a target without a class is judged by the default one": {
			classes:   []any{standard(defaultOne)},
			request:   request{operation: admission.Create, object: process(unnamed)},
			wantAsked: use("standard"),
			wantRead:  []string{"default class", "class standard"},
		},
		"the default class has to be usable too": {
			classes:   []any{standard(defaultOne)},
			authz:     &answers{decision: authorizer.DecisionNoOpinion},
			request:   request{operation: admission.Create, object: process(unnamed)},
			wantAsked: use("standard"),
			wantRead:  []string{"default class"},
			wantErr:   []string{`may not use targetclasses.streaming.aaserver.io "standard"`},
		},
		"without any class nothing is created": {
			classes:  []any{standard(nil)},
			request:  request{operation: admission.Create, object: process(unnamed)},
			wantRead: []string{"default class", "default class"},
			wantErr:  []string{"is forbidden", "spec.className", v1.AnnotationDefaultClass},
		},
		"who may not use the class is told what to do": {
			classes:   []any{standard(nil)},
			authz:     &answers{decision: authorizer.DecisionDeny, reason: "RBAC: no rule"},
			request:   request{operation: admission.Create, object: process(nil)},
			wantAsked: use("standard"),
			wantErr:   []string{"is forbidden", `user "jane" may not use`, `"standard"`, "RBAC: no rule", "spec.className", "verb use"},
		},
		"every violation is listed": {
			classes: []any{standard(nil)},
			request: request{operation: admission.Create, object: process(func(target *api.Target) {
				target.Spec.AgentName = "core"
				target.Spec.Process.User = "root"
				target.Spec.Ports = append(target.Spec.Ports, api.TargetPort{Name: "ssh", Port: 22, Protocol: api.ProtocolTCP})
			})},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{"is forbidden", `"standard"`, "spec.agentName", "spec.process.user", "spec.ports[1].port"},
		},
		"an address of the cluster's services is refused": {
			classes: []any{standard(nil)},
			request: request{operation: admission.Create, object: ssh(func(target *api.Target) {
				target.Spec.SSH.Endpoints[0].Host = "10.96.0.1"
			})},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{"spec.ssh.endpoints[0].host", "10.96.0.1"},
		},

		"a change of what runs needs the class, and to be allowed to use it": {
			classes:   []any{standard(nil)},
			request:   update(command),
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
		},
		"a change by who may not use the class is refused": {
			classes:   []any{standard(nil)},
			authz:     &answers{decision: authorizer.DecisionNoOpinion},
			request:   update(command),
			wantAsked: use("standard"),
			wantErr:   []string{"may not use"},
		},
		"a change of what runs is refused when the class is gone": {
			request:   update(command),
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{`"standard"`, "create the class"},
		},
		"a change of what runs is refused when the class allows none of it any more": {
			classes:   []any{closed},
			request:   update(command),
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{"spec.process"},
		},
		"what was there before isn't refused with another change": {
			classes: []any{closed},
			request: update(func(target *api.Target) {
				target.Spec.Ports = nil
			}),
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
		},
		"what is new is refused beside what was there before": {
			classes: []any{standard(nil)},
			request: request{
				operation: admission.Update,
				old: process(func(target *api.Target) {
					target.Spec.Ports[0].Port = 80
				}),
				object: process(func(target *api.Target) {
					target.Spec.Ports[0].Port = 80
					target.Spec.Ports = append(target.Spec.Ports, api.TargetPort{Name: "ssh", Port: 22, Protocol: api.ProtocolTCP})
				}),
			},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
			wantErr:   []string{"spec.ports[1].port", "!spec.ports[0]"},
		},
		"by another class, everything is judged": {
			classes: []any{standard(nil), standard(func(class *v1.TargetClass) {
				class.Name = "narrow"
				class.Spec.Users = nil
				class.Spec.Ports.Allowed = []v1.PortRange{{Port: 1}}
			})},
			request:   update(func(target *api.Target) { target.Spec.ClassName = "narrow" }),
			wantAsked: use("narrow"),
			wantRead:  []string{"class narrow"},
			wantErr:   []string{`"narrow"`, "spec.process.user", "spec.ports[0].port"},
		},
		"a class that exists can be named in place of one that doesn't": {
			classes: []any{standard(nil)},
			request: request{operation: admission.Update, object: process(nil), old: process(func(target *api.Target) {
				target.Spec.ClassName = "gone"
			})},
			wantAsked: use("standard"),
			wantRead:  []string{"class standard"},
		},

		"an agent takes its finalizer off when the class is gone": {
			request: request{
				operation: admission.Update,
				old:       process(func(target *api.Target) { target.DeletionTimestamp = &metav1.Time{} }),
				object: process(func(target *api.Target) {
					target.DeletionTimestamp = &metav1.Time{}
					target.Finalizers = nil
				}),
			},
		},
		"metadata is changed when the class is gone": {
			request: update(func(target *api.Target) {
				target.Labels = map[string]string{"tier": "web"}
				target.Annotations = map[string]string{"note": "x"}
			}),
		},
		"instances, restarts and their end are changed when the class is gone": {
			request: update(func(target *api.Target) {
				replicas, grace := int32(9), int64(1)
				target.Spec.Replicas, target.Spec.TerminationGracePeriodSeconds = &replicas, &grace
				target.Spec.RestartPolicy = api.RestartNever
			}),
		},
		"an empty list in place of none is no change": {
			request: update(func(target *api.Target) { target.Spec.Process.Args = []string{} }),
		},
		"the status isn't looked at": {
			request: request{operation: admission.Update, subresource: "status", object: process(command), old: process(nil)},
		},
		"the scale isn't looked at": {
			request: request{operation: admission.Update, subresource: "scale", object: process(command), old: process(nil)},
		},
		"a deletion isn't looked at": {
			request: request{operation: admission.Delete, old: process(nil)},
		},
		"another resource isn't looked at": {
			request: request{operation: admission.Create, resource: "targetclasses", object: process(nil)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			authz := tt.authz
			if authz == nil {
				authz = &answers{decision: authorizer.DecisionAllow}
			}
			got := judge(t, authz, newObjects(tt.classes...), tt.request)
			checkRefusal(t, got.err, tt.wantErr)
			if diff := cmp.Diff(tt.wantAsked, got.asked); diff != "" {
				t.Errorf("asked (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.wantRead, got.read); diff != "" {
				t.Errorf("read (-want +got):\n%s", diff)
			}
		})
	}
}

// checkRefusal demands a Forbidden that says everything in want, and nothing
// that stands there behind a "!". Without want, it demands that there is none.
func checkRefusal(t *testing.T, err error, want []string) {
	t.Helper()
	if len(want) == 0 {
		if err != nil {
			t.Errorf("unexpected error %v", err)
		}
		return
	}
	if !apierrors.IsForbidden(err) {
		t.Fatalf("got %v, want a Forbidden", err)
	}
	for _, text := range want {
		unwanted, not := strings.CutPrefix(text, "!")
		if strings.Contains(err.Error(), unwanted) == not {
			t.Errorf("%q: %q, unwanted: %t", err, unwanted, not)
		}
	}
}

// TestEveryFieldOfTheSpecMatters finds the field that is added to the spec, and
// that nobody decided about: it is judged until somebody does.
func TestEveryFieldOfTheSpecMatters(t *testing.T) {
	free := sets.New("Replicas", "RestartPolicy", "TerminationGracePeriodSeconds")
	spec := reflect.TypeFor[api.TargetSpec]()
	for i := range spec.NumField() {
		name := spec.Field(i).Name
		t.Run(name, func(t *testing.T) {
			target := &api.Target{}
			field := reflect.ValueOf(&target.Spec).Elem().Field(i)
			switch field.Kind() {
			case reflect.String:
				field.SetString("x")
			case reflect.Pointer:
				field.Set(reflect.New(field.Type().Elem()))
			case reflect.Slice:
				field.Set(reflect.MakeSlice(field.Type(), 1, 1))
			default:
				t.Fatalf("a field of kind %s: set it here", field.Kind())
			}
			objs := newObjects()
			judge(t, &answers{decision: authorizer.DecisionAllow}, objs, request{operation: admission.Update, object: target, old: &api.Target{}})
			if judged := len(objs.read) > 0; judged == free.Has(name) {
				t.Errorf("a change of it is judged: %t", judged)
			}
		})
	}
}

// TestRefusedPortsAreNamed, so that a client can do without them.
func TestRefusedPortsAreNamed(t *testing.T) {
	objs := newObjects(standard(nil))
	objs.targets["shop/web"] = stored(t, process(nil))
	forward := request{operation: admission.Connect, subresource: "portforward", object: &v1.TargetPortForwardOptions{Ports: []int32{8080, 22}}}
	err := judge(t, &answers{decision: authorizer.DecisionAllow}, objs, forward).err
	var status apierrors.APIStatus
	if !apierrors.IsForbidden(err) || !errors.As(err, &status) {
		t.Fatalf("got %v, want a Forbidden", err)
	}
	want := []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: "ports[1]"}}
	if diff := cmp.Diff(want, status.Status().Details.Causes); diff != "" {
		t.Errorf("causes (-want +got):\n%s", diff)
	}
}

func TestTargetClassPolicyOnConnects(t *testing.T) {
	edited := func(change func(*v1.TargetClassSpec)) []any {
		return []any{standard(func(class *v1.TargetClass) { change(&class.Spec) })}
	}
	forward := func(ports ...int32) request {
		return request{operation: admission.Connect, subresource: "portforward", object: &v1.TargetPortForwardOptions{Ports: ports}}
	}
	exec := request{operation: admission.Connect, subresource: "exec", object: &v1.TargetExecOptions{Command: []string{"ls"}}}
	log := request{operation: admission.Connect, subresource: "log", object: &v1.TargetLogOptions{}}
	attach := request{operation: admission.Connect, subresource: "attach", object: &v1.TargetAttachOptions{}}
	every := []request{exec, log, attach, forward(), forward(8080)}

	for name, tt := range map[string]struct {
		classes  []any
		target   *api.Target
		requests []request
		wantRead []string // what each reads; the target and its class if nil
		wantErr  []string // of each
	}{
		"what the class allows is connected to": {
			classes: []any{standard(nil)}, target: process(nil), requests: every,
		},
		"a reached target too": {
			classes: []any{standard(nil)}, target: ssh(nil), requests: every,
		},
		"a target that doesn't exist is left to the registry": {
			requests: every,
			wantRead: []string{"target shop/web"},
		},
		"without its class a target isn't connected to": {
			target: process(nil), requests: every,
			wantErr: []string{`targets.streaming.aaserver.io "web" is forbidden`, `"standard"`, "create the class"},
		},
		"the default class governs a target that names none": {
			classes:  []any{standard(func(class *v1.TargetClass) { defaultOne(class); class.Spec.Sources = nil })},
			target:   process(func(target *api.Target) { target.Spec.ClassName = "" }),
			requests: every,
			wantRead: []string{"target shop/web", "default class", "class standard"},
			wantErr:  []string{`"standard"`, "spec.process"},
		},
		"a target without any class isn't connected to": {
			target:   process(func(target *api.Target) { target.Spec.ClassName = "" }),
			requests: every,
			wantRead: []string{"target shop/web", "default class"},
			wantErr:  []string{v1.AnnotationDefaultClass},
		},
		"a source that the class doesn't allow any more is closed": {
			classes: edited(func(spec *v1.TargetClassSpec) { spec.Sources = []string{v1.SourceSSH} }),
			target:  process(nil), requests: every,
			wantErr: []string{"spec.process"},
		},
		"an agent that the class doesn't allow any more is closed": {
			classes: edited(func(spec *v1.TargetClassSpec) { spec.Agents = nil }),
			target:  process(nil), requests: every,
			wantErr: []string{"spec.agentName"},
		},
		"a user that the class doesn't allow any more is closed": {
			classes: edited(func(spec *v1.TargetClassSpec) { spec.Users = []string{"nobody"} }),
			target:  ssh(nil), requests: every,
			wantErr: []string{"spec.ssh.user"},
		},
		"an address that the class doesn't allow any more is closed": {
			classes: edited(func(spec *v1.TargetClassSpec) { spec.Addresses.Deny = []string{"192.0.2.0/24"} }),
			target:  ssh(nil), requests: every,
			wantErr: []string{"spec.ssh.endpoints[0].host", "192.0.2.10"},
		},
		"a port that the class doesn't open any more closes nothing else": {
			classes:  edited(func(spec *v1.TargetClassSpec) { spec.Ports.Allowed = []v1.PortRange{{Port: 22}} }),
			target:   process(nil),
			requests: []request{exec, log, attach, forward()},
		},
		"a port that the class doesn't open isn't forwarded": {
			classes:  edited(func(spec *v1.TargetClassSpec) { spec.Ports.Allowed = []v1.PortRange{{Port: 22}} }),
			target:   process(nil),
			requests: []request{forward(8080)},
			wantErr:  []string{`"standard"`, "8080"},
		},
		"a port that the target doesn't list isn't forwarded": {
			classes:  []any{standard(nil)},
			target:   process(nil),
			requests: []request{forward(8081), forward(8080, 8081)},
			wantErr:  []string{`"standard"`, "8081", "http (8080 TCP)"},
		},
		"a port that the target doesn't list is forwarded if the class opens it": {
			classes:  edited(func(spec *v1.TargetClassSpec) { spec.Ports.Unlisted = true }),
			target:   process(nil),
			requests: []request{forward(8080, 8081)},
		},
		"what is no port is left to the registry": {
			classes:  []any{standard(nil)},
			target:   process(nil),
			requests: []request{forward(0), forward(-1), forward(65536), forward(65536 + 22)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range tt.requests {
				objs := newObjects(tt.classes...)
				if tt.target != nil {
					objs.targets["shop/web"] = stored(t, tt.target)
				}
				// Connecting needs no verb beyond the request's own.
				got := judge(t, &answers{decision: authorizer.DecisionDeny}, objs, r)
				checkRefusal(t, got.err, tt.wantErr)
				// A refusal is told on the target.
				select {
				case event := <-objs.events.Events:
					if tt.wantErr == nil || !strings.HasPrefix(event, "Warning ClassDenied Refused "+r.subresource+": ") {
						t.Errorf("%s: the event %q", r.subresource, event)
					}
				default:
					if tt.wantErr != nil {
						t.Errorf("%s: no event tells of the refusal", r.subresource)
					}
				}
				if len(got.asked) > 0 {
					t.Errorf("%s: the authorizer was asked %v", r.subresource, got.asked)
				}
				wantRead := tt.wantRead
				if wantRead == nil {
					wantRead = []string{"target shop/web", "class standard"}
				}
				if diff := cmp.Diff(wantRead, got.read); diff != "" {
					t.Errorf("%s: read (-want +got):\n%s", r.subresource, diff)
				}
			}
		})
	}
}

func TestTargetClassPolicyWhenItCannotJudge(t *testing.T) {
	create := request{operation: admission.Create, object: ssh(nil)}
	exec := request{operation: admission.Connect, subresource: "exec", object: &v1.TargetExecOptions{}}
	unknown := func() ([]netip.Prefix, error) { return nil, errors.New("not synced") }
	for name, tt := range map[string]struct {
		request request
		err     error
		ranges  func() ([]netip.Prefix, error)
		authz   answers
		wantErr func(error) bool
		want    string
	}{
		"classes that can't be read fail a write": {
			request: create, err: errors.New("the storage is down"), authz: answers{decision: authorizer.DecisionAllow},
			wantErr: apierrors.IsInternalError, want: "the storage is down",
		},
		"a status of the storage is passed on to who writes": {
			request: create, err: apierrors.NewTooManyRequests("busy", 1), authz: answers{decision: authorizer.DecisionAllow},
			wantErr: apierrors.IsTooManyRequests, want: "busy",
		},
		"a target that can't be read fails a connection": {
			request: exec, err: errors.New("the storage is down"),
			wantErr: apierrors.IsInternalError, want: "reading the target: the storage is down",
		},
		"a status of the storage is passed on to who connects": {
			request: exec, err: apierrors.NewTooManyRequests("busy", 1),
			wantErr: apierrors.IsTooManyRequests, want: "busy",
		},
		"an error of the storage is cut": {
			request: exec, err: errors.New(strings.Repeat("down ", 10_000)),
			wantErr: apierrors.IsInternalError, want: "…",
		},
		"an authorizer that fails refuses": {
			request: create, authz: answers{decision: authorizer.DecisionAllow, err: errors.New("no route to host")},
			wantErr: apierrors.IsInternalError, want: `may use targetclasses.streaming.aaserver.io "standard": no route to host`,
		},
		"endpoints aren't judged before the cluster's services are known": {
			request: create, ranges: unknown, authz: answers{decision: authorizer.DecisionAllow},
			wantErr: apierrors.IsServiceUnavailable, want: "not synced",
		},
		"nor connected to": {
			request: exec, ranges: unknown,
			wantErr: apierrors.IsServiceUnavailable, want: "not synced",
		},
		"what has no endpoints is": {
			request: request{operation: admission.Create, object: process(nil)}, ranges: unknown, authz: answers{decision: authorizer.DecisionAllow},
			wantErr: func(err error) bool { return err == nil },
		},
		"what is no target is refused": {
			request: request{operation: admission.Create, object: &v1.Target{}},
			wantErr: apierrors.IsInternalError, want: "*v1.Target",
		},
		"what was no target before is refused": {
			request: request{operation: admission.Update, object: process(nil), old: &v1.Target{}},
			wantErr: apierrors.IsInternalError, want: "*v1.Target",
		},
	} {
		t.Run(name, func(t *testing.T) {
			objs := newObjects(standard(nil), stored(t, ssh(nil)))
			objs.err = tt.err
			opts := objs.options()
			if tt.ranges != nil {
				opts.Services = tt.ranges
			}
			err := validate(newPlugin(t, classpolicy.PluginName, &tt.authz, opts), tt.request)
			if !tt.wantErr(err) {
				t.Fatalf("unexpected error %v", err)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.want) || len(err.Error()) > 1<<10) {
				t.Errorf("%q, want %q, in 1 KiB", err, tt.want)
			}
		})
	}
}

// TestRefusalsAreBounded proves that no target and no class makes an answer
// grow, and that one to a connection is read whole by every client.
func TestRefusalsAreBounded(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	class := standard(func(class *v1.TargetClass) {
		class.Name = long(253)
		class.Spec.Addresses.Deny = []string{"192.0.2.0/24"}
		class.Spec.Users = nil
		for i := range 256 {
			class.Spec.Agents = append(class.Spec.Agents, fmt.Sprintf("%s-%d", long(249), i))
		}
	})
	huge := ssh(func(target *api.Target) {
		target.Spec.ClassName = class.Name
		target.Name = long(v1.MaxTargetNameLength)
		target.Spec.AgentName = long(253)
		target.Spec.SSH.User = long(256)
		target.Spec.SSH.Endpoints = nil
		for i := range v1.MaxInstances {
			target.Spec.SSH.Endpoints = append(target.Spec.SSH.Endpoints, api.Endpoint{Name: fmt.Sprintf("e%d", i), Host: fmt.Sprintf("192.0.2.%d", i%256), Port: 22})
		}
	})
	missing := huge.DeepCopy()
	missing.Spec.ClassName = long(252)
	forward := request{operation: admission.Connect, subresource: "portforward", name: huge.Name, object: &v1.TargetPortForwardOptions{Ports: []int32{22}}}
	open := standard(func(class *v1.TargetClass) {
		for i := range int32(256) {
			class.Spec.Ports.Allowed = append(class.Spec.Ports.Allowed, v1.PortRange{Port: 20000 + i, EndPort: 30000 + i, Protocol: v1.ProtocolUDP})
		}
	})
	for name, tt := range map[string]struct {
		class   *v1.TargetClass
		target  *api.Target
		request request
		want    int // bytes of the Status as JSON
	}{
		"violations of a new target":         {class, huge, request{operation: admission.Create, object: huge}, 5 << 10},
		"a new target without its class":     {class, missing, request{operation: admission.Create, object: missing}, 1 << 10},
		"violations of a connection":         {class, huge, forward, 1 << 10},
		"a connection without its class":     {class, missing, forward, 1 << 10},
		"a port that may not be forwarded":   {open, process(nil), forward, 1 << 10},
		"a port that the class doesn't name": {standard(nil), process(nil), forward, 1 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			objs := newObjects(tt.class)
			objs.targets["shop/"+huge.Name] = stored(t, tt.target)
			err := judge(t, &answers{decision: authorizer.DecisionAllow}, objs, tt.request).err
			var status apierrors.APIStatus
			if !apierrors.IsForbidden(err) || !errors.As(err, &status) {
				t.Fatalf("got %v, want a Forbidden", err)
			}
			answer := status.Status()
			answer.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
			encoded, err := json.Marshal(answer)
			if err != nil {
				t.Fatal(err)
			}
			if len(encoded) > tt.want {
				t.Errorf("%d bytes, want %d at most: %s", len(encoded), tt.want, encoded)
			}
		})
	}
}

// TestViolationsAreListedWhole proves that what a message has no room for is
// left out as a whole, and said to be.
func TestViolationsAreListedWhole(t *testing.T) {
	class := standard(func(class *v1.TargetClass) { class.Spec.Addresses.Deny = []string{"192.0.2.0/24"} })
	target := ssh(func(target *api.Target) {
		for i := range 20 {
			target.Spec.SSH.Endpoints = append(target.Spec.SSH.Endpoints, api.Endpoint{Name: fmt.Sprintf("e%d", i), Host: fmt.Sprintf("192.0.2.%d", 100+i), Port: 22})
		}
	})
	for name, tt := range map[string]struct {
		request  request
		wantMore bool
	}{
		"a new target's": {request: request{operation: admission.Create, object: target}},
		"a connection's": {request: request{operation: admission.Connect, subresource: "log", object: &v1.TargetLogOptions{}}, wantMore: true},
	} {
		t.Run(name, func(t *testing.T) {
			err := judge(t, &answers{decision: authorizer.DecisionAllow}, newObjects(class, stored(t, target)), tt.request).err
			checkRefusal(t, err, []string{"spec.ssh.endpoints[0].host", "spec.ssh.endpoints[1].host", "!…"})
			if more := strings.HasSuffix(err.Error(), "; and more"); more != tt.wantMore {
				t.Errorf("%q: says that there is more: %t", err, more)
			}
		})
	}
}
