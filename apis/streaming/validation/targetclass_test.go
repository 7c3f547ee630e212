package validation_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/ptr"

	api "aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/apis/streaming/install"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
)

// validateClass validates the way the registry does: by hand, and by the tags
// of the version that the request is in.
func validateClass(t *testing.T, newClass, oldClass *v1.TargetClass) []string {
	t.Helper()
	scheme := runtime.NewScheme()
	install.Install(scheme)
	hub := func(class *v1.TargetClass) *api.TargetClass {
		out := &api.TargetClass{}
		if err := scheme.Convert(class, out, nil); err != nil {
			t.Fatal(err)
		}
		return out
	}
	var errs field.ErrorList
	if oldClass == nil {
		errs = append(validation.ValidateTargetClass(hub(newClass)), scheme.Validate(t.Context(), nil, newClass)...)
	} else {
		errs = append(validation.ValidateTargetClassUpdate(hub(newClass), hub(oldClass)), scheme.ValidateUpdate(t.Context(), nil, newClass, oldClass)...)
	}
	var msgs []string
	for _, err := range errs {
		msgs = append(msgs, err.Error())
	}
	return msgs
}

func newClass(spec v1.TargetClassSpec) *v1.TargetClass {
	return &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{Name: "standard", ResourceVersion: "1"}, Spec: spec}
}

func numbered(n int, format string) []string {
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprintf(format, i)
	}
	return items
}

func TestValidateTargetClass(t *testing.T) {
	const subdomainText = `a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`
	const cidrText = `must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)`
	allow := func(cidrs ...string) v1.TargetClassSpec {
		return v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: cidrs}}
	}
	ports := func(ranges ...v1.PortRange) v1.TargetClassSpec {
		return v1.TargetClassSpec{Ports: v1.PortPolicy{Allowed: ranges}}
	}
	limits := func(sessions int32, seconds int64) v1.TargetClassSpec {
		return v1.TargetClassSpec{Limits: v1.SessionLimits{
			SessionsPerUser: ptr.To(sessions), SessionsPerTarget: ptr.To(sessions),
			IdleTimeoutSeconds: ptr.To(seconds), MaxDurationSeconds: ptr.To(seconds),
		}}
	}
	cases := map[string]struct {
		spec v1.TargetClassSpec
		want []string
	}{
		"a class may be empty": {},
		"every field may be set": {
			spec: v1.TargetClassSpec{
				Sources:   []string{"process", "container", "ssh", "tcp"},
				Agents:    []string{"edge-17", "edge.example.com", "*"},
				Users:     []string{"root", "0", "www-data", `EXAMPLE\jürgen`, "*"},
				AgentUser: true,
				Addresses: v1.AddressPolicy{Allow: []string{"10.0.0.0/8", "::1/128", "192.0.2.1/32", "0.0.0.0/0"}, Deny: []string{"10.0.0.0/8", "fd00::/8"}},
				Ports: v1.PortPolicy{Allowed: []v1.PortRange{{Port: 1, EndPort: 65535, Protocol: "TCP"}, {Port: 53, Protocol: "UDP"}, {Port: 80, EndPort: 80, Protocol: "TCP"}}, Unlisted: true,
					UnixSockets: []string{"/", "/run/app.sock", "/srv/web/", "/" + strings.Repeat("ü", 2047)},
					Reverse:     []v1.PortRange{{Port: 9000, Protocol: "TCP"}, {Port: 1, EndPort: 65535, Protocol: "TCP"}}},
				Limits: limits(10000, 2592000).Limits,
			},
		},
		"sources are those there are": {
			spec: v1.TargetClassSpec{Sources: []string{"tcp", "pod", ""}},
			want: []string{
				`spec.sources[1]: Unsupported value: "pod": supported values: "process", "container", "ssh", "tcp"`,
				`spec.sources[2]: Required value`,
			},
		},
		"a source is named once": {
			spec: v1.TargetClassSpec{Sources: []string{"tcp", "tcp"}},
			want: []string{`spec.sources[1]: Duplicate value: "tcp"`},
		},
		"a long source isn't repeated": {
			spec: v1.TargetClassSpec{Sources: []string{strings.Repeat("a", 65)}},
			want: []string{`spec.sources[0]: Unsupported value: supported values: "process", "container", "ssh", "tcp"`},
		},
		"agents are names or any": {
			spec: v1.TargetClassSpec{Agents: []string{"edge-*", "", strings.Repeat("a", 254)}},
			want: []string{
				`spec.agents[0]: Invalid value: "edge-*": ` + subdomainText,
				`spec.agents[1]: Required value`,
				`spec.agents[2]: Too long: may not be more than 253 bytes`,
			},
		},
		"users are names or any": {
			spec: v1.TargetClassSpec{Users: []string{"web-*", "www data", "", strings.Repeat("a", 257), "a\x00"}},
			want: []string{
				`spec.users[0]: Invalid value: "web-*": must be a user's name or number, or "*" alone: patterns aren't supported`,
				`spec.users[1]: Invalid value: "www data": must not contain spaces or control characters`,
				`spec.users[2]: Required value`,
				`spec.users[3]: Too long: may not be more than 256 bytes`,
				`spec.users[4]: Invalid value: "a\x00": must not contain spaces or control characters`,
			},
		},
		"addresses are CIDRs in canonical form": {
			spec: allow("10.0.0.1/8", "10.0.0.1", "::ffff:10.0.0.0/104", "010.0.0.0/8", "2001:DB8::/32", "fe80::1%eth0/64", "", strings.Repeat("1", 65), "10.0.0.0/33"),
			want: []string{
				`spec.addresses.allow[0]: Invalid value: "10.0.0.1/8": must not have bits set beyond the prefix length`,
				`spec.addresses.allow[1]: Invalid value: "10.0.0.1": ` + cidrText,
				`spec.addresses.allow[2]: Invalid value: "::ffff:10.0.0.0/104": must not have an IPv4-mapped IPv6 address`,
				`spec.addresses.allow[3]: Invalid value: "010.0.0.0/8": must not have leading 0s in IP or prefix length`,
				`spec.addresses.allow[4]: Invalid value: "2001:DB8::/32": must be in canonical form ("2001:db8::/32")`,
				`spec.addresses.allow[5]: Invalid value: "fe80::1%eth0/64": ` + cidrText,
				`spec.addresses.allow[6]: Required value`,
				`spec.addresses.allow[7]: Too long: may not be more than 64 bytes`,
				`spec.addresses.allow[8]: Invalid value: "10.0.0.0/33": ` + cidrText,
			},
		},
		"denied addresses are checked as allowed ones are": {
			spec: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Deny: []string{"db.example.com", "10.0.0.0/8", "10.0.0.0/8"}}},
			want: []string{
				`spec.addresses.deny[0]: Invalid value: "db.example.com": ` + cidrText,
				`spec.addresses.deny[2]: Duplicate value: "10.0.0.0/8"`,
			},
		},
		"256 entries are the most": {
			spec: v1.TargetClassSpec{
				Agents:    numbered(256, "a%d"),
				Users:     numbered(256, "a%d"),
				Addresses: v1.AddressPolicy{Allow: numbered(256, "10.0.%d.0/24"), Deny: numbered(256, "10.0.%d.0/24")},
				Ports: v1.PortPolicy{
					Allowed:     slices.Repeat([]v1.PortRange{{Port: 1, Protocol: "TCP"}}, 256),
					UnixSockets: numbered(256, "/%d"),
					Reverse:     slices.Repeat([]v1.PortRange{{Port: 1, Protocol: "TCP"}}, 256),
				},
			},
		},
		"257 entries are too many, and not looked at": {
			spec: v1.TargetClassSpec{
				Sources:   numbered(257, "a%d"),
				Agents:    numbered(257, "a_%d"),
				Users:     numbered(257, "a %d"),
				Addresses: v1.AddressPolicy{Allow: numbered(257, "%d"), Deny: numbered(257, "%d")},
				Ports:     v1.PortPolicy{Allowed: make([]v1.PortRange, 257), UnixSockets: numbered(257, "%d"), Reverse: make([]v1.PortRange, 257)},
			},
			want: []string{
				`spec.sources: Too many: 257: must have at most 256 items`,
				`spec.agents: Too many: 257: must have at most 256 items`,
				`spec.users: Too many: 257: must have at most 256 items`,
				`spec.addresses.allow: Too many: 257: must have at most 256 items`,
				`spec.addresses.deny: Too many: 257: must have at most 256 items`,
				`spec.ports.allowed: Too many: 257: must have at most 256 items`,
				`spec.ports.unixSockets: Too many: 257: must have at most 256 items`,
				`spec.ports.reverse: Too many: 257: must have at most 256 items`,
			},
		},
		"ports are ports": {
			spec: ports(v1.PortRange{Port: 65536, Protocol: "TCP"}, v1.PortRange{Port: -1, Protocol: "TCP"}, v1.PortRange{Port: 1, EndPort: 65536, Protocol: "TCP"}, v1.PortRange{Port: 1, EndPort: -1, Protocol: "TCP"}),
			want: []string{
				`spec.ports.allowed[0].port: Invalid value: 65536: must be less than or equal to 65535`,
				`spec.ports.allowed[1].port: Invalid value: -1: must be greater than or equal to 1`,
				`spec.ports.allowed[2].endPort: Invalid value: 65536: must be less than or equal to 65535`,
				`spec.ports.allowed[3].endPort: Invalid value: -1: must be greater than or equal to 1`,
			},
		},
		"ports and their protocols are required": {
			spec: ports(v1.PortRange{}),
			want: []string{`spec.ports.allowed[0].port: Required value`, `spec.ports.allowed[0].protocol: Required value`},
		},
		"a protocol is TCP or UDP": {
			spec: ports(v1.PortRange{Port: 1, Protocol: "SCTP"}),
			want: []string{`spec.ports.allowed[0].protocol: Unsupported value: "SCTP": supported values: "TCP", "UDP"`},
		},
		"a range doesn't end before it begins": {
			spec: ports(v1.PortRange{Port: 81, EndPort: 80, Protocol: "TCP"}),
			want: []string{"spec.ports.allowed[0].endPort: Invalid value: 80: must not be less than `port` (81)"},
		},
		"unix sockets are absolute paths, written in one way": {
			spec: v1.TargetClassSpec{Ports: v1.PortPolicy{UnixSockets: []string{
				"run/app.sock", "@app", "/run/../app.sock", "/run//", "//", "/run/./app/", "/run/a\x00", "", "/" + strings.Repeat("a", 4095), "/run/app.sock", "/run/app.sock",
			}}},
			want: []string{
				`spec.ports.unixSockets[0]: Invalid value: "run/app.sock": must be an absolute path`,
				`spec.ports.unixSockets[1]: Invalid value: "@app": must be an absolute path`,
				`spec.ports.unixSockets[2]: Invalid value: "/run/../app.sock": must be a path without '.', '..' and needless slashes ("/app.sock")`,
				`spec.ports.unixSockets[3]: Invalid value: "/run/": must be a path without '.', '..' and needless slashes ("/run")`,
				`spec.ports.unixSockets[4]: Invalid value: "//": must be a path without '.', '..' and needless slashes ("/")`,
				`spec.ports.unixSockets[5]: Invalid value: "/run/./app": must be a path without '.', '..' and needless slashes ("/run/app")`,
				`spec.ports.unixSockets[6]: Invalid value: must not contain NUL bytes`,
				`spec.ports.unixSockets[7]: Required value`,
				`spec.ports.unixSockets[8]: Too long: may not be more than 4095 bytes`,
				`spec.ports.unixSockets[10]: Duplicate value: "/run/app.sock"`,
			},
		},
		"reverse ports are ranges of TCP ports": {
			spec: v1.TargetClassSpec{Ports: v1.PortPolicy{Reverse: []v1.PortRange{
				{Port: 0, Protocol: "TCP"}, {Port: 1, EndPort: 65536, Protocol: "TCP"}, {Port: 81, EndPort: 80, Protocol: "TCP"}, {Port: 53, Protocol: "UDP"}, {Port: 1},
			}}},
			want: []string{
				"spec.ports.reverse[2].endPort: Invalid value: 80: must not be less than `port` (81)",
				`spec.ports.reverse[3].protocol: Unsupported value: "UDP": supported values: "TCP"`,
				`spec.ports.reverse[0].port: Required value`,
				`spec.ports.reverse[1].endPort: Invalid value: 65536: must be less than or equal to 65535`,
				`spec.ports.reverse[4].protocol: Required value`,
			},
		},
		"limits are at least 1": {
			spec: limits(0, 0),
			want: []string{
				`spec.limits.sessionsPerUser: Invalid value: 0: must be greater than or equal to 1`,
				`spec.limits.sessionsPerTarget: Invalid value: 0: must be greater than or equal to 1`,
				`spec.limits.idleTimeoutSeconds: Invalid value: 0: must be greater than or equal to 1`,
				`spec.limits.maxDurationSeconds: Invalid value: 0: must be greater than or equal to 1`,
			},
		},
		"limits are bounded": {
			spec: limits(10001, 2592001),
			want: []string{
				`spec.limits.sessionsPerUser: Invalid value: 10001: must be less than or equal to 10000`,
				`spec.limits.sessionsPerTarget: Invalid value: 10001: must be less than or equal to 10000`,
				`spec.limits.idleTimeoutSeconds: Invalid value: 2592001: must be less than or equal to 2592000`,
				`spec.limits.maxDurationSeconds: Invalid value: 2592001: must be less than or equal to 2592000`,
			},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			class := newClass(tc.spec)
			if diff := cmp.Diff(tc.want, validateClass(t, class, nil)); diff != "" {
				t.Errorf("errors of a new class (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.want, validateClass(t, class, newClass(v1.TargetClassSpec{}))); diff != "" {
				t.Errorf("errors of a class that comes to be so (-want +got):\n%s", diff)
			}
			changed := class.DeepCopy()
			changed.Labels = map[string]string{"tier": "front"}
			changed.Spec.AgentUser = !changed.Spec.AgentUser
			if got := validateClass(t, changed, class); got != nil {
				t.Errorf("errors of a class that was so before: %q", got)
			}
		})
	}

	t.Run("a class's name is a subdomain", func(t *testing.T) {
		class := newClass(v1.TargetClassSpec{})
		class.Name = "Standard"
		if diff := cmp.Diff([]string{`metadata.name: Invalid value: "Standard": ` + subdomainText}, validateClass(t, class, nil)); diff != "" {
			t.Errorf("errors (-want +got):\n%s", diff)
		}
	})
	t.Run("a class has no namespace", func(t *testing.T) {
		class := newClass(v1.TargetClassSpec{})
		class.Namespace = "shop"
		if diff := cmp.Diff([]string{`metadata.namespace: Forbidden: not allowed on this type`}, validateClass(t, class, nil)); diff != "" {
			t.Errorf("errors (-want +got):\n%s", diff)
		}
	})
}

func TestValidateTargetClassUpdate(t *testing.T) {
	cases := map[string]struct {
		oldSpec, newSpec v1.TargetClassSpec
		want             []string
	}{
		"a wrong entry stays while others come, go and move": {
			oldSpec: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: []string{"10.0.0.0/8", "10.0.0.1/8", "192.0.2.0/24"}}},
			newSpec: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: []string{"10.0.0.1/8", "198.51.100.0/24", "10.0.0.0/8"}}},
		},
		"a new wrong entry is refused beside an old one": {
			oldSpec: v1.TargetClassSpec{Agents: []string{"a_b"}},
			newSpec: v1.TargetClassSpec{Agents: []string{"a_b", "c d"}},
			want:    []string{`spec.agents[1]: Invalid value: "c d": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`},
		},
		"an entry isn't excused by its likes in another list": {
			oldSpec: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: []string{"10.0.0.1/8"}}},
			newSpec: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Deny: []string{"10.0.0.1/8"}}},
			want:    []string{`spec.addresses.deny[0]: Invalid value: "10.0.0.1/8": must not have bits set beyond the prefix length`},
		},
		"ranges of ports are replaced as a whole": {
			oldSpec: v1.TargetClassSpec{Ports: v1.PortPolicy{Allowed: []v1.PortRange{{Port: 81, EndPort: 80, Protocol: "TCP"}}}},
			newSpec: v1.TargetClassSpec{Ports: v1.PortPolicy{Allowed: []v1.PortRange{{Port: 81, EndPort: 80, Protocol: "TCP"}, {Port: 1, Protocol: "TCP"}}}},
			want:    []string{"spec.ports.allowed[0].endPort: Invalid value: 80: must not be less than `port` (81)"},
		},
		"a wrong limit stays while another changes": {
			oldSpec: v1.TargetClassSpec{Limits: v1.SessionLimits{SessionsPerUser: ptr.To[int32](0)}},
			newSpec: v1.TargetClassSpec{Limits: v1.SessionLimits{SessionsPerUser: ptr.To[int32](0), SessionsPerTarget: ptr.To[int32](-1)}},
			want:    []string{`spec.limits.sessionsPerTarget: Invalid value: -1: must be greater than or equal to 1`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, validateClass(t, newClass(tc.newSpec), newClass(tc.oldSpec))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}
