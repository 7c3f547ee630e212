//go:build unix

package files

import (
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const errQuota = syscall.EDQUOT

// openFlags keep an open from waiting for the other end of a named pipe that
// has taken a file's place.
const openFlags = syscall.O_NONBLOCK

// renamesOpen says whether a file that is open can be renamed and removed.
const renamesOpen = true

// lock takes a file for this process, unless another has it.
func lock(f *os.File) (bool, error) {
	for {
		switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err {
		case nil:
			return true, nil
		case syscall.EWOULDBLOCK:
			return false, nil
		case syscall.EINTR:
		case syscall.ENOTSUP, syscall.ENOSYS, syscall.ENOLCK:
			return true, nil // a file system without locks
		default:
			return false, os.NewSyscallError("flock", err)
		}
	}
}

// private says whether a file is this user's, with no other name by which
// somebody could have slipped it in.
func private(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid() && stat.Nlink == 1
}

// setLinkTime sets the time of a symbolic link itself.
func setLinkTime(root *os.Root, name string, t time.Time) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	err = unix.UtimesNanoAt(int(dir.Fd()), name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	return os.NewSyscallError("utimensat", err)
}
