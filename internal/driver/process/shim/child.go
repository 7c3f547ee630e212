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

// Start runs a command under a shim, whose title in a list of processes says
// what for. The error is a *StartError if the command is at fault.
//
// The streams are the command's standard ones. The caller closes its copies.
func Start(title string, command *Command, stdin, stdout, stderr *os.File) (*Child, error) {
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
	if err := c.spawn(title, stdin, stdout, stderr, theirs); err != nil {
		c.control.Close()
		return nil, os.NewSyscallError("starting a shim", err)
	}
	theirs.Close()
	if err := c.start(command); err != nil {
		c.shim.Kill()
		c.control.Close()
		c.reap()
		if _, ok := errors.AsType[*StartError](err); !ok {
			killOrphans() // it may have started all the same
		}
		return nil, err
	}
	go c.watch()
	return c, nil
}

// spawn starts the shim.
func (c *Child) spawn(title string, files ...*os.File) error {
	own.Lock()
	defer own.Unlock()
	shim, err := os.StartProcess("/proc/self/exe", []string{Name, title}, &os.ProcAttr{
		Dir: "/",
		// A shim does next to nothing, and need not be prepared for more. The
		// other is for race tests, where each exit would take a second.
		Env:   []string{"GOMAXPROCS=2", "GORACE=atexit_sleep_ms=0"},
		Files: files,
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

// start has the shim start the command.
func (c *Child) start(command *Command) error {
	if err := writeFrame(c.control, frameStart, command.encode()); err != nil {
		return os.NewSyscallError("shim", err)
	}
	c.control.SetReadDeadline(time.Now().Add(startPatience))
	kind, payload, err := readFrame(c.control)
	c.control.SetReadDeadline(time.Time{})
	switch {
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
