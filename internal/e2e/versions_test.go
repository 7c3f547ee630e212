package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	flatTargets = "targets.v1alpha1.streaming.aaserver.io"
	fullTargets = "targets.v1.streaming.aaserver.io"
	flatPath    = "/apis/" + apiGroup + "/v1alpha1/namespaces/default/targets"

	deprecated = "streaming.aaserver.io/v1alpha1 Target is deprecated; use streaming.aaserver.io/v1 Target"
)

// flat is a process in the shape of v1alpha1.
func flat(name, mode string) string {
	return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1alpha1
kind: Target
metadata: {name: %s}
spec:
  type: Process
  terminationGracePeriodSeconds: 2
  command: [sleep, "1000"]
  env: [{name: MODE, value: %s}]
`, name, mode)
}

// full is the same in the shape of v1.
func full(name, mode string) string {
	return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 2
  process:
    command: [sleep, "1000"]
    env: [{name: MODE, value: %s}]
`, name, mode)
}

// TestVersions is v1alpha1 beside v1.
func TestVersions(t *testing.T) {
	s := startServer(t, t.TempDir())
	get := func(resource, name, path string) string {
		t.Helper()
		return s.kubectl("get", resource, name, "-o", "jsonpath="+path)
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}

	t.Run("discovery lists v1 first", func(t *testing.T) {
		var group struct {
			Versions         []struct{ Version string }
			PreferredVersion struct{ Version string }
		}
		if err := json.Unmarshal([]byte(s.kubectl("get", "--raw", "/apis/"+apiGroup)), &group); err != nil {
			t.Fatal(err)
		}
		if group.PreferredVersion.Version != "v1" || len(group.Versions) != 2 || group.Versions[0].Version != "v1" || group.Versions[1].Version != "v1alpha1" {
			t.Errorf("the group: %+v", group)
		}
		var resources [2]struct {
			Resources []struct {
				Name  string
				Kind  string
				Verbs []string
			}
		}
		targets := func(i int, version string) (of []string) {
			if err := json.Unmarshal([]byte(s.kubectl("get", "--raw", "/apis/"+apiGroup+"/"+version)), &resources[i]); err != nil {
				t.Fatal(err)
			}
			for _, r := range resources[i].Resources {
				if r.Name == "targets" || strings.HasPrefix(r.Name, "targets/") {
					of = append(of, fmt.Sprint(r.Name, r.Kind, r.Verbs))
				}
			}
			return of
		}
		v1, v1alpha1 := targets(0, "v1"), targets(1, "v1alpha1")
		if len(v1) != 9 {
			t.Errorf("v1 has %q", v1)
		}
		if diff := cmp.Diff(v1, v1alpha1); diff != "" {
			t.Errorf("subresources (-v1 +v1alpha1):\n%s", diff)
		}
	})

	t.Run("explain", func(t *testing.T) {
		r := s.run(binaries.kubectl, "", "explain", "target", "--api-version=streaming.aaserver.io/v1alpha1", "--recursive")
		wantContains(t, "explain", r.stdout, "VERSION:    v1alpha1", "credentialsSecret", "tlsCABundle", "enum: Container, Process, SSH, TCP")
		wantContains(t, "explain a field", s.kubectl("explain", "target.spec.logJournalUnit", "--api-version=streaming.aaserver.io/v1alpha1"), "systemd unit")
	})

	t.Run("written in one version, read in both, with the defaults of its own", func(t *testing.T) {
		r := s.run(binaries.kubectl, flat("old", "a"), "create", "-f", "-")
		if r.code != 0 {
			t.Fatal(r.stderr)
		}
		wantContains(t, "create", r.stderr, "Warning: "+deprecated)
		want("v1", get(fullTargets, "old", "{.apiVersion} {.spec.process.command} {.spec.process.env[0].value} {.spec.replicas} {.spec.restartPolicy} {.spec.agentName} {.spec.type}"),
			`streaming.aaserver.io/v1 ["sleep","1000"] a 1 Always local `)
		s.kubectlStdin(full("new", "b"), "create", "-f", "-")
		want("v1alpha1", get(flatTargets, "new", "{.apiVersion} {.spec.type} {.spec.command} {.spec.env[0].value} {.spec.replicas} {.spec.restartPolicy} {.spec.agentName} {.spec.process} {.metadata.annotations}"),
			`streaming.aaserver.io/v1alpha1 Process ["sleep","1000"] b 1 Always local  `)
		s.kubectl("wait", flatTargets+"/old", flatTargets+"/new", "--for=condition=Ready", "--timeout=30s")
		for _, resource := range []string{fullTargets, flatTargets} {
			wantContains(t, "the table of "+resource, s.kubectl("get", resource, "-o", "wide"), "SOURCE", "CLASS", "old", "new", "process", "1/1")
		}
		wantContains(t, "describe", s.kubectl("describe", flatTargets, "old"), "API Version:  streaming.aaserver.io/v1alpha1", "AllInstancesReady")
		want("by field", s.kubectl("get", flatTargets, "--field-selector", "spec.agentName=other", "-o", "name"), "")
	})

	t.Run("v1 is what a client gets that names no version", func(t *testing.T) {
		want("get", get("target", "old", "{.apiVersion}"), "streaming.aaserver.io/v1")
	})

	t.Run("patched in each", func(t *testing.T) {
		s.kubectl("patch", flatTargets, "old", "--type=merge", "-p", `{"spec":{"args":["2000"]}}`)
		s.kubectl("patch", fullTargets, "old", "--type=json", "-p", `[{"op":"replace","path":"/spec/process/env/0/value","value":"c"}]`)
		s.kubectl("patch", flatTargets, "old", "--type=json", "-p", `[{"op":"add","path":"/spec/env/-","value":{"name":"MORE","value":"d"}}]`)
		s.kubectl("label", flatTargets, "old", "tier=back")
		s.kubectl("annotate", fullTargets, "old", "note=hello")
		want("v1", get(fullTargets, "old", "{.spec.process.args} {.spec.process.env[*].value} {.metadata.labels.tier} {.metadata.annotations.note}"), `["2000"] c d back hello`)
		want("v1alpha1", get(flatTargets, "old", "{.spec.args} {.spec.env[*].value} {.metadata.labels.tier} {.metadata.annotations.note}"), `["2000"] c d back hello`)

		s.kubectl("patch", flatTargets, "old", "--subresource=status", "--type=merge", "-p", `{"spec":{"type":"SSH"},"status":{"conditions":null}}`)
		want("the spec, after the status was patched", get(fullTargets, "old", "{.spec.process.args}"), `["2000"]`)
		// Applying the manifest of the other version again changes nothing else.
		wantContains(t, "replace", s.kubectlStdin(s.kubectl("get", flatTargets, "old", "-o", "yaml"), "replace", "-f", "-"), "replaced")
		want("v1", get(fullTargets, "old", "{.spec.process.args} {.spec.process.env[*].value}"), `["2000"] c d`)
	})

	t.Run("what makes no sense is refused by its name", func(t *testing.T) {
		for manifest, parts := range map[string][]string{
			flat("odd", "a") + "  image: nginx\n":                                                            {"spec.image: Forbidden: may only be set for the type `Container`"},
			strings.Replace(flat("odd", "a"), "type: Process", "type: VM", 1):                                {`spec.type: Unsupported value: "VM"`, `"Process"`},
			strings.Replace(flat("odd", "a"), "type: Process", "type: Process\n  tlsServerName: db", 1):      {"spec.tlsServerName: Forbidden"},
			strings.Replace(flat("odd", "a"), "type: Process", "type: Process\n  process: {command: []}", 1): {`unknown field "spec.process"`},
		} {
			r := s.run(binaries.kubectl, manifest, "create", "-f", "-")
			if r.code == 0 {
				t.Errorf("it was taken: %s", manifest)
			}
			wantContains(t, "the refusal", r.stderr, parts...)
		}
		r := s.run(binaries.kubectl, "", "patch", flatTargets, "old", "--type=merge", "-p", `{"spec":{"type":"SSH"}}`)
		if r.code == 0 {
			t.Error("the type was changed")
		}
		wantContains(t, "a patch of the type", r.stderr, "spec.command: Forbidden: may only be set for the type `Process` or `Container`")
		r = s.run(binaries.kubectl, "", "patch", flatTargets, "old", "--type=merge", "-p", `{"spec":{"image":"nginx"}}`)
		wantContains(t, "a patch that v1 couldn't show", r.stderr, "spec.image: Forbidden")
	})

	t.Run("watched in both at once", func(t *testing.T) {
		watch := func(resource string) *lines {
			return startLines(t, s.command(t.Context(), binaries.kubectl, "get", resource, "--watch", "-o",
				`jsonpath={.apiVersion} {.metadata.name} {.spec.type}{.spec.process.env[0].value}{.spec.env[0].value}{"\n"}`))
		}
		old, current := watch(flatTargets), watch(fullTargets)
		old.wait(t, apiGroup+"/v1alpha1 old Processc")
		current.wait(t, apiGroup+"/v1 old c")
		s.kubectlStdin(full("watched", "w1"), "apply", "-f", "-")
		old.wait(t, apiGroup+"/v1alpha1 watched Processw1")
		current.wait(t, apiGroup+"/v1 watched w1")
		s.kubectlStdin(flat("watched", "w2"), "apply", "-f", "-")
		old.wait(t, apiGroup+"/v1alpha1 watched Processw2")
		current.wait(t, apiGroup+"/v1 watched w2")
	})

	t.Run("server-side apply knows who owns what, in whichever version", func(t *testing.T) {
		apply := func(manager, text string, args ...string) result {
			return s.run(binaries.kubectl, text, append([]string{"apply", "--server-side", "--field-manager=" + manager, "-f", "-"}, args...)...)
		}
		must := func(r result) {
			t.Helper()
			if r.code != 0 {
				t.Fatal(r.stderr)
			}
		}
		must(apply("one", flat("owned", "a")))
		must(apply("two", full("owned", "a"))) // the same values are shared
		// A conflict is told in the version that the other one has applied.
		wantContains(t, "a conflict in v1", apply("two", full("owned", "b")).stderr, `conflict with "one": .spec.env[name="MODE"].value`)
		must(apply("two", full("owned", "b"), "--force-conflicts"))
		wantContains(t, "a conflict in v1alpha1", apply("one", flat("owned", "a")).stderr, `conflict with "two": .spec.process.env[name="MODE"].value`)
		must(apply("one", flat("owned", "b")))

		// What a manager leaves out in the other version is taken away, and what
		// others own stays.
		must(apply("three", flat("owned", "b")+"  args: [\"1\"]\n  workingDir: /tmp\n"))
		want("applied in v1alpha1", get(fullTargets, "owned", "{.spec.process.args} {.spec.process.workingDir}"), `["1"] /tmp`)
		must(apply("three", strings.Replace(full("owned", "b"), "    env", "    workingDir: /tmp\n    env", 1)))
		want("applied without args in v1", get(fullTargets, "owned", "{.spec.process.args} {.spec.process.workingDir} {.spec.process.command} {.spec.process.env[0].value}"), ` /tmp ["sleep","1000"] b`)
		must(apply("three", flat("owned", "b")))
		want("applied without a directory in v1alpha1", get(flatTargets, "owned", "{.spec.type} {.spec.workingDir} {.spec.command} {.spec.env[0].value} {.metadata.annotations}"), `Process  ["sleep","1000"] b `)

		// Whoever owns everything alone may go from one version to the other.
		must(apply("alone", full("alone", "a")+"    workingDir: /tmp\n"))
		must(apply("alone", flat("alone", "b")))
		want("applied in v1, then without a directory in v1alpha1", get(fullTargets, "alone", "{.spec.process.workingDir} {.spec.process.command} {.spec.process.env[0].value} {.spec.replicas} {.metadata.annotations}"), ` ["sleep","1000"] b 1 `)
		must(apply("alone", flat("alone", "b")+"  workingDir: /tmp\n"))
		must(apply("alone", full("alone", "c")))
		want("applied in v1alpha1, then without a directory in v1", get(flatTargets, "alone", "{.spec.type} {.spec.workingDir} {.spec.command} {.spec.env[0].value} {.spec.replicas} {.metadata.annotations}"), `Process  ["sleep","1000"] c 1 `)

		// Scaling is recorded in the version that it is done through.
		must(apply("one", flat("owned", "b")+"  replicas: 1\n"))
		s.kubectl("scale", flatTargets+"/owned", "--replicas=2")
		managers := s.kubectl("get", fullTargets, "owned", "--show-managed-fields", "-o",
			`jsonpath={range .metadata.managedFields[*]}{.manager}:{.apiVersion}:{.subresource}:{.fieldsV1}{"\n"}{end}`)
		wantContains(t, "managed fields", managers, `kubectl:streaming.aaserver.io/v1alpha1:scale:{"f:spec":{"f:replicas":{}}}`)
		wantContains(t, "a conflict with scale", apply("one", full("owned", "b")+"  replicas: 1\n").stderr,
			`conflict with "kubectl" with subresource "scale" using streaming.aaserver.io/v1alpha1: .spec.replicas`)
		want("replicas", get(fullTargets, "owned", "{.spec.replicas}"), "2")
		wantContains(t, "the scale", s.kubectl("get", "--raw", flatPath+"/owned/scale"), `"apiVersion":"autoscaling/v1"`)
		// The status belongs to nobody who applies the main resource.
		must(apply("four", flat("owned", "b")+"status: {readyReplicas: 9}\n"))
		wantContains(t, "managed fields", s.kubectl("get", flatTargets, "owned", "--show-managed-fields", "-o", `jsonpath={.metadata.managedFields[?(@.manager=="four")].fieldsV1}`), "f:command")
		if got := get(flatTargets, "owned", `{.metadata.managedFields[?(@.manager=="four")].fieldsV1}`); strings.Contains(got, "readyReplicas") {
			t.Errorf("the status is owned: %s", got)
		}
	})

	t.Run("everybody who uses v1alpha1 is warned", func(t *testing.T) {
		for _, args := range [][]string{
			{"get", flatTargets, "old"},
			{"get", flatTargets, "old", "-o", "yaml"},
			{"get", flatTargets},
			{"label", flatTargets, "old", "tier=front", "--overwrite"},
			{"scale", flatTargets + "/old", "--replicas=1"},
		} {
			r := s.run(binaries.kubectl, "", args...)
			if n := strings.Count(r.stderr, "Warning: "+deprecated); r.code != 0 || n == 0 {
				t.Errorf("kubectl %q: exit code %d, %d warnings: %s", args, r.code, n, r.stderr)
			}
			r = s.run(binaries.kubectl, "", strings.Fields(strings.ReplaceAll(strings.Join(args, " "), flatTargets, fullTargets))...)
			if r.code != 0 || r.stderr != "" {
				t.Errorf("kubectl in v1: exit code %d, %s", r.code, r.stderr)
			}
		}
		http1 := s.httpClient(true)
		header := func(path string) []string {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url(path).String(), nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := http1.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			if !strings.Contains(path, "watch") {
				if _, err := io.Copy(io.Discard, response.Body); err != nil {
					t.Error(err)
				}
			}
			return response.Header.Values("Warning")
		}
		for path, want := range map[string][]string{
			flatPath + "?watch=true":                     {`299 - "` + deprecated + `"`},
			flatPath + "/old/log":                        {`299 - "` + deprecated + `"`},
			flatPath + "/old/logs":                       {`299 - "` + deprecated + `"`},
			flatPath + "/nobody":                         {`299 - "` + deprecated + `"`},
			"/apis/" + apiGroup + "/v1alpha1":            nil,
			"/openapi/v3/apis/" + apiGroup + "/v1alpha1": nil,
		} {
			if diff := cmp.Diff(want, header(path)); diff != "" {
				t.Errorf("warnings of %s (-want +got):\n%s", path, diff)
			}
		}
	})

	t.Run("streams work by both names of both versions", func(t *testing.T) {
		s.kubectl("wait", flatTargets+"/new", "--for=condition=Ready", "--timeout=30s")
		for _, version := range []string{"v1", "v1alpha1"} {
			base := "/apis/" + apiGroup + "/" + version + "/namespaces/default/targets/new/"
			conn, response, err := s.dial(base+"exec?command=echo&command=hello&stdout=true", nil, "v4.channel.k8s.io")
			if err != nil {
				t.Fatalf("%s: %v %+v", base, err, response)
			}
			var out bytes.Buffer
			if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			for {
				_, message, err := conn.ReadMessage()
				if err != nil {
					break
				}
				if len(message) > 1 && message[0] == 1 {
					out.Write(message[1:])
				}
			}
			want(base+"exec", out.String(), "hello\n")
			for _, name := range []string{"log", "logs"} {
				if r := s.run(binaries.kubectl, "", "get", "--raw", base+name); r.code != 0 {
					t.Errorf("%s%s: %s", base, name, r.stderr)
				}
			}
			for _, name := range []string{"attach", "portforward", "port-forward"} {
				request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url(base+name).String(), nil)
				if err != nil {
					t.Fatal(err)
				}
				response, err := s.httpClient(true).Do(request)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || response.StatusCode != http.StatusBadRequest {
					t.Errorf("%s%s without an upgrade: %s %s %v, want 400", base, name, response.Status, body, err)
				}
			}
		}
	})

	t.Run("protobuf in both", func(t *testing.T) {
		for _, version := range []string{"v1", "v1alpha1"} {
			path := "/apis/" + apiGroup + "/" + version + "/namespaces/default/targets/new"
			do := func(method string, body []byte) []byte {
				t.Helper()
				request, err := http.NewRequestWithContext(t.Context(), method, s.url(path).String(), bytes.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				request.Header.Set("Accept", "application/vnd.kubernetes.protobuf")
				request.Header.Set("Content-Type", "application/vnd.kubernetes.protobuf")
				response, err := s.httpClient(false).Do(request)
				if err != nil {
					t.Fatal(err)
				}
				defer response.Body.Close()
				answer, err := io.ReadAll(response.Body)
				if err != nil || response.StatusCode != http.StatusOK || !bytes.HasPrefix(answer, []byte("k8s\x00")) {
					t.Fatalf("%s %s: %s %.200q %v", method, path, response.Status, answer, err)
				}
				return answer
			}
			// The agent may write between the two.
			s.kubectl("wait", fullTargets+"/new", "--for=condition=Ready", "--timeout=30s")
			before := get(fullTargets, "new", "{.spec}")
			do(http.MethodPut, do(http.MethodGet, nil))
			want("the spec after it was written as protobuf of "+version, get(fullTargets, "new", "{.spec}"), before)
		}
	})
}

// testRulesOfOtherVersions: who asks in v1alpha1 gets past no rule for v1, and is
// warned through kube-apiserver too.
func testRulesOfOtherVersions(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "versions")
	r := admin.run(binaries.kubectl, strings.Replace(flat("web", "a"), "spec:", "spec:\n  agentName: local", 1), "create", "-n", ns, "-f", "-")
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	wantContains(t, "create", r.stderr, "Warning: "+deprecated)
	admin.waitTarget(ns, "web")

	clientConfig, _ := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		object, err := readAdmitted(request)
		if err != nil || object.APIVersion != apiGroup+"/v1" || slices.Contains(object.Command, "forbidden") || slices.Contains(object.Spec.Process.Command, "forbidden") {
			return &admissionv1.AdmissionResponse{Result: &metav1.Status{Code: http.StatusForbidden, Message: "the webhook says no to " + string(request.Object.Raw)}}
		}
		return &admissionv1.AdmissionResponse{Allowed: true}
	})
	admin.cleanUpObjects("validatingwebhookconfiguration/" + ns)
	admin.kubectlStdin(webhookConfiguration("ValidatingWebhookConfiguration", ns, ns, clientConfig), "create", "-f", "-")

	patch := func(command string) result {
		return admin.run(binaries.kubectl, "", "patch", flatTargets, "web", "-n", ns, "--type=merge", "--dry-run=server", "-p", `{"spec":{"command":["`+command+`"]}}`)
	}
	exec := func(command string) result {
		conn, response, err := admin.dial("/apis/"+apiGroup+"/v1alpha1/namespaces/"+ns+"/targets/web/exec?stdout=true&command="+command, nil, "v4.channel.k8s.io")
		if err == nil {
			conn.Close()
			return result{}
		}
		if response == nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return result{stderr: string(body), code: 1}
	}
	wantDenied(t, "a change in v1alpha1", "the webhook says no", func() result { return patch("forbidden") })
	wantDenied(t, "an exec in v1alpha1", "the webhook says no", func() result { return exec("forbidden") })
	for what, try := range map[string]func(string) result{"change": patch, "exec": exec} {
		if r := try("true"); r.code != 0 {
			t.Errorf("another %s: %s", what, r.stderr)
		}
	}
}
