package server

import (
	"context"
	"fmt"
	"os"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// demoNamespace is where the demo's targets are.
const demoNamespace = "default"

// demoLabel marks the demo's targets.
const demoLabel = "streaming.aaserver.io/demo"

// createDemo creates the demo's targets, which run this very binary. Those that
// exist stay as the user made them, but for the binary, which may have moved.
func createDemo(ctx context.Context, config *rest.Config) error {
	client, err := versioned.NewForConfig(config)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	targets := client.StreamingV1().Targets(demoNamespace)
	for _, target := range demoTargets(self) {
		_, err := targets.Create(ctx, target, metav1.CreateOptions{FieldManager: "aaserver-demo"})
		if err == nil {
			continue
		}
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		existing, err := targets.Get(ctx, target.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if existing.Labels[demoLabel] == "" || existing.Spec.Process == nil || existing.Spec.Process.Command[0] == self {
			continue
		}
		patch, err := json.Marshal(map[string]any{"spec": map[string]any{"process": map[string]any{"command": target.Spec.Process.Command}}})
		if err != nil {
			return err
		}
		if _, err := targets.Patch(ctx, target.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "aaserver-demo"}); err != nil {
			return fmt.Errorf("target %s: %w", target.Name, err)
		}
	}
	return nil
}

func demoTargets(self string) []*v1.Target {
	demo := func(name string, spec v1.TargetSpec) *v1.Target {
		spec.Process.Command = []string{self, "demo", name}
		return &v1.Target{
			ObjectMeta: metav1.ObjectMeta{
				Name:      name,
				Namespace: demoNamespace,
				Labels:    map[string]string{demoLabel: "true"},
			},
			Spec: spec,
		}
	}
	return []*v1.Target{
		demo("web", v1.TargetSpec{
			Replicas: ptr.To[int32](2),
			Process:  &v1.ProcessSource{Args: []string{"--listen=127.0.0.1:$(" + v1.PortEnvName("http") + ")"}},
			Ports:    []v1.TargetPort{{Name: "http", Port: 8080, Protocol: v1.ProtocolTCP}},
		}),
		demo("ticker", v1.TargetSpec{
			Process: &v1.ProcessSource{},
		}),
		demo("shell", v1.TargetSpec{
			TerminationGracePeriodSeconds: ptr.To[int64](1),
			Process:                       &v1.ProcessSource{Stdin: true, TTY: true},
		}),
	}
}
