package v1alpha1

import (
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"
)

// The defaults of the types Process and Container.
const (
	DefaultReplicas                      int32 = 1
	DefaultTerminationGracePeriodSeconds int64 = 30
)

func addDefaultingFuncs(scheme *runtime.Scheme) error {
	return RegisterDefaults(scheme)
}

// SetDefaults_TargetSpec fills in what the types that an agent hosts may leave
// out. The type itself has no default: nobody should come to run a command by
// leaving a field out.
func SetDefaults_TargetSpec(spec *TargetSpec) {
	if spec.Type != TargetTypeProcess && spec.Type != TargetTypeContainer {
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
