package shim_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"aaserver.io/aaserver/internal/driver/process/shim"

	// The server links these; see TestShimComesBeforeKubernetes.
	_ "k8s.io/apiserver/pkg/server/options"
)

// TestShimComesBeforeKubernetes fails if the shim waits for the initialisation
// of packages that it doesn't need, which would be paid for by every exec.
func TestShimComesBeforeKubernetes(t *testing.T) {
	initialised := func(name string) []byte {
		c := exec.Command("/proc/self/exe", "-test.run=^$")
		c.Args[0] = name
		c.Env = []string{"GODEBUG=inittrace=1"}
		var out bytes.Buffer
		c.Stderr = &out
		c.Run() // a shim without a control connection fails
		return out.Bytes()
	}
	// Small packages that need nothing may come before it by their order.
	program, early := initialised("a program"), initialised(shim.Name)
	for _, prefix := range []string{"init k8s.io/apiserver/", "init k8s.io/client-go/", "init k8s.io/api/", "init google.golang.org/protobuf/"} {
		if !bytes.Contains(program, []byte(prefix)) {
			t.Errorf("%s isn't linked: the test is wrong", prefix)
		}
		if bytes.Contains(early, []byte(prefix)) {
			t.Errorf("the shim waits for packages:\n%s", early)
		}
	}
	if all, few := bytes.Count(program, []byte("\ninit ")), bytes.Count(early, []byte("\ninit ")); few > all/5 {
		t.Errorf("the shim waits for %d packages of %d:\n%s", few, all, early)
	}
}

func TestCommandsSurviveTheWire(t *testing.T) {
	for name, c := range map[string]shim.Command{
		"everything": {
			Path: "/bin/sh", Args: []string{"sh", "", "ü\n"}, Env: []string{"A=1", "B="}, Dir: "/tmp", TTY: true,
			Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: []uint32{3, 1<<32 - 1}},
		},
		"little":          {Path: "/bin/true", Args: []string{"true"}},
		"nobody's groups": {Path: "/bin/true", Credential: &syscall.Credential{Uid: 1, Gid: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			wire := shim.Encode(&c)
			got, err := shim.Decode(wire)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c, got); diff != "" {
				t.Errorf("command (-want +got):\n%s", diff)
			}
			for n := range wire {
				// Whatever is missing, nothing is read that isn't there.
				shim.Decode(wire[:n])
			}
		})
	}
}

// BenchmarkCommand is what it takes to run a command to its end, in a program
// that links what the server does.
func BenchmarkCommand(b *testing.B) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	for b.Loop() {
		c, err := shim.Start("bench", &shim.Command{Path: "/bin/true", Args: []string{"true"}, Dir: "/"}, null, null, null)
		if err != nil {
			b.Fatal(err)
		}
		if result := c.Wait(); result.Status != 0 || result.Lost {
			b.Fatalf("%+v", result)
		}
	}
}

// BenchmarkBareCommand is the same without a shim.
func BenchmarkBareCommand(b *testing.B) {
	for b.Loop() {
		if err := exec.Command("/bin/true").Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// awaitReserve waits until a shim is in reserve.
func awaitReserve(t *testing.T, s *shim.Starter) int {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if pid := s.Reserve(); pid != 0 {
			return pid
		}
		if time.Now().After(deadline) {
			t.Fatal("no shim is made in reserve")
		}
	}
}

// echo runs a command under a shim and returns its shim's pid.
func echo(t *testing.T, s *shim.Starter) int {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c, err := s.Start("shop/web-0 exec", &shim.Command{
		// That which starts it is its shim, by the title that it was given.
		Path: "/bin/sh", Args: []string{"sh", "-c", `tr '\000' ' ' </proc/$PPID/cmdline`}, Env: []string{"PATH=/usr/bin:/bin"}, Dir: "/",
	}, null, w, w)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("aaserver: shim shop/web-0 exec", strings.TrimRight(string(out), " \n")); diff != "" {
		t.Errorf("the shim's command line (-want +got):\n%s", diff)
	}
	if result := c.Wait(); result.Status != 0 || result.Lost || result.Left != 0 {
		t.Errorf("the command ended with %+v", result)
	}
	return c.Shim()
}

func gone(pid int) bool {
	return syscall.Kill(pid, 0) == syscall.ESRCH
}

func TestStarterKeepsAShimInReserve(t *testing.T) {
	var s shim.Starter
	defer s.Close()
	echo(t, &s) // there is none for the first
	for range 3 {
		reserve := awaitReserve(t, &s)
		if used := echo(t, &s); used != reserve {
			t.Errorf("the shim %d was used, and not %d, which was in reserve", used, reserve)
		}
	}
	// One that was killed is none.
	killed := awaitReserve(t, &s)
	if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if used := echo(t, &s); used == killed {
		t.Errorf("the shim %d was used, which had been killed", used)
	}
	// One that was stopped goes on, and before it would be given up.
	stopped := awaitReserve(t, &s)
	if err := syscall.Kill(stopped, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if used := echo(t, &s); used != stopped {
		t.Errorf("the shim %d was used, and not %d, which had been stopped", used, stopped)
	}
	// Nor does one that can't run its command, come back.
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	failing := awaitReserve(t, &s)
	_, err = s.Start("fails", &shim.Command{Path: "/does/not/exist", Args: []string{"x"}, Dir: "/"}, null, null, null)
	if start, ok := errors.AsType[*shim.StartError](err); !ok || start.Errno != syscall.ENOENT {
		t.Errorf("got %v, want ENOENT", err)
	}
	if !gone(failing) {
		t.Errorf("the shim %d is left, whose command couldn't be started", failing)
	}
	last := awaitReserve(t, &s)
	s.Close()
	if !gone(last) || s.Reserve() != 0 {
		t.Errorf("the shim %d is left", last)
	}
	// What is started after that works, and leaves nothing.
	echo(t, &s)
	if pid := s.Reserve(); pid != 0 {
		t.Errorf("the shim %d was made after the end", pid)
	}
}
