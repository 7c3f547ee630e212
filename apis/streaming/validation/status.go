package validation

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/validate/content"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/sets"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	maxConditions = 32

	// maxReasonBytes and maxMessageBytes bound what an instance's state says.
	// Agents cut longer messages.
	maxReasonBytes  = 256
	maxMessageBytes = 4096
)

// ValidateTargetStatusUpdate validates a change to a target's status. What was
// wrong with it before and stays as it is isn't held against the change (see
// ratchet).
func ValidateTargetStatusUpdate(newTarget, oldTarget *api.Target) field.ErrorList {
	errs := apivalidation.ValidateObjectMetaUpdate(&newTarget.ObjectMeta, &oldTarget.ObjectMeta, field.NewPath("metadata"))
	return append(errs, ratchet(newTarget, oldTarget, func(target *api.Target) field.ErrorList {
		return validateText(target, validateStatus(&target.Status, oldTarget.Name, field.NewPath("status")))
	})...)
}

func validateStatus(status *api.TargetStatus, targetName string, p *field.Path) field.ErrorList {
	errs := apivalidation.ValidateNonnegativeField(status.ObservedGeneration, p.Child("observedGeneration"))
	errs = append(errs, validateRange(p.Child("replicas"), &status.Replicas, 0, v1.MaxInstances)...)
	errs = append(errs, apivalidation.ValidateNonnegativeField(int64(status.ReadyReplicas), p.Child("readyReplicas"))...)
	if status.ReadyReplicas > status.Replicas {
		errs = append(errs, field.Invalid(p.Child("readyReplicas"), status.ReadyReplicas, fmt.Sprintf("must not be greater than `replicas` (%d)", status.Replicas)))
	}
	errs = append(errs, validateInstances(status.Instances, targetName, p.Child("instances"))...)

	if conditions := p.Child("conditions"); len(status.Conditions) > maxConditions {
		errs = append(errs, field.TooMany(conditions, len(status.Conditions), maxConditions))
	} else {
		errs = append(errs, metav1validation.ValidateConditions(status.Conditions, conditions)...)
	}
	return errs
}

func validateInstances(instances []api.InstanceStatus, targetName string, p *field.Path) field.ErrorList {
	if len(instances) > v1.MaxInstances {
		return field.ErrorList{field.TooMany(p, len(instances), v1.MaxInstances)}
	}
	var errs field.ErrorList
	names := sets.New[string]()
	for i := range instances {
		instance, p := &instances[i], p.Index(i)
		nameErrs := validateFormat(p.Child("name"), instance.Name, maxDNSLabelBytes, content.IsDNS1123Label)
		if len(nameErrs) == 0 && !strings.HasPrefix(instance.Name, targetName+"-") {
			nameErrs = append(nameErrs, field.Invalid(p.Child("name"), instance.Name,
				fmt.Sprintf("must begin with the target's name and a dash (%q)", targetName+"-")))
		}
		errs = append(errs, nameErrs...)
		errs = append(errs, validateUnique(p.Child("name"), instance.Name, names)...)
		errs = append(errs, apivalidation.ValidateNonnegativeField(int64(instance.RestartCount), p.Child("restartCount"))...)
		errs = append(errs, validateState(&instance.State, p.Child("state"))...)
		errs = append(errs, validateState(&instance.LastState, p.Child("lastState"))...)
		errs = append(errs, validateInstancePorts(instance.Ports, p.Child("ports"))...)
	}
	return errs
}

func validateState(state *api.InstanceState, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	var set []string
	if s := state.Waiting; s != nil {
		set = append(set, "waiting")
		errs = append(errs, validateReason(s.Reason, s.Message, p.Child("waiting"))...)
	}
	if state.Running != nil {
		set = append(set, "running")
	}
	if s := state.Terminated; s != nil {
		set = append(set, "terminated")
		errs = append(errs, apivalidation.ValidateNonnegativeField(int64(s.Signal), p.Child("terminated", "signal"))...)
		errs = append(errs, validateReason(s.Reason, s.Message, p.Child("terminated"))...)
	}
	if len(set) > 1 {
		errs = append(errs, field.Invalid(p, "{"+strings.Join(set, ", ")+"}", "must specify at most one of: `waiting`, `running`, `terminated`"))
	}
	return errs
}

func validateReason(reason, message string, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(reason) > maxReasonBytes {
		errs = append(errs, field.TooLong(p.Child("reason"), reason, maxReasonBytes))
	}
	if len(message) > maxMessageBytes {
		errs = append(errs, field.TooLong(p.Child("message"), message, maxMessageBytes))
	}
	return errs
}

func validateInstancePorts(ports []api.InstancePort, p *field.Path) field.ErrorList {
	if len(ports) > maxPorts {
		return field.ErrorList{field.TooMany(p, len(ports), maxPorts)}
	}
	var errs field.ErrorList
	names := sets.New[string]()
	for i, port := range ports {
		p := p.Index(i)
		errs = append(errs, validateFormat(p.Child("name"), port.Name, maxPortNameBytes, utilvalidation.IsValidPortName)...)
		errs = append(errs, validateUnique(p.Child("name"), port.Name, names)...)
		errs = append(errs, validatePort(p.Child("port"), port.Port)...)
		if port.HostPort != 0 {
			errs = append(errs, validatePort(p.Child("hostPort"), port.HostPort)...)
		}
	}
	return errs
}
