package v1alpha1_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

func TestDefaults(t *testing.T) {
	cases := map[string]struct {
		spec, want v1alpha1.TargetSpec
	}{
		"a process runs once, always, and may take half a minute to end": {
			spec: v1alpha1.TargetSpec{Type: "Process"},
			want: v1alpha1.TargetSpec{Type: "Process", Replicas: ptr.To[int32](1), RestartPolicy: "Always", TerminationGracePeriodSeconds: ptr.To[int64](30)},
		},
		"a container does so too": {
			spec: v1alpha1.TargetSpec{Type: "Container"},
			want: v1alpha1.TargetSpec{Type: "Container", Replicas: ptr.To[int32](1), RestartPolicy: "Always", TerminationGracePeriodSeconds: ptr.To[int64](30)},
		},
		"zeros that were given stay": {
			spec: v1alpha1.TargetSpec{Type: "Process", Replicas: ptr.To[int32](0), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0)},
			want: v1alpha1.TargetSpec{Type: "Process", Replicas: ptr.To[int32](0), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0)},
		},
		"hosts reached by SSH are left as they are":                   {spec: v1alpha1.TargetSpec{Type: "SSH"}, want: v1alpha1.TargetSpec{Type: "SSH"}},
		"TCP endpoints are left as they are":                          {spec: v1alpha1.TargetSpec{Type: "TCP"}, want: v1alpha1.TargetSpec{Type: "TCP"}},
		"a command without a type is left as it is, to be refused":    {spec: v1alpha1.TargetSpec{Command: []string{"a"}}, want: v1alpha1.TargetSpec{Command: []string{"a"}}},
		"a type that there isn't is left as it is, to be refused":     {spec: v1alpha1.TargetSpec{Type: "VM"}, want: v1alpha1.TargetSpec{Type: "VM"}},
		"a server's name without TLS is left as it is, to be refused": {spec: v1alpha1.TargetSpec{Type: "TCP", TLSServerName: "a"}, want: v1alpha1.TargetSpec{Type: "TCP", TLSServerName: "a"}},
		"a port is for TCP, whatever the type": {
			spec: v1alpha1.TargetSpec{Ports: []v1alpha1.TargetPort{{Name: "a", Port: 1}, {Name: "b", Port: 2, Protocol: "UDP"}}},
			want: v1alpha1.TargetSpec{Ports: []v1alpha1.TargetPort{{Name: "a", Port: 1, Protocol: "TCP"}, {Name: "b", Port: 2, Protocol: "UDP"}}},
		},
	}
	scheme := newScheme()
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			target := &v1alpha1.Target{Spec: tc.spec}
			list := &v1alpha1.TargetList{Items: []v1alpha1.Target{*target.DeepCopy()}}
			scheme.Default(target)
			if diff := cmp.Diff(tc.want, target.Spec); diff != "" {
				t.Errorf("a target's spec (-want +got):\n%s", diff)
			}
			scheme.Default(list)
			if diff := cmp.Diff(tc.want, list.Items[0].Spec); diff != "" {
				t.Errorf("a list's (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDefaultsAgree: a target that leaves the same out in either version comes
// to be the same.
func TestDefaultsAgree(t *testing.T) {
	scheme := newScheme()
	for _, kind := range append(types, "") {
		flat := &v1alpha1.Target{Spec: v1alpha1.TargetSpec{Type: kind, Ports: []v1alpha1.TargetPort{{Name: "a", Port: 1}}}}
		got, want, full := &streaming.Target{}, &streaming.Target{}, &v1.Target{}
		convert(t, scheme, flat.DeepCopy(), want)
		convert(t, scheme, want, full)
		scheme.Default(full)
		want = &streaming.Target{}
		convert(t, scheme, full, want)
		scheme.Default(flat)
		convert(t, scheme, flat, got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a target of type %q (-by v1 +by v1alpha1):\n%s", kind, diff)
		}
	}
}
