// +k8s:openapi-gen=true
// +k8s:deepcopy-gen=package
// +k8s:conversion-gen=aaserver.io/aaserver/apis/streaming
// +k8s:defaulter-gen=TypeMeta
// +k8s:validation-gen=TypesWithField=TypeMeta
// +k8s:openapi-model-package=io.aaserver.streaming.v1
// +groupName=streaming.aaserver.io

// Package v1 is the stored version of the streaming.aaserver.io API: Target,
// which is anything that is not a pod but should be logged, entered, attached
// to and forwarded like one, TargetClass, which says what targets may do, and the
// options of Target's connect subresources.
package v1
