//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	admissionv1 "k8s.io/api/admission/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/utils/ptr"
)

// TestPolicy tries to get round the classes of targets, through kube-apiserver.
// The parts share a server: all but one name the classes of their targets, so
// that one can change which is the default.
func TestPolicy(t *testing.T) {
	c := sharedCluster(t)
	dir := t.TempDir()
	policy, audit := filepath.Join(dir, "audit.yaml"), filepath.Join(dir, "audit.log")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	a := c.serve(t, serveOptions{args: []string{"--audit-policy-file", policy, "--audit-log-path", audit}})

	for what, test := range map[string]func(*testing.T, *aggregated){
		"without its class":          testMissingClass,
		"the verb use":               testUse,
		"the default class":          testDefaultClass,
		"an edited class":            testEditedClass,
		"whom and where":             testSourcesAgentsUsers,
		"ports":                      testPortPolicy,
		"ratcheting":                 testRatcheting,
		"switches":                   testSwitches,
		"webhooks and connections":   testConnectWebhooks,
		"policies and connections":   testConnectPolicies,
		"external admission, writes": testExternalWrites,
		"limits": func(t *testing.T, a *aggregated) {
			testLimits(t, a, audit)
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			test(t, a)
		})
	}
}

// sender sends what a client writes, as it is.
type sender struct {
	t    testing.TB
	rest rest.Interface
}

func (c *client) sender() sender {
	c.t.Helper()
	made, err := discovery.NewDiscoveryClientForConfig(c.config())
	if err != nil {
		c.t.Fatal(err)
	}
	return sender{c.t, made.RESTClient()}
}

func (s sender) send(method, path, contentType, body string) error {
	return s.rest.Verb(method).RequestURI(path).SetHeader("Content-Type", contentType).Body([]byte(body)).Do(s.t.Context()).Error()
}

// create creates a target, or says why it may not be.
func (s sender) create(namespace, manifest string, query ...string) error {
	return s.send(http.MethodPost, listPath(namespace, query...), "application/yaml", manifest)
}

func (s sender) merge(path, patch string) error {
	return s.send(http.MethodPatch, path, "application/merge-patch+json", patch)
}

// apply applies on the server's side.
func (s sender) apply(path, manager, manifest string) error {
	return s.send(http.MethodPatch, path+"?force=true&fieldManager="+manager, "application/apply-patch+yaml", manifest)
}

// get reads a field of an object as text, "" if there is none, by the keys that
// lead to it.
func (s sender) get(path string, keys ...string) string {
	s.t.Helper()
	text, err := s.rest.Get().RequestURI(path).Do(s.t.Context()).Raw()
	if err != nil {
		s.t.Fatal(err)
	}
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		s.t.Fatal(err)
	}
	for _, key := range keys {
		fields, _ := value.(map[string]any)
		value = fields[key]
	}
	if value == nil {
		return ""
	}
	return fmt.Sprint(value)
}

// class makes or changes a class.
func (s sender) class(name, spec string) {
	s.t.Helper()
	path := classPath(name)
	manifest := "apiVersion: streaming.aaserver.io/v1\nkind: TargetClass\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"
	if err := s.apply(path, "e2e", manifest); err != nil {
		s.t.Fatal(err)
	}
}

// must fails the test if there is an error.
func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// wantForbidden fails unless it was refused in these words.
func wantForbidden(t testing.TB, what string, err error, parts ...string) {
	t.Helper()
	if !apierrors.IsForbidden(err) {
		t.Errorf("%s: got %v, want Forbidden", what, err)
		return
	}
	wantContains(t, what, err.Error(), parts...)
}

func classPath(name string) string { return apiPath + "/targetclasses/" + name }

func listPath(namespace string, query ...string) string {
	path := apiPath + "/namespaces/" + namespace + "/targets"
	if len(query) > 0 {
		path += "?" + strings.Join(query, "&")
	}
	return path
}

func onePath(namespace, name string) string { return listPath(namespace) + "/" + name }

// newName names a class that no other part of the tests has.
func newName(prefix string) string { return fmt.Sprintf("%s-%d", prefix, unique.Add(1)) }

// everything is what a class allows that allows all that the tests need.
const everything = `{sources: [process], agents: ["*"], users: ["*"], agentUser: true}`

// of is the manifest of a target that sleeps, of a class, with more lines of
// its spec.
func of(class, name string, more ...string) string {
	return ofSleep(class, name, "1000", more...)
}

func ofSleep(class, name, seconds string, more ...string) string {
	return strings.Replace(sleeper(name, seconds), "spec:\n", "spec:\n  className: "+class+"\n"+strings.Join(more, ""), 1)
}

// webOf is the manifest of a target that answers on the port 8080, and lists
// another.
func webOf(class, name string) string {
	return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: %s}
spec:
  className: %s
  agentName: local
  terminationGracePeriodSeconds: 1
  process: {command: [%s, demo, web], args: ["--listen=127.0.0.1:$(AASERVER_PORT_HTTP)"]}
  ports: [{name: http, port: 8080}, {name: other, port: 9}, {name: dns, port: 5353, protocol: UDP}]
`, name, class, binaries.server)
}

// way is one of the ways to connect to a target.
type way struct{ subresource, query, protocol string }

func (w way) String() string { return w.subresource + "?" + w.query + " over " + w.protocol }

// ways are all that there are.
func ways() []way {
	var all []way
	for subresource, query := range map[string]string{"exec": "stdout=true&command=true", "attach": "stdout=true"} {
		for _, protocol := range []string{"SPDY v4.channel.k8s.io", "v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io"} {
			all = append(all, way{subresource, query, protocol})
		}
	}
	for _, name := range []string{"portforward", "port-forward"} {
		all = append(all,
			way{name, "", "SPDY portforward.k8s.io"},
			way{name, "", "SPDY/3.1+portforward.k8s.io"},
			way{name, "ports=8080", "SPDY/3.1+portforward.k8s.io"},
			way{name, "ports=8080", "v4.channel.k8s.io"},
			way{name, "ports=8080", "v4.base64.channel.k8s.io"})
	}
	for _, name := range []string{"log", "logs"} {
		all = append(all, way{name, "", "HTTP"}, way{name, "", "binary.k8s.io"}, way{name, "", "base64.binary.k8s.io"})
	}
	return all
}

// connect connects one way, gives it up at once, and returns the status code
// with what a refusal said.
func (w way) connect(c *client, namespace, target string) (int, string) {
	c.t.Helper()
	return w.connectBy(c, "v1", namespace, target)
}

// connectBy is connect by a version of the API.
func (w way) connectBy(c *client, version, namespace, target string) (int, string) {
	c.t.Helper()
	path := strings.Replace(targetPath(namespace, target, w.subresource, w.query), "/v1/", "/"+version+"/", 1)
	spdyProtocol, isSPDY := strings.CutPrefix(w.protocol, "SPDY ")
	if !isSPDY && w.protocol != "HTTP" {
		conn, response, err := c.dial(path, nil, w.protocol)
		if response == nil {
			c.t.Fatal(err)
		}
		if conn != nil {
			conn.Close()
			return response.StatusCode, ""
		}
		return response.StatusCode, refusal(response)
	}
	method := http.MethodGet
	if isSPDY {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.url(path).String(), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if isSPDY {
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "SPDY/3.1")
		req.Header.Set("X-Stream-Protocol-Version", spdyProtocol)
	}
	response, err := c.httpClient(isSPDY).Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode < 300 {
		return response.StatusCode, ""
	}
	return response.StatusCode, refusal(response)
}

// wantAllRefused fails unless every way to connect is refused, before the
// upgrade and in a Status of these words.
func wantAllRefused(c *client, namespace, target string, parts ...string) {
	c.t.Helper()
	for _, version := range []string{"v1", "v1alpha1"} {
		for _, w := range ways() {
			code, message := w.connectBy(c, version, namespace, target)
			if code != http.StatusForbidden || !strings.HasPrefix(message, "403 Forbidden: ") {
				c.t.Errorf("%s of %s: %d %q, want 403 and a Status", w, version, code, message)
			}
			wantContains(c.t, w.String(), message, parts...)
		}
	}
}

func wantAllConnected(c *client, namespace, target string) {
	c.t.Helper()
	for _, w := range ways() {
		want := http.StatusSwitchingProtocols
		if w.protocol == "HTTP" {
			want = http.StatusOK
		}
		if code, message := w.connect(c, namespace, target); code != want {
			c.t.Errorf("%s: %d %q, want %d", w, code, message, want)
		}
	}
}

// held is an exec of cat that stays open.
type held struct {
	channels
	said int
}

func hold(t *testing.T, c *client, namespace, target string) *held {
	t.Helper()
	h := &held{channels: dialChannels(t, c, targetPath(namespace, target, "exec", "stdin=true", "stdout=true", "command=cat"), "v5.channel.k8s.io")}
	h.wantAlive()
	return h
}

// wantAlive says something and hears it.
func (h *held) wantAlive() {
	h.t.Helper()
	h.said++
	word := fmt.Sprintf("word %d\n", h.said)
	h.send(0, []byte(word))
	var got []byte
	for !bytes.Contains(got, []byte(word)) {
		channel, data, err := h.next()
		if err != nil {
			h.t.Fatalf("the exec that is held: %v after %q", err, got)
		}
		if channel == 1 {
			got = append(got, data...)
		}
	}
}

// grantUse lets a client use classes by name, and waits until kube-apiserver
// knows.
func (c *cluster) grantUse(t *testing.T, who *client, classes ...string) {
	t.Helper()
	meta := metav1.ObjectMeta{Name: newName("use")}
	user := userName(t, who)
	_, err := c.kube.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{Verbs: []string{"use"}, APIGroups: []string{apiGroup}, Resources: []string{"targetclasses"}, ResourceNames: classes},
	}}, metav1.CreateOptions{})
	must(t, "the role", err)
	_, err = c.kube.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta,
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
	}, metav1.CreateOptions{})
	must(t, "the binding", err)
	t.Cleanup(func() {
		c.kube.RbacV1().ClusterRoleBindings().Delete(context.Background(), meta.Name, metav1.DeleteOptions{})
		c.kube.RbacV1().ClusterRoles().Delete(context.Background(), meta.Name, metav1.DeleteOptions{})
	})
	eventually(t, "kube-apiserver knows the role", 30*time.Second, func() error {
		got, err := c.kube.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User:               user,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "use", Group: apiGroup, Resource: "targetclasses", Name: classes[0]},
		}}, metav1.CreateOptions{})
		if err == nil && !got.Status.Allowed {
			err = errors.New("it isn't allowed")
		}
		return err
	})
}

func testMissingClass(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	api := admin.sender()
	ns, doomed, class := c.namespace(t, "classless"), c.namespace(t, "classless"), newName("passing")

	wantForbidden(t, "a target of a class that isn't there", api.create(ns, of(class, "early")), `class "`+class+`" does not exist`, "create the class, or name another in spec.className")
	wantForbidden(t, "the same by server-side apply", api.apply(onePath(ns, "early"), "e2e", of(class, "early")), `class "`+class+`" does not exist`)

	api.class(class, everything)
	marker := newMarker()
	for _, namespace := range []string{ns, doomed} {
		must(t, "creating web", api.create(namespace, webOf(class, "web")))
		must(t, "creating sleeps", api.create(namespace, ofSleep(class, "sleeps", marker)))
	}
	for _, namespace := range []string{ns, doomed} {
		admin.waitTarget(namespace, "web")
		admin.waitTarget(namespace, "sleeps")
	}
	wantAllConnected(admin, ns, "web")
	live := hold(t, admin, ns, "web")
	address := forward(t, admin, "tunnel", targetPath(ns, "web", "portforward"), "0:8080")[0]
	ask := stayConnected(t, address)
	wantMarked(t, marker, 2, 30*time.Second)

	must(t, "deleting the class", api.send(http.MethodDelete, classPath(class), "application/json", ""))
	wantAllRefused(admin, ns, "web", `class "`+class+`" does not exist`, "create the class")
	r := admin.target("exec", "web", "-n", ns, "--", "true")
	if r.code == 0 || !strings.Contains(r.stderr, `class "`+class+`" does not exist`) {
		t.Errorf("the plugin: %+v", r)
	}
	wantForbidden(t, "a new target", api.create(ns, of(class, "late")), `class "`+class+`" does not exist`)
	wantForbidden(t, "another command", api.merge(onePath(ns, "sleeps"), `{"spec":{"process":{"command":["sleep","5"]}}}`), `class "`+class+`" does not exist`)
	wantForbidden(t, "another class that isn't there", api.merge(onePath(ns, "sleeps"), `{"spec":{"className":"nowhere"}}`), `class "nowhere" does not exist`)

	// What runs goes on, and so do the connections that were open. There are no
	// more of them.
	live.wantAlive()
	ask()
	wantRefused(t, address)
	ask()
	wantMarked(t, marker, 2, time.Second)
	must(t, "a label", api.merge(onePath(ns, "sleeps"), `{"metadata":{"labels":{"changed":"yes"},"annotations":{"changed":"yes"}}}`))
	must(t, "scaling", api.merge(onePath(ns, "sleeps")+"/scale", `{"spec":{"replicas":3}}`))
	wantMarked(t, marker, 4, 30*time.Second)
	must(t, "scaling by the spec", api.merge(onePath(ns, "sleeps"), `{"spec":{"replicas":2}}`))
	wantMarked(t, marker, 3, 30*time.Second)
	must(t, "the grace period", api.merge(onePath(ns, "sleeps"), `{"spec":{"terminationGracePeriodSeconds":1}}`))

	// The agent takes its finalizer off, and namespaces go.
	admin.kubectl("delete", "target", "sleeps", "-n", ns, "--timeout=60s")
	wantMarked(t, marker, 1, 10*time.Second)
	admin.kubectl("delete", "namespace", doomed, "--timeout=80s")
	wantMarked(t, marker, 0, 10*time.Second)

	api.class(class, everything)
	wantAllConnected(admin, ns, "web")
	// A class that came back may allow less: what runs is judged anew.
	api.class(class, `{sources: [process], agents: [local], users: [nobody]}`)
	wantAllRefused(admin, ns, "web", "spec.process.user", `class "`+class+`"`)
}

func testUse(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	ns, used, other := c.namespace(t, "use"), newName("used"), newName("other")
	root := admin.sender()
	root.class(used, everything)
	root.class(other, everything)

	write := rule{namespace: ns, verbs: "create get update patch delete", resources: "targets targets/scale"}
	bobClient := c.user(t, "bob", write)
	alice, bob := c.user(t, "alice", write), bobClient.sender()
	c.grantUse(t, alice, used)
	aliceName, bobName := userName(t, alice), userName(t, bobClient)
	mayNot := func(user, class string) []string {
		return []string{`user "` + user + `" may not use`, `"` + class + `"`, "spec.className"}
	}

	wantForbidden(t, "a target by who may not use its class", bob.create(ns, of(used, "bobs")), mayNot(bobName, used)...)
	wantForbidden(t, "the same as a dry run", bob.create(ns, of(used, "bobs"), "dryRun=All"), mayNot(bobName, used)...)
	wantForbidden(t, "the same by server-side apply", bob.apply(onePath(ns, "bobs"), "bob", of(used, "bobs")), mayNot(bobName, used)...)
	wantForbidden(t, "the default class, by its name", bob.create(ns, of("standard", "bobs")), mayNot(bobName, "standard")...)
	if err := bob.send(http.MethodPut, onePath(ns, "bobs"), "application/yaml", of(used, "bobs")); !apierrors.IsNotFound(err) {
		t.Errorf("an update that creates: got %v, want NotFound", err)
	}
	must(t, "a target by who may use its class", alice.sender().create(ns, of(used, "web")))
	wantForbidden(t, "a class of another name", alice.sender().create(ns, of(other, "second")), mayNot(aliceName, other)...)
	wantForbidden(t, "a change to a class of another name", alice.sender().merge(onePath(ns, "web"), `{"spec":{"className":"`+other+`"}}`), mayNot(aliceName, other)...)

	for what, patch := range map[string]string{
		"the command":     `{"spec":{"process":{"command":["id"]}}}`,
		"the arguments":   `{"spec":{"process":{"args":["5"]}}}`,
		"the environment": `{"spec":{"process":{"env":[{"name":"LD_PRELOAD","value":"/tmp/x.so"}]}}}`,
		"the directory":   `{"spec":{"process":{"workingDir":"/tmp"}}}`,
		"the user":        `{"spec":{"process":{"user":"daemon"}}}`,
		"the ports":       `{"spec":{"ports":[{"name":"ssh","port":22}]}}`,
		"the class":       `{"spec":{"className":"` + other + `"}}`,
		// Metadata or a count beside it don't hide it.
		"the command, and a label": `{"metadata":{"labels":{"a":"b"}},"spec":{"replicas":2,"process":{"command":["id"]}}}`,
	} {
		class := used
		if what == "the class" {
			class = other
		}
		wantForbidden(t, what, bob.merge(onePath(ns, "web"), patch), mayNot(bobName, class)...)
	}
	// The older version is no way round.
	older := func(path string) string { return strings.Replace(path, "/v1/", "/v1alpha1/", 1) }
	flatOf := func(class string) string {
		return strings.Replace(flat("flat", "a"), "spec:\n", "spec:\n  className: "+class+"\n  agentName: local\n", 1)
	}
	wantForbidden(t, "a target of v1alpha1", bob.send(http.MethodPost, older(listPath(ns)), "application/yaml", flatOf(used)), mayNot(bobName, used)...)
	wantForbidden(t, "a command by v1alpha1", bob.merge(older(onePath(ns, "web")), `{"spec":{"command":["id"]}}`), mayNot(bobName, used)...)
	must(t, "a count by v1alpha1", bob.merge(older(onePath(ns, "web")), `{"spec":{"replicas":1}}`))
	must(t, "a target of v1alpha1 by who may use its class", alice.sender().send(http.MethodPost, older(listPath(ns, "dryRun=All")), "application/yaml", flatOf(used)))

	// No class can be done without: one that is left out stays.
	wantForbidden(t, "no class, and a command", bob.merge(onePath(ns, "web"), `{"spec":{"className":null,"process":{"command":["id"]}}}`), mayNot(bobName, used)...)
	must(t, "no class", bob.merge(onePath(ns, "web"), `{"spec":{"className":null}}`))
	if got := root.get(onePath(ns, "web"), "spec", "className"); got != used {
		t.Errorf("a class that a patch took out is %q, want %q", got, used)
	}
	must(t, "a manifest without the class", bob.send(http.MethodPut, onePath(ns, "web"), "application/yaml", sleeper("web", "1000")))
	if got := root.get(onePath(ns, "web"), "spec", "className"); got != used {
		t.Errorf("a class that an update leaves out is %q, want %q", got, used)
	}

	must(t, "a label", bob.merge(onePath(ns, "web"), `{"metadata":{"labels":{"by":"bob"}}}`))
	must(t, "a count", bob.merge(onePath(ns, "web"), `{"spec":{"replicas":2}}`))
	must(t, "a count by scale", bob.merge(onePath(ns, "web")+"/scale", `{"spec":{"replicas":1}}`))
	must(t, "an update that changes nothing", bob.apply(onePath(ns, "web"), "bob", "apiVersion: streaming.aaserver.io/v1\nkind: Target\nmetadata: {name: web, labels: {by: bob}}\n"))

	// Whoever acts for somebody may do what that one may.
	deputy := c.user(t, "deputy", rule{group: "core", verbs: "impersonate", resources: "users"})
	as := func(who *client, user string) result {
		return who.run(binaries.kubectl, of(used, "as"), "create", "--dry-run=server", "--as="+user, "-n", ns, "-f", "-")
	}
	if r := as(deputy, aliceName); r.code != 0 {
		t.Errorf("as who may use the class: %s", r.stderr)
	}
	for what, who := range map[string]*client{"a deputy": deputy, "the administrator": admin} {
		r := as(who, bobName)
		if r.code == 0 {
			t.Errorf("%s as who may not use the class: %s", what, r.stdout)
		}
		wantContains(t, what+" as who may not use the class", r.stderr, mayNot(bobName, used)...)
	}

	// The verb is on the class: on everything else it says nothing.
	carol := c.user(t, "carol", write, rule{verbs: "use", resources: "targets"}, rule{verbs: "get list", resources: "targetclasses"})
	wantForbidden(t, "use of targets, and sight of classes", carol.sender().create(ns, of(used, "carols")), "may not use")
	dave := c.user(t, "dave", write, rule{namespace: ns, verbs: "get", resources: "targets"}, rule{verbs: "use", resources: "targetclasses"})
	must(t, "use of all classes", dave.sender().create(ns, of(other, "daves"), "dryRun=All"))
	// Nobody makes a class who may only use it.
	wantForbidden(t, "changing a class that one may use", alice.sender().merge(classPath(used), `{"spec":{"users":["root"]}}`), "cannot patch resource")
}

func testDefaultClass(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	api, ns := admin.sender(), a.cluster.namespace(t, "default-class")
	const annotation = "streaming.aaserver.io/is-default-class"
	setDefault := func(class, value string) {
		t.Helper()
		must(t, "annotating", api.merge(classPath(class), `{"metadata":{"annotations":{"`+annotation+`":`+value+`}}}`))
	}
	classOf := func(name string) string { return api.get(onePath(ns, name), "spec", "className") }

	must(t, "a target without a class", api.create(ns, sleeper("one", "1000")))
	if got := classOf("one"); got != "standard" {
		t.Errorf("the class is %q, want standard", got)
	}
	write := rule{namespace: ns, verbs: "create get patch", resources: "targets"}
	bob := c.user(t, "bob", write)
	wantForbidden(t, "the default class, by who may not use it", bob.sender().create(ns, sleeper("two", "1000")),
		`user "`+userName(t, bob)+`" may not use`, `"standard"`)
	wantForbidden(t, "the same by server-side apply", bob.sender().apply(onePath(ns, "two"), "bob", sleeper("two", "1000")), "may not use", `"standard"`)
	alice := c.user(t, "alice", write)
	c.grantUse(t, alice, "standard")
	must(t, "the default class, by who may use it", alice.sender().create(ns, sleeper("two", "1000")))

	// Of two, it is the one that was created last.
	newest := newName("newest")
	api.class(newest, everything)
	setDefault(newest, `"true"`)
	must(t, "a target with two defaults", api.create(ns, sleeper("three", "1000")))
	if got := classOf("three"); got != newest {
		t.Errorf("of two defaults it is %q, want %q", got, newest)
	}
	wantForbidden(t, "the newer default, by who may use the older", alice.sender().create(ns, sleeper("four", "1000")), "may not use", `"`+newest+`"`)
	if got := classOf("one"); got != "standard" {
		t.Errorf("a target's class has become %q", got)
	}

	// Whoever applies a manifest without a class again keeps what was filled in.
	manifest := func(replicas int) string {
		return strings.Replace(sleeper("applied", "1000"), "spec:", fmt.Sprintf("spec:\n  replicas: %d", replicas), 1)
	}
	for replicas := range 3 {
		must(t, "server-side apply", api.apply(onePath(ns, "applied"), "e2e", manifest(replicas)))
		if got := classOf("applied"); got != newest {
			t.Errorf("applied with %d replicas, its class is %q, want %q", replicas, got, newest)
		}
		setDefault(newest, `"false"`)
	}
	admin.kubectlStdin(strings.ReplaceAll(manifest(1), "applied", "client-side"), "apply", "-n", ns, "-f", "-")
	admin.kubectlStdin(strings.ReplaceAll(manifest(2), "applied", "client-side"), "apply", "-n", ns, "-f", "-")
	admin.kubectlStdin(strings.ReplaceAll(manifest(1), "applied", "client-side"), "replace", "-n", ns, "-f", "-")
	if got := classOf("client-side"); got != "standard" {
		t.Errorf("with the newest no default any more, and the manifest applied and replaced, the class is %q, want standard", got)
	}

	// Another class is judged as a whole, and then governs.
	strict := newName("strict")
	api.class(strict, `{sources: [process], agents: [local]}`)
	wantForbidden(t, "another class that doesn't allow it", api.merge(onePath(ns, "one"), `{"spec":{"className":"`+strict+`"}}`), `class "`+strict+`"`, "spec.process.user")
	api.class(strict, `{sources: [process], agents: [local], agentUser: true}`)
	must(t, "another class that allows it", api.merge(onePath(ns, "one"), `{"spec":{"className":"`+strict+`"}}`))
	api.class(strict, `{}`)
	if code, message := (way{"log", "", "HTTP"}).connect(admin, ns, "one"); code != http.StatusForbidden || !strings.Contains(message, `class "`+strict+`"`) {
		t.Errorf("a log under the class that it was changed to: %d %s", code, message)
	}

	// Without any default, a class has to be named.
	setDefault("standard", "null")
	defer setDefault("standard", `"true"`)
	const named = "name one in spec.className, or make one the default by the annotation " + annotation
	wantForbidden(t, "no class, and no default", api.create(ns, sleeper("five", "1000")), "without a TargetClass nothing is allowed", named)
	wantForbidden(t, "the same by server-side apply", api.apply(onePath(ns, "five"), "e2e", sleeper("five", "1000")), named)
	must(t, "a class that is named", api.create(ns, of("standard", "six")))
	must(t, "another count", api.apply(onePath(ns, "applied"), "e2e", manifest(2)))
}

// stayConnected connects to a forwarded port, and returns what asks it something by
// that same connection.
func stayConnected(t *testing.T, address string) (ask func()) {
	t.Helper()
	// A process that runs, and is ready by that, may not listen yet.
	eventually(t, "it listens", time.Minute, func() error {
		response, err := (&http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + address)
		if err != nil {
			return err
		}
		return response.Body.Close()
	})
	var connected atomic.Bool
	transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		if connected.Swap(true) {
			return nil, errors.New("the connection did not stay open")
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	client := http.Client{Timeout: 20 * time.Second, Transport: transport}
	ask = func() {
		t.Helper()
		response, err := client.Get("http://" + address)
		if err != nil {
			t.Error(err)
			return
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil || !strings.HasPrefix(string(body), "hello from web-") {
			t.Errorf("%s answered %q, %v", address, body, err)
		}
	}
	ask()
	return ask
}

func testEditedClass(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	api, ns, class := admin.sender(), a.cluster.namespace(t, "edited"), newName("edited")
	spec := func(port int) string {
		return fmt.Sprintf(`{sources: [process], agents: [local], agentUser: true, ports: {allowed: [{port: 9}, {port: %d}, {port: 5353, protocol: UDP}]}}`, port)
	}
	api.class(class, spec(8080))
	must(t, "creating", api.create(ns, webOf(class, "web")))
	admin.waitTarget(ns, "web")
	live := hold(t, admin, ns, "web")
	forwards, asks := map[string]string{}, []func(){}
	for protocol := range forwardDialers {
		forwards[protocol] = forward(t, admin, protocol, targetPath(ns, "web", "portforward"), "0:8080")[0]
		asks = append(asks, stayConnected(t, forwards[protocol]))
	}

	// A replica has no process of the target's: what it allows ends with 503.
	b := a.replica("--enable-admission-plugins=DefaultTargetClass,TargetClassPolicy,TargetSecretAccess")
	_, token := c.serviceAccount(t, ns, "robot", rule{namespace: ns, verbs: "get create", resources: "targets/portforward"})
	_, dial := direct(t, b, &tls.Config{})
	byReplica := func() (int, string) {
		t.Helper()
		_, response, err := dial(targetPath(ns, "web", "portforward", "ports=8080"), http.Header{"Authorization": {"Bearer " + token}}, "SPDY/3.1+portforward.k8s.io")
		if response == nil {
			t.Fatal(err)
		}
		return response.StatusCode, refusal(response)
	}
	named := way{"portforward", "ports=8080", "SPDY/3.1+portforward.k8s.io"}
	const rounds = 10
	for range rounds {
		api.class(class, spec(8081))
		if code, message := named.connect(admin, ns, "web"); code != http.StatusForbidden || !strings.Contains(message, `class "`+class+`" does not allow port 8080`) {
			t.Errorf("right after the port was closed: %d %s", code, message)
		}
		// A session that is open makes no more connections to it either.
		for _, address := range forwards {
			wantRefused(t, address)
		}
		if code, message := byReplica(); code != http.StatusForbidden || !strings.Contains(message, `class "`+class+`" does not allow port 8080`) {
			t.Errorf("by a replica, right after the port was closed: %d %s", code, message)
		}
		api.class(class, spec(8080))
		if code, message := named.connect(admin, ns, "web"); code != http.StatusSwitchingProtocols {
			t.Errorf("right after the port was opened: %d %s", code, message)
		}
		for _, address := range forwards {
			wantAnswer(t, address, "hello from web-")
		}
		if code, message := byReplica(); code != http.StatusServiceUnavailable {
			t.Errorf("by a replica, right after the port was opened: %d %s, want 503: it hasn't the agent", code, message)
		}
	}

	// Those that were open keep what they began with: connections, and no limit.
	api.class(class, `{sources: [process], agents: [local], agentUser: true, ports: {allowed: [{port: 1}]}, limits: {sessionsPerTarget: 1, maxDurationSeconds: 1, idleTimeoutSeconds: 1}}`)
	code, message := way{"exec", "stdout=true&command=true", "v5.channel.k8s.io"}.connect(admin, ns, "web")
	if code != http.StatusTooManyRequests {
		t.Errorf("a session beside those that were open: %d %s, want 429", code, message)
	}
	began := time.Now()
	eventually(t, "the new limit has passed, were it theirs", time.Minute, func() error {
		live.wantAlive()
		for _, ask := range asks {
			ask()
		}
		if passed := time.Since(began); passed < 2500*time.Millisecond {
			return fmt.Errorf("only %s", passed)
		}
		return nil
	})
}

func testSourcesAgentsUsers(t *testing.T, a *aggregated) {
	admin := a.with(t)
	api, ns := admin.sender(), a.cluster.namespace(t, "whom")
	as := func(user string) string {
		return "  process: {command: [sleep, \"1000\"], user: " + user + "}\n"
	}
	for what, tt := range map[string]struct {
		class string
		more  string // of the spec, with the process
		want  []string
	}{
		"an empty class":                              {`{}`, "", []string{"allows the sources: none", "allows the agents: none", "spec.process.user"}},
		"another source":                              {`{sources: [container, ssh, tcp], agents: ["*"], agentUser: true}`, "", []string{"spec.process", "allows the sources: container, ssh, tcp"}},
		"no agents":                                   {`{sources: [process], agentUser: true}`, "", []string{"spec.agentName", "allows the agents: none"}},
		"another agent":                               {`{sources: [process], agents: [loca, local2], agentUser: true}`, "", []string{"allows the agents: loca, local2"}},
		"its agent by name":                           {`{sources: [process], agents: [local], agentUser: true}`, "", nil},
		"a user left out, with users":                 {`{sources: [process], agents: ["*"], users: ["*", root]}`, "", []string{"spec.process.user", "left out"}},
		"a named user":                                {`{sources: [process], agents: ["*"], users: [daemon]}`, as("daemon"), nil},
		"another user":                                {`{sources: [process], agents: ["*"], users: [daemon]}`, as("nobody"), []string{"allows the users: daemon"}},
		"any user":                                    {`{sources: [process], agents: ["*"], users: ["*"]}`, as("nobody"), nil},
		"root, of any user":                           {`{sources: [process], agents: ["*"], users: ["*"], agentUser: true}`, as("root"), []string{"root has to be named"}},
		"root by its number":                          {`{sources: [process], agents: ["*"], users: ["*"], agentUser: true}`, as(`"0"`), []string{"root has to be named"}},
		"root by a longer number":                     {`{sources: [process], agents: ["*"], users: ["*"], agentUser: true}`, as(`"00"`), []string{"without leading zeros"}},
		"root by a number that wraps":                 {`{sources: [process], agents: ["*"], users: ["*"], agentUser: true}`, as(`"4294967296"`), []string{"between 0 and 4294967294"}},
		"root, where it is named":                     {`{sources: [process], agents: ["*"], users: [root]}`, as("root"), nil},
		"a user, with the agent's alone":              {`{sources: [process], agents: ["*"], agentUser: true}`, as("daemon"), []string{"allows the users: none"}},
		"a star that the target names, not the class": {`{sources: [process], agents: ["*"], users: [daemon]}`, as(`"*"`), []string{"*"}},
	} {
		class := newName("whom")
		api.class(class, tt.class)
		manifest := of(class, "web")
		if tt.more != "" {
			manifest, _, _ = strings.Cut(manifest, "  process:")
			manifest += tt.more
		}
		err := api.create(ns, manifest, "dryRun=All")
		switch {
		case len(tt.want) == 0:
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		case apierrors.IsInvalid(err): // validation knows already
			wantContains(t, what, err.Error(), tt.want...)
		default:
			wantForbidden(t, what, err, tt.want...)
		}
	}

	class := newName("whom")
	api.class(class, `{sources: [process], agents: [local], users: [nobody], agentUser: true}`)
	must(t, "creating", api.create(ns, of(class, "web")))
	wantForbidden(t, "becoming root", api.merge(onePath(ns, "web"), `{"spec":{"process":{"user":"root"}}}`), "root has to be named")
	wantForbidden(t, "becoming root by a JSON patch", api.send(http.MethodPatch, onePath(ns, "web"), "application/json-patch+json", `[{"op":"add","path":"/spec/process/user","value":"root"}]`), "root has to be named")
	wantForbidden(t, "becoming root by server-side apply", api.apply(onePath(ns, "web"), "e2e", "apiVersion: streaming.aaserver.io/v1\nkind: Target\nmetadata: {name: web}\nspec: {process: {user: root}}\n"), "root has to be named")
	must(t, "becoming another user", api.merge(onePath(ns, "web"), `{"spec":{"process":{"user":"nobody"}}}`))
}

// forwardError opens one connection of a port-forward by hand, asking for the
// text of its failure.
func forwardError(t *testing.T, c *client, protocol, path string, port int) string {
	t.Helper()
	dialer, err := forwardDialers[protocol](c.config(), c.url(path))
	must(t, protocol, err)
	conn, _, err := dialer.Dial("portforward.k8s.io")
	must(t, protocol, err)
	defer conn.Close()
	stream := func(kind string) httpstream.Stream {
		header := http.Header{}
		header.Set("streamType", kind)
		header.Set("port", fmt.Sprint(port))
		header.Set("requestID", "0")
		header.Set("X-Error-Text", "true")
		s, err := conn.CreateStream(header)
		must(t, kind, err)
		return s
	}
	failure := stream("error")
	failure.Close()
	data := stream("data")
	defer data.Close()
	text := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(io.LimitReader(failure, 4<<10))
		text <- string(all)
	}()
	select {
	case got := <-text:
		return got
	case <-time.After(30 * time.Second):
		conn.Close()
		<-text
		t.Fatalf("%s: no word about port %d within 30 s", protocol, port)
		return ""
	}
}

func testPortPolicy(t *testing.T, a *aggregated) {
	admin := a.with(t)
	api, ns, class := admin.sender(), a.cluster.namespace(t, "ports"), newName("ports")
	const rest = `{sources: [process], agents: [local], agentUser: true`
	list := func(ports string) string { return of(class, "web", "  ports: ["+ports+"]\n") }

	api.class(class, rest+`, ports: {allowed: [{port: 8000, endPort: 8999}, {port: 5353, protocol: UDP}]}}`)
	for what, tt := range map[string]struct{ ports, want string }{
		"one in the range":              {"{name: a, port: 8080}", ""},
		"one beside it":                 {"{name: a, port: 9000}", "allows the ports: 8000-8999 TCP, 5353 UDP"},
		"one of the other protocol":     {"{name: a, port: 5353}", "allows the ports:"},
		"one of its protocol":           {"{name: a, port: 5353, protocol: UDP}", ""},
		"a host port in the range":      {"{name: a, port: 8080, hostPort: 8081}", ""},
		"a host port beside it":         {"{name: a, port: 8080, hostPort: 22}", "spec.ports[0].hostPort"},
		"a host port of other protocol": {"{name: a, port: 5353, protocol: UDP, hostPort: 8080}", "spec.ports[0].hostPort"},
		"the second of two":             {"{name: a, port: 8080}, {name: b, port: 80}", "spec.ports[1].port"},
	} {
		err := api.create(ns, list(tt.ports), "dryRun=All")
		if tt.want == "" {
			if err != nil {
				t.Errorf("listing %s: %v", what, err)
			}
			continue
		}
		wantForbidden(t, "listing "+what, err, tt.want)
	}

	// What clients forward. The last port is another program's of the host.
	neighbour := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello from the neighbour") }))
	defer neighbour.Close()
	beside := neighbour.Listener.Addr().(*net.TCPAddr).Port

	api.class(class, rest+`}`)
	must(t, "creating", api.create(ns, webOf(class, "web")))
	admin.waitTarget(ns, "web")
	for what, tt := range map[string]struct {
		ports   string
		open    []int
		refused map[int]string
	}{
		"listed ones": {`{}`, []int{8080},
			map[int]string{9: "refused", 5353: "dns (5353 UDP)", beside: "http (8080 TCP), other (9 TCP)"}},
		"listed ones in a range": {`{allowed: [{port: 1, endPort: 8079}]}`, nil,
			map[int]string{9: "refused", 8080: "does not allow port 8080 (TCP)", beside: "does not allow port"}},
		"unlisted ones too": {`{unlisted: true}`, []int{8080, beside},
			map[int]string{9: "refused", 5353: "is UDP"}},
		"unlisted ones in a range": {`{unlisted: true, allowed: [{port: 8080}]}`, []int{8080},
			map[int]string{9: "does not allow port 9 (TCP)", beside: "does not allow port"}},
		"a range of the other protocol": {`{unlisted: true, allowed: [{port: 1, endPort: 65535, protocol: UDP}]}`, nil,
			map[int]string{8080: "does not allow port 8080 (TCP)", 5353: "does not allow port 5353 (TCP)"}},
	} {
		api.class(class, rest+`, ports: `+tt.ports+`}`)
		for _, port := range tt.open {
			for protocol := range forwardDialers {
				wantAnswer(t, forward(t, admin, protocol, targetPath(ns, "web", "portforward"), fmt.Sprintf("0:%d", port))[0], "hello from ")
			}
			for _, protocol := range []string{"v4.channel.k8s.io", "SPDY/3.1+portforward.k8s.io", "SPDY portforward.k8s.io"} {
				w := way{"portforward", fmt.Sprintf("ports=%d", port), protocol}
				if code, message := w.connect(admin, ns, "web"); code != http.StatusSwitchingProtocols {
					t.Errorf("%s, %s: %d %s", what, w, code, message)
				}
			}
		}
		for port, want := range tt.refused {
			for protocol := range forwardDialers {
				// In one session with a port that may be open: the port comes
				// after the upgrade.
				if got := forwardError(t, admin, protocol, targetPath(ns, "web", "portforward"), port); !strings.Contains(got, want) {
					t.Errorf("%s, port %d over %s: %q, want %q", what, port, protocol, got, want)
				}
			}
			if want == "refused" || want == "is UDP" {
				continue // it may be asked for, and can't be connected to
			}
			for _, protocol := range []string{"v4.channel.k8s.io", "v4.base64.channel.k8s.io", "SPDY/3.1+portforward.k8s.io", "SPDY portforward.k8s.io"} {
				w := way{"portforward", fmt.Sprintf("ports=%d", port), protocol}
				if port != 8080 {
					w.query += "&ports=8080"
				}
				for _, version := range []string{"v1", "v1alpha1"} {
					if code, message := w.connectBy(admin, version, ns, "web"); code != http.StatusForbidden {
						t.Errorf("%s, %s of %s: %d %s", what, w, version, code, message)
					}
				}
			}
		}
	}
	// A session is narrowed by what it asked for, whatever the class opens.
	api.class(class, rest+`, ports: {unlisted: true}}`)
	for protocol := range forwardDialers {
		if got := forwardError(t, admin, protocol, targetPath(ns, "web", "portforward", "ports=9"), 8080); !strings.Contains(got, "port 8080 is not one of those asked for") {
			t.Errorf("a port that wasn't asked for, over %s: %q", protocol, got)
		}
	}
	api.class(class, rest+`}`)
	// Whoever lists a port gets the instance's own, even while an instance runs
	// that was started before: here for ever, since its successor doesn't start.
	must(t, "creating", api.create(ns, of(class, "old", "  replicas: 2\n")))
	admin.waitTarget(ns, "old")
	must(t, "listing", api.merge(onePath(ns, "old"), fmt.Sprintf(`{"spec":{"process":{"command":["/no/such/program"]},"ports":[{"name":"beside","port":%d}]}}`, beside)))
	for protocol := range forwardDialers {
		if got := forwardError(t, admin, protocol, targetPath(ns, "old", "portforward", "instance=old-0"), beside); !strings.Contains(got, "was started before") {
			t.Errorf("a port that an instance was started without, over %s: %q", protocol, got)
		}
	}
	r := admin.target("port-forward", "web", fmt.Sprintf(":%d", beside), "-n", ns)
	if r.code == 0 {
		t.Errorf("the plugin forwards a port that isn't listed: %+v", r)
	}
}

func testRatcheting(t *testing.T, a *aggregated) {
	admin := a.with(t)
	api, ns, class := admin.sender(), a.cluster.namespace(t, "ratchet"), newName("narrowed")
	api.class(class, everything)
	must(t, "creating", api.create(ns, of(class, "web", "  replicas: 2\n  ports: [{name: old, port: 9000, hostPort: 0}]\n")))
	api.class(class, `{sources: [process], agents: [elsewhere], users: [nobody], ports: {allowed: [{port: 8080}]}}`)

	for _, tt := range []struct {
		what, patch string
		want        []string
	}{
		{"a label", `{"metadata":{"labels":{"a":"b"}}}`, nil},
		{"the restart policy", `{"spec":{"restartPolicy":"OnFailure"}}`, nil},
		{"fewer instances", `{"spec":{"replicas":1}}`, nil},
		{"a port's name", `{"spec":{"ports":[{"name":"renamed","port":9000}]}}`, nil},
		{"a port beside an old one", `{"spec":{"ports":[{"name":"renamed","port":9000},{"name":"http","port":8080}]}}`, nil},
		{"no ports", `{"spec":{"ports":null}}`, nil},
		{"a port that was given up", `{"spec":{"ports":[{"name":"old","port":9000}]}}`, []string{"spec.ports[0].port"}},
		{"a port that isn't allowed", `{"spec":{"ports":[{"name":"b","port":8081}]}}`, []string{"spec.ports[0].port"}},
		{"another command", `{"spec":{"process":{"command":["sleep","5"]}}}`, []string{"spec.agentName", "spec.process.user"}},
		{"the class, once more", `{"spec":{"className":"` + class + `"}}`, nil},
	} {
		err := api.merge(onePath(ns, "web"), tt.patch)
		if tt.want == nil {
			if err != nil {
				t.Errorf("%s: %v", tt.what, err)
			}
			continue
		}
		wantForbidden(t, tt.what, err, tt.want...)
	}
}

func testSwitches(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	api, ns, class := admin.sender(), a.cluster.namespace(t, "switches"), newName("empty")
	api.class(class, `{}`)
	b := a.replica("--disable-admission-plugins=TargetClassPolicy,DefaultTargetClass,TargetSecretAccess")
	_, token := c.serviceAccount(t, ns, "robot",
		rule{namespace: ns, verbs: "create get", resources: "targets targets/exec targets/portforward targets/log targets/attach"})
	config := rest.Config{Host: b.url, BearerToken: token, QPS: -1, TLSClientConfig: rest.TLSClientConfig{CAData: b.ca.pem()}}
	made, err := discovery.NewDiscoveryClientForConfig(&config)
	must(t, "the client", err)
	direct := &client{t: t, dir: t.TempDir(), kubeconfig: filepath.Join(t.TempDir(), "kubeconfig")}
	caFile := filepath.Join(direct.dir, "ca.crt")
	must(t, "the CA", os.WriteFile(caFile, b.ca.pem(), 0o600))
	must(t, "the kubeconfig", writeKubeconfig(direct.kubeconfig, b.url, caFile, ns, &clientcmdapi.AuthInfo{Token: token}))
	off := sender{t, made.RESTClient()}

	must(t, "without the policy, what the class forbids", off.create(ns, of(class, "forbidden")))
	must(t, "without the policy, a class that isn't there", off.create(ns, of("nowhere", "nowhere")))
	must(t, "without the default", off.create(ns, sleeper("none", "1000")))
	if got := api.get(onePath(ns, "none"), "spec", "className"); got != "" {
		t.Errorf("without the plugin, the class is filled in: %q", got)
	}
	wantForbidden(t, "with the policy", api.create(ns, of(class, "second")), `class "`+class+`"`)
	// The target is there; without its class nobody connects to it.
	admin.waitTarget(ns, "nowhere")
	wantAllRefused(admin, ns, "nowhere", `class "nowhere" does not exist`)
	for _, w := range ways() {
		if strings.HasSuffix(w.subresource, "s") || strings.Contains(w.subresource, "-") {
			continue // second names need rights of their own
		}
		if code, message := w.connect(direct, ns, "nowhere"); code != http.StatusForbidden || !strings.Contains(message, `class "nowhere" does not exist`) {
			t.Errorf("%s where the plugin is off: %d %s, want 403", w, code, message)
		}
	}
	// It was made, but where the policy is on, a class that forbids it holds.
	admin.waitTarget(ns, "forbidden")
	wantAllRefused(admin, ns, "forbidden", "allows the sources: none")

	for _, flag := range []string{"enable-admission-plugins", "disable-admission-plugins"} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		args := append(slices.Clone(a.args), "--"+flag+"=NoSuchPlugin", "--data-dir", t.TempDir(), "--secure-port", fmt.Sprint(reservePort(t)))
		out, err := exec.CommandContext(ctx, binaries.server, args...).CombinedOutput()
		text := strings.TrimSpace(string(out))
		if err == nil || ctx.Err() != nil {
			t.Errorf("--%s=NoSuchPlugin: %v, %s", flag, err, text)
			continue
		}
		wantContains(t, flag, text[strings.LastIndex(text, "\n")+1:], "error: "+flag+` plugin "NoSuchPlugin" is unknown`)
	}
}

func testLimits(t *testing.T, a *aggregated, audit string) {
	c := a.cluster
	api, ns := a.with(t).sender(), c.namespace(t, "limits")
	rights := rule{namespace: ns, verbs: "get create", resources: "targets/exec targets/attach targets/log targets/portforward"}
	alice, bob, carol := c.user(t, "alice", rights), c.user(t, "bob", rights), c.user(t, "carol", rights)
	const spec = `{sources: [process], agents: [local], agentUser: true, limits: `
	perUser, perTarget, idle, longest := newName("per-user"), newName("per-target"), newName("idle"), newName("longest")
	api.class(perUser, spec+`{sessionsPerUser: 1}}`)
	api.class(perTarget, spec+`{sessionsPerTarget: 2}}`)
	api.class(idle, spec+`{idleTimeoutSeconds: 2}}`)
	api.class(longest, spec+`{maxDurationSeconds: 2}}`)
	must(t, "creating", api.create(ns, of(perUser, "mine")))
	must(t, "creating", api.create(ns, of(perUser, "mine-too")))
	must(t, "creating", api.create(ns, of(perTarget, "ours")))
	must(t, "creating", api.create(ns, of(perTarget, "ours-too")))
	must(t, "creating", api.create(ns, webOf(idle, "idle")))
	must(t, "creating", api.create(ns, of(longest, "longest")))
	for _, name := range []string{"mine", "mine-too", "ours", "ours-too", "idle", "longest"} {
		a.with(t).waitTarget(ns, name)
	}
	log := way{"log", "", "binary.k8s.io"}
	// wantTooMany is refused by 429, with when to come again.
	wantTooMany := func(t *testing.T, who *client, target, want string) {
		t.Helper()
		for _, w := range ways() {
			if strings.HasSuffix(w.subresource, "s") || strings.Contains(w.subresource, "-") || w.subresource == "portforward" {
				continue // second names need rights of their own, and sleepers have no ports
			}
			if code, message := w.connect(who, ns, target); code != http.StatusTooManyRequests || !strings.Contains(message, want) {
				t.Errorf("%s: %d %s, want 429 and %q", w, code, message, want)
			}
		}
		_, response, _ := who.dial(targetPath(ns, target, "log"), nil, "binary.k8s.io")
		if response == nil || response.Header.Get("Retry-After") != "5" {
			t.Errorf("a refusal doesn't say when to come again: %+v", response)
		}
	}

	t.Run("sessions of one user", func(t *testing.T) {
		mine := hold(t, alice.with(t), ns, "mine")
		want := fmt.Sprintf(`user %q has 1 sessions open on targets of class %q`, userName(t, alice), perUser)
		wantTooMany(t, alice.with(t), "mine", want)
		wantTooMany(t, alice.with(t), "mine-too", want) // the class counts, not the target
		hold(t, bob.with(t), ns, "mine")
		if code, message := log.connect(alice.with(t), ns, "ours-too"); code != http.StatusSwitchingProtocols {
			t.Errorf("a target of another class: %d %s", code, message)
		}
		mine.wantAlive()
		mine.conn.Close()
		eventually(t, "there is room again", 30*time.Second, func() error {
			if code, message := log.connect(alice.with(t), ns, "mine"); code != http.StatusSwitchingProtocols {
				return errors.New(message)
			}
			return nil
		})
	})
	t.Run("sessions of one target", func(t *testing.T) {
		one, two := hold(t, alice.with(t), ns, "ours"), hold(t, bob.with(t), ns, "ours")
		for _, who := range []*client{alice, bob, carol} {
			wantTooMany(t, who.with(t), "ours", `target "ours" has 2 sessions open`)
		}
		hold(t, carol.with(t), ns, "ours-too")
		one.wantAlive()
		two.wantAlive()
	})
	t.Run("idle and long ones", func(t *testing.T) {
		testTimeouts(t, carol.with(t), ns)
		for _, want := range []struct{ subresource, target, cause string }{
			{"exec", "idle", "nothing passed for 2s"},
			{"attach", "idle", "nothing passed for 2s"},
			{"portforward", "idle", "nothing passed for 2s"},
			{"exec", "longest", "ended after 2s"},
			{"log", "longest", "ended after 2s"},
		} {
			eventually(t, fmt.Sprintf("the audit log says why %+v has ended", want), 30*time.Second, func() error {
				found := readAudit(t, audit, func(e auditEvent) bool {
					return e.Stage == "ResponseComplete" && e.ObjectRef.Namespace == ns && e.ObjectRef.Name == want.target &&
						e.ObjectRef.Subresource == want.subresource && strings.Contains(e.Annotations[apiGroup+"/cause"], want.cause)
				})
				if len(found) == 0 {
					return errors.New("it doesn't")
				}
				return nil
			})
		}
	})
	refused := readAudit(t, audit, func(e auditEvent) bool {
		return e.Stage == "ResponseComplete" && e.ObjectRef.Namespace == ns && e.ResponseStatus.Code == http.StatusTooManyRequests
	})
	if len(refused) == 0 {
		t.Error("the audit log knows of no session that was refused")
	}
}

// testTimeouts has sessions that are ended because they are idle, or too long,
// beside some that aren't.
func testTimeouts(t *testing.T, who *client, ns string) {
	const idleMessage, longMessage = "because nothing passed for 2s", "after 2s, the longest that it may last"
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var all sync.WaitGroup
	within := func(what string, began time.Time) {
		if took := time.Since(began); took < 1500*time.Millisecond {
			t.Errorf("%s ended after %s", what, took)
		}
	}
	for protocol, e := range executors {
		for _, tt := range []struct{ what, path, want string }{
			{"an idle exec", targetPath(ns, "idle", "exec", "stdin=true", "stdout=true", "command=cat"), idleMessage},
			{"an idle attach", targetPath(ns, "idle", "attach", "stdout=true"), idleMessage},
			{"a long exec", targetPath(ns, "longest", "exec", "stdin=true", "stdout=true", "command=cat"), longMessage},
		} {
			all.Go(func() {
				executor, err := e.make(who.config(), who.url(tt.path))
				if err != nil {
					t.Error(err)
					return
				}
				began := time.Now()
				opts := remotecommand.StreamOptions{Stdout: io.Discard}
				if strings.Contains(tt.path, "stdin") {
					opts.Stdin = blockedReader{ctx}
				}
				err = executor.StreamWithContext(ctx, opts)
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s over %s ended with %v, want %q", tt.what, protocol, err, tt.want)
				}
				within(tt.what+" over "+protocol, began)
			})
		}
	}
	for _, tt := range []struct{ what, path, protocol, want string }{
		{"an idle tunnel", targetPath(ns, "idle", "portforward"), "SPDY/3.1+portforward.k8s.io", idleMessage},
		{"an idle legacy port-forward", targetPath(ns, "idle", "portforward", "ports=8080"), "v4.channel.k8s.io", idleMessage},
		{"a long log", targetPath(ns, "longest", "log", "follow=true"), "binary.k8s.io", longMessage},
	} {
		began := time.Now()
		conn, response, err := who.dial(tt.path, nil, tt.protocol)
		if err != nil {
			t.Fatalf("%s: %v %s", tt.what, err, refusal(response))
		}
		all.Go(func() {
			conn.SetReadDeadline(began.Add(time.Minute))
			var err error
			for err == nil {
				_, _, err = conn.ReadMessage()
			}
			closed, ok := errors.AsType[*websocket.CloseError](err)
			if !ok || closed.Code == websocket.CloseNormalClosure || !strings.Contains(closed.Text, tt.want) {
				t.Errorf("%s ended with %v, want %q", tt.what, err, tt.want)
			}
			within(tt.what, began)
		})
	}
	all.Go(func() {
		dialer, err := forwardDialers["SPDY"](who.config(), who.url(targetPath(ns, "idle", "portforward")))
		if err != nil {
			t.Error(err)
			return
		}
		conn, _, err := dialer.Dial("portforward.k8s.io")
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		select {
		case <-conn.CloseChan(): // the protocol has no way to say why
		case <-ctx.Done():
			t.Error("an idle port-forward over SPDY didn't end")
		}
	})

	// A log that waits isn't idle, and neither is a forward that is used.
	log, response, err := who.dial(targetPath(ns, "idle", "log", "follow=true"), nil, "binary.k8s.io")
	if err != nil {
		t.Fatalf("%v %s", err, refusal(response))
	}
	logEnded := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, _, err = log.ReadMessage()
		}
		logEnded <- err
	}()
	used := map[string]string{}
	for protocol := range forwardDialers {
		used[protocol] = forward(t, who, protocol, targetPath(ns, "idle", "portforward"), "0:8080")[0]
	}
	began := time.Now()
	eventually(t, "the others would have ended twice", time.Minute, func() error {
		for protocol, address := range used {
			response, err := (&http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + address)
			if err != nil {
				t.Fatalf("a port-forward over %s that is used ended after %s: %v", protocol, time.Since(began), err)
			}
			response.Body.Close()
		}
		if passed := time.Since(began); passed < 5*time.Second {
			return fmt.Errorf("only %s", passed)
		}
		return nil
	})
	all.Wait()
	select {
	case err := <-logEnded:
		t.Errorf("a log that waits for lines ended with %v", err)
		logEnded <- err
	default:
	}
	log.Close()
	<-logEnded
}

// bound is a policy's binding to a namespace, or to nothing narrower than the
// policy itself.
func bound(kind, name, namespace string) string {
	text := "\n---\napiVersion: admissionregistration.k8s.io/v1\nkind: " + kind + "Binding\nmetadata: {name: " + name + "}\nspec:\n  policyName: " + name + "\n"
	if kind == "ValidatingAdmissionPolicy" {
		text += "  validationActions: [Deny]\n"
	}
	if namespace != "" {
		text += "  matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: " + namespace + "}}}\n"
	}
	return text
}

// testConnectWebhooks has webhooks asked about connections.
func testConnectWebhooks(t *testing.T, a *aggregated) {
	admin := a.with(t)
	api, ns, class := admin.sender(), a.cluster.namespace(t, "asked"), newName("asked")
	api.class(class, everything)
	must(t, "creating", api.create(ns, webOf(class, "web")))

	var mu sync.Mutex
	asked := map[string]map[string]any{} // by subresource
	clientConfig, _ := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		var object map[string]any
		if err := json.Unmarshal(request.Object.Raw, &object); err != nil {
			return &admissionv1.AdmissionResponse{Result: &metav1.Status{Message: err.Error()}}
		}
		mu.Lock()
		defer mu.Unlock()
		asked[request.SubResource] = object
		return &admissionv1.AdmissionResponse{Allowed: true}
	})
	changing, _ := serveWebhook(t, func(*admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		return &admissionv1.AdmissionResponse{Allowed: true, PatchType: ptr.To(admissionv1.PatchTypeJSONPatch),
			Patch: []byte(`[{"op":"add","path":"/ports","value":[9]}]`)}
	})
	gone := fmt.Sprintf(`{url: "https://127.0.0.1:%d/"}`, reservePort(t))
	webhook := func(name, resources, policy, condition, clientConfig string) string {
		return fmt.Sprintf(`
- name: %s.e2e.aaserver.io
  admissionReviewVersions: [v1]
  sideEffects: None
  timeoutSeconds: 10
  failurePolicy: %s
  matchConditions: [{name: it, expression: %q}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}
  rules: [{apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CONNECT], resources: [%s]}]
  clientConfig: %s`, name, policy, condition, ns, resources, clientConfig)
	}
	validating, mutating := ns+"-validating", ns+"-mutating"
	admin.cleanUpObjects("validatingwebhookconfiguration/"+validating, "mutatingwebhookconfiguration/"+mutating)
	admin.kubectlStdin("apiVersion: admissionregistration.k8s.io/v1\nkind: ValidatingWebhookConfiguration\nmetadata: {name: "+validating+"}\nwebhooks:"+
		webhook("sees", "targets/portforward, targets/log, targets/attach", "Fail", `true`, clientConfig)+
		webhook("must", "targets/exec", "Fail", `object.command[1] == "must"`, gone)+
		webhook("may", "targets/exec", "Ignore", `object.command[1] == "may"`, gone)+
		"\n---\napiVersion: admissionregistration.k8s.io/v1\nkind: MutatingWebhookConfiguration\nmetadata: {name: "+mutating+"}\nwebhooks:"+
		webhook("changes", "targets/portforward", "Fail", `has(object.ports) && object.ports[0] == 8080`, changing)+"\n", "create", "-f", "-")
	admin.waitTarget(ns, "web")

	// The mutating one is the newest: once it is heeded, all are.
	eventually(t, "the ports are changed", noticed, func() error {
		ch, response, err := admin.dial(targetPath(ns, "web", "port-forward", "ports=8080", "instance=web-0"), nil, "v4.channel.k8s.io")
		if err != nil {
			return fmt.Errorf("%w: %s", err, refusal(response))
		}
		defer ch.Close()
		ch.SetReadDeadline(time.Now().Add(30 * time.Second))
		_, message, err := ch.ReadMessage()
		for err == nil && len(message) == 0 {
			_, message, err = ch.ReadMessage()
		}
		if err != nil || !bytes.Equal(message, []byte{0, 9, 0}) {
			return fmt.Errorf("the first message is %v, %v", message, err)
		}
		return nil
	})
	eventually(t, "what fails without its webhook is refused", noticed, func() error {
		if r := admin.exec("websocket", ns, "web", "echo", "must"); r.code == 0 || !strings.Contains(r.stderr, "failed calling webhook") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	for _, word := range []string{"may", "other"} {
		if r := admin.exec("spdy", ns, "web", "echo", word); r.code != 0 || r.stdout != word+"\n" {
			t.Errorf("an exec of echo %s: %+v", word, r)
		}
	}
	for _, w := range []way{
		{"logs", "follow=true&tailLines=3&instance=web-0", "binary.k8s.io"},
		{"attach", "stdout=true&stderr=true", "v5.channel.k8s.io"},
	} {
		if code, message := w.connect(admin, ns, "web"); code != http.StatusSwitchingProtocols {
			t.Errorf("%s: %d %s", w, code, message)
		}
	}
	// A rule for v1 is one for its equivalents.
	if code, message := (way{"exec", "stdout=true&command=echo&command=must", "v5.channel.k8s.io"}).connectBy(admin, "v1alpha1", ns, "web"); code < 400 || !strings.Contains(message, "failed calling webhook") {
		t.Errorf("an exec of v1alpha1 that fails without its webhook: %d %s", code, message)
	}
	mu.Lock()
	defer mu.Unlock()
	want := map[string]map[string]any{
		"portforward": {"apiVersion": "streaming.aaserver.io/v1", "kind": "TargetPortForwardOptions", "instance": "web-0", "ports": []any{9.0}},
		"log":         {"apiVersion": "streaming.aaserver.io/v1", "kind": "TargetLogOptions", "instance": "web-0", "follow": true, "tailLines": 3.0},
		"attach":      {"apiVersion": "streaming.aaserver.io/v1", "kind": "TargetAttachOptions", "stdout": true, "stderr": true},
	}
	for subresource, wanted := range want {
		// Defaults may be there too.
		got := maps.Clone(asked[subresource])
		maps.DeleteFunc(got, func(key string, _ any) bool { _, ok := wanted[key]; return !ok })
		if diff := cmp.Diff(wanted, got); diff != "" {
			t.Errorf("what the webhook saw of %s (-want +got):\n%s", subresource, diff)
		}
	}
}

// testConnectPolicies has policies judge and change connections, and updates.
func testConnectPolicies(t *testing.T, a *aggregated) {
	admin := a.with(t)
	api, ns, class := admin.sender(), a.cluster.namespace(t, "judged"), newName("judged")
	api.class(class, everything)
	must(t, "creating", api.create(ns, webOf(class, "web")))

	manifest := ""
	var names []string
	policy := func(kind, name, operation, resource, failure, condition, rest string) {
		name = ns + "-" + name
		names = append(names, strings.ToLower(kind)+"/"+name, strings.ToLower(kind)+"binding/"+name)
		manifest += fmt.Sprintf(`
---
apiVersion: admissionregistration.k8s.io/v1
kind: %s
metadata: {name: %s}
spec:
  failurePolicy: %s
  matchConditions: [{name: it, expression: %q}]
  matchConstraints:
    resourceRules: [{apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [%s], resources: [%s]}]
%s`, kind, name, failure, condition, operation, resource, rest) + bound(kind, name, ns)
	}
	const mutating, validating = "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy"
	policy(mutating, "patches", "CONNECT", "targets/exec", "Fail", `object.command == ["echo", "patch"]`, `  reinvocationPolicy: Never
  mutations:
  - patchType: JSONPatch
    jsonPatch: {expression: '[JSONPatch{op: "replace", path: "/command", value: ["echo", "by the patch"]}]'}`)
	policy(mutating, "applies", "CONNECT", "targets/exec", "Fail", `object.command == ["echo", "apply"]`, `  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{command: ["echo", "by the configuration"]}'}`)
	policy(mutating, "breaks", "CONNECT", "targets/exec", "Fail", `object.command == ["echo", "broken"]`, `  reinvocationPolicy: Never
  mutations:
  - patchType: JSONPatch
    jsonPatch: {expression: '[JSONPatch{op: "test", path: "/command", value: [object.command[7]]}]'}`)
	policy(mutating, "updates", "UPDATE", "targets", "Fail", `has(object.metadata.labels) && "change" in object.metadata.labels`, `  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{metadata: Object.metadata{annotations: {"by": "the-policy"}}}'}`)
	policy(validating, "must", "CONNECT", "targets/exec", "Fail", `object.command[1] == "must"`, `  validations: [{expression: 'object.command[7] == "x"'}]`)
	policy(validating, "may", "CONNECT", "targets/exec", "Ignore", `object.command[1] == "may"`, `  validations: [{expression: 'object.command[7] == "x"'}]`)
	policy(validating, "logs", "CONNECT", "targets/log", "Fail", `has(object.previous) && object.previous`, `  validations: [{expression: 'false', message: the policy says no to old logs}]`)
	policy(validating, "forwards", "CONNECT", "targets/portforward", "Fail", `true`, `  validations: [{expression: 'has(object.ports) && object.ports.all(p, p == 8080)', message: the policy wants the port named}]`)
	policy(validating, "attaches", "CONNECT", "targets/attach", "Fail", `has(object.stdin) && object.stdin`, `  validations: [{expression: '!object.stdin', message: the policy wants nothing typed}]`)
	admin.cleanUpObjects(names...)
	admin.kubectlStdin(manifest, "create", "-f", "-")
	admin.waitTarget(ns, "web")

	for _, tt := range []struct{ word, stdout, stderr string }{
		{"patch", "by the patch\n", ""},
		// The published schema has no options of connections, so that the generic
		// server can't merge a configuration into them. It is no way past the
		// policy.
		{"apply", "", "no corresponding type for streaming.aaserver.io/v1, Kind=TargetExecOptions"},
		{"broken", "", "index out of bounds: 7"},
		{"must", "", "index out of bounds: 7"},
		{"may", "may\n", ""},
		{"other", "other\n", ""},
	} {
		for _, protocol := range []string{"websocket", "spdy"} {
			eventually(t, fmt.Sprintf("the exec of echo %s over %s goes by the policies", tt.word, protocol), noticed, func() error {
				r := admin.exec(protocol, ns, "web", "echo", tt.word)
				if (r.code != 0) != (tt.stderr != "") || r.stdout != tt.stdout || !strings.Contains(r.stderr, tt.stderr) {
					return fmt.Errorf("%+v", r)
				}
				return nil
			})
		}
	}
	for _, tt := range []struct {
		denied, allowed way
		want            string
	}{
		{way{"logs", "previous=true", "HTTP"}, way{"log", "", "binary.k8s.io"}, "the policy says no to old logs"},
		{way{"port-forward", "", "SPDY portforward.k8s.io"}, way{"portforward", "ports=8080", "v4.channel.k8s.io"}, "the policy wants the port named"},
		{way{"attach", "stdin=true&stdout=true", "v5.channel.k8s.io"}, way{"attach", "stdout=true&stdin=false", "v5.channel.k8s.io"}, "the policy wants nothing typed"},
	} {
		eventually(t, tt.denied.String()+" is denied", noticed, func() error {
			if code, message := tt.denied.connect(admin, ns, "web"); code != http.StatusUnprocessableEntity && code != http.StatusForbidden || !strings.Contains(message, tt.want) {
				return fmt.Errorf("%d %s", code, message)
			}
			return nil
		})
		// A rule for v1 is one for its equivalents.
		if code, message := tt.denied.connectBy(admin, "v1alpha1", ns, "web"); code != http.StatusUnprocessableEntity && code != http.StatusForbidden || !strings.Contains(message, tt.want) {
			t.Errorf("%s of v1alpha1: %d %s", tt.denied, code, message)
		}
		if code, message := tt.allowed.connect(admin, ns, "web"); code != http.StatusSwitchingProtocols {
			t.Errorf("%s: %d %s", tt.allowed, code, message)
		}
	}
	must(t, "an update", api.merge(onePath(ns, "web"), `{"metadata":{"labels":{"other":"x"}}}`))
	if got := api.get(onePath(ns, "web"), "metadata", "annotations", "by"); got != "" {
		t.Errorf("an update that the policy doesn't match was changed: %q", got)
	}
	eventually(t, "an update is changed", noticed, func() error {
		must(t, "an update", api.merge(onePath(ns, "web"), fmt.Sprintf(`{"metadata":{"labels":{"change":"x%d"}}}`, unique.Add(1))))
		if got := api.get(onePath(ns, "web"), "metadata", "annotations", "by"); got != "the-policy" {
			return fmt.Errorf("its annotation is %q", got)
		}
		return nil
	})
}

// testExternalWrites has all four kinds of external admission look at classes,
// and two of them choose a class for targets.
func testExternalWrites(t *testing.T, a *aggregated) {
	admin, c := a.with(t), a.cluster
	api, ns := admin.sender(), c.namespace(t, "chosen")
	modest, powerful := newName("modest"), newName("powerful")
	api.class(modest, everything)
	api.class(powerful, everything)

	deny, _ := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		var object struct{ Spec struct{ Users []string } }
		if err := json.Unmarshal(request.Object.Raw, &object); err != nil || slices.Contains(object.Spec.Users, "root") {
			return &admissionv1.AdmissionResponse{Result: &metav1.Status{Code: http.StatusForbidden, Message: "the webhook says no to root"}}
		}
		return &admissionv1.AdmissionResponse{Allowed: true}
	})
	change, _ := serveWebhook(t, func(request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
		patch := `[{"op":"add","path":"/spec/agents","value":["by-the-webhook"]}]`
		if request.Resource.Resource == "targets" {
			patch = `[{"op":"add","path":"/spec/className","value":"` + powerful + `"}]`
		}
		return &admissionv1.AdmissionResponse{Allowed: true, Patch: []byte(patch), PatchType: ptr.To(admissionv1.PatchTypeJSONPatch)}
	})
	webhook := func(name, selector, resources, clientConfig string) string {
		return fmt.Sprintf(`
- name: %s.e2e.aaserver.io
  admissionReviewVersions: [v1]
  sideEffects: None
  timeoutSeconds: 10
  objectSelector: {matchLabels: {e2e: %s}}
  rules: [{apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [%s]}]
  clientConfig: %s`, name, selector, resources, clientConfig)
	}
	policy := func(kind, name, selector, resources, rest string) string {
		return fmt.Sprintf(`
---
apiVersion: admissionregistration.k8s.io/v1
kind: %s
metadata: {name: %s}
spec:
  matchConstraints:
    objectSelector: {matchLabels: {e2e: %s}}
    resourceRules: [{apiGroups: [streaming.aaserver.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [%s]}]
%s`, kind, name, selector, resources, rest) + bound(kind, name, "")
	}
	const mutating, validating = "MutatingAdmissionPolicy", "ValidatingAdmissionPolicy"
	names := []string{"validatingwebhookconfiguration/" + ns, "mutatingwebhookconfiguration/" + ns}
	for _, name := range []string{ns, ns + "-targets"} {
		names = append(names, "mutatingadmissionpolicy/"+name, "mutatingadmissionpolicybinding/"+name)
	}
	names = append(names, "validatingadmissionpolicy/"+ns, "validatingadmissionpolicybinding/"+ns)
	admin.cleanUpObjects(names...)
	admin.kubectlStdin("apiVersion: admissionregistration.k8s.io/v1\nkind: ValidatingWebhookConfiguration\nmetadata: {name: "+ns+"}\nwebhooks:"+
		webhook("deny", ns, "targetclasses", deny)+
		"\n---\napiVersion: admissionregistration.k8s.io/v1\nkind: MutatingWebhookConfiguration\nmetadata: {name: "+ns+"}\nwebhooks:"+
		webhook("change", ns, "targetclasses", change)+
		webhook("choose", ns+"-webhook", "targets", change)+
		policy(validating, ns, ns, "targetclasses", `  validations: [{expression: '!has(object.spec.sources) || !("ssh" in object.spec.sources)', message: the policy says no to ssh}]`)+
		policy(mutating, ns, ns, "targetclasses", `  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{spec: Object.spec{users: ["by-the-policy"]}}'}`)+
		policy(mutating, ns+"-targets", ns+"-policy", "targets", `  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{spec: Object.spec{className: "`+powerful+`"}}'}`),
		"create", "-f", "-")

	class := func(name, spec string) error {
		return api.apply(classPath(name), "e2e", "apiVersion: streaming.aaserver.io/v1\nkind: TargetClass\nmetadata: {name: "+name+", labels: {e2e: "+ns+"}}\nspec: "+spec+"\n")
	}
	for _, operation := range []string{"created", "updated"} {
		name := ns
		eventually(t, "a class that is "+operation+" is denied by the webhook", noticed, func() error {
			if err := class(name, `{users: [root]}`); err == nil || !strings.Contains(err.Error(), "the webhook says no to root") {
				name = newName(ns)
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
		eventually(t, "a class that is "+operation+" is denied by the policy", noticed, func() error {
			if err := class(name, `{sources: [ssh]}`); err == nil || !strings.Contains(err.Error(), "the policy says no to ssh") {
				name = newName(ns)
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
		eventually(t, "a class that is "+operation+" is changed by both", noticed, func() error {
			must(t, "a class", class(name, fmt.Sprintf(`{sources: [process], limits: {sessionsPerUser: %d}}`, unique.Add(1))))
			got := [2]string{api.get(classPath(name), "spec", "agents"), api.get(classPath(name), "spec", "users")}
			if want := [2]string{"[by-the-webhook]", "[by-the-policy]"}; got != want {
				if operation == "created" {
					name = newName(ns)
				}
				return fmt.Errorf("agents and users are %q", got)
			}
			return nil
		})
	}

	// Who chooses a class for others gives them no right to it.
	alice := c.user(t, "alice", rule{namespace: ns, verbs: "create get patch", resources: "targets"})
	c.grantUse(t, alice, modest)
	for _, by := range []string{"webhook", "policy"} {
		manifest := strings.Replace(of(modest, "web-"+by), "labels: {", "labels: {e2e: "+ns+"-"+by+", ", 1)
		eventually(t, "the class that the "+by+" chooses is judged", noticed, func() error {
			err := alice.sender().create(ns, manifest, "dryRun=All")
			if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "may not use") || !strings.Contains(err.Error(), `"`+powerful+`"`) {
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
		must(t, "by who may use it", api.create(ns, manifest))
		if got := api.get(onePath(ns, "web-"+by), "spec", "className"); got != powerful {
			t.Errorf("the class that the %s chose is %q", by, got)
		}
		must(t, "a target of her own class", alice.sender().create(ns, of(modest, "own-"+by)))
		wantForbidden(t, "having the "+by+" change it", alice.sender().merge(onePath(ns, "own-"+by), `{"metadata":{"labels":{"e2e":"`+ns+"-"+by+`"}}}`), "may not use", `"`+powerful+`"`)
	}
}
