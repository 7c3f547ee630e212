package process

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process/shim"
)

// openTerminal makes a terminal for a command: ours is where it is read,
// written and sized. github.com/creack/pty isn't used because it makes ours
// block in a thread, so that a read can't have a deadline.
func openTerminal(command *shim.Command) (ours, theirs *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	ours = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			ours.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, os.NewSyscallError("unlocking a terminal", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, os.NewSyscallError("naming a terminal", err)
	}
	theirs, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	if command.Credential != nil {
		// What opens its terminal by name has to own it.
		if err := theirs.Chown(int(command.Credential.Uid), -1); err != nil {
			theirs.Close()
			return nil, nil, err
		}
	}
	return ours, theirs, nil
}

// setSize tells a terminal its size. It does nothing once the terminal has
// gone.
func setSize(terminal *os.File, size driver.TerminalSize) {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
}
