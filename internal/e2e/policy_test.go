package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestStandalonePolicy is classes where there is no cluster: the one that the
// server makes allows everything, until its administrator changes it. Limits
// that no class says are the flags'.
func TestStandalonePolicy(t *testing.T) {
	s := startServer(t, t.TempDir(), "--demo",
		"--max-sessions-per-user=3", "--max-sessions-per-target=2", "--session-idle-timeout=2s", "--session-max-duration=4s")
	s.kubectl("wait", "targets", "--all", "--for=condition=Ready", "--timeout=30s")
	// refused runs kubectl, and expects it to fail with these words.
	refused := func(what, stdin string, args []string, parts ...string) {
		t.Helper()
		r := s.run(binaries.kubectl, stdin, args...)
		if r.code == 0 {
			t.Errorf("%s: it wasn't refused: %s", what, r.stdout)
		}
		wantContains(t, what, r.stderr, parts...)
	}
	create := []string{"create", "-f", "-"}
	target := func(name, className string) string {
		return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: %s}
spec:
  %s
  terminationGracePeriodSeconds: 1
  process: {command: [sleep, "1000"]}
`, name, className)
	}

	if got := s.kubectl("get", "target", "web", "-o", "jsonpath={.spec.className}"); got != "default" {
		t.Errorf("the demo's class is %q, want default", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	exec := func(t *testing.T, name, script string) *lines {
		return startLines(t, s.command(ctx, binaries.plugin, "exec", name, "--", "sh", "-c", script))
	}
	const busy, quiet = "while :; do echo begun; sleep 0.2; done", "echo begun; sleep 1000"
	class := func(name, limits string) {
		t.Helper()
		s.kubectlStdin(`
apiVersion: streaming.aaserver.io/v1
kind: TargetClass
metadata: {name: `+name+`}
spec: {sources: [process], agents: [local], agentUser: true, limits: {`+limits+`}}
`, create...)
	}
	made := func(name, className string) {
		t.Helper()
		s.kubectlStdin(target(name, "className: "+className), create...)
		s.kubectl("wait", "target/"+name, "--for=condition=Ready", "--timeout=30s")
	}

	t.Run("times by flag", func(t *testing.T) {
		// What prints isn't idle, but ends when its time is over.
		long, idle := exec(t, "web", busy), exec(t, "ticker", quiet)
		idle.wait(t, "begun", "because nothing passed for 2s")
		long.wait(t, "begun", "ended after 4s, the longest that it may last")
	})

	t.Run("numbers by flag", func(t *testing.T) {
		class("counted", "idleTimeoutSeconds: 600, maxDurationSeconds: 600")
		made("one", "counted")
		made("two", "counted")
		for _, name := range []string{"one", "one"} {
			exec(t, name, quiet).wait(t, "begun")
		}
		r := s.target("exec", "one", "--", "true")
		if r.code == 0 || !strings.Contains(r.stderr, `target "one" has 2 sessions open`) {
			t.Errorf("a third session on a target: %+v", r)
		}
		exec(t, "two", quiet).wait(t, "begun")
		r = s.target("exec", "two", "--", "true")
		if r.code == 0 || !strings.Contains(r.stderr, `has 3 sessions open on targets of class "counted"`) {
			t.Errorf("a fourth session of a user: %+v", r)
		}
	})
	metrics := s.kubectl("get", "--raw", "/metrics")
	for code, want := range map[string]string{"refused": "429", "ended for their time": "504"} {
		wantContains(t, "the metrics of sessions that were "+code, metrics,
			`aaserver_sessions_total{code="`+want+`",protocol="websocket",subresource="exec"} 2`)
	}

	t.Run("a class says otherwise", func(t *testing.T) {
		class("patient", "idleTimeoutSeconds: 600, maxDurationSeconds: 600, sessionsPerTarget: 1")
		made("patient", "patient")
		patient := exec(t, "patient", quiet)
		patient.wait(t, "begun")
		r := s.target("exec", "patient", "--", "true")
		if r.code == 0 || !strings.Contains(r.stderr, `target "patient" has 1 sessions open`) {
			t.Errorf("a second session: %+v", r)
		}
		// Longer than the flags allow: a session that began later, and that they
		// bound, is waited for.
		exec(t, "web", busy).wait(t, "ended after 4s")
		if text := patient.String(); text != "begun\n" {
			t.Errorf("it has printed %q", text)
		}
	})

	t.Run("the default class is the administrator's", func(t *testing.T) {
		s.kubectl("patch", "targetclass", "default", "--type=merge", "-p", `{"spec":{"users":["nobody"],"agentUser":false}}`)
		refused("a target as the agent's user", target("late", ""), create, `class "default"`, "spec.process.user")
		r := s.target("exec", "web", "--", "true")
		if r.code == 0 || !strings.Contains(r.stderr, "spec.process.user") {
			t.Errorf("an exec as the agent's user: %+v", r)
		}
		s.kubectl("delete", "targetclass", "default")
		refused("a target without a class", target("late", ""), create, "without a TargetClass nothing is allowed", "streaming.aaserver.io/is-default-class")
		refused("a target of a class that is gone", target("late", "className: default"), create, `class "default" does not exist`)
		r = s.target("logs", "web")
		if r.code == 0 || !strings.Contains(r.stderr, `class "default" does not exist`) {
			t.Errorf("a log without the class: %+v", r)
		}
		s.kubectl("scale", "target/web", "--replicas=3")
		s.kubectl("wait", "target/web", "--for=jsonpath={.status.readyReplicas}=3", "--timeout=30s")
		s.kubectl("delete", "target", "web", "--timeout=30s")
	})
}
