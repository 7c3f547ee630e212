package shim

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Child is a command under a shim, as the agent sees it.
type Child struct {
	// PID is the command's.
	PID int

	shim    *os.Process
	control *os.File

	done   chan struct{}
	result Result // valid once done is closed

	mu       sync.Mutex  // protects what follows, and writes to control
	patience *time.Timer // runs since Kill
}

// Result is how a command ended.
type Result struct {
	// Status is the command's wait status.
	Status syscall.WaitStatus
	// Lost says that the shim was killed, and that the status is made up.
	Lost bool
	// Left is how many of its processes couldn't be killed, because they are
	// another user's.
	Left int
}

// own is what this process has started and not yet waited for: the kernel
// keeps one list of children for the whole process, so there is one of these,
// too. Its mutex is held while a shim is started: until it is in the map, it
// looks like something orphaned.
var own = struct {
	sync.Mutex
	shims    map[int]bool
	adopting sync.Once
}{shims: make(map[int]bool)}

// Starter starts commands, and keeps a shim in reserve that waits for the next:
// until a program as large as this one is up, its command would be done. The
// zero value is ready. Close ends what it keeps.
type Starter struct {
	mu      sync.Mutex // protects what follows
	reserve *Child     // a shim without a command; nil if there is none
	making  bool       // there will be one
	closed  bool
	busy    sync.WaitGroup
}

// Start runs a command under a shim, as the function Start does.
func (s *Starter) Start(title string, command *Command, stdin, stdout, stderr *os.File) (*Child, error) {
	s.mu.Lock()
	c := s.reserve
	s.reserve = nil
	s.mu.Unlock()
	defer s.refill()
	if c != nil {
		// It has waited long enough to be stopped by a command of its user that
		// stops whatever it may.
		c.shim.Signal(syscall.SIGCONT)
		err := c.run(title, command, stdin, stdout, stderr)
		if err != errNoShim { //nolint:errorlint // it is never wrapped
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	return Start(title, command, stdin, stdout, stderr)
}

func (s *Starter) refill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.making || s.reserve != nil {
		return
	}
	s.making = true
	s.busy.Go(func() {
		c, err := newShim()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.making = false
		if err == nil { // else whoever starts the next command says why
			s.reserve = c
		}
	})
}

// Close ends the shim in reserve. Those that have a command go on.
func (s *Starter) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.busy.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve != nil {
		s.reserve.discard()
		s.reserve = nil
	}
}

// Start runs a command under a shim, whose title in a list of processes says
// what for. The error is a *StartError if the command is at fault.
//
// The streams are the command's standard ones. The caller closes its copies.
func Start(title string, command *Command, stdin, stdout, stderr *os.File) (*Child, error) {
	c, err := newShim()
	if err != nil {
		return nil, err
	}
	if err := c.run(title, command, stdin, stdout, stderr); err != nil {
		return nil, err
	}
	return c, nil
}

// newShim starts a shim that waits for its command.
func newShim() (*Child, error) {
	// Should a shim be killed, what it ran is orphaned. Then it comes to us.
	own.adopting.Do(func() { prctl(prSetChildSubreaper, 1) })

	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "control")
	defer theirs.Close()
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		syscall.Close(fds[0])
		return nil, os.NewSyscallError("control connection", err)
	}
	c := &Child{control: os.NewFile(uintptr(fds[0]), "control"), done: make(chan struct{})}
	if err := c.spawn(theirs); err != nil {
		c.control.Close()
		return nil, os.NewSyscallError("starting a shim", err)
	}
	return c, nil
}

// discard ends a shim that has no command.
func (c *Child) discard() {
	c.shim.Kill()
	c.control.Close()
	c.reap()
}

// run has the shim run a command. After an error the shim is no more.
func (c *Child) run(title string, command *Command, stdin, stdout, stderr *os.File) error {
	if err := c.start(title, command, stdin, stdout, stderr); err != nil {
		c.discard()
		if _, ok := errors.AsType[*StartError](err); !ok && err != errNoShim { //nolint:errorlint // it is never wrapped
			killOrphans() // it may have started all the same
		}
		return err
	}
	go c.watch()
	return nil
}

// roomForTitle is the title of a shim that has no command yet: spaces, as an
// argument can't have zeros.
var roomForTitle = func() string {
	title := make([]byte, maxTitle)
	for i := copy(title, "in reserve"); i < maxTitle; i++ {
		title[i] = ' '
	}
	return string(title)
}()

// spawn starts the shim. Its title is put in later: this is room for it.
func (c *Child) spawn(control *os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	own.Lock()
	defer own.Unlock()
	shim, err := os.StartProcess("/proc/self/exe", []string{Name, roomForTitle}, &os.ProcAttr{
		Dir: "/",
		// A shim does next to nothing, and need not be prepared for more. The
		// other is for race tests, where each exit would take a second.
		Env:   []string{"GOMAXPROCS=2", "GORACE=atexit_sleep_ms=0"},
		Files: []*os.File{null, null, null, control},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	c.shim = shim
	own.shims[shim.Pid] = true
	return nil
}

// reap waits for the shim, which has ended or is about to.
func (c *Child) reap() {
	pid := c.shim.Pid
	c.shim.Wait()
	own.Lock()
	defer own.Unlock()
	delete(own.shims, pid)
}

// startPatience is how long a shim may take to start a command: it might have
// been stopped by the command before it could say so.
const startPatience = 30 * time.Second

// errNoShim says that the shim was gone before it was told all.
var errNoShim = errors.New("the shim has gone")

// start has the shim start the command.
func (c *Child) start(title string, command *Command, streams ...*os.File) error {
	var fds []int
	for _, f := range streams {
		fds = append(fds, int(f.Fd()))
	}
	// A command may be more than what is taken without being read.
	c.control.SetDeadline(time.Now().Add(startPatience))
	if err := c.send(frame(frameStart, command.encodeStart(title)), syscall.UnixRights(fds...)); err != nil {
		return err
	}
	runtime.KeepAlive(streams)
	kind, payload, err := readFrame(c.control)
	c.control.SetDeadline(time.Time{})
	switch {
	case errors.Is(err, syscall.ECONNRESET):
		return errNoShim // it left unread what it was sent
	case err != nil:
		return os.NewSyscallError("the shim ended before it started the command", err)
	case kind == frameStarted && len(payload) == 4:
		c.PID = int(number(payload))
		return nil
	case kind == frameFailed && len(payload) == 4:
		return &StartError{Errno: syscall.Errno(number(payload))}
	}
	return errFrame
}

// send writes to the control connection, file descriptors with the first byte.
func (c *Child) send(data, rights []byte) error {
	raw, err := c.control.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		n, sent = syscall.SendmsgN(int(fd), data, rights, nil, syscall.MSG_NOSIGNAL)
		return sent != syscall.EAGAIN && sent != syscall.EINTR
	})
	switch {
	case err != nil:
		return err
	case sent == syscall.EPIPE || sent == syscall.ECONNRESET:
		return errNoShim
	case sent != nil:
		return os.NewSyscallError("sendmsg", sent)
	}
	if n == len(data) {
		return nil // even to write nothing fails once a short command has ended
	}
	if _, err := c.control.Write(data[n:]); err != nil {
		return os.NewSyscallError("shim", err)
	}
	return nil
}

// watch waits for the end.
func (c *Child) watch() {
	defer close(c.done)
	c.result = Result{Status: syscall.WaitStatus(syscall.SIGKILL), Lost: true}
	for {
		kind, payload, err := readFrame(c.control)
		if err != nil {
			break
		}
		if kind == frameEnded && len(payload) == 8 {
			c.result = Result{
				Status: syscall.WaitStatus(number(payload)),
				Left:   int(number(payload[4:])),
			}
		}
	}
	c.reap()
	c.mu.Lock()
	c.control.Close()
	if c.patience == nil {
		c.patience = time.NewTimer(0) // there is nothing left to kill
	}
	c.patience.Stop()
	c.mu.Unlock()
	if c.result.Lost {
		c.result.Left = killOrphans()
	}
}

// orphans is held by the one who kills orphans.
var orphans sync.Mutex

// killOrphans kills what shims that were killed themselves have left to us.
//
// They are told from children that other code of this process has started by
// their session: each shim begins a new one, so nothing below one is ever in
// ours.
func killOrphans() (left int) {
	orphans.Lock()
	defer orphans.Unlock()
	session := sessionOf(0)
	t := tree{
		own: func(children []int) []int {
			own.Lock()
			defer own.Unlock()
			return slices.DeleteFunc(children, func(pid int) bool {
				return sessionOf(pid) == session || own.shims[pid]
			})
		},
		reap: func(children []int) (none bool) {
			for _, pid := range children {
				syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
			}
			return len(children) == 0
		},
	}
	done := make(chan int)
	go func() {
		// The hurry is this thread's alone, which ends with the goroutine,
		// since it isn't unlocked.
		runtime.LockOSThread()
		hurry()
		done <- t.kill(func(d time.Duration) bool {
			time.Sleep(d)
			return false
		})
	}()
	return <-done
}

func sessionOf(pid int) int {
	session, _, _ := syscall.RawSyscall(syscall.SYS_GETSID, uintptr(pid), 0, 0)
	return int(session)
}

// Signal sends a signal to the command, and to nothing that it started.
func (c *Child) Signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A failure means that the shim has gone, and the command with it.
	writeFrame(c.control, frameSignal, numbers(uint32(sig)))
}

// killPatience is how long a shim may take to kill everything before it is
// killed itself: its command might stop it over and over.
const killPatience = 10 * time.Second

// Kill kills the command and everything that it started, and returns at once.
func (c *Child) Kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.patience != nil {
		return
	}
	writeFrame(c.control, frameKill, nil)
	c.shim.Signal(syscall.SIGCONT)
	c.patience = time.AfterFunc(killPatience, func() { c.shim.Kill() })
}

// Done is closed when the command and everything that it started have ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Wait waits for Done, and returns how the command ended.
func (c *Child) Wait() Result {
	<-c.done
	return c.result
}

// StartError says that the command couldn't be started, rather than the shim.
type StartError struct{ Errno syscall.Errno }

func (e *StartError) Error() string { return e.Errno.Error() }
func (e *StartError) Unwrap() error { return e.Errno }
