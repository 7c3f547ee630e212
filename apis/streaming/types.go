package streaming

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// Target is something that is not a pod (a process, a container on a lone
// host, an SSH host, a TCP endpoint), made available to the Kubernetes API
// with the subresources that make pods pleasant: log, exec, attach,
// portforward, status and scale.
type Target struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	Spec   TargetSpec
	Status TargetStatus
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// TargetList is a list of targets.
type TargetList struct {
	metav1.TypeMeta
	metav1.ListMeta
	Items []Target
}

// TargetSpec is the desired state of a target. Exactly one of the sources
// process, container, ssh and tcp is set, and which one never changes.
type TargetSpec struct {
	ClassName                     string
	AgentName                     string
	Replicas                      *int32
	RestartPolicy                 RestartPolicy
	TerminationGracePeriodSeconds *int64
	Process                       *ProcessSource
	Container                     *ContainerSource
	SSH                           *SSHSource
	TCP                           *TCPSource
	Ports                         []TargetPort
}

// RestartPolicy says when an instance that has ended is started again.
type RestartPolicy string

const (
	RestartAlways    RestartPolicy = "Always"
	RestartOnFailure RestartPolicy = "OnFailure"
	RestartNever     RestartPolicy = "Never"
)

// ProcessSource is a command that an agent runs and supervises.
type ProcessSource struct {
	Command    []string
	Args       []string
	Env        []EnvVar
	WorkingDir string
	User       string
	Stdin      bool
	TTY        bool
}

// ContainerSource is a container that an agent runs on its host.
type ContainerSource struct {
	Image      string
	Command    []string
	Args       []string
	Env        []EnvVar
	WorkingDir string
	Resources  ContainerResources
	Stdin      bool
	TTY        bool
}

// ContainerResources limits what a container may use.
type ContainerResources struct {
	Limits corev1.ResourceList
}

// SSHSource is a set of hosts that are reached by SSH.
type SSHSource struct {
	Endpoints            []Endpoint
	User                 string
	CredentialsSecretRef SecretReference
	Log                  *SSHLog
}

// SecretReference names a Secret in the same namespace.
type SecretReference struct {
	Name string
}

// SSHLog says where an SSH host's log comes from: exactly one of its fields.
type SSHLog struct {
	Command     []string
	Path        string
	JournalUnit string
}

// TCPSource is a set of TCP endpoints that are reached directly.
type TCPSource struct {
	Endpoints []Endpoint
	TLS       *TCPTLS
}

// TCPTLS says how a TCP endpoint's certificate is verified.
type TCPTLS struct {
	ServerName string
	CABundle   []byte
}

// Endpoint is one host of a reached source.
type Endpoint struct {
	Name string
	Host string
	Port int32
}

// EnvVar is one environment variable.
type EnvVar struct {
	Name  string
	Value string
}

// Protocol is the transport protocol of a port.
type Protocol string

const (
	ProtocolTCP Protocol = "TCP"
	ProtocolUDP Protocol = "UDP"
)

// TargetPort is a port that may be forwarded.
type TargetPort struct {
	Name     string
	Port     int32
	Protocol Protocol
	HostPort int32
}

// TargetStatus is the state of a target.
type TargetStatus struct {
	ObservedGeneration int64
	Replicas           int32
	ReadyReplicas      int32
	Instances          []InstanceStatus
	Conditions         []metav1.Condition
}

// InstanceStatus is the state of one instance.
type InstanceStatus struct {
	Name         string
	Ready        bool
	RestartCount int32
	State        InstanceState
	LastState    InstanceState
	Ports        []InstancePort
}

// InstanceState is what an instance does: one of its fields is set. None of
// them means waiting.
type InstanceState struct {
	Waiting    *InstanceStateWaiting
	Running    *InstanceStateRunning
	Terminated *InstanceStateTerminated
}

// InstanceStateWaiting is the state of an instance that doesn't run yet.
type InstanceStateWaiting struct {
	Reason  string
	Message string
}

// InstanceStateRunning is the state of an instance that runs.
type InstanceStateRunning struct {
	StartedAt metav1.Time
}

// InstanceStateTerminated is the state of an instance that has ended.
type InstanceStateTerminated struct {
	ExitCode   int32
	Signal     int32
	Reason     string
	Message    string
	StartedAt  metav1.Time
	FinishedAt metav1.Time
}

// InstancePort is a port of an instance.
type InstancePort struct {
	Name     string
	Port     int32
	HostPort int32
}
