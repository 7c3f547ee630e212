package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// AnnotationDefaultClass, with the value "true", makes a TargetClass the one
	// of targets that name none. Of several, the one that was created last is.
	AnnotationDefaultClass = "streaming.aaserver.io/is-default-class"

	// ClassWildcard in a class's lists of agents and users stands for any.
	ClassWildcard = "*"
)

// +genclient
// +genclient:nonNamespaced
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetClass says what the targets that name it may do. What it doesn't allow
// is refused: an empty class allows nothing. Naming a class needs the verb use
// on it.
//
// It governs new targets, changes of what a target is, and new connections, from
// the moment that it is written. Instances run on, also when they are scaled, and
// sessions that are open go on.
type TargetClass struct {
	// +k8s:opaqueType
	metav1.TypeMeta `json:",inline"`
	// metadata is the standard object's metadata.
	// +optional
	// +k8s:opaqueType
	metav1.ObjectMeta `json:"metadata,omitempty" protobuf:"bytes,1,opt,name=metadata"`

	// spec is what the class allows.
	// +optional
	Spec TargetClassSpec `json:"spec,omitempty" protobuf:"bytes,2,opt,name=spec"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetClassList is a list of classes.
type TargetClassList struct {
	// +k8s:opaqueType
	metav1.TypeMeta `json:",inline"`
	// metadata is the standard list's metadata.
	// +optional
	// +k8s:opaqueType
	metav1.ListMeta `json:"metadata,omitempty" protobuf:"bytes,1,opt,name=metadata"`

	// items are the classes.
	Items []TargetClass `json:"items" protobuf:"bytes,2,rep,name=items"`
}

// TargetClassSpec is what a class allows.
type TargetClassSpec struct {
	// sources are the sources that targets may have: process, container, ssh,
	// tcp. With process and container, whoever may write targets runs commands
	// on the agents' hosts.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	Sources []string `json:"sources,omitempty" protobuf:"bytes,1,rep,name=sources"`

	// agents are the agents that targets may name; * stands for any. Targets
	// of a reached source (ssh, tcp) that name no agent need none here.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	Agents []string `json:"agents,omitempty" protobuf:"bytes,2,rep,name=agents"`

	// users are the users, by name or number, that a process may run as and
	// that an SSH login may be for; * stands for any but root, which has to be
	// named, as root or 0.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	Users []string `json:"users,omitempty" protobuf:"bytes,3,rep,name=users"`

	// agentUser lets a process leave its user out, and run as the user that its
	// agent runs as. That may be root.
	// +optional
	AgentUser bool `json:"agentUser,omitempty" protobuf:"varint,4,opt,name=agentUser"`

	// addresses says where the endpoints of reached sources (ssh, tcp) may be.
	// +optional
	Addresses AddressPolicy `json:"addresses,omitempty,omitzero" protobuf:"bytes,5,opt,name=addresses"`

	// ports says which ports may be forwarded.
	// +optional
	Ports PortPolicy `json:"ports,omitempty,omitzero" protobuf:"bytes,6,opt,name=ports"`

	// limits bound the sessions (logs, execs, attaches, port-forwards) on
	// targets of the class.
	// +optional
	Limits SessionLimits `json:"limits,omitempty,omitzero" protobuf:"bytes,7,opt,name=limits"`
}

// AddressPolicy says which addresses may be dialled. It is applied to each
// address that a name resolves to, when it is dialled.
//
// Loopback, link-local, multicast and unspecified addresses, those of a network's
// own NAT64 (64:ff9b:1::/48) and the cluster's own service ranges are denied,
// unless an entry of allow lies within such a range: an entry that merely
// contains it, such as 0.0.0.0/0, doesn't open it. An IPv6 address that leads to
// an IPv4 address is denied if that one is.
type AddressPolicy struct {
	// allow lists the CIDRs whose addresses may be dialled, such as
	// 10.20.0.0/16; 256 at most. Empty allows every address that isn't denied.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	Allow []string `json:"allow,omitempty" protobuf:"bytes,1,rep,name=allow"`

	// deny lists CIDRs whose addresses may not be dialled, whatever allow says;
	// 256 at most.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	Deny []string `json:"deny,omitempty" protobuf:"bytes,2,rep,name=deny"`
}

// PortPolicy says which ports may be forwarded, and what else a port-forward may
// lead to. A port is what the client asks for: of a hosted process, its port in
// the target's spec.
type PortPolicy struct {
	// allowed are the ports that targets may list and clients may forward; 256
	// at most. Empty allows all.
	// +optional
	// +listType=atomic
	// +k8s:optional
	// +k8s:listType=atomic
	// +k8s:maxItems=256
	Allowed []PortRange `json:"allowed,omitempty" protobuf:"bytes,1,rep,name=allowed"`

	// unlisted lets ports be forwarded that the target's spec doesn't list: of
	// a hosted process, every port of its host.
	// +optional
	Unlisted bool `json:"unlisted,omitempty" protobuf:"varint,2,opt,name=unlisted"`

	// unixSockets are the paths of unix sockets on an instance's host that
	// clients may connect to, such as /run/app.sock; one that ends in / stands
	// for everything below it; 256 at most. Empty allows none. A path that leads
	// over a symbolic link is refused. Of a hosted process, its agent connects,
	// with all that its user may.
	// +optional
	// +listType=set
	// +k8s:optional
	// +k8s:listType=set
	// +k8s:maxItems=256
	UnixSockets []string `json:"unixSockets,omitempty" protobuf:"bytes,3,rep,name=unixSockets"`

	// reverse are the TCP ports that clients may have listened to on the
	// loopback address of an instance's host, to be sent the connections that
	// come; 256 at most. Empty allows none.
	// +optional
	// +listType=atomic
	// +k8s:optional
	// +k8s:listType=atomic
	// +k8s:maxItems=256
	Reverse []PortRange `json:"reverse,omitempty" protobuf:"bytes,4,rep,name=reverse"`
}

// PortRange is a port, or a range of them.
type PortRange struct {
	// port is the first port, 1 to 65535.
	// +k8s:required
	// +k8s:minimum=1
	// +k8s:maximum=65535
	Port int32 `json:"port" protobuf:"varint,1,opt,name=port"`

	// endPort is the last port, port to 65535; port itself if not given.
	// +optional
	// +k8s:optional
	// +k8s:minimum=1
	// +k8s:maximum=65535
	EndPort int32 `json:"endPort,omitempty" protobuf:"varint,2,opt,name=endPort"`

	// protocol is TCP (the default) or UDP.
	// +optional
	// +k8s:required
	Protocol Protocol `json:"protocol,omitempty" protobuf:"bytes,3,opt,name=protocol,casttype=Protocol"`
}

// SessionLimits bound sessions, on each replica of the server for itself. What
// isn't given is the server's default, which its flags set.
type SessionLimits struct {
	// sessionsPerUser is how many sessions one user may have open at a time on
	// targets of the class, at least 1.
	// +optional
	// +k8s:optional
	// +k8s:minimum=1
	// +k8s:maximum=10000
	SessionsPerUser *int32 `json:"sessionsPerUser,omitempty" protobuf:"varint,1,opt,name=sessionsPerUser"`

	// sessionsPerTarget is how many sessions may be open at a time on one
	// target, at least 1.
	// +optional
	// +k8s:optional
	// +k8s:minimum=1
	// +k8s:maximum=10000
	SessionsPerTarget *int32 `json:"sessionsPerTarget,omitempty" protobuf:"varint,2,opt,name=sessionsPerTarget"`

	// idleTimeoutSeconds is how long an exec, attach or port-forward may go
	// without a byte either way before it is ended, at least 1. Logs aren't
	// idle while they wait for lines.
	// +optional
	// +k8s:optional
	// +k8s:minimum=1
	// +k8s:maximum=2592000
	IdleTimeoutSeconds *int64 `json:"idleTimeoutSeconds,omitempty" protobuf:"varint,3,opt,name=idleTimeoutSeconds"`

	// maxDurationSeconds is how long a session may last before it is ended, at
	// least 1.
	// +optional
	// +k8s:optional
	// +k8s:minimum=1
	// +k8s:maximum=2592000
	MaxDurationSeconds *int64 `json:"maxDurationSeconds,omitempty" protobuf:"varint,4,opt,name=maxDurationSeconds"`
}
