package v1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// LabelTarget is the label key of a scale subresource's selector; its
	// value is the target's name.
	LabelTarget = "streaming.aaserver.io/target"

	// FinalizerInstances is carried by hosted targets. Their agent puts it on
	// before anything of theirs runs, and takes it off when nothing does any
	// more.
	FinalizerInstances = "streaming.aaserver.io/instances"

	// MaxInstances bounds spec.replicas of hosted sources and the endpoints
	// of reached ones.
	MaxInstances = 256

	// MaxTargetNameLength bounds metadata.name, so that the name of each
	// instance, "<name>-<ordinal or endpoint>", is a DNS label too.
	MaxTargetNameLength = 52

	// PortEnvPrefix begins the names of the environment variables that tell an
	// instance which host port to listen on: the port's name in upper case
	// follows, with "_" for "-".
	PortEnvPrefix = "AASERVER_PORT_"
)

// +genclient
// +genclient:method=GetScale,verb=get,subresource=scale,result=k8s.io/api/autoscaling/v1.Scale
// +genclient:method=UpdateScale,verb=update,subresource=scale,input=k8s.io/api/autoscaling/v1.Scale,result=k8s.io/api/autoscaling/v1.Scale
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
// +k8s:validation-gen=false

// Target is something that is not a pod (a process, a container on a lone
// host, an SSH host, a TCP endpoint), made available to the Kubernetes API
// with the subresources that make pods pleasant: log, exec, attach,
// portforward, status and scale.
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
// +k8s:validation-gen=false

// TargetList is a list of targets.
type TargetList struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is the standard list's metadata.
	// +optional
	metav1.ListMeta `json:"metadata,omitempty" protobuf:"bytes,1,opt,name=metadata"`

	// items are the targets.
	Items []Target `json:"items" protobuf:"bytes,2,rep,name=items"`
}

// TargetSpec is the desired state of a target. Exactly one of the sources
// process, container, ssh and tcp is set, and which one never changes. A server
// refuses sources that it has no driver for.
type TargetSpec struct {
	// className names the TargetClass that says what the target may do. Empty
	// means the default class.
	// +optional
	ClassName string `json:"className,omitempty" protobuf:"bytes,1,opt,name=className"`

	// agentName names the agent that hosts the target's instances (process,
	// container) or through which its endpoints are reached (ssh, tcp). It
	// can't be changed. Hosted sources need one; standalone fills in its own.
	// +optional
	AgentName string `json:"agentName,omitempty" protobuf:"bytes,2,opt,name=agentName"`

	// replicas is how many instances of a hosted source (process, container)
	// run, 0 to 256; 1 if not given. Reached sources (ssh, tcp) have an
	// instance for each endpoint instead, and leave it unset.
	// +optional
	Replicas *int32 `json:"replicas,omitempty" protobuf:"varint,3,opt,name=replicas"`

	// restartPolicy says when an instance of a hosted source that has ended is
	// started again: Always (the default), OnFailure or Never.
	// +optional
	RestartPolicy RestartPolicy `json:"restartPolicy,omitempty" protobuf:"bytes,4,opt,name=restartPolicy,casttype=RestartPolicy"`

	// terminationGracePeriodSeconds is how long an instance of a hosted source
	// may take to end after SIGTERM before it is killed, 0 to 3600; 30 if not
	// given.
	// +optional
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty" protobuf:"varint,5,opt,name=terminationGracePeriodSeconds"`

	// process is a command that an agent runs and supervises.
	// +optional
	Process *ProcessSource `json:"process,omitempty" protobuf:"bytes,6,opt,name=process"`

	// container is a container that an agent runs on its host.
	// +optional
	Container *ContainerSource `json:"container,omitempty" protobuf:"bytes,7,opt,name=container"`

	// ssh is a set of hosts that are reached by SSH.
	// +optional
	SSH *SSHSource `json:"ssh,omitempty" protobuf:"bytes,8,opt,name=ssh"`

	// tcp is a set of TCP endpoints that are reached directly.
	// +optional
	TCP *TCPSource `json:"tcp,omitempty" protobuf:"bytes,9,opt,name=tcp"`

	// ports are the ports that may be forwarded; 64 at most.
	// +optional
	// +listType=map
	// +listMapKey=name
	Ports []TargetPort `json:"ports,omitempty" protobuf:"bytes,10,rep,name=ports"`
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

// ProcessSource is a command that an agent runs and supervises.
type ProcessSource struct {
	// command is the program and its first arguments. A program without a
	// slash is looked up in the PATH of the process's own environment.
	// $(NAME) stands for the value of an environment variable; $$(NAME) for
	// the text itself.
	// +listType=atomic
	Command []string `json:"command" protobuf:"bytes,1,rep,name=command"`

	// args are appended to command. $(NAME) is replaced as in command.
	// +optional
	// +listType=atomic
	Args []string `json:"args,omitempty" protobuf:"bytes,2,rep,name=args"`

	// env is added to a minimal environment (PATH, HOME, USER, LOGNAME, SHELL,
	// LANG). The agent's own environment is never passed on.
	// +optional
	// +listType=map
	// +listMapKey=name
	Env []EnvVar `json:"env,omitempty" protobuf:"bytes,3,rep,name=env"`

	// workingDir is the absolute path that the process starts in; the user's
	// home directory, or / if that doesn't exist, if not given.
	// +optional
	WorkingDir string `json:"workingDir,omitempty" protobuf:"bytes,4,opt,name=workingDir"`

	// user is the name or number of the user to run as; the agent's own if
	// not given.
	// +optional
	User string `json:"user,omitempty" protobuf:"bytes,5,opt,name=user"`

	// stdin keeps a standard input open for attach. Without it, the process
	// reads an end of file.
	// +optional
	Stdin bool `json:"stdin,omitempty" protobuf:"varint,6,opt,name=stdin"`

	// tty gives the process a terminal as its standard input, output and
	// error. It needs stdin.
	// +optional
	TTY bool `json:"tty,omitempty" protobuf:"varint,7,opt,name=tty"`
}

// ContainerSource is a container that an agent runs on its host.
type ContainerSource struct {
	// image is the container image's reference.
	Image string `json:"image" protobuf:"bytes,1,opt,name=image"`

	// command replaces the image's entry point.
	// +optional
	// +listType=atomic
	Command []string `json:"command,omitempty" protobuf:"bytes,2,rep,name=command"`

	// args replace the image's arguments.
	// +optional
	// +listType=atomic
	Args []string `json:"args,omitempty" protobuf:"bytes,3,rep,name=args"`

	// env is added to the image's environment.
	// +optional
	// +listType=map
	// +listMapKey=name
	Env []EnvVar `json:"env,omitempty" protobuf:"bytes,4,rep,name=env"`

	// workingDir is the absolute path that the container starts in; the
	// image's if not given.
	// +optional
	WorkingDir string `json:"workingDir,omitempty" protobuf:"bytes,5,opt,name=workingDir"`

	// resources limit the container: limits for cpu and memory.
	// +optional
	Resources ContainerResources `json:"resources,omitempty" protobuf:"bytes,6,opt,name=resources"`

	// stdin keeps a standard input open for attach.
	// +optional
	Stdin bool `json:"stdin,omitempty" protobuf:"varint,7,opt,name=stdin"`

	// tty gives the container a terminal. It needs stdin.
	// +optional
	TTY bool `json:"tty,omitempty" protobuf:"varint,8,opt,name=tty"`
}

// ContainerResources limits what a container may use.
type ContainerResources struct {
	// limits are the most that the container may use of cpu and memory.
	// +optional
	Limits corev1.ResourceList `json:"limits,omitempty" protobuf:"bytes,1,rep,name=limits,casttype=k8s.io/api/core/v1.ResourceList,castkey=k8s.io/api/core/v1.ResourceName"`
}

// SSHSource is a set of hosts that are reached by SSH.
type SSHSource struct {
	// endpoints are the hosts; each is one instance. 1 to 256.
	// +listType=map
	// +listMapKey=name
	Endpoints []Endpoint `json:"endpoints" protobuf:"bytes,1,rep,name=endpoints"`

	// user is the user to log in as.
	User string `json:"user" protobuf:"bytes,2,opt,name=user"`

	// credentialsSecretRef names a Secret in the target's namespace, of type
	// kubernetes.io/ssh-auth or kubernetes.io/basic-auth, that holds the
	// credentials and, under known_hosts, the host keys to accept.
	CredentialsSecretRef SecretReference `json:"credentialsSecretRef" protobuf:"bytes,3,opt,name=credentialsSecretRef"`

	// log says where the target's log comes from. Without it, the target has
	// no log.
	// +optional
	Log *SSHLog `json:"log,omitempty" protobuf:"bytes,4,opt,name=log"`
}

// SecretReference names a Secret in the same namespace.
type SecretReference struct {
	// name is the Secret's name.
	Name string `json:"name" protobuf:"bytes,1,opt,name=name"`
}

// SSHLog says where an SSH host's log comes from: exactly one of its fields.
type SSHLog struct {
	// command is run; what it prints is the log.
	// +optional
	// +listType=atomic
	Command []string `json:"command,omitempty" protobuf:"bytes,1,rep,name=command"`

	// path is the absolute path of a file to read.
	// +optional
	Path string `json:"path,omitempty" protobuf:"bytes,2,opt,name=path"`

	// journalUnit is a systemd unit whose journal to read.
	// +optional
	JournalUnit string `json:"journalUnit,omitempty" protobuf:"bytes,3,opt,name=journalUnit"`
}

// TCPSource is a set of TCP endpoints that are reached directly.
type TCPSource struct {
	// endpoints are the hosts; each is one instance. 1 to 256.
	// +listType=map
	// +listMapKey=name
	Endpoints []Endpoint `json:"endpoints" protobuf:"bytes,1,rep,name=endpoints"`

	// tls wraps each connection to an endpoint in TLS, so that clients can
	// speak plain text to a forwarded port.
	// +optional
	TLS *TCPTLS `json:"tls,omitempty" protobuf:"bytes,2,opt,name=tls"`
}

// TCPTLS says how a TCP endpoint's certificate is verified.
type TCPTLS struct {
	// serverName is the name that the certificate must be for; the endpoint's
	// host if not given.
	// +optional
	ServerName string `json:"serverName,omitempty" protobuf:"bytes,1,opt,name=serverName"`

	// caBundle is the PEM-encoded certificates that the server's must chain
	// to; the system's if not given.
	// +optional
	CABundle []byte `json:"caBundle,omitempty" protobuf:"bytes,2,opt,name=caBundle"`
}

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
// +k8s:enum
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

// Types of a target's conditions.
const (
	// ConditionReady is True when every wanted instance is ready, at zero
	// replicas too, and Unknown when the agent is lost.
	ConditionReady = "Ready"
	// ConditionProgressing is True while instances are started, replaced or
	// stopped to match the spec.
	ConditionProgressing = "Progressing"
	// ConditionAgentConnected is True while the target's agent is alive.
	ConditionAgentConnected = "AgentConnected"
	// ConditionHostKeysVerified is True when the host keys of every SSH
	// endpoint match the Secret's known_hosts.
	ConditionHostKeysVerified = "HostKeysVerified"
)

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
