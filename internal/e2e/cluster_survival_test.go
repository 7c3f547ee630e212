//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

// peerTimeout is what both sides are told to believe in a silent peer for.
const peerTimeout = 5 * time.Second

// TestStreamsSurvive cuts every kind of stream in the middle, in every way that
// happens: the server, kube-apiserver and the network fail. Logs go on without a
// line lost or twice, forwards and copies go on by themselves, and what can't go
// on ends in bounded time and says so.
func TestStreamsSurvive(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	a := c.serve(t, serveOptions{args: []string{"--stream-peer-timeout=" + peerTimeout.String(), "--stream-ping-interval=1s"}})
	s := &survival{aggregated: a, ns: c.namespace(t, "survival"), network: newNetwork(t, strings.TrimPrefix(c.info.APIServerURL, "https://"))}
	s.behindNetwork(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s.create(s.ns, fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: echo}
spec:
  agentName: local
  process: {command: [%s]}
  ports: [{name: echo, port: 7}]
`, self), "echo")
	s.create(s.ns, strings.Replace(strings.Replace(sleeper("ticks", ""), `[sleep, ""]`, `[sh, -c, 'i=0; while :; do i=$((i+1)); echo "line $i"; sleep 0.02; done']`, 1), "spec:\n", "spec:\n  replicas: 3\n", 1), "ticks")

	log := s.followAll(t)
	forwarded := s.forward(t)
	for _, cut := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"the network resets connections", func(*testing.T) { s.cutNetwork(resetting, time.Second) }},
		{"the network closes connections", func(*testing.T) { s.cutNetwork(refusing, time.Second) }},
		{"the network loses everything", func(*testing.T) { s.cutNetwork(losing, 2*peerTimeout) }},
		{"kube-apiserver is killed", func(t *testing.T) {
			c.component(t, "stop", "kube-apiserver", "--kill")
			c.component(t, "start", "kube-apiserver")
		}},
		{"the server is restarted", func(*testing.T) {
			s.stop(syscall.SIGTERM, drainTimeout+drainMargin)
			s.start()
		}},
		{"the server is killed", func(*testing.T) {
			s.stop(syscall.SIGKILL, drainMargin)
			s.start()
		}},
	} {
		t.Run(cut.name, func(t *testing.T) {
			ends := s.sessions(t)
			copies := s.copies(t)
			open := forwarded.open(t)
			cut.do(t)
			s.waitReady()
			s.waitWorks()
			s.waitTarget(s.ns, "echo")
			for _, end := range ends {
				end(t)
			}
			open(t)
			forwarded.works(t, 90*time.Second)
			for _, copied := range copies {
				copied(t)
			}
		})
	}
	forwarded.stop(t)
	s.wantWholeLogs(t, log)
}

type survival struct {
	*aggregated
	ns      string
	network *network
	// user is a client on the other side of the network.
	user *client
}

// behindNetwork makes a client that reaches kube-apiserver through the network.
func (s *survival) behindNetwork(t *testing.T) {
	t.Helper()
	config, err := clientcmd.LoadFromFile(s.cluster.info.AdminKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, cluster := range config.Clusters {
		cluster.Server = "https://" + s.network.address()
	}
	s.user = &client{t: t, dir: t.TempDir()}
	s.user.kubeconfig = filepath.Join(s.user.dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, s.user.kubeconfig); err != nil {
		t.Fatal(err)
	}
}

func (s *survival) cutNetwork(how condition, lasts time.Duration) {
	s.network.set(how)
	time.Sleep(lasts) // how long it is down, not a wait for anything
	s.network.set(passing)
}

// plugin is a command of the plugin, for a user behind the network.
func (s *survival) plugin(args ...string) []string {
	return append([]string{"--peer-timeout=" + peerTimeout.String(), "-n", s.ns}, args...)
}

// followAll follows the logs of all instances of ticks until the test ends.
func (s *survival) followAll(t *testing.T) *lines {
	log := startLines(t, s.user.command(t.Context(), binaries.plugin, s.plugin("logs", "-f", "-l", "app=ticks", "--tail=-1", "--prefix", "--timestamps")...))
	for i := range 3 {
		log.wait(t, fmt.Sprintf("ticks-%d]", i))
	}
	return log
}

var followedLine = regexp.MustCompile(`(?m)^\[(?:ticks/)?(ticks-\d)\] (.*)$`)

// wantWholeLogs compares what was followed with what the server has, line by
// line: times strictly increase in each instance's log, so that equal texts are
// the same lines.
func (s *survival) wantWholeLogs(t *testing.T, log *lines) {
	t.Helper()
	for i := range 3 {
		instance := fmt.Sprintf("ticks-%d", i)
		var stored string
		s.eventually("the whole log was followed: "+instance, 30*time.Second, func() error {
			if stored == "" {
				body, err := s.cluster.kube.Discovery().RESTClient().Get().
					RequestURI(targetPath(s.ns, "ticks", "log", "instance="+instance, "resumeAfter=2000-01-01T00:00:00Z", "timestamps=true")).Do(t.Context()).Raw()
				if err != nil {
					return err
				}
				stored = string(body)
			}
			var followed strings.Builder
			for _, match := range followedLine.FindAllStringSubmatch(log.String(), -1) {
				if match[1] == instance {
					followed.WriteString(match[2] + "\n")
				}
			}
			got := followed.String()
			if strings.HasPrefix(got, stored) {
				return nil
			}
			if strings.HasPrefix(stored, got) {
				return fmt.Errorf("%d of %d bytes have come", len(got), len(stored))
			}
			at := 0
			for at < len(got) && at < len(stored) && got[at] == stored[at] {
				at++
			}
			from := max(0, at-200)
			t.Fatalf("%s: what was followed isn't what was logged. Followed:\n%s\nLogged:\n%s", instance, tail(got[from:min(len(got), at+400)], 1000), tail(stored[from:min(len(stored), at+400)], 1000))
			return nil
		})
		t.Logf("%s: %d lines", instance, strings.Count(stored, "\n"))
	}
}

// sessions starts an exec and an attach, which can't go on after a cut: they end
// soon with an exit code of their own, and leave nothing behind.
func (s *survival) sessions(t *testing.T) []func(t *testing.T) {
	t.Helper()
	marker := newMarker()
	var ends []func(*testing.T)
	for name, args := range map[string][]string{
		"exec":   {"exec", "-i", "echo", "--", "sh", "-c", "sleep " + marker + " & echo begun; wait"},
		"attach": {"attach", "ticks"},
	} {
		cmd := s.user.command(t.Context(), binaries.plugin, s.plugin(args...)...)
		var stdout firstOutput
		var stderr bytes.Buffer
		stdout.begun = make(chan struct{})
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			cmd.Wait()
			close(ended)
		}()
		t.Cleanup(func() {
			cmd.Process.Kill()
			<-ended
			stdin.Close()
		})
		select {
		case <-stdout.begun:
		case <-ended:
			t.Fatalf("%s ended with %s before the cut: %s", name, cmd.ProcessState, stderr.String())
		case <-time.After(30 * time.Second):
			t.Fatalf("%s didn't begin: %s", name, stderr.String())
		}
		ends = append(ends, func(t *testing.T) {
			select {
			case <-ended:
			case <-time.After(4 * peerTimeout):
				t.Fatalf("%s hangs", name)
			}
			const lostConnection = 125
			if code := cmd.ProcessState.ExitCode(); code != lostConnection || !strings.Contains(stderr.String(), "lost") && !strings.Contains(stderr.String(), "shutting down") {
				t.Errorf("%s ended with exit code %d, want %d, and says %q", name, code, lostConnection, stderr.String())
			}
		})
	}
	return append(ends, func(t *testing.T) { wantMarked(t, marker, 0, 4*peerTimeout) })
}

// firstOutput tells when something is written.
type firstOutput struct {
	once  sync.Once
	begun chan struct{}
}

func (f *firstOutput) Write(p []byte) (int, error) {
	f.once.Do(func() { close(f.begun) })
	return len(p), nil
}

// copySize is more than goes through before the cut.
const copySize = 256 << 20

// copies starts to copy a file each way. Both arrive whole, by themselves.
func (s *survival) copies(t *testing.T) []func(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	content := make([]byte, copySize)
	rand.Read(content)
	if err := os.WriteFile(source, content, 0o600); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(content)
	var ends []func(*testing.T)
	for name, way := range map[string]struct {
		from, to, arrives string
	}{
		"to the target":   {source, "echo:" + filepath.Join(dir, "up", "copy"), filepath.Join(dir, "up", "copy")},
		"from the target": {"echo:" + source, filepath.Join(dir, "down", "copy"), filepath.Join(dir, "down", "copy")},
	} {
		if err := os.Mkdir(filepath.Dir(way.arrives), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := s.user.command(t.Context(), binaries.plugin, s.plugin("cp", "--retries=100", way.from, way.to)...)
		var output bytes.Buffer
		cmd.Stdout, cmd.Stderr = &output, &output
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			cmd.Wait()
			close(ended)
		}()
		t.Cleanup(func() {
			cmd.Process.Kill()
			<-ended
		})
		eventually(t, "the copy "+name+" has begun", 30*time.Second, func() error {
			begun, err := os.ReadDir(filepath.Dir(way.arrives))
			if err == nil && len(begun) == 0 {
				err = errors.New("nothing has arrived")
			}
			return err
		})
		ends = append(ends, func(t *testing.T) {
			select {
			case <-ended:
			case <-time.After(2 * time.Minute):
				t.Fatalf("the copy %s hangs", name)
			}
			if !cmd.ProcessState.Success() {
				t.Fatalf("the copy %s: %s: %s", name, cmd.ProcessState, output.String())
			}
			got, err := os.ReadFile(way.arrives)
			if err != nil {
				t.Fatal(err)
			}
			if sha256.Sum256(got) != want {
				t.Errorf("the copy %s has %d bytes, and isn't what was sent", name, len(got))
			}
		})
	}
	return ends
}

// forwarding is a port-forward with traffic.
type forwarding struct {
	tcp    string
	cancel context.CancelFunc
	done   chan struct{}

	good, cut atomic.Int64
	bytes     atomic.Int64
	lies      chan error
}

var forwardingFrom = regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+)`)

// forward forwards to echo until the test ends, with one connection after the
// other over it.
func (s *survival) forward(t *testing.T) *forwarding {
	t.Helper()
	out := startLines(t, s.user.command(t.Context(), binaries.plugin, s.plugin("port-forward", "--address=127.0.0.1", "echo", ":echo")...))
	out.wait(t, "Forwarding from 127.0.0.1:")
	f := &forwarding{tcp: forwardingFrom.FindStringSubmatch(out.String())[1], done: make(chan struct{}), lies: make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	f.cancel = cancel
	go func() {
		defer close(f.done)
		for ctx.Err() == nil {
			err := f.exchange(ctx, 1<<20)
			switch lie := (*lieError)(nil); {
			case err == nil:
				f.good.Add(1)
			case errors.As(err, &lie):
				select {
				case f.lies <- err:
				default:
				}
			default:
				f.cut.Add(1)
				time.Sleep(20 * time.Millisecond) // it is down: no busy loop
			}
		}
	}()
	t.Cleanup(cancel)
	return f
}

// lieError is a connection that ended as if all were well, and wasn't.
type lieError struct{ text string }

func (e *lieError) Error() string { return e.text }

// exchange sends so many bytes over a new connection, and gets them back.
func (f *forwarding) exchange(ctx context.Context, size int) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", f.tcp)
	if err != nil {
		return &lieError{fmt.Sprintf("the listener has gone: %v", err)}
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// Longer than everything that may keep it waiting: a session to be made.
	conn.SetDeadline(time.Now().Add(time.Minute))
	sent := make([]byte, size)
	rand.Read(sent)
	go func() {
		if _, err := conn.Write(sent); err == nil {
			conn.(*net.TCPConn).CloseWrite()
		}
	}()
	got, err := io.ReadAll(conn)
	f.bytes.Add(int64(len(got)))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &lieError{fmt.Sprintf("a connection hangs after %d of %d bytes", len(got), size)}
	case err != nil && !bytes.HasPrefix(sent, got):
		return &lieError{"other bytes came than were sent, before the connection broke"}
	case err != nil || ctx.Err() != nil:
		return err
	case !bytes.Equal(got, sent):
		return &lieError{fmt.Sprintf("a connection ended in order after %d of %d bytes", len(got), size)}
	}
	return nil
}

// open opens a connection that lasts. After a cut it has to end, and to be seen
// to have ended.
func (f *forwarding) open(t *testing.T) func(t *testing.T) {
	t.Helper()
	f.works(t, time.Minute)
	conn, err := net.Dial("tcp", f.tcp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	buf := make([]byte, 5)
	io.WriteString(conn, "hello")
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "hello" {
		t.Fatalf("%q, %v", buf, err)
	}
	return func(t *testing.T) {
		conn.SetDeadline(time.Now().Add(4 * peerTimeout))
		n, err := conn.Read(buf)
		if n > 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a connection that was open reads %d bytes, %v: want a reset", n, err)
		}
	}
}

// works waits for a connection that goes well.
func (f *forwarding) works(t *testing.T, within time.Duration) {
	t.Helper()
	before := f.good.Load()
	eventually(t, "a new connection works", within, func() error {
		select {
		case lie := <-f.lies:
			t.Fatal(lie)
		default:
		}
		if f.good.Load() < before+2 { // one may be from before
			return fmt.Errorf("%d connections went well, %d broke", f.good.Load(), f.cut.Load())
		}
		return nil
	})
}

func (f *forwarding) stop(t *testing.T) {
	f.cancel()
	<-f.done
	select {
	case lie := <-f.lies:
		t.Error(lie)
	default:
	}
	t.Logf("%d connections went well, %d broke; %d MiB came back", f.good.Load(), f.cut.Load(), f.bytes.Load()>>20)
}
