package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupName is the name of the API group.
const GroupName = "streaming.aaserver.io"

// SchemeGroupVersion is the group and version of the types of this package.
var SchemeGroupVersion = schema.GroupVersion{Group: GroupName, Version: "v1"}

var (
	// SchemeBuilder collects what AddToScheme does; the generated files add
	// their conversions to it.
	SchemeBuilder      = runtime.NewSchemeBuilder(addKnownTypes, addDefaultingFuncs, addFieldLabels)
	localSchemeBuilder = &SchemeBuilder
	// AddToScheme registers the types, conversions and defaults of this
	// version.
	AddToScheme = SchemeBuilder.AddToScheme
)

func addKnownTypes(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(SchemeGroupVersion,
		&Target{},
		&TargetList{},
		&TargetClass{},
		&TargetClassList{},
	)
	AddOptionsToScheme(scheme, SchemeGroupVersion)
	metav1.AddToGroupVersion(scheme, SchemeGroupVersion)
	return nil
}

// AddOptionsToScheme registers the option kinds under a served version. There
// is one set of Go types for all versions, because a query string has no
// version of its own.
func AddOptionsToScheme(scheme *runtime.Scheme, gv schema.GroupVersion) {
	scheme.AddKnownTypes(gv,
		&TargetLogOptions{},
		&TargetExecOptions{},
		&TargetAttachOptions{},
		&TargetPortForwardOptions{},
	)
}

// Resource qualifies a resource's name with the group.
func Resource(resource string) schema.GroupResource {
	return SchemeGroupVersion.WithResource(resource).GroupResource()
}
