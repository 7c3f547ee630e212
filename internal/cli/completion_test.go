package cli

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/version"
)

func TestCompletion(t *testing.T) {
	web := process("web", func(target *v1.Target) {
		target.Spec.AgentName = "edge"
		target.Spec.Replicas = ptr.To[int32](2)
		target.Spec.Ports = []v1.TargetPort{
			{Name: "http", Port: 8080}, {Name: "admin", Port: 9090}, {Name: "dns", Port: 53, Protocol: v1.ProtocolUDP},
		}
		// One that is being removed still has a log.
		target.Status.Instances = []v1.InstanceStatus{{Name: "web-0"}, {Name: "web-2"}}
	})
	const noFiles = ":4"
	tests := map[string]struct {
		args []string
		want []string
	}{
		"targets":                          {args: []string{"logs", ""}, want: []string{"db", "web", "worker"}},
		"targets that begin with a letter": {args: []string{"exec", "w"}, want: []string{"web", "worker"}},
		"targets after their type":         {args: []string{"attach", "target/w"}, want: []string{"target/web", "target/worker"}},
		"instances after a slash":          {args: []string{"exec", "web/"}, want: []string{"web/web-0", "web/web-1", "web/web-2"}},
		"instances after type and slash":   {args: []string{"exec", "tgt/web/web-1"}, want: []string{"tgt/web/web-1"}},
		"instances by flag":                {args: []string{"logs", "web", "--instance", ""}, want: []string{"web-0", "web-1", "web-2"}},
		"no instances without a target":    {args: []string{"logs", "--instance", ""}},
		"no second target":                 {args: []string{"logs", "web", ""}},
		"ports":                            {args: []string{"port-forward", "web", ""}, want: []string{"53/udp", "8080", "9090", "admin", "dns", "http"}},
		"ports after a local one":          {args: []string{"port-forward", "web", "80:h"}, want: []string{"80:http"}},
		"ports that aren't forwarded yet":  {args: []string{"port-forward", "web/web-0", ":8080", "53/udp", ""}, want: []string{"9090", "admin"}},
		"another target of a port-forward": {args: []string{"port-forward", "db", "80", "target/w"}, want: []string{"target/web", "target/worker"}},
		"ports of another target":          {args: []string{"port-forward", "db", "80", "target/web", "80:d"}, want: []string{"80:dns"}},
		"formats of a port-forward":        {args: []string{"port-forward", "web", "--output", ""}, want: []string{"json"}},
		"agents of a target to run":        {args: []string{"run", "x", "--agent", ""}, want: []string{"edge"}},
		"policies of a target to run":      {args: []string{"run", "x", "--restart", ""}, want: []string{"Always", "OnFailure", "Never"}},
		"no name for what isn't there yet": {args: []string{"run", ""}},
		"streams":                          {args: []string{"logs", "--stream", ""}, want: []string{"all", "stdout", "stderr"}},
		"contexts":                         {args: []string{"logs", "--context", ""}, want: []string{"ctx"}},
		"users":                            {args: []string{"logs", "--user", "m"}, want: []string{"me"}},
		"clusters":                         {args: []string{"logs", "--cluster", ""}, want: []string{"test"}},
		"namespaces of a cluster":          {args: []string{"logs", "-n", "kube"}, want: []string{"kube-system"}},
		"targets of another namespace":     {args: []string{"logs", "-n", "elsewhere", "d"}, want: []string{"db"}},
		"shells":                           {args: []string{"completion", ""}, want: []string{"bash", "zsh", "fish", "powershell"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, web, process("worker"), process("db"))
			server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/api/v1/namespaces" {
					return false
				}
				writeJSON(w, http.StatusOK, metav1.PartialObjectMetadataList{
					TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"},
					Items: []metav1.PartialObjectMetadata{
						{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, {ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}},
					},
				})
				return true
			}
			cmd := startWith(t, genericiooptions.IOStreams{}, append([]string{"__completeNoDesc", "--kubeconfig", server.kubeconfig()}, test.args...)...)
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
			}
			want := strings.Join(append(test.want, noFiles), "\n") + "\n"
			if diff := cmp.Diff(want, cmd.out.String()); diff != "" {
				t.Errorf("completions (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCompletionOfNamespacesWithoutACluster(t *testing.T) {
	elsewhere := process("db")
	elsewhere.Namespace = "elsewhere"
	server := newTestServer(t, process("web"), process("worker"), elsewhere)
	server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/api/v1/namespaces" {
			writeError(w, apierrors.NewNotFound(corev1.Resource("namespaces"), ""))
			return true
		}
		return false
	}
	cmd := startWith(t, genericiooptions.IOStreams{}, "__completeNoDesc", "--kubeconfig", server.kubeconfig(), "logs", "--namespace", "")
	if code := cmd.wait(); code != 0 {
		t.Fatalf("exit code %d, stderr %q", code, cmd.errOut)
	}
	if diff := cmp.Diff("elsewhere\nshop\n:4\n", cmd.out.String()); diff != "" {
		t.Errorf("completions (-want +got):\n%s", diff)
	}
}

func TestCompletionSaysNothingWithoutAServer(t *testing.T) {
	server := newTestServer(t)
	config := server.kubeconfig()
	server.srv.Close()
	cmd := startWith(t, genericiooptions.IOStreams{}, "__complete", "--kubeconfig", config, "logs", "")
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if diff := cmp.Diff(":4\n", cmd.out.String()); diff != "" {
		t.Errorf("completions (-want +got):\n%s", diff)
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		t.Run(shell, func(t *testing.T) {
			cmd := startWith(t, genericiooptions.IOStreams{}, "completion", shell)
			if code := cmd.wait(); code != 0 {
				t.Fatalf("exit code %d, stderr %q", code, cmd.errOut)
			}
			if !strings.Contains(cmd.out.String(), "kubectl-target") {
				t.Error("the script isn't for kubectl-target")
			}
			if shell != "bash" {
				return
			}
			bash, err := exec.LookPath("bash")
			if err != nil {
				return
			}
			check := exec.Command(bash, "-n")
			check.Stdin = strings.NewReader(cmd.out.String())
			if out, err := check.CombinedOutput(); err != nil {
				t.Errorf("bash doesn't read it: %v: %s", err, out)
			}
		})
	}
}

// TestMainAsCompletion runs this test binary under the name that kubectl looks
// for.
func TestMainAsCompletion(t *testing.T) {
	if filepath.Base(os.Args[0]) == completionName {
		os.Args = append(os.Args[:1], os.Args[3:]...)
		os.Exit(Main())
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), completionName)
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	server := newTestServer(t, process("web"))
	out, err := exec.Command(link, "-test.run=^TestMainAsCompletion$", "--", "--kubeconfig", server.kubeconfig(), "logs", "w").Output()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("web\n:4\n", string(out)); diff != "" {
		t.Errorf("completions (-want +got):\n%s", diff)
	}
}

func TestVersion(t *testing.T) {
	client := version.Get()
	server := newTestServer(t)
	config := server.kubeconfig()
	run := func(wantCode int, args ...string) *running {
		t.Helper()
		cmd := startWith(t, genericiooptions.IOStreams{}, append([]string{"--kubeconfig", config, "version"}, args...)...)
		if code := cmd.wait(); code != wantCode {
			t.Fatalf("%v: exit code %d, want %d; stderr %q", args, code, wantCode, cmd.errOut)
		}
		return cmd
	}
	clientLine := "Client Version: " + client.Version + "\n"
	if diff := cmp.Diff(clientLine+"Server Version: v1.37.2\n", run(0).out.String()); diff != "" {
		t.Errorf("both (-want +got):\n%s", diff)
	}
	for format, unmarshal := range map[string]func([]byte, any) error{
		"json": json.Unmarshal,
		"yaml": func(data []byte, v any) error { return yaml.Unmarshal(data, v) },
	} {
		var got versions
		if err := unmarshal([]byte(run(0, "-o", format).out.String()), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(client, got.Client); diff != "" || got.Server == nil || got.Server.GitVersion != "v1.37.2" {
			t.Errorf("%s: server %+v, client (-want +got):\n%s", format, got.Server, diff)
		}
	}
	if got, want := run(1, "-o", "xml").errOut.String(), "error: --output must be 'yaml' or 'json'\n"; got != want {
		t.Errorf("stderr %q, want %q", got, want)
	}

	server.srv.Close()
	if diff := cmp.Diff(clientLine, run(0, "--client").out.String()); diff != "" {
		t.Errorf("the client alone (-want +got):\n%s", diff)
	}
	cmd := run(1)
	if diff := cmp.Diff(clientLine, cmd.out.String()); diff != "" {
		t.Errorf("without the server (-want +got):\n%s", diff)
	}
	if !strings.Contains(cmd.errOut.String(), "was refused") {
		t.Errorf("stderr %q", cmd.errOut)
	}
}

func TestHelpReadsAsKubectls(t *testing.T) {
	for _, args := range [][]string{nil, {"logs"}, {"run"}, {"exec"}, {"attach"}, {"port-forward"}, {"version"}, {"completion"}, {"options"}} {
		cmd := startWith(t, genericiooptions.IOStreams{}, append(args, "-h")...)
		if code := cmd.wait(); code != 0 {
			t.Fatalf("%v: exit code %d, stderr %q", args, code, cmd.errOut)
		}
		help := cmd.out.String()
		for line := range strings.Lines(help) {
			// Only the completion's help speaks of the binary.
			if strings.Contains(line, "kubectl-target") && !slices.Contains(args, "completion") {
				t.Errorf("%v: the help names the binary instead of the command: %q", args, line)
			}
		}
		if len(args) > 0 && args[0] != "options" && !strings.Contains(help, "Examples:\n  # ") {
			t.Errorf("%v: the help has no examples:\n%s", args, help)
		}
	}
}

// TestEveryCommandExplainsItself: help, examples, and completion of arguments
// and of flags that take a value.
func TestEveryCommandExplainsItself(t *testing.T) {
	root := NewCommand(genericiooptions.IOStreams{In: strings.NewReader(""), Out: io.Discard, ErrOut: io.Discard})
	root.InitDefaultHelpCmd()
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
		if cmd == root || cmd.Name() == "help" || cmd.Name() == "options" || cmd.Hidden {
			return
		}
		path := cmd.CommandPath()
		if len(cmd.Long) <= len(cmd.Short) {
			t.Errorf("%s: no longer text than its short one", path)
		}
		if !strings.Contains(cmd.Example, " "+cmd.Name()) {
			t.Errorf("%s: no example shows it", path)
		}
		for line := range strings.Lines(cmd.Example) {
			line = strings.TrimSpace(line)
			if line != "" && !strings.HasPrefix(line, "#") && !strings.Contains(line, "kubectl") {
				t.Errorf("%s: an example is no command: %q", path, line)
			}
		}
		noArguments := cmd.Args != nil && cmd.Args(cmd, []string{"argument"}) != nil && cmd.Args(cmd, nil) == nil
		if cmd.ValidArgsFunction == nil && len(cmd.ValidArgs) == 0 && !noArguments {
			t.Errorf("%s: its arguments aren't completed", path)
		}
		cmd.LocalNonPersistentFlags().VisitAll(func(flag *pflag.Flag) {
			if _, ok := cmd.GetFlagCompletionFunc(flag.Name); !ok && flag.Value.Type() != "bool" {
				t.Errorf("%s: the values of --%s aren't completed", path, flag.Name)
			}
		})
	}
	walk(root)
}
