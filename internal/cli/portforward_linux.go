package cli

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// restrictSocket has a unix socket made for its user alone from the first: on
// Linux the file gets the mode that its socket had.
func restrictSocket(_, _ string, conn syscall.RawConn) error {
	var failure error
	if err := conn.Control(func(fd uintptr) { failure = unix.Fchmod(int(fd), 0o600) }); err != nil {
		return err
	}
	return failure
}
