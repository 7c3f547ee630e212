//go:build linux

package e2e

import "testing"

func TestHarness(t *testing.T) {
	c := sharedCluster(t)
	a := c.serve(t, serveOptions{})
	ns := c.namespace(t, "x")
	a.kubectlStdin(`{apiVersion: streaming.aaserver.io/v1, kind: Target, metadata: {name: web}, spec: {agentName: local, process: {command: [sleep, "1000"]}}}`, "apply", "-n", ns, "-f", "-")
	a.kubectl("wait", "-n", ns, "target/web", "--for=condition=Ready", "--timeout=30s")
	u := c.user(t, "reader", rule{verbs: "get", resources: "targets"})
	t.Log(u.kubectl("get", "target", "web", "-n", ns))
	t.Log(u.target("exec", "web", "-n", ns, "--", "echo", "hi"))
	t.Log(a.target("exec", "web", "-n", ns, "--", "echo", "hi"))
}
