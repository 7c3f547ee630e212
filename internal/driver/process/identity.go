package process

import (
	"syscall"
	"unsafe"
)

// setThreadIdentity changes who the calling thread is to file systems. The
// functions of package syscall would change it for the whole process.
func setThreadIdentity(uid, gid uint32, groups []uint32) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])), 0); errno != 0 {
		return errno
	}
	// These two have no errors of their own. To leave root's file system uid
	// is to lose root's power over files.
	syscall.RawSyscall(syscall.SYS_SETFSGID, uintptr(gid), 0, 0)
	syscall.RawSyscall(syscall.SYS_SETFSUID, uintptr(uid), 0, 0)
	return nil
}
