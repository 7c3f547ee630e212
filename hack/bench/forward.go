//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"aaserver.io/aaserver/streaming"
)

const (
	backendName = "backend"
	backendPort = 8080
	// forwardBytes is how much goes through in one measurement, over all
	// connections together.
	forwardBytes = 512 << 20
	manyConns    = 100
)

// backendEndpoint is where our own protocol finds it.
var backendEndpoint = streaming.Endpoint{Network: "tcp", Port: backendPort}

// forward is a way from a local port to the backend: the programs on it, those
// at its ends not included.
type forward struct {
	name    string
	address string
	pids    func() ([]int, error)
}

// cpu is what all programs on the way have used.
func (f *forward) cpu() (time.Duration, error) {
	pids, err := f.pids()
	if err != nil {
		return 0, err
	}
	var total time.Duration
	for _, pid := range pids {
		used, err := cpuOf(pid)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", f.name, err)
		}
		total += used
	}
	return total, nil
}

// load is one line of the table.
type load struct {
	name  string
	want  byte
	conns int
}

var loads = []load{
	{"from the target, 1 connection", wantBytes, 1},
	{"from the target, 100 connections", wantBytes, manyConns},
	{"to the target, 1 connection", sendBytes, 1},
	{"to the target, 100 connections", sendBytes, manyConns},
}

// measureForward sets `kubectl target port-forward` through a real kube-apiserver
// beside client-go's port-forward through the same, beside relays of bare TLS with
// as many hops, and beside ssh.
func measureForward(ctx context.Context, o options, dir string, out io.Writer) error {
	c, err := startCluster(ctx, o, dir)
	if err != nil {
		return err
	}
	defer c.stop()
	backend := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(c.backend.Status.Instances[0].Ports[0].HostPort)))

	var forwards []*forward
	var started []*process
	defer func() {
		for _, p := range started {
			p.stop()
		}
	}()
	for _, start := range []func(context.Context, options, *cluster, string) (*forward, []*process, error){
		startPlugin, startClientGo, startUpstream, startRelays, startSSH,
	} {
		f, processes, err := start(ctx, o, c, backend)
		started = append(started, processes...)
		if err != nil {
			return err
		}
		forwards = append(forwards, f)
	}

	samples := map[string]map[string][]sample{}
	for round := range o.rounds + 1 { // the first one warms up
		for _, l := range loads {
			for i := range forwards {
				f := forwards[(i+round)%len(forwards)]
				s, err := l.measure(ctx, f)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", f.name, l.name, err)
				}
				if round == 0 {
					continue
				}
				if samples[l.name] == nil {
					samples[l.name] = map[string][]sample{}
				}
				samples[l.name][f.name] = append(samples[l.name][f.name], s)
			}
		}
		logf("forward: round %d of %d", round, o.rounds)
	}
	reportForward(out, o, forwards, samples)
	return nil
}

// measure sends the load through, and returns what a GiB takes.
func (l load) measure(ctx context.Context, f *forward) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	before, err := f.cpu()
	if err != nil {
		return sample{}, err
	}
	begin := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for range l.conns {
		group.Go(func() error { return transfer(ctx, f.address, l.want, forwardBytes/int64(l.conns)) })
	}
	if err := group.Wait(); err != nil {
		return sample{}, err
	}
	wall := time.Since(begin)
	after, err := f.cpu()
	if err != nil {
		return sample{}, err
	}
	const share = float64(forwardBytes) / (1 << 30)
	return sample{wall.Seconds() / share, (after - before).Seconds() / share}, nil
}

// transfer is a client of the backend.
func transfer(ctx context.Context, address string, want byte, size int64) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := conn.Write(binary.BigEndian.AppendUint64([]byte{want}, uint64(size))); err != nil {
		return err
	}
	chunk := make([]byte, 128<<10)
	if want == sendBytes {
		for left := size; left > 0; {
			n, err := conn.Write(chunk[:min(left, int64(len(chunk)))])
			if err != nil {
				return err
			}
			left -= int64(n)
		}
		_, err := io.ReadFull(conn, chunk[:1])
		return err
	}
	var got int64
	for got < size {
		n, err := conn.Read(chunk)
		got += int64(n)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", got, size, err)
		}
	}
	return nil
}

// listening finds the local port in what a program has printed.
var listening = regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+)`)

// startForwarder starts a program that prints where it listens.
func startForwarder(ctx context.Context, dir, name, program string, args ...string) (*process, string, error) {
	p, err := startProcess(name, filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".log"), syscall.SIGKILL, program, args...)
	if err != nil {
		return nil, "", err
	}
	var address string
	err = p.wait(ctx, func(context.Context) error {
		content, err := os.ReadFile(p.log)
		if err != nil {
			return err
		}
		match := listening.FindSubmatch(content)
		if match == nil {
			return errors.New("it hasn't said where it listens")
		}
		address = string(match[1])
		return nil
	})
	return p, address, err
}

// through are the programs that a forward through kube-apiserver goes through.
func (c *cluster) through(client, server *process) func() ([]int, error) {
	pids := []int{client.cmd.Process.Pid, c.info.Components["kube-apiserver"].PID, server.cmd.Process.Pid}
	return func() ([]int, error) { return pids, nil }
}

func startPlugin(ctx context.Context, o options, c *cluster, _ string) (*forward, []*process, error) {
	p, address, err := startForwarder(ctx, c.dir, "the plugin", filepath.Join(o.bin, "kubectl-target"),
		"--kubeconfig="+c.info.AdminKubeconfig, "--namespace="+clusterNamespace, "port-forward", "--address=127.0.0.1", backendName, fmt.Sprintf(":%d", backendPort))
	if err != nil {
		return nil, []*process{p}, err
	}
	return &forward{"ours (mux)", address, c.through(p, c.server.process)}, []*process{p}, nil
}

// startClientGo forwards by client-go and our server.
func startClientGo(ctx context.Context, _ options, c *cluster, _ string) (*forward, []*process, error) {
	p, address, err := c.startClientGo(ctx, "client-go", targetPath(backendName))
	if err != nil {
		return nil, []*process{p}, err
	}
	return &forward{"client-go, our server", address, c.through(p, c.server.process)}, []*process{p}, nil
}

func (c *cluster) startClientGo(ctx context.Context, name, path string) (*process, string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	return startForwarder(ctx, c.dir, name, self, "role-client-go",
		"--url="+c.info.APIServerURL+path+"/portforward", "--ca="+c.info.ClusterCA.CertFile,
		"--cert="+c.info.Admin.CertFile, "--key="+c.info.Admin.KeyFile, "--port="+strconv.Itoa(backendPort))
}

// startUpstream forwards by what Kubernetes has on both ends.
func startUpstream(ctx context.Context, _ options, c *cluster, backend string) (*forward, []*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	certFile, keyFile, err := servingCert(c.dir)
	if err != nil {
		return nil, nil, err
	}
	server, address, err := startForwarder(ctx, c.dir, "upstream", self, "role-upstream", "--backend="+backend, "--cert="+certFile, "--key="+keyFile)
	started := []*process{server}
	if err != nil {
		return nil, started, err
	}
	if err := c.aggregate(ctx, upstreamGroup, "https://"+address); err != nil {
		return nil, started, err
	}
	client, address, err := c.startClientGo(ctx, "client-go of upstream", "/apis/"+upstreamGroup+"/v1/namespaces/"+clusterNamespace+"/targets/"+backendName)
	started = append([]*process{client}, started...)
	if err != nil {
		return nil, started, err
	}
	return &forward{"upstream", address, c.through(client, server)}, started, nil
}

// startRelays starts what stands for the client, for kube-apiserver and for the
// server, from the last to the first.
func startRelays(ctx context.Context, _ options, c *cluster, backend string) (*forward, []*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	certFile, keyFile, err := servingCert(c.dir)
	if err != nil {
		return nil, nil, err
	}
	var started []*process
	var pids []int
	next := backend
	for _, hop := range []struct {
		name           string
		accepts, dials bool
	}{{"relay 3", true, false}, {"relay 2", true, true}, {"relay 1", false, true}} {
		p, address, err := startForwarder(ctx, c.dir, hop.name, self, "role-relay", "--to="+next,
			fmt.Sprintf("--accept-tls=%t", hop.accepts), fmt.Sprintf("--dial-tls=%t", hop.dials), "--cert="+certFile, "--key="+keyFile)
		started = append(started, p)
		if err != nil {
			return nil, started, err
		}
		pids = append(pids, p.cmd.Process.Pid)
		next = address
	}
	return &forward{"TLS relays", next, func() ([]int, error) { return pids, nil }}, started, nil
}

// startSSH starts a server of ssh on loopback, and a client that forwards.
func startSSH(ctx context.Context, _ options, c *cluster, backend string) (*forward, []*process, error) {
	sshd, err := exec.LookPath("sshd")
	if err != nil { // it isn't in everybody's PATH
		if sshd, err = exec.LookPath("/usr/sbin/sshd"); err != nil {
			return nil, nil, errors.New("there is no sshd to compare with: install your system's openssh-server")
		}
	}
	hostKey, userKey := filepath.Join(c.dir, "ssh-host"), filepath.Join(c.dir, "ssh-user")
	for _, key := range []string{hostKey, userKey} {
		if text, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
			return nil, nil, fmt.Errorf("ssh-keygen: %w: %s", err, text)
		}
	}
	if os.Geteuid() == 0 {
		// It wants to be able to leave its privileges there.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return nil, nil, err
		}
	}
	port, err := freePort()
	if err != nil {
		return nil, nil, err
	}
	server, err := startProcess("sshd", filepath.Join(c.dir, "sshd.log"), syscall.SIGTERM, sshd, "-D", "-e", "-f", "/dev/null",
		"-o", "ListenAddress=127.0.0.1", "-o", "Port="+strconv.Itoa(port), "-o", "HostKey="+hostKey, "-o", "PidFile=none",
		"-o", "AuthorizedKeysFile="+userKey+".pub", "-o", "StrictModes=no", "-o", "PermitRootLogin=prohibit-password",
		"-o", "PasswordAuthentication=no", "-o", "UsePAM=no")
	if err != nil {
		return nil, nil, err
	}
	started := []*process{server}
	answers := func(address string) func(context.Context) error {
		return func(ctx context.Context) error {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			if err == nil {
				conn.Close()
			}
			return err
		}
	}
	if err := server.wait(ctx, answers(net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))); err != nil {
		return nil, started, err
	}
	local, err := freePort()
	if err != nil {
		return nil, started, err
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(local))
	client, err := startProcess("ssh", filepath.Join(c.dir, "ssh.log"), syscall.SIGTERM, "ssh", "-N", "-F", "none", "-i", userKey,
		"-p", strconv.Itoa(port), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-L", address+":"+backend, "127.0.0.1")
	if err != nil {
		return nil, started, err
	}
	started = append([]*process{client}, started...) // the client is stopped first
	if err := client.wait(ctx, answers(address)); err != nil {
		return nil, started, err
	}
	return &forward{"ssh -L", address, func() ([]int, error) {
		below, err := descendants(server.cmd.Process.Pid)
		return append(below, client.cmd.Process.Pid), err
	}}, started, nil
}

// descendants returns a process and all below it.
func descendants(pid int) ([]int, error) {
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pids[i]))
		if err != nil {
			return nil, err
		}
		for field := range strings.FieldsSeq(string(content)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				return nil, err
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}

func reportForward(out io.Writer, o options, forwards []*forward, samples map[string]map[string][]sample) {
	fmt.Fprintf(out, "## Port-forward\n\n%d cores, %s of memory, %s. Medians of %d rounds, %d MiB each. A ratio is ours to the other's, with the least and the most of the rounds in brackets.\n\n",
		runtime.NumCPU(), totalMemory(), runtime.Version(), o.rounds, forwardBytes>>20)
	for _, t := range []struct {
		title string
		of    func(sample) float64
	}{
		{"MiB a second; a ratio above 1 is faster.", func(s sample) float64 { return 1024 / s.wall }},
		{"Processor seconds for each GiB, of all programs on the way; a ratio below 1 is cheaper.", func(s sample) float64 { return s.cpu }},
	} {
		fmt.Fprintf(out, "%s\n\n", t.title)
		head := []string{"port-forward", forwards[0].name}
		for _, f := range forwards[1:] {
			head = append(head, f.name, "ratio")
		}
		rows := [][]string{head}
		for _, l := range loads {
			ours := column(samples[l.name][forwards[0].name], t.of)
			row := []string{l.name, number(median(ours))}
			for _, f := range forwards[1:] {
				theirs := column(samples[l.name][f.name], t.of)
				row = append(row, number(median(theirs)), ratio(ratios(ours, theirs)))
			}
			rows = append(rows, row)
		}
		table(out, rows)
	}
}
