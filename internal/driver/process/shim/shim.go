// Package shim is the small process between the agent and each command that it
// runs. It is the agent's own binary, executed again, and makes sure of one
// thing: that everything its command started has gone when the command has
// ended, when the agent says so, and when the agent is no more, kill -9
// included; also what called setsid or forked twice.
//
//	agent ──control connection──▶ shim ──▶ command ──▶ …
//	                               ▲                    │
//	                               └─── orphans ────────┘   (child subreaper)
//
// It isn't a sandbox. A command that runs as the agent's own user can stop its
// shim. Then the shim goes on when the agent ends, but a command that stops it
// over and over until after the agent's end, or kills it after, lives on. To
// keep a command from that, run it as another user.
//
// A binary that links this package is a shim when it is called by [Name] and
// has a control connection from its parent.
//
// It imports little of the standard library and nothing else. Packages are
// initialised in the order of their import paths as soon as what they import
// is, so this one comes before all that isn't needed here: the initialisation
// of Kubernetes' packages would take longer than everything else. That is why
// bytes, encoding/binary, fmt and os/signal are not imported: they, or what
// they import, come late.
package shim

import (
	"errors"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// Name is what a shim is called, its argument 0. It isn't a name that somebody
// would give to a file, and not enough by itself.
const Name = "aaserver: shim"

// controlFD is the shim's end of the control connection.
const controlFD = 3

const (
	prSetParentDeath    = 1
	prSetDumpable       = 4
	prSetName           = 15
	prSetChildSubreaper = 36
	sigSetMask          = 2
	sigDefault          = 0
	sigIgnore           = 1
	lastSignal          = 64
)

// The one init that does something: see the package comment.
func init() {
	if len(os.Args) > 0 && os.Args[0] == Name {
		os.Exit(run())
	}
}

func run() int {
	parent, err := syscall.GetsockoptUcred(controlFD, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	if err != nil || int(parent.Pid) != os.Getppid() {
		os.Stderr.WriteString("This is a part of aaserver that it starts by itself. Run \"aaserver\" instead.\n")
		return 2
	}
	syscall.CloseOnExec(controlFD)
	closeInherited()
	// A command can stop its shim, which then would see nothing of the agent's
	// end: so that it does, it goes on when the agent ends. For a shim that
	// isn't stopped this signal is nothing, also when it comes because just
	// the agent's thread has ended.
	if errno := prctl(prSetParentDeath, uintptr(syscall.SIGCONT)); errno != 0 {
		return fail(errno)
	}
	// What runs as the same user can't trace a process that isn't dumpable,
	// nor take its files, of which the control connection is one.
	if errno := prctl(prSetDumpable, 0); errno != 0 {
		return fail(errno)
	}
	name := append([]byte("aaserver-shim"), 0)
	prctl(prSetName, uintptr(unsafe.Pointer(&name[0])))
	if errno := prctl(prSetChildSubreaper, 1); errno != 0 {
		return fail(errno)
	}
	// This thread is the one that forks: the main thread, which an init is
	// locked to, and which lives as long as the process. PDEATHSIG depends on
	// it, too.
	var none uint64
	syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, sigSetMask, uintptr(unsafe.Pointer(&none)), 0, 8, 0, 0)
	syscall.Umask(0o022)
	// What the agent ignores, because nohup started it for example, its
	// commands don't.
	for sig := range lastSignal {
		if handler(sig+1) == sigIgnore {
			setHandler(sig+1, sigDefault)
		}
	}

	// Until its command comes, nothing distinguishes a shim in reserve.
	var header frameHeader
	streams, err := readRights(header[:])
	if err != nil {
		return 1 // the agent has gone, or needs it no more
	}
	control := os.NewFile(controlFD, "control")
	kind, payload, err := readPayload(control, header)
	if err != nil || kind != frameStart || len(streams) != 3 {
		return 1
	}
	title, command, err := decodeStart(payload)
	if err != nil {
		return fail(syscall.EINVAL)
	}
	setTitle(title)
	pidfd := -1
	pid, err := syscall.ForkExec(command.Path, command.Args, &syscall.ProcAttr{
		Dir:   command.Dir,
		Env:   command.Env,
		Files: streams,
		Sys: &syscall.SysProcAttr{
			Credential: command.Credential,
			Setsid:     true,
			Setctty:    command.TTY,
			Pdeathsig:  syscall.SIGKILL,
			PidFD:      &pidfd,
		},
	})
	if err != nil {
		errno := syscall.EIO
		errors.As(err, &errno)
		return fail(errno)
	}
	// The command's standard streams end with the command.
	for _, fd := range streams {
		syscall.Close(int(fd))
	}
	// Whoever stops the agent, be it by a ^C or as a service manager that
	// signals all of its processes, leaves it to the agent to end its commands
	// in order.
	for _, sig := range []syscall.Signal{
		syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU,
	} {
		setHandler(int(sig), sigIgnore)
	}
	// If this fails the agent has gone, which the reader below finds as well.
	writeFrame(control, frameStarted, numbers(uint32(pid)))

	kill := make(chan struct{})
	go func() {
		for {
			kind, payload, err := readFrame(control)
			switch {
			case err != nil || kind == frameKill:
				close(kill)
				return
			case kind == frameSignal && len(payload) == 4:
				sig := syscall.Signal(number(payload))
				if pidfd < 0 || signalFD(pidfd, sig) == syscall.ENOSYS {
					syscall.Kill(pid, sig)
				}
			}
		}
	}()

	// The reaper takes the command and all that was orphaned, until there is
	// no child left, which means no descendant. It leaves them be while they
	// are killed, so that their pids stay their own. Until it comes, what has
	// ended takes a place in the table of processes; so where many compete it
	// needs more than its share of the processor, and so does who kills. Only
	// root's shims get it.
	ended := make(chan syscall.WaitStatus, 1)
	childless := make(chan struct{})
	var killing sync.Mutex
	reap := func() (none bool) {
		for {
			var status syscall.WaitStatus
			child, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			switch {
			case err == syscall.EINTR:
			case err != nil:
				return true
			case child == 0:
				return false
			case child == pid:
				ended <- status
			}
		}
	}
	go func() {
		defer close(childless)
		runtime.LockOSThread()
		hurry()
		for none := false; !none; {
			awaitChild()
			killing.Lock()
			none = reap()
			killing.Unlock()
		}
	}()

	// A command that couldn't be killed has no status.
	status := syscall.WaitStatus(syscall.SIGKILL)
	select {
	case status = <-ended:
	case <-kill:
	}
	hurry()
	everything := tree{
		own:  func(children []int) []int { return children },
		reap: func([]int) bool { return reap() },
	}
	killing.Lock()
	reap() // what has ended needs no signal
	left := everything.kill(func(d time.Duration) bool {
		killing.Unlock()
		defer killing.Lock()
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-childless:
			return true
		case <-timer.C:
			return false
		}
	})
	killing.Unlock()
	select {
	case status = <-ended:
	default:
	}
	writeFrame(control, frameEnded, numbers(uint32(status), uint32(left)))
	return 0
}

// hurry lets this thread go before all that isn't in a hurry, if it may. A nice
// value wouldn't do: the kernel may share the processor between sessions first.
func hurry() {
	const fifo, resetOnFork = 1, 0x40000000
	lowest := int32(1)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SCHED_SETSCHEDULER, 0, fifo|resetOnFork, uintptr(unsafe.Pointer(&lowest))); errno != 0 {
		syscall.Setpriority(syscall.PRIO_PROCESS, 0, -20)
	}
}

// awaitChild waits until a child has ended, or there is none. It doesn't reap.
func awaitChild() {
	const all, exited, keep = 0, 4, 0x01000000 // P_ALL, WEXITED, WNOWAIT
	for {
		// The answer isn't wanted, but old kernels and sandboxes may want a
		// place for it.
		var info [128]byte
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, all, 0, uintptr(unsafe.Pointer(&info)), exited|keep, 0, 0)
		if errno != syscall.EINTR {
			return
		}
	}
}

func fail(errno syscall.Errno) int {
	writeFrame(os.NewFile(controlFD, "control"), frameFailed, numbers(uint32(errno)))
	return 1
}

// handler returns a signal's disposition; setHandler changes it. The kernel's
// struct begins with the handler and is otherwise zero here.
func handler(sig int) uintptr {
	var action [8]uint64
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&action)), 8, 0, 0)
	return uintptr(action[0])
}

func setHandler(sig int, handler uintptr) {
	action := [8]uint64{uint64(handler)}
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
}

func prctl(option int, argument uintptr) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, uintptr(option), argument, 0, 0, 0, 0)
	return errno
}

// closeInherited closes what the agent itself was started with and never
// marked close-on-exec: a listening socket, for example. What the Go runtime
// has opened since is so marked.
func closeInherited() {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil || fd <= controlFD {
			continue
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno == 0 && flags&syscall.FD_CLOEXEC == 0 {
			syscall.Close(fd)
		}
	}
}

// readRights fills data from the control connection, and takes the file
// descriptors that come with it.
func readRights(data []byte) ([]uintptr, error) {
	const most = 3
	oob := make([]byte, syscall.CmsgSpace(most*4))
	for {
		n, oobn, _, _, err := syscall.Recvmsg(controlFD, data, oob, syscall.MSG_CMSG_CLOEXEC|syscall.MSG_WAITALL)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n != len(data) {
			return nil, errFrame
		}
		messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			return nil, errFrame
		}
		fds, err := syscall.ParseUnixRights(&messages[0])
		var files []uintptr
		for _, fd := range fds {
			files = append(files, uintptr(fd))
		}
		return files, err
	}
}

// setTitle changes what a list of processes shows of the shim: its argument 1,
// in whose place the kernel looks.
func setTitle(title string) {
	if len(os.Args) < 2 || len(os.Args[1]) < len(title) {
		return
	}
	place := unsafe.Slice(unsafe.StringData(os.Args[1]), len(os.Args[1]))
	clear(place[copy(place, title):])
}
