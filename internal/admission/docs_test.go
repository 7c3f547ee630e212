package admission

import (
	"os"
	"regexp"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	api "aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/apis/streaming/install"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/admission/classpolicy"
)

// TestDocumentedExamples proves that what docs/policy.md shows can be applied:
// its classes and roles are valid, its roles let its users use the classes, and
// its targets are what the classes allow.
func TestDocumentedExamples(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	install.Install(scheme)
	if err := rbacv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(api.SchemeGroupVersion, rbacv1.SchemeGroupVersion)

	objs, targets, roles := newObjects(), []*api.Target{}, map[string]*rbacv1.ClusterRole{}
	usable := map[string]bool{}
	var bindings []*rbacv1.ClusterRoleBinding
	for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for _, document := range strings.Split(block[1], "\n---\n") {
			obj, _, err := decoder.Decode([]byte(document), nil, nil)
			if err != nil {
				t.Fatalf("%v in\n%s", err, document)
			}
			switch obj := obj.(type) {
			case *api.TargetClass:
				if errs := validation.ValidateTargetClass(obj); len(errs) > 0 {
					t.Errorf("class %s: %v", obj.Name, errs.ToAggregate())
				}
				class := &v1.TargetClass{}
				if err := scheme.Convert(obj, class, nil); err != nil {
					t.Fatal(err)
				}
				objs.classes[class.Name] = class
			case *api.Target:
				if errs := validation.ValidateTarget(obj); len(errs) > 0 {
					t.Errorf("target %s: %v", obj.Name, errs.ToAggregate())
				}
				targets = append(targets, obj)
			case *rbacv1.ClusterRole:
				roles[obj.Name] = obj
				for _, rule := range obj.Rules {
					for _, name := range rule.ResourceNames {
						usable[name] = rule.Verbs[0] == "use" && rule.Resources[0] == "targetclasses" && rule.APIGroups[0] == v1.GroupName
					}
				}
			case *rbacv1.ClusterRoleBinding:
				bindings = append(bindings, obj)
			}
		}
	}
	if len(objs.classes) != 3 || len(targets) != 2 || len(bindings) != 1 {
		t.Errorf("found %d classes, %d targets and %d bindings, want 3, 2 and 1", len(objs.classes), len(targets), len(bindings))
	}
	for _, binding := range bindings {
		if roles[binding.RoleRef.Name] == nil {
			t.Errorf("the binding %s is to %s, which isn't there", binding.Name, binding.RoleRef.Name)
		}
	}
	for name, usable := range usable {
		if objs.classes[name] == nil || !usable {
			t.Errorf("the role doesn't let anybody use the class %s", name)
		}
	}
	p := newPlugin(t, classpolicy.PluginName, &answers{decision: authorizer.DecisionAllow}, objs.options())
	for _, target := range targets {
		if err := validate(p, request{operation: admission.Create, object: target}); err != nil {
			t.Error(err)
		}
	}
}
