package e2e

import (
	"fmt"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

// restConfig is the client's, for tests that are clients themselves.
func (c *client) restConfig() *rest.Config {
	c.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		c.t.Fatal(err)
	}
	return config
}

// number reads a path of the server's, and returns what the expression finds in
// it.
func (c *client) number(path string, in *regexp.Regexp) float64 {
	c.t.Helper()
	text := c.kubectl("get", "--raw", path)
	found := in.FindStringSubmatch(text)
	if found == nil {
		c.t.Fatalf("%s has no %s", path, in)
	}
	n, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return n
}

var (
	heapInUse = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)`)
	execOut   = regexp.MustCompile(`(?m)^aaserver_session_bytes_total\{direction="out",subresource="exec"\} (\S+)`)
)

// gate is a client's stdout that takes nothing until it is opened.
type gate struct {
	open chan struct{}
	got  int64
}

func newGate() *gate { return &gate{open: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.got += int64(len(p))
	return len(p), nil
}

// TestStalledClientsOfAGibibyte: a command that writes a gibibyte to a client
// that takes nothing costs the server no more than its buffers, and the client
// gets all of it when it goes on.
func TestStalledClientsOfAGibibyte(t *testing.T) {
	const (
		size     = 1 << 30
		sessions = 4
		// most is what a session may add to the server's heap.
		most = 512 << 10
	)
	s := startServer(t, t.TempDir(), "--profiling")
	s.kubectlStdin(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: web}
spec:
  process: {command: [sleep, "100000"]}
`, "create", "-f", "-")
	s.kubectl("wait", "target/web", "--for=condition=Ready", "--timeout=30s")
	config := s.restConfig()
	address := func(bytes int) *url.URL {
		u, err := url.Parse(config.Host)
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/apis/streaming.aaserver.io/v1/namespaces/default/targets/web/exec"
		u.RawQuery = url.Values{"stdout": {"true"}, "command": {"head", "-c", strconv.Itoa(bytes), "/dev/zero"}}.Encode()
		return u
	}
	executors := map[string]func(u *url.URL) (remotecommand.Executor, error){
		"WebSocket": func(u *url.URL) (remotecommand.Executor, error) {
			return remotecommand.NewWebSocketExecutor(config, http.MethodGet, u.String())
		},
		"SPDY": func(u *url.URL) (remotecommand.Executor, error) {
			return remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
		},
	}
	// What is begun in the background, and what pools keep over one collection,
	// isn't a session's either: the heap is looked at once it stays as it is.
	settled := func() (now float64) {
		s.eventually("the heap stays as it is", time.Minute, func() error {
			const heap, still = "/debug/pprof/heap?gc=1&debug=1", 64 << 10
			last := now
			if now = s.number(heap, heapInUse); math.Abs(now-last) > still {
				return fmt.Errorf("it went from %.0f to %.0f bytes", last, now)
			}
			return nil
		})
		return now
	}
	for name, executor := range executors {
		t.Run(name, func(t *testing.T) {
			run := func(bytes int, out *gate) error {
				e, err := executor(address(bytes))
				if err != nil {
					return err
				}
				if err := e.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: out}); err != nil {
					return err
				}
				if out.got != int64(bytes) {
					return fmt.Errorf("the client got %d bytes, want %d", out.got, bytes)
				}
				return nil
			}
			// What is made once isn't a session's.
			first := newGate()
			close(first.open)
			if err := run(1<<20, first); err != nil {
				t.Fatal(err)
			}
			before, unsent := settled(), s.number("/metrics", execOut)
			stalled := newGate()
			var clients errgroup.Group
			for range sessions {
				clients.Go(func() error { return run(size, &gate{open: stalled.open}) })
			}
			defer func() {
				close(stalled.open)
				if err := clients.Wait(); err != nil {
					t.Error(err)
				}
			}()
			// Stalled is what sends no more for a second, having sent something.
			sent, since := unsent, time.Now()
			s.eventually("the clients are stalled", time.Minute, func() error {
				if now := s.number("/metrics", execOut); now != sent {
					sent, since = now, time.Now()
				}
				if sent == unsent || time.Since(since) < time.Second {
					return fmt.Errorf("%.0f bytes sent", sent-unsent)
				}
				return nil
			})
			if grown := settled() - before; grown > sessions*most {
				t.Errorf("the heap has grown by %.0f bytes for %d stalled sessions, want at most %d for each", grown, sessions, most)
			} else {
				t.Logf("%.0f bytes of heap for each stalled session", grown/sessions)
			}
		})
	}
}
