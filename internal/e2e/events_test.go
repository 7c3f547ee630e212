package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestEvents is what standalone tells of its targets.
func TestEvents(t *testing.T) {
	s := startServer(t, t.TempDir())
	testEvents(t, s.client, "default")

	t.Run("what happens to many instances is combined", func(t *testing.T) {
		s.kubectlStdin(eventful("many", "replicas: 40", `[sleep, "1000"]`), "create", "-f", "-")
		s.kubectl("wait", "target/many", "--for=jsonpath={.status.readyReplicas}=40", "--timeout=60s")
		s.eventually("the starts are told", 30*time.Second, func() error {
			return describes(s.client, "default", "many", `Normal +Started +.*\(x16 over .*\) +aaserver-agent +\(combined from similar events\): Started instance many-\d+`)
		})
		told := s.kubectl("get", "events", "--field-selector", "involvedObject.name=many,reason=Started", "-o", "name")
		if n := strings.Count(told, "\n"); n != 10 {
			t.Errorf("%d events of 40 starts, want 10:\n%s", n, told)
		}
	})
}

// eventful is a target that ends at once when it is asked to.
func eventful(name, spec, command string) string {
	return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: %s}
spec:
  agentName: local
  terminationGracePeriodSeconds: 1
  %s
  process: {command: %s}
`, name, spec, command)
}

// describes fails unless `kubectl describe` has lines that match, in its table
// of events.
func describes(c *client, namespace, name string, lines ...string) error {
	c.t.Helper()
	_, events, found := strings.Cut(c.kubectl("describe", "target", name, "-n", namespace), "\nEvents:")
	if !found {
		return fmt.Errorf("there is no table of events")
	}
	for _, line := range lines {
		if !regexp.MustCompile(`(?m)^ *` + line + `$`).MatchString(events) {
			return fmt.Errorf("no line %q in:%s", line, events)
		}
	}
	return nil
}

// testEvents has things happen to targets and looks for them as a person would.
func testEvents(t *testing.T, c *client, namespace string) {
	within := 30 * time.Second
	kubectl := func(args ...string) string {
		t.Helper()
		return c.kubectl(append(args, "-n", namespace)...)
	}
	create := func(name, spec, command string) {
		t.Helper()
		c.kubectlStdin(eventful(name, spec, command), "create", "-n", namespace, "-f", "-")
	}
	const from = ` +\S+.* +aaserver-agent +`

	t.Run("an instance that crashes", func(t *testing.T) {
		create("crashes", "replicas: 1", `[sh, -c, "exit 7"]`)
		c.eventually("its starts are counted", within, func() error {
			return describes(c, namespace, "crashes",
				`Normal +Started +\S+ \(x[2-9] over \S+\) +aaserver-agent +Started instance crashes-0`,
				`Warning +Exited +\S+ \(x[2-9] over \S+\) +aaserver-agent +Instance crashes-0 exited with code 7`,
				`Warning +BackOff`+from+`Back-off 1s before instance crashes-0 is started again: exited with code 7`,
				`Warning +BackOff`+from+`Back-off 2s before instance crashes-0 is started again: exited with code 7`)
		})
		wantContains(t, "kubectl events", kubectl("events", "--for", "target/crashes"), "Target/crashes", "Instance crashes-0 exited with code 7")
		wantContains(t, "kubectl get events", kubectl("get", "events", "-o", "wide", "--field-selector", "involvedObject.name=crashes,reason=Exited,type=Warning"),
			"target/crashes", "aaserver-agent, local", "Instance crashes-0 exited with code 7")
		got := kubectl("get", "events", "--field-selector", "involvedObject.name=crashes,reason=Exited", "-o",
			"jsonpath={range .items[*]}{.involvedObject.apiVersion} {.involvedObject.kind} {.involvedObject.uid} {.source.component} {.source.host} {.reportingComponent} {.reportingInstance}{end}")
		want := "streaming.aaserver.io/v1 Target " + kubectl("get", "target", "crashes", "-o", "jsonpath={.metadata.uid}") + " aaserver-agent local aaserver-agent local"
		if got != want {
			t.Errorf("the event is about, and by, %q, want %q", got, want)
		}
		kubectl("delete", "target", "crashes", "--timeout=30s")
	})
	t.Run("a start that fails", func(t *testing.T) {
		create("missing", "restartPolicy: Never", `[no-such-command]`)
		c.eventually("it is told", within, func() error {
			return describes(c, namespace, "missing", `Warning +StartError`+from+`Instance missing-0 can't be started: .*"no-such-command" not found.*`)
		})
	})
	t.Run("scaling, a rollout and a deletion", func(t *testing.T) {
		create("moves", "replicas: 1", `[sleep, "1000"]`)
		kubectl("wait", "target/moves", "--for=condition=Ready", "--timeout=30s")
		kubectl("scale", "target/moves", "--replicas=2")
		kubectl("wait", "target/moves", "--for=jsonpath={.status.readyReplicas}=2", "--timeout=30s")
		kubectl("scale", "target/moves", "--replicas=1")
		kubectl("wait", "target/moves", "--for=jsonpath={.status.replicas}=1", "--timeout=30s")
		kubectl("patch", "target", "moves", "--type=merge", "-p", `{"spec":{"process":{"command":["sleep","2000"]}}}`)
		c.eventually("all is told", within, func() error {
			return describes(c, namespace, "moves",
				`Normal +Scaled`+from+`Scaled up from 1 to 2 instances`,
				`Normal +Started`+from+`Started instance moves-1`,
				`Normal +Scaled`+from+`Scaled down from 2 to 1 instances`,
				`Normal +Stopping`+from+`Stopping instance moves-1 within 1s: the target was scaled down`,
				`Normal +Exited`+from+`Instance moves-1 ended by SIGTERM`,
				`Normal +RolloutStarted`+from+`Instances to be replaced by the present spec, one at a time: 1`,
				`Normal +Stopping`+from+`Stopping instance moves-0 within 1s: its spec has changed`,
				`Normal +RolloutComplete`+from+`Every instance is of the present spec`)
		})
		kubectl("delete", "target", "moves", "--timeout=30s")
		c.eventually("its end is told", within, func() error {
			got := kubectl("get", "events", "--field-selector", "involvedObject.name=moves,reason=Stopping")
			if want := "Stopping instance moves-0 within 1s: the target is being deleted"; !strings.Contains(got, want) {
				return fmt.Errorf("no %q in:\n%s", want, got)
			}
			return nil
		})
		// One of the same name has a history of its own.
		create("moves", "replicas: 0", `[sleep, "1000"]`)
		wantContains(t, "describe", kubectl("describe", "target", "moves"), "<none>")
		if err := describes(c, namespace, "moves", `.*Scaled.*`); err == nil {
			t.Error("a new target shows what happened to its predecessor")
		}
	})
}
