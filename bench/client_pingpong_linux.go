package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// pingPongOne sends one request at a time on one blocking socket: no poller between the
// arrival of an answer and the thread that waits for it.
func (s clientSpec) pingPongOne() (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := dial(s.Server, s.Ports.Echo)
	if err != nil {
		return sample{}, err
	}
	defer reset(fd)
	if err := setBlocking(fd); err != nil {
		return sample{}, err
	}

	r := newRequest(s.messageSize())
	m := newMeter(s)
	for seq := uint64(0); ; seq++ {
		now := time.Now()
		if seq > 0 {
			m.record(now.Sub(r.sent))
		}
		if over, err := m.tick(now); err != nil {
			return sample{}, err
		} else if over {
			return m.sample()
		}
		if err := r.send(fd, 0, seq, now); err != nil {
			return sample{}, err
		}
		if err := r.await(fd); err != nil {
			return sample{}, err
		}
	}
}

// exchange is one outstanding request of a connection and its answer. Both methods are for a
// non-blocking socket.
type exchange interface {
	// send writes the next request; id and seq tell it from all others.
	send(fd int, id, seq uint64, now time.Time) error
	// receive reads once and reports whether the answer is complete and right.
	receive(fd int) (complete bool, err error)
}

var (
	_ exchange = (*request)(nil)
	_ exchange = (*httpRequest)(nil)
)

// exchangeMany keeps one request outstanding on every connection, from one thread.
func (s clientSpec) exchangeMany(port uint16, newExchange func() exchange) (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := newPoller()
	if err != nil {
		return sample{}, err
	}
	defer ep.close()

	type connection struct {
		exchange
		fd       int
		seq      uint64
		sent     time.Time
		answered bool // in the window
	}
	conns := make([]connection, s.Conns)
	for i := range conns {
		c := &conns[i]
		c.exchange = newExchange()
		if c.fd, err = ep.dial(s.Server, port, i, unix.EPOLLIN); err != nil {
			return sample{}, err
		}
		defer reset(c.fd)
	}
	for i := range conns {
		conns[i].sent = time.Now()
		if err := conns[i].send(conns[i].fd, uint64(i), 0, conns[i].sent); err != nil {
			return sample{}, err
		}
	}

	m := newMeter(s)
	for {
		ready, err := ep.wait()
		if err != nil {
			return sample{}, err
		}
		if over, err := m.tick(time.Now()); err != nil {
			return sample{}, err
		} else if over {
			break
		}
		for _, event := range ready {
			c := &conns[event.Fd]
			complete, err := c.receive(c.fd)
			if err != nil {
				return sample{}, fmt.Errorf("connection %d: %w", event.Fd, err)
			}
			if !complete {
				continue
			}
			now := time.Now()
			m.record(now.Sub(c.sent))
			c.answered = c.answered || m.running
			c.seq++
			c.sent = now
			if err := c.send(c.fd, uint64(event.Fd), c.seq, now); err != nil {
				return sample{}, fmt.Errorf("connection %d: %w", event.Fd, err)
			}
		}
	}
	for i := range conns {
		if !conns[i].answered {
			return sample{}, fmt.Errorf("connection %d got no answer in the window of %v", i, s.Duration)
		}
	}
	return m.sample()
}

// poller is an epoll instance whose events carry an index of the caller's in their Fd.
type poller struct {
	fd     int
	events [128]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &poller{fd: fd}, nil
}

func (p *poller) close() { _ = unix.Close(p.fd) }

func (p *poller) add(fd, index int, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(index)}
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// dial opens a connection, whose events then have its index.
func (p *poller) dial(addr netip.Addr, port uint16, index int, events uint32) (int, error) {
	fd, err := dial(addr, port)
	if err != nil {
		return -1, err
	}
	if err := p.add(fd, index, events); err != nil {
		reset(fd)
		return -1, err
	}
	return fd, nil
}

// wait returns at least one event; they are valid until the next call.
func (p *poller) wait() ([]unix.EpollEvent, error) {
	for {
		n, err := unix.EpollWait(p.fd, p.events[:], int(stallTimeout.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, fmt.Errorf("epoll_wait: %w", err)
		case n == 0:
			return nil, errStalled
		default:
			return p.events[:n], nil
		}
	}
}

// within is wait for at most d: there may be no event. 0 looks without waiting.
func (p *poller) within(d time.Duration) ([]unix.EpollEvent, error) {
	n, err := unix.EpollWait(p.fd, p.events[:], int((d+time.Millisecond-1)/time.Millisecond))
	switch {
	case errors.Is(err, unix.EINTR):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("epoll_wait: %w", err)
	default:
		return p.events[:n], nil
	}
}
