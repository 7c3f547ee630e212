package streaming

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetClass says what the targets that name it may do.
type TargetClass struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	Spec TargetClassSpec
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetClassList is a list of classes.
type TargetClassList struct {
	metav1.TypeMeta
	metav1.ListMeta
	Items []TargetClass
}

// TargetClassSpec is what a class allows.
type TargetClassSpec struct {
	Sources   []string
	Agents    []string
	Users     []string
	AgentUser bool
	Addresses AddressPolicy
	Ports     PortPolicy
	Limits    SessionLimits
}

// AddressPolicy says which addresses may be dialled.
type AddressPolicy struct {
	Allow []string
	Deny  []string
}

// PortPolicy says which ports may be forwarded.
type PortPolicy struct {
	Allowed     []PortRange
	Unlisted    bool
	UnixSockets []string
	Reverse     []PortRange
}

// PortRange is a port, or a range of them.
type PortRange struct {
	Port     int32
	EndPort  int32
	Protocol Protocol
}

// SessionLimits bound sessions.
type SessionLimits struct {
	SessionsPerUser    *int32
	SessionsPerTarget  *int32
	IdleTimeoutSeconds *int64
	MaxDurationSeconds *int64
}
