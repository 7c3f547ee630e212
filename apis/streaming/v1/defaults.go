package v1

import (
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"
)

// The defaults of hosted sources.
const (
	DefaultReplicas                      int32 = 1
	DefaultTerminationGracePeriodSeconds int64 = 30
)

func addDefaultingFuncs(scheme *runtime.Scheme) error {
	return RegisterDefaults(scheme)
}

// SetDefaults_TargetSpec fills in what a hosted source may leave out. Reached
// sources have no replicas, restarts or grace period.
func SetDefaults_TargetSpec(spec *TargetSpec) {
	if spec.Process == nil && spec.Container == nil {
		return
	}
	if spec.Replicas == nil {
		spec.Replicas = ptr.To(DefaultReplicas)
	}
	if spec.RestartPolicy == "" {
		spec.RestartPolicy = RestartAlways
	}
	if spec.TerminationGracePeriodSeconds == nil {
		spec.TerminationGracePeriodSeconds = ptr.To(DefaultTerminationGracePeriodSeconds)
	}
}

// SetDefaults_TargetPort makes TCP the protocol.
func SetDefaults_TargetPort(port *TargetPort) {
	if port.Protocol == "" {
		port.Protocol = ProtocolTCP
	}
}

// SetDefaults_PortRange makes TCP the protocol.
func SetDefaults_PortRange(ports *PortRange) {
	if ports.Protocol == "" {
		ports.Protocol = ProtocolTCP
	}
}

// SetDefaults_TargetLogOptions asks for both streams.
func SetDefaults_TargetLogOptions(options *TargetLogOptions) {
	if options.Stream == "" {
		options.Stream = LogStreamAll
	}
}

// SetDefaults_TargetExecOptions asks for the output, as kubectl does: with
// none of the streams named, a command's output goes back to its client.
func SetDefaults_TargetExecOptions(options *TargetExecOptions) {
	if !options.Stdin && !options.Stdout && !options.Stderr {
		options.Stdout = true
		options.Stderr = !options.TTY
	}
}

// SetDefaults_TargetAttachOptions asks for the output, as for exec.
func SetDefaults_TargetAttachOptions(options *TargetAttachOptions) {
	if !options.Stdin && !options.Stdout && !options.Stderr {
		options.Stdout = true
		options.Stderr = !options.TTY
	}
}
