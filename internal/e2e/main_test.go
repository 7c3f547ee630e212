// Package e2e runs the built binaries as a user would, with a real kubectl.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// binaries are the programs under test, built once for all tests.
var binaries struct {
	server, plugin, kubectl, controlplane string
}

// root is the repository's.
var root string

// endWithTests has a process end even if the tests are killed, where that can
// be had.
var endWithTests *syscall.SysProcAttr

// atEnd runs when all tests have ended, the last first.
var atEnd []func()

func TestMain(m *testing.M) {
	if port := os.Getenv(echoPort); port != "" {
		fmt.Fprintln(os.Stderr, echo(port))
		os.Exit(1)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "aaserver-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	root, err = filepath.Abs("../..")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	binaries.server = filepath.Join(dir, "aaserver")
	binaries.plugin = filepath.Join(dir, "kubectl-target")
	binaries.kubectl = filepath.Join(root, "bin", "controlplane", "kubectl")
	binaries.controlplane = filepath.Join(root, "bin", "controlplane", "controlplane")
	if _, err := os.Stat(binaries.kubectl); err != nil {
		fmt.Fprintf(os.Stderr, "kubectl isn't built (run make controlplane): %v\n", err)
		return 1
	}
	for binary, pkg := range map[string]string{binaries.server: ".", binaries.plugin: "./cmd/kubectl-target"} {
		build := exec.Command("go", "build", "-o", binary, pkg)
		build.Dir = root
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building %s: %v\n%s", pkg, err, out)
			return 1
		}
	}
	code := m.Run()
	for _, f := range slices.Backward(atEnd) {
		f()
	}
	return code
}

// client is somebody who uses a server.
type client struct {
	t          testing.TB
	dir        string // the home directory
	kubeconfig string
}

// server is a running server, and its administrator.
type server struct {
	*client
	cmd   *exec.Cmd
	log   *os.File
	ended chan struct{}
	err   error // set before ended is closed
}

// startServer starts a server on a data directory and waits until it is ready.
func startServer(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	admin := &client{t: t, dir: dir, kubeconfig: filepath.Join(dir, "kubeconfig")}
	s := launch(t, admin, append([]string{"standalone", "--data-dir", dir, "--secure-port", "0"}, args...)...)
	t.Cleanup(s.kill)
	s.eventually("the server is ready", 60*time.Second, func() error {
		select {
		case <-s.ended:
			t.Fatalf("the server ended: %v\n%s", s.err, s.output())
		default:
		}
		if !strings.Contains(s.output(), "aaserver is ready") {
			return errors.New("it hasn't said so")
		}
		return nil
	})
	return s
}

// launch starts the server's binary. The caller sees to its end.
func launch(t testing.TB, admin *client, args ...string) *server {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "server-*.log")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{client: admin, cmd: exec.Command(binaries.server, args...), log: log, ended: make(chan struct{})}
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = endWithTests
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.ended)
	}()
	return s
}

// kill ends the server at once, and shows its log if the test has failed.
func (s *server) kill() {
	s.signal(syscall.SIGKILL)
	<-s.ended
	if s.t.Failed() {
		s.t.Logf("the server's log:\n%s", tail(s.output(), 8<<10))
	}
	s.log.Close()
}

func (s *server) output() string {
	text, err := os.ReadFile(s.log.Name())
	if err != nil {
		s.t.Fatal(err)
	}
	return string(text)
}

func (s *server) signal(sig syscall.Signal) {
	select {
	case <-s.ended:
	default:
		s.cmd.Process.Signal(sig)
	}
}

// stop ends the server by a signal and waits for it.
func (s *server) stop(sig syscall.Signal, within time.Duration) {
	s.t.Helper()
	s.signal(sig)
	select {
	case <-s.ended:
	case <-time.After(within):
		s.t.Fatalf("the server didn't end within %s of %s\n%s", within, sig, tail(s.output(), 8<<10))
	}
}

// eventually polls until f succeeds.
func eventually(t testing.TB, what string, within time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s, not yet: %s: %v", within, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (c *client) eventually(what string, within time.Duration, f func() error) {
	c.t.Helper()
	eventually(c.t, what, within, f)
}

// result is what a command printed and returned.
type result struct {
	stdout, stderr string
	code           int
}

// command prepares a program with the client's kubeconfig, and nothing else of
// the environment that could change what it does.
func (c *client) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{
		"KUBECONFIG=" + c.kubeconfig,
		"HOME=" + c.dir,
		"PATH=" + filepath.Dir(binaries.plugin) + ":" + os.Getenv("PATH"),
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (c *client) run(program, stdin string, args ...string) result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	cmd := c.command(ctx, program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			c.t.Fatalf("%s %q: %v", filepath.Base(program), args, err)
		}
	}
	if ctx.Err() != nil {
		c.t.Fatalf("%s %q didn't end\nstdout: %s\nstderr: %s", filepath.Base(program), args, stdout.String(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// kubectl runs kubectl and expects it to succeed; it returns what it printed.
func (c *client) kubectl(args ...string) string {
	c.t.Helper()
	return c.kubectlStdin("", args...)
}

func (c *client) kubectlStdin(stdin string, args ...string) string {
	c.t.Helper()
	r := c.run(binaries.kubectl, stdin, args...)
	if r.code != 0 {
		c.t.Fatalf("kubectl %q: exit code %d\nstdout: %s\nstderr: %s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// target runs the plugin, whatever its exit code.
func (c *client) target(args ...string) result {
	c.t.Helper()
	return c.run(binaries.plugin, "", args...)
}

func tail(text string, most int) string {
	if len(text) > most {
		return "…" + text[len(text)-most:]
	}
	return text
}

// wantContains fails unless text has every part.
func wantContains(t testing.TB, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: want %q in:\n%s", what, part, text)
		}
	}
}
