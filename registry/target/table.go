package target

import (
	"context"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metatable "k8s.io/apimachinery/pkg/api/meta/table"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/registry/table"
)

// tableConvertor prints targets as `kubectl get` shows them. Columns of
// priority 1 are shown with -o wide.
type tableConvertor struct{}

var columns = []metav1.TableColumnDefinition{
	{Name: "Name", Type: "string", Format: "name", Description: metav1.ObjectMeta{}.SwaggerDoc()["name"]},
	{Name: "Source", Type: "string", Description: "What the target is: process, container, ssh or tcp."},
	{Name: "Ready", Type: "string", Description: "The status of the condition Ready."},
	{Name: "Instances", Type: "string", Description: "How many instances are ready, of those that are wanted."},
	{Name: "Age", Type: "string", Description: metav1.ObjectMeta{}.SwaggerDoc()["creationTimestamp"]},
	{Name: "Ports", Type: "string", Priority: 1, Description: "The ports that may be forwarded."},
	{Name: "Class", Type: "string", Priority: 1, Description: "The TargetClass that says what the target may do."},
	{Name: "Agent", Type: "string", Priority: 1, Description: "The agent that hosts the target, or through which it is reached."},
}

// ConvertToTable implements rest.TableConvertor.
func (tableConvertor) ConvertToTable(_ context.Context, object, tableOptions runtime.Object) (*metav1.Table, error) {
	return table.Convert(object, tableOptions, columns, cells)
}

func cells(target *api.Target) []any {
	ready := string(metav1.ConditionUnknown)
	if c := meta.FindStatusCondition(target.Status.Conditions, v1.ConditionReady); c != nil {
		ready = string(c.Status)
	}
	return []any{
		target.Name,
		sourceOf(target),
		ready,
		fmt.Sprintf("%d/%d", target.Status.ReadyReplicas, wanted(target)),
		metatable.ConvertToHumanReadableDateType(target.CreationTimestamp),
		orNone(portList(target.Spec.Ports)),
		orNone(target.Spec.ClassName),
		orNone(target.Spec.AgentName),
	}
}

// wanted is how many instances the spec asks for.
func wanted(target *api.Target) int {
	switch spec := &target.Spec; {
	case spec.SSH != nil:
		return len(spec.SSH.Endpoints)
	case spec.TCP != nil:
		return len(spec.TCP.Endpoints)
	case spec.Replicas != nil:
		return int(*spec.Replicas)
	}
	return int(v1.DefaultReplicas)
}

// portList prints ports as `http:8080,dns:53/UDP`.
func portList(ports []api.TargetPort) string {
	var list []string
	for _, p := range ports {
		s := fmt.Sprintf("%s:%d", p.Name, p.Port)
		if p.Protocol != api.ProtocolTCP {
			s += "/" + string(p.Protocol)
		}
		list = append(list, s)
	}
	return strings.Join(list, ",")
}

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}
