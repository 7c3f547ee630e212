package targetclass

import (
	"context"
	"fmt"
	"strings"

	metatable "k8s.io/apimachinery/pkg/api/meta/table"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/registry/table"
)

// tableConvertor prints classes as `kubectl get` shows them. Columns of
// priority 1 are shown with -o wide.
type tableConvertor struct{}

var columns = []metav1.TableColumnDefinition{
	{Name: "Name", Type: "string", Format: "name", Description: metav1.ObjectMeta{}.SwaggerDoc()["name"]},
	{Name: "Default", Type: "string", Description: "Whether targets that name no class may get this one."},
	{Name: "Sources", Type: "string", Description: "The sources that targets may have."},
	{Name: "Agents", Type: "string", Description: "The agents that targets may name."},
	{Name: "Age", Type: "string", Description: metav1.ObjectMeta{}.SwaggerDoc()["creationTimestamp"]},
	{Name: "Users", Type: "string", Priority: 1, Description: "The users that may be run as; <agent> is the agent's own."},
	{Name: "Ports", Type: "string", Priority: 1, Description: "The ports that may be forwarded: those that targets list, unless unlisted ones may be, too; and whether unix sockets may be, and reverse forwards made."},
}

// ConvertToTable implements rest.TableConvertor.
func (tableConvertor) ConvertToTable(_ context.Context, object, tableOptions runtime.Object) (*metav1.Table, error) {
	return table.Convert(object, tableOptions, columns, cells)
}

func cells(class *api.TargetClass) []any {
	spec := &class.Spec
	users := spec.Users
	if spec.AgentUser {
		users = append([]string{"<agent>"}, users...)
	}
	byDefault := ""
	if class.Annotations[v1.AnnotationDefaultClass] == "true" {
		byDefault = "true"
	}
	return []any{
		class.Name,
		byDefault,
		listed(spec.Sources),
		listed(spec.Agents),
		metatable.ConvertToHumanReadableDateType(class.CreationTimestamp),
		listed(users),
		portsOf(&spec.Ports),
	}
}

// portsOf prints ports as `8000-8999,53/UDP,unlisted,sockets,reverse`.
func portsOf(ports *api.PortPolicy) string {
	var list []string
	for _, r := range ports.Allowed {
		s := fmt.Sprint(r.Port)
		if r.EndPort > r.Port {
			s += fmt.Sprint("-", r.EndPort)
		}
		if r.Protocol != api.ProtocolTCP {
			s += "/" + string(r.Protocol)
		}
		list = append(list, s)
	}
	if len(list) == 0 {
		list = append(list, v1.ClassWildcard)
	}
	if ports.Unlisted {
		list = append(list, "unlisted")
	}
	if len(ports.UnixSockets) > 0 {
		list = append(list, "sockets")
	}
	if len(ports.Reverse) > 0 {
		list = append(list, "reverse")
	}
	return listed(list)
}

// listed keeps a column narrow.
func listed(items []string) string {
	const most = 4
	switch {
	case len(items) == 0:
		return "<none>"
	case len(items) > most:
		return fmt.Sprintf("%s + %d more", strings.Join(items[:most], ","), len(items)-most)
	}
	return strings.Join(items, ",")
}
