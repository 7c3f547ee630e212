package process

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// envHelperAgent has the test binary be an agent, which a test can kill. Its
// value is the marker for the processes to start.
const envHelperAgent = "AASERVER_TEST_AGENT"

// envHelperStop has the command beside the instance stop its shim.
const envHelperStop = "AASERVER_TEST_STOP"

// family is a script that starts processes of all degrees of detachment, all
// of which can be told by the marker, and prints "ready" when they run.
func family(marker string) string {
	sleep := "sleep 100000." + marker
	return sleep + " & setsid " + sleep + " & (" + sleep + " &) ; setsid sh -c '(setsid " + sleep + " &) ; trap \"\" TERM HUP INT; " + sleep + "; :' & " +
		"until [ $(pgrep -fc '^sleep 100000." + marker + "') -ge 5 ]; do sleep 0.01; done; echo ready; wait"
}

// helperAgent runs an instance and a command beside it until it is killed.
func helperAgent() {
	marker := os.Getenv(envHelperAgent)
	check := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	dir, err := os.MkdirTemp("", "agent")
	check(err)
	fmt.Println(dir)
	d, err := New(Options{Dir: dir})
	check(err)
	target := newTarget(script(family(marker + "1")))
	check(d.Start(context.Background(), driver.Instance{Target: target, Name: "web-0"}))
	conn, err := d.Open(context.Background(), driver.Request{Target: target, Instance: "web-0"})
	check(err)
	logs, err := conn.(driver.Logger).Logs(context.Background(), driver.LogOptions{Follow: true})
	check(err)
	line, err := logs.Next(context.Background())
	check(err)
	fmt.Println("instance", string(line.Data))
	run, err := conn.(driver.Execer).Exec(context.Background(), driver.ExecOptions{Command: []string{"sh", "-c", family(marker + "2")}})
	check(err)
	if os.Getenv(envHelperStop) != "" {
		// The shim has said that it has started the command when that can read.
		run, err = conn.(driver.Execer).Exec(context.Background(), driver.ExecOptions{Command: []string{"sh", "-c", "read go; kill -STOP $PPID; " + family(marker+"2")}})
		check(err)
	}
	check(run(context.Background(), driver.Stdio{Stdin: io.NopCloser(strings.NewReader("go\n")), Stdout: os.Stdout}))
}

// marked returns the processes whose command line contains a text.
func marked(t testing.TB, text string) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range lines {
		line, err := os.ReadFile(name)
		if err == nil && bytes.Contains(line, []byte(text)) {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// newMarker returns digits that no other process has on its command line.
func newMarker() string {
	return fmt.Sprintf("%d%d%d", os.Getpid(), lastUID.Add(1), time.Now().UnixNano())
}

func awaitNone(t *testing.T, marker string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		pids := marked(t, marker)
		if len(pids) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes %v are left", pids)
		}
	}
}

func needPgrep(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"pgrep", "setsid"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip(t, err)
		}
	}
}

func TestNothingOutlivesAKilledAgent(t *testing.T) {
	needPgrep(t)
	t.Run("as it is", func(t *testing.T) { killAgent(t) })
	t.Run("whose shim was stopped by its command", func(t *testing.T) { killAgent(t, envHelperStop+"=1") })
}

func killAgent(t *testing.T, env ...string) {
	marker := newMarker()
	agent := exec.Command("/proc/self/exe")
	agent.Env = append(os.Environ(), envHelperAgent+"="+marker)
	agent.Env = append(agent.Env, env...)
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var printed []string
	for len(printed) < 3 && lines.Scan() {
		printed = append(printed, lines.Text())
	}
	if len(printed) == 3 {
		defer os.RemoveAll(printed[0])
	}
	if len(printed) != 3 || printed[1] != "instance ready" || printed[2] != "ready" {
		t.Errorf("the agent printed %q", printed)
	}
	if n := len(marked(t, marker)); n < 10 {
		t.Errorf("%d processes run, want 10 at least", n)
	}
	agent.Process.Kill()
	io.Copy(io.Discard, out)
	agent.Wait()
	awaitNone(t, marker)
}

func TestNothingOutlivesAKilledShim(t *testing.T) {
	needPgrep(t)
	marker := newMarker()
	d := newDriver(t, Options{})
	target := newTarget(script(family(marker)))
	other := newTarget(script("exec sleep 1000"))
	id, otherID := start(t, d, target), start(t, d, other)
	awaitLine(t, d, target)
	if err := syscall.Kill(shimOf(t, d, id), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	state := awaitEnd(t, d, id)
	if state.Reason != "Killed" || state.Message == "" {
		t.Errorf("state %+v", state)
	}
	if pids := marked(t, marker); len(pids) > 0 {
		t.Errorf("processes %v are left", pids)
	}
	await(t, d, "the other instance runs on", func(s driver.InstanceStatus) bool {
		return s.ID == otherID && s.State.Running != nil
	})
	if err := syscall.Kill(shimOf(t, d, otherID), 0); err != nil {
		t.Errorf("the other shim: %v", err)
	}
}

// awaitLine waits for the first line of an instance's log.
func awaitLine(t *testing.T, d *Driver, target *v1.Target) {
	t.Helper()
	reader, err := open(t, d, target).Logs(t.Context(), driver.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := reader.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// shimOf returns the pid of an instance's shim.
func shimOf(t *testing.T, d *Driver, id driver.InstanceID) int {
	t.Helper()
	d.mu.Lock()
	pid := d.instances[id].run.child.PID
	d.mu.Unlock()
	return parentOf(t, pid)
}

func parentOf(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if parent, ok := strings.CutPrefix(line, "PPid:"); ok {
			pid, err = strconv.Atoi(strings.TrimSpace(parent))
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return pid
}

func TestShimSurvivesTheSignalsOfServiceManagers(t *testing.T) {
	d := newDriver(t, Options{})
	target := newTarget(script("trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"))
	id := start(t, d, target)
	awaitLine(t, d, target)
	shim := shimOf(t, d, id)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1} {
		if err := syscall.Kill(shim, sig); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Stop(t.Context(), id, time.Minute); err != nil {
		t.Fatal(err)
	}
	if state := awaitEnd(t, d, id); state.ExitCode != 5 {
		t.Errorf("state %+v", state)
	}
}

func TestForkBombIsEnded(t *testing.T) {
	marker := newMarker()
	d := newDriver(t, Options{})
	target := newTarget(script("sleep 1000"))
	start(t, d, target)
	// Each process starts two more before it sleeps; its depth bounds it to
	// some hundreds, many of which are starting when the client goes.
	bomb := fmt.Sprintf(`bomb() { [ $1 -gt 9 ] || { bomb $(($1+1)) & bomb $(($1+1)) & }; sleep 100000.%s; }; echo ready; bomb 0`, marker)
	run, err := open(t, d, target).Exec(t.Context(), driver.ExecOptions{Command: []string{"sh", "-c", bomb}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- run(ctx, driver.Stdio{Stdout: w}) }()
	io.ReadFull(r, make([]byte, 6))
	for len(marked(t, "sleep\x00100000."+marker)) < 50 {
	}
	cancel()
	if err := <-done; err != context.Canceled {
		t.Errorf("Run returned %v", err)
	}
	if pids := marked(t, marker); len(pids) > 0 {
		t.Errorf("%d processes are left", len(pids))
	}
}

// hops starts chains of processes, each of which forks and exits as fast as it
// can. They end by themselves, for a test that fails.
const hops = `
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
	int gate[2];
	pipe(gate);
	for (int chains = atoi(argv[1]); chains > 0; chains--)
		if (fork() == 0) {
			char c;
			close(gate[1]);
			read(gate[0], &c, 1);
			for (int left = 20000; ; left--) {
				if (left == 0 || fork() != 0) _exit(0);
				setsid();
			}
		}
	close(gate[1]);
	write(1, "ready\n", 6);
	for (;;) pause();
}`

// TestWhatForksOnIsEnded is about processes that have a successor before they
// are killed.
func TestWhatForksOnIsEnded(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		skip(t, "a shell forks too slowly: ", err)
	}
	program := filepath.Join(t.TempDir(), "hops")
	compile := exec.Command(cc, "-O2", "-w", "-x", "c", "-o", program, "-")
	compile.Stdin = strings.NewReader(hops)
	if out, err := compile.CombinedOutput(); err != nil {
		skip(t, err, ": ", string(out))
	}
	const chains = 100
	for name, killShim := range map[string]bool{"by its shim": false, "by the agent": true} {
		t.Run(name, func(t *testing.T) {
			marker := newMarker()
			d := newDriver(t, Options{})
			target := newTarget(script("exec sleep 1000"))
			id := start(t, d, target)
			run, err := open(t, d, target).Exec(t.Context(), driver.ExecOptions{Command: []string{program, fmt.Sprint(chains), marker}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			r, w := io.Pipe()
			done := make(chan error, 1)
			go func() { done <- run(ctx, driver.Stdio{Stdout: w}) }()
			io.ReadFull(r, make([]byte, 6))
			pids := marked(t, marker)
			if killShim {
				d.mu.Lock()
				r := d.instances[id].run
				d.mu.Unlock()
				r.mu.Lock()
				for child := range r.execs {
					syscall.Kill(parentOf(t, child.PID), syscall.SIGKILL)
				}
				r.mu.Unlock()
			} else {
				cancel()
			}
			defer cancel()
			for peak := len(pids); ; {
				select {
				case <-done:
					if left := marked(t, marker); len(left) > 0 {
						t.Errorf("%d processes are left", len(left))
					}
					t.Logf("at most %d processes at once, %d at first", peak, len(pids))
					if peak > 3*chains {
						t.Errorf("there were %d processes at once", peak)
					}
					return
				default:
					peak = max(peak, len(marked(t, marker)))
				}
			}
		})
	}
}

// envHelperThief has the test binary try to take its parent's files, and those
// of itself.
const envHelperThief = "AASERVER_TEST_THIEF"

func helperThief() {
	if os.Getenv(envHelperThief) == "agent" {
		// An agent that runs it as who the agent itself is.
		dir, err := os.MkdirTemp("", "agent")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		defer os.RemoveAll(dir)
		d, err := New(Options{Dir: dir})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		target := newTarget(v1.ProcessSource{Command: []string{"sleep", "1000"}, Env: []v1.EnvVar{{Name: envHelperThief, Value: "thief"}}})
		err = d.Start(context.Background(), driver.Instance{Target: target, Name: "web-0"})
		if err == nil {
			var conn driver.Conn
			if conn, err = d.Open(context.Background(), driver.Request{Target: target, Instance: "web-0"}); err == nil {
				var run func(context.Context, driver.Stdio) error
				if run, err = conn.(driver.Execer).Exec(context.Background(), driver.ExecOptions{Command: []string{fmt.Sprintf("/proc/%d/exe", os.Getpid())}}); err == nil {
					err = run(context.Background(), driver.Stdio{Stdout: os.Stdout})
				}
			}
		}
		fmt.Println(err)
		d.Close()
		os.Exit(0)
	}
	for _, pid := range []int{os.Getpid(), os.Getppid()} {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			_, err = unix.PidfdGetfd(fd, 2, 0)
		}
		fmt.Println(err)
	}
	os.Exit(0)
}

func TestCommandsCannotTakeTheirShimsFiles(t *testing.T) {
	agent := exec.Command("/proc/self/exe")
	agent.Env = append(os.Environ(), envHelperThief+"=agent", "TMPDIR=/tmp")
	if os.Getuid() == 0 {
		// Nothing is kept from root.
		agent.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	agent.Dir = "/"
	out, err := agent.CombinedOutput()
	if err != nil {
		t.Fatal(err, string(out))
	}
	lines := strings.Split(string(out), "\n")
	if lines[0] != "<nil>" {
		skip(t, "taking files is impossible here: ", string(out))
	}
	if want := []string{"<nil>", "operation not permitted", "<nil>", ""}; !slices.Equal(lines, want) {
		t.Errorf("taking its own, its shim's, and the end: %q, want %q", lines, want)
	}
}

func TestShimIsNothingForUsers(t *testing.T) {
	c := exec.Command("/proc/self/exe", "-test.run=^$")
	c.Args[0] = "aaserver: shim"
	out, err := c.CombinedOutput()
	exit, ok := err.(*exec.ExitError)
	if !ok || exit.ExitCode() != 2 || !strings.Contains(string(out), `Run "aaserver" instead`) {
		t.Errorf("%v, output %q", err, out)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestNoFilesAreLeaked(t *testing.T) {
	use := func() {
		d, err := New(Options{Dir: t.TempDir(), LogFileSize: 1000})
		if err != nil {
			t.Fatal(err)
		}
		for _, tty := range []bool{false, true} {
			source := script("seq 200; cat")
			source.Stdin, source.TTY = true, tty
			target := newTarget(source)
			id := start(t, d, target)
			c := open(t, d, target)
			for _, execTTY := range []bool{false, true} {
				run, err := c.Exec(t.Context(), driver.ExecOptions{Command: []string{"cat", "/etc/passwd"}, TTY: execTTY})
				if err != nil {
					t.Fatal(err)
				}
				if err := run(t.Context(), driver.Stdio{Stdout: io.Discard, Stdin: io.NopCloser(strings.NewReader(""))}); err != nil {
					t.Fatal(err)
				}
				// It fails late: the kernel doesn't know what this is.
				file := filepath.Join(t.TempDir(), "file")
				if err := os.WriteFile(file, []byte("no program\x00"), 0o755); err != nil {
					t.Fatal(err)
				}
				run, err = c.Exec(t.Context(), driver.ExecOptions{Command: []string{file}, TTY: execTTY})
				if err != nil {
					t.Fatal(err)
				}
				if err := run(t.Context(), driver.Stdio{Stdout: io.Discard}); driver.KindOf(err) != driver.Invalid {
					t.Errorf("error %v, want Invalid", err)
				}
			}
			for _, follow := range []bool{false, true} {
				r, err := c.Logs(t.Context(), driver.LogOptions{Follow: follow})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := r.Next(t.Context()); err != nil {
					t.Fatal(err)
				}
				if tty {
					r.Close()
				} else {
					defer r.Close() // after the driver's
				}
			}
			if err := d.Stop(t.Context(), id, 0); err != nil {
				t.Fatal(err)
			}
			awaitEnd(t, d, id)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	use() // whatever is opened once is open now
	before := openFiles(t)
	for range 3 {
		use()
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, %d were before", after, before)
	}
}
