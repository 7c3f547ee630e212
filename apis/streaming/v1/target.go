package v1

import (
	"strconv"
	"strings"
	"time"
)

// Names of the sources, as the fields of the spec that hold them.
const (
	SourceProcess   = "process"
	SourceContainer = "container"
	SourceSSH       = "ssh"
	SourceTCP       = "tcp"
)

// Reasons of the Events that a server reports on a target. Those of its agent are
// the agent's.
const (
	// EventClassDenied: a connection was refused because of the target's class.
	EventClassDenied = "ClassDenied"
	// EventUnreachable: a connection failed because an instance, or the agent
	// that hosts it, could not be reached.
	EventUnreachable = "Unreachable"
)

// Source returns the name of the source that is set, "" if none is.
func (s *TargetSpec) Source() string {
	switch {
	case s.Process != nil:
		return SourceProcess
	case s.Container != nil:
		return SourceContainer
	case s.SSH != nil:
		return SourceSSH
	case s.TCP != nil:
		return SourceTCP
	}
	return ""
}

// Hosted says that an agent runs the target's instances, rather than that they
// are reached where they are.
func (s *TargetSpec) Hosted() bool {
	return s.Process != nil || s.Container != nil
}

// GracePeriod is how long an instance may take to end.
func (s *TargetSpec) GracePeriod() time.Duration {
	seconds := DefaultTerminationGracePeriodSeconds
	if s.TerminationGracePeriodSeconds != nil {
		seconds = *s.TerminationGracePeriodSeconds
	}
	return time.Duration(seconds) * time.Second
}

// InstanceNames returns the names of the instances that the spec asks for, in
// the order of their ordinals or endpoints.
func (t *Target) InstanceNames() []string {
	var names []string
	if t.Spec.Hosted() {
		replicas := DefaultReplicas
		if t.Spec.Replicas != nil {
			replicas = *t.Spec.Replicas
		}
		for i := range replicas {
			names = append(names, t.Name+"-"+strconv.Itoa(int(i)))
		}
		return names
	}
	var endpoints []Endpoint
	switch {
	case t.Spec.SSH != nil:
		endpoints = t.Spec.SSH.Endpoints
	case t.Spec.TCP != nil:
		endpoints = t.Spec.TCP.Endpoints
	}
	for _, e := range endpoints {
		names = append(names, t.Name+"-"+e.Name)
	}
	return names
}

// PortEnvName returns the name of the environment variable that tells an
// instance the host port of a named port.
func PortEnvName(port string) string {
	return PortEnvPrefix + strings.ToUpper(strings.ReplaceAll(port, "-", "_"))
}

// Restarts says whether an instance that ended with this exit code is started
// again.
func (p RestartPolicy) Restarts(exitCode int32) bool {
	switch p {
	case RestartNever:
		return false
	case RestartOnFailure:
		return exitCode != 0
	}
	return true
}
