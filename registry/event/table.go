package event

import (
	"context"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/duration"

	"aaserver.io/aaserver/registry/table"
)

// tableConvertor prints events as `kubectl get` shows them, in the columns that
// a cluster's have. Columns of priority 1 are shown with -o wide.
type tableConvertor struct{}

var columns = []metav1.TableColumnDefinition{
	{Name: "Last Seen", Type: "string", Description: corev1.Event{}.SwaggerDoc()["lastTimestamp"]},
	{Name: "Type", Type: "string", Description: corev1.Event{}.SwaggerDoc()["type"]},
	{Name: "Reason", Type: "string", Description: corev1.Event{}.SwaggerDoc()["reason"]},
	{Name: "Object", Type: "string", Description: corev1.Event{}.SwaggerDoc()["involvedObject"]},
	{Name: "Subobject", Type: "string", Priority: 1, Description: corev1.ObjectReference{}.SwaggerDoc()["fieldPath"]},
	{Name: "Source", Type: "string", Priority: 1, Description: corev1.Event{}.SwaggerDoc()["source"]},
	{Name: "Message", Type: "string", Description: corev1.Event{}.SwaggerDoc()["message"]},
	{Name: "First Seen", Type: "string", Priority: 1, Description: corev1.Event{}.SwaggerDoc()["firstTimestamp"]},
	{Name: "Count", Type: "string", Priority: 1, Description: corev1.Event{}.SwaggerDoc()["count"]},
	{Name: "Name", Type: "string", Format: "name", Priority: 1, Description: metav1.ObjectMeta{}.SwaggerDoc()["name"]},
}

// ConvertToTable implements rest.TableConvertor.
func (tableConvertor) ConvertToTable(_ context.Context, object, tableOptions runtime.Object) (*metav1.Table, error) {
	return table.Convert(object, tableOptions, columns, cells)
}

// cells prints an event of either kind: the older has timestamps and a count, the
// newer an eventTime and, if it happened again, a series.
func cells(event *corev1.Event) []any {
	first := event.FirstTimestamp.Time
	if first.IsZero() {
		first = event.EventTime.Time
	}
	last := event.LastTimestamp.Time
	if last.IsZero() {
		last = first
	}
	count := max(event.Count, 1)
	if event.Series != nil {
		last = event.Series.LastObservedTime.Time
		count = event.Series.Count
	}
	object := strings.ToLower(event.InvolvedObject.Kind)
	if event.InvolvedObject.Name != "" {
		object += "/" + event.InvolvedObject.Name
	}
	source := firstOf(event.Source.Component, event.ReportingController)
	if host := firstOf(event.Source.Host, event.ReportingInstance); host != "" {
		source += ", " + host
	}
	return []any{
		since(last),
		event.Type,
		event.Reason,
		object,
		event.InvolvedObject.FieldPath,
		source,
		strings.TrimSpace(event.Message),
		since(first),
		int64(count),
		event.Name,
	}
}

func since(t time.Time) string {
	if t.IsZero() {
		return "<unknown>"
	}
	return duration.HumanDuration(time.Since(t))
}
