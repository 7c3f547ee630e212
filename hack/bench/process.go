//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/cert"
)

const (
	// readyTimeout is long, for machines that are busy.
	readyTimeout = 2 * time.Minute
	stopTimeout  = 20 * time.Second
	pollInterval = 100 * time.Millisecond
)

// process is a program that was started here. It ends with the thread that
// started it: the main goroutine is locked to the main thread.
type process struct {
	name  string
	log   string
	cmd   *exec.Cmd
	ended chan struct{}
}

// startProcess starts a program with its output in a file. ended is what the
// program gets when this one is killed.
func startProcess(name, log string, ended syscall.Signal, program string, args ...string) (*process, error) {
	file, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = file, file
	// All is on loopback: a proxy could only get in between.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(strings.ToLower(variable), "=")
		return name == "http_proxy" || name == "https_proxy" || name == "all_proxy"
	})
	// A process group of its own keeps a terminal's interrupt from it: it is
	// stopped from here, in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: ended}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	p := &process{name: name, log: log, cmd: cmd, ended: make(chan struct{})}
	go func() {
		cmd.Wait() // stop says how it ended, if that was too early
		close(p.ended)
	}()
	return p, nil
}

// wait polls until ready succeeds, the process ends or ctx does.
func (p *process) wait(ctx context.Context, ready func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, pollInterval, readyTimeout, true, func(ctx context.Context) (bool, error) {
		select {
		case <-p.ended:
			return false, fmt.Errorf("%s ended early (%s):\n%s", p.name, p.cmd.ProcessState, tail(p.log))
		default:
		}
		last = ready(ctx)
		return last == nil, nil
	})
	if wait.Interrupted(err) && ctx.Err() == nil {
		return fmt.Errorf("%s isn't ready after %s: %w\n%s", p.name, readyTimeout, last, tail(p.log))
	}
	return err
}

// stop ends the process. It does nothing to one that wasn't started.
func (p *process) stop() {
	if p == nil {
		return
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(stopTimeout):
		p.cmd.Process.Kill()
		<-p.ended
	}
}

// tail returns the end of a file.
func tail(name string) string {
	content, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	const most = 4 << 10
	return string(content[max(0, len(content)-most):])
}

// controlPlane is what hack/controlplane's launcher says of itself.
type controlPlane struct {
	Components      map[string]struct{ PID int }
	APIServerURL    string
	AdminKubeconfig string
	Admin           keyPair
	ClusterCA       keyPair
	EtcdURL         string
	EtcdCAFile      string
	EtcdClient      keyPair
}

type keyPair struct{ CertFile, KeyFile string }

// startControlPlane starts etcd and a kube-apiserver, which the servers ask for
// authentication and admission.
func startControlPlane(ctx context.Context, launcher, dir string) (*process, *controlPlane, error) {
	if _, err := os.Stat(launcher); err != nil {
		return nil, nil, fmt.Errorf("the control plane isn't built, run make controlplane: %w", err)
	}
	p, err := startProcess("the control plane", filepath.Join(dir, "controlplane.log"), syscall.SIGTERM,
		launcher, "up", "--dir", filepath.Join(dir, "control"), "--no-controller-manager")
	if err != nil {
		return nil, nil, err
	}
	var info controlPlane
	err = p.wait(ctx, func(context.Context) error {
		content, err := os.ReadFile(filepath.Join(dir, "control", "controlplane.json"))
		if err != nil {
			return err
		}
		return json.Unmarshal(content, &info)
	})
	if err != nil {
		p.stop()
		return nil, nil, err
	}
	return p, &info, nil
}

// server is one of the API servers that are compared. It can be started again:
// what it stores stays.
type server struct {
	name    string
	program string
	// args are those beside the ones that all servers get.
	args  []string
	plane *controlPlane
	dir   string

	*process
	client *client
	starts int
}

// start starts the server on a free port of loopback, with the same flags for
// all of them, and waits until it is ready.
func (s *server) start(ctx context.Context) error {
	certFile, keyFile, err := servingCert(s.dir)
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	s.starts++
	log := filepath.Join(s.dir, fmt.Sprintf("%s-%d.log", s.name, s.starts))
	s.process, err = startProcess(s.name, log, syscall.SIGKILL, s.program, slices.Concat(s.args, []string{
		"--kubeconfig=" + s.plane.AdminKubeconfig,
		"--authentication-kubeconfig=" + s.plane.AdminKubeconfig,
		"--authorization-kubeconfig=" + s.plane.AdminKubeconfig,
		"--etcd-servers=" + s.plane.EtcdURL,
		"--etcd-cafile=" + s.plane.EtcdCAFile,
		"--etcd-certfile=" + s.plane.EtcdClient.CertFile,
		"--etcd-keyfile=" + s.plane.EtcdClient.KeyFile,
		"--bind-address=127.0.0.1",
		"--secure-port=" + strconv.Itoa(port),
		"--tls-cert-file=" + certFile,
		"--tls-private-key-file=" + keyFile,
		"--profiling",
	})...)
	if err != nil {
		return err
	}
	s.client, err = newClient(fmt.Sprintf("https://127.0.0.1:%d", port), certFile, s.plane.Admin)
	if err == nil {
		err = s.process.wait(ctx, func(ctx context.Context) error {
			if err := s.client.drop(ctx, request{path: "/readyz"}); err != nil {
				return err
			}
			// What the server asks for in a handshake, it hears of after its
			// start: a connection from before is anonymous.
			s.client.http.CloseIdleConnections()
			return s.client.drop(ctx, request{path: "/metrics"})
		})
	}
	if err != nil {
		s.stop()
	}
	return err
}

func (s *server) stop() {
	if s.process == nil {
		return
	}
	if s.client != nil {
		s.client.http.CloseIdleConnections()
	}
	s.process.stop()
	s.process, s.client = nil, nil
}

// servingCert returns a certificate for loopback that lies in dir; it is made
// by whoever asks first.
func servingCert(dir string) (certFile, keyFile string, err error) {
	certFile, keyFile = filepath.Join(dir, "serving.crt"), filepath.Join(dir, "serving.key")
	if _, err := os.Stat(keyFile); err == nil {
		return certFile, keyFile, nil
	}
	certPEM, keyPEM, err := cert.GenerateSelfSignedCertKey("localhost", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	if err != nil {
		return "", "", err
	}
	if err := os.WriteFile(certFile, certPEM, 0o600); err != nil {
		return "", "", err
	}
	return certFile, keyFile, os.WriteFile(keyFile, keyPEM, 0o600)
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// clockTicks is USER_HZ, which is 100 on every Linux that Go runs on.
const clockTicks = 100

// cpu is how much processor time the process has used, its ended threads' too.
func (p *process) cpu() (time.Duration, error) {
	used, err := cpuOf(p.cmd.Process.Pid)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", p.name, err)
	}
	return used, nil
}

func cpuOf(pid int) (time.Duration, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseCPU(content)
}

// parseCPU reads utime and stime of proc(5)'s stat.
func parseCPU(stat []byte) (time.Duration, error) {
	// The program's name, in parentheses, may contain anything.
	_, rest, ok := bytes.Cut(stat[max(0, bytes.LastIndexByte(stat, ')')):], []byte(" "))
	fields := strings.Fields(string(rest))
	const state, utime, stime = 3, 14, 15 // counted as proc(5) does
	if !ok || len(fields) <= stime-state {
		return 0, fmt.Errorf("can't read %q", stat)
	}
	var ticks int64
	for _, field := range []int{utime, stime} {
		n, err := strconv.ParseInt(fields[field-state], 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / clockTicks), nil
}

// memory is what a server occupies, in bytes.
type memory struct {
	// Heap is Go's heap in use after a garbage collection.
	Heap float64
	// RSS is the memory of the process that is resident, HighWater the most
	// that it ever was.
	RSS, HighWater float64
}

// memory waits until the heap stays as it is.
func (s *server) memory(ctx context.Context) (memory, error) {
	var m memory
	err := wait.PollUntilContextTimeout(ctx, 2*pollInterval, readyTimeout, true, func(ctx context.Context) (bool, error) {
		before := m.Heap
		// It collects garbage first.
		if _, err := s.client.do(ctx, request{path: "/debug/pprof/heap?gc=1"}); err != nil {
			return false, err
		}
		metrics, err := s.client.do(ctx, request{path: "/metrics"})
		if err != nil {
			return false, err
		}
		if m.Heap, err = metric(metrics, "go_memstats_heap_alloc_bytes"); err != nil {
			return false, err
		}
		return m.Heap > before*0.998 && m.Heap < before*1.002, nil
	})
	if err != nil {
		return m, fmt.Errorf("%s: its heap doesn't settle: %w", s.name, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return m, err
	}
	for field, value := range map[string]*float64{"VmRSS:": &m.RSS, "VmHWM:": &m.HighWater} {
		kib, err := metric(status, field)
		if err != nil {
			return m, err
		}
		*value = kib * 1024
	}
	return m, nil
}

// metric returns the number that follows a name at the beginning of a line.
func metric(text []byte, name string) (float64, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) >= 2 && fields[0] == name {
			return strconv.ParseFloat(fields[1], 64)
		}
	}
	return 0, errors.Join(fmt.Errorf("there is no %s", name), lines.Err())
}

// profile stores a CPU profile of the server, taken while work runs again and
// again.
func (s *server) profile(ctx context.Context, name string, seconds int, work func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		profile []byte
		err     error
	}
	done := make(chan result, 1)
	go func() {
		profile, err := s.client.do(ctx, request{path: fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds)})
		done <- result{profile, err}
	}()
	for {
		if err := work(); err != nil {
			cancel()
			<-done
			return err
		}
		select {
		case r := <-done:
			if r.err != nil {
				return r.err
			}
			return os.WriteFile(name, r.profile, 0o644)
		default:
		}
	}
}

// discard reads to the end.
func discard(response *http.Response) error {
	_, err := io.Copy(io.Discard, response.Body)
	return errors.Join(err, response.Body.Close())
}
