package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/klog/v2"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// network is a way to the server that can be cut.
type network struct {
	listener net.Listener
	to       string

	mu      sync.Mutex
	conns   []net.Conn
	stalled chan struct{} // closed while bytes pass
	wg      sync.WaitGroup
}

// through puts a network before the server; kubeconfigs that are made from now
// on lead through it.
func (s *testServer) through() *network {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	n := &network{listener: l, to: s.srv.Listener.Addr().String(), stalled: make(chan struct{})}
	close(n.stalled)
	n.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", n.to)
			if err != nil {
				client.Close()
				continue
			}
			n.mu.Lock()
			n.conns = append(n.conns, client, server)
			n.mu.Unlock()
			n.wg.Go(func() { n.pass(client, server) })
			n.wg.Go(func() { n.pass(server, client) })
		}
	})
	s.t.Cleanup(func() {
		l.Close()
		n.resume()
		n.reset()
		n.wg.Wait()
	})
	s.srv.URL = "https://" + l.Addr().String()
	return n
}

func (n *network) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		count, err := from.Read(buf)
		n.mu.Lock()
		stalled := n.stalled
		n.mu.Unlock()
		<-stalled
		if count > 0 {
			if _, err := to.Write(buf[:count]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// stall lets nothing pass any more, on the connections that there are.
func (n *network) stall() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stalled = make(chan struct{})
}

func (n *network) resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.stalled:
	default:
		close(n.stalled)
	}
}

// reset cuts all connections.
func (n *network) reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, conn := range n.conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		conn.Close()
	}
	n.conns = nil
}

func TestFollowNoticesASilentNetwork(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/2 is pinged": true, "an HTTP/1.1 log is opened anew": false} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			if !http2 {
				t.Setenv("DISABLE_HTTP2", "true")
			}
			server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
			logs := &logs{t: t, logs: map[string]*logOf{}}
			server.log = logs.serve
			logs.of("web-0").write(at(1, "one"))
			network := server.through()
			cmd := server.start(nil, "logs", "-f", "web", "--peer-timeout=1s")
			until(t, "the line", func() bool { return cmd.out.String() == "one\n" })
			network.stall()
			logs.of("web-0").write(at(2, "two"))
			until(t, "the warning", func() bool {
				return strings.HasPrefix(cmd.errOut.String(), "warning: the connection to the server was lost")
			})
			network.resume()
			until(t, "the rest", func() bool { return cmd.out.String() == "one\ntwo\n" })
			until(t, "the end of the warning", func() bool { return strings.HasSuffix(cmd.errOut.String(), regained) })
			cmd.cancel(terminated{syscall.SIGINT})
			if code := cmd.wait(); code != 130 {
				t.Errorf("exit code %d, want 130", code)
			}
		})
	}
}

func TestQuietLogOverHTTP1IsOpenedAnewWithoutAWord(t *testing.T) {
	noLeaks(t)
	t.Setenv("DISABLE_HTTP2", "true")
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "one"))
	cmd := server.start(nil, "logs", "-f", "web", "--peer-timeout=1s")
	until(t, "openings", func() bool { return len(logs.of("web-0").openings()) > 2 })
	logs.of("web-0").write(at(2, "two"))
	until(t, "the next line", func() bool { return cmd.out.String() == "one\ntwo\n" })
	if got := cmd.errOut.String(); got != "" {
		t.Errorf("stderr %q, want none", got)
	}
}

func TestFollowThroughResets(t *testing.T) {
	noLeaks(t)
	const names, lines = 3, 600
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0, "web-1": 0, "web-2": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	network := server.through()
	texts := make([][]string, names)
	text := func(i, n int) string {
		// Some are longer than what is held of a line.
		return fmt.Sprintf("%d.%d.%s", i, n, strings.Repeat("x", (n%7)/6*(lineBuffer+n)))
	}
	for i := range names {
		logs.of(fmt.Sprint("web-", i)).write(timed(0, text(i, 0)))
		texts[i] = append(texts[i], text(i, 0))
	}
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--tail=-1", "-o", "json", "-q")
	total := names
	for n := 1; n < lines; n++ {
		for i := range names {
			logs.of(fmt.Sprint("web-", i)).write(timed(n, text(i, n)))
			texts[i] = append(texts[i], text(i, n))
			total++
		}
		if n%200 == 100 {
			// It is in the middle of something.
			before := len(cmd.out.String())
			until(t, "more output", func() bool { return len(cmd.out.String()) > before })
			network.reset()
		}
	}
	until(t, "all lines", func() bool {
		return strings.Count(cmd.out.String(), "\n")-strings.Count(cmd.out.String(), `"partial":true`) >= total
	})
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
	got := make([][]string, names)
	begun := map[string]string{}
	for object := range strings.Lines(cmd.out.String()) {
		var l logObject
		if err := json.Unmarshal([]byte(object), &l); err != nil {
			t.Fatal(err)
		}
		begun[l.Instance] += l.Line
		if l.Partial {
			continue
		}
		i, _ := strconv.Atoi(strings.TrimPrefix(l.Instance, "web-"))
		got[i] = append(got[i], begun[l.Instance])
		begun[l.Instance] = ""
	}
	for i := range names {
		if !slices.Equal(texts[i], got[i]) {
			t.Errorf("web-%d: %d lines, want %d, or others", i, len(got[i]), len(texts[i]))
		}
	}
	if got := cmd.errOut.String(); got != "" {
		t.Errorf("stderr %q, want none: it is to be quiet", got)
	}
}

// timed gives a line a time in milliseconds.
func timed(millisecond int, text string) string {
	return time.Date(2026, 1, 1, 0, 0, 0, millisecond*1e6, time.UTC).Format("2006-01-02T15:04:05.000000000Z07:00") + " " + text
}

func TestFollowOfAnInstanceThatPrintedNothingYet(t *testing.T) {
	for _, flags := range [][]string{{"web"}, {"web", "--tail=0"}, {"web", "--all-instances"}, {"-l", "app=shop", "--tail=0"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			noLeaks(t)
			web := process("web")
			server := newTestServer(t, instances(web, map[string]int{"web-0": 0}))
			logs := &logs{t: t, logs: map[string]*logOf{}}
			// The follower sees none of this.
			if slices.Contains(flags, "--tail=0") {
				logs.of("web-0").write(at(1, "old"))
			}
			logs.of("web-0").change(func(*logOf) {})
			var down atomic.Bool
			server.log = func(w http.ResponseWriter, r *http.Request, target string) {
				if down.Load() {
					http.Error(w, "starting", http.StatusServiceUnavailable)
					return
				}
				logs.serve(w, r, target)
			}
			cmd := server.start(nil, append([]string{"logs", "-f"}, flags...)...)
			following := func(n int) {
				t.Helper()
				until(t, "the stream", func() bool {
					count := 0
					for _, options := range logs.of("web-0").openings() {
						if options.Follow {
							count++
						}
					}
					return count >= n
				})
			}
			following(1)
			// While it is away the instance prints something, and runs anew.
			down.Store(true)
			logs.of("web-0").change(func(l *logOf) { l.cut++ })
			until(t, "the warning", func() bool { return cmd.errOut.String() != "" })
			logs.of("web-0").write(at(2, "in the gap"), at(3, "a new run"))
			server.apply(instances(web, map[string]int{"web-0": 1}))
			down.Store(false)
			following(2)
			logs.of("web-0").write(at(4, "later"))
			until(t, "the last line", func() bool { return strings.HasSuffix(cmd.out.String(), "later\n") })
			if diff := cmp.Diff("in the gap\na new run\nlater\n", cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			cmd.cancel(terminated{syscall.SIGINT})
			cmd.wait()
		})
	}
}

func TestFollowOfServersWithoutCursors(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0, "web-1": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	for _, name := range []string{"web-0", "web-1"} {
		logs.of(name).change(func(l *logOf) { l.noCursor = true })
	}
	cmd := server.start(nil, "logs", "-f", "web", "--all-instances")
	until(t, "the stream", func() bool { return len(logs.of("web-1").openings()) == 2 })
	logs.of("web-1").write(at(1, "one"))
	until(t, "the line", func() bool { return cmd.out.String() == "one\n" })
}

func TestPastOfManyInstancesIsInOrder(t *testing.T) {
	const targets, lines = 40, 30
	for name, flags := range map[string][]string{"printed": nil, "followed": {"-f"}} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			server := newTestServer(t)
			logs := &logs{t: t, logs: map[string]*logOf{}}
			server.log = func(w http.ResponseWriter, r *http.Request, target string) {
				options := decode[v1.TargetLogOptions](t, r)
				if options.AllInstances {
					// Each of the targets has one.
					options.AllInstances = false
					query := r.URL.Query()
					query.Set("allInstances", "false")
					query.Set("instance", target+"-0")
					r.URL.RawQuery = query.Encode()
				}
				logs.serve(w, r, target)
			}
			for i := range targets {
				name := fmt.Sprint("t", i)
				for n := range lines {
					logs.of(name + "-0").write(timed(n*targets+i, fmt.Sprint(n*targets+i)))
				}
				server.apply(instances(process(name), map[string]int{name + "-0": 0}))
			}
			cmd := server.start(nil, append([]string{"logs", "-l", "app=shop", "--tail=-1"}, flags...)...)
			until(t, "all lines", func() bool { return strings.Count(cmd.out.String(), "\n") >= targets*lines })
			var want strings.Builder
			for i := range targets * lines {
				fmt.Fprintln(&want, i)
			}
			if diff := cmp.Diff(want.String(), cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if flags == nil {
				if code := cmd.wait(); code != 0 {
					t.Errorf("exit code %d, want 0", code)
				}
			}
		})
	}
}

func TestInstancesThatComeLaterAreShownFromTheirFirstLine(t *testing.T) {
	noLeaks(t)
	// The verbosity is the process's.
	t.Cleanup(func() {
		if err := new(klog.Level).Set("0"); err != nil {
			t.Error(err)
		}
	})
	web := process("web")
	server := newTestServer(t, instances(web, map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "old"), at(2, "last"))
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--tail=1", "--prefix", "-v=1")
	until(t, "the tail", func() bool { return cmd.out.String() == "[web/web-0] last\n" })
	logs.of("web-1").write(at(3, "a"), at(4, "b"), at(5, "c"))
	server.apply(instances(web, map[string]int{"web-0": 0, "web-1": 0}))
	until(t, "all of it", func() bool { return strings.Count(cmd.out.String(), "\n") == 4 })
	if diff := cmp.Diff("[web/web-0] last\n[web/web-1] a\n[web/web-1] b\n[web/web-1] c\n", cmd.out.String()); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	logs.of("web-1").change(func(l *logOf) { l.ended = true })
	for _, want := range []string{"Following web/web-0.\n", "Following web/web-1.\n", "The log of web/web-1 has ended.\n"} {
		until(t, want, func() bool { return strings.Contains(cmd.errOut.String(), want) })
	}
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
	if got := ptr.Deref(logs.of("web-1").openings()[0].TailLines, -1); got != -1 {
		t.Errorf("the last %d lines were asked for, want all", got)
	}
}

func TestTheServersReasonIsTold(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	endings := []string{"503 the server is shutting down", "", "200 this is the end of the log"}
	var opened atomic.Int32
	server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
		if r.Header.Get(endTrailer) == "" {
			t.Error("the server isn't told that the trailer is known")
		}
		n := opened.Add(1) - 1
		w.Header().Set("Trailer", endTrailer)
		if int(n) >= len(endings) {
			t.Error("the log was opened after its end")
			return
		}
		io.WriteString(w, at(int(n)+1, fmt.Sprint(n))+"\n")
		w.(http.Flusher).Flush()
		if endings[n] != "" {
			w.Header().Set(endTrailer, endings[n])
		}
	}
	cmd := server.start(nil, "logs", "-f", "web")
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if diff := cmp.Diff("0\n1\n2\n", cmd.out.String()); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	want := strings.TrimSuffix(lostWarning, "\n") + ": the server is shutting down\n" + regained + lostWarning + regained
	if diff := cmp.Diff(want, cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
	// A log that isn't followed fails.
	opened.Store(0)
	cmd = server.start(nil, "logs", "web")
	if code := cmd.wait(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if diff := cmp.Diff("error: the log broke off: the server is shutting down\n", cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
}

type closedPipe struct{}

func (closedPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestClosedOutputEndsTheCommandQuietly(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "a"))
	for _, args := range [][]string{{"web"}, {"-f", "web"}, {"-f", "-l", "app=shop"}, {"web", "--prefix"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			cmd := startWith(t, genericiooptions.IOStreams{Out: closedPipe{}}, append([]string{"--kubeconfig", server.kubeconfig(), "logs"}, args...)...)
			if code := cmd.wait(); code != 141 {
				t.Errorf("exit code %d, want 141", code)
			}
			if got := cmd.errOut.String(); got != "" {
				t.Errorf("stderr %q, want none", got)
			}
		})
	}
}

// stuckPipe takes nothing until it is let go.
type stuckPipe struct {
	writing, free chan struct{}
	once          sync.Once
}

func (s *stuckPipe) Write(p []byte) (int, error) {
	s.once.Do(func() { close(s.writing) })
	<-s.free
	return len(p), nil
}

func TestInterruptEndsAFollowerWhoseOutputIsStuck(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0, "web-1": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	// More than is held.
	for n := range 2*mergeBudget/lineBuffer + 2 {
		logs.of("web-0").write(timed(n, strings.Repeat("x", lineBuffer)))
	}
	out := &stuckPipe{writing: make(chan struct{}), free: make(chan struct{})}
	cmd := startWith(t, genericiooptions.IOStreams{Out: out}, "--kubeconfig", server.kubeconfig(), "logs", "-f", "-l", "app=shop", "--tail=-1")
	select {
	case <-out.writing:
	case <-time.After(timeout):
		t.Fatal("nothing is written")
	}
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	close(out.free)
}

func TestInterruptEndsALogWhoseOutputIsStuck(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "one"))
	out := &stuckPipe{writing: make(chan struct{}), free: make(chan struct{})}
	free := sync.OnceFunc(func() { close(out.free) })
	defer free()
	cmd := startWith(t, genericiooptions.IOStreams{Out: out}, "--kubeconfig", server.kubeconfig(), "logs", "web")
	select {
	case <-out.writing:
	case <-time.After(timeout):
		t.Fatal("nothing is written")
	}
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
}

// logsAlone is a server that lets its user read the log of target web, which has
// one line, and nothing else.
func logsAlone(t *testing.T) (*testServer, *logs) {
	t.Helper()
	server := newTestServer(t, process("web"))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "one"))
	server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/log") {
			return false
		}
		writeError(w, apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("no")))
		return true
	}
	return server, logs
}

func TestLogAloneMayBeFollowed(t *testing.T) {
	// Who may read logs, and not targets, doesn't know the instances' names.
	noLeaks(t)
	server, logs := logsAlone(t)
	cmd := server.start(nil, "logs", "-f", "web", "--prefix")
	until(t, "the line", func() bool { return cmd.out.String() == "[web/web-0] one\n" })
	logs.of("web-0").change(func(l *logOf) { l.cut++ })
	until(t, "the warning", func() bool { return cmd.errOut.String() != "" })
	logs.of("web-0").write(at(2, "two"))
	until(t, "the next line", func() bool { return cmd.out.String() == "[web/web-0] one\n[web/web-0] two\n" })
	logs.of("web-0").change(func(l *logOf) { l.ended = true })
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// A server that says why it ends a log may do so in the middle of a line.
func TestFollowGoesOnAfterAnEndingInTheMiddleOfALine(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	var served atomic.Int32
	server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
		first := served.Add(1) == 1
		_ = streaming.ServeLog(w, r, true, streaming.Options{}, func(ctx context.Context, out io.Writer) error {
			if first {
				io.WriteString(out, at(1, "one")+"\n"+at(2, "tw"))
				return apierrors.NewServiceUnavailable("the server is shutting down")
			}
			io.WriteString(out, at(2, "two")+"\n"+at(3, "three")+"\n")
			<-ctx.Done()
			return ctx.Err()
		})
	}
	cmd := server.start(nil, "logs", "-f", "web")
	until(t, "the last line", func() bool { return strings.HasSuffix(cmd.out.String(), "three\n") })
	if diff := cmp.Diff("one\ntwo\nthree\n", cmd.out.String()); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	if want := "the server is shutting down"; !strings.Contains(cmd.errOut.String(), want) {
		t.Errorf("stderr %q, want %q in it", cmd.errOut.String(), want)
	}
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
}

// What was written before the command began may end in the middle of a long
// line.
func TestPastThatEndsInTheMiddleOfALine(t *testing.T) {
	long := strings.Repeat("x", lineBuffer)
	for name, begun := range map[string]string{"of which all is held": "be", "of which pieces were printed": long + "be"} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0, "web-1": 0}))
			server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
				options := decode[v1.TargetLogOptions](t, r)
				_ = streaming.ServeLog(w, r, options.Follow, streaming.Options{}, func(ctx context.Context, out io.Writer) error {
					out.(http.Flusher).Flush()
					if options.Instance == "web-0" {
						io.WriteString(out, at(1, begun))
						if options.Follow {
							io.WriteString(out, "gun\n"+at(2, "next")+"\n")
						}
					}
					if options.Follow {
						<-ctx.Done()
					}
					return ctx.Err()
				})
			}
			cmd := server.start(nil, "logs", "-f", "web", "--all-instances")
			until(t, "the last line", func() bool { return strings.HasSuffix(cmd.out.String(), "next\n") })
			if diff := cmp.Diff(begun+"gun\nnext\n", cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			cmd.cancel(terminated{syscall.SIGINT})
			cmd.wait()
		})
	}
}

// Whoever may not read targets knows the instance from the answer: a quiet log,
// too, is resumed where it was.
func TestQuietLogAloneIsResumed(t *testing.T) {
	noLeaks(t)
	server, logs := logsAlone(t)
	cmd := server.start(nil, "logs", "-f", "web", "--tail=0")
	until(t, "the stream", func() bool { return len(logs.of("web-0").openings()) == 1 })
	logs.of("web-0").change(func(l *logOf) { l.cut++ })
	until(t, "the next stream", func() bool { return len(logs.of("web-0").openings()) == 2 })
	logs.of("web-0").write(at(2, "two"))
	until(t, "the line", func() bool { return cmd.out.String() == "two\n" })
	again := logs.of("web-0").openings()[1]
	if again.Instance != "web-0" || again.ResumeAfter == "" {
		t.Errorf("resumed with instance %q after %q, want web-0 and its cursor", again.Instance, again.ResumeAfter)
	}
}

// The last of what was lost may be no more when the server is there again.
func TestConnectionStandsAgainWithNothingToFollow(t *testing.T) {
	noLeaks(t)
	web := process("web")
	server := newTestServer(t, instances(web, map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	var gone atomic.Bool
	server.log = func(w http.ResponseWriter, r *http.Request, target string) {
		if gone.Load() {
			writeError(w, apierrors.NewNotFound(v1.Resource("targets"), "web-0"))
			return
		}
		logs.serve(w, r, target)
	}
	logs.of("web-0").write(at(1, "one"))
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop")
	until(t, "the line", func() bool { return cmd.out.String() == "one\n" })
	gone.Store(true)
	server.apply(instances(web, nil))
	logs.of("web-0").change(func(l *logOf) { l.cut++ })
	until(t, "the end", func() bool { return strings.HasSuffix(cmd.errOut.String(), regained) })
	if diff := cmp.Diff(lostWarning+regained, cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
}

// What is new is told by the server's clock.
func TestTargetsThatComeLaterWhereClocksDiffer(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t)
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	now := time.Now().Add(-time.Hour)
	server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
		return false
	}
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--tail=1")
	until(t, "the watch", server.watched)
	logs.of("web-0").write(at(1, "one"), at(2, "two"))
	server.apply(instances(process("web", func(target *v1.Target) {
		target.CreationTimestamp = metav1.NewTime(now.Truncate(time.Second))
	}), map[string]int{"web-0": 0}))
	until(t, "the last line", func() bool { return strings.HasSuffix(cmd.out.String(), "two\n") })
	if diff := cmp.Diff("one\ntwo\n", cmd.out.String()); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

func TestNextDelay(t *testing.T) {
	const first = time.Second
	for name, test := range map[string]struct{ last, stood, want time.Duration }{
		"the first time":                               {0, 0, first},
		"after an attempt that failed":                 {first, 0, 2 * first},
		"after a connection that broke soon":           {4 * first, first, 8 * first},
		"it is bounded":                                {20 * first, 0, maxRetryDelay},
		"after a quiet connection":                     {first, time.Minute, first},
		"after a quiet connection that was waited for": {maxRetryDelay, time.Hour, first},
	} {
		t.Run(name, func(t *testing.T) {
			if got := nextDelay(first, test.last, test.stood); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
}
