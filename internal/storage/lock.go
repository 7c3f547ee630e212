package storage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// LockDir makes the process the only one that uses a data directory, which is
// created if it is missing. The lock ends with the process, however that ends,
// or by release. Its file stays: taking it away would let two processes lock
// different files of the same name.
func LockDir(dir string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't create the data directory: %w", err)
	}
	return lock(filepath.Join(dir, "aaserver.lock"), dir)
}

// lock locks a file, which is created if it is missing, in the name of what it
// protects.
func lock(path, what string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("can't lock %s: %w", what, err)
	}
	for {
		// A lock of the open file, not of the process: a second one in the
		// same process fails as well.
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("can't lock %s: %w", what, err)
		}
		holder := "another aaserver"
		pid := make([]byte, 20)
		if n, _ := f.ReadAt(pid, 0); n > 0 {
			if pid, err := strconv.Atoi(string(bytes.TrimSpace(pid[:n]))); err == nil {
				holder += fmt.Sprintf(" (pid %d)", pid)
			}
		}
		return nil, fmt.Errorf("%s is in use by %s; stop it first, or choose another", what, holder)
	}
	// The pid helps people only, so that a full disk must not keep us from
	// starting.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return func() { f.Close() }, nil
}
