package table

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"
)

func TestConvert(t *testing.T) {
	columns := []metav1.TableColumnDefinition{{Name: "Name"}}
	cells := func(e *corev1.Event) []any { return []any{e.Name} }
	one := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "one", ResourceVersion: "3"}}
	row := metav1.TableRow{Cells: []any{"one"}, Object: runtime.RawExtension{Object: one}}
	for name, tt := range map[string]struct {
		object, options runtime.Object
		want            metav1.Table
	}{
		"a list": {
			object: &corev1.EventList{
				ListMeta: metav1.ListMeta{ResourceVersion: "7", Continue: "more", RemainingItemCount: ptr.To[int64](2)},
				Items:    []corev1.Event{*one},
			},
			want: metav1.Table{
				ListMeta:          metav1.ListMeta{ResourceVersion: "7", Continue: "more", RemainingItemCount: ptr.To[int64](2)},
				ColumnDefinitions: columns, Rows: []metav1.TableRow{row},
			},
		},
		"an empty list has rows, though none": {
			object: &corev1.EventList{},
			want:   metav1.Table{ColumnDefinitions: columns, Rows: []metav1.TableRow{}},
		},
		"one object": {
			object: one,
			want: metav1.Table{
				ListMeta:          metav1.ListMeta{ResourceVersion: "3"},
				ColumnDefinitions: columns, Rows: []metav1.TableRow{row},
			},
		},
		"without columns": {
			object: one, options: &metav1.TableOptions{NoHeaders: true},
			want: metav1.Table{ListMeta: metav1.ListMeta{ResourceVersion: "3"}, Rows: []metav1.TableRow{row}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Convert(tt.object, tt.options, columns, cells)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for _, object := range []runtime.Object{&corev1.Pod{}, &corev1.PodList{Items: make([]corev1.Pod, 1)}} {
		_, err := Convert(object, nil, columns, cells)
		if want := "can't print a *v1.Pod as a *v1.Event"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a %T: got %v, want %q", object, err, want)
		}
	}
}
