package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/utils/clock"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process/shim"
)

// run is one run of an instance, from its start to its end.
type run struct {
	instance driver.InstanceID
	setting  *setting
	ports    []v1.InstancePort
	// own says by which ports of the host it is reached.
	own       map[endpoint]int32
	restarts  v1.RestartPolicy
	grace     time.Duration // for Shutdown
	tty       bool
	startedAt time.Time
	child     *shim.Child
	streams   *streams
	stdin     *input // nil if the instance has none
	audience  *audience
	pumps     sync.WaitGroup
	pumped    chan struct{} // closed when all output is in the log, or lost with it

	mu       sync.Mutex // protects what follows
	execs    map[*shim.Child]struct{}
	closing  bool        // no exec may start any more
	stopped  bool        // Stop was called
	deadline time.Time   // when everything is killed; zero before Stop
	timer    clock.Timer // for deadline

	// ended is closed when nothing of the instance is left and terminated is
	// set, which the driver's mu protects.
	ended      chan struct{}
	terminated *v1.InstanceStateTerminated
}

// streams are both ends of the standard streams of a command.
type streams struct {
	// stdin, stdout and stderr are the command's ends.
	stdin, stdout, stderr *os.File
	// in, out and err are ours, nil where there is none. With a terminal, in
	// and out are the same.
	in, out, err *os.File
	// tty says that stdin, stdout and stderr are one terminal. It stays open
	// on our side, so that it doesn't hang up while the command has none open.
	tty bool
}

// newStreams makes the streams of a command. Those that aren't asked for are
// /dev/null.
func newStreams(command *shim.Command, stdin, stdout, stderr bool) (_ *streams, err error) {
	s := &streams{tty: command.TTY}
	defer func() {
		if err != nil {
			s.close()
			err = driver.Errorf(driver.Unavailable, "making the command's standard streams: %w", err)
		}
	}()
	if s.tty {
		if s.in, s.stdin, err = openTerminal(command); err != nil {
			return nil, err
		}
		s.out, s.stdout, s.stderr = s.in, s.stdin, s.stdin
		return s, nil
	}
	// The ends of a pipe have a mode each: ours doesn't block, so that it can
	// be waited for together with other things, and the command's does.
	pipe := func(wanted bool, reading bool) (theirs, ours *os.File, err error) {
		if !wanted {
			theirs, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
			return theirs, nil, err
		}
		r, w, err := os.Pipe()
		if reading {
			return r, w, err
		}
		return w, r, err
	}
	if s.stdin, s.in, err = pipe(stdin, true); err != nil {
		return nil, err
	}
	if s.stdout, s.out, err = pipe(stdout, false); err != nil {
		return nil, err
	}
	if s.stderr, s.err, err = pipe(stderr, false); err != nil {
		return nil, err
	}
	return s, nil
}

// started lets go of the command's ends.
func (s *streams) started() {
	if s.tty {
		return
	}
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if f != nil {
			f.Close()
		}
	}
	s.stdin, s.stdout, s.stderr = nil, nil, nil
}

// ended unblocks what reads the command's output or writes its input: nothing
// more comes than is there already. See copyOutput.
func (s *streams) ended() {
	now := time.Now()
	for _, f := range []*os.File{s.out, s.err} {
		if f != nil {
			f.SetReadDeadline(now)
		}
	}
	if s.in != nil {
		s.in.SetWriteDeadline(now)
	}
}

func (s *streams) close() {
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr, s.in, s.out, s.err} {
		if f != nil {
			f.Close() // with a terminal some are the same; the second time does nothing
		}
	}
}

// copyOutput hands what a command writes to deliver, which returns how much of
// it it has taken: all, if it is told that no more will come. What it leaves is
// offered again with more behind it. At most size bytes are offered at once.
//
// Usually the end is an end of file. But an end of a pipe may have been handed
// to a process that isn't the command's, and live on with it. So the end of the
// command sets a read deadline, and then what is there is all that there is.
//
// While there is nothing to read there is no buffer.
func copyOutput(f *os.File, size int, deliver func(data []byte, eof bool) (int, error)) error {
	raw, err := f.SyscallConn()
	if err != nil {
		_, err := deliver(nil, true)
		return err
	}
	var buf *outputBuffer
	release := func() {
		if buf != nil {
			outputBuffers.Put(buf)
			buf = nil
		}
	}
	defer release()
	kept := 0
	ended := false
	for {
		n, readErr := 0, error(nil)
		err := raw.Read(func(fd uintptr) bool {
			if buf == nil {
				buf = outputBuffers.Get().(*outputBuffer)
			}
			for {
				n, readErr = syscall.Read(int(fd), buf[kept:size])
				if readErr != syscall.EINTR {
					break
				}
			}
			if readErr != syscall.EAGAIN || ended {
				return true
			}
			if kept == 0 {
				release()
			}
			return false
		})
		if errors.Is(err, os.ErrDeadlineExceeded) && !ended {
			ended = true
			if f.SetReadDeadline(time.Time{}) == nil {
				continue
			}
		}
		// A terminal whose last user has gone is EIO.
		eof := err != nil || readErr != nil || n <= 0
		var data []byte
		if buf != nil {
			data = buf[:kept+max(n, 0)]
		}
		taken, err := deliver(data, eof)
		if eof || err != nil {
			return err
		}
		if kept = copy(buf[:], data[taken:]); kept == 0 {
			release()
		}
	}
}

// outputBuffer is as large as the largest that copyOutput is asked for.
type outputBuffer [logBuffer]byte

var outputBuffers = sync.Pool{New: func() any { return new(outputBuffer) }}

// execBuffer is how much of the output of a command beside an instance is read
// at once: all that a pipe holds.
const execBuffer = 64 << 10

// logBuffer is how much of an instance's output is read at once. A line that
// has no end yet stays in it.
const logBuffer = driver.MaxLogLine + 64<<10

// start starts a run of an instance that is reserved.
func (d *Driver) start(what driver.Instance, i *instance) (_ *run, err error) {
	source := what.Target.Spec.Process
	setting, err := newSetting(what)
	if err != nil {
		return nil, err
	}
	var args []string
	for _, arg := range slices.Concat(source.Command, source.Args) {
		args = append(args, expand(arg, setting.getenv))
	}
	command, err := setting.command(args, source.TTY)
	if err != nil {
		return nil, err
	}
	streams, err := newStreams(command, source.Stdin, true, true)
	if err != nil {
		return nil, err
	}
	child, err := d.shims.Start(what.Target.Namespace+"/"+what.Name, command, streams.stdin, streams.stdout, streams.stderr)
	streams.started()
	if err != nil {
		streams.close()
		return nil, setting.startError(command, err)
	}
	r := &run{
		instance:  what.ID(),
		setting:   setting,
		ports:     slices.Clone(what.Ports),
		own:       i.own,
		restarts:  what.Target.Spec.RestartPolicy,
		grace:     what.Target.Spec.GracePeriod(),
		tty:       source.TTY,
		startedAt: d.logs.clock.Now(),
		child:     child,
		streams:   streams,
		audience:  newAudience(),
		pumped:    make(chan struct{}),
		execs:     make(map[*shim.Child]struct{}),
		ended:     make(chan struct{}),
	}
	if source.Stdin {
		r.stdin = newInput(streams.in)
	}
	number := i.log.begin()
	i.log.create(number)
	pump := func(f *os.File, stream v1.LogStream) {
		r.pumps.Add(1)
		go func() {
			defer r.pumps.Done()
			r.pump(i.log.instanceLog, number, f, stream)
		}()
	}
	pump(streams.out, v1.LogStreamStdout)
	if streams.err != nil {
		pump(streams.err, v1.LogStreamStderr)
	}
	return r, nil
}

// pump brings an instance's output to those who are attached and to the log.
func (r *run) pump(log *instanceLog, number int, f *os.File, stream v1.LogStream) {
	shown := 0 // of what is offered again
	copyOutput(f, logBuffer, func(data []byte, eof bool) (int, error) {
		r.audience.write(stream, data[shown:])
		taken, err := log.write(number, stream, data, eof)
		shown = len(data) - taken
		return taken, err
	})
}

// drained says whether all output has been dealt with.
func (r *run) drained() bool {
	select {
	case <-r.pumped:
		return true
	default:
		return false
	}
}

// supervise waits for the end of a run.
func (d *Driver) supervise(i *instance, r *run) {
	result := r.child.Wait()
	finishedAt := d.logs.clock.Now()
	r.endExecs()
	r.streams.ended()
	go func() {
		r.pumps.Wait()
		r.streams.close()
		close(r.pumped)
	}()
	// All output is in the log when the end is seen; but a full disk doesn't
	// keep an instance from ending.
	for drained := false; !drained; {
		blocked, changed := i.log.blocked()
		if blocked {
			break
		}
		select {
		case <-r.pumped:
			drained = true
		case <-changed:
		}
	}

	message := ""
	switch {
	case result.Lost && result.Left > 0:
		message = fmt.Sprintf("its supervising process was killed, and %d processes of another user's may be left", result.Left)
	case result.Lost:
		message = "its supervising process was killed"
	case result.Left > 0:
		message = fmt.Sprintf("%d of its processes run as another user and couldn't be killed", result.Left)
	}
	state := r.end(result.Status, message, finishedAt)
	r.mu.Lock()
	if r.timer != nil {
		r.timer.Stop()
	}
	stopped := r.stopped
	r.mu.Unlock()

	// After a Stop only the agent knows whether it goes on: it removes the
	// instance if it doesn't.
	i.log.end(!stopped && !r.restarts.Restarts(state.ExitCode))
	d.mu.Lock()
	r.terminated = state
	d.mu.Unlock()
	close(r.ended)
	r.audience.close()
	d.changes.add(r.instance.Target)
	// Whatever is held back may need the log's disk to have room again.
	<-r.pumped
}

// stop asks the run to end. The driver's mu is held, and busy counts the run.
func (r *run) stop(clock clock.Clock, busy *sync.WaitGroup, grace time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	deadline := clock.Now().Add(max(grace, 0))
	if r.stopped && !deadline.Before(r.deadline) {
		return
	}
	first := !r.stopped
	r.stopped, r.deadline = true, deadline
	if grace <= 0 {
		r.child.Kill()
		return
	}
	if first {
		r.child.Signal(syscall.SIGTERM)
	}
	if r.timer != nil {
		r.timer.Stop()
	}
	timer := clock.NewTimer(grace)
	r.timer = timer
	busy.Add(1)
	go func() {
		defer busy.Done()
		defer timer.Stop()
		select {
		case <-timer.C():
			r.child.Kill()
		case <-r.child.Done():
		}
	}()
}

// addExec makes a command end with the run. It reports whether the run still
// goes on.
func (r *run) addExec(c *shim.Child) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closing {
		r.execs[c] = struct{}{}
	}
	return !r.closing
}

func (r *run) removeExec(c *shim.Child) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.execs, c)
}

// endExecs kills the commands beside the instance, and waits for their end.
func (r *run) endExecs() {
	r.mu.Lock()
	r.closing = true
	var execs []*shim.Child
	for c := range r.execs {
		execs = append(execs, c)
	}
	r.mu.Unlock()
	for _, c := range execs {
		c.Kill()
	}
	for _, c := range execs {
		c.Wait()
	}
}

// input is an instance's standard input, which several clients may write to.
type input struct {
	file *os.File
	turn chan struct{} // held by the client that writes
	done atomic.Bool   // a client has ended it
}

func newInput(file *os.File) *input {
	return &input{file: file, turn: make(chan struct{}, 1)}
}

// write writes all of data, in one piece as seen by other clients, unless ctx
// ends: a process need not read its input.
func (in *input) write(ctx context.Context, data []byte) error {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-in.turn }()
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		in.file.SetWriteDeadline(time.Now())
		close(over)
	})
	_, err := in.file.Write(data)
	if !stop() {
		// The deadline is this client's; the next one starts afresh.
		<-over
		in.file.SetWriteDeadline(time.Time{})
		return context.Cause(ctx)
	}
	return err
}

// close ends the input once what other clients write has been written, unless
// ctx ends before that.
func (in *input) close(ctx context.Context) {
	if ctx.Err() != nil {
		return // the end of a client's input is that of the client
	}
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-in.turn }()
	in.done.Store(true)
	in.file.Close()
}

func (in *input) closed() bool { return in.done.Load() }
