package validation

import (
	"fmt"
	"strings"

	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/util/sets"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"k8s.io/apimachinery/pkg/api/validate/content"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// maxClassEntries bounds each list of a class.
	maxClassEntries = 256

	maxSessions = 10000
	// maxSessionSeconds is 30 days.
	maxSessionSeconds = 30 * 24 * 60 * 60
)

var sourceNames = []string{v1.SourceProcess, v1.SourceContainer, v1.SourceSSH, v1.SourceTCP}

// ValidateTargetClass validates a new class.
func ValidateTargetClass(class *api.TargetClass) field.ErrorList {
	errs := apivalidation.ValidateObjectMeta(&class.ObjectMeta, false, apivalidation.NameIsDNSSubdomain, field.NewPath("metadata"))
	return append(errs, validateClassSpec(&class.Spec, field.NewPath("spec"))...)
}

// ValidateTargetClassUpdate validates a change to a class.
func ValidateTargetClassUpdate(newClass, oldClass *api.TargetClass) field.ErrorList {
	errs := apivalidation.ValidateObjectMetaUpdate(&newClass.ObjectMeta, &oldClass.ObjectMeta, field.NewPath("metadata"))
	return append(errs, validateClassSpec(&newClass.Spec, field.NewPath("spec"))...)
}

func validateClassSpec(spec *api.TargetClassSpec, p *field.Path) field.ErrorList {
	errs := validateSet(spec.Sources, p.Child("sources"), func(p *field.Path, source string) field.ErrorList {
		return validateEnum(p, source, sourceNames)
	})
	errs = append(errs, validateSet(spec.Agents, p.Child("agents"), func(p *field.Path, agent string) field.ErrorList {
		if agent == v1.ClassWildcard {
			return nil
		}
		return validateFormat(p, agent, maxDNSNameBytes, content.IsDNS1123Subdomain)
	})...)
	errs = append(errs, validateSet(spec.Users, p.Child("users"), func(p *field.Path, user string) field.ErrorList {
		if user == v1.ClassWildcard {
			return nil
		}
		return validateFormat(p, user, maxSSHUserBytes, isClassUser)
	})...)
	addresses := p.Child("addresses")
	errs = append(errs, validateSet(spec.Addresses.Allow, addresses.Child("allow"), validateCIDR)...)
	errs = append(errs, validateSet(spec.Addresses.Deny, addresses.Child("deny"), validateCIDR)...)
	errs = append(errs, validatePortRanges(spec.Ports.Allowed, p.Child("ports", "allowed"))...)
	return append(errs, validateSessionLimits(&spec.Limits, p.Child("limits"))...)
}

// validateSet bounds a list of distinct items, and checks each.
func validateSet(items []string, p *field.Path, check func(*field.Path, string) field.ErrorList) field.ErrorList {
	if len(items) > maxClassEntries {
		return field.ErrorList{field.TooMany(p, len(items), maxClassEntries)}
	}
	var errs field.ErrorList
	seen := sets.New[string]()
	for i, item := range items {
		errs = append(errs, check(p.Index(i), item)...)
		errs = append(errs, validateUnique(p.Index(i), item, seen)...)
	}
	return errs
}

// isClassUser takes what either a process or an SSH login may name.
func isClassUser(user string) []string {
	if strings.Contains(user, v1.ClassWildcard) {
		return []string{fmt.Sprintf("must be a user's name or number, or %q alone: patterns aren't supported", v1.ClassWildcard)}
	}
	return isSSHUser(user)
}

// validateCIDR wants the canonical form, so that what a class says is what it
// means.
func validateCIDR(p *field.Path, cidr string) field.ErrorList {
	switch {
	case cidr == "":
		return field.ErrorList{field.Required(p, "")}
	case len(cidr) > maxShownBytes:
		return field.ErrorList{field.TooLong(p, cidr, maxShownBytes)}
	}
	return utilvalidation.IsValidCIDR(p, cidr)
}

func validatePortRanges(ranges []api.PortRange, p *field.Path) field.ErrorList {
	if len(ranges) > maxClassEntries {
		return field.ErrorList{field.TooMany(p, len(ranges), maxClassEntries)}
	}
	var errs field.ErrorList
	for i, ports := range ranges {
		p := p.Index(i)
		errs = append(errs, validatePort(p.Child("port"), ports.Port)...)
		if ports.EndPort != 0 {
			if endErrs := validatePort(p.Child("endPort"), ports.EndPort); len(endErrs) > 0 {
				errs = append(errs, endErrs...)
			} else if ports.EndPort < ports.Port {
				errs = append(errs, field.Invalid(p.Child("endPort"), ports.EndPort, fmt.Sprintf("must not be less than `port` (%d)", ports.Port)))
			}
		}
		errs = append(errs, validateEnum(p.Child("protocol"), ports.Protocol, protocols)...)
	}
	return errs
}

func validateSessionLimits(limits *api.SessionLimits, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	for _, sessions := range []struct {
		name  string
		value *int32
	}{
		{"sessionsPerUser", limits.SessionsPerUser},
		{"sessionsPerTarget", limits.SessionsPerTarget},
	} {
		if sessions.value != nil {
			errs = append(errs, validateRange(p.Child(sessions.name), sessions.value, 1, maxSessions)...)
		}
	}
	for _, seconds := range []struct {
		name  string
		value *int64
	}{
		{"idleTimeoutSeconds", limits.IdleTimeoutSeconds},
		{"maxDurationSeconds", limits.MaxDurationSeconds},
	} {
		if seconds.value != nil {
			errs = append(errs, validateRange(p.Child(seconds.name), seconds.value, 1, maxSessionSeconds)...)
		}
	}
	return errs
}
