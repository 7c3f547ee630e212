package v1

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
)

// addFieldLabels says which fields a field selector may name.
func addFieldLabels(scheme *runtime.Scheme) error {
	return scheme.AddFieldLabelConversionFunc(SchemeGroupVersion.WithKind("Target"),
		func(label, value string) (string, string, error) {
			switch label {
			case "metadata.name", "metadata.namespace", "spec.agentName":
				return label, value, nil
			}
			return "", "", fmt.Errorf("%q is not a known field selector: only metadata.name, metadata.namespace and spec.agentName are", label)
		})
}
