package storage

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// restrictSocket is a net.ListenConfig.Control. Linux gives the file its
// socket's mode, so that there is no moment at which others could connect.
func restrictSocket(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
		return cerr
	}
	return err
}
