//go:build !linux

package storage

import "syscall"

// restrictSocket does nothing: elsewhere, the directory of the socket has to
// keep others out until its mode is set.
func restrictSocket(_, _ string, _ syscall.RawConn) error { return nil }
