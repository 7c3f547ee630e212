//go:build linux

package e2e

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// foreignKinds are of groups that a cluster has only when something else is
// installed in it.
var foreignKinds = regexp.MustCompile(`(?m)^apiVersion: (cert-manager\.io|monitoring\.coreos\.com)/`)

// badWarning is what an API server warns of in a manifest.
var badWarning = regexp.MustCompile(`unknown field|deprecated|would violate`)

// masked are the values of golden files that are made anew each time.
var masked = regexp.MustCompile(`"?<[a-z./-]+>"?`)

// TestChart applies what the chart renders, each way, to a real kube-apiserver:
// as a dry-run of the server, and for real.
func TestChart(t *testing.T) {
	t.Parallel()
	c := startCluster(t, "--no-controller-manager")
	admin := c.admin(t)
	files, err := filepath.Glob(filepath.Join(root, "charts", "testdata", "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("the chart's golden files: %d, %v", len(files), err)
	}
	files = append(files, filepath.Join(root, "hack", "deploy", "aaserver.yaml"))
	admin.kubectl("create", "namespace", serverNamespace)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var ours []string
		for _, document := range strings.Split(string(text), "\n---\n") {
			if !foreignKinds.MatchString(document) {
				ours = append(ours, document)
			}
		}
		manifest := masked.ReplaceAllString(strings.Join(ours, "\n---\n"), `"`+base64.StdEncoding.EncodeToString([]byte("any"))+`"`)
		name := filepath.Base(file)
		for _, args := range [][]string{
			{"apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-"},
			{"apply", "--server-side", "--force-conflicts", "-f", "-"},
		} {
			r := admin.run(binaries.kubectl, manifest, args...)
			if r.code != 0 || badWarning.MatchString(r.stderr) {
				t.Errorf("kubectl %s of %s: exit code %d: %s", strings.Join(args, " "), name, r.code, r.stderr)
			}
			wantContains(t, name, r.stdout, "deployment.apps/", "apiservice.apiregistration.k8s.io/"+apiService, "apiservice.apiregistration.k8s.io/"+alphaService)
		}
		// The next way may differ in what can't be changed.
		admin.kubectl("delete", "apiservice", apiService, alphaService, "--timeout=30s")
		admin.kubectl("delete", "deployments,services,persistentvolumeclaims,secrets", "--all", "-n", serverNamespace, "--wait=false")
	}
}
