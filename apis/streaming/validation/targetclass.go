package validation

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/validate/content"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// maxClassEntries bounds each list of a class. The tags of the lists say so to
// the user; here it bounds the work.
const maxClassEntries = 256

var sourceNames = []string{v1.SourceProcess, v1.SourceContainer, v1.SourceSSH, v1.SourceTCP}

// ValidateTargetClass validates what the tags of v1.TargetClass can't say
// about a new class. Whoever calls it validates declaratively too.
func ValidateTargetClass(class *api.TargetClass) field.ErrorList {
	errs := apivalidation.ValidateObjectMeta(&class.ObjectMeta, false, apivalidation.NameIsDNSSubdomain, field.NewPath("metadata"))
	return validateText(class, append(errs, validateClassSpec(&class.Spec, field.NewPath("spec"))...))
}

// ValidateTargetClassUpdate validates a change to a class, as
// ValidateTargetClass does. What was wrong with it before and stays as it is
// isn't held against the change (see ratchet).
func ValidateTargetClassUpdate(newClass, oldClass *api.TargetClass) field.ErrorList {
	errs := apivalidation.ValidateObjectMetaUpdate(&newClass.ObjectMeta, &oldClass.ObjectMeta, field.NewPath("metadata"))
	return append(errs, ratchet(newClass, oldClass, func(class *api.TargetClass) field.ErrorList {
		return validateText(class, validateClassSpec(&class.Spec, field.NewPath("spec")))
	})...)
}

func validateClassSpec(spec *api.TargetClassSpec, p *field.Path) field.ErrorList {
	errs := validateEach(spec.Sources, p.Child("sources"), func(p *field.Path, source string) field.ErrorList {
		return validateEnum(p, source, sourceNames)
	})
	errs = append(errs, validateEach(spec.Agents, p.Child("agents"), func(p *field.Path, agent string) field.ErrorList {
		if agent == v1.ClassWildcard {
			return nil
		}
		return validateFormat(p, agent, maxDNSNameBytes, content.IsDNS1123Subdomain)
	})...)
	errs = append(errs, validateEach(spec.Users, p.Child("users"), func(p *field.Path, user string) field.ErrorList {
		if user == v1.ClassWildcard {
			return nil
		}
		return validateFormat(p, user, maxSSHUserBytes, isClassUser)
	})...)
	errs = append(errs, validateEach(spec.Addresses.Allow, p.Child("addresses", "allow"), validateCIDR)...)
	errs = append(errs, validateEach(spec.Addresses.Deny, p.Child("addresses", "deny"), validateCIDR)...)
	errs = append(errs, validateEach(spec.Ports.Allowed, p.Child("ports", "allowed"), validatePortRange)...)
	errs = append(errs, validateEach(spec.Ports.UnixSockets, p.Child("ports", "unixSockets"), validateSocketPath)...)
	return append(errs, validateEach(spec.Ports.Reverse, p.Child("ports", "reverse"), validateReverse)...)
}

func validateEach[T any](items []T, p *field.Path, check func(*field.Path, T) field.ErrorList) field.ErrorList {
	if len(items) > maxClassEntries {
		return nil
	}
	var errs field.ErrorList
	for i, item := range items {
		errs = append(errs, check(p.Index(i), item)...)
	}
	return errs
}

// isClassUser takes what a process or an SSH login may name.
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

func validatePortRange(p *field.Path, ports api.PortRange) field.ErrorList {
	if ports.EndPort > 0 && ports.EndPort < ports.Port {
		return field.ErrorList{field.Invalid(p.Child("endPort"), ports.EndPort, fmt.Sprintf("must not be less than `port` (%d)", ports.Port))}
	}
	return nil
}

// validateSocketPath takes a path, or a directory by a slash at its end.
func validateSocketPath(p *field.Path, entry string) field.ErrorList {
	switch entry {
	case "":
		return field.ErrorList{field.Required(p, "")}
	case "/":
		return nil
	}
	if directory := strings.TrimSuffix(entry, "/"); directory != "/" {
		return validateAbsolutePath(p, directory)
	}
	return validateAbsolutePath(p, entry)
}

// validateReverse validates ports to listen to. That a protocol is one at all
// is said by its tag.
func validateReverse(p *field.Path, ports api.PortRange) field.ErrorList {
	errs := validatePortRange(p, ports)
	if ports.Protocol == api.ProtocolUDP {
		errs = append(errs, field.NotSupported(p.Child("protocol"), ports.Protocol, []api.Protocol{api.ProtocolTCP}))
	}
	return errs
}
