package main

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// bulkBuffer is the size of the client's reads and writes in bytes.
const bulkBuffer = 256 << 10

// bulk streams in one direction on every connection, from one thread and one buffer. What it
// counts into the server is what the server's TCP has acknowledged, not what fits into the
// socket's buffer.
func (s clientSpec) bulk() (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := newPoller()
	if err != nil {
		return sample{}, err
	}
	defer ep.close()
	port, events, move := s.Ports.Discard, uint32(unix.EPOLLOUT), unix.Write
	if s.Load == loadBulkOut {
		port, events, move = s.Ports.Chargen, unix.EPOLLIN, unix.Read
	}
	fds := make([]int, s.Conns)
	for i := range fds {
		if fds[i], err = ep.dial(s.Server, port, i, events); err != nil {
			return sample{}, err
		}
		defer reset(fds[i]) // nothing needs the rest at the end
	}

	var received int64
	buf := make([]byte, bulkBuffer)
	stream := func(d time.Duration) error {
		for end := time.Now().Add(d); ; {
			left := time.Until(end)
			if left <= 0 {
				return nil
			}
			ready, err := ep.within(left)
			if err != nil {
				return err
			}
			for _, event := range ready {
				n, err := move(fds[event.Fd], buf)
				switch {
				case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
				case err != nil:
					return fmt.Errorf("connection %d: %w", event.Fd, err)
				case n == 0:
					return fmt.Errorf("connection %d: the server closed it", event.Fd)
				default:
					received += int64(n)
				}
			}
		}
	}
	var bytes [2]int64
	var cpu [2]time.Duration
	var at [2]time.Time
	for i, d := range []time.Duration{s.Warmup, s.Duration} {
		if err := stream(d); err != nil {
			return sample{}, err
		}
		at[i] = time.Now()
		if cpu[i], err = processCPU(s.ServerPID); err != nil {
			return sample{}, err
		}
		bytes[i] = received
		if s.Load == loadBulkIn {
			if bytes[i], err = acknowledged(fds); err != nil {
				return sample{}, err
			}
		}
	}
	if bytes[1] == bytes[0] {
		return sample{}, fmt.Errorf("not a byte moved in the window of %v", s.Duration)
	}
	return sample{Elapsed: at[1].Sub(at[0]), CPU: cpu[1] - cpu[0], Bytes: bytes[1] - bytes[0]}, nil
}

// acknowledged returns how many bytes the peers' TCP has acknowledged on all connections.
func acknowledged(fds []int) (bytes int64, err error) {
	for _, fd := range fds {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, fmt.Errorf("read TCP_INFO: %w", err)
		}
		bytes += int64(info.Bytes_acked)
	}
	return bytes, nil
}
