package main

import (
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// setMSS limits the segment size a socket announces (tcp(7), TCP_MAXSEG). Must be called before connect.
func setMSS(raw syscall.RawConn, mss int) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, mss)
	})
	if err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("set TCP maximum segment size %d (88..32767 bytes): %w", mss, failed)
	}
	return nil
}

// pathMSS returns the segment size of an established kernel connection in bytes, 0 when it cannot be known.
func pathMSS(conn net.Conn) int {
	mss := 0
	withSocket(conn, func(fd int) {
		if v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG); err == nil {
			mss = v
		}
	})
	return mss
}

// senderState returns what TCP_INFO says about the sending half of conn: segments sent again so far and the congestion
// window in bytes. ok is false for a connection that is not a kernel socket.
func senderState(conn any) (retransmits, window int64, ok bool) {
	withSocket(conn, func(fd int) {
		if v, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			retransmits, window, ok = int64(v.Total_retrans), int64(v.Snd_cwnd)*int64(v.Snd_mss), true
		}
	})
	return retransmits, window, ok
}

// withSocket calls f with the descriptor of conn, if conn is a kernel TCP socket.
func withSocket(conn any, f func(fd int)) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	// A closed socket has no figures any more; the caller's zero values say so.
	_ = raw.Control(func(fd uintptr) { f(int(fd)) })
}

// cpuTimes returns the CPU time the process has used so far, all threads (getrusage(2)).
func cpuTimes() (user, system time.Duration) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0, 0
	}
	return time.Duration(usage.Utime.Nano()), time.Duration(usage.Stime.Nano())
}
