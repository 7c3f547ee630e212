package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// breaking relays connections to a server, and resets those that have carried so
// many bytes, as long as there are numbers.
type breaking struct {
	listener net.Listener
	to       string
	done     sync.WaitGroup

	mu     sync.Mutex // protects what follows
	after  []int64
	broken int
	open   map[net.Conn]bool
}

func startBreaking(t *testing.T, to string) *breaking {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &breaking{listener: listener, to: to, open: map[net.Conn]bool{}}
	b.done.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			b.done.Go(func() { b.relay(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		b.mu.Lock()
		for c := range b.open {
			c.Close()
		}
		b.mu.Unlock()
		b.done.Wait()
	})
	return b
}

func (b *breaking) relay(client *net.TCPConn) {
	defer client.Close()
	c, err := net.Dial("tcp", b.to)
	if err != nil {
		return
	}
	server := c.(*net.TCPConn)
	defer server.Close()
	b.mu.Lock()
	b.open[client], b.open[server] = true, true
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.open, client)
		delete(b.open, server)
	}()
	var carried int64
	var mu sync.Mutex // protects carried
	count := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		carried += int64(n)
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.after) == 0 || carried < b.after[0] {
			return true
		}
		b.after = b.after[1:]
		b.broken++
		return false
	}
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		both.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := way[0].Read(buf)
				if !count(n) {
					client.SetLinger(0)
					server.SetLinger(0)
					client.Close()
					server.Close()
					return
				}
				if n > 0 {
					if _, err := way[1].Write(buf[:n]); err != nil {
						return
					}
				}
				if err == io.EOF {
					way[1].CloseWrite()
				}
				if err != nil {
					return
				}
			}
		})
	}
	both.Wait()
}

// treeOf describes everything in a directory.
func treeOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		text := fmt.Sprint(info.Mode(), " ", info.ModTime().UnixNano())
		if target, err := os.Readlink(path); err == nil {
			text += " -> " + target
		} else if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %x", sha256.Sum256(b))
		}
		all[name] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestCopyOverAConnectionThatBreaks(t *testing.T) {
	s := startServer(t, t.TempDir())
	config, err := os.ReadFile(s.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	_, address, _ := strings.Cut(string(config), "server: https://")
	address, _, _ = strings.Cut(address, "\n")
	relay := startBreaking(t, strings.TrimSpace(address))
	through := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(through, []byte(strings.ReplaceAll(string(config), strings.TrimSpace(address), relay.listener.Addr().String())), 0o600); err != nil {
		t.Fatal(err)
	}
	user := &client{t: t, dir: t.TempDir(), kubeconfig: through}

	dir := t.TempDir()
	remote := filepath.Join(dir, "remote")
	source := filepath.Join(dir, "source")
	random := rand.NewChaCha8([32]byte{5})
	file := func(name string, size int) {
		t.Helper()
		b := make([]byte, size)
		random.Read(b)
		name = filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, time.Unix(1e9, int64(size))); err != nil {
			t.Fatal(err)
		}
	}
	file("big", 24<<20)
	for i := range 600 {
		file(fmt.Sprintf("many/%d/%d", i%20, i), i*20)
	}
	if err := os.Symlink("big", filepath.Join(source, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(remote, 0o755); err != nil {
		t.Fatal(err)
	}
	s.kubectlStdin(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: files}
spec: {process: {command: [sleep, "100000"], workingDir: "`+remote+`"}}
`, "apply", "-f", "-")
	s.kubectl("wait", "--for=condition=Ready", "target/files", "--timeout=60s")
	want := treeOf(t, source)
	for _, c := range []struct{ what, from, to, copied string }{
		{"up", source, "files:copy", filepath.Join(remote, "copy")},
		{"down", "files:copy", filepath.Join(dir, "back"), filepath.Join(dir, "back")},
	} {
		relay.mu.Lock()
		relay.after, relay.broken = []int64{200_000, 7 << 20, 9 << 20, 11 << 20}, 0
		relay.mu.Unlock()
		r := user.target("cp", c.from, c.to)
		if r.code != 0 {
			t.Fatalf("%s: exit code %d, stderr %s", c.what, r.code, r.stderr)
		}
		relay.mu.Lock()
		broken := relay.broken
		relay.mu.Unlock()
		if broken != 4 || strings.Count(r.stderr, "going on in") != 4 {
			t.Errorf("%s: %d connections were broken, want 4; stderr %s", c.what, broken, r.stderr)
		}
		if diff := cmp.Diff(want, treeOf(t, c.copied)); diff != "" {
			t.Errorf("%s: the copy differs (-want +got):\n%s", c.what, diff)
		}
	}

	// It is an exec like any other, of a process like any other.
	if r := user.target("cp", "files:/proc/self/cmdline", filepath.Join(dir, "cmdline")); r.code != 0 {
		t.Fatalf("stderr %s", r.stderr)
	}
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil || string(line) != "aaserver:files\x00send\x00--\x00/proc/self/cmdline\x00" {
		t.Errorf("the command is %q, %v", line, err)
	}
	if r := user.target("cp", "files:none", dir); r.code != 1 {
		t.Errorf("exit code %d", r.code)
	} else {
		wantContains(t, "a file that isn't there", r.stderr, "on target files: none: no such file or directory")
	}
}
