package validation_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	api "aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/apis/streaming/install"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
	"aaserver.io/aaserver/apis/streaming/validation"
)

// TestMisfitsAreRefused validates targets of v1alpha1 with settings that their
// type doesn't have: the errors name the fields that the client has set.
func TestMisfitsAreRefused(t *testing.T) {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	hubOf := func(t *testing.T, annotations map[string]string, spec v1alpha1.TargetSpec) *api.Target {
		t.Helper()
		flat := &v1alpha1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", ResourceVersion: "1", Annotations: annotations}, Spec: spec}
		scheme.Default(flat)
		hub := &api.Target{}
		if err := scheme.Convert(flat, hub, nil); err != nil {
			t.Fatal(err)
		}
		return hub
	}
	process := v1alpha1.TargetSpec{Type: "Process", AgentName: "edge-17", Command: []string{"/bin/app"}}
	tcp := v1alpha1.TargetSpec{Type: "TCP", Endpoints: []v1alpha1.Endpoint{{Name: "a", Host: "192.0.2.1", Port: 5432}}}
	change := func(spec v1alpha1.TargetSpec, f func(*v1alpha1.TargetSpec)) v1alpha1.TargetSpec {
		f(&spec)
		return spec
	}
	cases := map[string]struct {
		annotations map[string]string
		spec        v1alpha1.TargetSpec
		want        []string
	}{
		"a process": {spec: process},
		"TCP endpoints": {
			spec: tcp,
		},
		"a process with an image": {
			spec: change(process, func(s *v1alpha1.TargetSpec) { s.Image = "nginx" }),
			want: []string{"spec.image: Forbidden: may only be set for the type `Container`"},
		},
		"TCP endpoints with much that they don't have": {
			spec: change(tcp, func(s *v1alpha1.TargetSpec) { s.User, s.Stdin, s.TLSServerName = "root", true, "db" }),
			want: []string{
				"spec.user: Forbidden: may only be set for the type `Process` or `SSH`",
				"spec.stdin: Forbidden: may only be set for the type `Process` or `Container`",
				"spec.tlsServerName: Forbidden: may only be set for the type `TCP` with `tls`",
			},
		},
		"no type": {
			spec: v1alpha1.TargetSpec{AgentName: "edge-17", Command: []string{"/bin/app"}},
			want: []string{
				"spec.command: Forbidden: may only be set for the type `Process` or `Container`",
				"spec: Required value: must specify one of: `process`, `container`, `ssh`, `tcp`",
			},
		},
		"a type that there isn't": {
			spec: change(process, func(s *v1alpha1.TargetSpec) { s.Type = "VM" }),
			want: []string{
				`spec.type: Unsupported value: "VM": supported values: "Process", "Container", "SSH", "TCP"`,
				"spec: Required value: must specify one of: `process`, `container`, `ssh`, `tcp`",
			},
		},
		"a type that there isn't, and that is long": {
			spec: change(process, func(s *v1alpha1.TargetSpec) { s.Type = v1alpha1.TargetType(strings.Repeat("a", 65)) }),
			want: []string{
				`spec.type: Unsupported value: supported values: "Process", "Container", "SSH", "TCP"`,
				"spec: Required value: must specify one of: `process`, `container`, `ssh`, `tcp`",
			},
		},
		"settings by annotation": {
			annotations: map[string]string{v1alpha1.AnnotationSettings: `{"type":"","image":"nginx"}`},
			spec:        process,
			want:        []string{"spec.image: Forbidden: may only be set for the type `Container`"},
		},
		"annotations of ours that say nothing": {
			annotations: map[string]string{v1alpha1.AnnotationSettings: "{}", v1alpha1.AnnotationSources: "{}"},
			spec:        process,
			want: []string{
				"metadata.annotations[v1alpha1.streaming.aaserver.io/settings]: Forbidden: is reserved for conversion between versions: remove it",
				"metadata.annotations[v1.streaming.aaserver.io/sources]: Forbidden: is reserved for conversion between versions: remove it",
			},
		},
		"another source by annotation": {
			annotations: map[string]string{v1alpha1.AnnotationSources: `{"container":{"image":"nginx","resources":{}}}`},
			spec:        process,
			want:        []string{"spec: Invalid value: \"{process, container}\": must specify exactly one of: `process`, `container`, `ssh`, `tcp`"},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			target := hubOf(t, tc.annotations, tc.spec)
			var got []string
			for _, err := range validation.ValidateTarget(target) {
				got = append(got, err.Error())
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("errors of a new target (-want +got):\n%s", diff)
			}
			old := hubOf(t, nil, process)
			if errs := validation.ValidateTargetUpdate(target, old); tc.want != nil && len(errs) == 0 {
				t.Error("it isn't refused as an update, whose spec may be the old one")
			}
			// What came in before this rule can still be let go of.
			gone := target.DeepCopy()
			gone.Finalizers = nil
			if errs := validation.ValidateTargetUpdate(gone, target); len(errs) > 0 {
				t.Errorf("an update that changes nothing of it is refused: %v", errs)
			}
		})
	}
}
