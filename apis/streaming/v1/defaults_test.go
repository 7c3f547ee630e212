package v1_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func newScheme(t *testing.T) *runtime.Scheme {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return scheme
}

func TestDefaultsOfTargets(t *testing.T) {
	process, container := &v1.ProcessSource{Command: []string{"a"}}, &v1.ContainerSource{Image: "a"}
	ssh, tcp := &v1.SSHSource{}, &v1.TCPSource{}
	cases := map[string]struct {
		spec, want v1.TargetSpec
	}{
		"a process runs once, always, and may take half a minute to end": {
			spec: v1.TargetSpec{Process: process},
			want: v1.TargetSpec{Process: process, Replicas: ptr.To[int32](1), RestartPolicy: "Always", TerminationGracePeriodSeconds: ptr.To[int64](30)},
		},
		"a container does so too": {
			spec: v1.TargetSpec{Container: container},
			want: v1.TargetSpec{Container: container, Replicas: ptr.To[int32](1), RestartPolicy: "Always", TerminationGracePeriodSeconds: ptr.To[int64](30)},
		},
		"zeros that were given stay": {
			spec: v1.TargetSpec{Process: process, Replicas: ptr.To[int32](0), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0)},
			want: v1.TargetSpec{Process: process, Replicas: ptr.To[int32](0), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0)},
		},
		"hosts reached by SSH are left as they are": {
			spec: v1.TargetSpec{SSH: ssh},
			want: v1.TargetSpec{SSH: ssh},
		},
		"TCP endpoints are left as they are": {
			spec: v1.TargetSpec{TCP: tcp},
			want: v1.TargetSpec{TCP: tcp},
		},
		"no source is left as it is, for validation to refuse": {},
		"a port is for TCP, whatever the source": {
			spec: v1.TargetSpec{TCP: tcp, Ports: []v1.TargetPort{{Name: "a", Port: 1}, {Name: "b", Port: 2, Protocol: "UDP"}}},
			want: v1.TargetSpec{TCP: tcp, Ports: []v1.TargetPort{{Name: "a", Port: 1, Protocol: "TCP"}, {Name: "b", Port: 2, Protocol: "UDP"}}},
		},
	}
	scheme := newScheme(t)
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			target := &v1.Target{Spec: tc.spec}
			list := &v1.TargetList{Items: []v1.Target{*target.DeepCopy()}}
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

func TestDefaultsOfOptions(t *testing.T) {
	cases := map[string]struct {
		options, want runtime.Object
	}{
		"a log is of both streams": {
			options: &v1.TargetLogOptions{},
			want:    &v1.TargetLogOptions{Stream: v1.LogStreamAll},
		},
		"a log's stream that was given stays": {
			options: &v1.TargetLogOptions{Stream: v1.LogStreamStderr},
			want:    &v1.TargetLogOptions{Stream: v1.LogStreamStderr},
		},
		"an exec without streams returns what the command writes": {
			options: &v1.TargetExecOptions{},
			want:    &v1.TargetExecOptions{Stdout: true, Stderr: true},
		},
		"an exec with a terminal has no stderr": {
			options: &v1.TargetExecOptions{TTY: true},
			want:    &v1.TargetExecOptions{TTY: true, Stdout: true},
		},
		"an exec with one stream keeps to it": {
			options: &v1.TargetExecOptions{Stdin: true},
			want:    &v1.TargetExecOptions{Stdin: true},
		},
		"an attach without streams returns what the instance writes": {
			options: &v1.TargetAttachOptions{},
			want:    &v1.TargetAttachOptions{Stdout: true, Stderr: true},
		},
		"an attach with a terminal has no stderr": {
			options: &v1.TargetAttachOptions{TTY: true},
			want:    &v1.TargetAttachOptions{TTY: true, Stdout: true},
		},
		"an attach with one stream keeps to it": {
			options: &v1.TargetAttachOptions{Stderr: true},
			want:    &v1.TargetAttachOptions{Stderr: true},
		},
		"a forward has no defaults": {
			options: &v1.TargetPortForwardOptions{},
			want:    &v1.TargetPortForwardOptions{},
		},
	}
	scheme := newScheme(t)
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			scheme.Default(tc.options)
			if diff := cmp.Diff(tc.want, tc.options); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}
