//go:build linux

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestClusterEvents is what a server behind kube-aggregator tells, by the main
// API.
func TestClusterEvents(t *testing.T) {
	c := sharedCluster(t)
	a := c.serve(t, serveOptions{})
	testEvents(t, a.client, c.namespace(t, "events"))

	t.Run("without the right to write events, targets run and the log says so", func(t *testing.T) {
		namespace := c.namespace(t, "events")
		t.Cleanup(func() { a.kubectlStdin(serverRights(t), "apply", "-f", "-") })
		rules := a.kubectl("get", "clusterrole", serverName, "-o", `jsonpath={range .rules[*]}{.resources}{"\n"}{end}`)
		for n, resources := range strings.Split(rules, "\n") {
			if strings.Contains(resources, `"events"`) {
				a.kubectl("patch", "clusterrole", serverName, "--type=json", "-p", fmt.Sprintf(`[{"op":"remove","path":"/rules/%d"}]`, n))
			}
		}
		a.eventually("it has lost the right", 30*time.Second, func() error {
			r := a.run(binaries.kubectl, "", "auth", "can-i", "create", "events", "-n", namespace,
				"--as", "system:serviceaccount:"+serverNamespace+":"+serverName)
			if strings.TrimSpace(r.stdout) != "no" {
				return fmt.Errorf("%s%s", r.stdout, r.stderr)
			}
			return nil
		})
		a.kubectlStdin(eventful("mute", "replicas: 20", `[sleep, "1000"]`), "create", "-n", namespace, "-f", "-")
		a.kubectl("wait", "target/mute", "-n", namespace, "--for=jsonpath={.status.readyReplicas}=20", "--timeout=30s")
		a.eventually("the log says so", 30*time.Second, func() error {
			if !strings.Contains(a.output(), `cannot create resource \"events\"`) {
				return fmt.Errorf("it doesn't")
			}
			return nil
		})
		a.kubectl("delete", "target/mute", "-n", namespace, "--timeout=30s")
		if n := strings.Count(a.output(), "Events can't be written"); n != 1 {
			t.Errorf("the log says it %d times", n)
		}
	})
}
