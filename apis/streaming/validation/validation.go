package validation

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/api/validate/content"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/util/sets"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

const (
	// maxTerminationGracePeriodSeconds is an hour.
	maxTerminationGracePeriodSeconds = 3600

	maxPorts = 64
	maxEnv   = 256

	// maxCommandBytes bounds a command with its arguments and environment,
	// each string with the NUL that ends it and each variable with its "=".
	// Linux allows no single string to be longer, whatever the stack's limit.
	maxCommandBytes = 128 << 10

	maxEnvNameBytes = 256
	// maxPathBytes is Linux's PATH_MAX without the NUL that ends a path.
	maxPathBytes         = 4095
	maxImageBytes        = 1024
	maxUserBytes         = 32
	maxSSHUserBytes      = 256
	maxUnitBytes         = 255
	maxCABundleBytes     = 256 << 10
	maxDNSNameBytes      = content.DNS1123SubdomainMaxLength
	maxDNSLabelBytes     = content.DNS1123LabelMaxLength
	maxPortNameBytes     = 15
	generatedSuffixBytes = 5

	// maxShownBytes bounds the wrong values that errors repeat where the field
	// has no bound of its own.
	maxShownBytes = 64

	// maxUserID is one less than the number that means "no user" in Linux.
	maxUserID = 1<<32 - 2

	// reservedEnvPrefix begins the names of the variables that agents set.
	reservedEnvPrefix = "AASERVER_"
)

// Details of errors that several fields share.
const (
	hostedOnly = "may only be set for a `process` or `container` source"
	noNUL      = "must not contain NUL bytes"
)

var (
	restartPolicies = []api.RestartPolicy{api.RestartAlways, api.RestartOnFailure, api.RestartNever}
	protocols       = []api.Protocol{api.ProtocolTCP, api.ProtocolUDP}
	limitNames      = []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory}
)

// ValidateTarget validates a new target.
func ValidateTarget(target *api.Target) field.ErrorList {
	errs := apivalidation.ValidateObjectMeta(&target.ObjectMeta, true, validateTargetName, field.NewPath("metadata"))
	errs = append(errs, validateCarried(target.Annotations, nil)...)
	return validateText(target, append(errs, validateSpec(&target.Spec, target.Name, field.NewPath("spec"))...))
}

// ValidateTargetUpdate validates a change to a target. What was wrong with it
// before and stays as it is isn't held against the change (see ratchet).
func ValidateTargetUpdate(newTarget, oldTarget *api.Target) field.ErrorList {
	errs := apivalidation.ValidateObjectMetaUpdate(&newTarget.ObjectMeta, &oldTarget.ObjectMeta, field.NewPath("metadata"))
	errs = append(errs, validateCarried(newTarget.Annotations, oldTarget.Annotations)...)
	newSpec, oldSpec, p := &newTarget.Spec, &oldTarget.Spec, field.NewPath("spec")
	errs = append(errs, ratchet(newTarget, oldTarget, func(target *api.Target) field.ErrorList {
		return validateText(target, validateSpec(&target.Spec, target.Name, p))
	})...)

	// Without exactly one source on both sides, the union's own error says
	// what is wrong.
	newSources, oldSources := sourcesOf(newSpec), sourcesOf(oldSpec)
	if len(newSources) == 1 && len(oldSources) == 1 && newSources[0] != oldSources[0] {
		errs = append(errs, field.Forbidden(p.Child(newSources[0]),
			fmt.Sprintf("field is immutable: the target's source is `%s`; delete the target and create it again to change that", oldSources[0])))
	}
	return append(errs, apivalidation.ValidateImmutableField(newSpec.AgentName, oldSpec.AgentName, p.Child("agentName"))...)
}

// validateTargetName leaves room for the ordinal or endpoint that makes an
// instance's name of it, and in a prefix for what the server appends.
func validateTargetName(name string, prefix bool) []string {
	limit := v1.MaxTargetNameLength
	if prefix {
		limit -= generatedSuffixBytes
	}
	if len(name) > limit {
		return []string{content.MaxLenError(limit)}
	}
	return apivalidation.NameIsDNSLabel(name, prefix)
}

// validateCarried refuses what conversion carries in annotations, because the
// hub has no place for it, unless it was there before.
func validateCarried(annotations, old map[string]string) field.ErrorList {
	var errs field.ErrorList
	added := func(key string) (string, bool) {
		value, ok := annotations[key]
		before, had := old[key]
		return value, ok && (!had || value != before)
	}
	if text, ok := added(v1alpha1.AnnotationSettings); ok {
		errs = append(errs, v1alpha1.ValidateSettings(text, field.NewPath("spec"))...)
	}
	if _, ok := added(v1alpha1.AnnotationSources); ok {
		errs = append(errs, field.Forbidden(field.NewPath("metadata", "annotations").Key(v1alpha1.AnnotationSources),
			v1alpha1.ReservedDetail))
	}
	return errs
}

func sourcesOf(spec *api.TargetSpec) []string {
	var set []string
	if spec.Process != nil {
		set = append(set, v1.SourceProcess)
	}
	if spec.Container != nil {
		set = append(set, v1.SourceContainer)
	}
	if spec.SSH != nil {
		set = append(set, v1.SourceSSH)
	}
	if spec.TCP != nil {
		set = append(set, v1.SourceTCP)
	}
	return set
}

func validateSpec(spec *api.TargetSpec, targetName string, p *field.Path) field.ErrorList {
	sources := sourcesOf(spec)
	errs := exactlyOne(p, sources, []string{v1.SourceProcess, v1.SourceContainer, v1.SourceSSH, v1.SourceTCP})

	if spec.ClassName != "" {
		errs = append(errs, validateFormat(p.Child("className"), spec.ClassName, maxDNSNameBytes, content.IsDNS1123Subdomain)...)
	}
	if spec.AgentName != "" {
		errs = append(errs, validateFormat(p.Child("agentName"), spec.AgentName, maxDNSNameBytes, content.IsDNS1123Subdomain)...)
	}
	// What follows from the kind of source is said only when that is clear.
	if len(sources) == 1 {
		if spec.Process != nil || spec.Container != nil {
			errs = append(errs, validateHosted(spec, p)...)
		} else {
			errs = append(errs, validateReached(spec, p)...)
		}
	}

	if s := spec.Process; s != nil {
		errs = append(errs, validateProcess(s, p.Child("process"))...)
	}
	if s := spec.Container; s != nil {
		errs = append(errs, validateContainer(s, p.Child("container"))...)
	}
	if s := spec.SSH; s != nil {
		errs = append(errs, validateSSH(s, targetName, p.Child("ssh"))...)
	}
	if s := spec.TCP; s != nil {
		errs = append(errs, validateTCP(s, targetName, p.Child("tcp"))...)
	}
	return append(errs, validatePorts(spec.Ports, p.Child("ports"))...)
}

func validateHosted(spec *api.TargetSpec, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if spec.AgentName == "" {
		errs = append(errs, field.Required(p.Child("agentName"), "must name the agent that hosts the instances"))
	}
	errs = append(errs, validateRange(p.Child("replicas"), spec.Replicas, 0, v1.MaxInstances)...)
	errs = append(errs, validateEnum(p.Child("restartPolicy"), spec.RestartPolicy, restartPolicies)...)
	errs = append(errs, validateRange(p.Child("terminationGracePeriodSeconds"), spec.TerminationGracePeriodSeconds, 0, maxTerminationGracePeriodSeconds)...)

	if spec.Replicas != nil && *spec.Replicas > 1 {
		for i := range spec.Ports {
			if spec.Ports[i].HostPort != 0 {
				err := field.Forbidden(p.Child("ports").Index(i).Child("hostPort"),
					"may only be set when `replicas` is at most 1: the instances share their host's ports")
				err.BadValue = inputs{spec.Ports[i].HostPort, *spec.Replicas}
				errs = append(errs, err)
			}
		}
	}
	return errs
}

func validateReached(spec *api.TargetSpec, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	if spec.Replicas != nil {
		errs = append(errs, field.Forbidden(p.Child("replicas"), hostedOnly+": others have an instance for each endpoint"))
	}
	if spec.RestartPolicy != "" {
		errs = append(errs, field.Forbidden(p.Child("restartPolicy"), hostedOnly))
	}
	if spec.TerminationGracePeriodSeconds != nil {
		errs = append(errs, field.Forbidden(p.Child("terminationGracePeriodSeconds"), hostedOnly))
	}
	for i := range spec.Ports {
		if spec.Ports[i].HostPort != 0 {
			errs = append(errs, field.Forbidden(p.Child("ports").Index(i).Child("hostPort"), hostedOnly))
		}
	}
	return errs
}

func validateProcess(source *api.ProcessSource, p *field.Path) field.ErrorList {
	errs := validateCommand(source.Command, p.Child("command"))
	errs = append(errs, validateArgs(source.Args, p.Child("args"))...)
	errs = append(errs, validateEnv(source.Env, p.Child("env"))...)
	errs = append(errs, validateCommandSize(p, source.Command, source.Args, source.Env)...)
	errs = append(errs, validateAbsolutePath(p.Child("workingDir"), source.WorkingDir)...)
	if source.User != "" {
		errs = append(errs, validateFormat(p.Child("user"), source.User, maxUserBytes, isUser)...)
	}
	return append(errs, validateTTY(p, source.TTY, source.Stdin)...)
}

func validateContainer(source *api.ContainerSource, p *field.Path) field.ErrorList {
	errs := validateFormat(p.Child("image"), source.Image, maxImageBytes, isImage)
	if len(source.Command) > 0 {
		errs = append(errs, validateCommand(source.Command, p.Child("command"))...)
	}
	errs = append(errs, validateArgs(source.Args, p.Child("args"))...)
	errs = append(errs, validateEnv(source.Env, p.Child("env"))...)
	errs = append(errs, validateCommandSize(p, source.Command, source.Args, source.Env)...)
	errs = append(errs, validateAbsolutePath(p.Child("workingDir"), source.WorkingDir)...)
	errs = append(errs, validateLimits(source.Resources.Limits, p.Child("resources", "limits"))...)
	return append(errs, validateTTY(p, source.TTY, source.Stdin)...)
}

func validateSSH(source *api.SSHSource, targetName string, p *field.Path) field.ErrorList {
	errs := validateEndpoints(source.Endpoints, targetName, p.Child("endpoints"))
	errs = append(errs, validateFormat(p.Child("user"), source.User, maxSSHUserBytes, isSSHUser)...)
	errs = append(errs, validateFormat(p.Child("credentialsSecretRef", "name"), source.CredentialsSecretRef.Name, maxDNSNameBytes, content.IsDNS1123Subdomain)...)
	if source.Log != nil {
		errs = append(errs, validateSSHLog(source.Log, p.Child("log"))...)
	}
	return errs
}

func validateSSHLog(log *api.SSHLog, p *field.Path) field.ErrorList {
	var set []string
	if len(log.Command) > 0 {
		set = append(set, "command")
	}
	if log.Path != "" {
		set = append(set, "path")
	}
	if log.JournalUnit != "" {
		set = append(set, "journalUnit")
	}
	errs := exactlyOne(p, set, []string{"command", "path", "journalUnit"})
	if len(log.Command) > 0 {
		errs = append(errs, validateCommand(log.Command, p.Child("command"))...)
		errs = append(errs, validateCommandSize(p, log.Command, nil, nil)...)
	}
	errs = append(errs, validateAbsolutePath(p.Child("path"), log.Path)...)
	if log.JournalUnit != "" {
		errs = append(errs, validateFormat(p.Child("journalUnit"), log.JournalUnit, maxUnitBytes, isUnit)...)
	}
	return errs
}

func validateTCP(source *api.TCPSource, targetName string, p *field.Path) field.ErrorList {
	errs := validateEndpoints(source.Endpoints, targetName, p.Child("endpoints"))
	if tls := source.TLS; tls != nil {
		if tls.ServerName != "" {
			errs = append(errs, validateFormat(p.Child("tls", "serverName"), tls.ServerName, maxDNSNameBytes, isDNSName)...)
		}
		errs = append(errs, validateCABundle(tls.CABundle, p.Child("tls", "caBundle"))...)
	}
	return errs
}

func validateEndpoints(endpoints []api.Endpoint, targetName string, p *field.Path) field.ErrorList {
	if len(endpoints) == 0 {
		return field.ErrorList{field.Required(p, "must have at least 1 item")}
	}
	if len(endpoints) > v1.MaxInstances {
		return field.ErrorList{field.TooMany(p, len(endpoints), v1.MaxInstances)}
	}
	var errs field.ErrorList
	names := sets.New[string]()
	for i, e := range endpoints {
		p := p.Index(i)
		nameErrs := validateFormat(p.Child("name"), e.Name, maxDNSLabelBytes, content.IsDNS1123Label)
		if limit := maxDNSLabelBytes - len(targetName) - len("-"); len(nameErrs) == 0 && len(e.Name) > limit && limit > 0 {
			nameErrs = append(nameErrs, field.Invalid(p.Child("name"), e.Name,
				fmt.Sprintf("%s, so that the instance's name, %q and the endpoint's name, has at most %d", content.MaxLenError(limit), targetName+"-", maxDNSLabelBytes)))
		}
		errs = append(errs, nameErrs...)
		errs = append(errs, validateUnique(p.Child("name"), e.Name, names)...)
		errs = append(errs, validateHost(p.Child("host"), e.Host)...)
		errs = append(errs, validatePort(p.Child("port"), e.Port)...)
	}
	return errs
}

func validatePorts(ports []api.TargetPort, p *field.Path) field.ErrorList {
	if len(ports) > maxPorts {
		return field.ErrorList{field.TooMany(p, len(ports), maxPorts)}
	}
	var errs field.ErrorList
	names, numbers, hostPorts := sets.New[string](), sets.New[string](), sets.New[string]()
	for i, port := range ports {
		p := p.Index(i)
		errs = append(errs, validateFormat(p.Child("name"), port.Name, maxPortNameBytes, utilvalidation.IsValidPortName)...)
		errs = append(errs, validateUnique(p.Child("name"), port.Name, names)...)
		errs = append(errs, validatePort(p.Child("port"), port.Port)...)
		errs = append(errs, validateUnique(p.Child("port"), portAndProtocol(port.Port, port.Protocol), numbers)...)
		errs = append(errs, validateEnum(p.Child("protocol"), port.Protocol, protocols)...)
		if port.HostPort != 0 {
			errs = append(errs, validatePort(p.Child("hostPort"), port.HostPort)...)
			errs = append(errs, validateUnique(p.Child("hostPort"), portAndProtocol(port.HostPort, port.Protocol), hostPorts)...)
		}
	}
	return errs
}

// portAndProtocol is what has to be unique; "" for a port that is wrong
// anyway.
func portAndProtocol(port int32, protocol api.Protocol) string {
	if port == 0 {
		return ""
	}
	return fmt.Sprintf("%d/%s", port, protocol)
}

func validateCommand(command []string, p *field.Path) field.ErrorList {
	if len(command) == 0 {
		return field.ErrorList{field.Required(p, "must name the program to run")}
	}
	if command[0] == "" {
		return field.ErrorList{field.Required(p.Index(0), "must name the program to run")}
	}
	return validateArgs(command, p)
}

// validateArgs reports no more than the first bad one: there may be a great
// many.
func validateArgs(args []string, p *field.Path) field.ErrorList {
	for i, arg := range args {
		if strings.ContainsRune(arg, 0) {
			return field.ErrorList{field.Invalid(p.Index(i), field.OmitValueType{}, noNUL)}
		}
	}
	return nil
}

func validateEnv(env []api.EnvVar, p *field.Path) field.ErrorList {
	if len(env) > maxEnv {
		return field.ErrorList{field.TooMany(p, len(env), maxEnv)}
	}
	var errs field.ErrorList
	names := sets.New[string]()
	for i, e := range env {
		p := p.Index(i)
		errs = append(errs, validateFormat(p.Child("name"), e.Name, maxEnvNameBytes, isEnvName)...)
		errs = append(errs, validateUnique(p.Child("name"), e.Name, names)...)
		if strings.ContainsRune(e.Value, 0) {
			errs = append(errs, field.Invalid(p.Child("value"), field.OmitValueType{}, noNUL))
		}
	}
	return errs
}

// validateCommandSize bounds what a command takes as it is written, and as it
// is after each $(NAME) has been replaced: a few variables that name each
// other twice would otherwise grow without end in the agent's memory.
func validateCommandSize(p *field.Path, command, args []string, env []api.EnvVar) field.ErrorList {
	size := 0
	for _, s := range command {
		size += len(s) + 1
	}
	for _, s := range args {
		size += len(s) + 1
	}
	for _, e := range env {
		size += len(e.Name) + len(e.Value) + 2
	}
	together := ""
	switch {
	case size > maxCommandBytes && len(args) == 0 && len(env) == 0:
		return field.ErrorList{field.TooLong(p.Child("command"), "", maxCommandBytes)}
	case size > maxCommandBytes:
		together = "`command`, `args` and `env` together "
	case expandedSize(command, args, env) > maxCommandBytes:
		together = "`command`, `args` and `env` together, with each $(NAME) replaced by its value, "
	default:
		return nil
	}
	err := field.TooLong(p, "", maxCommandBytes)
	err.Detail = together + err.Detail
	err.BadValue = inputs{command, args, env}
	return field.ErrorList{err}
}

// variableRegexp finds what the agent replaces, and the "$$" that it doesn't
// look behind.
var variableRegexp = regexp.MustCompile(`\$\$|\$\(([^)]*)\)`)

// expandedSize is what a command takes after $(NAME) has been replaced, as far
// as the spec says: variables of the agent's own count as they are written. It
// stops counting beyond the bound.
func expandedSize(command, args []string, env []api.EnvVar) int64 {
	lengths := make(map[string]int64, len(env))
	expanded := func(text string) int64 {
		n := int64(len(text))
		for _, m := range variableRegexp.FindAllStringSubmatchIndex(text, -1) {
			if m[2] < 0 {
				continue // "$$"
			}
			if length, ok := lengths[text[m[2]:m[3]]]; ok {
				n += length - int64(m[1]-m[0])
			}
		}
		return n
	}
	size := int64(0)
	for _, e := range env {
		length := expanded(e.Value)
		if size += int64(len(e.Name)) + length + 2; size > maxCommandBytes {
			return size
		}
		lengths[e.Name] = length
	}
	for _, list := range [][]string{command, args} {
		for _, s := range list {
			if size += expanded(s) + 1; size > maxCommandBytes {
				return size
			}
		}
	}
	return size
}

func validateTTY(p *field.Path, tty, stdin bool) field.ErrorList {
	if tty && !stdin {
		return field.ErrorList{field.Forbidden(p.Child("tty"), "may only be true when `stdin` is true")}
	}
	return nil
}

// validateLimits reports no more than the first name that isn't supported.
func validateLimits(limits corev1.ResourceList, p *field.Path) field.ErrorList {
	var errs field.ErrorList
	for _, name := range limitNames {
		quantity, ok := limits[name]
		switch p := p.Key(string(name)); {
		case !ok:
		case quantity.Sign() <= 0:
			errs = append(errs, field.Invalid(p, quantity.String(), "must be greater than 0"))
		case name == corev1.ResourceMemory && !isWhole(quantity):
			errs = append(errs, field.Invalid(p, quantity.String(), "must be a whole number of bytes"))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(limits)) {
		if !slices.Contains(limitNames, name) {
			return append(errs, validateEnum(p, name, limitNames)...)
		}
	}
	return errs
}

func isWhole(quantity resource.Quantity) bool {
	rounded := quantity.DeepCopy()
	return rounded.RoundUp(0)
}

func validateAbsolutePath(p *field.Path, value string) field.ErrorList {
	switch {
	case value == "":
		return nil
	case len(value) > maxPathBytes:
		return field.ErrorList{field.TooLong(p, value, maxPathBytes)}
	case strings.ContainsRune(value, 0):
		return field.ErrorList{field.Invalid(p, field.OmitValueType{}, noNUL)}
	case !path.IsAbs(value):
		return field.ErrorList{field.Invalid(p, value, "must be an absolute path")}
	case path.Clean(value) != value:
		return field.ErrorList{field.Invalid(p, value, fmt.Sprintf("must be a path without '.', '..' and needless slashes (%q)", path.Clean(value)))}
	}
	return nil
}

// validateHost takes whatever ends in a number for an IP address, as browsers
// do: 10.0.0.256 is a mistyped address rather than a name.
func validateHost(p *field.Path, host string) field.ErrorList {
	last := host[strings.LastIndexByte(host, '.')+1:]
	if strings.Contains(host, ":") || last != "" && strings.Trim(last, "0123456789") == "" {
		if len(host) > maxDNSNameBytes {
			return field.ErrorList{field.TooLong(p, host, maxDNSNameBytes)}
		}
		return utilvalidation.IsValidIP(p, host)
	}
	return validateFormat(p, host, maxDNSNameBytes, isDNSName)
}

// validateCABundle doesn't show the value: it is long, and might hold a key by
// mistake.
func validateCABundle(bundle []byte, p *field.Path) field.ErrorList {
	if len(bundle) == 0 {
		return nil
	}
	if len(bundle) > maxCABundleBytes {
		return field.ErrorList{field.TooLong(p, "", maxCABundleBytes)}
	}
	invalid := func(detail string) field.ErrorList {
		return field.ErrorList{field.Invalid(p, field.OmitValueType{}, detail)}
	}
	count := 0
	for {
		var block *pem.Block
		if block, bundle = pem.Decode(bundle); block == nil {
			break
		}
		count++
		if block.Type != "CERTIFICATE" {
			return invalid(fmt.Sprintf("must hold nothing but PEM-encoded certificates: block %d is not one", count))
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return invalid(fmt.Sprintf("must hold nothing but PEM-encoded certificates: block %d: %v", count, err))
		}
	}
	if count == 0 {
		return invalid("must hold at least one PEM-encoded certificate")
	}
	return nil
}

// exactlyOne reads like the errors of Kubernetes' declarative unions.
func exactlyOne(p *field.Path, set, all []string) field.ErrorList {
	quoted := "`" + strings.Join(all, "`, `") + "`"
	switch len(set) {
	case 0:
		return field.ErrorList{field.Required(p, "must specify one of: "+quoted)}
	case 1:
		return nil
	}
	return field.ErrorList{field.Invalid(p, "{"+strings.Join(set, ", ")+"}", "must specify exactly one of: "+quoted)}
}

// validateFormat requires a value, and shows it only within its bound.
func validateFormat(p *field.Path, value string, limit int, check func(string) []string) field.ErrorList {
	if value == "" {
		return field.ErrorList{field.Required(p, "")}
	}
	if len(value) > limit {
		return field.ErrorList{field.TooLong(p, value, limit)}
	}
	var errs field.ErrorList
	for _, msg := range check(value) {
		errs = append(errs, field.Invalid(p, value, msg))
	}
	return errs
}

func validateEnum[T ~string](p *field.Path, value T, supported []T) field.ErrorList {
	switch {
	case slices.Contains(supported, value):
		return nil
	case value == "":
		return field.ErrorList{field.Required(p, "")}
	case len(value) > maxShownBytes:
		return field.ErrorList{field.NotSupported(p, field.OmitValueType{}, supported)}
	}
	return field.ErrorList{field.NotSupported(p, string(value), supported)}
}

// validateRange requires a number from low to high.
func validateRange[T int32 | int64](p *field.Path, value *T, low, high T) field.ErrorList {
	if value == nil {
		return field.ErrorList{field.Required(p, "")}
	}
	if *value < low || *value > high {
		return field.ErrorList{field.Invalid(p, *value, fmt.Sprintf("must be between %d and %d, inclusive", low, high))}
	}
	return nil
}

func validatePort(p *field.Path, port int32) field.ErrorList {
	return validateRange(p, &port, 1, 65535)
}

// validateUnique adds a value to those seen. What is missing isn't a
// duplicate.
func validateUnique(p *field.Path, value string, seen sets.Set[string]) field.ErrorList {
	if seen.Has(value) {
		return field.ErrorList{field.Duplicate(p, value)}
	}
	if value != "" {
		seen.Insert(value)
	}
	return nil
}

// isEnvName is the rule of pods, relaxed as it is since Kubernetes 1.34.
func isEnvName(name string) []string {
	if strings.HasPrefix(name, reservedEnvPrefix) {
		return []string{fmt.Sprintf("must not begin with %s: those variables are set by the agent", reservedEnvPrefix)}
	}
	return utilvalidation.IsRelaxedEnvVarName(name)
}

// isDNSName is a subdomain whose labels can be looked up.
func isDNSName(name string) []string {
	if msgs := content.IsDNS1123Subdomain(name); len(msgs) > 0 {
		return msgs
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) > maxDNSLabelBytes {
			return []string{fmt.Sprintf("each label %s", content.MaxLenError(maxDNSLabelBytes))}
		}
	}
	return nil
}

const userNameFmt = `[A-Za-z_][A-Za-z0-9_.-]*\$?`

var userNameRegexp = regexp.MustCompile("^" + userNameFmt + "$")

// isUser follows useradd of shadow, but for names that begin with a digit or
// a dot, which most systems refuse.
func isUser(user string) []string {
	if strings.Trim(user, "0123456789") == "" {
		id, err := strconv.ParseUint(user, 10, 32)
		if err != nil || id > maxUserID || strconv.FormatUint(id, 10) != user {
			return []string{fmt.Sprintf("a user's number must be between 0 and %d, inclusive, without leading zeros", maxUserID)}
		}
		return nil
	}
	if !userNameRegexp.MatchString(user) {
		return []string{content.RegexError("must be a user's number, or a name of letters, digits, '_', '.' or '-' that begins with a letter or '_'", userNameFmt, "www-data", "1000")}
	}
	return nil
}

// isSSHUser leaves the rest to the host, which may know names of another kind
// (DOMAIN\user, user@realm).
func isSSHUser(user string) []string {
	if strings.ContainsFunc(user, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsGraphic(r) }) {
		return []string{"must not contain spaces or control characters"}
	}
	return nil
}

const imageFmt = `[A-Za-z0-9\[][!-~]*`

var imageRegexp = regexp.MustCompile("^" + imageFmt + "$")

// isImage catches what can't be a reference; the rest of the grammar is left
// to the agent, as kubelets do.
func isImage(image string) []string {
	if !imageRegexp.MatchString(image) {
		return []string{content.RegexError("must be an image's reference, without spaces", imageFmt, "nginx", "registry.example.com/team/web:1.2")}
	}
	return nil
}

const unitFmt = `[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*`

var unitRegexp = regexp.MustCompile("^" + unitFmt + "$")

// isUnit is systemd's set of characters, without patterns, and without the
// dash that would make an option of it.
func isUnit(unit string) []string {
	if !unitRegexp.MatchString(unit) {
		return []string{content.RegexError("must be a systemd unit's name", unitFmt, "nginx.service", "getty@tty1")}
	}
	return nil
}
