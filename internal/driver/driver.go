// Package driver is the contract between the server and what its targets are
// made of. A driver reaches the instances of one kind of source; what else it
// can do it says by the optional interfaces that its Conn and it implement.
//
// The conformance suite in drivertest states the contract as tests; every
// driver passes it.
package driver

import (
	"context"
	"io"
	"iter"
	"net"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// Driver reaches the instances of one kind of source. Its methods may be
// called from many goroutines at once.
type Driver interface {
	// Open reaches an instance. It fails with NotFound if there is no such
	// instance and with Unavailable if it can't be reached. That the instance
	// runs is checked by the abilities that need it: a log outlives it.
	//
	// The caller closes the Conn. ctx bounds Open alone.
	Open(ctx context.Context, req Request) (Conn, error)
}

// Request names an instance and carries what a driver needs to reach it.
type Request struct {
	// Target is the instance's target. Drivers don't change it.
	Target *v1.Target
	// Instance is the instance's name, one of the target's.
	Instance string
	// Dial is the only way for a driver to make a network connection: it
	// checks the resolved address against the target's class.
	Dial DialFunc
	// Secret holds the credentials that the target refers to, nil if it
	// refers to none.
	Secret *corev1.Secret
}

// DialFunc is net.Dialer.DialContext's signature.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// Conn is an open instance. What can be done with it are the optional
// interfaces Execer, Attacher, Logger, PortDialer, SocketDialer and
// PortListener. Close ends what is left of it, may be called twice, and is
// called after everything started through the Conn has returned, or was closed.
type Conn interface {
	Close() error
}

// Run carries out what was prepared, and returns when it has ended and nothing
// of it is left: the command and all that it started are gone, what they wrote
// has been written on.
//
// It returns nil for exit code 0, an *ExitError for another, and
// context.Cause(ctx) if ctx ended it. It is called at most once; closing the
// Conn instead releases what was prepared.
type Run func(ctx context.Context, stdio Stdio) error

// Stdio is the client's side of a command. Each stream is nil if the client
// didn't ask for it.
type Stdio struct {
	// Stdin is what the client sends; it ends with io.EOF when the client
	// closes its side. Close says that no more is wanted and unblocks a Read,
	// so that a Run can wait for the goroutine that reads.
	Stdin io.ReadCloser
	// Stdout and Stderr block while the client is slow. They fail once it has
	// gone, and the context ends then, too; once the context has ended, they
	// don't block any more. Stderr is nil with a terminal.
	Stdout, Stderr io.Writer
	// Resize delivers the sizes of the client's terminal. It is closed when no
	// more will come, and nil without a terminal.
	Resize <-chan TerminalSize
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct {
	Width, Height uint16
}

// Execer runs commands beside an instance.
type Execer interface {
	// Exec prepares a command as far as can be done without a client. It fails
	// with NotRunning if the instance doesn't run, and with Invalid if the
	// command can't be run, saying why.
	Exec(ctx context.Context, opts ExecOptions) (Run, error)
}

// ExecOptions is a command to run.
type ExecOptions struct {
	// Command is the program and its arguments; never empty.
	Command []string
	// TTY gives the command a terminal.
	TTY bool
}

// Attacher joins an instance's own standard streams.
type Attacher interface {
	// Attach prepares to join. It fails with NotRunning if the instance
	// doesn't run, and with Invalid if it lacks the stdin or terminal that is
	// asked for. Run delivers what the instance writes from then on, until the
	// instance ends: then it returns as for a command, with the instance's
	// exit code. That the client leaves, or its stdin ends, leaves the
	// instance and its stdin as they are, unless CloseStdin says otherwise.
	Attach(ctx context.Context, opts AttachOptions) (Run, error)
}

// AttachOptions says what the client wants to join.
type AttachOptions struct {
	Stdin, TTY bool
	// Replay delivers the last lines that the instance has written first, so
	// many, as far as the driver keeps them: one may keep none. What begins in
	// the middle of a line, because the line's beginning isn't kept any more,
	// isn't delivered if a whole line follows. Nothing is lost or delivered
	// twice between that and what the instance writes from then on.
	Replay int64
	// CloseStdin has the end of the client's stdin end the instance's, for all
	// clients. A terminal's has no end.
	CloseStdin bool
}

// Logger reads an instance's log.
type Logger interface {
	// Logs opens the log. It fails with NotFound if what is asked for doesn't
	// exist: a previous run, for example. An instance that hasn't started yet
	// has an empty log.
	Logs(ctx context.Context, opts LogOptions) (LogReader, error)
}

// LogOptions selects lines. The zero value selects the whole log of the
// present or, if the instance doesn't run, the last run.
type LogOptions struct {
	// Previous selects the run before that one.
	Previous bool
	// Follow waits for more lines, through restarts, until the instance is
	// removed or has ended and won't be started again.
	Follow bool
	// Since leaves out lines from before it.
	Since time.Time
	// After leaves out lines up to and including it, and selects those of all
	// runs.
	After time.Time
	// Tail selects so many of the last lines. nil selects all.
	Tail *int64
	// Stream selects one stream; "" or All both.
	Stream v1.LogStream
}

// LogReader reads the lines of one instance in the order of their times.
type LogReader interface {
	// Next returns the next line, waiting for it when following, or io.EOF
	// after the last one. The line's Data is valid until the next call.
	Next(ctx context.Context) (LogLine, error)
	Close() error
}

// LogBatcher is a LogReader that returns many lines at once. The registry reads
// by batches where it can.
type LogBatcher interface {
	LogReader
	// NextBatch is Next for all lines that there are by now, up to a bound of
	// the driver's. It is never empty.
	NextBatch(ctx context.Context) (LogBatch, error)
}

// LogCursor is a LogReader that knows where it began.
type LogCursor interface {
	LogReader
	// Before returns a time that is earlier than that of each line which the
	// reader returns, and not earlier than that of any other: with it as
	// LogOptions.After, a reader of the same instance returns all that this
	// one does, and what came later. It is never the zero time.
	Before() time.Time
}

// LogBatch is some lines of a log, in their order. It is valid until the next
// call of its reader; a shared one for longer.
type LogBatch struct {
	// Lines yields the lines.
	Lines iter.Seq[LogLine]
	// Shared keeps what is made of the batch for the other readers that get
	// the same one. nil if there are none.
	Shared *LogShare
}

// LogShare keeps what several readers have made of the same lines, such as
// their text, so that only one of them has to.
type LogShare struct {
	mu   sync.Mutex // protects made
	made map[any]any
}

// maxShared is how many different things are kept: readers who want their lines
// in some other way than most make that themselves.
const maxShared = 4

// Do returns what make has made for a key, which it calls once for most.
func (s *LogShare) Do(key any, make func() any) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value, ok := s.made[key]; ok {
		return value
	}
	value := make()
	if len(s.made) < maxShared {
		if s.made == nil {
			s.made = map[any]any{}
		}
		s.made[key] = value
	}
	return value
}

// LogTime is the format of a line's time: RFC 3339 with nine decimals, so that
// times line up, and compare as text.
const LogTime = "2006-01-02T15:04:05.000000000Z"

// LogStamp formats times as LogTime says. It is quick where one falls into the
// same second as the last. The zero value is ready.
type LogStamp struct {
	second int64
	text   []byte
}

// Append appends a time.
func (s *LogStamp) Append(b []byte, t time.Time) []byte {
	if second := t.Unix(); second != s.second || s.text == nil {
		s.second = second
		s.text = time.Unix(second, 0).UTC().AppendFormat(s.text[:0], LogTime)
	}
	b = append(b, s.text...)
	// Digits go where the format has put zeros, before the "Z".
	for i, n := len(b)-2, t.Nanosecond(); n > 0; i, n = i-1, n/10 {
		b[i] = byte('0' + n%10)
	}
	return b
}

// MaxLogLine bounds LogLine.Data, in bytes. A longer line is split.
const MaxLogLine = 16 << 10

// LogLine is a line of a log, or a part of one.
type LogLine struct {
	// Time strictly increases from line to line of an instance, through
	// restarts of the instance and of its agent.
	Time time.Time
	// Stream is Stdout or Stderr.
	Stream v1.LogStream
	// Data is the line without its newline.
	Data []byte
	// Partial says that the line goes on in the next LogLine of the same
	// stream and run; if there is none, it didn't end with a newline.
	Partial bool
	// Run tells the runs of the instance apart.
	Run int
}

// PortDialer connects to an instance's ports.
type PortDialer interface {
	// DialPort connects to a port of the instance, by its number in the spec
	// where that lists it for the network, "tcp" or "udp". Whether it may be
	// forwarded has been decided. It fails with Unavailable, saying why, if
	// nothing answers, as far as the network tells, and with Unsupported if the
	// driver doesn't know the network. ctx bounds the dialling alone.
	DialPort(ctx context.Context, network string, port uint16) (Stream, error)
}

// SocketDialer connects to unix sockets of an instance's host.
type SocketDialer interface {
	// DialSocket connects to the stream socket at an absolute, clean path.
	// Whether it may be connected to has been decided by that path: it fails
	// with Invalid if the path leads over a symbolic link, which may lead to
	// any other, or to what is no stream socket; with NotFound if there is
	// nothing, and with Unavailable if nobody listens. The instance runs, or it
	// fails with NotRunning. ctx bounds the dialling alone.
	DialSocket(ctx context.Context, path string) (Stream, error)
}

// PortListener listens on an instance's host.
type PortListener interface {
	// ListenPort listens on a TCP port of the host's loopback addresses: the
	// first that is free of those given, in no particular order. It never takes
	// one that an instance has, whether that listens or not. It fails with
	// Unavailable, saying what is in the way. The instance runs, or it fails
	// with NotRunning; that it is started again doesn't end the listener, but
	// its removal does. ctx bounds the call alone.
	ListenPort(ctx context.Context, ports []v1.PortRange) (Listener, error)
}

// Listener takes connections on an instance's host.
type Listener interface {
	// Accept waits for the next connection. It fails once the Listener is
	// closed, by whoever it is for or by the driver.
	Accept() (Stream, error)
	// Port is where it listens.
	Port() uint16
	// Close ends Accept, and may be called twice. Connections that were
	// accepted go on.
	Close() error
}

// Stream is a connection whose directions end independently. *net.TCPConn and
// *net.UnixConn are. One of UDP keeps datagrams apart: each Read returns one,
// cut off where the buffer ends, and each Write sends one; CloseWrite does
// nothing to it.
type Stream interface {
	io.ReadWriteCloser
	// CloseWrite ends the direction to the port; reading goes on.
	CloseWrite() error
}

// Host is a driver that runs the instances itself. The agent is its only
// caller: it decides what runs when.
type Host interface {
	Driver

	// Start runs an instance that doesn't run. It returns when the instance
	// has been started, or with an error when it can't be, which is Invalid if
	// the spec is at fault. Until Remove, the instance is in List.
	Start(ctx context.Context, instance Instance) error

	// Stop asks an instance to end and returns at once: SIGTERM now, SIGKILL
	// to all that is left of it after the grace period. Stopping again with an
	// earlier end brings the end forward. It does nothing if the instance
	// doesn't run.
	Stop(ctx context.Context, id InstanceID, grace time.Duration) error

	// Remove forgets an instance that doesn't run, and deletes its log.
	// Followers of the log end.
	Remove(ctx context.Context, id InstanceID) error

	// Retain deletes what is left on disk of targets other than these.
	Retain(ctx context.Context, targets []types.UID) error

	// List returns all instances that were started and not removed.
	List(ctx context.Context) ([]InstanceStatus, error)

	// Changes delivers the UID of a target after a change to the state of one
	// of its instances. Changes that nobody has received yet are merged. It
	// has a single receiver.
	Changes() <-chan types.UID

	// Shutdown asks everything that runs to end, as Stop does, each with the
	// grace period of its target. It returns when nothing runs any more, or
	// with context.Cause(ctx) when ctx ends. Close follows it.
	Shutdown(ctx context.Context) error

	// Close kills everything that runs and returns when nothing is left.
	Close() error
}

// InstanceID names an instance for as long as its target exists.
type InstanceID struct {
	Target types.UID
	Name   string
}

// Instance is what a Host starts.
type Instance struct {
	// Target says what to run. Its spec is in force until the next Start.
	Target *v1.Target
	Name   string
	// Ports says where the instance is to listen, each with its HostPort.
	Ports []v1.InstancePort
}

// ID names the instance.
func (i Instance) ID() InstanceID {
	return InstanceID{Target: i.Target.UID, Name: i.Name}
}

// InstanceStatus is what a Host knows of an instance.
type InstanceStatus struct {
	ID InstanceID
	// State is Running or Terminated.
	State v1.InstanceState
	// Ports are those of the last Start.
	Ports []v1.InstancePort
	// Message tells a person of something wrong that doesn't end the
	// instance: that its log can't be written, for example. "" if all is well.
	Message string
}
