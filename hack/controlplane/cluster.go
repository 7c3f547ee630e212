package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	etcdName              = "etcd"
	apiserverName         = "kube-apiserver"
	controllerManagerName = "kube-controller-manager"

	serviceAccountIssuer = "https://kubernetes.default.svc.cluster.local"
)

// upOptions is what up is told; its zero value but Dir is complete.
type upOptions struct {
	Dir                   string
	BinDir                string // where the launcher lies, if empty
	APIServerPort         int    // 0: a free one
	EtcdPort              int    // 0: a free one
	APIServerArgs         []string
	ControllerManagerArgs []string
	NoControllerManager   bool
}

// Info is controlplane.json, which lies in the directory from when everything is
// ready until up ends. Stopping and starting a component rewrites it. One that
// was left by kill -9 is gone when the next up has begun.
type Info struct {
	PID int    `json:"pid"` // the launcher's
	Dir string `json:"dir"`
	// Components are those that run, by name.
	Components map[string]ComponentInfo `json:"components"`

	APIServerURL    string `json:"apiserverURL"`
	AdminKubeconfig string `json:"adminKubeconfig"`
	UserKubeconfig  string `json:"userKubeconfig"`
	// Admin and User are the certificates in the kubeconfigs.
	Admin KeyPair `json:"admin"`
	User  KeyPair `json:"user"`
	// ClusterCA signs kube-apiserver's serving certificate and those of clients.
	ClusterCA KeyPair `json:"clusterCA"`
	// FrontProxyCA's certificate file is a bundle while one CA replaces another.
	FrontProxyCA     KeyPair `json:"frontProxyCA"`
	FrontProxyClient KeyPair `json:"frontProxyClient"`

	ServiceAccountIssuer        string `json:"serviceAccountIssuer"`
	ServiceAccountKeyFile       string `json:"serviceAccountKeyFile"`
	ServiceAccountPublicKeyFile string `json:"serviceAccountPublicKeyFile"`

	EtcdURL string `json:"etcdURL"`
	// EtcdCAFile and EtcdClient are what a client of etcd needs.
	EtcdCAFile string  `json:"etcdCAFile"`
	EtcdClient KeyPair `json:"etcdClient"`
}

// ComponentInfo is one running program.
type ComponentInfo struct {
	PID int    `json:"pid"`
	Log string `json:"log"`
}

func infoFile(dir string) string { return filepath.Join(dir, "controlplane.json") }

func readInfo(dir string) (*Info, error) {
	content, err := os.ReadFile(infoFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no control plane is ready in %s: start one with controlplane up --dir %s", dir, dir)
	} else if err != nil {
		return nil, err
	}
	var info Info
	if err := json.Unmarshal(content, &info); err != nil {
		return nil, fmt.Errorf("%s: %w", infoFile(dir), err)
	}
	return &info, nil
}

// cluster is a running control plane. All of it is the goroutine's that runs up.
type cluster struct {
	info       Info
	components []*component // in the order of their start
	// fail ends up with the error.
	fail context.CancelCauseFunc
}

// up runs a control plane until ctx ends or a component does.
func up(ctx context.Context, o upOptions, out io.Writer) error {
	begin := time.Now()
	// The components end with this thread.
	runtime.LockOSThread()

	if o.BinDir == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		o.BinDir = filepath.Dir(self)
	}
	binDir, err := filepath.Abs(o.BinDir)
	if err != nil {
		return err
	}
	o.BinDir = binDir
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return fmt.Errorf("%s belongs to a control plane that runs already: stop that one, or choose another --dir (%w)", dir, err)
	}
	defer unlock()
	if err := os.Remove(infoFile(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	certs := pki(filepath.Join(dir, "pki"))
	if err := certs.ensure(); err != nil {
		return fmt.Errorf("certificates: %w", err)
	}

	c, release, err := newCluster(o, dir, certs)
	if err != nil {
		return err
	}
	defer release()
	if err := c.writeKubeconfigs(certs); err != nil {
		return err
	}

	ctx, c.fail = context.WithCancelCause(ctx)
	defer c.fail(nil)
	requests, closeControl, err := serveControl(ctx, dir)
	if err != nil {
		return err
	}
	defer closeControl()
	defer c.stop()

	for _, component := range c.components {
		// The log of a run is its own.
		if err := os.Remove(component.log); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := component.start(c.fail); err != nil {
			return err
		}
		if err := component.waitReady(ctx); err != nil {
			return err
		}
		fmt.Fprintf(out, "%-24s ready after %4.1fs, pid %d, log %s\n", component.name, time.Since(begin).Seconds(), component.process.Pid, component.log)
	}
	if err := c.writeInfo(); err != nil {
		return err
	}
	fmt.Fprintf(out, "Ready at %s; all about it is in %s\n\n  export KUBECONFIG=%s\n  %s get namespaces\n\nInterrupt it to stop everything.\n",
		c.info.APIServerURL, infoFile(dir), c.info.AdminKubeconfig, filepath.Join(o.BinDir, "kubectl"))

	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case r := <-requests:
			r.reply <- c.handle(ctx, r)
		}
	}
}

// newCluster decides about addresses and flags. The ports belong to the control
// plane until release is called.
func newCluster(o upOptions, dir string, certs pki) (*cluster, func(), error) {
	var held []int
	release := func() {
		for _, fd := range held {
			unix.Close(fd)
		}
	}
	names := []string{etcdName, apiserverName}
	if !o.NoControllerManager {
		names = append(names, controllerManagerName)
	}
	wanted := map[string]int{etcdName: o.EtcdPort, apiserverName: o.APIServerPort}
	addresses := map[string]string{}
	for _, name := range names {
		if _, err := exec.LookPath(filepath.Join(o.BinDir, name)); err != nil {
			release()
			return nil, nil, fmt.Errorf("no %s in %s: build it with hack/controlplane/build.sh, or say where it is with --bin-dir", name, o.BinDir)
		}
		fd, port, err := reserve(wanted[name])
		if err != nil {
			release()
			return nil, nil, fmt.Errorf("%s can't have port %d on 127.0.0.1: %w", name, wanted[name], err)
		}
		held = append(held, fd)
		addresses[name] = net.JoinHostPort("127.0.0.1", fmt.Sprint(port))
	}
	port := func(name string) string {
		_, port, _ := net.SplitHostPort(addresses[name])
		return port
	}

	c := &cluster{info: Info{
		PID:                         os.Getpid(),
		Dir:                         dir,
		APIServerURL:                "https://" + addresses[apiserverName],
		AdminKubeconfig:             filepath.Join(dir, "admin.kubeconfig"),
		UserKubeconfig:              filepath.Join(dir, "user.kubeconfig"),
		Admin:                       certs.admin(),
		User:                        certs.user(),
		ClusterCA:                   certs.cluster(),
		FrontProxyCA:                certs.frontProxy(),
		FrontProxyClient:            certs.frontProxyClient(),
		ServiceAccountIssuer:        serviceAccountIssuer,
		ServiceAccountKeyFile:       certs.serviceAccounts().KeyFile,
		ServiceAccountPublicKeyFile: certs.serviceAccounts().CertFile,
		EtcdURL:                     "https://" + addresses[etcdName],
		EtcdCAFile:                  certs.etcdCA().CertFile,
		EtcdClient:                  certs.etcd(),
	}}

	etcdHealth, err := newProbe(certs.etcdCA().CertFile, certs.etcd())
	if err != nil {
		release()
		return nil, nil, err
	}
	health, err := newProbe(certs.cluster().CertFile, certs.admin())
	if err != nil {
		release()
		return nil, nil, err
	}
	args := map[string][]string{
		etcdName: {
			"--data-dir=" + filepath.Join(dir, "etcd"),
			"--listen-client-urls=" + c.info.EtcdURL,
			"--advertise-client-urls=" + c.info.EtcdURL,
			// It has no peers, but can't do without an address for them.
			"--listen-peer-urls=https://127.0.0.1:0",
			"--socket-reuse-port", // see reserve
			"--client-cert-auth", "--trusted-ca-file=" + certs.etcdCA().CertFile,
			"--cert-file=" + certs.etcd().CertFile, "--key-file=" + certs.etcd().KeyFile,
			"--peer-client-cert-auth", "--peer-trusted-ca-file=" + certs.etcdCA().CertFile,
			"--peer-cert-file=" + certs.etcd().CertFile, "--peer-key-file=" + certs.etcd().KeyFile,
			// What is kept here may be lost to a power cut, though not to a kill.
			"--unsafe-no-fsync",
		},
		apiserverName: slices.Concat([]string{
			"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
			"--secure-port=" + port(apiserverName), "--permit-port-sharing", // see reserve
			"--tls-cert-file=" + certs.apiserver().CertFile, "--tls-private-key-file=" + certs.apiserver().KeyFile,
			// An endpoint on loopback is refused: there is none.
			"--endpoint-reconciler-type=none",
			"--service-cluster-ip-range=10.0.0.0/24",
			"--etcd-servers=" + c.info.EtcdURL, "--etcd-cafile=" + certs.etcdCA().CertFile,
			"--etcd-certfile=" + certs.etcd().CertFile, "--etcd-keyfile=" + certs.etcd().KeyFile,
			"--authorization-mode=RBAC",
			"--client-ca-file=" + certs.cluster().CertFile,
			"--service-account-issuer=" + serviceAccountIssuer,
			"--service-account-key-file=" + certs.serviceAccounts().CertFile,
			"--service-account-signing-key-file=" + certs.serviceAccounts().KeyFile,
			"--requestheader-client-ca-file=" + certs.frontProxy().CertFile,
			"--requestheader-allowed-names=" + frontProxyName,
			"--requestheader-username-headers=X-Remote-User",
			"--requestheader-uid-headers=X-Remote-Uid",
			"--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + certs.frontProxyClient().CertFile,
			"--proxy-client-key-file=" + certs.frontProxyClient().KeyFile,
			// With it, an ExternalName service behind an APIService is refused.
			"--enable-aggregator-routing=false",
			// Else its end waits for clients' watches until it is killed.
			"--shutdown-watch-termination-grace-period=1s",
		}, o.APIServerArgs),
	}
	ready := map[string]func(context.Context) error{
		etcdName:      func(ctx context.Context) error { return etcdHealth.get(ctx, c.info.EtcdURL+"/health") },
		apiserverName: func(ctx context.Context) error { return health.get(ctx, c.info.APIServerURL+"/readyz") },
	}
	if !o.NoControllerManager {
		kubeconfig := filepath.Join(string(certs), "controller-manager.kubeconfig")
		args[controllerManagerName] = slices.Concat([]string{
			"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig, "--authorization-kubeconfig=" + kubeconfig,
			"--bind-address=127.0.0.1",
			"--secure-port=" + port(controllerManagerName), "--permit-port-sharing", // see reserve
			"--tls-cert-file=" + certs.controllerManager().CertFile, "--tls-private-key-file=" + certs.controllerManager().KeyFile,
			"--leader-elect=false",
			// The defaults spare a cluster that others work with; with them it
			// takes five seconds to start.
			"--kube-api-qps=1000", "--kube-api-burst=1000",
			"--use-service-account-credentials",
			"--root-ca-file=" + certs.cluster().CertFile,
			"--service-account-private-key-file=" + certs.serviceAccounts().KeyFile,
			"--cluster-signing-cert-file=" + certs.cluster().CertFile, "--cluster-signing-key-file=" + certs.cluster().KeyFile,
			// It makes that directory, by default in /usr.
			"--flex-volume-plugin-dir=" + filepath.Join(dir, "flex-volume"),
		}, o.ControllerManagerArgs)
		ready[controllerManagerName] = func(ctx context.Context) error {
			if err := health.get(ctx, "https://"+addresses[controllerManagerName]+"/healthz"); err != nil {
				return err
			}
			// It is healthy before its controllers work.
			return health.get(ctx, c.info.APIServerURL+"/api/v1/namespaces/default/serviceaccounts/default")
		}
	}
	for _, name := range names {
		c.components = append(c.components, &component{
			name:    name,
			program: filepath.Join(o.BinDir, name),
			args:    args[name],
			log:     filepath.Join(dir, name+".log"),
			ready:   ready[name],
		})
	}
	return c, release, nil
}

func (c *cluster) writeKubeconfigs(certs pki) error {
	for _, k := range []struct {
		file, user string
		files      KeyPair
	}{
		{c.info.AdminKubeconfig, "admin", certs.admin()},
		{c.info.UserKubeconfig, "user", certs.user()},
		{filepath.Join(string(certs), "controller-manager.kubeconfig"), "system:kube-controller-manager", certs.controllerManager()},
	} {
		if err := writeKubeconfig(k.file, c.info.APIServerURL, c.info.ClusterCA.CertFile, k.user, k.files); err != nil {
			return err
		}
	}
	return nil
}

// writeInfo writes what is true now.
func (c *cluster) writeInfo() error {
	c.info.Components = map[string]ComponentInfo{}
	for _, component := range c.components {
		if component.process != nil {
			c.info.Components[component.name] = ComponentInfo{PID: component.process.Pid, Log: component.log}
		}
	}
	content, err := json.MarshalIndent(c.info, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(infoFile(c.info.Dir), append(content, '\n'))
}

// stop stops everything, what needs others first. When one is missing already,
// an orderly end would only wait for it.
func (c *cluster) stop() {
	os.Remove(infoFile(c.info.Dir))
	signal := syscall.SIGTERM
	for _, component := range c.components {
		if !component.running() {
			signal = syscall.SIGKILL
		} else {
			component.process.Signal(syscall.SIGCONT)
		}
	}
	for _, component := range slices.Backward(c.components) {
		component.stop(signal)
	}
}

// handle does what a command asks for.
func (c *cluster) handle(ctx context.Context, r request) error {
	i := slices.IndexFunc(c.components, func(component *component) bool { return component.name == r.Component })
	if i < 0 {
		var names []string
		for _, component := range c.components {
			names = append(names, component.name)
		}
		return fmt.Errorf("there is no component %q here, but %s", r.Component, strings.Join(names, ", "))
	}
	component := c.components[i]
	if r.Stop {
		signal := syscall.SIGTERM
		if r.Kill {
			signal = syscall.SIGKILL
		}
		component.stop(signal)
	}
	if r.Start && component.process == nil {
		if err := component.start(c.fail); err != nil {
			return err
		}
		if err := component.waitReady(ctx); err != nil {
			return err
		}
	}
	return c.writeInfo()
}

// reserve takes a port of 127.0.0.1, any free one for 0, until the descriptor is
// closed. A component can listen on it meanwhile if it sets SO_REUSEPORT. So the
// kernel gives the port to no one who asks for any free one, neither between its
// choice and its use nor while the component is stopped.
func reserve(wanted int) (fd, port int, err error) {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, 0, err
	}
	// Connections of the run before don't matter, listeners do.
	err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(socket, &unix.SockaddrInet4{Port: wanted, Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		// After bind, which would else share a port that another control plane has.
		err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	var name unix.Sockaddr
	if err == nil {
		name, err = unix.Getsockname(socket)
	}
	if err != nil {
		unix.Close(socket)
		return -1, 0, err
	}
	return socket, name.(*unix.SockaddrInet4).Port, nil
}

// lock takes the file's lock, which ends with this process at the latest.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// probe asks servers with a client certificate.
type probe struct{ client http.Client }

func newProbe(caFile string, files KeyPair) (*probe, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate in PEM", caFile)
	}
	cert, err := tls.LoadX509KeyPair(files.CertFile, files.KeyFile)
	if err != nil {
		return nil, err
	}
	return &probe{http.Client{
		Timeout: 10 * time.Second,
		// No connection is left that could hold up the server's end.
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}},
			DisableKeepAlives: true,
		},
	}}, nil
}

func (p *probe) get(ctx context.Context, url string) error {
	_, err := p.do(ctx, http.MethodGet, url, "", nil)
	return err
}

// do returns the answer's body; an answer other than 2xx is an error.
func (p *probe) do(ctx context.Context, method, url, contentType string, body io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, oneLine.ReplaceAllString(string(content[:min(len(content), 500)]), " "))
	}
	return content, nil
}

var oneLine = regexp.MustCompile(`\s+`)
