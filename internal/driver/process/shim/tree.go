package shim

import (
	"os"
	"strconv"
	"syscall"
	"time"
)

// The numbers of these system calls are the same on all architectures.
const (
	sysPidfdSendSignal = 424
	sysPidfdOpen       = 434
)

// Process is a process as /proc shows it. Its start time tells it from a later
// one with the same pid.
type Process struct {
	PID, Parent, Session int
	started              uint64
}

// processes returns all processes that can be seen.
func processes() ([]Process, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var all []Process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := look(pid); ok {
			all = append(all, p)
		}
	}
	return all, nil
}

// look reads a process from /proc.
func look(pid int) (Process, bool) {
	fd, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/stat", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return Process{}, false
	}
	defer syscall.Close(fd)
	var buf [1024]byte
	n, err := syscall.Read(fd, buf[:])
	if err != nil {
		return Process{}, false
	}
	// The second field is the program's name in parentheses, which may hold
	// anything, parentheses too.
	rest := buf[:n]
	for len(rest) > 0 && rest[len(rest)-1] != ')' {
		rest = rest[:len(rest)-1]
	}
	p := Process{PID: pid}
	field, value := 2, uint64(0)
	for _, c := range append(buf[len(rest):n], ' ') {
		if c >= '0' && c <= '9' {
			value = 10*value + uint64(c-'0')
			continue
		}
		if c != ' ' {
			continue
		}
		switch field {
		case 4:
			p.Parent = int(value)
		case 6:
			p.Session = int(value)
		case 22:
			p.started = value
			return p, true
		}
		field, value = field+1, 0
	}
	return Process{}, false
}

// signal sends a signal to the process, unless it has gone and its pid belongs
// to another by now.
func (p Process) signal(sig syscall.Signal) error {
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(p.PID), 0, 0)
	if errno == syscall.ENOSYS || errno == syscall.EPERM {
		// An old kernel, or a sandbox that doesn't know pidfds: the pid could
		// be another's only if it came round since we read /proc.
		return syscall.Kill(p.PID, sig)
	}
	if errno != 0 {
		return errno
	}
	defer syscall.Close(int(fd))
	if now, ok := look(p.PID); !ok || now.started != p.started {
		return syscall.ESRCH
	}
	return signalFD(int(fd), sig)
}

func signalFD(fd int, sig syscall.Signal) error {
	if _, _, errno := syscall.Syscall6(sysPidfdSendSignal, uintptr(fd), uintptr(sig), 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// descendants returns the children of this process that root selects, and all
// that is below them.
func descendants(root func(Process) bool) ([]Process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	children := make(map[int][]Process)
	var found []Process
	for _, p := range all {
		switch {
		case p.PID == self:
		case p.Parent != self:
			children[p.Parent] = append(children[p.Parent], p)
		case root(p):
			found = append(found, p)
		}
	}
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i].PID]...)
		delete(children, found[i].PID)
	}
	return found, nil
}

// killAll kills what find finds, which is all below this process or some of its
// children, until wait says that there is nothing left. It relies on this
// process being a subreaper, so that nothing can leave the tree, and on
// somebody to reap what dies. wait takes as long as it is given at most.
//
// It returns how many processes are left because they may not be killed: those
// of another user, if this process isn't root's.
func killAll(find func() ([]Process, error), wait func(time.Duration) (none bool)) (left int) {
	// A process that forks faster than it is killed would get away for ever.
	// Stopped ones can't fork, and keep their share of the limit on processes,
	// so that the number of those still running only falls. When there is none
	// that hasn't been stopped, all are killed.
	stopped := make(map[Process]bool)
	unseen := 0
	for pause := time.Millisecond; !wait(pause); pause = min(2*pause, 100*time.Millisecond) {
		// What can't be found now, for want of file descriptors perhaps, may
		// be found the next time.
		found, _ := find()
		fresh := false
		for _, p := range found {
			// The parent changes when a process is orphaned.
			p.Parent, p.Session = 0, 0
			if !stopped[p] {
				stopped[p] = true
				fresh = p.signal(syscall.SIGSTOP) == nil || fresh
			}
		}
		if fresh {
			pause = 0
			continue
		}
		denied := 0
		for _, p := range found {
			if p.signal(syscall.SIGKILL) == syscall.EPERM {
				denied++
			}
		}
		if denied > 0 && denied == len(found) {
			return denied
		}
		if len(found) > 0 {
			unseen = 0
		} else if unseen++; unseen > 50 {
			// There are children that /proc hides from us: they are another
			// user's.
			return 1
		}
		pause = max(pause, time.Millisecond)
	}
	return 0
}
