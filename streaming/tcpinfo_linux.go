package streaming

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// unacknowledged says whether the peer's kernel has acknowledged nothing for
// d although it should have.
//
// It tells a lost network from a client that is merely paused: the kernel of a
// paused client closes its window, but acknowledges the probes that are sent
// to see whether it has opened. TCP_USER_TIMEOUT can't be used for that: Linux
// applies it to acknowledged probes of a closed window, too, and would end
// paused clients.
//
// Probes come up to two minutes apart, so that it takes some time to miss two
// of them after a long pause.
func unacknowledged(conn *net.TCPConn, d time.Duration) bool {
	info := tcpInfo(conn)
	if info == nil {
		return false
	}
	// One unanswered retransmission or probe may be under way just now.
	missed := info.Unacked > 0 && info.Retransmits >= 2 || info.Probes >= 2
	return missed && time.Duration(info.Last_ack_recv)*time.Millisecond >= d
}

// backlogged says whether something waits to be sent: the peer, or the way to
// it, is slow, and not this process.
func backlogged(conn *net.TCPConn) bool {
	info := tcpInfo(conn)
	return info == nil || info.Notsent_bytes > 0
}

func tcpInfo(conn *net.TCPConn) *unix.TCPInfo {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil
	}
	var info *unix.TCPInfo
	if raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}) != nil || err != nil {
		return nil
	}
	return info
}
