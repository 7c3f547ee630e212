package policy

import (
	"fmt"
	"math"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// maxErrors bounds what Check returns: a target may have hundreds of endpoints
// that are all wrong for one reason.
const maxErrors = 16

const maxPort = 1<<16 - 1

// CheckOptions say what Check judges by beside the class.
type CheckOptions struct {
	// Old is the target before an update, nil if it is created or connected
	// to.
	Old *v1.Target
	// Services are the cluster's service ranges.
	Services []netip.Prefix
}

// Check returns what of a target's spec its class doesn't allow, the first 16
// errors. Names of hosts are judged when they are dialled.
//
// Of an update, it returns what wasn't wrong before: what is unchanged isn't
// refused because the class has changed. An endpoint or a port is unchanged if
// the old target has it too; the source, the agent and the user are unchanged
// as long as the update makes nothing else run, nor more of it, and nothing
// else be reached. With another class everything is judged.
func Check(class *v1.TargetClass, target *v1.Target, opts CheckOptions) field.ErrorList {
	spec := field.NewPath("spec")
	if class == nil {
		return field.ErrorList{field.Forbidden(spec.Child("className"), errNoClass.Error())}
	}
	c := &check{class: class, services: opts.Services}
	old := &v1.TargetSpec{}
	if opts.Old != nil && opts.Old.Spec.ClassName == target.Spec.ClassName {
		old = &opts.Old.Spec
	}
	if old.Source() == "" || !startsNothing(&target.Spec, old) {
		c.source(&target.Spec, spec)
	}
	before := endpointsOf(old)
	if ssh := target.Spec.SSH; ssh != nil {
		c.endpoints(ssh.Endpoints, before, spec.Child("ssh", "endpoints"))
	}
	if tcp := target.Spec.TCP; tcp != nil {
		c.endpoints(tcp.Endpoints, before, spec.Child("tcp", "endpoints"))
	}
	c.ports(target.Spec.Ports, old.Ports, spec.Child("ports"))
	return c.errs
}

// startsNothing says that a spec makes nothing run or be reached that the old
// one didn't.
func startsNothing(spec, old *v1.TargetSpec) bool {
	before, now := endpointsOf(old), endpointsOf(spec)
	return spec.AgentName == old.AgentName &&
		replicas(spec) <= replicas(old) &&
		!slices.ContainsFunc(now, func(e v1.Endpoint) bool { return !slices.Contains(before, e) }) &&
		equality.Semantic.DeepEqual(sourceOf(spec), sourceOf(old))
}

func replicas(spec *v1.TargetSpec) int32 {
	if spec.Replicas == nil {
		return v1.DefaultReplicas
	}
	return *spec.Replicas
}

// sourceOf returns the source without its endpoints.
func sourceOf(spec *v1.TargetSpec) v1.TargetSpec {
	source := v1.TargetSpec{Process: spec.Process, Container: spec.Container}
	if spec.SSH != nil {
		ssh := *spec.SSH
		ssh.Endpoints = nil
		source.SSH = &ssh
	}
	if spec.TCP != nil {
		tcp := *spec.TCP
		tcp.Endpoints = nil
		source.TCP = &tcp
	}
	return source
}

func endpointsOf(spec *v1.TargetSpec) []v1.Endpoint {
	var endpoints []v1.Endpoint
	if spec.SSH != nil {
		endpoints = append(endpoints, spec.SSH.Endpoints...)
	}
	if spec.TCP != nil {
		endpoints = append(endpoints, spec.TCP.Endpoints...)
	}
	return endpoints
}

// check collects what a class doesn't allow.
type check struct {
	class    *v1.TargetClass
	services []netip.Prefix
	errs     field.ErrorList
}

func (c *check) forbid(p *field.Path, format string, args ...any) {
	c.errs = append(c.errs, field.Forbidden(p, deny(c.class.Name, format, args...).Error()))
}

func (c *check) source(spec *v1.TargetSpec, p *field.Path) {
	allowed := &c.class.Spec
	found := false
	for _, source := range []struct {
		name string
		set  bool
	}{
		{v1.SourceProcess, spec.Process != nil},
		{v1.SourceContainer, spec.Container != nil},
		{v1.SourceSSH, spec.SSH != nil},
		{v1.SourceTCP, spec.TCP != nil},
	} {
		found = found || source.set
		if source.set && !slices.Contains(allowed.Sources, source.name) {
			c.forbid(p.Child(source.name), "allows the sources: %s", list(allowed.Sources))
		}
	}
	if !found {
		c.forbid(p, "allows the sources: %s", list(allowed.Sources))
	}
	if (spec.Hosted() || spec.AgentName != "") && !slices.Contains(allowed.Agents, spec.AgentName) && !slices.Contains(allowed.Agents, v1.ClassWildcard) {
		c.forbid(p.Child("agentName"), "allows the agents: %s", list(allowed.Agents))
	}
	if spec.Process != nil {
		p := p.Child("process", "user")
		switch {
		case spec.Process.User != "":
			c.user(spec.Process.User, p)
		case !allowed.AgentUser:
			c.forbid(p, "doesn't allow that it is left out, as agentUser would: it allows the users: %s", list(allowed.Users))
		}
	}
	if spec.SSH != nil {
		c.user(spec.SSH.User, p.Child("ssh", "user"))
	}
}

// user judges whom a process runs as, or a login is for.
func (c *check) user(user string, p *field.Path) {
	users := c.class.Spec.Users
	if user != "" && slices.Contains(users, user) {
		return
	}
	if user == "root" || user == "0" {
		if slices.Contains(users, "root") || slices.Contains(users, "0") {
			return
		}
	} else if slices.Contains(users, v1.ClassWildcard) && !mayBeRoot(user) {
		return
	}
	note := ""
	if mayBeRoot(user) {
		note = "; root has to be named"
	}
	c.forbid(p, "allows the users: %s%s", list(users), note)
}

// mayBeRoot says whether a user other than by the name root or 0 may be root
// all the same: of a login, OpenSSH takes for the user what is before a colon,
// and with Debian's patches before a slash; some directories of users don't
// tell upper case from lower; a number may be written in several ways, or be
// too big for the type that holds it; and to the kernel, the greatest means to
// stay who one is.
func mayBeRoot(user string) bool {
	if i := strings.IndexAny(user, ":/"); i >= 0 {
		user = user[:i]
	}
	if strings.EqualFold(user, "root") || user == "" {
		return true
	}
	digits := strings.TrimLeft(user, "+-")
	if strings.Trim(digits, "0123456789") != "" {
		return false
	}
	id, err := strconv.ParseUint(digits, 10, 32)
	return err != nil || id == 0 || id == math.MaxUint32 || digits != user
}

func (c *check) endpoints(endpoints, old []v1.Endpoint, p *field.Path) {
	var addresses *Addresses
	for i, e := range endpoints {
		addr, err := netip.ParseAddr(e.Host)
		if err != nil || slices.Contains(old, e) || len(c.errs) == maxErrors {
			continue
		}
		if addresses == nil {
			addresses = NewAddresses(c.class, c.services)
		}
		if reason := addresses.denies(addr); reason != "" {
			c.forbid(p.Index(i).Child("host"), "does not allow the address %s: %s", addressText(addr), reason)
		}
	}
}

func (c *check) ports(ports, old []v1.TargetPort, p *field.Path) {
	policy := &c.class.Spec.Ports
	judge := func(p *field.Path, port v1.TargetPort, number func(v1.TargetPort) int32) {
		same := func(o v1.TargetPort) bool {
			return number(o) == number(port) && protocolOf(o.Protocol) == protocolOf(port.Protocol)
		}
		if len(c.errs) < maxErrors && !mayList(policy, number(port), port.Protocol) && !slices.ContainsFunc(old, same) {
			c.forbid(p, "allows the ports: %s", portsText(policy.Allowed))
		}
	}
	for i, port := range ports {
		p := p.Index(i)
		judge(p.Child("port"), port, func(o v1.TargetPort) int32 { return o.Port })
		// A process could otherwise claim any port of its host.
		if port.HostPort != 0 {
			judge(p.Child("hostPort"), port, func(o v1.TargetPort) int32 { return o.HostPort })
		}
	}
}

// AllowTarget returns nil if a target may be connected to: if the class allows
// what Check judges, but for the ports, each of which is asked for by AllowPort.
// Else it fails with a *DeniedError that says what the class allows.
func AllowTarget(class *v1.TargetClass, target *v1.Target, services []netip.Prefix) error {
	if class == nil {
		return errNoClass
	}
	portless := *target
	portless.Spec.Ports = nil
	errs := Check(class, &portless, CheckOptions{Services: services})
	if len(errs) == 0 {
		return nil
	}
	const more = "; and more"
	reason := ""
	for i, err := range errs {
		text := err.Field + ": " + err.Detail
		if i > 0 {
			if len(reason)+len(text)+len(more) > maxMessageBytes {
				reason += more
				break
			}
			text = "; " + text
		}
		reason += text
	}
	return &DeniedError{Class: class.Name, reason: clip(reason, maxMessageBytes)}
}

// AllowPort returns nil if a port of the target may be forwarded, and else a
// *DeniedError that says which may be.
func AllowPort(class *v1.TargetClass, target *v1.Target, port uint16, protocol v1.Protocol) error {
	if class == nil {
		return errNoClass
	}
	policy, number := &class.Spec.Ports, int32(port)
	if !mayList(policy, number, protocol) {
		return deny(class.Name, "does not allow port %d (%s) to be forwarded; it allows the ports: %s",
			port, clip(string(protocolOf(protocol)), maxItemBytes), portsText(policy.Allowed))
	}
	if policy.Unlisted {
		return nil
	}
	var open []string
	for _, p := range target.Spec.Ports {
		if p.Port == number && protocolOf(p.Protocol) == protocolOf(protocol) {
			return nil
		}
		if mayList(policy, p.Port, p.Protocol) {
			open = append(open, fmt.Sprintf("%s (%d %s)", p.Name, p.Port, protocolOf(p.Protocol)))
		}
	}
	return deny(class.Name, "allows ports to be forwarded only if the target's spec lists them; port %d (%s) is not among those that are open: %s",
		port, protocolOf(protocol), list(open))
}

// AllowPortNumber is AllowPort before it is known by which protocol: it returns
// nil if the port may be forwarded by one, and else what is said of TCP.
func AllowPortNumber(class *v1.TargetClass, target *v1.Target, port uint16) error {
	err := AllowPort(class, target, port, v1.ProtocolTCP)
	if err != nil && AllowPort(class, target, port, v1.ProtocolUDP) == nil {
		return nil
	}
	return err
}

// RefusedPort names the port of a session's options for which the session is
// refused, so that a client can do without it.
func RefusedPort(i int) metav1.StatusCause {
	return metav1.StatusCause{Type: metav1.CauseTypeForbidden, Field: field.NewPath("ports").Index(i).String()}
}

// IsSocketPath says whether a path may name a unix socket: it is absolute, is
// written in the one way that there is without links, and names something below
// the root.
func IsSocketPath(name string) bool {
	return path.IsAbs(name) && path.Clean(name) == name && name != "/" && !strings.ContainsRune(name, 0)
}

// AllowSocket returns nil if clients may connect to a unix socket of an
// instance's host, and else a *DeniedError that says to which they may. It
// judges the path as it is written: whoever connects follows no links.
func AllowSocket(class *v1.TargetClass, name string) error {
	if class == nil {
		return errNoClass
	}
	allowed := class.Spec.Ports.UnixSockets
	if IsSocketPath(name) && slices.ContainsFunc(allowed, func(entry string) bool {
		if entry == name {
			return true
		}
		below, ok := strings.CutSuffix(entry, "/")
		return ok && (below == "" || IsSocketPath(below)) && strings.HasPrefix(name, entry)
	}) {
		return nil
	}
	return deny(class.Name, "does not allow connections to the unix socket %s; it allows: %s; whoever may change the class can add the path to spec.ports.unixSockets",
		strconv.Quote(clip(name, maxItemBytes)), list(allowed))
}

// AllowReverse returns the TCP ports of which clients may have one listened to
// on the loopback address of an instance's host: port itself or, if that is 0,
// all that the class allows. It fails with a *DeniedError, which says what is
// allowed.
func AllowReverse(class *v1.TargetClass, port uint16) ([]v1.PortRange, error) {
	if class == nil {
		return nil, errNoClass
	}
	var allowed []v1.PortRange
	for _, r := range class.Spec.Ports.Reverse {
		first, last, ok := bounds(r)
		if !ok || protocolOf(r.Protocol) != v1.ProtocolTCP {
			continue
		}
		if n := int32(port); first <= n && n <= last {
			return []v1.PortRange{{Port: n, EndPort: n, Protocol: v1.ProtocolTCP}}, nil
		}
		allowed = append(allowed, v1.PortRange{Port: first, EndPort: last, Protocol: v1.ProtocolTCP})
	}
	if port == 0 && len(allowed) > 0 {
		return allowed, nil
	}
	what := "that any port is listened to"
	if port != 0 {
		what = fmt.Sprintf("that port %d is listened to", port)
	}
	text := "none"
	if len(allowed) > 0 {
		text = portsText(allowed)
	}
	return nil, deny(class.Name, "does not allow %s for a reverse forward; it allows the ports: %s; whoever may change the class can add the port to spec.ports.reverse", what, text)
}

// mayList says whether a port is one of those that a class lets targets list
// and clients forward.
func mayList(policy *v1.PortPolicy, port int32, protocol v1.Protocol) bool {
	protocol = protocolOf(protocol)
	if port < 1 || port > maxPort || protocol != v1.ProtocolTCP && protocol != v1.ProtocolUDP {
		return false
	}
	return len(policy.Allowed) == 0 || slices.ContainsFunc(policy.Allowed, func(r v1.PortRange) bool {
		first, last, ok := bounds(r)
		return ok && first <= port && port <= last && protocolOf(r.Protocol) == protocol
	})
}

// bounds returns the first and the last port of a range, and whether it is one.
func bounds(r v1.PortRange) (first, last int32, ok bool) {
	last = r.EndPort
	if last == 0 {
		last = r.Port
	}
	return r.Port, last, r.Port >= 1 && r.Port <= last && last <= maxPort
}

func protocolOf(p v1.Protocol) v1.Protocol {
	if p == "" {
		return v1.ProtocolTCP
	}
	return p
}

func portsText(ranges []v1.PortRange) string {
	if len(ranges) == 0 {
		return "1-65535, TCP and UDP"
	}
	texts := make([]string, 0, len(ranges))
	for _, r := range ranges {
		text := strconv.Itoa(int(r.Port))
		if r.EndPort != 0 && r.EndPort != r.Port {
			text += "-" + strconv.Itoa(int(r.EndPort))
		}
		texts = append(texts, text+" "+string(protocolOf(r.Protocol)))
	}
	return list(texts)
}
