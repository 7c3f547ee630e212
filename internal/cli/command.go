package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	clientexec "k8s.io/client-go/util/exec"
	"k8s.io/klog/v2"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
)

// exitBroken is the exit code of a session that ended before the command's own
// was known.
const exitBroken = 125

// brokenError ends a session whose command may have succeeded, failed or not
// have ended: nobody has said. What to know about that is part of its text.
type brokenError struct {
	err error
}

func (e *brokenError) Error() string { return e.err.Error() }
func (e *brokenError) Unwrap() error { return e.err }

var (
	// errUnresponsive ends the wait for the answer to a request.
	errUnresponsive = errors.New("the server doesn't answer")
	// errGivenUp is the cause with which a session ends whose user didn't want
	// to wait for a silent server any longer.
	errGivenUp = errors.New("the server had been silent, and you ended the session")
	// errSessionOver ends what belongs to a session that is over.
	errSessionOver = errors.New("the session is over")
)

const (
	// silentFor is how long nothing has come from a server that is pinged every
	// pingEvery when its user is told so, and may end the session by a key.
	silentFor = 10 * time.Second
	pingEvery = 3 * time.Second
	// partingTime is what the last words to a server may take, and what becomes
	// of output that nobody takes when the session has been ended.
	partingTime = 500 * time.Millisecond
	// nudgeDelay lies between two sizes of a terminal, of which the first is to
	// be noticed.
	nudgeDelay = 150 * time.Millisecond
)

// stdio is the user's side of exec, attach and run.
type stdio struct {
	stdin, tty, quiet bool
}

func (s *stdio) addFlags(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&s.stdin, "stdin", "i", false, "Pass stdin to the target")
	cmd.Flags().BoolVarP(&s.tty, "tty", "t", false, "Stdin is a TTY")
	cmd.Flags().BoolVarP(&s.quiet, "quiet", "q", false, "Only print output from the remote session")
}

// request is what a session is about.
type request struct {
	ref
	url *url.URL
	// detachKeys, where they aren't "", end a session with a terminal, which is
	// no error.
	detachKeys string
	// nudge has the program draw its screen again.
	nudge bool
	// broken says what becomes of the command when the session has broken.
	broken string
}

// stream runs a session to its end. It returns nil for exit code 0, an error of
// client-go's exec package for others, a *brokenError if the command's exit code
// isn't known, errDetached, and the cause of ctx if that ended it. The terminal
// is as it was when it returns, or panics.
func (c *connection) stream(ctx context.Context, local *console, r request) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Output that nobody reads any more is an error like others, instead of the
	// end of a process that hasn't restored its terminal.
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE)
	defer signal.Stop(pipes)

	s := &commandSession{request: r, console: local, cancel: cancel, patience: c.peerTimeout}
	if err := s.prepare(); err != nil {
		return err
	}
	remote, err := c.dialCommand(ctx, s)
	if err != nil {
		return err
	}
	err = local.safe(cancel, func() error { return s.run(ctx, remote) })
	s.reset(err)
	return err
}

// dialCommand opens a session by WebSocket, or by SPDY where that doesn't get
// through. KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false leaves SPDY alone, as for
// kubectl.
func (c *connection) dialCommand(ctx context.Context, s *commandSession) (remote, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.peerTimeout, errUnresponsive)
	defer cancel()
	type result struct {
		remote remote
		err    error
	}
	dialled := make(chan result)
	go func() {
		var opened result
		if cmdutil.RemoteCommandWebsockets.IsDisabled() {
			opened.remote, opened.err = c.dialCommandSPDY(ctx, s)
		} else if opened.remote, opened.err = c.dialCommandWebSocket(ctx, s); opened.err != nil && ctx.Err() == nil && fallBack(opened.err) {
			opened.remote, opened.err = c.dialCommandSPDY(ctx, s)
		}
		select {
		case dialled <- opened:
		case <-ctx.Done():
			if opened.err == nil {
				opened.remote.close()
			}
		}
	}()
	// gorilla waits for an answer for as long as ctx has a deadline for, also
	// when ctx has ended before: it isn't waited for.
	var err error
	select {
	case opened := <-dialled:
		if opened.err == nil {
			return opened.remote, nil
		}
		err = opened.err
	case <-ctx.Done():
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errUnresponsive):
		// It may have begun what it was asked to.
		return nil, &brokenError{c.unanswered(context.Background(), ctx, cause)}
	case cause != nil:
		return nil, cause
	}
	if refused := upgradeError(c.config.Host, err); refusal(refused) != nil || !cutShort(err) {
		return nil, refused
	}
	return nil, s.lost(err)
}

// cutShort says whether a connection broke in the middle of a request: what has
// come of that isn't known.
func cutShort(err error) bool {
	var operation *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &operation) && (operation.Op == "read" || operation.Op == "write")
}

// remote is the other side of a session. Its methods but serve may be called at
// any time, from any goroutine; they block while the server takes nothing, and
// fail once the session is closed.
type remote interface {
	// serve writes the command's output until all of it has come, and returns
	// the status that came with it, or why there is none.
	serve(stdout, stderr io.Writer) (*metav1.Status, error)
	send(stdin []byte) error
	closeStdin() error
	resize(size terminalSize) error
	// attend pings the server, and answers its pings, until the session is
	// closed.
	attend(period time.Duration)
	// close ends the session. It takes no longer than partingTime.
	close()
}

// pulse tells whether the server lives.
type pulse struct {
	beats   atomic.Uint64 // how often something has come
	reading atomic.Bool   // whether it could
}

// read is a read of the connection. While none is under way, because nobody
// takes the output, silence means nothing.
func (p *pulse) read(read func() (int, error)) (int, error) {
	p.reading.Store(true)
	n, err := read()
	p.reading.Store(false)
	if n > 0 {
		p.beat()
	}
	return n, err
}

func (p *pulse) beat() { p.beats.Add(1) }

// commandSession is one run of a command, seen from here.
type commandSession struct {
	request
	*console
	cancel   context.CancelCauseFunc
	patience time.Duration
	pulse    pulse
	// silent says that the user may end the session by keys that are the
	// command's otherwise.
	silent atomic.Bool
	input  io.Reader

	mu       sync.Mutex // protects panicked
	panicked *panicked
}

// panicked is a panic of a goroutine, which is to end the process only once the
// terminal is restored.
type panicked struct {
	value any
	stack []byte
}

func (p *panicked) String() string { return fmt.Sprintf("%v\n\n%s", p.value, p.stack) }

// guard runs a part of the session.
func (s *commandSession) guard(part func()) {
	defer func() {
		if value := recover(); value != nil {
			s.mu.Lock()
			if s.panicked == nil {
				s.panicked = &panicked{value, debug.Stack()}
			}
			s.mu.Unlock()
			s.cancel(errSessionOver)
		}
	}()
	part()
}

// prepare makes the input.
func (s *commandSession) prepare() error {
	if !s.stdin {
		return nil
	}
	s.input = s.In
	if !s.raw {
		return nil
	}
	if s.detachKeys != "" {
		var err error
		if s.input, err = newDetachable(s.input, s.detachKeys, func() { s.cancel(errDetached) }); err != nil {
			return err
		}
	}
	return nil
}

// run carries the session out.
//
//	input ──► remote ──► stdout, stderr
//	            │ status, or why there is none
//	watch ──────┴──► the session's end
func (s *commandSession) run(ctx context.Context, remote remote) error {
	if s.raw && s.nudge && os.Getenv("TERM") != "dumb" {
		// What the last lines look like was chosen before them.
		fmt.Fprint(s.Out, plainText)
	}
	type end struct {
		status *metav1.Status
		err    error
	}
	ended := make(chan end, 1)
	go s.guard(func() {
		status, err := remote.serve(s.Out, s.ErrOut)
		ended <- end{status, err}
	})
	over, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(over, remote.close)
	var parts sync.WaitGroup
	parts.Go(func() { s.guard(func() { remote.attend(min(pingEvery, s.patience/4)) }) })
	parts.Go(func() { s.guard(func() { s.watch(over, cancel) }) })
	if s.stdin {
		// It isn't waited for: nothing ends a read of a terminal or a pipe but
		// its writer. The process ends with it.
		go s.guard(func() { s.pump(over, remote) })
	}
	if s.raw {
		// Nor this, for kubectl's queue of sizes has no end.
		go s.guard(func() { s.resizes(over, remote) })
	}

	var last end
	select {
	case last = <-ended:
	case <-over.Done():
		remote.close()
		select {
		case last = <-ended:
		case <-time.After(partingTime): // nobody takes the output
		}
	}
	cause := context.Cause(over)
	stop()
	cancel(errSessionOver)
	remote.close()
	parts.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.panicked != nil:
		panic(s.panicked)
	case last.status != nil:
		return s.outcome(last.status)
	case errors.Is(cause, errSilent), errors.Is(cause, errGivenUp):
		return s.lost(cause)
	case cause != nil:
		return cause
	case errors.As(last.err, new(*outputError)):
		return last.err
	}
	return s.lost(last.err)
}

func (s *commandSession) lost(err error) error {
	return &brokenError{fmt.Errorf("the connection to the server was lost: %w; %s", err, s.broken)}
}

// outcome is what a server's status says.
func (s *commandSession) outcome(status *metav1.Status) error {
	switch {
	case status.Status == metav1.StatusSuccess:
		return nil
	case status.Reason == remotecommand.NonZeroExitCodeReason && status.Details != nil:
		for _, cause := range status.Details.Causes {
			if code, err := strconv.ParseUint(cause.Message, 10, 8); cause.Type == remotecommand.ExitCodeCauseType && err == nil {
				return clientexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: int(code)}
			}
		}
	case status.Reason == metav1.StatusReasonBadRequest: // it couldn't be started
		return errors.New(status.Message)
	}
	return &brokenError{errors.New(status.Message)}
}

// maxOutcome bounds an encoded status.
const maxOutcome = 64 << 10

// decodeStatus reads what a server says of a command's end; nil if it is no
// status, or not all of one.
func decodeStatus(text []byte) *metav1.Status {
	var status metav1.Status
	if err := json.Unmarshal(text, &status); err != nil || status.Status == "" {
		return nil
	}
	return &status
}

// pump sends the input to its end.
func (s *commandSession) pump(ctx context.Context, remote remote) {
	in := s.input
	if s.raw {
		in = newKeyboard(ctx, in, s.typed)
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 && remote.send(buf[:n]) != nil {
			return
		}
		if err != nil {
			// What can't be read has no more to give.
			_ = remote.closeStdin()
			return
		}
	}
}

// typed looks at what the user types while the server is silent.
func (s *commandSession) typed(before byte, keys []byte) {
	if s.silent.Load() && wantsOut(before, keys) {
		s.cancel(errGivenUp)
	}
}

// watch ends the session when nothing has come from the server for as long as
// it is believed in. A tick that comes late counts for no more than others:
// this process, or its machine, slept.
func (s *commandSession) watch(ctx context.Context, end context.CancelCauseFunc) {
	tick := max(min(s.patience/20, time.Second), time.Millisecond)
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	told := min(silentFor, s.patience/2)
	silence := time.Duration(0)
	beats := s.pulse.beats.Load()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := s.pulse.beats.Load()
		if now != beats || !s.pulse.reading.Load() {
			beats, silence = now, 0
			if s.silent.CompareAndSwap(true, false) {
				s.tell("the server answers again")
			}
			continue
		}
		silence += tick
		if silence >= s.patience {
			end(fmt.Errorf("%w for %v", errSilent, s.patience))
			return
		}
		if silence >= told && s.raw && s.silent.CompareAndSwap(false, true) {
			s.tell(fmt.Sprintf("nothing has come from the server for %v: press ctrl-c or ~. to end the session, which ends by itself after %v", told, s.patience))
		}
	}
}

// resizes sends the terminal's sizes.
func (s *commandSession) resizes(ctx context.Context, remote remote) {
	if s.nudge && s.size != nil {
		// A change of size makes programs draw their screen again, also when the
		// size is the one that the last client had.
		larger := *s.size
		larger.Width++
		larger.Height++
		if remote.resize(larger) != nil {
			return
		}
		select {
		case <-time.After(nudgeDelay):
		case <-ctx.Done():
			return
		}
	}
	if s.size != nil && remote.resize(*s.size) != nil {
		return
	}
	for s.sizes != nil {
		size := s.sizes.Next()
		if size == nil || remote.resize(terminalSize(*size)) != nil {
			return
		}
	}
}

// terminalSize is a size as it is sent.
type terminalSize struct {
	Width, Height uint16
}

func (s terminalSize) encode() []byte {
	return fmt.Appendf(nil, `{"Width":%d,"Height":%d}`+"\n", s.Width, s.Height)
}

// quiet keeps client-go from logging, unless -v asks for it. It logs as errors
// what happens now and then. What matters it returns.
func quiet(ctx context.Context) context.Context {
	if klog.V(1).Enabled() {
		return ctx
	}
	return klog.NewContext(ctx, klog.Logger{})
}

// interrupted returns why the context ended, if it is the reason for err.
func interrupted(ctx context.Context, err error) error {
	if err != nil && errors.Is(err, ctx.Err()) {
		return context.Cause(ctx)
	}
	return err
}
