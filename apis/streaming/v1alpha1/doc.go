// +k8s:openapi-gen=true
// +k8s:deepcopy-gen=package
// +k8s:conversion-gen=aaserver.io/aaserver/apis/streaming
// +k8s:defaulter-gen=TypeMeta
// +k8s:openapi-model-package=io.aaserver.streaming.v1alpha1
// +groupName=streaming.aaserver.io

// Package v1alpha1 is the first, flat shape of Target: a type, and the settings
// of every type side by side in the spec. It is deprecated, and served for
// clients that were written for it; v1 is stored.
//
// No field is lost between the versions, whatever an object holds. What one
// shape has no place for is carried in an annotation of the other, and taken
// off again on the way back. See conversion.go.
package v1alpha1
