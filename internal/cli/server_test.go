package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// asPlugin is a variable of the environment with which the test binary is the
// plugin.
const asPlugin = "TEST_AS_KUBECTL_TARGET"

func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) != "" {
		os.Exit(Main())
	}
	// SPDY's library waits for half a minute for a stream that was being opened
	// when its connection was closed, and kubectl's terminal sizes have no end.
	// Our own commands end with the process.
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/moby/spdystream.(*Stream).WaitTimeout"),
		goleak.IgnoreAnyFunction("k8s.io/kubectl/pkg/util/term.(*sizeQueue).Next"),
	)
}

const timeout = 30 * time.Second

// testServer is an API server for targets over TLS. What a subresource does is
// the test's.
type testServer struct {
	t   *testing.T
	srv *httptest.Server

	log, exec, attach, portforward func(w http.ResponseWriter, r *http.Request, target string)
	// created is told of each target that a client creates, and may change its
	// status.
	created func(target *v1.Target)
	// intercept answers a request before anything else if it returns true.
	intercept func(w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex
	version  int
	targets  map[string]*v1.Target
	watchers map[chan metav1.WatchEvent]labels.Selector
	requests []string
}

func newTestServer(t *testing.T, targets ...*v1.Target) *testServer {
	s := &testServer{
		t:        t,
		targets:  map[string]*v1.Target{},
		watchers: map[chan metav1.WatchEvent]labels.Selector{},
	}
	for _, target := range targets {
		s.apply(target)
	}
	mux := http.NewServeMux()
	const base = "/apis/streaming.aaserver.io/v1"
	mux.HandleFunc("GET "+base+"/targets", s.serveList)
	mux.HandleFunc("GET "+base+"/namespaces/{namespace}/targets", s.serveList)
	mux.HandleFunc("GET "+base+"/namespaces/{namespace}/targets/{name}", func(w http.ResponseWriter, r *http.Request) {
		if target := s.find(w, r.PathValue("name")); target != nil {
			writeJSON(w, http.StatusOK, target)
		}
	})
	mux.HandleFunc("POST "+base+"/namespaces/{namespace}/targets", s.serveCreate)
	mux.HandleFunc("DELETE "+base+"/namespaces/{namespace}/targets/{name}", s.serveDelete)
	mux.HandleFunc(base+"/namespaces/{namespace}/targets/{name}/{subresource}", func(w http.ResponseWriter, r *http.Request) {
		if s.find(w, r.PathValue("name")) == nil {
			return
		}
		serve := map[string]func(http.ResponseWriter, *http.Request, string){
			"log": s.log, "exec": s.exec, "attach": s.attach, "portforward": s.portforward,
		}[r.PathValue("subresource")]
		serve(w, r, r.PathValue("name"))
	})
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.2"})
	})
	s.srv = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Method+" "+r.URL.Path)
		s.mu.Unlock()
		if s.intercept == nil || !s.intercept(w, r) {
			mux.ServeHTTP(w, r)
		}
	}))
	s.srv.EnableHTTP2 = true
	// It logs each connection that a client opened and didn't need.
	s.srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.srv.StartTLS()
	t.Cleanup(s.srv.Close)
	return s
}

func writeJSON(w http.ResponseWriter, code int, obj any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(obj)
}

func writeError(w http.ResponseWriter, err *apierrors.StatusError) {
	status := err.Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	writeJSON(w, int(status.Code), status)
}

func (s *testServer) find(w http.ResponseWriter, name string) *v1.Target {
	s.mu.Lock()
	defer s.mu.Unlock()
	target, ok := s.targets[name]
	if !ok {
		writeError(w, apierrors.NewNotFound(v1.Resource("targets"), name))
	}
	return target
}

func (s *testServer) serveCreate(w http.ResponseWriter, r *http.Request) {
	target := &v1.Target{}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		_, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, nil, target)
	}
	if err != nil {
		writeError(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	target.Namespace, target.UID = r.PathValue("namespace"), types.UID("uid of "+target.Name)
	target.TypeMeta = metav1.TypeMeta{Kind: "Target", APIVersion: v1.SchemeGroupVersion.String()}
	if r.URL.Query().Get("dryRun") == "" {
		if s.created != nil {
			s.created(target)
		}
		s.apply(target)
	}
	writeJSON(w, http.StatusCreated, target)
}

func (s *testServer) serveDelete(w http.ResponseWriter, r *http.Request) {
	var options metav1.DeleteOptions
	body, err := io.ReadAll(r.Body)
	if err == nil {
		_, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, nil, &options)
	}
	if err != nil {
		writeError(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	target := s.find(w, r.PathValue("name"))
	if target == nil {
		return
	}
	if p := options.Preconditions; p != nil && p.UID != nil && *p.UID != target.UID {
		writeError(w, apierrors.NewConflict(v1.Resource("targets"), target.Name, errors.New("another UID")))
		return
	}
	s.delete(target.Name)
	writeJSON(w, http.StatusOK, target)
}

func (s *testServer) serveList(w http.ResponseWriter, r *http.Request) {
	selector, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		writeError(w, apierrors.NewBadRequest(err.Error()))
		return
	}
	if r.URL.Query().Get("watch") != "" {
		s.serveWatch(w, r, selector)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := v1.TargetList{TypeMeta: metav1.TypeMeta{Kind: "TargetList", APIVersion: v1.SchemeGroupVersion.String()}}
	list.ResourceVersion = fmt.Sprint(s.version)
	list.Items = []v1.Target{}
	for _, target := range s.targets {
		if selector.Matches(labels.Set(target.Labels)) {
			list.Items = append(list.Items, *target)
		}
	}
	writeJSON(w, http.StatusOK, list)
}

func (s *testServer) serveWatch(w http.ResponseWriter, r *http.Request, selector labels.Selector) {
	if r.URL.Query().Get("sendInitialEvents") != "" {
		writeError(w, apierrors.NewInvalid(v1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", nil))
		return
	}
	events := make(chan metav1.WatchEvent, 100)
	s.mu.Lock()
	if r.URL.Query().Get("resourceVersion") != fmt.Sprint(s.version) {
		s.mu.Unlock()
		writeError(w, apierrors.NewResourceExpired("too old"))
		return
	}
	s.watchers[events] = selector
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, events)
	}()
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for {
		select {
		case event := <-events:
			_ = json.NewEncoder(w).Encode(event)
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// event tells the watchers of a change. A target that comes to match a selector
// is added for them, one that no longer does is deleted. s.mu is held.
func (s *testServer) event(before, now *v1.Target) {
	matches := func(selector labels.Selector, target *v1.Target) bool {
		return target != nil && selector.Matches(labels.Set(target.Labels))
	}
	for watcher, selector := range s.watchers {
		kind, object := "MODIFIED", now
		switch was, is := matches(selector, before), matches(selector, now); {
		case !was && !is:
			continue
		case !was:
			kind = "ADDED"
		case !is:
			kind = "DELETED"
			if now == nil {
				object = before
			}
		}
		raw, err := json.Marshal(object)
		if err != nil {
			s.t.Error(err)
		}
		watcher <- metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: raw}}
	}
}

// apply creates or changes a target.
func (s *testServer) apply(target *v1.Target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	target = target.DeepCopy()
	target.TypeMeta = metav1.TypeMeta{Kind: "Target", APIVersion: v1.SchemeGroupVersion.String()}
	target.ResourceVersion = fmt.Sprint(s.version)
	before := s.targets[target.Name]
	s.targets[target.Name] = target
	s.event(before, target)
}

func (s *testServer) delete(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	target := s.targets[name].DeepCopy()
	target.ResourceVersion = fmt.Sprint(s.version)
	delete(s.targets, name)
	s.event(target, nil)
}

// watched says whether somebody watches targets.
func (s *testServer) watched() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.watchers) > 0
}

func (s *testServer) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// kubeconfig writes a kubeconfig for the server.
func (s *testServer) kubeconfig() string {
	s.t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["test"] = &clientcmdapi.Cluster{
		Server:                   s.srv.URL,
		CertificateAuthorityData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.srv.Certificate().Raw}),
	}
	config.AuthInfos["me"] = &clientcmdapi.AuthInfo{}
	config.Contexts["ctx"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "me", Namespace: "shop"}
	config.CurrentContext = "ctx"
	file := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// output is a buffer that a command writes to while the test reads it.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// running is a command that has been started.
type running struct {
	t           *testing.T
	out, errOut *output
	cancel      context.CancelCauseFunc
	done        chan struct{}
	code        int
}

// start runs a command line against the server.
func (s *testServer) start(stdin io.Reader, args ...string) *running {
	s.t.Helper()
	return startWith(s.t, genericiooptions.IOStreams{In: stdin}, append([]string{"--kubeconfig", s.kubeconfig()}, args...)...)
}

// startAt runs a command line with a kubeconfig of the test's.
func (s *testServer) startAt(kubeconfig string, args ...string) *running {
	s.t.Helper()
	return startWith(s.t, genericiooptions.IOStreams{}, append([]string{"--kubeconfig", kubeconfig}, args...)...)
}

// startWith runs a command line; streams that are nil are buffers.
func startWith(t *testing.T, streams genericiooptions.IOStreams, args ...string) *running {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &running{t: t, out: &output{}, errOut: &output{}, cancel: cancel, done: make(chan struct{})}
	if streams.In == nil {
		streams.In = strings.NewReader("")
	}
	if streams.Out == nil {
		streams.Out = r.out
	}
	if streams.ErrOut == nil {
		streams.ErrOut = r.errOut
	}
	go func() {
		defer close(r.done)
		r.code = Execute(ctx, streams, args)
	}()
	t.Cleanup(func() {
		cancel(nil)
		<-r.done
	})
	return r
}

// wait returns the exit code.
func (r *running) wait() int {
	r.t.Helper()
	select {
	case <-r.done:
		return r.code
	case <-time.After(timeout):
		r.t.Fatalf("the command hasn't ended; stdout %q, stderr %q", r.out, r.errOut)
		return -1
	}
}

// until waits for a condition.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// decode reads the options of a request.
func decode[T any, P interface {
	*T
	runtime.Object
}](t *testing.T, r *http.Request) *T {
	t.Helper()
	options := P(new(T))
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		t.Error(err)
	}
	if err := scheme.ParameterCodec.DecodeParameters(query, v1.SchemeGroupVersion, options); err != nil {
		t.Error(err)
	}
	return (*T)(options)
}

func process(name string, change ...func(*v1.Target)) *v1.Target {
	target := &v1.Target{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID("uid of " + name), Labels: map[string]string{"app": "shop"}},
		Spec:       v1.TargetSpec{Process: &v1.ProcessSource{Command: []string{"true"}}},
	}
	for _, c := range change {
		c(target)
	}
	return target
}

// plugin is the plugin as a process of its own.
func plugin(t *testing.T, config string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self, append([]string{"--kubeconfig", config}, args...)...)
	cmd.Env = append(os.Environ(), asPlugin+"=yes")
	return cmd
}

// bash returns the shell's path. Only its absence on a developer's machine is no
// failure.
func bash(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("bash")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("bash isn't installed")
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
