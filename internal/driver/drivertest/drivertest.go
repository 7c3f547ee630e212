// Package drivertest states the driver contract as tests. Each driver runs it
// in a test of its own:
//
//	func TestConformance(t *testing.T) {
//		drivertest.Run(t, drivertest.Harness{…})
//	}
//
// What a driver's Conn can't do is skipped. Instances run scripts for a POSIX
// shell, which sees the usual small programs.
package drivertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// Harness makes what the tests need. Everything that it makes ends with the
// test.
type Harness struct {
	// Instance makes a running instance, and returns its driver and a request
	// for it. Not needed with Host.
	Instance func(t *testing.T, what Instance) (driver.Driver, driver.Request)

	// Host makes a driver that runs nothing yet; nil unless the driver is a
	// Host.
	Host func(t *testing.T) driver.Host
	// Target makes a target of a Host; each has a UID of its own.
	Target func(t *testing.T, what Instance) *v1.Target

	// Port makes a running instance, and has EchoAfterEOF answer at its port
	// open, and nothing at its port refused. nil if there are no ports.
	Port func(t *testing.T) (d driver.Driver, req driver.Request, open, refused uint16)

	// Datagrams makes a running instance, and has EchoDatagrams answer at its UDP
	// port. nil if there are no such ports.
	Datagrams func(t *testing.T) (d driver.Driver, req driver.Request, port uint16)

	// Socket makes a running instance, and has EchoAfterEOF answer at the unix
	// socket open of its host, and nobody at the unix socket refused. nil if
	// there are no sockets.
	Socket func(t *testing.T) (d driver.Driver, req driver.Request, open, refused string)

	// Loopback connects to a port of the instance's host, on that host. nil if
	// nothing can listen there.
	Loopback func(t *testing.T, port uint16) net.Conn
}

// Instance is what an instance is to be.
type Instance struct {
	// Script is run by sh -c.
	Script string
	// Stdin and TTY are what it has.
	Stdin, TTY bool
	// RestartPolicy is in the target's spec; Always if "".
	RestartPolicy v1.RestartPolicy
}

// EchoAfterEOF serves one connection: it reads to the end of file, and sends
// back what it has read.
func EchoAfterEOF(connection net.Conn) {
	defer connection.Close()
	data, err := io.ReadAll(connection)
	if err == nil {
		connection.Write(data)
	}
}

// EchoDatagrams sends each datagram back to whom it came from, until the
// connection is closed.
func EchoDatagrams(connection net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := connection.ReadFrom(buf)
		if err != nil {
			return
		}
		connection.WriteTo(buf[:n], from)
	}
}

// timeout bounds every wait. It is so long that it only ends what hangs.
const timeout = 30 * time.Second

// idle is a script that runs until it is ended.
const idle = "while :; do sleep 1000; done"

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	if h.Instance == nil {
		h.Instance = func(t *testing.T, what Instance) (driver.Driver, driver.Request) {
			host := h.Host(t)
			target := h.Target(t, what)
			start(t, host, target)
			return host, request(target)
		}
	}
	t.Run("open", func(t *testing.T) { testOpen(t, h) })
	t.Run("exec", func(t *testing.T) { testExec(t, h) })
	t.Run("attach", func(t *testing.T) { testAttach(t, h) })
	t.Run("logs", func(t *testing.T) { testLogs(t, h) })
	if h.Port != nil {
		t.Run("port", func(t *testing.T) { testPort(t, h) })
	}
	if h.Datagrams != nil {
		t.Run("datagrams", func(t *testing.T) { testDatagrams(t, h) })
	}
	if h.Socket != nil {
		t.Run("socket", func(t *testing.T) { testSocket(t, h) })
	}
	if h.Loopback != nil {
		t.Run("listen", func(t *testing.T) { testListen(t, h) })
	}
	if h.Host != nil {
		t.Run("host", func(t *testing.T) { testHost(t, h) })
	}
}

func request(target *v1.Target) driver.Request {
	return driver.Request{Target: target, Instance: target.InstanceNames()[0], Dial: (&net.Dialer{}).DialContext}
}

func instance(target *v1.Target) driver.Instance {
	return driver.Instance{Target: target, Name: target.InstanceNames()[0]}
}

func start(t *testing.T, host driver.Host, target *v1.Target) {
	t.Helper()
	if err := host.Start(t.Context(), instance(target)); err != nil {
		t.Fatalf("Start: %v", err)
	}
}

var errWaited = errors.New("the test waited too long")

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), timeout, errWaited)
	t.Cleanup(cancel)
	return ctx
}

// open opens an instance, and skips the test if it hasn't the ability T.
func open[T any](t *testing.T, d driver.Driver, req driver.Request) T {
	t.Helper()
	conn, err := d.Open(bounded(t), req)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(conn.Close(), conn.Close()); err != nil {
			t.Errorf("closing the Conn, twice: %v", err)
		}
	})
	able, ok := conn.(T)
	if !ok {
		t.Skipf("%T hasn't the ability", conn)
	}
	return able
}

func wantKind(t *testing.T, err error, want driver.Kind) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if got := driver.KindOf(err); got != want {
		t.Errorf("error %q is of kind %d, want %d", err, got, want)
	}
}

// exitCode is what a Run's error says of the command.
func exitCode(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	exit, ok := errors.AsType[*driver.ExitError](err)
	if !ok {
		t.Fatalf("error %v, want an exit code", err)
	}
	return exit.Code
}

// closingReader is a client's stdin.
type closingReader struct{ io.Reader }

func (r closingReader) Close() error {
	if c, ok := r.Reader.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// output collects what a client is sent, and can be waited for.
type output struct {
	mu   sync.Mutex // protects what follows
	data bytes.Buffer
	more chan struct{}
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.data.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.data.String()
}

// wait waits until the output contains a text.
func (o *output) wait(t *testing.T, text string) {
	t.Helper()
	ctx := bounded(t)
	for {
		o.mu.Lock()
		found, more := bytes.Contains(o.data.Bytes(), []byte(text)), o.more
		o.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-ctx.Done():
			t.Fatalf("waited for output %q, got %q", text, o.String())
		}
	}
}

// exec runs a command to its end.
func exec(t *testing.T, e driver.Execer, stdin io.Reader, command ...string) (stdout, stderr string, code int) {
	t.Helper()
	run, err := e.Exec(bounded(t), driver.ExecOptions{Command: command})
	if err != nil {
		t.Fatalf("Exec: %v", err)
	}
	var out, errOut bytes.Buffer
	stdio := driver.Stdio{Stdout: &out, Stderr: &errOut}
	if stdin != nil {
		stdio.Stdin = closingReader{stdin}
	}
	code = exitCode(t, run(bounded(t), stdio))
	return out.String(), errOut.String(), code
}

func sh(script string) []string { return []string{"sh", "-c", script} }

// eventually waits until the list of a host's instances is right. It is the
// receiver of the host's changes.
func eventually(t *testing.T, host driver.Host, what string, right func(map[string]driver.InstanceStatus) bool) {
	t.Helper()
	ctx := bounded(t)
	for {
		list, err := host.List(ctx)
		if err != nil {
			t.Fatalf("List: %v", err)
		}
		byName := make(map[string]driver.InstanceStatus)
		for _, status := range list {
			byName[status.ID.Name] = status
		}
		if right(byName) {
			return
		}
		select {
		case <-host.Changes():
		case <-ctx.Done():
			t.Fatalf("waited for: %s; the list is %+v", what, list)
		}
	}
}

// end waits until an instance has ended, and returns how.
func end(t *testing.T, host driver.Host, id driver.InstanceID) *v1.InstanceStateTerminated {
	t.Helper()
	var state *v1.InstanceStateTerminated
	eventually(t, host, "the end of "+id.Name, func(list map[string]driver.InstanceStatus) bool {
		state = list[id.Name].State.Terminated
		return state != nil
	})
	return state
}

// line is a log line as tests compare it.
type line struct {
	Stream  v1.LogStream
	Data    string
	Partial bool
}

func stdout(data string) line { return line{Stream: v1.LogStreamStdout, Data: data} }
func stderr(data string) line { return line{Stream: v1.LogStreamStderr, Data: data} }

// readLog reads a log to its end, and checks that times increase.
func readLog(t *testing.T, l driver.Logger, opts driver.LogOptions) (lines []line, times []time.Time) {
	t.Helper()
	r, err := l.Logs(bounded(t), opts)
	if err != nil {
		t.Fatalf("Logs: %v", err)
	}
	defer r.Close()
	for {
		got, at := readLine(t, r)
		if got == nil {
			return lines, times
		}
		if n := len(times); n > 0 && !at.After(times[n-1]) {
			t.Errorf("the time of line %d, %v, isn't after that of the one before, %v", n, at, times[n-1])
		}
		lines, times = append(lines, *got), append(times, at)
	}
}

// readLine reads one line; nil is the end.
func readLine(t *testing.T, r driver.LogReader) (*line, time.Time) {
	t.Helper()
	got, err := r.Next(bounded(t))
	if err == io.EOF {
		return nil, time.Time{}
	}
	if err != nil {
		t.Fatalf("Next: %v", err)
	}
	if len(got.Data) > driver.MaxLogLine {
		t.Errorf("a line of %d bytes", len(got.Data))
	}
	return &line{got.Stream, string(got.Data), got.Partial}, got.Time
}

// awaitLines waits until the log has so many lines.
func awaitLines(t *testing.T, l driver.Logger, n int) {
	t.Helper()
	r, err := l.Logs(bounded(t), driver.LogOptions{Follow: true})
	if err != nil {
		t.Fatalf("Logs: %v", err)
	}
	defer r.Close()
	for range n {
		if got, _ := readLine(t, r); got == nil {
			t.Fatal("the log has ended")
		}
	}
}

func testOpen(t *testing.T, h Harness) {
	d, req := h.Instance(t, Instance{Script: idle})
	t.Run("an unknown instance isn't found", func(t *testing.T) {
		unknown := req
		unknown.Instance = "no-such-instance"
		_, err := d.Open(bounded(t), unknown)
		wantKind(t, err, driver.NotFound)
	})
	t.Run("a Conn that isn't used can be closed twice", func(t *testing.T) {
		open[driver.Conn](t, d, req)
	})
}

func uids(targets ...*v1.Target) (list []types.UID) {
	for _, target := range targets {
		list = append(list, target.UID)
	}
	return list
}

func names(list []driver.InstanceStatus) (names []string) {
	for _, status := range list {
		names = append(names, status.ID.Name)
	}
	slices.Sort(names)
	return names
}

func joined(lines []line) string {
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(l.Data)
		if !l.Partial {
			b.WriteByte('\n')
		}
	}
	return b.String()
}
