package v1_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestSourceAndInstanceNames(t *testing.T) {
	endpoints := []v1.Endpoint{{Name: "b"}, {Name: "a"}}
	cases := map[string]struct {
		spec       v1.TargetSpec
		wantSource string
		wantHosted bool
		wantNames  []string
	}{
		"a process has ordinals": {
			spec:       v1.TargetSpec{Process: &v1.ProcessSource{}, Replicas: ptr.To[int32](3)},
			wantSource: "process", wantHosted: true, wantNames: []string{"web-0", "web-1", "web-2"},
		},
		"a container has ordinals": {
			spec:       v1.TargetSpec{Container: &v1.ContainerSource{}, Replicas: ptr.To[int32](1)},
			wantSource: "container", wantHosted: true, wantNames: []string{"web-0"},
		},
		"a hosted source has one instance by default": {
			spec:       v1.TargetSpec{Process: &v1.ProcessSource{}},
			wantSource: "process", wantHosted: true, wantNames: []string{"web-0"},
		},
		"a hosted source may have none": {
			spec:       v1.TargetSpec{Process: &v1.ProcessSource{}, Replicas: ptr.To[int32](0)},
			wantSource: "process", wantHosted: true,
		},
		"hosts reached by SSH have their endpoints' names, in their order": {
			spec:       v1.TargetSpec{SSH: &v1.SSHSource{Endpoints: endpoints}},
			wantSource: "ssh", wantNames: []string{"web-b", "web-a"},
		},
		"TCP endpoints have their own names": {
			spec:       v1.TargetSpec{TCP: &v1.TCPSource{Endpoints: endpoints}},
			wantSource: "tcp", wantNames: []string{"web-b", "web-a"},
		},
		"no source has nothing": {},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			target := &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: tc.spec}
			if got := target.Spec.Source(); got != tc.wantSource {
				t.Errorf("source %q, want %q", got, tc.wantSource)
			}
			if got := target.Spec.Hosted(); got != tc.wantHosted {
				t.Errorf("hosted %t, want %t", got, tc.wantHosted)
			}
			if diff := cmp.Diff(tc.wantNames, target.InstanceNames()); diff != "" {
				t.Errorf("names (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPortEnvName(t *testing.T) {
	if got, want := v1.PortEnvName("http-2"), "AASERVER_PORT_HTTP_2"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestRestarts(t *testing.T) {
	for _, tc := range []struct {
		policy           v1.RestartPolicy
		after0, after137 bool
	}{
		{v1.RestartAlways, true, true},
		{"", true, true},
		{v1.RestartOnFailure, false, true},
		{v1.RestartNever, false, false},
	} {
		if got := tc.policy.Restarts(0); got != tc.after0 {
			t.Errorf("%q restarts after exit code 0: %t, want %t", tc.policy, got, tc.after0)
		}
		if got := tc.policy.Restarts(137); got != tc.after137 {
			t.Errorf("%q restarts after exit code 137: %t, want %t", tc.policy, got, tc.after137)
		}
	}
}
