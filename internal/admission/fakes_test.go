package admission

import (
	"context"
	"net/netip"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/tools/record"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/policy"
)

// objects are classes and targets, and what was read of them.
type objects struct {
	classes map[string]*v1.TargetClass
	targets map[string]*v1.Target
	err     error // of every read
	read    []string
	events  *record.FakeRecorder
}

func newObjects(objs ...any) *objects {
	o := &objects{classes: map[string]*v1.TargetClass{}, targets: map[string]*v1.Target{}, events: record.NewFakeRecorder(10)}
	for _, obj := range objs {
		switch obj := obj.(type) {
		case *v1.TargetClass:
			o.classes[obj.Name] = obj
		case *v1.Target:
			o.targets[obj.Namespace+"/"+obj.Name] = obj
		}
	}
	return o
}

func (o *objects) Class(_ context.Context, name string) (*v1.TargetClass, error) {
	o.read = append(o.read, "class "+name)
	if o.err != nil {
		return nil, o.err
	}
	if class, ok := o.classes[name]; ok {
		return class, nil
	}
	return nil, apierrors.NewNotFound(v1.Resource("targetclasses"), name)
}

func (o *objects) DefaultClass(context.Context) (string, error) {
	o.read = append(o.read, "default class")
	var all []*v1.TargetClass
	for _, class := range o.classes {
		all = append(all, class)
	}
	if class := policy.DefaultClass(all); class != nil {
		return class.Name, o.err
	}
	return "", o.err
}

func (o *objects) Target(_ context.Context, namespace, name string) (*v1.Target, error) {
	o.read = append(o.read, "target "+namespace+"/"+name)
	if o.err != nil {
		return nil, o.err
	}
	if target, ok := o.targets[namespace+"/"+name]; ok {
		return target, nil
	}
	return nil, apierrors.NewNotFound(v1.Resource("targets"), name)
}

func (o *objects) services() ([]netip.Prefix, error) {
	return []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}, nil
}

func (o *objects) options() Options {
	return Options{Recorder: o.events, Classes: o, Targets: o, Services: o.services}
}

// answers is an authorizer that always says the same, and what it was asked.
type answers struct {
	decision authorizer.Decision
	reason   string
	err      error
	asked    []authorizer.AttributesRecord
}

func (a *answers) Authorize(_ context.Context, attributes authorizer.Attributes) (authorizer.Decision, string, error) {
	a.asked = append(a.asked, attributes.(authorizer.AttributesRecord))
	return a.decision, a.reason, a.err
}

// newPlugin makes a plugin as a server does: by its name, with the initialisers.
func newPlugin(t *testing.T, name string, authz *answers, opts Options) admission.Interface {
	t.Helper()
	plugins := admission.NewPlugins()
	Register(plugins)
	p, err := plugins.InitPlugin(name, nil, admission.PluginInitializers{
		initializer.New(nil, nil, nil, authorizer.AuthorizerFunc(authz.Authorize), nil, nil, nil, nil),
		NewInitializer(opts),
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// jane is somebody with everything that an authorizer may go by.
var jane = &user.DefaultInfo{Name: "jane", UID: "4711", Groups: []string{"devs"}, Extra: map[string][]string{"scopes": {"a", "b"}}}

// request is one request for targets, as the generic server describes it.
type request struct {
	operation   admission.Operation
	resource    string // targets if empty
	subresource string
	name        string // web if empty, and if no object has another
	object, old runtime.Object
	dryRun      bool
}

func (r request) attributes() admission.Attributes {
	if r.resource == "" {
		r.resource = "targets"
	}
	name := r.name
	if name == "" {
		name = "web"
	}
	if target, ok := r.object.(*api.Target); ok {
		name = target.Name
	}
	return admission.NewAttributesRecord(r.object, r.old, v1.SchemeGroupVersion.WithKind("Target"), "shop", name,
		v1.SchemeGroupVersion.WithResource(r.resource), r.subresource, r.operation, nil, r.dryRun, jane)
}

// admit and validate ask a plugin, if it handles the operation.

func admit(p admission.Interface, r request) error {
	if !p.Handles(r.operation) {
		return nil
	}
	return p.(admission.MutationInterface).Admit(context.Background(), r.attributes(), nil)
}

func validate(p admission.Interface, r request) error {
	if !p.Handles(r.operation) {
		return nil
	}
	return p.(admission.ValidationInterface).Validate(context.Background(), r.attributes(), nil)
}

// standard is the class of the tests' targets. The test changes it.
func standard(change func(*v1.TargetClass)) *v1.TargetClass {
	class := &v1.TargetClass{
		ObjectMeta: metav1.ObjectMeta{Name: "standard"},
		Spec: v1.TargetClassSpec{
			Sources: []string{v1.SourceProcess, v1.SourceSSH},
			Agents:  []string{"edge"},
			Users:   []string{"www-data"},
			Ports:   v1.PortPolicy{Allowed: []v1.PortRange{{Port: 8000, EndPort: 8999}}},
		},
	}
	if change != nil {
		change(class)
	}
	return class
}

func defaultOne(class *v1.TargetClass) {
	class.Annotations = map[string]string{v1.AnnotationDefaultClass: "true"}
}

// process is a hosted target that the class standard allows, as it is stored.
func process(change func(*api.Target)) *api.Target {
	replicas, grace := int32(1), int64(30)
	target := &api.Target{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Finalizers: []string{v1.FinalizerInstances}},
		Spec: api.TargetSpec{
			ClassName:                     "standard",
			AgentName:                     "edge",
			Replicas:                      &replicas,
			RestartPolicy:                 api.RestartAlways,
			TerminationGracePeriodSeconds: &grace,
			Process:                       &api.ProcessSource{Command: []string{"/usr/bin/myapp"}, User: "www-data"},
			Ports:                         []api.TargetPort{{Name: "http", Port: 8080, Protocol: api.ProtocolTCP}},
		},
	}
	if change != nil {
		change(target)
	}
	return target
}

// ssh is a reached target that the class standard allows.
func ssh(change func(*api.Target)) *api.Target {
	target := &api.Target{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop"},
		Spec: api.TargetSpec{
			ClassName: "standard",
			SSH: &api.SSHSource{
				Endpoints:            []api.Endpoint{{Name: "a", Host: "192.0.2.10", Port: 22}},
				User:                 "www-data",
				CredentialsSecretRef: api.SecretReference{Name: "keys"},
			},
			Ports: []api.TargetPort{{Name: "http", Port: 8080, Protocol: api.ProtocolTCP}},
		},
	}
	if change != nil {
		change(target)
	}
	return target
}

// stored is a target as the registry returns it.
func stored(t *testing.T, hub *api.Target) *v1.Target {
	t.Helper()
	target := &v1.Target{}
	if err := v1.Convert_streaming_Target_To_v1_Target(hub, target, nil); err != nil {
		t.Fatal(err)
	}
	return target
}
