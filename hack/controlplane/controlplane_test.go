package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	binDir = "../../bin/controlplane"
	// asLauncher makes the test's program the launcher's.
	asLauncher = "CONTROLPLANE_TEST_AS_LAUNCHER"
)

// starts runs functions on a thread that lives as long as the test: what they
// start can end with it.
var starts = make(chan func())

func TestMain(m *testing.M) {
	if os.Getenv(asLauncher) != "" {
		main()
		return
	}
	go func() {
		runtime.LockOSThread()
		for f := range starts {
			f()
		}
	}()
	os.Exit(m.Run())
}

// launcher is a running `controlplane up`.
type launcher struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string
	lines chan string   // of stdout, until it is closed
	ended chan struct{} // after which cmd.ProcessState and stderr may be read

	stderr bytes.Buffer
}

func newLauncherCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asLauncher+"=1")
	return cmd
}

func startLauncher(t *testing.T, dir string, args ...string) *launcher {
	t.Helper()
	for _, name := range []string{etcdName, apiserverName, controllerManagerName, "kubectl"} {
		if _, err := os.Stat(filepath.Join(binDir, name)); err != nil {
			t.Fatalf("%v: build the components with hack/controlplane/build.sh", err)
		}
	}
	l := &launcher{t: t, dir: dir, lines: make(chan string, 100), ended: make(chan struct{})}
	l.cmd = newLauncherCommand(append([]string{"up", "--dir", dir, "--bin-dir", binDir}, args...)...)
	l.cmd.Stderr = &l.stderr
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error)
	starts <- func() { started <- l.cmd.Start() }
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(l.ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			l.lines <- lines.Text()
		}
		close(l.lines)
		l.cmd.Wait()
	}()
	t.Cleanup(func() { l.stop(syscall.SIGTERM) })
	return l
}

// waitReady returns what controlplane.json says when everything is ready.
func (l *launcher) waitReady() *Info {
	l.t.Helper()
	for line := range l.lines {
		if strings.HasPrefix(line, "Ready at ") {
			info, err := readInfo(l.dir)
			if err != nil {
				l.t.Fatal(err)
			}
			return info
		}
	}
	<-l.ended
	l.t.Fatalf("the launcher ended before it was ready (%s): %s", l.cmd.ProcessState, &l.stderr)
	return nil
}

// stop sends a signal, and returns what was printed since and how it ended.
func (l *launcher) stop(signal syscall.Signal) (output []string, state *os.ProcessState) {
	l.cmd.Process.Signal(signal)
	return l.wait()
}

func (l *launcher) wait() (output []string, state *os.ProcessState) {
	l.t.Helper()
	timeout := time.AfterFunc(time.Minute, func() {
		l.t.Errorf("the launcher runs on after a minute")
		l.cmd.Process.Kill()
	})
	defer timeout.Stop()
	for line := range l.lines {
		output = append(output, line)
	}
	<-l.ended
	return output, l.cmd.ProcessState
}

// command runs another of the launcher's commands.
func command(t *testing.T, args ...string) string {
	t.Helper()
	output, err := newLauncherCommand(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("controlplane %s: %v: %s", strings.Join(args, " "), err, output)
	}
	return string(output)
}

func tryKubectl(kubeconfig, stdin string, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(binDir, "kubectl"), append([]string{"--kubeconfig", kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	output, err := cmd.CombinedOutput()
	return string(output), err
}

func kubectl(t *testing.T, info *Info, args ...string) string {
	t.Helper()
	return kubectlStdin(t, info, "", args...)
}

func kubectlStdin(t *testing.T, info *Info, stdin string, args ...string) string {
	t.Helper()
	output, err := tryKubectl(info.AdminKubeconfig, stdin, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, output)
	}
	return output
}

func wantContains(t *testing.T, what, got string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(got, want) {
			t.Errorf("%s: want %q in %q", what, want, got)
		}
	}
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// wantNothingLeft waits until no process names the directory any more, as each
// component does in its arguments.
func wantNothingLeft(t *testing.T, dir string) {
	t.Helper()
	eventually(t, "what is left of "+dir, func() error {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return err
		}
		for _, file := range files {
			if arguments, _ := os.ReadFile(file); bytes.Contains(arguments, []byte(dir)) {
				return fmt.Errorf("%s: %q", file, arguments)
			}
		}
		return nil
	})
}

func readyz(info *Info) error {
	admin, err := newProbe(info.ClusterCA.CertFile, info.Admin)
	if err != nil {
		return err
	}
	return admin.get(context.Background(), info.APIServerURL+"/readyz")
}

// TestControlPlane goes through a control plane's life, whose stages need each
// other.
func TestControlPlane(t *testing.T) {
	// Longer than a unix socket's address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	first := startLauncher(t, dir)
	info := first.waitReady()

	t.Run("it is ready", func(t *testing.T) {
		if err := readyz(info); err != nil {
			t.Error(err)
		}
		wantContains(t, "version", kubectl(t, info, "version"), "Server Version: v1.37.")
		wantContains(t, "nodes", kubectl(t, info, "get", "nodes"), "No resources found")
		if len(info.Components) != 3 {
			t.Errorf("components: %v", info.Components)
		}
		for name, component := range info.Components {
			if err := syscall.Kill(component.PID, 0); err != nil {
				t.Errorf("%s, pid %d: %v", name, component.PID, err)
			}
			if stat, err := os.Stat(component.Log); err != nil || stat.Size() == 0 {
				t.Errorf("%s has no log: %v", name, err)
			}
		}
	})
	t.Run("it listens on loopback only", func(t *testing.T) {
		var pids []int
		for _, component := range info.Components {
			pids = append(pids, component.PID)
		}
		addresses := listeners(t, pids)
		if len(addresses) < 3 {
			t.Errorf("found the listeners %v only", addresses)
		}
		for _, address := range addresses {
			if !strings.HasPrefix(address, "0100007F:") {
				t.Errorf("a listener on %s", address)
			}
		}
	})
	t.Run("an ordinary user may do nothing", func(t *testing.T) {
		output, err := tryKubectl(info.UserKubeconfig, "", "get", "configmaps")
		if err == nil {
			t.Errorf("may list: %s", output)
		}
		wantContains(t, "refusal", output, "Forbidden", `User "user"`)
	})
	t.Run("etcd wants a certificate of its own CA", func(t *testing.T) {
		for name, tt := range map[string]struct {
			client KeyPair
			wantOK bool
		}{
			"etcd's client":             {info.EtcdClient, true},
			"the cluster administrator": {info.Admin, false},
		} {
			p, err := newProbe(info.EtcdCAFile, tt.client)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.get(t.Context(), info.EtcdURL+"/health"); (err == nil) != tt.wantOK {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("a second launcher is refused", func(t *testing.T) {
		second := startLauncher(t, dir)
		if _, state := second.wait(); state.ExitCode() != 1 {
			t.Errorf("it ended with %s", state)
		}
		wantContains(t, "error", second.stderr.String(), "runs already")
	})
	t.Run("the aggregator works, through a rotation of the front-proxy CA", func(t *testing.T) {
		testAggregation(t, info)
	})

	kubectl(t, info, "create", "configmap", "kept", "--from-literal=a=b")
	t.Run("kube-apiserver stopped, started, killed and restarted", func(t *testing.T) {
		command(t, "stop", "--dir", dir, "--kill", apiserverName)
		if err := readyz(info); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("while it is stopped: %v", err)
		}
		stopped, err := readInfo(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := stopped.Components[apiserverName]; ok || len(stopped.Components) != 2 {
			t.Errorf("while it is stopped, these run: %v", stopped.Components)
		}
		command(t, "start", "--dir", dir, apiserverName)
		kubectl(t, info, "get", "configmap", "kept")
		started, err := readInfo(dir)
		if err != nil {
			t.Fatal(err)
		}
		command(t, "restart", "--dir", dir, "--kill", apiserverName)
		kubectl(t, info, "get", "configmap", "kept")
		restarted, err := readInfo(dir)
		if err != nil {
			t.Fatal(err)
		}
		pids := []int{info.Components[apiserverName].PID, started.Components[apiserverName].PID, restarted.Components[apiserverName].PID}
		slices.Sort(pids)
		if len(slices.Compact(pids)) != 3 || pids[0] == 0 {
			t.Errorf("pids %v", pids)
		}
	})
	t.Run("an unknown component", func(t *testing.T) {
		output, err := newLauncherCommand("restart", "--dir", dir, "scheduler").CombinedOutput()
		if err == nil {
			t.Error("was restarted")
		}
		wantContains(t, "error", string(output), `no component "scheduler"`, apiserverName)
	})
	t.Run("SIGTERM ends everything, what is stopped by a signal too", func(t *testing.T) {
		for _, name := range []string{etcdName, controllerManagerName} {
			if err := syscall.Kill(info.Components[name].PID, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		}
		begin := time.Now()
		output, state := first.stop(syscall.SIGTERM)
		if state.ExitCode() != 0 || !slices.Contains(output, "Stopped.") {
			t.Errorf("%s after %q: %s", state, output, &first.stderr)
		}
		t.Logf("it took %s", time.Since(begin))
		wantNothingLeft(t, dir)
		if _, err := readInfo(dir); err == nil {
			t.Error("controlplane.json is still there")
		}
		output2, err := newLauncherCommand("restart", "--dir", dir, apiserverName).CombinedOutput()
		if err == nil {
			t.Error("something was restarted")
		}
		wantContains(t, "error", string(output2), "no control plane runs in")
	})
	t.Run("the same directory is the same cluster, and kill -9 leaves nothing", func(t *testing.T) {
		second := startLauncher(t, dir, "--no-controller-manager", "--apiserver-arg=--request-timeout=7s")
		info := second.waitReady()
		wantContains(t, "configmap", kubectl(t, info, "get", "configmap", "kept", "-o", "jsonpath={.data}"), `{"a":"b"}`)
		if len(info.Components) != 2 {
			t.Errorf("components: %v", info.Components)
		}
		arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", info.Components[apiserverName].PID))
		if err != nil {
			t.Fatal(err)
		}
		wantContains(t, "arguments", string(arguments), "--request-timeout=7s")
		second.stop(syscall.SIGKILL)
		wantNothingLeft(t, dir)
	})
	t.Run("an interrupt while it starts ends everything", func(t *testing.T) {
		starting := startLauncher(t, dir)
		if line := <-starting.lines; !strings.HasPrefix(line, "etcd ") {
			t.Errorf("the first line is %q", line)
		}
		output, state := starting.stop(syscall.SIGINT)
		if state.ExitCode() != 0 || !slices.Contains(output, "Stopped.") {
			t.Errorf("%s after %q: %s", state, output, &starting.stderr)
		}
		wantNothingLeft(t, dir)
	})
	t.Run("a component that ends by itself ends everything", func(t *testing.T) {
		// After kill -9.
		third := startLauncher(t, dir, "--no-controller-manager")
		info := third.waitReady()
		syscall.Kill(info.Components[etcdName].PID, syscall.SIGKILL)
		if _, state := third.wait(); state.ExitCode() != 1 {
			t.Errorf("it ended with %s", state)
		}
		wantContains(t, "error", strings.SplitN(third.stderr.String(), "\n", 2)[0], "controlplane: etcd ended early (signal: killed): see ", "etcd.log")
		wantNothingLeft(t, dir)
	})
	t.Run("a component that refuses its flags says why", func(t *testing.T) {
		fourth := startLauncher(t, dir, "--apiserver-arg=--no-such-flag")
		if _, state := fourth.wait(); state.ExitCode() != 1 {
			t.Errorf("it ended with %s", state)
		}
		wantContains(t, "error", fourth.stderr.String(), "kube-apiserver ended early (exit status 1)", "unknown flag: --no-such-flag")
		wantNothingLeft(t, dir)
	})
}

// listeners returns the local addresses that the processes listen on, over TCP,
// as in /proc/net/tcp.
func listeners(t *testing.T, pids []int) []string {
	t.Helper()
	sockets := map[string]bool{}
	for _, pid := range pids {
		links, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, "socket:") {
				sockets[strings.Trim(target, "socket:[]")] = true
			}
		}
	}
	var found []string
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		content, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		} else if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			const listen = "0A"
			if fields := strings.Fields(line); len(fields) > 9 && fields[3] == listen && sockets[fields[9]] {
				found = append(found, fields[1])
			}
		}
	}
	return found
}

// aggregated is an aggregated server that says whom it was told of.
type aggregated struct {
	*httptest.Server
	mu sync.Mutex
	// trusted verifies the aggregator.
	trusted *x509.CertPool
}

type whoami struct {
	User, UID string
	Groups    []string
	Trusted   bool // by a certificate of the front-proxy CA
}

func startAggregated(t *testing.T) *aggregated {
	a := &aggregated{trusted: x509.NewCertPool()}
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/apis/example.com/v1/whoami" {
			fmt.Fprint(w, `{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "example.com/v1", "resources": []}`)
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		answer := whoami{User: r.Header.Get("X-Remote-User"), UID: r.Header.Get("X-Remote-Uid"), Groups: r.Header.Values("X-Remote-Group")}
		if certs := r.TLS.PeerCertificates; len(certs) > 0 {
			_, err := certs[0].Verify(x509.VerifyOptions{Roots: a.trusted, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			answer.Trusted = err == nil
		}
		json.NewEncoder(w).Encode(answer)
	}))
	a.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

// trust makes it trust the certificates in the file alone, and returns their
// count.
func (a *aggregated) trust(t *testing.T, file string) int {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(content) {
		t.Fatalf("%s has no certificate", file)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.trusted = pool
	return bytes.Count(content, []byte("BEGIN CERTIFICATE"))
}

func testAggregation(t *testing.T, info *Info) {
	a := startAggregated(t)
	a.trust(t, info.FrontProxyCA.CertFile)
	kubectlStdin(t, info, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: aggregated, namespace: default}
spec: {type: ExternalName, externalName: localhost}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.example.com}
spec:
  group: example.com
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 10
  insecureSkipTLSVerify: true
  service: {name: aggregated, namespace: default, port: %d}
`, a.Listener.Addr().(*net.TCPAddr).Port), "apply", "-f", "-")
	kubectl(t, info, "wait", "apiservice/v1.example.com", "--for=condition=Available", "--timeout=30s")
	defer kubectl(t, info, "delete", "apiservice/v1.example.com", "service/aggregated")

	ask := func() (answer whoami, err error) {
		output, err := tryKubectl(info.AdminKubeconfig, "", "get", "--raw", "/apis/example.com/v1/whoami")
		if err != nil {
			return whoami{}, fmt.Errorf("%w: %s", err, output)
		}
		return answer, json.Unmarshal([]byte(output), &answer)
	}
	answer, err := ask()
	if err != nil {
		t.Fatal(err)
	}
	if answer.User != "admin" || !slices.Contains(answer.Groups, "system:masters") || !answer.Trusted {
		t.Errorf("the administrator is %+v", answer)
	}

	// A service account: its token, issued and verified, and its UID.
	kubectl(t, info, "create", "clusterrolebinding", "all", "--clusterrole=cluster-admin", "--serviceaccount=default:default")
	request, err := http.NewRequest(http.MethodGet, info.APIServerURL+"/apis/example.com/v1/whoami", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(kubectl(t, info, "create", "token", "default")))
	ca, err := os.ReadFile(info.ClusterCA.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	wantUID := kubectl(t, info, "get", "serviceaccount", "default", "-o", "jsonpath={.metadata.uid}")
	// The binding reaches the authorizer by a watch.
	eventually(t, "a service account's request", func() error {
		resp, err := client.Do(request)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		answer = whoami{}
		if err := json.Unmarshal(body, &answer); err != nil || answer.User != "system:serviceaccount:default:default" || answer.UID != wantUID {
			return fmt.Errorf("want the UID %s, got %s: %s", wantUID, resp.Status, body)
		}
		return nil
	})

	for _, overlap := range []string{"1s", "0"} {
		old, err := os.ReadFile(info.FrontProxyCA.CertFile)
		if err != nil {
			t.Fatal(err)
		}
		wantContains(t, "rotation", command(t, "rotate-front-proxy", "--dir", info.Dir, "--overlap", overlap), "trusted no more")
		if count := a.trust(t, info.FrontProxyCA.CertFile); count != 1 {
			t.Errorf("overlap %s: the bundle has %d certificates in the end", overlap, count)
		}
		// kube-apiserver reloads its files by itself.
		eventually(t, "the aggregator's new certificate, overlap "+overlap, func() error {
			answer, err := ask()
			if err == nil && !answer.Trusted {
				err = errors.New("it still has the old one")
			}
			return err
		})
		published := kubectl(t, info, "get", "configmap", "-n", "kube-system", "extension-apiserver-authentication", "-o", "jsonpath={.data.requestheader-client-ca-file}")
		if strings.Contains(published, string(old)) || strings.Count(published, "BEGIN CERTIFICATE") != 1 {
			t.Errorf("overlap %s: the old CA is still published: %s", overlap, published)
		}
	}
}

func TestUpRefuses(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	taken := listener.Addr().(*net.TCPAddr).Port
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"no directory":                 {[]string{"up"}, `required flag(s) "dir" not set`},
		"a directory that is a file":   {[]string{"up", "--dir", file}, "not a directory"},
		"no port":                      {[]string{"up", "--dir", t.TempDir(), "--etcd-port=70000"}, "--etcd-port=70000 isn't a port"},
		"a port that another has":      {[]string{"up", "--dir", t.TempDir(), "--bin-dir", binDir, fmt.Sprint("--apiserver-port=", taken)}, "address already in use"},
		"programs that aren't there":   {[]string{"up", "--dir", t.TempDir(), "--bin-dir", t.TempDir()}, "build it with hack/controlplane/build.sh"},
		"arguments":                    {[]string{"up", "--dir", t.TempDir(), "now"}, `unknown command "now"`},
		"a rotation of nothing":        {[]string{"rotate-front-proxy", "--dir", t.TempDir()}, "no control plane is ready in"},
		"a rotation back in time":      {[]string{"rotate-front-proxy", "--dir", t.TempDir(), "--overlap=-1s"}, "--overlap=-1s is negative"},
		"a component of nothing":       {[]string{"stop", "--dir", t.TempDir(), "etcd"}, "no control plane runs in"},
		"a directory that isn't there": {[]string{"start", "--dir", "/nonexistent", "etcd"}, "no control plane runs in"},
	} {
		t.Run(name, func(t *testing.T) {
			output, err := newLauncherCommand(tt.args...).CombinedOutput()
			if err == nil {
				t.Errorf("was done: %s", output)
			}
			wantContains(t, "error", string(output), tt.want)
			if strings.Count(string(output), "\n") != 1 {
				t.Errorf("more than one line: %s", output)
			}
		})
	}
}

func TestReserve(t *testing.T) {
	fd, port, err := reserve(0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	address := fmt.Sprintf("127.0.0.1:%d", port)
	for range 2 { // a component and its successor
		config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			controlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
			return errors.Join(err, controlErr)
		}}
		listener, err := config.Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := reserve(port); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("another launcher got the port that a component listens on: %v", err)
		}
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Errorf("the component can't be reached: %v", err)
		} else {
			conn.Close()
		}
		listener.Close()
	}
}

func TestReadAuthority(t *testing.T) {
	files := pki(t.TempDir()).frontProxy()
	_, oldPEM, oldKey, err := newAuthority("CA")
	if err != nil {
		t.Fatal(err)
	}
	_, newPEM, newKey, err := newAuthority("CA")
	if err != nil {
		t.Fatal(err)
	}
	both := append(bytes.Clone(newPEM), oldPEM...)
	for name, tt := range map[string]struct {
		certs, key []byte
		want       []byte
		wantErr    string
	}{
		"alone":                          {certs: oldPEM, key: oldKey, want: oldPEM},
		"in a bundle, the old one signs": {certs: both, key: oldKey, want: oldPEM},
		"in a bundle, the new one signs": {certs: both, key: newKey, want: newPEM},
		"another's key":                  {certs: newPEM, key: oldKey, wantErr: "no certificate of the key"},
		"no key":                         {certs: newPEM, key: []byte("no"), wantErr: "no key in PEM"},
		"no certificate":                 {certs: nil, key: oldKey, wantErr: "no certificate of the key"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := writePair(files, tt.certs, tt.key); err != nil {
				t.Fatal(err)
			}
			a, err := readAuthority(files)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("want an error with %q, got %v", tt.wantErr, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := encodeCert(a.cert); !bytes.Equal(got, tt.want) {
				t.Errorf("another certificate: %s", got)
			}
			certPEM, _, err := a.sign(frontProxyClient)
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(certPEM)
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if err := cert.CheckSignatureFrom(a.cert); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTail(t *testing.T) {
	for name, tt := range map[string]struct{ content, want string }{
		"nothing":    {"", ""},
		"few lines":  {"a\nb\n", "a\nb"},
		"many lines": {strings.Repeat("x\n", 10000) + "a\nb\nc\n", "a\nb\nc"},
		"long lines": {strings.Repeat("x", 1<<20), strings.Repeat("x", 8<<10)},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(file, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := tail(file, 3); got != tt.want {
				t.Errorf("got %d bytes: %.100q", len(got), got)
			}
		})
	}
}
