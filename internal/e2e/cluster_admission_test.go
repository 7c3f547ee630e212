//go:build linux

package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admission/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/scale"
	"k8s.io/utils/ptr"
)

// noticed bounds how long what is written to the main API, a policy for example,
// may take to be heeded by the server, and by the controller manager, which looks
// for new resources every 30 s.
const noticed = 90 * time.Second

// TestAdmission is what a cluster decides about targets, counts of them, cleans
// up and records, as it does for its own objects.
func TestAdmission(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	policy := filepath.Join(dir, "audit.yaml")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	audits := auditLogs{main: filepath.Join(dir, "main.log"), ours: filepath.Join(dir, "ours.log")}
	c := startCluster(t,
		"--apiserver-arg=--audit-policy-file="+policy, "--apiserver-arg=--audit-log-path="+audits.main,
		"--controller-manager-arg=--horizontal-pod-autoscaler-sync-period=2s",
		// A quota that is older than the controller manager's discovery of
		// targets gets its count at the next sync: every five minutes else.
		"--controller-manager-arg=--resource-quota-sync-period=3s")
	a := c.serve(t, serveOptions{args: []string{"--audit-policy-file", policy, "--audit-log-path", audits.ours}})

	for what, test := range map[string]func(t *testing.T, c *cluster, admin *client){
		"a validating webhook denies an exec by its command, and a target by its spec": testValidatingWebhook,
		"a mutating webhook changes an exec's command, and a target":                   testMutatingWebhook,
		"policies deny and change execs and targets":                                   testPolicies,
		"a webhook for v1 is asked about v1alpha1 too":                                 testRulesOfOtherVersions,
		"a ResourceQuota counts targets":                                               testQuota,
		"a namespace takes its targets along":                                          testNamespaceDeletion,
		"targets are collected with their owners, and are owners":                      testOwners,
		"targets scale by the scale client, and by a HorizontalPodAutoscaler":          testScale,
		"an exec has one ID in both audit logs": func(t *testing.T, c *cluster, admin *client) {
			testAudit(t, c, admin, audits)
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			test(t, c, a.with(t))
		})
	}
}

// newMarker is a number of seconds that no other sleep of this machine has: it
// tells the processes of a test from all others.
func newMarker() string { return fmt.Sprintf("%d%04d", os.Getpid(), unique.Add(1)) }

// marked lists the processes whose command line is exactly this sleep.
func marked(marker string) []string {
	out, _ := exec.Command("pgrep", "-xf", "sleep "+marker).Output() // it fails if there is none
	return strings.Fields(string(out))
}

// wantMarked waits until exactly so many such processes run.
func wantMarked(t testing.TB, marker string, want int, within time.Duration) {
	t.Helper()
	eventually(t, fmt.Sprintf("processes of sleep %s: %d", marker, want), within, func() error {
		if pids := marked(marker); len(pids) != want {
			return fmt.Errorf("there are %d: %q", len(pids), pids)
		}
		return nil
	})
}

// sleeper is the manifest of a target that sleeps.
func sleeper(name, seconds string) string {
	return `
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata:
  name: ` + name + `
  labels: {app: ` + name + `}
spec:
  agentName: local
  terminationGracePeriodSeconds: 2
  process:
    command: [sleep, "` + seconds + `"]
`
}

// create creates objects, and waits until the target named is ready, if one is.
func (c *client) create(namespace, manifest, ready string) {
	c.t.Helper()
	c.kubectlStdin(manifest, "create", "-n", namespace, "-f", "-")
	if ready != "" {
		c.waitTarget(namespace, ready)
	}
}

func (c *client) waitTarget(namespace, name string) {
	c.t.Helper()
	c.kubectl("wait", "-n", namespace, "target/"+name, "--for=condition=Ready", "--timeout=60s")
}

// cleanUpObjects deletes objects of the cluster, which namespaces don't take
// along.
func (c *client) cleanUpObjects(names ...string) {
	c.t.Cleanup(func() {
		if r := c.run(binaries.kubectl, "", append([]string{"delete", "--ignore-not-found", "--timeout=30s"}, names...)...); r.code != 0 {
			c.t.Errorf("deleting %q: %s", names, r.stderr)
		}
	})
}

// exec runs a command in a target by the plugin.
func (c *client) exec(protocol, namespace, target string, command ...string) result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := c.command(ctx, binaries.plugin, append([]string{"exec", "-n", namespace, target, "--"}, command...)...)
	cmd.Env = append(cmd.Env, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS="+strconv.FormatBool(protocol != "spdy"))
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		c.t.Fatal(err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// wantDenied waits until what is tried is refused with that message.
func wantDenied(t testing.TB, what, message string, try func() result) {
	t.Helper()
	eventually(t, what+" is denied", noticed, func() error {
		if r := try(); r.code == 0 || !strings.Contains(r.stderr, message) {
			return fmt.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
		}
		return nil
	})
}

// serveWebhook serves an admission webhook on loopback until the test ends, or
// close is called. It returns the clientConfig that a configuration needs.
func serveWebhook(t testing.TB, review func(*admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse) (clientConfig string, close func()) {
	t.Helper()
	ca := newAuthority(t, "webhook")
	pair := ca.issue(t, filepath.Join(t.TempDir(), "webhook"), &x509.Certificate{
		Subject:     pkix.Name{CommonName: "webhook"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	certificate, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var message admissionv1.AdmissionReview
		if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&message); err != nil || message.Request == nil {
			http.Error(w, "no AdmissionReview", http.StatusBadRequest)
			return
		}
		message.Response = review(message.Request)
		message.Response.UID = message.Request.UID
		message.Request = nil
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(message)
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	server.StartTLS()
	t.Cleanup(server.Close)
	return fmt.Sprintf(`{url: "%s/", caBundle: %s}`, server.URL, base64.StdEncoding.EncodeToString(ca.pem())), server.Close
}

// webhookConfiguration has a webhook asked about targets and execs of one
// namespace.
func webhookConfiguration(kind, name, namespace, clientConfig string) string {
	return `
apiVersion: admissionregistration.k8s.io/v1
kind: ` + kind + `
metadata: {name: ` + name + `}
webhooks:
- name: targets.e2e.aaserver.io
  admissionReviewVersions: [v1]
  sideEffects: None
  timeoutSeconds: 10
  failurePolicy: Fail
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ` + namespace + `}}
  rules:
  - {apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [targets]}
  - {apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CONNECT], resources: [targets/exec]}
  clientConfig: ` + clientConfig + "\n"
}

// admitted is what the tests' webhooks look at, of a target or of the options of
// an exec.
type admitted struct {
	metav1.TypeMeta
	Command []string
	Spec    struct {
		Process struct{ Command []string }
	}
}

func readAdmitted(request *admissionv1.AdmissionRequest) (admitted, error) {
	var object admitted
	return object, json.Unmarshal(request.Object.Raw, &object)
}

func testValidatingWebhook(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "webhook")
	admin.create(ns, sleeper("web", "1000"), "web")

	execs := make(chan *admissionv1.AdmissionRequest, 100)
	clientConfig, closeWebhook := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		object, err := readAdmitted(request)
		denied := err != nil
		switch request.Operation {
		case admissionv1.Connect:
			denied = denied || slices.Contains(object.Command, "forbidden")
			select {
			case execs <- request:
			default:
			}
		default:
			denied = denied || slices.Contains(object.Spec.Process.Command, "forbidden")
		}
		if denied {
			return &admissionv1.AdmissionResponse{Result: &metav1.Status{Code: http.StatusForbidden, Message: "the webhook says no"}}
		}
		return &admissionv1.AdmissionResponse{Allowed: true}
	})
	admin.cleanUpObjects("validatingwebhookconfiguration/" + ns)
	admin.kubectlStdin(webhookConfiguration("ValidatingWebhookConfiguration", ns, ns, clientConfig), "create", "-f", "-")

	for _, protocol := range []string{"websocket", "spdy"} {
		wantDenied(t, "the exec over "+protocol, "the webhook says no", func() result {
			return admin.exec(protocol, ns, "web", "echo", "forbidden")
		})
		if r := admin.exec(protocol, ns, "web", "echo", "fine"); r.code != 0 || r.stdout != "fine\n" {
			t.Errorf("another command over %s: exit code %d, %q, %s", protocol, r.code, r.stdout, r.stderr)
		}
	}
	request := <-execs
	type asked struct {
		Operation                               admissionv1.Operation
		Kind, Resource                          string
		SubResource, Name, Namespace, User, API string
	}
	object, err := readAdmitted(request)
	if err != nil {
		t.Fatal(err)
	}
	got := asked{request.Operation, request.Kind.Kind, request.Resource.Resource, request.SubResource, request.Name, request.Namespace, request.UserInfo.Username, object.APIVersion}
	want := asked{admissionv1.Connect, "TargetExecOptions", "targets", "exec", "web", ns, "admin", "streaming.aaserver.io/v1"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what the webhook was asked (-want +got):\n%s", diff)
	}

	r := admin.run(binaries.kubectl, sleeper("bad", "forbidden"), "create", "-n", ns, "-f", "-")
	if r.code == 0 || !strings.Contains(r.stderr, "the webhook says no") {
		t.Errorf("a target that the webhook denies: %d, %s", r.code, r.stderr)
	}
	admin.create(ns, sleeper("good", "1000"), "")
	r = admin.run(binaries.kubectl, "", "patch", "target", "good", "-n", ns, "--type=merge", "-p", `{"spec":{"process":{"command":["forbidden"]}}}`)
	if r.code == 0 || !strings.Contains(r.stderr, "the webhook says no") {
		t.Errorf("a change that the webhook denies: %d, %s", r.code, r.stderr)
	}

	// A webhook that can't be asked is no way around it.
	closeWebhook()
	if r := admin.exec("websocket", ns, "web", "echo", "fine"); r.code == 0 || !strings.Contains(r.stderr, "failed calling webhook") {
		t.Errorf("an exec without the webhook: exit code %d, %q, %s", r.code, r.stdout, r.stderr)
	}
}

func testMutatingWebhook(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "webhook")
	clientConfig, _ := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		patch := `[{"op":"add","path":"/metadata/annotations","value":{"by":"the webhook"}}]`
		if request.Operation == admissionv1.Connect {
			patch = `[{"op":"replace","path":"/command","value":["echo","by the webhook"]}]`
		}
		return &admissionv1.AdmissionResponse{Allowed: true, Patch: []byte(patch), PatchType: ptr.To(admissionv1.PatchTypeJSONPatch)}
	})
	admin.create(ns, sleeper("web", "1000"), "web")
	admin.cleanUpObjects("mutatingwebhookconfiguration/" + ns)
	admin.kubectlStdin(webhookConfiguration("MutatingWebhookConfiguration", ns, ns, clientConfig), "create", "-f", "-")
	for _, protocol := range []string{"websocket", "spdy"} {
		eventually(t, "the exec over "+protocol+" is changed", noticed, func() error {
			if r := admin.exec(protocol, ns, "web", "echo", "by the client"); r.code != 0 || r.stdout != "by the webhook\n" {
				return fmt.Errorf("exit code %d, %q, %s", r.code, r.stdout, r.stderr)
			}
			return nil
		})
	}
	admin.create(ns, sleeper("changed", "1000"), "")
	if got := admin.kubectl("get", "target", "changed", "-n", ns, "-o", "jsonpath={.metadata.annotations.by}"); got != "the webhook" {
		t.Errorf("the new target's annotation is %q", got)
	}
}

func testPolicies(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "policy")
	admin.create(ns, sleeper("web", "1000"), "web")
	connects, writes, changes := ns+"-connects", ns+"-writes", ns+"-changes"
	binding := func(kind, name, more string) string {
		return `
---
apiVersion: admissionregistration.k8s.io/v1
kind: ` + kind + `Binding
metadata: {name: ` + name + `}
spec:
  policyName: ` + name + `
  matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ` + ns + `}}}
` + more
	}
	admin.cleanUpObjects(
		"validatingadmissionpolicy/"+connects, "validatingadmissionpolicybinding/"+connects,
		"validatingadmissionpolicy/"+writes, "validatingadmissionpolicybinding/"+writes,
		"mutatingadmissionpolicy/"+changes, "mutatingadmissionpolicybinding/"+changes)
	admin.kubectlStdin(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: `+connects+`}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CONNECT], resources: [targets/exec]}
  validations:
  - {expression: '!object.command.exists(word, word == "forbidden")', message: the policy says no to the command}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: `+writes+`}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [targets]}
  validations:
  - {expression: object.spec.replicas <= 3, message: the policy says no to so many}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: `+changes+`}
spec:
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules:
    - {apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CREATE], resources: [targets]}
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{metadata: Object.metadata{labels: {"by": "the-policy"}}}'}
`+binding("ValidatingAdmissionPolicy", connects, "  validationActions: [Deny]\n")+
		binding("ValidatingAdmissionPolicy", writes, "  validationActions: [Deny]\n")+
		binding("MutatingAdmissionPolicy", changes, ""), "create", "-f", "-")

	for _, protocol := range []string{"websocket", "spdy"} {
		wantDenied(t, "the exec over "+protocol, "the policy says no to the command", func() result {
			return admin.exec(protocol, ns, "web", "echo", "forbidden")
		})
		if r := admin.exec(protocol, ns, "web", "echo", "fine"); r.code != 0 || r.stdout != "fine\n" {
			t.Errorf("another command over %s: exit code %d, %q, %s", protocol, r.code, r.stdout, r.stderr)
		}
	}
	wantDenied(t, "a target with too many replicas", "the policy says no to so many", func() result {
		return admin.run(binaries.kubectl, strings.Replace(sleeper("many", "1000"), "spec:", "spec:\n  replicas: 4", 1), "create", "--dry-run=server", "-n", ns, "-f", "-")
	})
	r := admin.run(binaries.kubectl, "", "patch", "target", "web", "-n", ns, "--type=merge", "-p", `{"spec":{"replicas":4}}`)
	if r.code == 0 || !strings.Contains(r.stderr, "the policy says no to so many") {
		t.Errorf("a change to too many replicas: exit code %d, %s", r.code, r.stderr)
	}
	eventually(t, "a new target is changed", noticed, func() error {
		got := admin.kubectlStdin(sleeper("changed", "1000"), "create", "--dry-run=server", "-n", ns, "-o", "jsonpath={.metadata.labels}", "-f", "-")
		if got != `{"app":"changed","by":"the-policy"}` {
			return fmt.Errorf("its labels are %s", got)
		}
		return nil
	})
}

func testQuota(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "quota")
	const counted = corev1.ResourceName("count/targets.streaming.aaserver.io")
	admin.create(ns, `
apiVersion: v1
kind: ResourceQuota
metadata: {name: targets}
spec: {hard: {`+string(counted)+`: "2"}}
`, "")
	used := func(want string) {
		t.Helper()
		eventually(t, "the quota says that "+want+" of 2 are used", noticed, func() error {
			quota, err := c.kube.CoreV1().ResourceQuotas(ns).Get(t.Context(), "targets", metav1.GetOptions{})
			if err != nil {
				return err
			}
			hard := quota.Status.Hard[counted]
			now, known := quota.Status.Used[counted]
			if hard.String() != "2" || !known || now.String() != want {
				return fmt.Errorf("it says %s of %s", &now, &hard)
			}
			return nil
		})
	}
	used("0")
	// The server's own watch of quotas may be a moment behind what was read.
	eventually(t, "the first target is let in", noticed, func() error {
		r := admin.run(binaries.kubectl, sleeper("one", "1000"), "create", "-n", ns, "-f", "-")
		if r.code != 0 && !strings.Contains(r.stderr, "status unknown for quota") {
			t.Fatal(r.stderr)
		}
		if r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	})
	admin.create(ns, sleeper("two", "1000"), "")
	used("2")
	exceeds := func() {
		t.Helper()
		r := admin.run(binaries.kubectl, sleeper("three", "1000"), "create", "-n", ns, "-f", "-")
		if r.code == 0 || !strings.Contains(r.stderr, "exceeded quota: targets, requested: "+string(counted)+"=1, used: "+string(counted)+"=2, limited: "+string(counted)+"=2") {
			t.Errorf("a third target: exit code %d, %s", r.code, r.stderr)
		}
	}
	exceeds()
	// What is no new object isn't counted.
	admin.kubectl("scale", "target/one", "-n", ns, "--replicas=2")
	admin.kubectl("label", "target", "one", "-n", ns, "changed=yes")
	exceeds()
	admin.kubectl("delete", "target", "one", "-n", ns, "--timeout=60s")
	used("1")
	admin.create(ns, sleeper("three", "1000"), "")
	used("2")
}

func testNamespaceDeletion(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "doomed")
	marker := newMarker()
	admin.create(ns, strings.Replace(sleeper("sleeps", marker), "spec:", "spec:\n  replicas: 2", 1), "sleeps")
	// It ignores SIGTERM, so that there is time to see the namespace end.
	admin.create(ns, strings.Replace(strings.Replace(sleeper("stubborn", ""), `[sleep, ""]`, `[sh, -c, "trap '' TERM; while :; do sleep 1; done"]`, 1),
		"Seconds: 2", "Seconds: 5", 1), "stubborn")
	wantMarked(t, marker, 2, 30*time.Second)

	admin.kubectl("delete", "namespace", ns, "--wait=false")
	eventually(t, "nothing can be created any more", 30*time.Second, func() error {
		r := admin.run(binaries.kubectl, sleeper("late", "1000"), "create", "--dry-run=server", "-n", ns, "-f", "-")
		if r.code == 0 || !strings.Contains(r.stderr, "because it is being terminated") {
			return fmt.Errorf("exit code %d, %s", r.code, r.stderr)
		}
		return nil
	})
	admin.kubectl("wait", "namespace/"+ns, "--for=delete", "--timeout=80s")
	if left := marked(marker); len(left) > 0 {
		t.Errorf("the namespace is gone, and these processes of its targets aren't: %q", left)
	}
	if got := admin.kubectl("get", "targets", "-n", ns, "-o", "name"); got != "" {
		t.Errorf("the namespace is gone, and these aren't: %s", got)
	}
	r := admin.run(binaries.kubectl, sleeper("late", "1000"), "create", "-n", ns, "-f", "-")
	wantContains(t, "creating a target in a namespace that is gone", r.stderr, `namespaces "`+ns+`" not found`)
}

func testOwners(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "owners")
	marker := newMarker()
	configMaps := c.kube.CoreV1().ConfigMaps(ns)
	owner, err := configMaps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "owner"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	owned := func(manifest, apiVersion, kind, name string, uid types.UID) string {
		return strings.Replace(manifest, "metadata:", fmt.Sprintf("metadata:\n  ownerReferences: [{apiVersion: %s, kind: %s, name: %s, uid: %s}]", apiVersion, kind, name, uid), 1)
	}
	admin.create(ns, owned(sleeper("owned", marker), "v1", "ConfigMap", "owner", owner.UID), "owned")
	admin.create(ns, sleeper("free", marker), "free")
	// And the other way round: a target may own something, a Secret for example.
	uid := types.UID(admin.kubectl("get", "target", "free", "-n", ns, "-o", "jsonpath={.metadata.uid}"))
	admin.create(ns, owned("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: dependent\n", "streaming.aaserver.io/v1", "Target", "free", uid), "")
	wantMarked(t, marker, 2, 30*time.Second)

	if err := configMaps.Delete(t.Context(), "owner", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	admin.kubectl("wait", "-n", ns, "target/owned", "--for=delete", "--timeout=80s")
	wantMarked(t, marker, 1, 10*time.Second)
	if got := admin.kubectl("get", "targets,configmaps", "-n", ns, "-o", "name"); !strings.Contains(got, "/free\n") || !strings.Contains(got, "/dependent\n") {
		t.Errorf("those that aren't owned by it are gone too; left are: %s", got)
	}

	admin.kubectl("delete", "target", "free", "-n", ns, "--cascade=foreground", "--timeout=80s")
	wantMarked(t, marker, 0, 10*time.Second)
	if got := admin.kubectl("get", "configmaps", "-n", ns, "-o", "name"); strings.Contains(got, "dependent") {
		t.Errorf("the target is gone, and what it owned isn't: %s", got)
	}
}

func testScale(t *testing.T, c *cluster, admin *client) {
	ns := c.namespace(t, "scale")
	marker := newMarker()
	admin.create(ns, sleeper("web", marker), "web")

	// As kube-controller-manager makes it: all that it knows is from discovery.
	config := admin.config()
	client, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	cached := memory.NewMemCacheClient(client)
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(cached)
	scales, err := scale.NewForConfig(config, mapper, dynamic.LegacyAPIPathResolverFunc, scale.NewDiscoveryScaleKindResolver(cached))
	if err != nil {
		t.Fatal(err)
	}
	targets := scales.Scales(ns)
	resource := schema.GroupResource{Group: apiGroup, Resource: "targets"}
	eventually(t, "the scale has the status", 30*time.Second, func() error {
		got, err := targets.Get(t.Context(), resource, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		want := autoscalingv1.ScaleStatus{Replicas: 1, Selector: "streaming.aaserver.io/target=web"}
		if diff := cmp.Diff(want, autoscalingv1.ScaleStatus(got.Status)); diff != "" || got.Spec.Replicas != 1 {
			return fmt.Errorf("spec.replicas is %d; the status is (-want +got):\n%s", got.Spec.Replicas, diff)
		}
		return nil
	})
	got, err := targets.Get(t.Context(), resource, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got.Spec.Replicas = 3
	if _, err := targets.Update(t.Context(), resource, got, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wantMarked(t, marker, 3, 30*time.Second)
	if _, err := targets.Update(t.Context(), resource, got, metav1.UpdateOptions{}); err == nil {
		t.Error("an update of an old state was accepted")
	}
	if _, err := targets.Patch(t.Context(), schema.GroupVersionResource{Group: apiGroup, Version: "v1", Resource: "targets"}, "web",
		types.MergePatchType, []byte(`{"spec":{"replicas":1}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	wantMarked(t, marker, 1, 30*time.Second)

	// The real autoscaler: with fewer than its minimum, it asks for no metrics.
	admin.create(ns, `
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: web}
spec:
  scaleTargetRef: {apiVersion: streaming.aaserver.io/v1, kind: Target, name: web}
  minReplicas: 2
  maxReplicas: 4
  metrics: [{type: External, external: {metric: {name: queue}, target: {type: AverageValue, averageValue: "1"}}}]
`, "")
	eventually(t, "the autoscaler has scaled", noticed, func() error {
		if got := admin.kubectl("get", "target", "web", "-n", ns, "-o", "jsonpath={.spec.replicas}"); got != "2" {
			return fmt.Errorf("spec.replicas is %s; the autoscaler: %s", got, admin.kubectl("get", "hpa", "web", "-n", ns, "-o", "jsonpath={.status}"))
		}
		return nil
	})
	wantMarked(t, marker, 2, 30*time.Second)
}

// auditPolicy records streams with all there is, and the rest without bodies: a
// target's has its environment.
const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
- level: RequestResponse
  resources: [{group: streaming.aaserver.io, resources: [targets/exec, targets/attach, targets/log, targets/portforward]}]
- level: Metadata
  resources: [{group: streaming.aaserver.io}]
- level: None
`

type auditLogs struct{ main, ours string }

// auditEvent is what the test looks at of an audit.k8s.io/v1 Event.
type auditEvent struct {
	AuditID, Stage, Verb, RequestURI string
	User                             struct{ Username string }
	ObjectRef                        struct{ Resource, Subresource, Namespace, Name string }
	ResponseStatus                   struct{ Code int }
	Annotations                      map[string]string
}

func readAudit(t testing.TB, file string, wanted func(auditEvent) bool) []auditEvent {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var events []auditEvent
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return events // a line that is being written is none yet
		}
		var event auditEvent
		if err == nil {
			err = json.Unmarshal(line, &event)
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if wanted(event) {
			events = append(events, event)
		}
	}
}

func testAudit(t *testing.T, c *cluster, admin *client, logs auditLogs) {
	ns := c.namespace(t, "audit")
	const secret, sent, printed = "the-secret-of-the-environment", "what-the-client-has-sent", "what-was-printed"
	admin.create(ns, strings.Replace(sleeper("web", "1000"), "  process:", "  process:\n    env: [{name: SECRET, value: "+secret+"}]", 1), "web")
	command := []string{"sh", "-c", `cat >/dev/null; echo "$SECRET"; echo what-was-"printed"; exit 3`}
	for _, protocol := range []string{"websocket", "spdy"} {
		t.Run(protocol, func(t *testing.T) {
			user := c.user(t, protocol, rule{verbs: "get create", resources: "targets/exec targets"})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := user.command(ctx, binaries.plugin, append([]string{"exec", "-i", "-n", ns, "web", "--"}, command...)...)
			cmd.Env = append(cmd.Env, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS="+strconv.FormatBool(protocol != "spdy"))
			cmd.Stdin = strings.NewReader(sent)
			out, _ := cmd.Output()
			if code := cmd.ProcessState.ExitCode(); code != 3 || string(out) != secret+"\n"+printed+"\n" {
				t.Fatalf("exit code %d, %q", code, out)
			}

			ofExec := func(stage string) func(auditEvent) bool {
				return func(e auditEvent) bool {
					return e.Stage == stage && e.ObjectRef.Subresource == "exec" && e.ObjectRef.Namespace == ns && strings.HasPrefix(e.User.Username, protocol+"-")
				}
			}
			var ours, main auditEvent
			for _, from := range []struct {
				name, file string
				event      *auditEvent
			}{{"our", logs.ours, &ours}, {"kube-apiserver's", logs.main, &main}} {
				eventually(t, from.name+" audit log has the exec's end", 30*time.Second, func() error {
					events := readAudit(t, from.file, ofExec("ResponseComplete"))
					if len(events) != 1 {
						return fmt.Errorf("it has %d", len(events))
					}
					*from.event = events[0]
					return nil
				})
			}
			if ours.AuditID == "" || ours.AuditID != main.AuditID {
				t.Errorf("the Audit-ID is %q in our log, and %q in kube-apiserver's", ours.AuditID, main.AuditID)
			}
			if ours.User.Username != main.User.Username || ours.ResponseStatus.Code != http.StatusSwitchingProtocols {
				t.Errorf("the user is %q and %q, the status %d", ours.User.Username, main.User.Username, ours.ResponseStatus.Code)
			}
			if n := len(readAudit(t, logs.ours, ofExec("ResponseStarted"))); n != 1 {
				t.Errorf("our log has %d beginnings of the exec, want 1: it is long-running", n)
			}

			text, err := json.Marshal(command)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for key, value := range ours.Annotations {
				if name, ok := strings.CutPrefix(key, apiGroup+"/"); ok {
					got[name] = value
				}
			}
			if len(got["session"]) != 36 {
				t.Errorf("the session is %q, want a UUID", got["session"])
			}
			delete(got, "session")
			want := map[string]string{
				"instance": "web-0", "command": string(text), "cause": "command terminated with exit code 3",
				"bytes-in": strconv.Itoa(len(sent)), "bytes-out": strconv.Itoa(len(secret + printed + "\n\n")),
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the annotations (-want +got):\n%s", diff)
			}
		})
	}
	for _, file := range []string{logs.main, logs.ours} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, hidden := range []string{secret, sent, printed} {
			if strings.Contains(string(text), hidden) {
				t.Errorf("%s has %q in it", filepath.Base(file), hidden)
			}
		}
	}
}
