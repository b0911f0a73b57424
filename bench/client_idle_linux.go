package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// idleSettle is how long the connections are left alone before the server's memory is
	// taken: longer than delayed ACKs and the first retransmissions last.
	idleSettle = 300 * time.Millisecond
	// idleOpenLimit bounds the time one connection takes to open, on average.
	idleOpenLimit = time.Millisecond
)

// idle has one request answered on each connection, so that all of them have met their
// handler and its buffers, keeps them open and asks the server for its memory: once before
// the first connection and once with all of them.
func (s clientSpec) idle() (sample, error) {
	before, err := s.askMemory()
	if err != nil {
		return sample{}, err
	}
	conns := make([]unix.PollFd, 0, s.Conns)
	defer func() {
		for _, c := range conns {
			reset(int(c.Fd))
		}
	}()
	began := time.Now()
	for i := range s.Conns {
		fd, err := dial(s.Server, s.Ports.Echo)
		if err != nil {
			return sample{}, fmt.Errorf("connection %d: %w", i, err)
		}
		conns = append(conns, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP})
		if err := setBlocking(fd); err != nil {
			return sample{}, err
		}
		r := newRequest(messageBytes)
		if err := r.send(fd, uint64(i), 0, time.Now()); err != nil {
			return sample{}, fmt.Errorf("connection %d: %w", i, err)
		}
		if err := r.await(fd); err != nil {
			return sample{}, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	elapsed := time.Since(began)

	time.Sleep(idleSettle)
	after, err := s.askMemory()
	if err != nil {
		return sample{}, err
	}
	// A connection that is gone takes no memory. None has anything to read otherwise.
	if n, err := unix.Poll(conns, 0); err != nil {
		return sample{}, fmt.Errorf("poll: %w", err)
	} else if n > 0 {
		return sample{}, fmt.Errorf("%d of %d connections did not stay open and silent", n, s.Conns)
	}
	return sample{Elapsed: elapsed, Ops: int64(s.Conns), Memory: after.minus(before)}, nil
}

// askMemory returns what the server tells about itself.
func (s clientSpec) askMemory() (memory, error) {
	dialer := net.Dialer{Timeout: stallTimeout}
	c, err := dialer.Dial("tcp4", netip.AddrPortFrom(s.Server, s.Ports.Memory).String())
	if err != nil {
		return memory{}, err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(stallTimeout)); err != nil {
		return memory{}, err
	}
	var m memory
	if err := json.NewDecoder(c).Decode(&m); err != nil {
		return memory{}, fmt.Errorf("read the server's memory: %w", err)
	}
	return m, nil
}
