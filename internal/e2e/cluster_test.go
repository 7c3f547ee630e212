//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"
)

const (
	apiGroup   = "streaming.aaserver.io"
	apiService = "v1." + apiGroup
	// alphaService is the APIService of the older version.
	alphaService = "v1alpha1." + apiGroup
	apiPath      = "/apis/" + apiGroup + "/v1"

	// As hack/deploy has them.
	serverNamespace = "aaserver-system"
	serverName      = "aaserver"
)

func init() {
	endWithTests = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
}

// unique makes names that nothing else has.
var unique atomic.Int64

// cluster is a running control plane: etcd, kube-apiserver and
// kube-controller-manager.
type cluster struct {
	dir  string
	info controlPlaneInfo
	// kube is the administrator's.
	kube kubernetes.Interface

	launcher *exec.Cmd
	log      *os.File
	ended    chan struct{}
	// serving says that a server is behind it.
	serving atomic.Bool
}

// controlPlaneInfo is what controlplane.json says.
type controlPlaneInfo struct {
	APIServerURL     string
	AdminKubeconfig  string
	ClusterCA        keyPair
	FrontProxyCA     keyPair
	FrontProxyClient keyPair
	EtcdURL          string
	EtcdCAFile       string
	EtcdClient       keyPair
	Components       map[string]struct {
		PID int
		Log string
	}
}

type keyPair struct{ CertFile, KeyFile string }

// startCluster starts a control plane of the test's own, with the launcher's
// flags that are given.
func startCluster(t testing.TB, args ...string) *cluster {
	t.Helper()
	c, err := upCluster(t.TempDir(), args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kube-apiserver's log:\n%s", c.componentLog("kube-apiserver"))
		}
		if err := c.down(); err != nil {
			t.Error(err)
		}
	})
	return c
}

var shared struct {
	once    sync.Once
	cluster *cluster
	err     error
}

// sharedCluster is the control plane that the package's tests share, started
// when the first one wants it. Only one server can be behind it at a time: tests
// that use it aren't parallel to each other, though their parts may be.
func sharedCluster(t testing.TB) *cluster {
	t.Helper()
	shared.once.Do(func() {
		dir, err := os.MkdirTemp(filepath.Dir(binaries.server), "cluster-")
		if err != nil {
			shared.err = err
			return
		}
		if shared.cluster, shared.err = upCluster(dir); shared.err != nil {
			return
		}
		atEnd = append(atEnd, func() {
			if err := shared.cluster.down(); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		})
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.cluster
}

func upCluster(dir string, args ...string) (*cluster, error) {
	if _, err := os.Stat(binaries.controlplane); err != nil {
		return nil, fmt.Errorf("the control plane isn't built, run make controlplane: %w", err)
	}
	log, err := os.Create(filepath.Join(dir, "launcher.log"))
	if err != nil {
		return nil, err
	}
	c := &cluster{dir: dir, log: log, ended: make(chan struct{})}
	c.launcher = exec.Command(binaries.controlplane, append([]string{"up", "--dir", dir}, args...)...)
	c.launcher.Stdout, c.launcher.Stderr = log, log
	c.launcher.SysProcAttr = endWithTests
	if err := c.launcher.Start(); err != nil {
		log.Close()
		return nil, err
	}
	go func() {
		c.launcher.Wait()
		close(c.ended)
	}()
	if err := c.waitUp(); err != nil {
		return nil, errors.Join(err, c.down())
	}
	return c, nil
}

func (c *cluster) waitUp() error {
	deadline := time.After(3 * time.Minute)
	for {
		content, err := os.ReadFile(filepath.Join(c.dir, "controlplane.json"))
		if err == nil {
			if err := json.Unmarshal(content, &c.info); err != nil {
				return err
			}
			config, err := clientcmd.BuildConfigFromFlags("", c.info.AdminKubeconfig)
			if err != nil {
				return err
			}
			config.QPS = -1
			c.kube, err = kubernetes.NewForConfig(config)
			return err
		}
		select {
		case <-c.ended:
			text, _ := os.ReadFile(c.log.Name())
			return fmt.Errorf("the control plane didn't start:\n%s", text)
		case <-deadline:
			return errors.New("the control plane isn't ready after 3 minutes")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// down stops the control plane, and waits for its end.
func (c *cluster) down() error {
	defer c.log.Close()
	c.launcher.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.ended:
	case <-time.After(time.Minute):
		c.launcher.Process.Kill()
		<-c.ended
		return errors.New("the control plane didn't end within a minute of SIGTERM")
	}
	if !c.launcher.ProcessState.Success() {
		text, _ := os.ReadFile(c.log.Name())
		return fmt.Errorf("the control plane ended with %s:\n%s", c.launcher.ProcessState, tail(string(text), 4<<10))
	}
	return nil
}

// component runs a command of the launcher, stop, start or restart, on one.
func (c *cluster) component(t testing.TB, command, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(binaries.controlplane, append([]string{command, "--dir", c.dir, name}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", command, name, err, out)
	}
}

func (c *cluster) componentLog(name string) string {
	text, err := os.ReadFile(c.info.Components[name].Log)
	if err != nil {
		return err.Error()
	}
	return tail(string(text), 8<<10)
}

// admin may do everything.
func (c *cluster) admin(t testing.TB) *client {
	return &client{t: t, dir: t.TempDir(), kubeconfig: c.info.AdminKubeconfig}
}

// namespace creates a namespace of that name and a number.
func (c *cluster) namespace(t testing.TB, prefix string) string {
	t.Helper()
	name := fmt.Sprintf("%s-%d", prefix, unique.Add(1))
	_, err := c.kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// rule is what somebody may do with resources of our group, in all namespaces
// if none is named. Verbs and resources are separated by spaces.
type rule struct {
	namespace, verbs, resources string
	group                       string // ours, if empty; "core" for that
}

// user is somebody new with a certificate of the cluster's CA, who may do what
// the rules say and nothing else. The name given is the
// beginning of its own.
func (c *cluster) user(t testing.TB, name string, rules ...rule) *client {
	t.Helper()
	name = fmt.Sprintf("%s-%d", name, unique.Add(1))
	dir := t.TempDir()
	pair := readAuthority(t, c.info.ClusterCA).issue(t, filepath.Join(dir, "user"), &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	c.grant(t, rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}, rules...)
	return c.client(t, dir, &clientcmdapi.AuthInfo{ClientCertificate: pair.CertFile, ClientKey: pair.KeyFile})
}

// serviceAccount is a new ServiceAccount's token, which may do what the rules
// say.
func (c *cluster) serviceAccount(t testing.TB, namespace, name string, rules ...rule) (_ *client, token string) {
	t.Helper()
	name = fmt.Sprintf("%s-%d", name, unique.Add(1))
	_, err := c.kube.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.grant(t, rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name}, rules...)
	token = c.token(t, namespace, name)
	return c.client(t, t.TempDir(), &clientcmdapi.AuthInfo{Token: token}), token
}

// token is a new token of a ServiceAccount.
func (c *cluster) token(t testing.TB, namespace, name string) string {
	t.Helper()
	token, err := c.kube.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: ptr.To[int64](24 * 60 * 60)}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return token.Status.Token
}

// client is a client of kube-apiserver, with the credentials given.
func (c *cluster) client(t testing.TB, dir string, who *clientcmdapi.AuthInfo) *client {
	t.Helper()
	file := filepath.Join(dir, "kubeconfig")
	if err := writeKubeconfig(file, c.info.APIServerURL, c.info.ClusterCA.CertFile, "default", who); err != nil {
		t.Fatal(err)
	}
	return &client{t: t, dir: dir, kubeconfig: file}
}

func writeKubeconfig(file, server, caFile, namespace string, who *clientcmdapi.AuthInfo) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["e2e"] = &clientcmdapi.Cluster{Server: server, CertificateAuthority: caFile}
	config.AuthInfos["e2e"] = who
	config.Contexts["e2e"] = &clientcmdapi.Context{Cluster: "e2e", AuthInfo: "e2e", Namespace: namespace}
	config.CurrentContext = "e2e"
	return clientcmd.WriteToFile(*config, file)
}

// grant binds somebody to rules, until the test ends, and waits until
// kube-apiserver goes by them. Before that nothing may be asked of our server,
// which remembers a refusal for 10 s.
func (c *cluster) grant(t testing.TB, who rbacv1.Subject, rules ...rule) {
	t.Helper()
	api := c.kube.RbacV1()
	for _, r := range rules {
		meta := metav1.ObjectMeta{Name: fmt.Sprintf("e2e-%d", unique.Add(1))}
		group := apiGroup
		switch r.group {
		case "":
		case "core":
			group = ""
		default:
			group = r.group
		}
		policy := []rbacv1.PolicyRule{{Verbs: strings.Fields(r.verbs), Resources: strings.Fields(r.resources), APIGroups: []string{group}}}
		subjects := []rbacv1.Subject{who}
		var errs [2]error
		if r.namespace == "" {
			_, errs[0] = api.ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: policy}, metav1.CreateOptions{})
			_, errs[1] = api.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
				ObjectMeta: meta, Subjects: subjects,
				RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
			}, metav1.CreateOptions{})
			t.Cleanup(func() {
				api.ClusterRoleBindings().Delete(context.Background(), meta.Name, metav1.DeleteOptions{})
				api.ClusterRoles().Delete(context.Background(), meta.Name, metav1.DeleteOptions{})
			})
		} else {
			_, errs[0] = api.Roles(r.namespace).Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: policy}, metav1.CreateOptions{})
			_, errs[1] = api.RoleBindings(r.namespace).Create(t.Context(), &rbacv1.RoleBinding{
				ObjectMeta: meta, Subjects: subjects,
				RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
			}, metav1.CreateOptions{})
		}
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
		resource, subresource, _ := strings.Cut(policy[0].Resources[len(policy[0].Resources)-1], "/")
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: who.Name,
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Namespace: r.namespace, Verb: policy[0].Verbs[0], Group: group, Resource: resource, Subresource: subresource,
			},
		}}
		switch who.Kind {
		case rbacv1.ServiceAccountKind:
			review.Spec.User = "system:serviceaccount:" + who.Namespace + ":" + who.Name
		case rbacv1.GroupKind:
			review.Spec.User, review.Spec.Groups = "somebody", []string{who.Name}
		}
		eventually(t, "kube-apiserver knows the rule", 30*time.Second, func() error {
			got, err := c.kube.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
			if err == nil && !got.Status.Allowed {
				err = fmt.Errorf("%v isn't allowed", r)
			}
			return err
		})
	}
}

// with is the same client in another test.
func (c *client) with(t testing.TB) *client {
	return &client{t: t, dir: c.dir, kubeconfig: c.kubeconfig}
}

// config is the client's configuration for client-go.
func (c *client) config() *rest.Config {
	c.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		c.t.Fatal(err)
	}
	config.QPS = -1
	return config
}

// targetPath is the path of a target's subresource.
func targetPath(namespace, target, subresource string, query ...string) string {
	path := apiPath + "/namespaces/" + namespace + "/targets/" + target + "/" + subresource
	if len(query) > 0 {
		path += "?" + strings.Join(query, "&")
	}
	return path
}

// url is a path at the client's server.
func (c *client) url(path string) *url.URL {
	c.t.Helper()
	u, err := url.Parse(c.config().Host + path)
	if err != nil {
		c.t.Fatal(err)
	}
	return u
}

// httpClient speaks HTTP/2, or HTTP/1.1 alone, with the client's credentials.
func (c *client) httpClient(http1 bool) *http.Client {
	c.t.Helper()
	config := c.config()
	if http1 {
		config.NextProtos = []string{"http/1.1"}
	}
	// A transport of one's own: those of client-go are shared.
	tlsConfig, err := rest.TLSConfigFor(config)
	if err != nil {
		c.t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: tlsConfig, ForceAttemptHTTP2: !http1}
	c.t.Cleanup(transport.CloseIdleConnections)
	wrapped, err := rest.HTTPWrappersForConfig(config, transport)
	if err != nil {
		c.t.Fatal(err)
	}
	return &http.Client{Transport: wrapped}
}

// dial opens a WebSocket that offers the subprotocols. On a refusal the response
// has the status, and the start of the body.
func (c *client) dial(path string, header http.Header, subprotocols ...string) (*websocket.Conn, *http.Response, error) {
	c.t.Helper()
	config := c.config()
	tlsConfig, err := rest.TLSConfigFor(config)
	if err != nil {
		c.t.Fatal(err)
	}
	header = header.Clone()
	if header == nil {
		header = http.Header{}
	}
	if config.BearerToken != "" {
		header.Set("Authorization", "Bearer "+config.BearerToken)
	}
	dialer := websocket.Dialer{TLSClientConfig: tlsConfig, Subprotocols: subprotocols, HandshakeTimeout: 30 * time.Second}
	conn, response, err := dialer.DialContext(c.t.Context(), "wss"+strings.TrimPrefix(c.url(path).String(), "https"), header)
	if conn != nil {
		c.t.Cleanup(func() { conn.Close() })
	}
	return conn, response, err
}

// serveOptions is how a server behind the aggregator is started; the zero value
// has etcd and an embedded agent called local.
type serveOptions struct {
	args            []string // further flags, which win
	storageEndpoint string   // in place of etcd
	noAgent         bool
}

// aggregated is a server behind kube-aggregator. As a client it is the
// cluster's administrator.
type aggregated struct {
	*server
	cluster *cluster
	// ca signs the serving certificate, which is in files that the server
	// reads again when they change.
	ca                *authority
	certFile, keyFile string
	// url is the server's own address, beside kube-apiserver.
	url     string
	dataDir string

	port    int
	args    []string
	servers *[]*server // of all that share the storage, for the clean-up
}

// serve starts a server behind the cluster's kube-aggregator, with the rights
// that hack/deploy gives it, and waits until it works. At the end its APIService
// goes first, then the server.
func (c *cluster) serve(t testing.TB, opts serveOptions) *aggregated {
	t.Helper()
	if !c.serving.CompareAndSwap(false, true) {
		t.Fatal("another server is behind this cluster: the tests that share it can't be parallel, or need a cluster of their own")
	}
	t.Cleanup(func() { c.serving.Store(false) })

	admin := c.admin(t)
	admin.kubectlStdin(serverRights(t), "apply", "-f", "-")
	kubeconfig := filepath.Join(admin.dir, "server.kubeconfig")
	err := writeKubeconfig(kubeconfig, c.info.APIServerURL, c.info.ClusterCA.CertFile, serverNamespace,
		&clientcmdapi.AuthInfo{Token: c.token(t, serverNamespace, serverName)})
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t, "aaserver-e2e")
	pair := ca.issueServing(t, filepath.Join(admin.dir, "serving"))
	a := &aggregated{
		cluster: c, ca: ca, certFile: pair.CertFile, keyFile: pair.KeyFile,
		server:  &server{client: admin},
		servers: &[]*server{},
		args: []string{
			"serve", "--kubeconfig", kubeconfig,
			"--bind-address", "127.0.0.1", "--permit-port-sharing", // see reservePort
			"--tls-cert-file", pair.CertFile, "--tls-private-key-file", pair.KeyFile,
		},
	}
	if opts.storageEndpoint != "" {
		a.args = append(a.args, "--storage-endpoint", opts.storageEndpoint)
	} else {
		a.args = append(a.args,
			"--etcd-servers", c.info.EtcdURL, "--etcd-cafile", c.info.EtcdCAFile,
			"--etcd-certfile", c.info.EtcdClient.CertFile, "--etcd-keyfile", c.info.EtcdClient.KeyFile,
			"--etcd-prefix", fmt.Sprintf("/e2e-%d", unique.Add(1)))
	}
	if !opts.noAgent {
		a.args = append(a.args, "--embedded-agent", "local")
	}
	a.args = append(a.args, opts.args...)

	t.Cleanup(a.cleanUp)
	a.place()
	a.start()
	a.route()
	a.waitWorks()
	return a
}

// place gives the server a port and a data directory.
func (a *aggregated) place() {
	a.t.Helper()
	a.port = reservePort(a.t)
	a.url = fmt.Sprintf("https://127.0.0.1:%d", a.port)
	a.dataDir = a.t.TempDir()
}

// start starts the server, or starts it again when it has ended.
func (a *aggregated) start() {
	a.t.Helper()
	args := append([]string{}, a.args...)
	a.server = launch(a.t, a.client, append(args, "--data-dir", a.dataDir, "--secure-port", fmt.Sprint(a.port))...)
	*a.servers = append(*a.servers, a.server)
}

// replica starts another server on the same storage. Requests go to it when
// route is called.
func (a *aggregated) replica(args ...string) *aggregated {
	a.t.Helper()
	other := *a
	other.args = append(append([]string{}, a.args...), args...)
	other.place()
	other.start()
	other.waitReady()
	return &other
}

// route makes the server the one that kube-aggregator proxies to.
func (a *aggregated) route() {
	a.t.Helper()
	bundle, err := json.Marshal(a.ca.pem())
	if err != nil {
		a.t.Fatal(err)
	}
	a.kubectlStdin(fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec: {type: ExternalName, externalName: localhost, ports: [{port: %[3]d}]}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: %[4]s}
spec:
  group: %[5]s
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 100
  service: {name: %[1]s, namespace: %[2]s, port: %[3]d}
  caBundle: %[6]s
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: %[7]s}
spec:
  group: %[5]s
  version: v1alpha1
  groupPriorityMinimum: 1000
  versionPriority: 50
  service: {name: %[1]s, namespace: %[2]s, port: %[3]d}
  caBundle: %[6]s
`, serverName, serverNamespace, a.port, apiService, apiGroup, bundle, alphaService), "apply", "-f", "-")
}

// waitReady waits until the server itself says that it is ready.
func (a *aggregated) waitReady() {
	a.t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: a.ca.pool()}, DisableKeepAlives: true}
	a.eventually("the server is ready", time.Minute, func() error {
		a.wantRunning()
		response, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get(a.url + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", response.Status, body)
		}
		return err
	})
}

// waitWorks waits until the server works through kube-apiserver: the APIService
// is available, and reading and writing go through.
func (a *aggregated) waitWorks() {
	a.t.Helper()
	raw := a.cluster.kube.Discovery().RESTClient()
	a.eventually("the APIService is available", time.Minute, func() error {
		a.wantRunning()
		body, err := raw.Get().AbsPath("/apis/apiregistration.k8s.io/v1/apiservices/" + apiService).Do(a.t.Context()).Raw()
		if err != nil {
			return err
		}
		var service struct {
			Status struct{ Conditions []metav1.Condition }
		}
		if err := json.Unmarshal(body, &service); err != nil {
			return err
		}
		for _, condition := range service.Status.Conditions {
			if condition.Type == "Available" && condition.Status == metav1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("%+v", service.Status.Conditions)
	})
	a.eventually("a class can be written", time.Minute, func() error {
		a.wantRunning()
		err := raw.Post().AbsPath(apiPath+"/targetclasses").
			SetHeader("Content-Type", "application/yaml").Body([]byte(defaultClass)).Do(a.t.Context()).Error()
		if apierrors.IsAlreadyExists(err) {
			return nil // of another server on the same storage
		}
		return err
	})
	a.eventually("a target can be written", time.Minute, func() error {
		a.wantRunning()
		target := `{"apiVersion":"` + apiGroup + `/v1","kind":"Target","metadata":{"name":"probe"},"spec":{"agentName":"local","process":{"command":["true"]}}}`
		return raw.Post().AbsPath(apiPath+"/namespaces/default/targets").Param("dryRun", "All").
			SetHeader("Content-Type", "application/json").Body([]byte(target)).Do(a.t.Context()).Error()
	})
}

// defaultClass lets the tests' targets run what they like as the server's user.
const defaultClass = `
apiVersion: streaming.aaserver.io/v1
kind: TargetClass
metadata: {name: standard, annotations: {streaming.aaserver.io/is-default-class: "true"}}
spec: {sources: [process], agents: ["*"], agentUser: true}
`

func (a *aggregated) wantRunning() {
	a.t.Helper()
	select {
	case <-a.ended:
		a.t.Fatalf("the server ended: %v\n%s", a.err, tail(a.output(), 8<<10))
	default:
	}
}

// cleanUp leaves nothing behind.
func (a *aggregated) cleanUp() {
	defer func() {
		for _, s := range *a.servers {
			s.signal(syscall.SIGTERM)
		}
		for _, s := range *a.servers {
			select {
			case <-s.ended:
			case <-time.After(45 * time.Second):
				a.t.Error("the server didn't end within 45 s of SIGTERM")
			}
			s.kill()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	raw := a.cluster.kube.Discovery().RESTClient()
	for _, name := range []string{alphaService, apiService} {
		if err := raw.Delete().AbsPath("/apis/apiregistration.k8s.io/v1/apiservices/" + name).Do(ctx).Error(); err != nil && !apierrors.IsNotFound(err) {
			a.t.Errorf("removing the APIService: %v", err)
		}
	}
	// Until kube-apiserver has taken notice, it would send the next server's
	// requests to this one.
	eventually(a.t, "kube-apiserver has forgotten the APIService", 30*time.Second, func() error {
		if err := raw.Get().AbsPath(apiPath).Do(ctx).Error(); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it answers %w", err)
		}
		return nil
	})
}

// serverRights is the account that hack/deploy runs the server as, and all that
// it may do.
func serverRights(t testing.TB) string {
	t.Helper()
	manifest, err := os.ReadFile(filepath.Join(root, "hack", "deploy", "aaserver.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	// What an embedded agent needs: the manifest has none, and so the chart
	// leaves it out.
	rights := `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: ` + serverName + `, namespace: ` + serverNamespace + `}
rules: [{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: ` + serverName + `, namespace: ` + serverNamespace + `}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: ` + serverName + `}
subjects: [{kind: ServiceAccount, name: ` + serverName + `, namespace: ` + serverNamespace + `}]
`
	kinds := map[string]int{}
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		var object metav1.PartialObjectMetadata
		if err == nil {
			err = yaml.Unmarshal(document, &object)
		}
		if err != nil {
			t.Fatal(err)
		}
		switch object.Kind {
		case "Namespace":
			rights = string(document) + "\n---\n" + rights
		case "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding":
			rights += "\n---\n" + string(document)
		default:
			continue
		}
		kinds[object.Kind]++
	}
	for _, kind := range []string{"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "RoleBinding"} {
		if kinds[kind] == 0 {
			t.Fatalf("hack/deploy/aaserver.yaml has no %s", kind)
		}
	}
	return rights
}

// reservePort takes a free port of loopback until the test ends. A server that
// shares its port can listen on it, again and again, and nothing else gets it
// meanwhile.
func reservePort(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	// After bind, which could else share a port that another test has.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return address.(*unix.SockaddrInet4).Port
}

// authority is a CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := cert.NewSelfSignedCACert(cert.Config{CommonName: name}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert: ca, key: key}
}

func readAuthority(t testing.TB, files keyPair) *authority {
	t.Helper()
	certs, err := cert.CertsFromFile(files.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyutil.PrivateKeyFromFile(files.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("%s holds a %T", files.KeyFile, key)
	}
	return &authority{cert: certs[0], key: ec}
}

func (a *authority) pem() []byte {
	text, err := cert.EncodeCertificates(a.cert)
	if err != nil {
		panic(err) // it can't fail in memory
	}
	return text
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// issueServing makes a certificate for the name by which kube-aggregator knows
// the server, and for loopback.
func (a *authority) issueServing(t testing.TB, path string) keyPair {
	t.Helper()
	return a.issue(t, path, &x509.Certificate{
		Subject:     pkix.Name{CommonName: serverName},
		DNSNames:    []string{serverName + "." + serverNamespace + ".svc", "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// issue makes a certificate for a day, in path.crt and path.key.
func (a *authority) issue(t testing.TB, path string, want *x509.Certificate) keyPair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		t.Fatal(err)
	}
	want.SerialNumber = serial
	want.NotBefore, want.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	want.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, want, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, err := cert.EncodeCertificates(leaf)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	pair := keyPair{CertFile: path + ".crt", KeyFile: path + ".key"}
	for file, content := range map[string][]byte{pair.CertFile: certPEM, pair.KeyFile: keyPEM} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return pair
}
