//go:build !linux

package streaming

import (
	"net"
	"time"
)

// unacknowledged can't be known here: a lost network looks like a paused
// client, and is found after Options.StallTimeout or by the kernel.
func unacknowledged(*net.TCPConn, time.Duration) bool { return false }

// backlogged can't be known here, either: what takes long may be the peer's
// doing.
func backlogged(*net.TCPConn) bool { return true }
