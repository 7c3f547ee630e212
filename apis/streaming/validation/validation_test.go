package validation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/ptr"

	api "aaserver.io/aaserver/apis/streaming"
)

// The texts of errors that come from apimachinery.
const (
	labelText     = `a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')`
	subdomainText = `a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`
	ipText        = `must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)`
)

// newTarget makes a valid target around a source, and then what a test wants
// of it.
func newTarget(set func(*api.TargetSpec), changes []func(*api.Target)) *api.Target {
	target := &api.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", ResourceVersion: "1"}}
	set(&target.Spec)
	for _, change := range changes {
		change(target)
	}
	return target
}

func setHosted(spec *api.TargetSpec) {
	spec.AgentName = "edge-17"
	spec.Replicas = ptr.To[int32](2)
	spec.RestartPolicy = api.RestartAlways
	spec.TerminationGracePeriodSeconds = ptr.To[int64](30)
}

func process(changes ...func(*api.Target)) *api.Target {
	return newTarget(func(spec *api.TargetSpec) {
		setHosted(spec)
		spec.Process = &api.ProcessSource{Command: []string{"/usr/bin/myapp"}}
	}, changes)
}

func container(changes ...func(*api.Target)) *api.Target {
	return newTarget(func(spec *api.TargetSpec) {
		setHosted(spec)
		spec.Container = &api.ContainerSource{Image: "registry.example.com:5000/team/web:1.2"}
	}, changes)
}

func ssh(changes ...func(*api.Target)) *api.Target {
	return newTarget(func(spec *api.TargetSpec) {
		spec.SSH = &api.SSHSource{
			Endpoints:            []api.Endpoint{{Name: "a", Host: "a.example.com", Port: 22}},
			User:                 "admin",
			CredentialsSecretRef: api.SecretReference{Name: "login"},
		}
	}, changes)
}

func tcp(changes ...func(*api.Target)) *api.Target {
	return newTarget(func(spec *api.TargetSpec) {
		spec.TCP = &api.TCPSource{Endpoints: []api.Endpoint{{Name: "a", Host: "10.0.0.1", Port: 5432}}}
	}, changes)
}

// many makes n items of their numbers.
func many[T any](n int, item func(i int) T) []T {
	items := make([]T, n)
	for i := range items {
		items[i] = item(i)
	}
	return items
}

func messages(errs field.ErrorList) []string {
	var msgs []string
	for _, err := range errs {
		msgs = append(msgs, err.Error())
	}
	return msgs
}

func certificate(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

type targetCases map[string]struct {
	target *api.Target
	want   []string
}

func (cases targetCases) run(t *testing.T) {
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTarget(tc.target))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateTargetMetadata(t *testing.T) {
	targetCases{
		"a name of 52 characters is the longest": {
			target: process(func(t *api.Target) { t.Name = strings.Repeat("a", 52) }),
		},
		"a name of 53 characters is too long": {
			target: process(func(t *api.Target) { t.Name = strings.Repeat("a", 53) }),
			want:   []string{`metadata.name: Invalid value: "` + strings.Repeat("a", 53) + `": must be no more than 52 bytes`},
		},
		"a name is a label": {
			target: process(func(t *api.Target) { t.Name = "Web" }),
			want:   []string{`metadata.name: Invalid value: "Web": ` + labelText},
		},
		"a name has no dots": {
			target: process(func(t *api.Target) { t.Name = "web.shop" }),
			want:   []string{`metadata.name: Invalid value: "web.shop": must not contain dots`},
		},
		"a name is required": {
			target: process(func(t *api.Target) { t.Name = "" }),
			want:   []string{`metadata.name: Required value: name or generateName is required`},
		},
		"a generated name's prefix leaves room for what is appended": {
			target: process(func(t *api.Target) { t.GenerateName = strings.Repeat("a", 48) }),
			want:   []string{`metadata.generateName: Invalid value: "` + strings.Repeat("a", 48) + `": must be no more than 47 bytes`},
		},
		"a generated name's prefix may end in a dash": {
			target: process(func(t *api.Target) { t.GenerateName = "web-" }),
		},
		"annotations are UTF-8": {
			target: process(func(t *api.Target) { t.Annotations = map[string]string{"b": "\xff", "a": "ü"} }),
			want:   []string{`metadata.annotations: Invalid value: the value of "b" must be valid UTF-8`},
		},
		"a name that isn't UTF-8 is wrong once": {
			target: process(func(t *api.Target) { t.Name = "a\xff" }),
			want:   []string{`metadata.name: Invalid value: "a\xff": ` + labelText},
		},
		"a namespace is required": {
			target: process(func(t *api.Target) { t.Namespace = "" }),
			want:   []string{`metadata.namespace: Required value`},
		},
		"labels are checked": {
			target: process(func(t *api.Target) { t.Labels = map[string]string{"tier": "front end"} }),
			want:   []string{`metadata.labels: Invalid value: "front end": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')`},
		},
	}.run(t)
}

func TestValidateTargetSource(t *testing.T) {
	targetCases{
		"a process is valid":     {target: process()},
		"a container is valid":   {target: container()},
		"an ssh source is valid": {target: ssh()},
		"a tcp source is valid":  {target: tcp()},
		"one source must be there": {
			target: process(func(t *api.Target) { t.Spec.Process = nil }),
			want:   []string{"spec: Required value: must specify one of: `process`, `container`, `ssh`, `tcp`"},
		},
		"two sources are named": {
			target: process(func(t *api.Target) { t.Spec.TCP = tcp().Spec.TCP }),
			want:   []string{"spec: Invalid value: \"{process, tcp}\": must specify exactly one of: `process`, `container`, `ssh`, `tcp`"},
		},
		"all four sources are named": {
			target: process(func(t *api.Target) {
				t.Spec.Container, t.Spec.SSH, t.Spec.TCP = container().Spec.Container, ssh().Spec.SSH, tcp().Spec.TCP
			}),
			want: []string{"spec: Invalid value: \"{process, container, ssh, tcp}\": must specify exactly one of: `process`, `container`, `ssh`, `tcp`"},
		},
		"a class name is a subdomain": {
			target: process(func(t *api.Target) { t.Spec.ClassName = "Standard" }),
			want:   []string{`spec.className: Invalid value: "Standard": ` + subdomainText},
		},
		"an agent's name is a subdomain": {
			target: process(func(t *api.Target) { t.Spec.AgentName = "edge_17" }),
			want:   []string{`spec.agentName: Invalid value: "edge_17": ` + subdomainText},
		},
		"an agent's name is bounded": {
			target: process(func(t *api.Target) { t.Spec.AgentName = strings.Repeat("a", 254) }),
			want:   []string{`spec.agentName: Too long: may not be more than 253 bytes`},
		},
		"a process needs an agent": {
			target: process(func(t *api.Target) { t.Spec.AgentName = "" }),
			want:   []string{`spec.agentName: Required value: must name the agent that hosts the instances`},
		},
		"a container needs an agent": {
			target: container(func(t *api.Target) { t.Spec.AgentName = "" }),
			want:   []string{`spec.agentName: Required value: must name the agent that hosts the instances`},
		},
		"a reached source may have an agent": {
			target: ssh(func(t *api.Target) { t.Spec.AgentName = "edge-17" }),
		},
	}.run(t)
}

func TestValidateTargetHostedFields(t *testing.T) {
	targetCases{
		"no replicas is a number of them": {
			target: process(func(t *api.Target) { t.Spec.Replicas = ptr.To[int32](0) }),
		},
		"256 replicas are the most": {
			target: process(func(t *api.Target) { t.Spec.Replicas = ptr.To[int32](256) }),
		},
		"257 replicas are too many": {
			target: process(func(t *api.Target) { t.Spec.Replicas = ptr.To[int32](257) }),
			want:   []string{`spec.replicas: Invalid value: 257: must be between 0 and 256, inclusive`},
		},
		"fewer than no replicas can't be": {
			target: container(func(t *api.Target) { t.Spec.Replicas = ptr.To[int32](-1) }),
			want:   []string{`spec.replicas: Invalid value: -1: must be between 0 and 256, inclusive`},
		},
		"what defaulting fills in is required": {
			target: process(func(t *api.Target) {
				t.Spec.Replicas, t.Spec.RestartPolicy, t.Spec.TerminationGracePeriodSeconds = nil, "", nil
			}),
			want: []string{
				`spec.replicas: Required value`,
				`spec.restartPolicy: Required value`,
				`spec.terminationGracePeriodSeconds: Required value`,
			},
		},
		"a restart policy is one of three": {
			target: process(func(t *api.Target) { t.Spec.RestartPolicy = "Sometimes" }),
			want:   []string{`spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always", "OnFailure", "Never"`},
		},
		"a short wrong restart policy is repeated": {
			target: process(func(t *api.Target) { t.Spec.RestartPolicy = api.RestartPolicy(strings.Repeat("a", 64)) }),
			want:   []string{`spec.restartPolicy: Unsupported value: "` + strings.Repeat("a", 64) + `": supported values: "Always", "OnFailure", "Never"`},
		},
		"a long wrong restart policy isn't repeated": {
			target: process(func(t *api.Target) { t.Spec.RestartPolicy = api.RestartPolicy(strings.Repeat("a", 65)) }),
			want:   []string{`spec.restartPolicy: Unsupported value: supported values: "Always", "OnFailure", "Never"`},
		},
		"a grace period may be an hour": {
			target: process(func(t *api.Target) { t.Spec.TerminationGracePeriodSeconds = ptr.To[int64](3600) }),
		},
		"a grace period may not be longer than an hour": {
			target: process(func(t *api.Target) { t.Spec.TerminationGracePeriodSeconds = ptr.To[int64](3601) }),
			want:   []string{`spec.terminationGracePeriodSeconds: Invalid value: 3601: must be between 0 and 3600, inclusive`},
		},
		"a reached source has none of these": {
			target: tcp(func(t *api.Target) {
				t.Spec.Replicas = ptr.To[int32](1)
				t.Spec.RestartPolicy = api.RestartAlways
				t.Spec.TerminationGracePeriodSeconds = ptr.To[int64](30)
				t.Spec.Ports = []api.TargetPort{{Name: "db", Port: 5432, Protocol: "TCP", HostPort: 5432}}
			}),
			want: []string{
				"spec.replicas: Forbidden: may only be set for a `process` or `container` source: others have an instance for each endpoint",
				"spec.restartPolicy: Forbidden: may only be set for a `process` or `container` source",
				"spec.terminationGracePeriodSeconds: Forbidden: may only be set for a `process` or `container` source",
				"spec.ports[0].hostPort: Forbidden: may only be set for a `process` or `container` source",
			},
		},
	}.run(t)
}

func TestValidateTargetProcess(t *testing.T) {
	with := func(change func(*api.ProcessSource)) *api.Target {
		return process(func(t *api.Target) { change(t.Spec.Process) })
	}
	const userText = `must be a user's number, or a name of letters, digits, '_', '.' or '-' that begins with a letter or '_' (e.g. 'www-data',  or '1000', regex used for validation is '[A-Za-z_][A-Za-z0-9_.-]*\$?')`
	const userIDText = `a user's number must be between 0 and 4294967294, inclusive, without leading zeros`
	targetCases{
		"every field may be set": {
			target: with(func(p *api.ProcessSource) {
				*p = api.ProcessSource{
					Command:    []string{"myapp"},
					Args:       []string{"", "--listen=127.0.0.1:$(AASERVER_PORT_HTTP)"},
					Env:        []api.EnvVar{{Name: "MODE", Value: "prod"}, {Name: "EMPTY"}},
					WorkingDir: "/srv",
					User:       "www-data",
					Stdin:      true,
					TTY:        true,
				}
			}),
		},
		"a command is required": {
			target: with(func(p *api.ProcessSource) { p.Command = nil }),
			want:   []string{`spec.process.command: Required value: must name the program to run`},
		},
		"a command begins with a program": {
			target: with(func(p *api.ProcessSource) { p.Command = []string{"", "-v"} }),
			want:   []string{`spec.process.command[0]: Required value: must name the program to run`},
		},
		"a command has no NUL bytes": {
			target: with(func(p *api.ProcessSource) { p.Command = []string{"sh", "-c", "a\x00b"} }),
			want:   []string{`spec.process.command[2]: Invalid value: must not contain NUL bytes`},
		},
		"the first argument with a NUL byte is reported": {
			target: with(func(p *api.ProcessSource) { p.Args = []string{"a", "b\x00", "c\x00"} }),
			want:   []string{`spec.process.args[1]: Invalid value: must not contain NUL bytes`},
		},
		"128 KiB are the most for a command": {
			target: with(func(p *api.ProcessSource) {
				// With the NUL that ends each string, and the variable's "=".
				p.Command = []string{"a"}
				p.Env = []api.EnvVar{{Name: "B", Value: "c"}}
				p.Args = []string{strings.Repeat("d", 128<<10-2-4-1)}
			}),
		},
		"a byte more than 128 KiB is too much for command, args and env": {
			target: with(func(p *api.ProcessSource) {
				p.Command = []string{"a"}
				p.Env = []api.EnvVar{{Name: "B", Value: "c"}}
				p.Args = []string{strings.Repeat("d", 128<<10-2-4)}
			}),
			want: []string{"spec.process: Too long: `command`, `args` and `env` together may not be more than 131072 bytes"},
		},
		"many empty arguments take room too": {
			target: with(func(p *api.ProcessSource) { p.Args = make([]string, 128<<10) }),
			want:   []string{"spec.process: Too long: `command`, `args` and `env` together may not be more than 131072 bytes"},
		},
		"128 KiB are the most for a command alone": {
			target: with(func(p *api.ProcessSource) { p.Command = []string{strings.Repeat("a", 128<<10-1)} }),
		},
		"a command alone is named when it is too long": {
			target: with(func(p *api.ProcessSource) { p.Command = []string{strings.Repeat("a", 128<<10)} }),
			want:   []string{"spec.process.command: Too long: may not be more than 131072 bytes"},
		},
		"128 KiB are the most with variables replaced, too": {
			target: with(func(p *api.ProcessSource) {
				p.Command = []string{"a"}
				p.Env = []api.EnvVar{{Name: "B", Value: strings.Repeat("b", 32766)}}
				p.Args = []string{"$(B)$(B)$(B)" + strings.Repeat("c", 128<<10-4*32766-2-3-1)}
			}),
		},
		"a byte more than 128 KiB is too much with variables replaced": {
			target: with(func(p *api.ProcessSource) {
				p.Command = []string{"a"}
				p.Env = []api.EnvVar{{Name: "B", Value: strings.Repeat("b", 32766)}}
				p.Args = []string{"$(B)$(B)$(B)" + strings.Repeat("c", 128<<10-4*32766-2-3)}
			}),
			want: []string{"spec.process: Too long: `command`, `args` and `env` together, with each $(NAME) replaced by its value, may not be more than 131072 bytes"},
		},
		"variables that double each other are too much": {
			target: with(func(p *api.ProcessSource) {
				p.Env = append([]api.EnvVar{{Name: "V0", Value: "lol"}}, many(255, func(i int) api.EnvVar {
					return api.EnvVar{Name: fmt.Sprint("V", i+1), Value: fmt.Sprintf("$(V%d)$(V%d)", i, i)}
				})...)
			}),
			want: []string{"spec.process: Too long: `command`, `args` and `env` together, with each $(NAME) replaced by its value, may not be more than 131072 bytes"},
		},
		"variables that aren't replaced take no more room": {
			target: with(func(p *api.ProcessSource) {
				p.Env = []api.EnvVar{
					{Name: "A", Value: "$(B)$(A)"}, // both are unknown yet
					{Name: "B", Value: strings.Repeat("b", 1<<16)},
				}
				p.Args = []string{"$$(B)$$(B)$(C)$(B"}
			}),
		},
		"a variable's name is required": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Value: "a"}, {Value: "b"}} }),
			want:   []string{`spec.process.env[0].name: Required value`, `spec.process.env[1].name: Required value`},
		},
		"a variable's name may hold what a pod's may": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "1.a-b c"}} }),
		},
		"a variable's name has no equals sign": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A=B"}} }),
			want:   []string{`spec.process.env[0].name: Invalid value: "A=B": a valid environment variable name must consist only of printable ASCII characters other than '='`},
		},
		"a variable's name is bounded": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: strings.Repeat("A", 257)}} }),
			want:   []string{`spec.process.env[0].name: Too long: may not be more than 256 bytes`},
		},
		"a variable isn't the agent's": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "AASERVER_PORT_HTTP", Value: "80"}} }),
			want:   []string{`spec.process.env[0].name: Invalid value: "AASERVER_PORT_HTTP": must not begin with AASERVER_: those variables are set by the agent`},
		},
		"a variable is set once": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A"}, {Name: "B"}, {Name: "A"}} }),
			want:   []string{`spec.process.env[2].name: Duplicate value: "A"`},
		},
		"a variable's value has no NUL bytes": {
			target: with(func(p *api.ProcessSource) { p.Env = []api.EnvVar{{Name: "A", Value: "\x00"}} }),
			want:   []string{`spec.process.env[0].value: Invalid value: must not contain NUL bytes`},
		},
		"256 variables are the most": {
			target: with(func(p *api.ProcessSource) {
				p.Env = many(256, func(i int) api.EnvVar { return api.EnvVar{Name: fmt.Sprint("V", i)} })
			}),
		},
		"257 variables are too many": {
			target: with(func(p *api.ProcessSource) { p.Env = make([]api.EnvVar, 257) }),
			want:   []string{`spec.process.env: Too many: 257: must have at most 256 items`},
		},
		"a working directory is absolute": {
			target: with(func(p *api.ProcessSource) { p.WorkingDir = "srv" }),
			want:   []string{`spec.process.workingDir: Invalid value: "srv": must be an absolute path`},
		},
		"a working directory is clean": {
			target: with(func(p *api.ProcessSource) { p.WorkingDir = "/srv/../etc/" }),
			want:   []string{`spec.process.workingDir: Invalid value: "/srv/../etc/": must be a path without '.', '..' and needless slashes ("/etc")`},
		},
		"a working directory has no NUL bytes": {
			target: with(func(p *api.ProcessSource) { p.WorkingDir = "/srv\x00" }),
			want:   []string{`spec.process.workingDir: Invalid value: must not contain NUL bytes`},
		},
		"a working directory may be as long as Linux allows": {
			target: with(func(p *api.ProcessSource) { p.WorkingDir = "/" + strings.Repeat("a", 4094) }),
		},
		"a working directory is bounded": {
			target: with(func(p *api.ProcessSource) { p.WorkingDir = "/" + strings.Repeat("a", 4095) }),
			want:   []string{`spec.process.workingDir: Too long: may not be more than 4095 bytes`},
		},
		"a user's name may end in a dollar sign": {
			target: with(func(p *api.ProcessSource) { p.User = "_host.name-1$" }),
		},
		"a user's name has no spaces": {
			target: with(func(p *api.ProcessSource) { p.User = "www data" }),
			want:   []string{`spec.process.user: Invalid value: "www data": ` + userText},
		},
		"a user's name doesn't begin with a dash": {
			target: with(func(p *api.ProcessSource) { p.User = "-x" }),
			want:   []string{`spec.process.user: Invalid value: "-x": ` + userText},
		},
		"a user's name has no NUL bytes": {
			target: with(func(p *api.ProcessSource) { p.User = "a\x00" }),
			want:   []string{`spec.process.user: Invalid value: "a\x00": ` + userText},
		},
		"a user's name may have 32 characters": {
			target: with(func(p *api.ProcessSource) { p.User = strings.Repeat("a", 32) }),
		},
		"a user's name has at most 32 characters": {
			target: with(func(p *api.ProcessSource) { p.User = strings.Repeat("a", 33) }),
			want:   []string{`spec.process.user: Too long: may not be more than 32 bytes`},
		},
		"a user may be a number": {
			target: with(func(p *api.ProcessSource) { p.User = "4294967294" }),
		},
		"a user may be root by number": {
			target: with(func(p *api.ProcessSource) { p.User = "0" }),
		},
		"a user isn't the number that means nobody at all": {
			target: with(func(p *api.ProcessSource) { p.User = "4294967295" }),
			want:   []string{`spec.process.user: Invalid value: "4294967295": ` + userIDText},
		},
		"a user's number has no leading zeros": {
			target: with(func(p *api.ProcessSource) { p.User = "0755" }),
			want:   []string{`spec.process.user: Invalid value: "0755": ` + userIDText},
		},
		"text is UTF-8, and of each list the first that isn't is named": {
			target: with(func(p *api.ProcessSource) {
				p.Args = []string{"a", "\xff", "\xff"}
				p.Env = []api.EnvVar{{Name: "A", Value: "ü\xfc"}, {Name: "B", Value: "\xc3"}}
				p.WorkingDir = "/\xff"
			}),
			want: []string{
				`spec.process.args[1]: Invalid value: must be valid UTF-8`,
				`spec.process.env[0].value: Invalid value: must be valid UTF-8`,
				`spec.process.env[1].value: Invalid value: must be valid UTF-8`,
				`spec.process.workingDir: Invalid value: must be valid UTF-8`,
			},
		},
		"at most 16 strings that aren't UTF-8 are named": {
			target: with(func(p *api.ProcessSource) {
				p.Env = many(17, func(i int) api.EnvVar { return api.EnvVar{Name: fmt.Sprint("V", i), Value: "\xff"} })
			}),
			want: many(16, func(i int) string {
				return fmt.Sprintf(`spec.process.env[%d].value: Invalid value: must be valid UTF-8`, i)
			}),
		},
		"a terminal needs stdin": {
			target: with(func(p *api.ProcessSource) { p.TTY = true }),
			want:   []string{"spec.process.tty: Forbidden: may only be true when `stdin` is true"},
		},
	}.run(t)
}

func TestValidateTargetContainer(t *testing.T) {
	with := func(change func(*api.ContainerSource)) *api.Target {
		return container(func(t *api.Target) { change(t.Spec.Container) })
	}
	limits := func(limits corev1.ResourceList) *api.Target {
		return with(func(c *api.ContainerSource) { c.Resources.Limits = limits })
	}
	const imageText = `must be an image's reference, without spaces (e.g. 'nginx',  or 'registry.example.com/team/web:1.2', regex used for validation is '[A-Za-z0-9\[][!-~]*')`
	targetCases{
		"every field may be set": {
			target: with(func(c *api.ContainerSource) {
				*c = api.ContainerSource{
					Image:      "[::1]:5000/web@sha256:" + strings.Repeat("0", 64),
					Command:    []string{"/web"},
					Args:       []string{"-v"},
					Env:        []api.EnvVar{{Name: "MODE", Value: "prod"}},
					WorkingDir: "/",
					Resources: api.ContainerResources{Limits: corev1.ResourceList{
						corev1.ResourceCPU:    resource.MustParse("250m"),
						corev1.ResourceMemory: resource.MustParse("1.5Gi"),
					}},
					Stdin: true,
					TTY:   true,
				}
			}),
		},
		"an image is required": {
			target: with(func(c *api.ContainerSource) { c.Image = "" }),
			want:   []string{`spec.container.image: Required value`},
		},
		"an image has no spaces": {
			target: with(func(c *api.ContainerSource) { c.Image = "nginx " }),
			want:   []string{`spec.container.image: Invalid value: "nginx ": ` + imageText},
		},
		"an image doesn't begin with a dash": {
			target: with(func(c *api.ContainerSource) { c.Image = "-privileged" }),
			want:   []string{`spec.container.image: Invalid value: "-privileged": ` + imageText},
		},
		"an image is bounded": {
			target: with(func(c *api.ContainerSource) { c.Image = strings.Repeat("a", 1025) }),
			want:   []string{`spec.container.image: Too long: may not be more than 1024 bytes`},
		},
		"a command begins with a program": {
			target: with(func(c *api.ContainerSource) { c.Command = []string{""} }),
			want:   []string{`spec.container.command[0]: Required value: must name the program to run`},
		},
		"arguments have no NUL bytes": {
			target: with(func(c *api.ContainerSource) { c.Args = []string{"\x00"} }),
			want:   []string{`spec.container.args[0]: Invalid value: must not contain NUL bytes`},
		},
		"a variable isn't the agent's": {
			target: with(func(c *api.ContainerSource) { c.Env = []api.EnvVar{{Name: "AASERVER_X"}} }),
			want:   []string{`spec.container.env[0].name: Invalid value: "AASERVER_X": must not begin with AASERVER_: those variables are set by the agent`},
		},
		"128 KiB are the most for command, args and env": {
			target: with(func(c *api.ContainerSource) { c.Args = []string{strings.Repeat("a", 128<<10)} }),
			want:   []string{"spec.container: Too long: `command`, `args` and `env` together may not be more than 131072 bytes"},
		},
		"a working directory is absolute": {
			target: with(func(c *api.ContainerSource) { c.WorkingDir = "./srv" }),
			want:   []string{`spec.container.workingDir: Invalid value: "./srv": must be an absolute path`},
		},
		"limits are positive": {
			target: limits(corev1.ResourceList{
				corev1.ResourceCPU:    resource.MustParse("0"),
				corev1.ResourceMemory: resource.MustParse("-1Mi"),
			}),
			want: []string{
				`spec.container.resources.limits[cpu]: Invalid value: "0": must be greater than 0`,
				`spec.container.resources.limits[memory]: Invalid value: "-1Mi": must be greater than 0`,
			},
		},
		"memory is whole bytes": {
			target: limits(corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512m")}),
			want:   []string{`spec.container.resources.limits[memory]: Invalid value: "512m": must be a whole number of bytes`},
		},
		"limits are cpu and memory only, and the first other is named": {
			target: limits(corev1.ResourceList{
				corev1.ResourceCPU:              resource.MustParse("1"),
				corev1.ResourceEphemeralStorage: resource.MustParse("1Gi"),
				"example.com/gpu":               resource.MustParse("1"),
			}),
			want: []string{`spec.container.resources.limits: Unsupported value: "ephemeral-storage": supported values: "cpu", "memory"`},
		},
		"a terminal needs stdin": {
			target: with(func(c *api.ContainerSource) { c.TTY = true }),
			want:   []string{"spec.container.tty: Forbidden: may only be true when `stdin` is true"},
		},
	}.run(t)
}

func TestValidateTargetSSH(t *testing.T) {
	with := func(change func(*api.SSHSource)) *api.Target {
		return ssh(func(t *api.Target) { change(t.Spec.SSH) })
	}
	log := func(log api.SSHLog) *api.Target {
		return with(func(s *api.SSHSource) { s.Log = &log })
	}
	const unitText = `must be a systemd unit's name (e.g. 'nginx.service',  or 'getty@tty1', regex used for validation is '[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*')`
	targetCases{
		"a user is required": {
			target: with(func(s *api.SSHSource) { s.User = "" }),
			want:   []string{`spec.ssh.user: Required value`},
		},
		"a user may be of a Windows domain": {
			target: with(func(s *api.SSHSource) { s.User = `EXAMPLE\jürgen@example.com` }),
		},
		"a user has no spaces": {
			target: with(func(s *api.SSHSource) { s.User = "a b" }),
			want:   []string{`spec.ssh.user: Invalid value: "a b": must not contain spaces or control characters`},
		},
		"a user has no NUL bytes": {
			target: with(func(s *api.SSHSource) { s.User = "a\x00" }),
			want:   []string{`spec.ssh.user: Invalid value: "a\x00": must not contain spaces or control characters`},
		},
		"a user is bounded": {
			target: with(func(s *api.SSHSource) { s.User = strings.Repeat("a", 257) }),
			want:   []string{`spec.ssh.user: Too long: may not be more than 256 bytes`},
		},
		"a secret is required": {
			target: with(func(s *api.SSHSource) { s.CredentialsSecretRef.Name = "" }),
			want:   []string{`spec.ssh.credentialsSecretRef.name: Required value`},
		},
		"a secret's name is a subdomain": {
			target: with(func(s *api.SSHSource) { s.CredentialsSecretRef.Name = "../login" }),
			want:   []string{`spec.ssh.credentialsSecretRef.name: Invalid value: "../login": ` + subdomainText},
		},
		"a log may come from a command": {target: log(api.SSHLog{Command: []string{"journalctl", "-f"}})},
		"a log may come from a file":    {target: log(api.SSHLog{Path: "/var/log/syslog"})},
		"a log may come from a unit":    {target: log(api.SSHLog{JournalUnit: `dev-disk-by\x2dlabel@a:1.device`})},
		"a log comes from somewhere": {
			target: log(api.SSHLog{}),
			want:   []string{"spec.ssh.log: Required value: must specify one of: `command`, `path`, `journalUnit`"},
		},
		"a log comes from one place": {
			target: log(api.SSHLog{Command: []string{"dmesg"}, JournalUnit: "a"}),
			want:   []string{"spec.ssh.log: Invalid value: \"{command, journalUnit}\": must specify exactly one of: `command`, `path`, `journalUnit`"},
		},
		"a log's command begins with a program": {
			target: log(api.SSHLog{Command: []string{""}}),
			want:   []string{`spec.ssh.log.command[0]: Required value: must name the program to run`},
		},
		"a log's command has no NUL bytes": {
			target: log(api.SSHLog{Command: []string{"cat", "\x00"}}),
			want:   []string{`spec.ssh.log.command[1]: Invalid value: must not contain NUL bytes`},
		},
		"a log's command is bounded": {
			target: log(api.SSHLog{Command: []string{strings.Repeat("a", 128<<10)}}),
			want:   []string{`spec.ssh.log.command: Too long: may not be more than 131072 bytes`},
		},
		"a log's path is absolute": {
			target: log(api.SSHLog{Path: "~/log"}),
			want:   []string{`spec.ssh.log.path: Invalid value: "~/log": must be an absolute path`},
		},
		"a log's unit isn't an option": {
			target: log(api.SSHLog{JournalUnit: "--all"}),
			want:   []string{`spec.ssh.log.journalUnit: Invalid value: "--all": ` + unitText},
		},
		"a log's unit isn't a pattern": {
			target: log(api.SSHLog{JournalUnit: "ngin*"}),
			want:   []string{`spec.ssh.log.journalUnit: Invalid value: "ngin*": ` + unitText},
		},
		"a log's unit is bounded": {
			target: log(api.SSHLog{JournalUnit: strings.Repeat("a", 256)}),
			want:   []string{`spec.ssh.log.journalUnit: Too long: may not be more than 255 bytes`},
		},
		"endpoints are checked": {
			target: with(func(s *api.SSHSource) { s.Endpoints = nil }),
			want:   []string{`spec.ssh.endpoints: Required value: must have at least 1 item`},
		},
	}.run(t)
}

func TestValidateTargetTCP(t *testing.T) {
	tls := func(tls api.TCPTLS) *api.Target {
		return tcp(func(t *api.Target) { t.Spec.TCP.TLS = &tls })
	}
	cert := certificate(t)
	targetCases{
		"TLS needs no settings": {
			target: tls(api.TCPTLS{}),
		},
		"a bundle may hold several certificates": {
			target: tls(api.TCPTLS{ServerName: "db.example.com", CABundle: append(append([]byte("# ours\n"), cert...), cert...)}),
		},
		"a server's name is a DNS name": {
			target: tls(api.TCPTLS{ServerName: "*.example.com"}),
			want:   []string{`spec.tcp.tls.serverName: Invalid value: "*.example.com": ` + subdomainText},
		},
		"a bundle holds certificates": {
			target: tls(api.TCPTLS{CABundle: []byte("MIIB")}),
			want:   []string{`spec.tcp.tls.caBundle: Invalid value: must hold at least one PEM-encoded certificate`},
		},
		"a bundle holds nothing but certificates": {
			target: tls(api.TCPTLS{CABundle: append(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")})...)}),
			want:   []string{`spec.tcp.tls.caBundle: Invalid value: must hold nothing but PEM-encoded certificates: block 2 is not one`},
		},
		"a bundle's certificates can be read": {
			target: tls(api.TCPTLS{CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}})}),
			want:   []string{`spec.tcp.tls.caBundle: Invalid value: must hold nothing but PEM-encoded certificates: block 1: x509: malformed certificate`},
		},
		"256 KiB are the most for a bundle": {
			target: tls(api.TCPTLS{CABundle: append(bytes.Repeat([]byte("\n"), 256<<10-len(cert)), cert...)}),
		},
		"a bundle is bounded": {
			target: tls(api.TCPTLS{CABundle: make([]byte, 256<<10+1)}),
			want:   []string{`spec.tcp.tls.caBundle: Too long: may not be more than 262144 bytes`},
		},
	}.run(t)
}

func TestValidateTargetEndpoints(t *testing.T) {
	with := func(endpoints ...api.Endpoint) *api.Target {
		return tcp(func(t *api.Target) { t.Spec.TCP.Endpoints = endpoints })
	}
	host := func(host string) *api.Target {
		return with(api.Endpoint{Name: "a", Host: host, Port: 1})
	}
	endpoint := func(i int) api.Endpoint {
		return api.Endpoint{Name: fmt.Sprint("e", i), Host: "localhost", Port: 1}
	}
	longLabel := strings.Repeat("a", 64) + ".example.com"
	targetCases{
		"an endpoint is required": {
			target: with(),
			want:   []string{`spec.tcp.endpoints: Required value: must have at least 1 item`},
		},
		"256 endpoints are the most": {
			target: with(many(256, endpoint)...),
		},
		"257 endpoints are too many": {
			target: with(many(257, endpoint)...),
			want:   []string{`spec.tcp.endpoints: Too many: 257: must have at most 256 items`},
		},
		"all of an endpoint's fields are required": {
			target: with(api.Endpoint{}),
			want: []string{
				`spec.tcp.endpoints[0].name: Required value`,
				`spec.tcp.endpoints[0].host: Required value`,
				`spec.tcp.endpoints[0].port: Invalid value: 0: must be between 1 and 65535, inclusive`,
			},
		},
		"an endpoint's name is a label": {
			target: with(api.Endpoint{Name: "A", Host: "a", Port: 65535}),
			want:   []string{`spec.tcp.endpoints[0].name: Invalid value: "A": ` + labelText},
		},
		"an endpoint's name is unique": {
			target: with(endpoint(1), endpoint(1)),
			want:   []string{`spec.tcp.endpoints[1].name: Duplicate value: "e1"`},
		},
		"an instance's name has room for the target's": {
			target: with(api.Endpoint{Name: strings.Repeat("a", 59), Host: "a", Port: 1}),
		},
		"an instance's name is a label too": {
			target: with(api.Endpoint{Name: strings.Repeat("a", 60), Host: "a", Port: 1}),
			want:   []string{`spec.tcp.endpoints[0].name: Invalid value: "` + strings.Repeat("a", 60) + `": must be no more than 59 bytes, so that the instance's name, "web-" and the endpoint's name, has at most 63`},
		},
		"an endpoint's port is one": {
			target: with(api.Endpoint{Name: "a", Host: "a", Port: 65536}),
			want:   []string{`spec.tcp.endpoints[0].port: Invalid value: 65536: must be between 1 and 65535, inclusive`},
		},
		"a host may be a name of one label":   {target: host("db")},
		"a host may be an IPv4 address":       {target: host("192.0.2.1")},
		"a host may be an IPv6 address":       {target: host("2001:db8::1")},
		"a host may have a label with digits": {target: host("1.a.0x7f")},
		"a host isn't a mistyped IPv4 address": {
			target: host("10.0.0.256"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "10.0.0.256": ` + ipText},
		},
		"a host isn't a number": {
			target: host("2130706433"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "2130706433": ` + ipText},
		},
		"a host has no leading zeros": {
			target: host("010.0.0.1"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "010.0.0.1": must not have leading 0s`},
		},
		"a host isn't an IPv4 address in disguise": {
			target: host("::ffff:127.0.0.1"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "::ffff:127.0.0.1": must not be an IPv4-mapped IPv6 address`},
		},
		"a host has no port": {
			target: host("db:5432"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "db:5432": ` + ipText},
		},
		"a host may have a label of 63 characters": {target: host(longLabel[1:])},
		"a host may have 253 characters":           {target: host(strings.Repeat("a.", 126) + "a")},
		"a host that looks like an address is told so up to 253 characters": {
			target: host(strings.Repeat(":", 253)),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "` + strings.Repeat(":", 253) + `": ` + ipText},
		},
		"a host's labels can be looked up": {
			target: host(longLabel),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "` + longLabel + `": each label must be no more than 63 bytes`},
		},
		"a host is bounded": {
			target: host(strings.Repeat("a.", 126) + "aa"),
			want:   []string{`spec.tcp.endpoints[0].host: Too long: may not be more than 253 bytes`},
		},
		"a host that looks like an address is bounded": {
			target: host(strings.Repeat(":", 254)),
			want:   []string{`spec.tcp.endpoints[0].host: Too long: may not be more than 253 bytes`},
		},
		"a host isn't a URL": {
			target: host("http/db"),
			want:   []string{`spec.tcp.endpoints[0].host: Invalid value: "http/db": ` + subdomainText},
		},
	}.run(t)
}

func TestValidateTargetPorts(t *testing.T) {
	with := func(ports ...api.TargetPort) *api.Target {
		return process(func(t *api.Target) {
			t.Spec.Replicas = ptr.To[int32](1)
			t.Spec.Ports = ports
		})
	}
	port := func(i int) api.TargetPort {
		return api.TargetPort{Name: fmt.Sprint("p", i), Port: int32(i + 1), Protocol: "TCP"}
	}
	targetCases{
		"a number may be used for both protocols": {
			target: with(
				api.TargetPort{Name: "dns", Port: 53, Protocol: "UDP", HostPort: 5353},
				api.TargetPort{Name: "dns-tcp", Port: 53, Protocol: "TCP", HostPort: 5353},
			),
		},
		"64 ports are the most": {
			target: with(many(64, port)...),
		},
		"65 ports are too many": {
			target: with(many(65, port)...),
			want:   []string{`spec.ports: Too many: 65: must have at most 64 items`},
		},
		"all fields but hostPort are required": {
			target: with(api.TargetPort{}),
			want: []string{
				`spec.ports[0].name: Required value`,
				`spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive`,
				`spec.ports[0].protocol: Required value`,
			},
		},
		"a port's name is a service name": {
			target: with(api.TargetPort{Name: "8080", Port: 8080, Protocol: "TCP"}),
			want:   []string{`spec.ports[0].name: Invalid value: "8080": must contain at least one letter (a-z)`},
		},
		"a port's name has at most 15 characters": {
			target: with(api.TargetPort{Name: strings.Repeat("a", 16), Port: 8080, Protocol: "TCP"}),
			want:   []string{`spec.ports[0].name: Too long: may not be more than 15 bytes`},
		},
		"a port's name is unique": {
			target: with(
				api.TargetPort{Name: "http", Port: 1, Protocol: "TCP"},
				api.TargetPort{Name: "http", Port: 2, Protocol: "TCP"},
			),
			want: []string{`spec.ports[1].name: Duplicate value: "http"`},
		},
		"a port's number is unique in its protocol": {
			target: with(
				api.TargetPort{Name: "a", Port: 80, Protocol: "TCP"},
				api.TargetPort{Name: "b", Port: 80, Protocol: "TCP"},
			),
			want: []string{`spec.ports[1].port: Duplicate value: "80/TCP"`},
		},
		"a port's number is one": {
			target: with(api.TargetPort{Name: "a", Port: 65536, Protocol: "TCP"}, api.TargetPort{Name: "b", Port: -1, Protocol: "TCP"}),
			want: []string{
				`spec.ports[0].port: Invalid value: 65536: must be between 1 and 65535, inclusive`,
				`spec.ports[1].port: Invalid value: -1: must be between 1 and 65535, inclusive`,
			},
		},
		"a protocol is TCP or UDP": {
			target: with(api.TargetPort{Name: "a", Port: 1, Protocol: "SCTP"}),
			want:   []string{`spec.ports[0].protocol: Unsupported value: "SCTP": supported values: "TCP", "UDP"`},
		},
		"a host port is a port": {
			target: with(api.TargetPort{Name: "a", Port: 1, Protocol: "TCP", HostPort: -1}),
			want:   []string{`spec.ports[0].hostPort: Invalid value: -1: must be between 1 and 65535, inclusive`},
		},
		"a host port is unique in its protocol": {
			target: with(
				api.TargetPort{Name: "a", Port: 1, Protocol: "TCP", HostPort: 80},
				api.TargetPort{Name: "b", Port: 2, Protocol: "TCP", HostPort: 80},
			),
			want: []string{`spec.ports[1].hostPort: Duplicate value: "80/TCP"`},
		},
		"a host port belongs to a single replica": {
			target: process(func(t *api.Target) {
				t.Spec.Ports = []api.TargetPort{{Name: "a", Port: 1, Protocol: "TCP"}, {Name: "b", Port: 2, Protocol: "TCP", HostPort: 80}}
			}),
			want: []string{"spec.ports[1].hostPort: Forbidden: may only be set when `replicas` is at most 1: the instances share their host's ports"},
		},
		"a host port is allowed with no replicas": {
			target: process(func(t *api.Target) {
				t.Spec.Replicas = ptr.To[int32](0)
				t.Spec.Ports = []api.TargetPort{{Name: "a", Port: 1, Protocol: "TCP", HostPort: 80}}
			}),
		},
		"a reached source has ports": {
			target: ssh(func(t *api.Target) { t.Spec.Ports = []api.TargetPort{{Name: "http", Port: 80, Protocol: "TCP"}} }),
		},
	}.run(t)
}

func TestValidateTargetUpdate(t *testing.T) {
	now := metav1.Now()
	invalid := func(t *api.Target) { t.Spec.Process.Command = nil }
	cases := map[string]struct {
		newTarget, oldTarget *api.Target
		want                 []string
	}{
		"nothing changes": {
			oldTarget: process(),
			newTarget: process(),
		},
		"what may change does": {
			oldTarget: process(),
			newTarget: process(func(t *api.Target) {
				t.Labels = map[string]string{"tier": "front"}
				t.Spec.ClassName = "standard"
				t.Spec.Replicas = ptr.To[int32](3)
				t.Spec.Process.Args = []string{"-v"}
			}),
		},
		"a new spec is checked": {
			oldTarget: process(),
			newTarget: process(invalid),
			want:      []string{`spec.process.command: Required value: must name the program to run`},
		},
		"an old spec is left alone, so that a finalizer can go": {
			oldTarget: process(invalid, func(t *api.Target) {
				t.DeletionTimestamp, t.Finalizers = &now, []string{"streaming.aaserver.io/instances"}
			}),
			newTarget: process(invalid, func(t *api.Target) { t.DeletionTimestamp = &now }),
		},
		"an old spec is the same whether its lists are empty or missing": {
			oldTarget: process(invalid),
			newTarget: process(invalid, func(t *api.Target) { t.Spec.Ports = []api.TargetPort{} }),
		},
		"a source's type stays": {
			oldTarget: process(),
			newTarget: container(),
			want:      []string{"spec.container: Forbidden: field is immutable: the target's source is `process`; delete the target and create it again to change that"},
		},
		"a second source is not a change of type": {
			oldTarget: process(),
			newTarget: process(func(t *api.Target) { t.Spec.Container = container().Spec.Container }),
			want:      []string{"spec: Invalid value: \"{process, container}\": must specify exactly one of: `process`, `container`, `ssh`, `tcp`"},
		},
		"an agent's name stays": {
			oldTarget: process(),
			newTarget: process(func(t *api.Target) { t.Spec.AgentName = "edge-18" }),
			want:      []string{`spec.agentName: Invalid value: "edge-18": field is immutable`},
		},
		"an agent's name can't be added": {
			oldTarget: ssh(),
			newTarget: ssh(func(t *api.Target) { t.Spec.AgentName = "edge-18" }),
			want:      []string{`spec.agentName: Invalid value: "edge-18": field is immutable`},
		},
		"a target's name stays": {
			oldTarget: process(),
			newTarget: process(func(t *api.Target) { t.Name = "shop" }),
			want:      []string{`metadata.name: Invalid value: "shop": field is immutable`},
		},
		"an update needs a resource version": {
			oldTarget: process(),
			newTarget: process(func(t *api.Target) { t.ResourceVersion = "" }),
			want:      []string{`metadata.resourceVersion: Invalid value: "": must be specified for an update`},
		},
		"finalizers can't be added to what is being deleted": {
			oldTarget: process(func(t *api.Target) { t.DeletionTimestamp = &now }),
			newTarget: process(func(t *api.Target) { t.DeletionTimestamp, t.Finalizers = &now, []string{"a/b"} }),
			want:      []string{`metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{"a/b"}`},
		},
		"the replicas of a fixed port can't be scaled": {
			oldTarget: process(func(t *api.Target) {
				t.Spec.Replicas = ptr.To[int32](1)
				t.Spec.Ports = []api.TargetPort{{Name: "a", Port: 1, Protocol: "TCP", HostPort: 80}}
			}),
			newTarget: process(func(t *api.Target) {
				t.Spec.Ports = []api.TargetPort{{Name: "a", Port: 1, Protocol: "TCP", HostPort: 80}}
			}),
			want: []string{"spec.ports[0].hostPort: Forbidden: may only be set when `replicas` is at most 1: the instances share their host's ports"},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTargetUpdate(tc.newTarget, tc.oldTarget))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}
