package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func classOf(spec v1.TargetClassSpec) *v1.TargetClass {
	return &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{Name: "standard"}, Spec: spec}
}

func targetOf(spec v1.TargetSpec) *v1.Target {
	if spec.ClassName == "" {
		spec.ClassName = "standard"
	}
	return &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop"}, Spec: spec}
}

func processOf(user string) v1.TargetSpec {
	return v1.TargetSpec{AgentName: "edge", Replicas: ptr.To[int32](1), Process: &v1.ProcessSource{Command: []string{"sleep", "1"}, User: user}}
}

func sshOf(user string, hosts ...string) v1.TargetSpec {
	ssh := &v1.SSHSource{User: user, CredentialsSecretRef: v1.SecretReference{Name: "key"}}
	for i, host := range hosts {
		ssh.Endpoints = append(ssh.Endpoints, v1.Endpoint{Name: fmt.Sprintf("e%d", i), Host: host, Port: 22})
	}
	return v1.TargetSpec{SSH: ssh}
}

func tcpOf(hosts ...string) v1.TargetSpec {
	return v1.TargetSpec{TCP: &v1.TCPSource{Endpoints: sshOf("", hosts...).SSH.Endpoints}}
}

func with(spec v1.TargetSpec, change func(*v1.TargetSpec)) v1.TargetSpec {
	spec = *spec.DeepCopy()
	change(&spec)
	return spec
}

func TestCheck(t *testing.T) {
	everything := v1.TargetClassSpec{
		Sources:   []string{"process", "container", "ssh", "tcp"},
		Agents:    []string{"*"},
		Users:     []string{"*"},
		AgentUser: true,
	}
	limited := func(change func(*v1.TargetClassSpec)) v1.TargetClassSpec {
		spec := *everything.DeepCopy()
		change(&spec)
		return spec
	}
	noProcess := limited(func(c *v1.TargetClassSpec) { c.Sources = []string{"ssh", "tcp"} })
	noSSH := limited(func(c *v1.TargetClassSpec) { c.Sources = []string{"tcp"} })
	users := func(users ...string) v1.TargetClassSpec {
		return limited(func(c *v1.TargetClassSpec) { c.Users, c.AgentUser = users, false })
	}
	web := v1.PortPolicy{Allowed: []v1.PortRange{{Port: 80}, {Port: 8000, EndPort: 8100}, {Port: 53, Protocol: v1.ProtocolUDP}}}
	webOnly := limited(func(c *v1.TargetClassSpec) { c.Ports = web })
	ports := func(ports ...v1.TargetPort) v1.TargetSpec {
		return with(processOf("app"), func(s *v1.TargetSpec) { s.Ports = ports })
	}

	const (
		noProcessError = `spec.process: Forbidden: class "standard" allows the sources: ssh, tcp`
		noSSHError     = `spec.ssh: Forbidden: class "standard" allows the sources: tcp`
		loopbackError  = `class "standard" does not allow the address %s: %s (loopback) has to be opened by an entry of addresses.allow that lies within it`
		webPorts       = `class "standard" allows the ports: 80 TCP, 8000-8100 TCP, 53 UDP`
	)
	processUser := func(users string) string {
		return `spec.process.user: Forbidden: class "standard" allows the users: ` + users
	}
	sshUser := func(users string) string {
		return `spec.ssh.user: Forbidden: class "standard" allows the users: ` + users
	}

	tests := map[string]struct {
		class    v1.TargetClassSpec
		target   v1.TargetSpec
		old      *v1.TargetSpec
		services []netip.Prefix
		want     []string
	}{
		"a class that allows everything allows a process":   {class: everything, target: processOf("")},
		"a class that allows everything allows a container": {class: everything, target: v1.TargetSpec{AgentName: "edge", Container: &v1.ContainerSource{Image: "x"}}},
		"a class that allows everything allows SSH":         {class: everything, target: sshOf("admin", "192.0.2.1", "db.example")},
		"a class that allows everything allows TCP":         {class: everything, target: tcpOf("192.0.2.1", "2001:db8::1", "db.example")},

		"an empty class allows no process": {target: processOf("app"), want: []string{
			`spec.process: Forbidden: class "standard" allows the sources: none`,
			`spec.agentName: Forbidden: class "standard" allows the agents: none`,
			processUser("none"),
		}},
		"an empty class allows no SSH": {target: sshOf("admin", "192.0.2.1"), want: []string{
			`spec.ssh: Forbidden: class "standard" allows the sources: none`,
			sshUser("none"),
		}},
		"a target without a source isn't allowed": {class: everything, want: []string{
			`spec: Forbidden: class "standard" allows the sources: process, container, ssh, tcp`,
		}},
		"of two sources the one that isn't allowed is refused": {class: noProcess,
			target: with(sshOf("admin", "192.0.2.1"), func(s *v1.TargetSpec) { s.AgentName, s.Process = "edge", processOf("app").Process }),
			want:   []string{noProcessError}},
		"the wildcard is none for sources": {class: limited(func(c *v1.TargetClassSpec) { c.Sources = []string{"*"} }), target: tcpOf("192.0.2.1"),
			want: []string{`spec.tcp: Forbidden: class "standard" allows the sources: *`}},

		"an agent that is named is allowed": {class: limited(func(c *v1.TargetClassSpec) { c.Agents = []string{"edge"} }), target: processOf("")},
		"another agent isn't": {class: limited(func(c *v1.TargetClassSpec) { c.Agents = []string{"core", "edge-1"} }), target: processOf(""),
			want: []string{`spec.agentName: Forbidden: class "standard" allows the agents: core, edge-1`}},
		"a reached source needs no agent": {class: limited(func(c *v1.TargetClassSpec) { c.Agents = nil }), target: tcpOf("192.0.2.1")},
		"a reached source that names an agent needs to be allowed to": {class: limited(func(c *v1.TargetClassSpec) { c.Agents = nil }),
			target: with(tcpOf("192.0.2.1"), func(s *v1.TargetSpec) { s.AgentName = "edge" }),
			want:   []string{`spec.agentName: Forbidden: class "standard" allows the agents: none`}},

		"a process may leave its user out only with agentUser": {class: users("*", "root"), target: processOf(""),
			want: []string{`spec.process.user: Forbidden: class "standard" doesn't allow that it is left out, as agentUser would: it allows the users: *, root`}},
		"agentUser doesn't let a login leave its user out": {class: everything, target: sshOf("", "192.0.2.1"),
			want: []string{`spec.ssh.user: Forbidden: class "standard" allows the users: *; root has to be named`}},
		"an empty entry doesn't let a login leave its user out": {class: users(""), target: sshOf("", "192.0.2.1"),
			want: []string{`spec.ssh.user: Forbidden: class "standard" allows the users: ; root has to be named`}},
		"a user that is named is allowed":                       {class: users("app"), target: processOf("app")},
		"a number that is named is allowed":                     {class: users("33"), target: processOf("33")},
		"another user isn't":                                    {class: users("app", "www-data"), target: processOf("apps"), want: []string{processUser("app, www-data")}},
		"a name doesn't stand for its number":                   {class: users("www-data"), target: processOf("33"), want: []string{processUser("www-data")}},
		"the wildcard covers a name":                            {class: users("*"), target: processOf("app")},
		"the wildcard covers a number":                          {class: users("*"), target: processOf("1000")},
		"the wildcard covers a number that begins in zeros":     {class: users("*"), target: sshOf("007", "192.0.2.1")},
		"the wildcard covers a name that only begins like root": {class: users("*"), target: processOf("rooty")},
		"the wildcard covers a user of a domain":                {class: users("*"), target: sshOf(`CORP\admin@example.com`, "192.0.2.1")},
		"root isn't covered by the wildcard":                    {class: users("*"), target: processOf("root"), want: []string{processUser("*; root has to be named")}},
		"0 isn't covered by the wildcard":                       {class: users("*"), target: processOf("0"), want: []string{processUser("*; root has to be named")}},
		"root may be named as root":                             {class: users("root"), target: processOf("root")},
		"root may be named as 0":                                {class: users("0"), target: processOf("root")},
		"0 may be named as root":                                {class: users("*", "root"), target: processOf("0")},
		"a login for root isn't covered by the wildcard":        {class: users("*"), target: sshOf("root", "192.0.2.1"), want: []string{sshUser("*; root has to be named")}},
		"a login for root may be named":                         {class: users("root"), target: sshOf("root", "192.0.2.1")},
		"root with a style of authentication is root":           {class: users("*"), target: sshOf("root:pam", "192.0.2.1"), want: []string{sshUser("*; root has to be named")}},
		"root with a role is root":                              {class: users("*"), target: sshOf("root/sysadm_r", "192.0.2.1"), want: []string{sshUser("*; root has to be named")}},
		"root in upper case may be root":                        {class: users("*"), target: sshOf("ROOT", "192.0.2.1"), want: []string{sshUser("*; root has to be named")}},
		"zero in many digits is root":                           {class: users("*"), target: processOf("000"), want: []string{processUser("*; root has to be named")}},
		"zero with a sign is root":                              {class: users("*"), target: processOf("-0"), want: []string{processUser("*; root has to be named")}},
		"a number that wraps round to zero is root":             {class: users("*"), target: processOf("4294967296"), want: []string{processUser("*; root has to be named")}},
		"the number that changes nothing is root":               {class: users("*"), target: processOf("4294967295"), want: []string{processUser("*; root has to be named")}},
		"so is its other spelling":                              {class: users("*"), target: processOf("-1"), want: []string{processUser("*; root has to be named")}},
		"a user with a style isn't the user":                    {class: users("app"), target: sshOf("app:x", "192.0.2.1"), want: []string{sshUser("app")}},
		"the user * isn't root":                                 {class: users("root"), target: sshOf("*", "192.0.2.1"), want: []string{sshUser("root")}},

		"loopback isn't allowed as an endpoint": {class: everything, target: sshOf("admin", "192.0.2.1", "127.0.0.1"),
			want: []string{"spec.ssh.endpoints[1].host: Forbidden: " + fmt.Sprintf(loopbackError, "127.0.0.1", "127.0.0.0/8")}},
		"each endpoint is judged": {class: everything, target: tcpOf("::1", "192.0.2.1", "127.8.8.8"), want: []string{
			"spec.tcp.endpoints[0].host: Forbidden: " + fmt.Sprintf(loopbackError, "::1", "::1/128"),
			"spec.tcp.endpoints[2].host: Forbidden: " + fmt.Sprintf(loopbackError, "127.8.8.8", "127.0.0.0/8"),
		}},
		"an address outside of allow isn't allowed": {class: limited(func(c *v1.TargetClassSpec) { c.Addresses.Allow = []string{"10.20.0.0/16"} }), target: tcpOf("10.20.1.1", "10.21.1.1"),
			want: []string{`spec.tcp.endpoints[1].host: Forbidden: class "standard" does not allow the address 10.21.1.1: its addresses.allow lists 10.20.0.0/16`}},
		"a name is judged when it is dialled": {class: limited(func(c *v1.TargetClassSpec) { c.Addresses.Allow = []string{"10.20.0.0/16"} }), target: tcpOf("localhost")},
		"a service range isn't allowed": {class: everything, target: tcpOf("10.96.0.1"), services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")},
			want: []string{`spec.tcp.endpoints[0].host: Forbidden: class "standard" does not allow the address 10.96.0.1: 10.96.0.0/12 (the cluster's services) has to be opened by an entry of addresses.allow that lies within it`}},

		"ports within ranges are allowed": {class: webOnly, target: ports(
			v1.TargetPort{Port: 80, Protocol: v1.ProtocolTCP}, v1.TargetPort{Port: 8000}, v1.TargetPort{Port: 8100, HostPort: 8099}, v1.TargetPort{Port: 53, Protocol: v1.ProtocolUDP})},
		"ports outside of ranges aren't": {class: webOnly, target: ports(v1.TargetPort{Port: 8101}, v1.TargetPort{Port: 80}, v1.TargetPort{Port: 7999}),
			want: []string{"spec.ports[0].port: Forbidden: " + webPorts, "spec.ports[2].port: Forbidden: " + webPorts}},
		"a port of another protocol isn't": {class: webOnly, target: ports(v1.TargetPort{Port: 80, Protocol: v1.ProtocolUDP}, v1.TargetPort{Port: 53}),
			want: []string{"spec.ports[0].port: Forbidden: " + webPorts, "spec.ports[1].port: Forbidden: " + webPorts}},
		"a host port has to be allowed too": {class: webOnly, target: ports(v1.TargetPort{Port: 80, HostPort: 22}),
			want: []string{"spec.ports[0].hostPort: Forbidden: " + webPorts}},
		"unlisted ports don't widen what may be listed": {class: limited(func(c *v1.TargetClassSpec) { c.Ports = web; c.Ports.Unlisted = true }), target: ports(v1.TargetPort{Port: 22}),
			want: []string{"spec.ports[0].port: Forbidden: " + webPorts}},
		"without ranges every port is allowed": {class: everything, target: ports(v1.TargetPort{Port: 22, HostPort: 1}, v1.TargetPort{Port: 65535, Protocol: v1.ProtocolUDP})},
		"ranges that are wrong allow nothing": {class: limited(func(c *v1.TargetClassSpec) {
			c.Ports.Allowed = []v1.PortRange{{Port: 0, EndPort: 65535}, {Port: 30, EndPort: 20}, {Port: 1, EndPort: 65536}, {Port: 22, Protocol: "ANY"}}
		}), target: ports(v1.TargetPort{Port: 25}),
			want: []string{`spec.ports[0].port: Forbidden: class "standard" allows the ports: 0-65535 TCP, 30-20 TCP, 1-65536 TCP, 22 ANY`}},
		"a protocol that nobody knows isn't allowed": {class: everything, target: ports(v1.TargetPort{Port: 25, Protocol: "SCTP"}),
			want: []string{`spec.ports[0].port: Forbidden: class "standard" allows the ports: 1-65535, TCP and UDP`}},

		"an update that changes nothing isn't refused": {class: v1.TargetClassSpec{Addresses: v1.AddressPolicy{Deny: []string{"::/0"}}, Ports: web},
			target: with(sshOf("root", "::1"), func(s *v1.TargetSpec) { s.Ports = []v1.TargetPort{{Port: 22}} }),
			old:    ptr.To(with(sshOf("root", "::1"), func(s *v1.TargetSpec) { s.Ports = []v1.TargetPort{{Port: 22}} }))},
		"an update to another class is judged whole": {class: noProcess, target: processOf("app"),
			old: ptr.To(with(processOf("app"), func(s *v1.TargetSpec) { s.ClassName = "lax" })), want: []string{noProcessError}},
		"a process of which nothing new runs isn't refused": {class: noProcess,
			target: with(processOf("app"), func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](0); s.RestartPolicy = v1.RestartNever }), old: ptr.To(processOf("app"))},
		"another command of a source that isn't allowed any more is refused": {class: noProcess,
			target: with(processOf("app"), func(s *v1.TargetSpec) { s.Process.Args = []string{"x"} }), old: ptr.To(processOf("app")), want: []string{noProcessError}},
		"more instances of a source that isn't allowed any more are refused": {class: noProcess,
			target: with(processOf("app"), func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](2) }), old: ptr.To(processOf("app")), want: []string{noProcessError}},
		"one instance instead of none is more": {class: noProcess,
			target: with(processOf("app"), func(s *v1.TargetSpec) { s.Replicas = nil }), old: ptr.To(with(processOf("app"), func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](0) })), want: []string{noProcessError}},
		"another command of a user who isn't allowed any more is refused": {class: users("*"),
			target: with(processOf("root"), func(s *v1.TargetSpec) { s.Process.Command = []string{"sh"} }), old: ptr.To(processOf("root")), want: []string{processUser("*; root has to be named")}},
		"an endpoint less of a source that isn't allowed any more isn't refused": {class: noSSH,
			target: sshOf("admin", "192.0.2.1"), old: ptr.To(sshOf("admin", "192.0.2.1", "192.0.2.2"))},
		"an endpoint more of a source that isn't allowed any more is refused": {class: noSSH,
			target: sshOf("admin", "192.0.2.1", "192.0.2.2"), old: ptr.To(sshOf("admin", "192.0.2.1")), want: []string{noSSHError}},
		"other credentials for a source that isn't allowed any more are refused": {class: noSSH,
			target: with(sshOf("admin", "192.0.2.1"), func(s *v1.TargetSpec) { s.SSH.CredentialsSecretRef.Name = "other" }), old: ptr.To(sshOf("admin", "192.0.2.1")), want: []string{noSSHError}},
		"another source is judged, whatever its endpoints are": {class: noSSH,
			target: with(sshOf("admin", "192.0.2.1"), func(s *v1.TargetSpec) { s.TCP = &v1.TCPSource{} }), old: ptr.To(sshOf("admin", "192.0.2.1")), want: []string{noSSHError}},
		"a source without endpoints is judged when it is created": {class: users(), target: v1.TargetSpec{AgentName: "", SSH: &v1.SSHSource{User: "admin"}}, old: &v1.TargetSpec{},
			want: []string{sshUser("none")}},
		"an endpoint that was there and moved in the list isn't refused": {class: everything,
			target: with(tcpOf("192.0.2.9"), func(s *v1.TargetSpec) {
				s.TCP.Endpoints = append(s.TCP.Endpoints, v1.Endpoint{Name: "e0", Host: "127.0.0.1", Port: 22})
			}),
			old: ptr.To(tcpOf("127.0.0.1"))},
		"another port of an endpoint that isn't allowed any more is refused": {class: everything,
			target: with(tcpOf("127.0.0.1"), func(s *v1.TargetSpec) { s.TCP.Endpoints[0].Port = 23 }), old: ptr.To(tcpOf("127.0.0.1")),
			want: []string{"spec.tcp.endpoints[0].host: Forbidden: " + fmt.Sprintf(loopbackError, "127.0.0.1", "127.0.0.0/8")}},
		"a port that was there isn't refused, nor for another name or host port": {class: webOnly,
			target: ports(v1.TargetPort{Name: "b", Port: 22, HostPort: 80}), old: ptr.To(ports(v1.TargetPort{Name: "a", Port: 22, Protocol: v1.ProtocolTCP}))},
		"a host port that was there isn't refused": {class: webOnly,
			target: ports(v1.TargetPort{Port: 80, HostPort: 22}), old: ptr.To(ports(v1.TargetPort{Port: 8000, HostPort: 22}))},
		"a port that was there with another protocol is refused": {class: webOnly,
			target: ports(v1.TargetPort{Port: 22, Protocol: v1.ProtocolUDP}), old: ptr.To(ports(v1.TargetPort{Port: 22})), want: []string{"spec.ports[0].port: Forbidden: " + webPorts}},
		"what was a host port isn't taken for a port that was there": {class: webOnly,
			target: ports(v1.TargetPort{Port: 22}), old: ptr.To(ports(v1.TargetPort{Port: 80, HostPort: 22})), want: []string{"spec.ports[0].port: Forbidden: " + webPorts}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			opts := CheckOptions{Services: tt.services}
			if tt.old != nil {
				opts.Old = targetOf(*tt.old)
			}
			var got []string
			for _, err := range Check(classOf(tt.class), targetOf(tt.target), opts) {
				got = append(got, err.Error())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCheckWithoutClass(t *testing.T) {
	target := targetOf(tcpOf("192.0.2.1"))
	errs := Check(nil, target, CheckOptions{Old: target})
	if diff := cmp.Diff("spec.className: Forbidden: without a TargetClass nothing is allowed", errs.ToAggregate().Error()); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
}

// big is a class and a target that are as long as they may be, with which
// everything is wrong.
func big() (*v1.TargetClass, *v1.Target) {
	class := classOf(v1.TargetClassSpec{})
	class.Name = strings.Repeat("c", 253)
	target := sshOf(strings.Repeat("u", 256))
	target.AgentName = "edge"
	for i := range 256 {
		long := fmt.Sprintf("%d-%s", i, strings.Repeat("ü", 120))
		class.Spec.Sources = append(class.Spec.Sources, long)
		class.Spec.Agents = append(class.Spec.Agents, long)
		class.Spec.Users = append(class.Spec.Users, long)
		class.Spec.Addresses.Allow = append(class.Spec.Addresses.Allow, fmt.Sprintf("2001:db8:1234:5678:9abc:%x::/96", i+0x1000))
		class.Spec.Addresses.Deny = append(class.Spec.Addresses.Deny, fmt.Sprintf("2001:db8:8765:4321:9abc:%x::/96", i+0x1000))
		class.Spec.Ports.Allowed = append(class.Spec.Ports.Allowed, v1.PortRange{Port: 10000, EndPort: 20000})
		class.Spec.Ports.UnixSockets = append(class.Spec.Ports.UnixSockets, "/run/"+long)
		class.Spec.Ports.Reverse = append(class.Spec.Ports.Reverse, v1.PortRange{Port: 10000, EndPort: 20000})
		target.SSH.Endpoints = append(target.SSH.Endpoints, v1.Endpoint{Name: fmt.Sprintf("e%d", i), Host: fmt.Sprintf("2001:db8:1111:2222:3333:4444:5555:%x", i+0x1000), Port: 22})
	}
	for i := range 64 {
		target.Ports = append(target.Ports, v1.TargetPort{Name: fmt.Sprintf("p%d", i), Port: int32(i + 1), Protocol: v1.ProtocolTCP})
	}
	return class, targetOf(target)
}

func TestMessagesAreBounded(t *testing.T) {
	class, target := big()
	messages := map[string]string{
		"port that isn't allowed": AllowPort(class, target, 22, v1.ProtocolTCP).Error(),
		"address":                 NewAddresses(class, nil).Allows(netip.MustParseAddr("::1%" + strings.Repeat("z", 4000))).Error(),
		"unix socket":             AllowSocket(class, "/"+strings.Repeat("ü\x01", 1000)).Error(),
		"target":                  AllowTarget(class, target, nil).Error(),
	}
	_, err := AllowReverse(class, 80)
	messages["reverse forward"] = err.Error()
	for i, err := range Check(class, target, CheckOptions{}) {
		messages[fmt.Sprintf("error %d of Check", i)] = err.Detail
	}
	if want := maxErrors + 5; len(messages) != want {
		t.Errorf("%d messages, want %d", len(messages), want)
	}
	class.Spec.Ports.Allowed = nil
	messages["port that isn't listed"] = AllowPort(class, target, 1000, v1.ProtocolTCP).Error()
	for of, message := range messages {
		if len(message) > maxMessageBytes+len("…") {
			t.Errorf("%s: %d bytes, want at most %d:\n%s", of, len(message), maxMessageBytes, message)
		}
		if !strings.Contains(message, class.Name) {
			t.Errorf("%s doesn't name the class:\n%s", of, message)
		}
		if strings.ToValidUTF8(message, "") != message {
			t.Errorf("%s isn't UTF-8:\n%q", of, message)
		}
	}
	if got, want := messages["port that isn't listed"], "p0 (1 TCP), p1 (2 TCP)"; !strings.Contains(got, want) || !strings.Contains(got, " more") {
		t.Errorf("got %q, want it to list %q and how many more", got, want)
	}
}

func TestAllowTarget(t *testing.T) {
	services := []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}
	allowed := v1.TargetClassSpec{Sources: []string{"process", "tcp"}, Agents: []string{"edge"}, Users: []string{"web"}, Ports: v1.PortPolicy{Allowed: []v1.PortRange{{Port: 1}}}}
	listing := func(spec *v1.TargetSpec) {
		spec.Ports = []v1.TargetPort{{Name: "http", Port: 80, Protocol: v1.ProtocolTCP}}
	}
	tests := map[string]struct {
		class  *v1.TargetClass
		target v1.TargetSpec
		want   string
	}{
		"what the class allows, with a port that it doesn't": {class: classOf(allowed), target: with(processOf("web"), listing)},
		"without a class nothing is": {
			target: processOf("web"),
			want:   "without a TargetClass nothing is allowed",
		},
		"all that isn't is said": {
			class: classOf(v1.TargetClassSpec{}), target: processOf("web"),
			want: `spec.process: class "standard" allows the sources: none; spec.agentName: class "standard" allows the agents: none; spec.process.user: class "standard" allows the users: none`,
		},
		"nor is an endpoint among the cluster's services": {
			class: classOf(allowed), target: tcpOf("10.96.0.1"),
			want: `spec.tcp.endpoints[0].host: class "standard" does not allow the address 10.96.0.1: 10.96.0.0/12 (the cluster's services) has to be opened by an entry of addresses.allow that lies within it`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			target := targetOf(tt.target)
			ports := len(target.Spec.Ports)
			got := ""
			if err := AllowTarget(tt.class, target, services); err != nil {
				got = err.Error()
				if _, denied := errors.AsType[*DeniedError](err); !denied {
					t.Errorf("a %T, want a *DeniedError", err)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if len(target.Spec.Ports) != ports {
				t.Error("the target isn't what it was")
			}
		})
	}
	class, target := big()
	if text := AllowTarget(class, target, nil).Error(); !strings.HasSuffix(text, "; and more") && !strings.HasSuffix(text, "…") {
		t.Errorf("it doesn't say that there is more:\n%s", text)
	}
}

func TestAllowPort(t *testing.T) {
	target := targetOf(with(processOf("app"), func(s *v1.TargetSpec) {
		s.Ports = []v1.TargetPort{
			{Name: "http", Port: 80, Protocol: v1.ProtocolTCP},
			{Name: "ssh", Port: 22, HostPort: 2222},
			{Name: "dns", Port: 53, Protocol: v1.ProtocolUDP},
		}
	}))
	ranges := []v1.PortRange{{Port: 80, EndPort: 90}, {Port: 53, Protocol: v1.ProtocolUDP}}
	tests := map[string]struct {
		policy   v1.PortPolicy
		port     uint16
		protocol v1.Protocol
		want     string
	}{
		"a listed port is open":                    {port: 80, protocol: v1.ProtocolTCP},
		"without a protocol, TCP is meant":         {port: 22},
		"a listed UDP port is open":                {port: 53, protocol: v1.ProtocolUDP},
		"a listed port in a range is open":         {policy: v1.PortPolicy{Allowed: ranges}, port: 80, protocol: v1.ProtocolTCP},
		"unlisted opens the others":                {policy: v1.PortPolicy{Unlisted: true}, port: 3306, protocol: v1.ProtocolTCP},
		"unlisted opens the others within a range": {policy: v1.PortPolicy{Unlisted: true, Allowed: ranges}, port: 90, protocol: v1.ProtocolTCP},
		"a port that isn't listed is closed": {port: 3306, protocol: v1.ProtocolTCP,
			want: `class "standard" allows ports to be forwarded only if the target's spec lists them; port 3306 (TCP) is not among those that are open: http (80 TCP), ssh (22 TCP), dns (53 UDP)`},
		"a port that is listed for the other protocol is closed": {port: 53, protocol: v1.ProtocolTCP,
			want: `class "standard" allows ports to be forwarded only if the target's spec lists them; port 53 (TCP) is not among those that are open: http (80 TCP), ssh (22 TCP), dns (53 UDP)`},
		"a host port isn't what clients ask for": {port: 2222,
			want: `class "standard" allows ports to be forwarded only if the target's spec lists them; port 2222 (TCP) is not among those that are open: http (80 TCP), ssh (22 TCP), dns (53 UDP)`},
		"a listed port outside of the ranges is closed": {policy: v1.PortPolicy{Allowed: ranges}, port: 22, protocol: v1.ProtocolTCP,
			want: `class "standard" does not allow port 22 (TCP) to be forwarded; it allows the ports: 80-90 TCP, 53 UDP`},
		"open are only ports that are listed and in a range": {policy: v1.PortPolicy{Allowed: ranges}, port: 81, protocol: v1.ProtocolTCP,
			want: `class "standard" allows ports to be forwarded only if the target's spec lists them; port 81 (TCP) is not among those that are open: http (80 TCP), dns (53 UDP)`},
		"unlisted keeps to the ranges": {policy: v1.PortPolicy{Unlisted: true, Allowed: ranges}, port: 91, protocol: v1.ProtocolTCP,
			want: `class "standard" does not allow port 91 (TCP) to be forwarded; it allows the ports: 80-90 TCP, 53 UDP`},
		"port 0 is closed": {policy: v1.PortPolicy{Unlisted: true}, port: 0,
			want: `class "standard" does not allow port 0 (TCP) to be forwarded; it allows the ports: 1-65535, TCP and UDP`},
		"another protocol is closed": {policy: v1.PortPolicy{Unlisted: true}, port: 80, protocol: "tcp",
			want: `class "standard" does not allow port 80 (tcp) to be forwarded; it allows the ports: 1-65535, TCP and UDP`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := ""
			if err := AllowPort(classOf(v1.TargetClassSpec{Ports: tt.policy}), target, tt.port, tt.protocol); err != nil {
				got = err.Error()
				assertDenied(t, err, "standard")
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("without a class every port is closed", func(t *testing.T) {
		assertDenied(t, AllowPort(nil, target, 80, v1.ProtocolTCP), "")
		assertDenied(t, AllowPortNumber(nil, target, 80), "")
	})
	t.Run("a number is open by one protocol or the other", func(t *testing.T) {
		class := classOf(v1.TargetClassSpec{})
		for number, want := range map[uint16]bool{80: true, 53: true, 22: true, 3306: false} {
			if err := AllowPortNumber(class, target, number); err == nil != want {
				t.Errorf("port %d: %v", number, err)
			}
		}
		if got, want := AllowPortNumber(class, target, 3306).Error(), AllowPort(class, target, 3306, v1.ProtocolTCP).Error(); got != want {
			t.Errorf("error %q, want that of TCP: %q", got, want)
		}
	})
}

func TestAllowSocket(t *testing.T) {
	const run = `class "standard" does not allow connections to the unix socket %s; it allows: /run/app.sock, /srv/web/; ` +
		"whoever may change the class can add the path to spec.ports.unixSockets"
	usual := []string{"/run/app.sock", "/srv/web/"}
	for name, tt := range map[string]struct {
		allowed []string
		path    string
		want    string
	}{
		"a path that is listed":                          {usual, "/run/app.sock", ""},
		"a path below a directory that is":               {usual, "/srv/web/a", ""},
		"one far below it":                               {usual, "/srv/web/a/b/c.sock", ""},
		"everything, where the root is listed":           {[]string{"/"}, "/run/docker.sock", ""},
		"another path":                                   {usual, "/run/docker.sock", fmt.Sprintf(run, `"/run/docker.sock"`)},
		"one that begins like it":                        {usual, "/run/app.sock2", fmt.Sprintf(run, `"/run/app.sock2"`)},
		"one below a socket":                             {usual, "/run/app.sock/x", fmt.Sprintf(run, `"/run/app.sock/x"`)},
		"a directory itself":                             {usual, "/srv/web", fmt.Sprintf(run, `"/srv/web"`)},
		"a directory with its slash":                     {usual, "/srv/web/", fmt.Sprintf(run, `"/srv/web/"`)},
		"a neighbour of a directory":                     {usual, "/srv/web2/a", fmt.Sprintf(run, `"/srv/web2/a"`)},
		"a way out of a directory":                       {usual, "/srv/web/../../run/docker.sock", fmt.Sprintf(run, `"/srv/web/../../run/docker.sock"`)},
		"a way out that goes nowhere":                    {usual, "/srv/web/./a", fmt.Sprintf(run, `"/srv/web/./a"`)},
		"needless slashes":                               {usual, "/srv/web//a", fmt.Sprintf(run, `"/srv/web//a"`)},
		"a path that isn't absolute":                     {[]string{"/", "app.sock"}, "app.sock", `class "standard" does not allow connections to the unix socket "app.sock"; it allows: /, app.sock; whoever may change the class can add the path to spec.ports.unixSockets`},
		"an abstract socket":                             {[]string{"/"}, "@app", `class "standard" does not allow connections to the unix socket "@app"; it allows: /; whoever may change the class can add the path to spec.ports.unixSockets`},
		"a path with a NUL, after which another may end": {usual, "/srv/web/a\x00b", fmt.Sprintf(run, `"/srv/web/a\x00b"`)},
		"the root":                                       {[]string{"/"}, "/", `class "standard" does not allow connections to the unix socket "/"; it allows: /; whoever may change the class can add the path to spec.ports.unixSockets`},
		"no path":                                        {usual, "", fmt.Sprintf(run, `""`)},
		"where nothing is allowed":                       {nil, "/run/app.sock", `class "standard" does not allow connections to the unix socket "/run/app.sock"; it allows: none; whoever may change the class can add the path to spec.ports.unixSockets`},
		"what a stored class says in another way":        {[]string{"/srv//web/", "/srv/../run/", "run/"}, "/run/app.sock", `class "standard" does not allow connections to the unix socket "/run/app.sock"; it allows: /srv//web/, /srv/../run/, run/; whoever may change the class can add the path to spec.ports.unixSockets`},
	} {
		t.Run(name, func(t *testing.T) {
			got := ""
			if err := AllowSocket(classOf(v1.TargetClassSpec{Ports: v1.PortPolicy{UnixSockets: tt.allowed}}), tt.path); err != nil {
				got = err.Error()
				assertDenied(t, err, "standard")
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("without a class", func(t *testing.T) { assertDenied(t, AllowSocket(nil, "/run/app.sock"), "") })
}

func TestAllowReverse(t *testing.T) {
	usual := []v1.PortRange{{Port: 9000}, {Port: 9100, EndPort: 9199, Protocol: v1.ProtocolTCP}}
	tcp := func(first, last int32) v1.PortRange {
		return v1.PortRange{Port: first, EndPort: last, Protocol: v1.ProtocolTCP}
	}
	const allows = "it allows the ports: 9000 TCP, 9100-9199 TCP; whoever may change the class can add the port to spec.ports.reverse"
	const nothing = "it allows the ports: none; whoever may change the class can add the port to spec.ports.reverse"
	for name, tt := range map[string]struct {
		allowed []v1.PortRange
		port    uint16
		want    []v1.PortRange
		wantErr string
	}{
		"a port that is listed":       {usual, 9000, []v1.PortRange{tcp(9000, 9000)}, ""},
		"one in a range":              {usual, 9199, []v1.PortRange{tcp(9199, 9199)}, ""},
		"any port is one that may be": {usual, 0, []v1.PortRange{tcp(9000, 9000), tcp(9100, 9199)}, ""},
		"another port": {usual, 9001, nil,
			`class "standard" does not allow that port 9001 is listened to for a reverse forward; ` + allows},
		"any port, where there is none": {nil, 0, nil,
			`class "standard" does not allow that any port is listened to for a reverse forward; ` + nothing},
		"a port, where there is none": {nil, 9000, nil,
			`class "standard" does not allow that port 9000 is listened to for a reverse forward; ` + nothing},
		"what a stored class says that makes no sense": {
			[]v1.PortRange{{Port: 53, Protocol: v1.ProtocolUDP}, {Port: 0, EndPort: 9}, {Port: 9000, EndPort: 65536}, {Port: 9001, EndPort: 9000}}, 0, nil,
			`class "standard" does not allow that any port is listened to for a reverse forward; ` + nothing},
	} {
		t.Run(name, func(t *testing.T) {
			class := classOf(v1.TargetClassSpec{Ports: v1.PortPolicy{Reverse: tt.allowed}})
			got, err := AllowReverse(class, tt.port)
			text := ""
			if err != nil {
				text = err.Error()
				assertDenied(t, err, "standard")
			}
			if diff := cmp.Diff(tt.wantErr, text); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("without a class", func(t *testing.T) {
		_, err := AllowReverse(nil, 9000)
		assertDenied(t, err, "")
	})
}

func BenchmarkCheck(b *testing.B) {
	usual := classOf(v1.TargetClassSpec{
		Sources:   []string{"ssh", "tcp", "process"},
		Agents:    []string{"edge"},
		Users:     []string{"*"},
		Addresses: v1.AddressPolicy{Allow: []string{"10.20.0.0/16", "10.30.0.0/16"}, Deny: []string{"10.20.9.0/24"}},
		Ports:     v1.PortPolicy{Allowed: []v1.PortRange{{Port: 80}, {Port: 8000, EndPort: 9000}}},
	})
	services := []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}
	process := with(processOf("app"), func(s *v1.TargetSpec) { s.Ports = []v1.TargetPort{{Name: "http", Port: 8080}} })
	bigClass, bigTarget := big()
	for _, bb := range []struct {
		name   string
		class  *v1.TargetClass
		target *v1.Target
		opts   CheckOptions
		want   int
	}{
		{"process", usual, targetOf(process), CheckOptions{Services: services}, 0},
		{"process, updated", usual, targetOf(process), CheckOptions{Services: services, Old: targetOf(process)}, 0},
		{"ssh with 3 addresses", usual, targetOf(sshOf("admin", "10.20.1.1", "10.20.1.2", "10.30.1.1")), CheckOptions{Services: services}, 0},
		{"256 addresses, 512 CIDRs, all wrong", bigClass, bigTarget, CheckOptions{Services: services}, maxErrors},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if errs := Check(bb.class, bb.target, bb.opts); len(errs) != bb.want {
					b.Fatalf("%d errors, want %d: %v", len(errs), bb.want, errs)
				}
			}
		})
	}
}
