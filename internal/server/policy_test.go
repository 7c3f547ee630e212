package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process"
	"aaserver.io/aaserver/internal/storage"
	"aaserver.io/aaserver/registry/target"
)

// dialing reaches targets by the dial function that it is given, and by nothing
// else, as every driver does.
type dialing struct {
	handed *atomic.Pointer[corev1.Secret]
}

func (d dialing) Open(_ context.Context, req driver.Request) (driver.Conn, error) {
	d.handed.Store(req.Secret)
	endpoints := []v1.Endpoint{}
	if ssh := req.Target.Spec.SSH; ssh != nil {
		endpoints = ssh.Endpoints
	} else if tcp := req.Target.Spec.TCP; tcp != nil {
		endpoints = tcp.Endpoints
	}
	for _, e := range endpoints {
		if req.Target.Name+"-"+e.Name == req.Instance {
			return dialed{e.Host, req.Dial}, nil
		}
	}
	return nil, driver.Errorf(driver.NotFound, "no instance %s", req.Instance)
}

type dialed struct {
	host string
	dial driver.DialFunc
}

func (dialed) Close() error { return nil }

func (d dialed) DialPort(ctx context.Context, network string, port uint16) (driver.Stream, error) {
	conn, err := d.dial(ctx, network, net.JoinHostPort(d.host, strconv.Itoa(int(port))))
	if err != nil {
		return nil, driver.Errorf(driver.Unavailable, "%w", err)
	}
	return conn.(*net.TCPConn), nil
}

// policyServer is a server of reached sources, of which the tests are users:
// each one's token is its name.
type policyServer struct {
	config *rest.Config
	// services are the cluster's service ranges; nil while they aren't known.
	services atomic.Pointer[[]netip.Prefix]
	// secrets is the directory of Secrets, handed the last of them that a driver
	// was given, nil if it was given none.
	secrets string
	handed  atomic.Pointer[corev1.Secret]
	// process is the driver of hosted targets, nil while there are none.
	process atomic.Pointer[process.Driver]
}

// startPolicyServer starts a server until the test ends. may says what users
// other than admin are allowed.
func startPolicyServer(t *testing.T, may func(authorizer.Attributes) bool) *policyServer {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	dir := t.TempDir()
	endpoint, err := storage.SQLiteEndpoint(filepath.Join(dir, "state.db"))
	must(err)
	backend, err := storage.Start(ctx, storage.Options{Endpoint: endpoint, SocketDir: filepath.Join(dir, "run")})
	must(err)
	t.Cleanup(func() {
		if err := backend.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(cancel)

	config := NewConfig()
	generic := &config.Generic.Config
	etcd := newEtcdOptions()
	etcd.StorageConfig.Transport.ServerList = []string{backend.Endpoint()}
	must(setStorageCodec(etcd))
	must(etcd.ApplyTo(generic))
	serving := genericoptions.NewSecureServingOptions().WithLoopback()
	serving.ServerCert.CertDirectory = ""
	serving.Listener, err = net.Listen("tcp", "127.0.0.1:0")
	must(err)
	must(serving.MaybeDefaultWithSelfSignedCerts("localhost", nil, []net.IP{net.IPv4(127, 0, 0, 1)}))
	must(serving.ApplyToConfig(generic))
	generic.FlowControl = nil
	generic.Authentication.Authenticator = bearertoken.New(authenticator.TokenFunc(func(_ context.Context, token string) (*authenticator.Response, bool, error) {
		return &authenticator.Response{User: &user.DefaultInfo{Name: token}}, true, nil
	}))
	generic.Authorization.Authorizer = authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
		if name := a.GetUser().GetName(); name == "admin" || name == user.APIServerUser || may(a) {
			return authorizer.DecisionAllow, "", nil
		}
		return authorizer.DecisionNoOpinion, "the test says so", nil
	})

	s := &policyServer{secrets: filepath.Join(dir, "secrets")}
	s.services.Store(&[]netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("127.96.0.0/12")})
	services := func() ([]netip.Prefix, error) {
		if known := s.services.Load(); known != nil {
			return *known, nil
		}
		return nil, errors.New("nobody has said")
	}
	stores, err := NewStores(generic.RESTOptionsGetter, target.StoreOptions{Sources: sets.New(v1.SourceSSH, v1.SourceTCP, v1.SourceProcess)})
	must(err)
	// It isn't run: what it is told is dropped.
	events, err := newServerRecorder(config.Generic)
	must(err)
	generic.AdmissionControl, err = admission.NewChain(generic.Authorization.Authorizer, admission.Options{
		Classes: stores.Classes, Targets: stores.Targets, Services: services,
		Recorder: events,
	})
	must(err)
	options := newStreamOptions()
	config.Extra = ExtraConfig{
		Stores:       stores,
		Recorder:     events,
		DrainTimeout: options.DrainTimeout,
		Target: target.Options{
			Drivers: func(target *v1.Target) (driver.Driver, error) {
				if target.Spec.Hosted() {
					return s.process.Load(), nil
				}
				return dialing{&s.handed}, nil
			},
			Secrets: secretFiles(s.secrets).get,
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				if s.process.Load() == nil {
					return nil, errors.New("the dial of hosted sources was used for a reached one")
				}
				return new(net.Dialer).DialContext(ctx, network, address)
			},
			ServiceRanges: services,
			Sessions:      options.sessions(),
		},
	}
	server, err := config.Complete().New()
	must(err)
	ended := make(chan error, 1)
	go func() { ended <- server.Generic.PrepareRun().RunWithContext(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	ready, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	must(waitReady(ready, generic.LoopbackClientConfig))
	s.config = generic.LoopbackClientConfig
	return s
}

// as is the configuration of one user.
func (s *policyServer) as(name string) *rest.Config {
	config := rest.CopyConfig(s.config)
	config.BearerToken, config.QPS = name, -1
	return config
}

func (s *policyServer) client(t *testing.T, name string) versioned.Interface {
	t.Helper()
	client, err := versioned.NewForConfig(s.as(name))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// class makes a class, or changes it.
func (s *policyServer) class(t *testing.T, name string, spec v1.TargetClassSpec) {
	t.Helper()
	classes := s.client(t, "admin").StreamingV1().TargetClasses()
	class, err := classes.Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = classes.Create(t.Context(), &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{})
	} else if err == nil {
		class.Spec = spec
		_, err = classes.Update(t.Context(), class, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wantForbidden fails unless it was refused in these words; without any, unless
// it succeeded.
func wantForbidden(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if len(parts) == 0 {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		return
	}
	if !apierrors.IsForbidden(err) {
		t.Errorf("%s: got %v, want Forbidden", what, err)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: want %q in %v", what, part, err)
		}
	}
}

// forwardOne forwards one connection to a port, and returns what the port says
// or why it can't be reached; an error is a refusal before the upgrade.
func (s *policyServer) forwardOne(t *testing.T, protocol, name string, port int) (said, failure string, err error) {
	t.Helper()
	config := s.as("admin")
	url := s.client(t, "admin").StreamingV1().RESTClient().Post().Namespace("shop").Resource("targets").Name(name).SubResource("portforward").URL()
	var dialer httpstream.Dialer
	if protocol == "SPDY" {
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			t.Fatal(err)
		}
		dialer = spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, url)
	} else if dialer, err = portforward.NewSPDYOverWebsocketDialerForStreaming(url, config); err != nil {
		t.Fatal(err)
	}
	conn, _, err := dialer.Dial("portforward.k8s.io")
	if err != nil {
		return "", "", err
	}
	// What is read below ends with it.
	stop := time.AfterFunc(30*time.Second, func() { conn.Close() })
	defer stop.Stop()
	defer conn.Close()
	stream := func(kind string) httpstream.Stream {
		header := http.Header{}
		header.Set("streamType", kind)
		header.Set("port", strconv.Itoa(port))
		header.Set("requestID", "0")
		header.Set("X-Error-Text", "true")
		s, err := conn.CreateStream(header)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	errorStream := stream("error")
	errorStream.Close()
	data := stream("data")
	// A stream that is refused is reset, after its reason was sent.
	answer, broken := io.ReadAll(io.LimitReader(data, 4<<10))
	data.Close()
	text, err := io.ReadAll(io.LimitReader(errorStream, 4<<10))
	if err != nil || broken != nil && len(text) == 0 {
		t.Fatal(errors.Join(broken, err))
	}
	return string(answer), string(text), nil
}

// TestConnections is policy where the server itself connects: no driver of its
// own serves sources with endpoints yet. A process has one server, of which the
// forwards make use, too.
func TestConnections(t *testing.T) {
	s := startPolicyServer(t, func(a authorizer.Attributes) bool {
		switch a.GetResource() {
		case "targets", "targetclasses":
			return true
		case "secrets":
			return a.GetUser().GetName() == "alice" && a.GetVerb() == "get" && a.GetNamespace() == "shop" && a.GetName() == "hers"
		}
		return false
	})
	t.Run("addresses", func(t *testing.T) { testAddresses(t, s) })
	t.Run("Secrets", func(t *testing.T) { testSecrets(t, s) })
	t.Run("forwards", func(t *testing.T) { testForwards(t, s) })
}

func testAddresses(t *testing.T, s *policyServer) {
	// It says hello, and ends, on every address of loopback.
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "hello")
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-ended
	})
	port := listener.Addr().(*net.TCPAddr).Port

	allowing := func(allow, deny []string) v1.TargetClassSpec {
		return v1.TargetClassSpec{
			Sources:   []string{v1.SourceTCP},
			Addresses: v1.AddressPolicy{Allow: allow, Deny: deny},
			Ports:     v1.PortPolicy{Unlisted: true},
		}
	}
	targets := s.client(t, "admin").StreamingV1().Targets("shop")
	tcp := func(name, class, host string) *v1.Target {
		return &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.TargetSpec{
			ClassName: class,
			TCP:       &v1.TCPSource{Endpoints: []v1.Endpoint{{Name: "a", Host: host, Port: int32(port)}}},
		}}
	}
	const loopback, inServices, byName = "loopback", "services", "by-name"
	hosts := map[string]string{loopback: "127.0.0.1", inServices: "127.96.0.1", byName: "localhost"}
	s.class(t, "changing", allowing([]string{"127.0.0.0/8", "127.96.0.0/12"}, nil))
	for name, host := range hosts {
		if _, err := targets.Create(t.Context(), tcp(name, "changing", host), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	type want struct {
		// written is why it is refused before anything is dialled, dialled why
		// then; both are empty if it is reached.
		written, dialled string
	}
	const open = "has to be opened by an entry of addresses.allow that lies within it"
	for what, tt := range map[string]struct {
		allow, deny []string
		want        map[string]want
	}{
		"nothing said": {nil, nil, map[string]want{
			loopback: {written: "127.0.0.0/8 (loopback) " + open}, inServices: {written: "127.0.0.0/8 (loopback) " + open},
			byName: {dialled: `of "localhost"`}}},
		"everything allowed": {[]string{"0.0.0.0/0", "::/0"}, nil, map[string]want{
			loopback: {written: "127.0.0.0/8 (loopback) " + open}, inServices: {written: "127.0.0.0/8 (loopback) " + open},
			byName: {dialled: "(loopback) " + open}}},
		"loopback opened": {[]string{"127.0.0.0/8"}, nil, map[string]want{
			loopback: {}, inServices: {written: "127.96.0.0/12 (the cluster's services) " + open}, byName: {}}},
		"loopback and the services opened": {[]string{"127.0.0.0/8", "127.96.0.0/16"}, nil, map[string]want{
			loopback: {}, inServices: {}, byName: {}}},
		"one address opened": {[]string{"127.0.0.1/32"}, nil, map[string]want{
			loopback: {}, inServices: {written: "does not allow the address 127.96.0.1"}, byName: {}}},
		"another network alone": {[]string{"10.20.0.0/16"}, nil, map[string]want{
			loopback: {written: "loopback"}, inServices: {written: "loopback"}, byName: {dialled: `of "localhost"`}}},
		"opened and denied": {[]string{"127.0.0.0/8", "127.96.0.0/12", "::1/128"}, []string{"127.0.0.0/16", "::1/128"}, map[string]want{
			loopback: {written: "addresses.deny lists 127.0.0.0/16"}, inServices: {}, byName: {dialled: "addresses.deny lists"}}},
	} {
		t.Run(what, func(t *testing.T) {
			s.class(t, "changing", allowing(tt.allow, tt.deny))
			s.class(t, "same", allowing(tt.allow, tt.deny)) // of targets that are new
			for name, want := range tt.want {
				_, err := targets.Create(t.Context(), tcp("new-"+name, "same", hosts[name]), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
				if want.written == "" {
					wantForbidden(t, "a target of "+hosts[name], err)
				} else {
					wantForbidden(t, "a target of "+hosts[name], err, "spec.tcp.endpoints[0].host", want.written)
				}
				for _, protocol := range []string{"SPDY", "tunnel"} {
					said, failure, err := s.forwardOne(t, protocol, name, port)
					switch {
					case want.written != "":
						// It was let in once, and is judged again.
						if err == nil || !strings.Contains(err.Error(), want.written) {
							t.Errorf("%s over %s: %q, %q, %v, want a refusal before the upgrade: %q", hosts[name], protocol, said, failure, err, want.written)
						}
					case err != nil:
						t.Errorf("%s over %s: %v", hosts[name], protocol, err)
					case want.dialled != "":
						if !strings.Contains(failure, want.dialled) || !strings.Contains(failure, `class "changing" does not allow the address`) {
							t.Errorf("%s over %s: %q, %q, want %q as it is dialled", hosts[name], protocol, said, failure, want.dialled)
						}
					case said != "hello":
						t.Errorf("%s over %s: %q, %q, want it reached", hosts[name], protocol, said, failure)
					}
				}
			}
		})
	}

	t.Run("what the cluster's services are isn't known", func(t *testing.T) {
		s.class(t, "changing", allowing([]string{"127.0.0.0/8"}, nil))
		known := s.services.Swap(nil)
		defer s.services.Store(known)
		_, err := targets.Create(t.Context(), tcp("early", "changing", "localhost"), metav1.CreateOptions{})
		if !apierrors.IsServiceUnavailable(err) {
			t.Errorf("a new target: got %v, want ServiceUnavailable", err)
		}
		for _, protocol := range []string{"SPDY", "tunnel"} {
			if said, failure, err := s.forwardOne(t, protocol, byName, port); err == nil || !strings.Contains(err.Error(), "nobody has said") {
				t.Errorf("a connection over %s: %q, %q, %v", protocol, said, failure, err)
			}
		}
	})
}

func testSecrets(t *testing.T, s *policyServer) {
	for _, class := range []string{"shells", "shells-too"} {
		s.class(t, class, v1.TargetClassSpec{Sources: []string{v1.SourceSSH}, Users: []string{v1.ClassWildcard}, Ports: v1.PortPolicy{Unlisted: true}})
	}
	ssh := func(name, secret string) *v1.Target {
		return &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.TargetSpec{
			ClassName: "shells",
			SSH: &v1.SSHSource{
				Endpoints:            []v1.Endpoint{{Name: "a", Host: "one.example.com", Port: 22}},
				User:                 "deploy",
				CredentialsSecretRef: v1.SecretReference{Name: secret},
			},
		}}
	}
	mayNot := func(user, secret, namespace string) []string {
		return []string{fmt.Sprintf("user %q may not get secrets %q in the namespace %q", user, secret, namespace)}
	}
	for what, tt := range map[string]struct {
		user, namespace, secret string
		want                    []string
	}{
		"who may read it":             {"alice", "shop", "hers", nil},
		"another Secret":              {"alice", "shop", "his", mayNot("alice", "his", "shop")},
		"one of another namespace":    {"alice", "bank", "hers", mayNot("alice", "hers", "bank")},
		"who may not read it":         {"bob", "shop", "hers", mayNot("bob", "hers", "shop")},
		"one that needn't even exist": {"bob", "shop", "no-such", mayNot("bob", "no-such", "shop")},
	} {
		_, err := s.client(t, tt.user).StreamingV1().Targets(tt.namespace).Create(t.Context(), ssh("new", tt.secret), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		wantForbidden(t, "a target with "+what, err, tt.want...)
	}

	if _, err := s.client(t, "alice").StreamingV1().Targets("shop").Create(t.Context(), ssh("shell", "hers"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bobs := mayNot("bob", "hers", "shop")
	for _, tt := range []struct {
		what, user, patch string
		want              []string
	}{
		{"where it leads", "bob", `{"spec":{"ssh":{"endpoints":[{"name":"a","host":"evil.example.com","port":22}]}}}`, bobs},
		{"to what port", "bob", `{"spec":{"ssh":{"endpoints":[{"name":"a","host":"one.example.com","port":2222}]}}}`, bobs},
		{"one place more", "bob", `{"spec":{"ssh":{"endpoints":[{"name":"a","host":"one.example.com","port":22},{"name":"b","host":"evil.example.com","port":22}]}}}`, bobs},
		{"as whom", "bob", `{"spec":{"ssh":{"user":"other"}}}`, bobs},
		{"the log's command", "bob", `{"spec":{"ssh":{"log":{"command":["cat","/etc/shadow"]}}}}`, bobs},
		{"the class", "bob", `{"spec":{"className":"shells-too"}}`, bobs},
		{"the Secret", "bob", `{"spec":{"ssh":{"credentialsSecretRef":{"name":"his"}}}}`, mayNot("bob", "his", "shop")},
		{"the Secret, by who may read the old one", "alice", `{"spec":{"ssh":{"credentialsSecretRef":{"name":"his"}}}}`, mayNot("alice", "his", "shop")},
		{"a label", "bob", `{"metadata":{"labels":{"by":"bob"}}}`, nil},
		{"where it leads, by who may read it", "alice", `{"spec":{"ssh":{"endpoints":[{"name":"a","host":"two.example.com","port":22}]}}}`, nil},
	} {
		_, err := s.client(t, tt.user).StreamingV1().Targets("shop").Patch(t.Context(), "shell", types.MergePatchType, []byte(tt.patch), metav1.PatchOptions{})
		wantForbidden(t, "a change of "+tt.what, err, tt.want...)
	}
	// A status can't smuggle a spec in.
	_, err := s.client(t, "bob").StreamingV1().Targets("shop").Patch(t.Context(), "shell", types.MergePatchType,
		[]byte(`{"spec":{"ssh":{"endpoints":[{"name":"a","host":"evil.example.com","port":22}]}}}`), metav1.PatchOptions{}, "status")
	wantForbidden(t, "a change by status", err)
	got, err := s.client(t, "admin").StreamingV1().Targets("shop").Get(t.Context(), "shell", metav1.GetOptions{})
	if err != nil || got.Spec.SSH.Endpoints[0].Host != "two.example.com" {
		t.Errorf("after a change by status it leads to %+v, %v", got.Spec.SSH, err)
	}

	// A connection is given the Secret as it is at the time.
	connect := func() error {
		return s.client(t, "admin").StreamingV1().RESTClient().Get().Namespace("shop").Resource("targets").Name("shell").SubResource("log").Do(t.Context()).Error()
	}
	if err := connect(); !apierrors.IsServiceUnavailable(err) || !strings.Contains(err.Error(), `the server can't read the Secret "hers"`) || !strings.Contains(err.Error(), "make the directory") {
		t.Errorf("a connection without the Secret: %v", err)
	}
	place := filepath.Join(s.secrets, "shop", "hers")
	if err := os.MkdirAll(place, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"first", "second"} {
		if err := os.WriteFile(filepath.Join(place, corev1.SSHAuthPrivateKey), []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := connect(); !apierrors.IsBadRequest(err) { // the driver has no logs
			t.Errorf("a connection with the Secret: %v", err)
		}
		if got := s.handed.Load(); got == nil || string(got.Data[corev1.SSHAuthPrivateKey]) != key || got.Type != corev1.SecretTypeSSHAuth {
			t.Errorf("the driver was given %v, want the key %q", got, key)
		}
	}
	if err := s.client(t, "bob").StreamingV1().Targets("shop").Delete(t.Context(), "shell", metav1.DeleteOptions{}); err != nil {
		t.Errorf("deleting: %v", err)
	}
}
