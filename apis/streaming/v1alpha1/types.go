package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// +genclient
// +genclient:method=GetScale,verb=get,subresource=scale,result=k8s.io/api/autoscaling/v1.Scale
// +genclient:method=UpdateScale,verb=update,subresource=scale,input=k8s.io/api/autoscaling/v1.Scale,result=k8s.io/api/autoscaling/v1.Scale
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// Target is something that is not a pod (a process, a container on a lone
// host, an SSH host, a TCP endpoint), made available to the Kubernetes API
// with the subresources that make pods pleasant: log, exec, attach,
// portforward, status and scale. This version is deprecated: use
// streaming.aaserver.io/v1.
type Target struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is the standard object's metadata. The name is a DNS label of
	// at most 52 characters.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty" protobuf:"bytes,1,opt,name=metadata"`

	// spec is the desired state of the target.
	// +optional
	Spec TargetSpec `json:"spec,omitempty" protobuf:"bytes,2,opt,name=spec"`

	// status is the state of the target as its agent or the server last saw
	// it.
	// +optional
	Status TargetStatus `json:"status,omitempty" protobuf:"bytes,3,opt,name=status"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetList is a list of targets.
type TargetList struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is the standard list's metadata.
	// +optional
	metav1.ListMeta `json:"metadata,omitempty" protobuf:"bytes,1,opt,name=metadata"`

	// items are the targets.
	Items []Target `json:"items" protobuf:"bytes,2,rep,name=items"`
}

// TargetType says what a target is.
// +enum
type TargetType string

const (
	// TargetTypeProcess is a command that an agent runs and supervises.
	TargetTypeProcess TargetType = "Process"
	// TargetTypeContainer is a container that an agent runs on its host.
	TargetTypeContainer TargetType = "Container"
	// TargetTypeSSH is a set of hosts that are reached by SSH.
	TargetTypeSSH TargetType = "SSH"
	// TargetTypeTCP is a set of TCP endpoints that are reached directly.
	TargetTypeTCP TargetType = "TCP"
)

// TargetSpec is the desired state of a target. Its type says which of the
// settings it may have.
type TargetSpec struct {
	// type says what the target is: Process, Container, SSH or TCP. It can't
	// be changed.
	Type TargetType `json:"type" protobuf:"bytes,1,opt,name=type,casttype=TargetType"`

	// className names the TargetClass that says what the target may do. Empty
	// means the default class.
	// +optional
	ClassName string `json:"className,omitempty" protobuf:"bytes,2,opt,name=className"`

	// agentName names the agent that hosts the target's instances (Process,
	// Container) or through which its endpoints are reached (SSH, TCP). It
	// can't be changed. Process and Container need one; standalone fills in
	// its own.
	// +optional
	AgentName string `json:"agentName,omitempty" protobuf:"bytes,3,opt,name=agentName"`

	// replicas is how many instances of a Process or Container run, 0 to 256;
	// 1 if not given. SSH and TCP have an instance for each endpoint instead,
	// and leave it unset.
	// +optional
	Replicas *int32 `json:"replicas,omitempty" protobuf:"varint,4,opt,name=replicas"`

	// restartPolicy says when an instance of a Process or Container that has
	// ended is started again: Always (the default), OnFailure or Never.
	// +optional
	RestartPolicy RestartPolicy `json:"restartPolicy,omitempty" protobuf:"bytes,5,opt,name=restartPolicy,casttype=RestartPolicy"`

	// terminationGracePeriodSeconds is how long an instance of a Process or
	// Container may take to end after SIGTERM before it is killed, 0 to 3600;
	// 30 if not given.
	// +optional
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty" protobuf:"varint,6,opt,name=terminationGracePeriodSeconds"`

	// image is the container image's reference. Container only, which needs
	// it.
	// +optional
	Image string `json:"image,omitempty" protobuf:"bytes,7,opt,name=image"`

	// command is the program and its first arguments of a Process, which needs
	// it, or replaces the entry point of a Container's image. Process and
	// Container only.
	// +optional
	// +listType=atomic
	Command []string `json:"command,omitempty" protobuf:"bytes,8,rep,name=command"`

	// args are appended to the command of a Process, or replace the arguments
	// of a Container's image. Process and Container only.
	// +optional
	// +listType=atomic
	Args []string `json:"args,omitempty" protobuf:"bytes,9,rep,name=args"`

	// env is added to the environment. Process and Container only.
	// +optional
	// +listType=map
	// +listMapKey=name
	Env []EnvVar `json:"env,omitempty" protobuf:"bytes,10,rep,name=env"`

	// workingDir is the absolute path that an instance starts in. Process and
	// Container only.
	// +optional
	WorkingDir string `json:"workingDir,omitempty" protobuf:"bytes,11,opt,name=workingDir"`

	// user is the user to run as (Process) or to log in as (SSH, which needs
	// it). Process and SSH only.
	// +optional
	User string `json:"user,omitempty" protobuf:"bytes,12,opt,name=user"`

	// stdin keeps a standard input open for attach. Process and Container
	// only.
	// +optional
	Stdin bool `json:"stdin,omitempty" protobuf:"varint,13,opt,name=stdin"`

	// tty gives an instance a terminal. It needs stdin. Process and Container
	// only.
	// +optional
	TTY bool `json:"tty,omitempty" protobuf:"varint,14,opt,name=tty"`

	// limits are the most that a container may use of cpu and memory.
	// Container only.
	// +optional
	Limits corev1.ResourceList `json:"limits,omitempty" protobuf:"bytes,15,rep,name=limits,casttype=k8s.io/api/core/v1.ResourceList,castkey=k8s.io/api/core/v1.ResourceName"`

	// endpoints are the hosts; each is one instance. 1 to 256. SSH and TCP
	// only, which need them.
	// +optional
	// +listType=map
	// +listMapKey=name
	Endpoints []Endpoint `json:"endpoints,omitempty" protobuf:"bytes,16,rep,name=endpoints"`

	// credentialsSecret names a Secret in the target's namespace, of type
	// kubernetes.io/ssh-auth or kubernetes.io/basic-auth, that holds the
	// credentials and, under known_hosts, the host keys to accept. SSH only,
	// which needs it.
	// +optional
	CredentialsSecret string `json:"credentialsSecret,omitempty" protobuf:"bytes,17,opt,name=credentialsSecret"`

	// logCommand is run; what it prints is the target's log. SSH only, and at
	// most one of logCommand, logPath and logJournalUnit.
	// +optional
	// +listType=atomic
	LogCommand []string `json:"logCommand,omitempty" protobuf:"bytes,18,rep,name=logCommand"`

	// logPath is the absolute path of the file that is the target's log. SSH
	// only.
	// +optional
	LogPath string `json:"logPath,omitempty" protobuf:"bytes,19,opt,name=logPath"`

	// logJournalUnit is the systemd unit whose journal is the target's log.
	// SSH only.
	// +optional
	LogJournalUnit string `json:"logJournalUnit,omitempty" protobuf:"bytes,20,opt,name=logJournalUnit"`

	// tls wraps each connection to an endpoint in TLS, so that clients can
	// speak plain text to a forwarded port. TCP only.
	// +optional
	TLS bool `json:"tls,omitempty" protobuf:"varint,21,opt,name=tls"`

	// tlsServerName is the name that the endpoint's certificate must be for;
	// its host if not given. TCP only, with tls.
	// +optional
	TLSServerName string `json:"tlsServerName,omitempty" protobuf:"bytes,22,opt,name=tlsServerName"`

	// tlsCABundle is the PEM-encoded certificates that the endpoint's must
	// chain to; the system's if not given. TCP only, with tls.
	// +optional
	TLSCABundle []byte `json:"tlsCABundle,omitempty" protobuf:"bytes,23,opt,name=tlsCABundle"`

	// ports are the ports that may be forwarded; 64 at most.
	// +optional
	// +listType=map
	// +listMapKey=name
	Ports []TargetPort `json:"ports,omitempty" protobuf:"bytes,24,rep,name=ports"`
}

// RestartPolicy says when an instance that has ended is started again.
// +enum
type RestartPolicy string

const (
	// RestartAlways starts an ended instance again, whatever its exit code.
	RestartAlways RestartPolicy = "Always"
	// RestartOnFailure starts an ended instance again unless it exited with 0.
	RestartOnFailure RestartPolicy = "OnFailure"
	// RestartNever leaves an ended instance ended.
	RestartNever RestartPolicy = "Never"
)

// Endpoint is one host of a reached source.
type Endpoint struct {
	// name is a DNS label, part of the instance's name.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`

	// host is a DNS name or an IP address.
	Host string `json:"host" protobuf:"bytes,2,opt,name=host"`

	// port is the TCP port, 1 to 65535.
	Port int32 `json:"port" protobuf:"varint,3,opt,name=port"`
}

// EnvVar is one environment variable.
type EnvVar struct {
	// name is the variable's name. Names that begin with AASERVER_ are the
	// agent's.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`

	// value is the variable's value. $(NAME) stands for the value of a
	// variable defined before it; $$(NAME) for the text itself.
	// +optional
	Value string `json:"value,omitempty" protobuf:"bytes,2,opt,name=value"`
}

// Protocol is the transport protocol of a port.
// +enum
type Protocol string

const (
	// ProtocolTCP is TCP.
	ProtocolTCP Protocol = "TCP"
	// ProtocolUDP is UDP.
	ProtocolUDP Protocol = "UDP"
)

// TargetPort is a port that may be forwarded.
type TargetPort struct {
	// name is the port's name, as an IANA service name: at most 15 lower case
	// letters, digits and dashes, with a letter among them.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`

	// port is the port's number, 1 to 65535. For hosted processes, which share
	// their host's network, it is what clients ask for: the instance listens
	// on the host port that AASERVER_PORT_<NAME> tells it.
	Port int32 `json:"port" protobuf:"varint,2,opt,name=port"`

	// protocol is TCP (the default) or UDP.
	// +optional
	Protocol Protocol `json:"protocol,omitempty" protobuf:"bytes,3,opt,name=protocol,casttype=Protocol"`

	// hostPort fixes the port that a hosted instance listens on, 1 to 65535,
	// with at most one replica. If not given, the agent chooses a free one for
	// each instance.
	// +optional
	HostPort int32 `json:"hostPort,omitempty" protobuf:"varint,4,opt,name=hostPort"`
}

// TargetStatus is the state of a target.
type TargetStatus struct {
	// observedGeneration is the metadata.generation that this status is of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty" protobuf:"varint,1,opt,name=observedGeneration"`

	// replicas is how many instances exist.
	// +optional
	Replicas int32 `json:"replicas,omitempty" protobuf:"varint,2,opt,name=replicas"`

	// readyReplicas is how many of them are ready.
	// +optional
	ReadyReplicas int32 `json:"readyReplicas,omitempty" protobuf:"varint,3,opt,name=readyReplicas"`

	// instances are the target's instances, in the order of their ordinals or
	// endpoints.
	// +optional
	// +listType=map
	// +listMapKey=name
	Instances []InstanceStatus `json:"instances,omitempty" protobuf:"bytes,4,rep,name=instances"`

	// conditions are Ready, Progressing and, where they apply, AgentConnected
	// and HostKeysVerified.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty" protobuf:"bytes,5,rep,name=conditions"`
}

// InstanceStatus is the state of one instance.
type InstanceStatus struct {
	// name is the instance's name: <target>-<ordinal> or <target>-<endpoint>.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`

	// ready says that the instance is running.
	Ready bool `json:"ready" protobuf:"varint,2,opt,name=ready"`

	// restartCount is how often the instance was started again after it
	// ended.
	RestartCount int32 `json:"restartCount" protobuf:"varint,3,opt,name=restartCount"`

	// state is the instance's present state.
	// +optional
	State InstanceState `json:"state,omitempty,omitzero" protobuf:"bytes,4,opt,name=state"`

	// lastState is how the instance ended the last time.
	// +optional
	LastState InstanceState `json:"lastState,omitempty,omitzero" protobuf:"bytes,5,opt,name=lastState"`

	// ports are the instance's ports and where it listens for them.
	// +optional
	// +listType=map
	// +listMapKey=name
	Ports []InstancePort `json:"ports,omitempty" protobuf:"bytes,6,rep,name=ports"`
}

// InstanceState is what an instance does: one of its fields is set. None of
// them means waiting.
type InstanceState struct {
	// waiting: the instance doesn't run yet, or not at the moment.
	// +optional
	Waiting *InstanceStateWaiting `json:"waiting,omitempty" protobuf:"bytes,1,opt,name=waiting"`

	// running: the instance runs.
	// +optional
	Running *InstanceStateRunning `json:"running,omitempty" protobuf:"bytes,2,opt,name=running"`

	// terminated: the instance has ended.
	// +optional
	Terminated *InstanceStateTerminated `json:"terminated,omitempty" protobuf:"bytes,3,opt,name=terminated"`
}

// InstanceStateWaiting is the state of an instance that doesn't run yet.
type InstanceStateWaiting struct {
	// reason is one word, such as CrashLoopBackOff.
	// +optional
	Reason string `json:"reason,omitempty" protobuf:"bytes,1,opt,name=reason"`
	// message says more, for a person.
	// +optional
	Message string `json:"message,omitempty" protobuf:"bytes,2,opt,name=message"`
}

// InstanceStateRunning is the state of an instance that runs.
type InstanceStateRunning struct {
	// startedAt is when it was started.
	// +optional
	StartedAt metav1.Time `json:"startedAt,omitempty,omitzero" protobuf:"bytes,1,opt,name=startedAt"`
}

// InstanceStateTerminated is the state of an instance that has ended.
type InstanceStateTerminated struct {
	// exitCode is the exit code; 128 plus the signal's number if a signal
	// ended it.
	ExitCode int32 `json:"exitCode" protobuf:"varint,1,opt,name=exitCode"`
	// signal is the number of the signal that ended it, if one did.
	// +optional
	Signal int32 `json:"signal,omitempty" protobuf:"varint,2,opt,name=signal"`
	// reason is one word: Completed, Error, Killed, StartError, AgentLost.
	// +optional
	Reason string `json:"reason,omitempty" protobuf:"bytes,3,opt,name=reason"`
	// message says more, for a person.
	// +optional
	Message string `json:"message,omitempty" protobuf:"bytes,4,opt,name=message"`
	// startedAt is when it was started.
	// +optional
	StartedAt metav1.Time `json:"startedAt,omitempty,omitzero" protobuf:"bytes,5,opt,name=startedAt"`
	// finishedAt is when it ended.
	// +optional
	FinishedAt metav1.Time `json:"finishedAt,omitempty,omitzero" protobuf:"bytes,6,opt,name=finishedAt"`
}

// InstancePort is a port of an instance.
type InstancePort struct {
	// name is the port's name in the spec.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`
	// port is the port's number in the spec.
	Port int32 `json:"port" protobuf:"varint,2,opt,name=port"`
	// hostPort is the port that the instance listens on.
	// +optional
	HostPort int32 `json:"hostPort,omitempty" protobuf:"varint,3,opt,name=hostPort"`
}
