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

// process is a process below this one, and who its parent was when it was seen.
type process struct{ pid, parent int }

// parents reads from /proc which processes have which parent.
func parents() (map[int][]int, error) {
	names, err := list("/proc")
	if err != nil {
		return nil, err
	}
	children := make(map[int][]int)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if parent, ok := parentOf(pid); ok {
			children[parent] = append(children[parent], pid)
		}
	}
	return children, nil
}

func list(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// parentOf reads a process's parent from /proc.
func parentOf(pid int) (int, bool) {
	fd, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/stat", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, false
	}
	defer syscall.Close(fd)
	var buf [1024]byte
	n, err := syscall.Read(fd, buf[:])
	if err != nil {
		return 0, false
	}
	// The second field is the program's name in parentheses, which may hold
	// anything, parentheses too. A letter follows, and then the parent.
	end := n
	for end > 0 && buf[end-1] != ')' {
		end--
	}
	if end == 0 || end+3 >= n {
		return 0, false
	}
	parent, digits := 0, 0
	for _, c := range buf[end+3 : n] {
		if c < '0' || c > '9' {
			break
		}
		parent, digits = 10*parent+int(c-'0'), digits+1
	}
	return parent, digits > 0
}

// childrenOfThread reads from /proc which children a thread has, in the order
// in which it got them.
func childrenOfThread(pid, tid int) ([]int, error) {
	fd, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/task/"+strconv.Itoa(tid)+"/children", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	var children []int
	var buf [4096]byte
	for child := 0; ; {
		n, err := syscall.Read(fd, buf[:])
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return children, err
		}
		for _, c := range buf[:n] {
			if c >= '0' && c <= '9' {
				child = 10*child + int(c-'0')
			} else if child > 0 {
				children = append(children, child)
				child = 0
			}
		}
	}
}

// childrenOf reads from /proc which children a process has. It has none any
// more if it can't be read.
func childrenOf(pid int) []int {
	threads, _ := list("/proc/" + strconv.Itoa(pid) + "/task")
	var children []int
	for _, name := range threads {
		if tid, err := strconv.Atoi(name); err == nil {
			some, _ := childrenOfThread(pid, tid)
			children = append(children, some...)
		}
	}
	return children
}

// signal sends a signal to the process, unless it has gone and its pid belongs
// to another by now.
func (p process) signal(sig syscall.Signal) error {
	self := os.Getpid()
	if p.parent == self {
		// Its pid is its own until we wait for it.
		return syscall.Kill(p.pid, sig)
	}
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(p.pid), 0, 0)
	if errno == syscall.ENOSYS || errno == syscall.EPERM {
		// An old kernel, or a sandbox that doesn't know pidfds: the pid could
		// be another's only if it came round since we read /proc.
		return syscall.Kill(p.pid, sig)
	}
	if errno != 0 {
		return errno
	}
	defer syscall.Close(int(fd))
	// If it was orphaned since, it is ours.
	if parent, ok := parentOf(p.pid); !ok || parent != p.parent && parent != self {
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

// tree is what is below this process, or below some of its children. Nothing
// leaves it but by ending: this process is a subreaper, so what is orphaned
// becomes its child.
type tree struct {
	// own selects from the children of this process. It may be changed.
	own func(children []int) []int
	// reap waits for those children that have ended, and says whether there
	// are none any more. No others wait for them while a pass is under way.
	reap func(children []int) (none bool)
}

// pass goes from the children down to the last descendants, and sends each the
// signal that choose wants, if it isn't 0. Choose also says whether the process
// has had its signal before, so that nothing new is below it.
//
// Speed matters: what forks and exits as fast as it can is a child of ours for
// less than a millisecond, and has to be met before it forks. A signal that is
// pending keeps a process from forking. So each gets its signal before its
// children are read: these are all that it will ever have, or it has ended and
// they are our children the next time.
func (t *tree) pass(choose func(pid int) (sig syscall.Signal, known bool)) (found, denied int, none bool, err error) {
	self := os.Getpid()
	// Orphans go to the main thread. Other threads' children are those that
	// they have started.
	children := childrenOf
	first, err := childrenOfThread(self, self)
	switch {
	case err == syscall.ENOENT:
		// A kernel that doesn't list children. To find them takes longer.
		all, err := parents()
		if err != nil {
			return 0, 0, false, err
		}
		children = func(pid int) []int { return all[pid] }
		first = all[self]
	case err != nil:
		return 0, 0, false, err
	}
	first = t.own(first)
	var level []process
	for _, pid := range first {
		level = append(level, process{pid, self})
	}
	for len(level) > 0 {
		found += len(level)
		var open, next []process
		for _, p := range level {
			sig, known := choose(p.pid)
			if sig != 0 && p.signal(sig) == syscall.EPERM {
				denied++
				known = false
			}
			if !known {
				open = append(open, p)
			}
		}
		for _, p := range open {
			for _, pid := range children(p.pid) {
				next = append(next, process{pid, p.pid})
			}
		}
		level = next
	}
	return found, denied, t.reap(first), nil
}

// kill kills the tree. wait takes as long as it is given at most; it says
// whether there is nothing left.
//
// It returns how many processes are left because they may not be killed: those
// of another user, if this process isn't root's.
func (t *tree) kill(wait func(time.Duration) (none bool)) (left int) {
	// Processes that fork are stopped before they are killed: stopped ones
	// keep their share of a limit on processes, so that the number of those
	// still running only falls.
	//
	// But stopped ones must not become much more than there were: if each has
	// a successor already when it is stopped, they would fill the host's table
	// of processes. So after that all are killed wherever they are met.
	stopped := make(map[int]bool)
	limit := -1
	for limit < 0 || len(stopped) < limit {
		before := len(stopped)
		found, _, none, err := t.pass(func(pid int) (syscall.Signal, bool) {
			if stopped[pid] || limit >= 0 && len(stopped) >= limit {
				return 0, true
			}
			stopped[pid] = true
			return syscall.SIGSTOP, false
		})
		if none {
			return 0
		}
		if err != nil || len(stopped) == before {
			break
		}
		if limit < 0 {
			limit = 2*found + 16
		}
	}

	killed := make(map[int]bool)
	unseen := 0
	for pause := time.Duration(0); !wait(pause); {
		again := make(map[int]bool)
		fresh := false
		found, denied, none, err := t.pass(func(pid int) (syscall.Signal, bool) {
			fresh = fresh || !killed[pid]
			again[pid] = true
			return syscall.SIGKILL, killed[pid]
		})
		killed = again
		switch {
		case none:
			return 0
		case err != nil:
			// What can't be found now, for want of file descriptors perhaps,
			// may be found the next time.
		case denied > 0 && denied == found:
			return denied
		case found > 0:
			unseen = 0
		default:
			if unseen++; unseen > 50 {
				// There are children that /proc hides from us: they are
				// another user's.
				return 1
			}
		}
		if pause = min(max(2*pause, time.Millisecond), 100*time.Millisecond); fresh {
			pause = 0
		}
	}
	return 0
}
