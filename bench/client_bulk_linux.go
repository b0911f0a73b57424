package main

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// bulkBuffer is the size of the client's reads and writes in bytes.
const bulkBuffer = 256 << 10

// stream is one bulk connection.
type stream struct {
	conn *net.TCPConn
	read atomic.Int64 // bytes; its goroutine writes, bulk reads
}

// bulk streams in one direction on every connection. What it counts into the server is
// what the server's TCP has acknowledged, not what fits into the socket's buffer.
func (s clientSpec) bulk() (sample, error) {
	port, pump, count := s.Ports.Discard, (*stream).writeAll, (*stream).acknowledged
	if s.Load == loadBulkOut {
		port, pump, count = s.Ports.Chargen, (*stream).readAll, (*stream).received
	}

	streams := make([]*stream, s.Conns)
	failed := make(chan error, s.Conns)
	dialer := net.Dialer{Timeout: stallTimeout}
	for i := range streams {
		c, err := dialer.Dial("tcp4", netip.AddrPortFrom(s.Server, port).String())
		if err != nil {
			return sample{}, err
		}
		defer func() { _ = c.Close() }()
		streams[i] = &stream{conn: c.(*net.TCPConn)}
		_ = streams[i].conn.SetLinger(0) // nothing needs the rest at the end
		go func() { failed <- pump(streams[i]) }()
	}

	var bytes [2]int64
	var cpu [2]time.Duration
	var at [2]time.Time
	for i, wait := range []time.Duration{s.Warmup, s.Duration} {
		select {
		case err := <-failed:
			return sample{}, err
		case <-time.After(wait):
		}
		at[i] = time.Now()
		var err error
		if cpu[i], err = processCPU(s.ServerPID); err != nil {
			return sample{}, err
		}
		for _, st := range streams {
			n, err := count(st)
			if err != nil {
				return sample{}, err
			}
			bytes[i] += n
		}
	}
	if bytes[1] == bytes[0] {
		return sample{}, fmt.Errorf("not a byte moved in the window of %v", s.Duration)
	}
	return sample{Elapsed: at[1].Sub(at[0]), CPU: cpu[1] - cpu[0], Bytes: bytes[1] - bytes[0]}, nil
}

func (st *stream) writeAll() error {
	buf := make([]byte, bulkBuffer)
	for {
		if _, err := st.conn.Write(buf); err != nil {
			return err
		}
	}
}

func (st *stream) readAll() error {
	buf := make([]byte, bulkBuffer)
	for {
		n, err := st.conn.Read(buf)
		st.read.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func (st *stream) received() (int64, error) { return st.read.Load(), nil }

func (st *stream) acknowledged() (int64, error) {
	raw, err := st.conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	var infoErr error
	if err := raw.Control(func(fd uintptr) {
		info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); err != nil {
		return 0, err
	}
	if infoErr != nil {
		return 0, fmt.Errorf("read TCP_INFO: %w", infoErr)
	}
	return int64(info.Bytes_acked), nil
}
