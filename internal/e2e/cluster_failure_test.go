//go:build linux

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
)

const (
	// leasePasses bounds how long a dead holder of the agent's Lease keeps it
	// (40 s), with what the next one needs to begin.
	leasePasses = 75 * time.Second
	// drainTimeout is --drain-timeout's default, and drainMargin what the rest
	// of an end may take.
	drainTimeout, drainMargin = 10 * time.Second, 20 * time.Second
)

// TestFailures has one part of a cluster fail after the other, behind which a
// server goes on.
func TestFailures(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	a := c.serve(t, serveOptions{})
	f := &failures{aggregated: a, ns: c.namespace(t, "failures"), marker: newMarker()}
	f.create(f.ns, strings.Replace(sleeper("sleeps", f.marker), "  process:", "  ports: [{name: http, port: 8080}]\n  process:", 1), "sleeps")
	f.create(f.ns, strings.Replace(sleeper("ticks", ""), `[sleep, ""]`, `[sh, -c, 'i=0; while :; do i=$((i+1)); echo "line $i"; sleep 0.2; done']`, 1), "ticks")

	f.serverKilled(t)
	// While the Lease of the one that was killed runs out.
	f.certificateRotated(t)
	f.frontProxyRotated(t)
	wantMarked(t, f.marker, 1, leasePasses)
	f.waitTarget(f.ns, "ticks")

	f.mainAPIKilled(t)
	f.etcdStopped(t)
	f.drained(t)
}

type failures struct {
	*aggregated
	ns, marker string
}

func (f *failures) uids() string {
	f.t.Helper()
	return f.kubectl("get", "targets", "-n", f.ns, "-o", `jsonpath={range .items[*]}{.metadata.name}={.metadata.uid}{"\n"}{end}`)
}

// readyz is the status and body of the server's own answer.
func (f *failures) readyz() (int, string, error) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: f.ca.pool()}, DisableKeepAlives: true}
	response, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get(f.url + "/readyz")
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// wantUnready waits until the server says that it isn't ready, by that check.
func (f *failures) wantUnready(check string) {
	f.t.Helper()
	f.eventually("the server isn't ready: "+check, 30*time.Second, func() error {
		code, body, err := f.readyz()
		if err == nil && (code == http.StatusOK || !strings.Contains(body, "[-]"+check)) {
			err = fmt.Errorf("it answers %d: %s", code, body)
		}
		return err
	})
}

// wantExec waits until an exec works. It has a connection of its own all the way
// to the server.
func (f *failures) wantExec(target string, within time.Duration) {
	f.t.Helper()
	f.eventually("exec works", within, func() error {
		if r := f.exec("websocket", f.ns, target, "echo", "hello"); r.code != 0 || r.stdout != "hello\n" {
			return fmt.Errorf("exit code %d, %q, %s", r.code, r.stdout, r.stderr)
		}
		return nil
	})
}

// serverKilled kills the server and starts it again. It leaves its Lease to run
// out.
func (f *failures) serverKilled(t *testing.T) {
	before := f.uids()
	f.stop(syscall.SIGKILL, 10*time.Second)
	wantMarked(t, f.marker, 0, 10*time.Second)
	began := time.Now()
	r := f.run(binaries.kubectl, "", "get", "--raw", apiPath+"/namespaces/"+f.ns+"/targets")
	if took := time.Since(began); r.code == 0 || !strings.Contains(r.stderr, "ServiceUnavailable") || took > 30*time.Second {
		t.Errorf("without the server, after %s: exit code %d, %s%s", took, r.code, r.stdout, r.stderr)
	}
	f.start()
	f.waitReady()
	f.waitWorks()
	if after := f.uids(); after != before {
		t.Errorf("the targets before:\n%s\nand after:\n%s", before, after)
	}
}

// certificateRotated gives the server another certificate, of another CA.
func (f *failures) certificateRotated(t *testing.T) {
	old := f.ca
	f.ca = newAuthority(t, "aaserver-e2e-2")
	bundle := base64.StdEncoding.EncodeToString(append(old.pem(), f.ca.pem()...))
	f.kubectl("patch", "apiservice", apiService, alphaService, "--type=merge", "-p", `{"spec":{"caBundle":"`+bundle+`"}}`)
	pair := f.ca.issueServing(t, filepath.Join(t.TempDir(), "serving"))
	for from, to := range map[string]string{pair.CertFile: f.certFile, pair.KeyFile: f.keyFile} {
		content, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.eventually("new connections get the new certificate", noticed, func() error {
		code, body, err := f.readyz() // which trusts the new CA alone
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d: %s", code, body)
		}
		return err
	})
	f.route() // with the new CA alone
	f.waitWorks()
}

// frontProxyRotated replaces the CA by which the server knows kube-aggregator.
func (f *failures) frontProxyRotated(t *testing.T) {
	c := f.cluster
	old := keyPair{CertFile: filepath.Join(t.TempDir(), "old.crt"), KeyFile: filepath.Join(t.TempDir(), "old.key")}
	for from, to := range map[string]string{c.info.FrontProxyClient.CertFile: old.CertFile, c.info.FrontProxyClient.KeyFile: old.KeyFile} {
		content, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// As kube-aggregator asks, for an administrator.
	asks := func(pair keyPair) (int, string, error) {
		certificate, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
		if err != nil {
			return 0, "", err
		}
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.url+apiPath+"/namespaces/"+f.ns+"/targets", nil)
		if err != nil {
			return 0, "", err
		}
		request.Header.Set("X-Remote-User", "somebody")
		request.Header.Set("X-Remote-Group", "system:masters")
		transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: f.ca.pool(), Certificates: []tls.Certificate{certificate}}}
		response, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Do(request)
		if err != nil {
			return 0, "", err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		return response.StatusCode, string(body), err
	}
	wantAnswer := func(what string, pair keyPair, want int, part string) {
		t.Helper()
		f.eventually(what, 30*time.Second, func() error {
			got, body, err := asks(pair)
			if err == nil && (got != want || !strings.Contains(body, part)) {
				err = fmt.Errorf("the status is %d, want %d; the body: %s", got, want, body)
			}
			return err
		})
	}
	wantAnswer("the certificate is accepted", old, http.StatusOK, `"name":"sleeps"`)

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, binaries.controlplane, "rotate-front-proxy", "--dir", c.dir, "--overlap", "2s").CombinedOutput(); err != nil {
		t.Fatalf("rotate-front-proxy: %v\n%s", err, out)
	}
	f.waitWorks()
	wantAnswer("the new certificate is accepted", c.info.FrontProxyClient, http.StatusOK, `"name":"sleeps"`)
	// It is worth as much as none, and so are the headers.
	wantAnswer("the old certificate is refused", old, http.StatusForbidden, "system:anonymous")
	for range 10 {
		f.kubectl("get", "targets", "-n", f.ns)
	}
	select {
	case <-f.ended:
		t.Fatalf("the server has ended: %v", f.err)
	default:
	}
}

var numbered = regexp.MustCompile(`(?m)^line (\d+)$`)

// lastLine is the number of the last line of a followed log, none of which may
// be missing or come twice.
func lastLine(t testing.TB, log *lines) int {
	t.Helper()
	last := 0
	for i, match := range numbered.FindAllStringSubmatch(log.String(), -1) {
		n, err := strconv.Atoi(match[1])
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && n != last+1 {
			t.Fatalf("line %d follows line %d in\n%s", n, last, log)
		}
		last = n
	}
	return last
}

func (f *failures) wantMoreLines(log *lines, within time.Duration) {
	f.t.Helper()
	before := lastLine(f.t, log)
	f.eventually("the followed log goes on", within, func() error {
		if now := lastLine(f.t, log); now < before+10 {
			return fmt.Errorf("the last line was %d, and is %d:\n%s", before, now, tail(log.String(), 1<<10))
		}
		return nil
	})
}

// follow follows the log of ticks until the test ends.
func (f *failures) follow(t *testing.T) *lines {
	log := startLines(t, f.command(t.Context(), binaries.plugin, "logs", "-n", f.ns, "-f", "-l", "app=ticks", "--tail=-1"))
	f.wantMoreLines(log, 30*time.Second)
	return log
}

// mainAPIKilled kills kube-apiserver and starts it again.
func (f *failures) mainAPIKilled(t *testing.T) {
	c := f.cluster
	log := f.follow(t)
	pids := marked(f.marker)
	inExec := newMarker()
	// It is started by a shell, so that its command line is its own.
	session := startLines(t, f.command(t.Context(), binaries.plugin, "exec", "-n", f.ns, "sleeps", "--", "sh", "-c", "sleep "+inExec+" & echo begun; wait"))
	session.wait(t, "begun")
	wantMarked(t, inExec, 1, 10*time.Second)

	c.component(t, "stop", "kube-apiserver", "--kill")
	session.wait(t, "error: ")
	wantMarked(t, inExec, 0, 30*time.Second)
	f.wantUnready("main-api")
	c.component(t, "start", "kube-apiserver")

	f.eventually("the server is ready again", time.Minute, func() error {
		code, body, err := f.readyz()
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d: %s", code, body)
		}
		return err
	})
	f.waitWorks()
	f.wantExec("sleeps", 30*time.Second)
	f.wantMoreLines(log, time.Minute)
	if now := marked(f.marker); !slices.Equal(now, pids) {
		t.Errorf("the target's processes were %q, and are %q", pids, now)
	}
	f.create(f.ns, sleeper("later", "1000"), "later")
	f.kubectl("delete", "target", "later", "-n", f.ns, "--timeout=30s")
}

// etcdStopped stops etcd for 10 s, and has it go on.
func (f *failures) etcdStopped(t *testing.T) {
	etcd := f.cluster.info.Components["etcd"].PID
	log := f.follow(t)
	pids := marked(f.marker)

	goOn := time.After(10 * time.Second)
	if err := syscall.Kill(etcd, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(etcd, syscall.SIGCONT) })
	// One that is asked for meanwhile, by a client with all the time in the world.
	patient := make(chan result, 1)
	go func() {
		patient <- f.run(binaries.kubectl, sleeper("patient", "1000"), "create", "-n", f.ns, "-f", "-")
	}()
	raw := f.cluster.kube.Discovery().RESTClient()
	sleeps := apiPath + "/namespaces/" + f.ns + "/targets/sleeps"
	for what, request := range map[string]*rest.Request{
		"a write": raw.Patch(types.MergePatchType).Body([]byte(`{"metadata":{"labels":{"etcd":"stopped"}}}`)),
		"a read":  raw.Get(),
	} {
		began := time.Now()
		err := request.AbsPath(sleeps).Param("timeout", "2s").Do(t.Context()).Error()
		took := time.Since(began).Round(time.Millisecond)
		t.Logf("without etcd, %s failed after %s: %v", what, took, err)
		// kube-apiserver, whose time is up first, tells that of its own, or of the server that it asked.
		if !apierrors.IsTimeout(err) && !apierrors.IsServerTimeout(err) && !apierrors.IsServiceUnavailable(err) || took > 8*time.Second {
			t.Errorf("without etcd, %s ended after %s: %v", what, took, err)
		}
	}
	f.wantUnready("etcd")
	<-goOn
	if err := syscall.Kill(etcd, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}

	f.waitWorks()
	if r := <-patient; r.code != 0 && !regexp.MustCompile("(?i)timeout|timed out|deadline|unavailable").MatchString(r.stderr) {
		t.Errorf("the patient client: exit code %d, %s", r.code, r.stderr)
	}
	f.kubectl("label", "target", "sleeps", "-n", f.ns, "--overwrite", "etcd=works")
	f.wantExec("sleeps", 30*time.Second)
	f.wantMoreLines(log, time.Minute)
	if now := marked(f.marker); !slices.Equal(now, pids) {
		t.Errorf("the target's processes were %q, and are %q", pids, now)
	}
}

// drained ends the server with 50 sessions of all kinds. In the test's own
// process, since 50 clients' would take minutes to start.
func (f *failures) drained(t *testing.T) {
	config := f.config()
	inExec := newMarker()
	const shuttingDown = "the server is shutting down: connect again"
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	// Each kind opens one session, tells begun once when it is open, and returns
	// what its client gets to know of the end.
	type kind struct {
		count int
		// want is in the error. Where the protocol has no place for a reason,
		// it is what tells the client that this isn't the regular end.
		want string
		open func(begun io.Writer) error
	}
	command := func(executor remotecommand.Executor, err error) func(io.Writer) error {
		return func(begun io.Writer) error {
			if err != nil {
				return err
			}
			return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: begun})
		}
	}
	path := func(target, subresource string, query ...string) string {
		return f.client.url(targetPath(f.ns, target, subresource, query...)).String()
	}
	run := []string{"command=sh", "command=-c", "command=echo+begun%3B+sleep+" + inExec, "stdout=true"}
	webSocket := func(path string, subprotocol string, begins bool) func(io.Writer) error {
		return func(begun io.Writer) error {
			conn, _, err := f.dial(path, nil, subprotocol)
			if err != nil {
				return err
			}
			for {
				if !begins {
					io.WriteString(begun, "begun")
				}
				_, message, err := conn.ReadMessage()
				if err != nil {
					return err
				}
				begun.Write(message)
			}
		}
	}
	kinds := map[string]kind{
		"exec over WebSocket": {10, shuttingDown, command(remotecommand.NewWebSocketExecutor(config, "GET", path("sleeps", "exec", run...)))},
		"exec over SPDY":      {10, shuttingDown, command(remotecommand.NewSPDYExecutor(config, "POST", f.client.url(targetPath(f.ns, "sleeps", "exec", run...))))},
		"attach":              {10, shuttingDown, command(remotecommand.NewWebSocketExecutor(config, "GET", path("ticks", "attach", "stdout=true")))},
		"log over WebSocket":  {5, shuttingDown, webSocket(targetPath(f.ns, "ticks", "log", "follow=true"), "binary.k8s.io", true)},
		"log over HTTP": {5, "stream error", func(begun io.Writer) error { // which HTTP/2 has for an answer that was cut short
			stream, err := f.cluster.kube.Discovery().RESTClient().Get().RequestURI(targetPath(f.ns, "ticks", "log", "follow=true")).Stream(ctx)
			if err != nil {
				return err
			}
			defer stream.Close()
			_, err = io.Copy(begun, stream)
			return err
		}},
		"port-forward by client-go": {5, portforward.ErrLostConnectionToPod.Error(), func(begun io.Writer) error {
			dialer, err := portforward.NewSPDYOverWebsocketDialerForStreaming(f.client.url(targetPath(f.ns, "sleeps", "portforward")), config)
			if err != nil {
				return err
			}
			forwarder, err := portforward.NewForStreaming(dialer, []string{"0:8080"}, ctx.Done(), make(chan struct{}), begun, io.Discard)
			if err != nil {
				return err
			}
			return forwarder.ForwardPorts()
		}},
		"port-forward, its tunnel": {5, shuttingDown, webSocket(targetPath(f.ns, "sleeps", "portforward"), "SPDY/3.1+portforward.k8s.io", false)},
	}
	type end struct {
		kind string
		err  error
	}
	var begun []*firstWrite
	ends := make(chan end)
	total := 0
	for name, k := range kinds {
		for range k.count {
			first := &firstWrite{done: make(chan struct{})}
			begun = append(begun, first)
			total++
			go func() {
				err := k.open(first)
				select {
				case ends <- end{name, err}:
				case <-ctx.Done():
				}
			}()
		}
	}
	if total != 50 {
		t.Fatalf("there are %d sessions", total)
	}
	for _, first := range begun {
		select {
		case <-first.done:
		case e := <-ends:
			t.Fatalf("%s ended before the server: %v", e.kind, e.err)
		case <-ctx.Done():
			t.Fatal("not all sessions could be opened")
		}
	}
	wantMarked(t, inExec, 20, 10*time.Second)

	began := time.Now()
	f.stop(syscall.SIGTERM, drainTimeout+drainMargin)
	t.Logf("with 50 sessions, the server ended within %s", time.Since(began).Round(time.Millisecond))
	if f.err != nil {
		t.Errorf("it ended with %v", f.err)
	}
	for range total {
		select {
		case e := <-ends:
			if want := kinds[e.kind].want; e.err == nil || !strings.Contains(e.err.Error(), want) {
				t.Errorf("%s ended with %v, want %q in it", e.kind, e.err, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("the server is gone, and a client waits on")
		}
	}
	wantMarked(t, inExec, 0, 10*time.Second)
	wantMarked(t, f.marker, 0, 10*time.Second)
}

// firstWrite tells of the first write.
type firstWrite struct {
	written bool
	done    chan struct{}
}

func (w *firstWrite) Write(p []byte) (int, error) {
	if !w.written && len(p) > 0 {
		w.written = true
		close(w.done)
	}
	return len(p), nil
}

// TestReplicas kills and ends the holders of an agent's Lease. Each run of the
// target holds a lock, so that a second one beside it would be seen however
// short it were.
func TestReplicas(t *testing.T) {
	t.Parallel()
	c := startCluster(t, "--no-controller-manager")
	a := c.serve(t, serveOptions{})
	b := a.replica()
	dir, marker := t.TempDir(), newMarker()
	runs := filepath.Join(dir, "runs")
	script := fmt.Sprintf("exec 9>%s; if flock -n 9; then echo once; else echo twice; fi >>%s; exec sleep %s", filepath.Join(dir, "lock"), runs, marker)
	quoted, err := json.Marshal(script)
	if err != nil {
		t.Fatal(err)
	}
	a.create("default", strings.Replace(sleeper("alone", ""), `[sleep, ""]`, "[sh, -c, "+string(quoted)+"]", 1), "alone")
	wantRuns := func(want int, within time.Duration) {
		t.Helper()
		eventually(t, fmt.Sprintf("it runs for time %d", want), within, func() error {
			text, err := os.ReadFile(runs)
			if err == nil && string(text) != strings.Repeat("once\n", want) {
				err = fmt.Errorf("the runs: %q", text)
			}
			return err
		})
		wantMarked(t, marker, 1, 10*time.Second)
	}
	wantRuns(1, 10*time.Second)

	const holds = "This server holds the agent's Lease"
	holder, other := a, b
	if strings.Contains(b.output(), holds) {
		holder, other = b, a
	}
	if strings.Contains(other.output(), holds) {
		t.Fatal("both servers hold the Lease")
	}
	// The other one has the targets, and not their processes.
	other.route()
	other.waitWorks()
	other.eventually("the replica without the agent says so", 30*time.Second, func() error {
		r := other.exec("websocket", "default", "alone", "true")
		if r.code == 0 || !strings.Contains(r.stderr, `agent "local" doesn't run here at the moment`) {
			return fmt.Errorf("exit code %d, %s", r.code, r.stderr)
		}
		return nil
	})

	began := time.Now()
	holder.stop(syscall.SIGKILL, 10*time.Second)
	wantMarked(t, marker, 0, 10*time.Second)
	wantRuns(2, leasePasses)
	t.Logf("the Lease of a holder that was killed passed on after %s", time.Since(began).Round(time.Second))
	if took := time.Since(began); took < 25*time.Second {
		t.Errorf("the Lease passed on after %s, before its holder was surely dead", took)
	}
	other.wantExec(t, "alone")

	holder.start()
	holder.waitReady()
	holder.route()
	began = time.Now()
	other.stop(syscall.SIGTERM, drainTimeout+drainMargin)
	wantRuns(3, 20*time.Second)
	t.Logf("the Lease of a holder that ended passed on after %s", time.Since(began).Round(time.Millisecond))
	if other.err != nil {
		t.Errorf("it ended with %v", other.err)
	}
	holder.wantExec(t, "alone")
}

func (a *aggregated) wantExec(t *testing.T, target string) {
	t.Helper()
	a.waitTarget("default", target)
	eventually(t, "exec works", 30*time.Second, func() error {
		if r := a.exec("websocket", "default", target, "echo", "hello"); r.code != 0 || r.stdout != "hello\n" {
			return fmt.Errorf("exit code %d, %q, %s", r.code, r.stdout, r.stderr)
		}
		return nil
	})
}

// TestServeRefuses says in one line what is wrong, and what to do.
func TestServeRefuses(t *testing.T) {
	t.Parallel()
	c := sharedCluster(t)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	admin := c.info.AdminKubeconfig
	text, err := os.ReadFile(admin)
	if err != nil {
		t.Fatal(err)
	}
	closed := fmt.Sprintf("https://127.0.0.1:%d", reservePort(t))
	missing := filepath.Join(dir, "missing")
	etcd := []string{
		"--etcd-servers", c.info.EtcdURL, "--etcd-cafile", c.info.EtcdCAFile,
		"--etcd-certfile", c.info.EtcdClient.CertFile, "--etcd-keyfile", c.info.EtcdClient.KeyFile,
	}
	one := newAuthority(t, "one").issueServing(t, filepath.Join(dir, "one"))
	two := newAuthority(t, "two").issueServing(t, filepath.Join(dir, "two"))
	port := strconv.Itoa(reservePort(t))
	taken := c.info.APIServerURL[strings.LastIndex(c.info.APIServerURL, ":")+1:]

	for what, tt := range map[string]struct {
		args []string
		want []string // all in the last line
	}{
		"no right to read the authentication configmap": {
			append(etcd, "--kubeconfig", c.user(t, "nobody").kubeconfig),
			[]string{"may not read the ConfigMap kube-system/extension-apiserver-authentication", "bind it to the Role extension-apiserver-authentication-reader"}},
		"no main API": {
			append(etcd, "--kubeconfig", file("closed", strings.ReplaceAll(string(text), c.info.APIServerURL, closed))),
			[]string{"the main API server at " + closed + " can't be used, check --kubeconfig", "connection refused"}},
		"a main API of another CA": {
			append(etcd, "--kubeconfig", file("other-ca", regexp.MustCompile(`certificate-authority(-data)?: .*`).ReplaceAllString(string(text), "certificate-authority: "+one.CertFile))),
			[]string{"the main API server at " + c.info.APIServerURL + " can't be used, check --kubeconfig", "certificate signed by unknown authority"}},
		"no kubeconfig outside a cluster": {etcd, []string{"--kubeconfig is needed outside a cluster"}},
		"a kubeconfig that isn't there":   {append(etcd, "--kubeconfig", missing), []string{"--kubeconfig " + missing, "no such file"}},
		"a kubeconfig that is none":       {append(etcd, "--kubeconfig", file("garbage", "{{ garbage")), []string{"--kubeconfig ", "garbage", "yaml"}},
		"an empty kubeconfig":             {append(etcd, "--kubeconfig", file("empty", "")), []string{"--kubeconfig ", "it names no server"}},
		"a key of another certificate": {
			append(etcd, "--kubeconfig", admin, "--tls-cert-file", one.CertFile, "--tls-private-key-file", two.KeyFile),
			[]string{"--tls-cert-file " + one.CertFile, "--tls-private-key-file " + two.KeyFile, "can't be used together", "does not match"}},
		"a certificate that isn't there": {
			append(etcd, "--kubeconfig", admin, "--tls-cert-file", missing, "--tls-private-key-file", two.KeyFile),
			[]string{"--tls-cert-file", missing, "no such file"}},
		"a key that isn't there": {
			append(etcd, "--kubeconfig", admin, "--tls-cert-file", one.CertFile, "--tls-private-key-file", missing),
			[]string{"--tls-private-key-file", missing, "no such file"}},
		"a certificate without its key": {
			append(etcd, "--kubeconfig", admin, "--tls-cert-file", one.CertFile),
			[]string{"--tls-cert-file and --tls-private-key-file need each other"}},
		"a port in use": {
			append(etcd, "--kubeconfig", admin, "--secure-port", taken),
			[]string{"port " + taken + " of 127.0.0.1 is in use", "--secure-port"}},
		"no port": {
			append(etcd, "--kubeconfig", admin, "--secure-port", "0"),
			[]string{"--secure-port 0"}},
		"no storage": {
			[]string{"--kubeconfig", admin},
			[]string{"--etcd-servers or --storage-endpoint is needed"}},
		"an etcd that refuses": {
			[]string{"--kubeconfig", admin, "--etcd-servers", closed},
			[]string{"etcd at " + closed + " can't be used, check --etcd-servers", "connection refused"}},
		"an etcd of another CA": {
			append(etcd, "--kubeconfig", admin, "--etcd-cafile", one.CertFile),
			[]string{"etcd at " + c.info.EtcdURL + " can't be used", "--etcd-cafile", "certificate signed by unknown authority"}},
		"an etcd that wants a certificate": {
			[]string{"--kubeconfig", admin, "--etcd-servers", c.info.EtcdURL, "--etcd-cafile", c.info.EtcdCAFile},
			[]string{"etcd at " + c.info.EtcdURL + " can't be used", "--etcd-certfile", "certificate required"}},
		"a CA of etcd that isn't there": {
			append(etcd, "--kubeconfig", admin, "--etcd-cafile", missing),
			[]string{"--etcd-cafile", missing, "no such file"}},
		"an agent without a data directory": {
			append(etcd, "--kubeconfig", admin, "--embedded-agent", "local"),
			[]string{"--embedded-agent needs --data-dir"}},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, binaries.server, append([]string{"serve", "--bind-address", "127.0.0.1", "--secure-port", port}, tt.args...)...)
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
			cmd.Dir = dir
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Run(); err == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Fatalf("it ended with %v after %v", err, ctx.Err())
			}
			all := strings.Split(strings.TrimSpace(stderr.String()), "\n")
			last := all[len(all)-1]
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.HasPrefix(last, "error: ") {
				t.Errorf("exit code %d, want 1 and an error in the last line of\n%s", code, stderr.String())
			}
			wantContains(t, "the last line", last, tt.want...)
		})
	}
}
