package target

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	api "aaserver.io/aaserver/apis/streaming"
)

func TestTable(t *testing.T) {
	created := metav1.NewTime(time.Now().Add(-90 * time.Minute))
	list := &api.TargetList{
		ListMeta: metav1.ListMeta{ResourceVersion: "7", Continue: "more", RemainingItemCount: ptr.To[int64](3)},
		Items: []api.Target{
			{
				ObjectMeta: metav1.ObjectMeta{Name: "web", CreationTimestamp: created},
				Spec: api.TargetSpec{
					ClassName: "standard", AgentName: "edge-17", Replicas: ptr.To[int32](3),
					Process: &api.ProcessSource{},
					Ports:   []api.TargetPort{{Name: "http", Port: 8080, Protocol: api.ProtocolTCP}, {Name: "dns", Port: 53, Protocol: api.ProtocolUDP}},
				},
				Status: api.TargetStatus{
					ReadyReplicas: 2,
					Conditions:    []metav1.Condition{{Type: "Ready", Status: metav1.ConditionFalse}},
				},
			},
			{
				ObjectMeta: metav1.ObjectMeta{Name: "db", CreationTimestamp: created},
				Spec:       api.TargetSpec{TCP: &api.TCPSource{Endpoints: make([]api.Endpoint, 2)}},
			},
		},
	}
	table, err := tableConvertor{}.ConvertToTable(t.Context(), list, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, column := range table.ColumnDefinitions {
		name := column.Name
		if column.Priority > 0 {
			name += " (wide)"
		}
		names = append(names, name)
	}
	if diff := cmp.Diff([]string{"Name", "Source", "Ready", "Instances", "Age", "Ports (wide)", "Class (wide)", "Agent (wide)"}, names); diff != "" {
		t.Errorf("columns (-want +got):\n%s", diff)
	}
	var cells [][]any
	for _, row := range table.Rows {
		cells = append(cells, row.Cells)
	}
	want := [][]any{
		{"web", "process", "False", "2/3", "90m", "http:8080,dns:53/UDP", "standard", "edge-17"},
		{"db", "tcp", "Unknown", "0/2", "90m", "<none>", "<none>", "<none>"},
	}
	if diff := cmp.Diff(want, cells); diff != "" {
		t.Errorf("cells (-want +got):\n%s", diff)
	}
	if table.ResourceVersion != "7" || table.Continue != "more" || *table.RemainingItemCount != 3 {
		t.Errorf("the list's metadata is lost: %+v", table.ListMeta)
	}

	table, err = tableConvertor{}.ConvertToTable(t.Context(), &list.Items[0], &metav1.TableOptions{NoHeaders: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(table.ColumnDefinitions) != 0 || len(table.Rows) != 1 {
		t.Errorf("without headers: %d columns and %d rows, want 0 and 1", len(table.ColumnDefinitions), len(table.Rows))
	}
}
