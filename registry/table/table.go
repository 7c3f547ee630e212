// Package table makes the tables that `kubectl get` prints.
package table

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metatable "k8s.io/apimachinery/pkg/api/meta/table"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// Convert is the work of a rest.TableConvertor for objects of type T and lists of
// them: a row of cells for each, and the columns unless options leave them out.
func Convert[T runtime.Object](object, options runtime.Object, columns []metav1.TableColumnDefinition, cells func(T) []any) (*metav1.Table, error) {
	table := &metav1.Table{}
	if opts, ok := options.(*metav1.TableOptions); !ok || !opts.NoHeaders {
		table.ColumnDefinitions = columns
	}
	if list, err := meta.ListAccessor(object); err == nil {
		table.ResourceVersion = list.GetResourceVersion()
		table.Continue = list.GetContinue()
		table.RemainingItemCount = list.GetRemainingItemCount()
	} else if single, err := meta.CommonAccessor(object); err == nil {
		table.ResourceVersion = single.GetResourceVersion()
	}
	var err error
	table.Rows, err = metatable.MetaToTableRow(object, func(item runtime.Object, _ metav1.Object, _, _ string) ([]any, error) {
		typed, ok := item.(T)
		if !ok {
			return nil, fmt.Errorf("can't print a %T as a %T", item, typed)
		}
		return cells(typed), nil
	})
	if err != nil {
		return nil, err
	}
	return table, nil
}
