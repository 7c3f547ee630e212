package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func startDemo(t *testing.T) *server {
	t.Helper()
	s := startServer(t, t.TempDir(), "--demo")
	s.kubectl("wait", "targets", "--all", "--for=condition=Ready", "--timeout=30s")
	return s
}

// TestKubectl is everything that kubectl does with resources.
func TestKubectl(t *testing.T) {
	s := startDemo(t)
	manifest := func(name string, replicas int, mode string) string {
		return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: %s}
spec:
  replicas: %d
  terminationGracePeriodSeconds: 2
  process:
    command: [sleep, "1000"]
    env: [{name: MODE, value: %s}]
`, name, replicas, mode)
	}

	t.Run("get prints the columns, wide adds to them", func(t *testing.T) {
		wantContains(t, "get", s.kubectl("get", "tgt"), "NAME", "SOURCE", "READY", "INSTANCES", "AGE", "web", "process", "2/2")
		wantContains(t, "get -o wide", s.kubectl("get", "targets", "-o", "wide"), "PORTS", "CLASS", "AGENT", "http:8080", "local")
		wantContains(t, "get by category", s.kubectl("get", "aaserver"), "ticker")
		wantContains(t, "get -o yaml", s.kubectl("get", "target", "web", "-o", "yaml"), "apiVersion: streaming.aaserver.io/v1", "type: AgentConnected")
		wantContains(t, "get by field", s.kubectl("get", "targets", "--field-selector", "spec.agentName=local", "-o", "name"), "target.streaming.aaserver.io/web")
		if got := s.kubectl("get", "targets", "--field-selector", "spec.agentName=other", "-o", "name"); got != "" {
			t.Errorf("another agent's targets: %q", got)
		}
		wantContains(t, "chunks", s.kubectl("get", "targets", "--chunk-size=1", "-o", "name"), "/shell", "/ticker", "/web")
		wantContains(t, "another namespace", s.run(binaries.kubectl, "", "get", "targets", "-n", "other").stderr, "No resources found in other namespace.")
	})
	t.Run("describe", func(t *testing.T) {
		wantContains(t, "describe", s.kubectl("describe", "target", "web"), "AllInstancesReady", "Host Port")
	})
	t.Run("explain", func(t *testing.T) {
		wantContains(t, "explain", s.kubectl("explain", "target", "--recursive"), "terminationGracePeriodSeconds", "credentialsSecretRef", "restartCount")
		wantContains(t, "explain a field", s.kubectl("explain", "target.spec.process.workingDir"), "absolute path that the process starts in")
	})
	t.Run("create, apply, patch, label, scale, wait, delete", func(t *testing.T) {
		s.kubectlStdin(manifest("made", 1, "a"), "create", "-f", "-")
		r := s.run(binaries.kubectl, manifest("made", 1, "a"), "create", "-f", "-")
		wantContains(t, "create again", r.stderr, "AlreadyExists")

		wantContains(t, "apply", s.kubectlStdin(manifest("made", 2, "b"), "apply", "-f", "-"), "configured")
		wantContains(t, "apply the same", s.kubectlStdin(manifest("made", 2, "b"), "apply", "-f", "-"), "unchanged")
		s.kubectl("wait", "target/made", "--for=jsonpath={.status.readyReplicas}=2", "--timeout=30s")
		s.kubectl("wait", "target/made", "--for=condition=Ready", "--timeout=30s")

		s.kubectl("scale", "target/made", "--replicas=3")
		s.kubectl("wait", "target/made", "--for=jsonpath={.status.readyReplicas}=3", "--timeout=30s")
		s.kubectl("scale", "target/made", "--replicas=1", "--current-replicas=3")
		s.kubectl("wait", "target/made", "--for=jsonpath={.status.replicas}=1", "--timeout=30s")
		wantContains(t, "the last instance", s.kubectl("get", "target", "made", "-o", "jsonpath={.status.instances[*].name}"), "made-0")

		s.kubectl("patch", "target", "made", "--type=merge", "-p", `{"metadata":{"labels":{"by":"merge"}}}`)
		s.kubectl("patch", "target", "made", "--type=json", "-p", `[{"op":"add","path":"/metadata/labels/json","value":"yes"}]`)
		s.kubectl("label", "target", "made", "tier=back")
		s.kubectl("annotate", "target", "made", "note=hello")
		wantContains(t, "labels", s.kubectl("get", "target", "made", "--show-labels"), "by=merge", "json=yes", "tier=back")

		generation := s.kubectl("get", "target", "made", "-o", "jsonpath={.metadata.generation}")
		s.kubectl("patch", "target", "made", "--subresource=status", "--type=merge", "-p", `{"spec":{"replicas":7},"status":{"observedGeneration":1}}`)
		if got := s.kubectl("get", "target", "made", "-o", "jsonpath={.metadata.generation} {.spec.replicas}"); got != generation+" 1" {
			t.Errorf("the status subresource changed the spec: generation and replicas are %q, want %q", got, generation+" 1")
		}
		s.kubectl("delete", "target", "made", "--timeout=30s")
		if r := s.run(binaries.kubectl, "", "get", "target", "made"); r.code == 0 {
			t.Errorf("it is still there: %s", r.stdout)
		}
	})
	t.Run("a status in a manifest is ignored", func(t *testing.T) {
		s.kubectlStdin(manifest("smuggled", 0, "a")+"status: {readyReplicas: 9}\n", "create", "-f", "-")
		if got := s.kubectl("get", "target", "smuggled", "-o", "jsonpath={.status.readyReplicas}"); got == "9" {
			t.Error("the status was taken from the manifest")
		}
		s.kubectl("delete", "target", "smuggled", "--timeout=30s")
	})
	t.Run("server-side apply knows who owns what", func(t *testing.T) {
		apply := func(manager, text string, args ...string) result {
			return s.run(binaries.kubectl, text, append([]string{"apply", "--server-side", "--field-manager=" + manager, "-f", "-"}, args...)...)
		}
		if r := apply("one", manifest("owned", 1, "a")); r.code != 0 {
			t.Fatal(r.stderr)
		}
		r := apply("two", manifest("owned", 2, "a"))
		wantContains(t, "a conflict", r.stderr, `conflict with "one": .spec.replicas`)
		if r := apply("two", manifest("owned", 2, "a"), "--force-conflicts"); r.code != 0 {
			t.Fatal(r.stderr)
		}
		s.kubectl("scale", "target/owned", "--replicas=3")
		managers := s.kubectl("get", "target", "owned", "--show-managed-fields", "-o", `jsonpath={range .metadata.managedFields[*]}{.manager}:{.subresource}:{.fieldsV1}{"\n"}{end}`)
		wantContains(t, "managed fields", managers, `kubectl:scale:{"f:spec":{"f:replicas":{}}}`)
		wantContains(t, "one owner of each list element", managers, `k:{\"name\":\"MODE\"}`)
		s.kubectl("delete", "target", "owned", "--timeout=30s")
	})
	t.Run("dry-run leaves nothing", func(t *testing.T) {
		wantContains(t, "dry-run", s.kubectlStdin(manifest("dry", 1, "a"), "create", "--dry-run=server", "-o", "yaml", "-f", "-"), "agentName: local")
		if r := s.run(binaries.kubectl, "", "get", "target", "dry"); r.code == 0 {
			t.Error("a dry-run created it")
		}
		r := s.run(binaries.kubectl, "", "scale", "target/web", "--replicas=9", "--dry-run=server")
		if r.code != 0 {
			t.Error(r.stderr)
		}
		if got := s.kubectl("get", "target", "web", "-o", "jsonpath={.spec.replicas}"); got != "2" {
			t.Errorf("a dry-run scaled to %s", got)
		}
	})
	t.Run("edit", func(t *testing.T) {
		s.kubectlStdin(manifest("edited", 1, "a"), "create", "-f", "-")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := s.command(ctx, binaries.kubectl, "edit", "target", "edited")
		editor := filepath.Join(t.TempDir(), "editor")
		if err := os.WriteFile(editor, []byte("#!/bin/sh\nsed -i 's/value: a$/value: edited/' \"$1\"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, "KUBE_EDITOR="+editor)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		wantContains(t, "the edited value", s.kubectl("get", "target", "edited", "-o", "jsonpath={.spec.process.env[0].value}"), "edited")
		s.kubectl("delete", "target", "edited", "--timeout=30s")
	})
	t.Run("watch", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := s.command(ctx, binaries.kubectl, "get", "targets", "-w", "-o", "name")
		lines := startLines(t, cmd)
		s.kubectlStdin(manifest("watched", 0, "a"), "create", "-f", "-")
		lines.wait(t, "watched")
		s.kubectl("delete", "target", "watched", "--timeout=30s")
	})
	t.Run("bad input is refused, naming the field and what is allowed", func(t *testing.T) {
		for what, tt := range map[string]struct{ manifest, want string }{
			"an unknown field":  {strings.Replace(manifest("bad", 1, "a"), "replicas:", "replica:", 1), `unknown field "spec.replica"`},
			"too many replicas": {manifest("bad", 257, "a"), "spec.replicas: Invalid value: 257: must be between 0 and 256"},
			"a source that is not served": {`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: bad}, spec: {tcp: {endpoints: [{name: a, host: db, port: 5432}]}}}`,
				`spec: Unsupported value: "tcp": supported values: "process"`},
			"no source":    {`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: bad}, spec: {}}`, "spec: Required value: must specify one of: `process`, `container`, `ssh`, `tcp`"},
			"a wrong port": {`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: bad}, spec: {process: {command: [x]}, ports: [{name: http, port: 70000}]}}`, "spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535"},
			"a long name":  {manifest(strings.Repeat("x", 53), 1, "a"), "must be no more than 52"},
		} {
			r := s.run(binaries.kubectl, tt.manifest, "create", "-f", "-")
			if r.code == 0 || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("%s: exit code %d, want %q in: %s", what, r.code, tt.want, r.stderr)
			}
		}
	})
	t.Run("the source and the agent can't be changed", func(t *testing.T) {
		r := s.run(binaries.kubectl, "", "patch", "target", "web", "--type=merge", "-p", `{"spec":{"agentName":"other"}}`)
		wantContains(t, "agentName", r.stderr, "spec.agentName", "field is immutable")
	})
	t.Run("an agent that this server doesn't have is refused", func(t *testing.T) {
		r := s.run(binaries.kubectl, strings.Replace(manifest("elsewhere", 1, "a"), "spec:", "spec:\n  agentName: other", 1), "create", "-f", "-")
		wantContains(t, "another agent", r.stderr, `spec.agentName: Unsupported value: "other": supported values: "local"`)
	})
	t.Run("a command that doesn't exist says so in the status", func(t *testing.T) {
		s.kubectlStdin(strings.Replace(manifest("missing", 1, "a"), "sleep", "no-such-command", 1), "create", "-f", "-")
		s.eventually("the status says why", 30*time.Second, func() error {
			got := s.kubectl("get", "target", "missing", "-o", "jsonpath={.status.instances[0].state.waiting}")
			if !strings.Contains(got, `command \"no-such-command\" not found`) {
				return fmt.Errorf("waiting: %s", got)
			}
			return nil
		})
		s.kubectl("delete", "target", "missing", "--timeout=30s")
	})
	t.Run("second names are in discovery, next to the canonical ones", func(t *testing.T) {
		var list struct {
			Resources []struct {
				Name  string
				Verbs []string
			}
		}
		if err := json.Unmarshal([]byte(s.kubectl("get", "--raw", "/apis/streaming.aaserver.io/v1")), &list); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, r := range list.Resources {
			names = append(names, r.Name+":"+strings.Join(r.Verbs, ","))
		}
		wantContains(t, "discovery", strings.Join(names, "\n"),
			"targets:create,delete,deletecollection,get,list,patch,update,watch",
			"targets/attach:create,get", "targets/exec:create,get", "targets/portforward:create,get", "targets/port-forward:create,get",
			"targets/log:get", "targets/logs:get", "targets/scale:get,patch,update", "targets/status:get,patch,update")
		wantContains(t, "logs by its second name", s.kubectl("get", "--raw", "/apis/streaming.aaserver.io/v1/namespaces/default/targets/web/logs?instance=web-0"), "web-0 listens on")
	})
	t.Run("events are kept, and described with what they are about", func(t *testing.T) {
		uid := s.kubectl("get", "target", "web", "-o", "jsonpath={.metadata.uid}")
		event := fmt.Sprintf(`
apiVersion: v1
kind: Event
metadata: {name: web.1}
type: Warning
reason: Unhealthy
message: the probe failed
firstTimestamp: %[1]s
lastTimestamp: %[1]s
count: 3
source: {component: prober}
involvedObject: {apiVersion: streaming.aaserver.io/v1, kind: Target, namespace: default, name: web, uid: %[2]s}
`, time.Now().UTC().Format(time.RFC3339), uid)
		s.kubectlStdin(event, "create", "-f", "-")
		_, described, ok := strings.Cut(s.kubectl("describe", "target", "web"), "Events:")
		if !ok {
			t.Error("describe has no section of events")
		}
		wantContains(t, "the described events", described, "Warning", "Unhealthy", "prober", "the probe failed")
		wantContains(t, "get", s.kubectl("get", "events"), "LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE", "target/web", "the probe failed")
		wantContains(t, "get by short name, wide", s.kubectl("get", "ev", "-o", "wide"), "FIRST SEEN", "COUNT", "web.1")
		wantContains(t, "kubectl events", s.kubectl("events", "--for", "target/web"), "Unhealthy")
		if got := s.kubectl("get", "events", "--field-selector", "involvedObject.name=ticker,reason=Unhealthy", "-o", "name"); got != "" {
			t.Errorf("another target's events: %q", got)
		}
		wantContains(t, "explain", s.kubectl("explain", "event.involvedObject"), "The object that this event is about", "fieldPath")
		s.kubectlStdin(strings.Replace(event, "count: 3", "count: 4", 1), "apply", "--server-side", "--force-conflicts", "-f", "-")
		if got := s.kubectl("get", "event", "web.1", "-o", "jsonpath={.count}"); got != "4" {
			t.Errorf("applied, the count is %q, want 4", got)
		}
		r := s.run(binaries.kubectl, strings.Replace(event, "namespace: default", "namespace: other", 1), "replace", "-f", "-")
		wantContains(t, "about what is in another namespace", r.stderr, "involvedObject.namespace")
		s.kubectl("delete", "event", "web.1")
	})
	t.Run("a list that was printed can be applied", func(t *testing.T) {
		for name, args := range map[string][]string{
			"by the client": nil,
			"by the server": {"--server-side", "--force-conflicts"},
		} {
			list := s.kubectl("get", "target", "web", "ticker", "-o", "yaml")
			wantContains(t, "what is printed", list, "kind: List")
			wantContains(t, name, s.kubectlStdin(list, append([]string{"apply", "-f", "-"}, args...)...), "streaming.aaserver.io/web", "streaming.aaserver.io/ticker")
		}
	})
	t.Run("api-resources", func(t *testing.T) {
		table := strings.Fields(s.kubectl("api-resources", "--no-headers"))
		want := strings.Fields(`events ev v1 true Event
			selfsubjectaccessreviews authorization.k8s.io/v1 false SelfSubjectAccessReview
			targetclasses tgtclass streaming.aaserver.io/v1 false TargetClass
			targets tgt streaming.aaserver.io/v1 true Target`)
		if !slices.Equal(table, want) {
			t.Errorf("got %q, want %q", table, want)
		}
	})
	t.Run("access reviews", func(t *testing.T) {
		if got := s.kubectl("auth", "can-i", "create", "targets/exec"); strings.TrimSpace(got) != "yes" {
			t.Errorf("can-i: %s", got)
		}
	})
}

// lines collects what a command prints while it runs.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) wait(t *testing.T, parts ...string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		text, missing := l.String(), ""
		for _, part := range parts {
			if !strings.Contains(text, part) {
				missing = part
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it didn't print %q, but:\n%s", missing, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// startLines starts a command whose context ends with the test.
func startLines(t *testing.T, cmd *exec.Cmd) *lines {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l := &lines{}
	var reading sync.WaitGroup
	reading.Go(func() {
		scanner := bufio.NewScanner(out)
		for scanner.Scan() {
			l.mu.Lock()
			l.text.WriteString(scanner.Text() + "\n")
			l.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		cmd.Process.Kill()
		reading.Wait()
		cmd.Wait()
	})
	return l
}

// TestPlugin is what the plugin does with the streams.
func TestPlugin(t *testing.T) {
	s := startDemo(t)

	t.Run("exec hands on input, outputs and exit code", func(t *testing.T) {
		for _, protocol := range []string{"websocket", "spdy"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := s.command(ctx, binaries.plugin, "exec", "-i", "web", "--", "sh", "-c", "cat; echo problem >&2; exit 7")
			if protocol == "spdy" {
				cmd.Env = append(cmd.Env, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false")
			}
			cmd.Stdin = strings.NewReader("some input")
			var stdout, stderr strings.Builder
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Run()
			if code := cmd.ProcessState.ExitCode(); code != 7 || stdout.String() != "some input" || !strings.HasPrefix(stderr.String(), "problem\n") {
				t.Errorf("%s: exit code %d, stdout %q, stderr %q", protocol, code, stdout.String(), stderr.String())
			}
		}
	})
	t.Run("exec sees the instance's environment, and none of the server's", func(t *testing.T) {
		r := s.target("exec", "web", "--instance", "web-1", "--", "env")
		wantContains(t, "env", r.stdout, "AASERVER_PORT_HTTP=", "AASERVER_INSTANCE=web-1", "PATH=/usr/local/sbin")
		if strings.Contains(r.stdout, "KUBECONFIG") {
			t.Errorf("the server's environment got in:\n%s", r.stdout)
		}
	})
	t.Run("errors read like kubectl's", func(t *testing.T) {
		for what, tt := range map[string]struct {
			args []string
			want string
		}{
			"no such target":   {[]string{"exec", "nope", "--", "ls"}, `Error from server (NotFound): targets.streaming.aaserver.io "nope" not found`},
			"no such instance": {[]string{"exec", "web", "--instance", "web-9", "--", "ls"}, `target "web" has no instance "web-9": it has web-0, web-1`},
			"no such command":  {[]string{"exec", "web", "--", "no-such"}, `command "no-such" not found in PATH`},
			"no such log":      {[]string{"logs", "web", "--previous"}, "previous"},
			"no such port":     {[]string{"port-forward", "web", "ftp"}, "ftp"},
			"no terminal":      {[]string{"attach", "-i", "web"}, "stdin"},
		} {
			r := s.target(tt.args...)
			if r.code == 0 || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("%s: exit code %d, want %q in: %s", what, r.code, tt.want, r.stderr)
			}
		}
	})
	t.Run("logs", func(t *testing.T) {
		s.eventually("the ticker has ticked", 30*time.Second, func() error {
			if got := s.target("logs", "ticker").stdout; !strings.Contains(got, "tick 6\n") {
				return fmt.Errorf("log: %s", got)
			}
			return nil
		})
		if got := s.target("logs", "ticker", "--stream", "stderr", "--tail", "1").stdout; !regexp.MustCompile(`^tick \d*[05]\n$`).MatchString(got) {
			t.Errorf("the last line of stderr is %q", got)
		}
		stamped := s.target("logs", "ticker", "--timestamps", "--prefix", "--limit-bytes", "60").stdout
		if !regexp.MustCompile(`^\[ticker/ticker-0\] \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z tick 1\n`).MatchString(stamped) || len(stamped) != 60 {
			t.Errorf("with times, prefix and a limit of 60 bytes: %q", stamped)
		}
		// The time of a line is a cursor: what follows it comes once.
		first := strings.Fields(s.target("logs", "ticker", "--timestamps").stdout)[0]
		rest := s.kubectl("get", "--raw", "/apis/streaming.aaserver.io/v1/namespaces/default/targets/ticker/log?instance=ticker-0&resumeAfter="+first)
		if !strings.HasPrefix(rest, "tick 2\ntick 3\n") {
			t.Errorf("after the first line: %q", tail(rest, 100))
		}
		all := s.target("logs", "-l", "streaming.aaserver.io/demo=true", "--all-instances", "--prefix").stdout
		wantContains(t, "logs of all", all, "[web/web-0] web-0 listens", "[web/web-1] web-1 listens", "[ticker/ticker-0] tick 1", "[shell/shell-0]")
	})
	t.Run("logs -f follows until its client goes", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		got := startLines(t, s.command(ctx, binaries.plugin, "logs", "-f", "ticker", "--tail=1"))
		before := len(strings.Split(s.target("logs", "ticker").stdout, "\n"))
		got.wait(t, fmt.Sprintf("tick %d\n", before+1))
	})
	t.Run("logs -f of all instances takes those along that come", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		got := startLines(t, s.command(ctx, binaries.plugin, "logs", "-f", "-l", "streaming.aaserver.io/demo", "--all-instances", "--prefix"))
		got.wait(t, "[web/web-0] ", "[web/web-1] ", "[ticker/ticker-0] ")
		s.kubectl("scale", "target/web", "--replicas=3")
		got.wait(t, "[web/web-2] web-2 listens")
		s.kubectl("scale", "target/web", "--replicas=2")
	})
	t.Run("port-forward", func(t *testing.T) {
		for _, websockets := range []string{"true", "false"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			cmd := s.command(ctx, binaries.plugin, "port-forward", "web", ":http", "0:1")
			cmd.Env = append(cmd.Env, "KUBECTL_PORT_FORWARD_WEBSOCKETS="+websockets)
			got := startLines(t, cmd)
			got.wait(t, "-> 8080", "-> 1\n")
			ports := regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+) -> (\d+)`).FindAllStringSubmatch(got.String(), -1)
			if len(ports) != 2 {
				t.Fatalf("want two ports in:\n%s", got)
			}
			for range 3 {
				wantAnswer(t, ports[0][1], "hello from web-")
				// A port that nothing listens on ends its own connection only.
				wantRefused(t, ports[1][1])
			}
			got.wait(t, "connection refused")
			cancel()
		}
	})
	t.Run("attach talks to the process itself", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := s.command(ctx, binaries.plugin, "attach", "-i", "shell")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		got := startLines(t, cmd)
		io.WriteString(in, "name\n")
		got.wait(t, "shell-0")
		in.Close()
		if restarts := s.kubectl("get", "target", "shell", "-o", "jsonpath={.status.instances[0].restartCount}"); restarts != "0" {
			t.Errorf("the shell was restarted %s times: the client's leaving ended it", restarts)
		}
	})
	t.Run("version", func(t *testing.T) {
		wantContains(t, "version", s.target("version").stdout, "Client", "Server")
	})
	t.Run("completion", func(t *testing.T) {
		wantContains(t, "targets", s.target("__complete", "logs", "").stdout, "web", "ticker", "shell")
		wantContains(t, "instances", s.target("__complete", "exec", "web", "--instance", "").stdout, "web-0", "web-1")
	})
}

func wantAnswer(t *testing.T, address, want string) {
	t.Helper()
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + address)
	if err != nil {
		t.Error(err)
		return
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || !strings.HasPrefix(string(body), want) {
		t.Errorf("%s answered %q, %v", address, body, err)
	}
}

func wantRefused(t *testing.T, address string) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes came from a port that nothing listens on", n)
	} else if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		t.Error("a connection to a port that nothing listens on hung")
	}
}

// TestNothingIsLeft ends servers and clients, hard and soft, and looks for what
// they started.
func TestNothingIsLeft(t *testing.T) {
	dir := t.TempDir()
	// Each process of this test has this in its command line.
	marker := fmt.Sprintf("31%d", os.Getpid())
	manifest := `
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: daemons}
spec:
  replicas: 2
  process:
    command: [sh, -c, "setsid sleep ` + marker + ` & (setsid sh -c 'sleep ` + marker + ` & sleep ` + marker + `' &) ; trap '' TERM; while :; do sleep 1; done"]
`
	left := func() string {
		out, _ := exec.Command("pgrep", "-fa", "sleep "+marker).Output()
		return string(out)
	}
	s := startServer(t, dir)
	s.kubectlStdin(manifest, "create", "-f", "-")
	s.kubectl("wait", "target/daemons", "--for=condition=Ready", "--timeout=30s")
	// Two replicas with three sleeps each, and their shells.
	s.eventually("the daemons run", 30*time.Second, func() error {
		if n := strings.Count(left(), "sleep "+marker); n < 6 {
			return fmt.Errorf("%d sleeps", n)
		}
		return nil
	})
	gone := func(what string) {
		t.Helper()
		s.eventually("nothing is left after "+what, 10*time.Second, func() error {
			if text := left(); text != "" {
				return fmt.Errorf("left: %s", text)
			}
			return nil
		})
	}

	s.stop(syscall.SIGKILL, 10*time.Second)
	gone("kill -9 of the server")

	s = startServer(t, dir)
	// What is stored says Ready until the agent has looked.
	s.kubectl("wait", "target/daemons", "--for=jsonpath={.status.instances[0].restartCount}=1", "--timeout=30s")
	s.kubectl("wait", "target/daemons", "--for=condition=Ready", "--timeout=30s")
	last := s.kubectl("get", "target", "daemons", "-o", "jsonpath={.status.instances[0].restartCount} {.status.instances[0].lastState.terminated.reason}")
	if last != "1 AgentLost" {
		t.Errorf("after a kill -9 of the server, restarts and reason are %q, want %q", last, "1 AgentLost")
	}
	s.kubectl("delete", "target", "daemons", "--now", "--timeout=30s")
	gone("deletion")

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.kubectlStdin(strings.Replace(manifest, `[sh, -c`, `[sleep, "1000"] # [sh, -c`, 1), "create", "-f", "-")
	s.kubectl("wait", "target/daemons", "--for=condition=Ready", "--timeout=30s")
	client := s.command(ctx, binaries.plugin, "exec", "daemons", "--", "sh", "-c", "setsid sleep "+marker+" & echo started; sleep "+marker)
	startLines(t, client).wait(t, "started")
	client.Process.Kill()
	gone("an exec's client was killed")

	s.stop(syscall.SIGTERM, 30*time.Second)
	gone("SIGTERM of the server")
	if s.err != nil {
		t.Errorf("SIGTERM: %v\n%s", s.err, tail(s.output(), 4<<10))
	}
}

// TestKillKeepsWhatWasAcknowledged kills a server that is being written to.
func TestKillKeepsWhatWasAcknowledged(t *testing.T) {
	dir := t.TempDir()
	s := startServer(t, dir)
	var acknowledged []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			name := fmt.Sprintf("t-%d", i)
			r := s.run(binaries.kubectl, fmt.Sprintf(`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: %s}, spec: {replicas: 0, process: {command: [x]}}}`, name), "create", "-f", "-")
			if r.code != 0 {
				return
			}
			acknowledged = append(acknowledged, name)
			if i == 20 {
				s.signal(syscall.SIGKILL)
			}
		}
	}()
	<-done
	s = startServer(t, dir)
	have := s.kubectl("get", "targets", "-o", "name")
	for _, name := range acknowledged {
		if !strings.Contains(have, "/"+name+"\n") {
			t.Errorf("%s was acknowledged, and is lost", name)
		}
	}
	if len(acknowledged) < 20 {
		t.Errorf("only %d were acknowledged: the test shows little", len(acknowledged))
	}
}

// TestDrain ends a server with open streams: each client is told why.
func TestDrain(t *testing.T) {
	s := startDemo(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	clients := map[string]*lines{
		"exec":         startLines(t, s.command(ctx, binaries.plugin, "exec", "web", "--", "sh", "-c", "echo begun; sleep 1000")),
		"logs":         startLines(t, s.command(ctx, binaries.plugin, "logs", "-f", "ticker")),
		"port-forward": startLines(t, s.command(ctx, binaries.plugin, "port-forward", "web", ":8080")),
	}
	clients["exec"].wait(t, "begun")
	clients["logs"].wait(t, "tick 1")
	clients["port-forward"].wait(t, "Forwarding from")
	s.stop(syscall.SIGTERM, 30*time.Second)
	if s.err != nil {
		t.Errorf("the server ended with %v", s.err)
	}
	clients["exec"].wait(t, "the server is shutting down")
}

// TestStartRefuses says what is wrong, in one line, and touches nothing.
func TestStartRefuses(t *testing.T) {
	run := func(t *testing.T, args ...string) (string, int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, binaries.server, append([]string{"standalone"}, args...)...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		cmd.Run()
		return stderr.String(), cmd.ProcessState.ExitCode()
	}
	lastLine := func(text string) string {
		all := strings.Split(strings.TrimSpace(text), "\n")
		return all[len(all)-1]
	}
	refused := func(t *testing.T, want string, args ...string) {
		t.Helper()
		text, code := run(t, args...)
		if line := lastLine(text); code != 1 || !strings.HasPrefix(line, "error: ") || !strings.Contains(line, want) {
			t.Errorf("exit code %d, want 1 and %q in: %s", code, want, text)
		}
	}

	t.Run("no data directory given", func(t *testing.T) { refused(t, "--data-dir is needed") })
	t.Run("a data directory that can't be made", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, "not a directory", "--data-dir", filepath.Join(file, "data"))
	})
	t.Run("a data directory in use", func(t *testing.T) {
		s := startServer(t, t.TempDir())
		refused(t, "in use by another aaserver", "--data-dir", s.dir, "--secure-port", "0")
		s.kubectl("get", "targets")
	})
	t.Run("a port in use", func(t *testing.T) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
		refused(t, "port "+port+" of 127.0.0.1 is in use", "--data-dir", t.TempDir(), "--secure-port", port)
	})
	t.Run("a corrupt database", func(t *testing.T) {
		dir := t.TempDir()
		s := startServer(t, dir)
		s.stop(syscall.SIGTERM, 30*time.Second)
		database := filepath.Join(dir, "db", "state.db")
		broken := []byte(strings.Repeat("this is no database ", 1000))
		if err := os.WriteFile(database, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, database, "--data-dir", dir, "--secure-port", "0")
		now, err := os.ReadFile(database)
		if err != nil || string(now) != string(broken) {
			t.Errorf("the file was changed (%v)", err)
		}
	})
	t.Run("a database that is gone", func(t *testing.T) {
		dir := t.TempDir()
		s := startServer(t, dir, "--demo")
		s.kubectl("wait", "targets", "--all", "--for=condition=Ready", "--timeout=30s")
		s.stop(syscall.SIGTERM, 30*time.Second)
		if err := os.RemoveAll(filepath.Join(dir, "db")); err != nil {
			t.Fatal(err)
		}
		logs := func() int {
			entries, err := os.ReadDir(filepath.Join(dir, "logs"))
			if err != nil {
				t.Fatal(err)
			}
			return len(entries)
		}
		before := logs()
		refused(t, "is missing or empty", "--data-dir", dir, "--secure-port", "0")
		// Neither does another database cost the logs.
		other := startServer(t, dir, "--storage-endpoint", "sqlite://"+filepath.Join(t.TempDir(), "other.db"))
		other.kubectl("get", "targets")
		other.stop(syscall.SIGTERM, 30*time.Second)
		if after := logs(); before == 0 || after != before {
			t.Errorf("%d logs before, %d after", before, after)
		}
	})
	t.Run("an unknown storage", func(t *testing.T) {
		refused(t, "sqlite://", "--data-dir", t.TempDir(), "--storage-endpoint", "mongodb://localhost")
	})
	t.Run("two storages", func(t *testing.T) {
		refused(t, "exclude each other", "--data-dir", t.TempDir(), "--storage-endpoint", "sqlite:///tmp/x.db", "--etcd-servers", "http://127.0.0.1:1")
	})
}

// TestSecondStart finds everything again.
func TestSecondStart(t *testing.T) {
	dir := t.TempDir()
	s := startServer(t, dir, "--demo")
	s.kubectl("wait", "targets", "--all", "--for=condition=Ready", "--timeout=30s")
	s.kubectl("label", "target", "web", "kept=yes")
	uid := s.kubectl("get", "target", "web", "-o", "jsonpath={.metadata.uid}")
	kubeconfig, err := os.ReadFile(s.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"kubeconfig", "pki/ca.pem", "pki/admin.pem"} {
		info, err := os.Stat(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o, want 600", file, mode)
		}
	}
	s.eventually("the ticker has logged", 30*time.Second, func() error {
		if got := s.target("logs", "ticker").stdout; !strings.Contains(got, "tick 2") {
			return fmt.Errorf("log: %q", got)
		}
		return nil
	})
	s.stop(syscall.SIGTERM, 30*time.Second)

	port := regexp.MustCompile(`server: https://127\.0\.0\.1:(\d+)`).FindSubmatch(kubeconfig)
	if port == nil {
		t.Fatalf("no server in the kubeconfig:\n%s", kubeconfig)
	}
	s = startServer(t, dir, "--demo", "--secure-port", string(port[1]))
	if again, err := os.ReadFile(s.kubeconfig); err != nil || string(again) != string(kubeconfig) {
		t.Errorf("the kubeconfig has changed (%v)", err)
	}
	if got := s.kubectl("get", "target", "web", "-o", "jsonpath={.metadata.uid} {.metadata.labels.kept}"); got != uid+" yes" {
		t.Errorf("web is %q, want %q", got, uid+" yes")
	}
	s.kubectl("wait", "target/ticker", "--for=jsonpath={.status.instances[0].restartCount}=1", "--timeout=30s")
	if got := s.target("logs", "ticker", "--previous").stdout; !strings.Contains(got, "tick 2\n") {
		t.Errorf("the log of the run before the restart is %q", tail(got, 200))
	}
}

// TestProcessesEndByThemselves gives processes their grace period when the
// server ends.
func TestProcessesEndByThemselves(t *testing.T) {
	dir := t.TempDir()
	s := startServer(t, dir)
	for name, script := range map[string]string{
		"polite":   "trap 'sleep 1; echo saved; exit 0' TERM; echo up; while :; do sleep 0.1; done",
		"stubborn": "trap '' TERM; echo up; while :; do sleep 0.1; done",
	} {
		s.kubectlStdin(fmt.Sprintf(`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: %s},
			spec: {terminationGracePeriodSeconds: 3, process: {command: [sh, -c, %q]}}}`, name, script), "create", "-f", "-")
		s.kubectl("wait", "target/"+name, "--for=condition=Ready", "--timeout=30s")
		s.eventually(name+" is up", 30*time.Second, func() error {
			if got := s.target("logs", name).stdout; got != "up\n" {
				return fmt.Errorf("log: %q", got)
			}
			return nil
		})
	}
	s.stop(syscall.SIGTERM, 30*time.Second)
	s = startServer(t, dir)
	s.kubectl("wait", "targets", "--all", "--for=jsonpath={.status.instances[0].restartCount}=1", "--timeout=30s")
	if got := s.target("logs", "polite", "--previous").stdout; got != "up\nsaved\n" {
		t.Errorf("the log of what ended by itself is %q", got)
	}
	if got := s.target("logs", "stubborn", "--previous").stdout; got != "up\n" {
		t.Errorf("the log of what was killed is %q", got)
	}
}
