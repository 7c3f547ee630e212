package shim_test

import (
	"bytes"
	"os"
	"os/exec"
	"syscall"
	"testing"

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
