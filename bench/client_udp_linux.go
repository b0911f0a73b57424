package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// udpSocket returns a blocking UDP socket that is connected to one of the server's ports.
func (s clientSpec) udpSocket(port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: s.Server.As4(), Port: int(port)}); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// datagrams returns how many datagrams the client passes per system call, or asks for.
func (s clientSpec) datagrams() int {
	if !s.GSO {
		return 1
	}
	return burst{count: maxSegments, size: s.messageSize()}.perFrame()
}

const (
	// drainStep is how often the server is asked whether it still receives, after the
	// client has stopped.
	drainStep = 5 * time.Millisecond
	// floodClock is how many sends go by between two looks at the clock.
	floodClock = 8
)

// udpIn sends datagrams as fast as it can. What it counts is what the server's application
// has received, from a server that has nothing to do until one that has no more to do: what
// waits in queues at the end of the window is still counted, and the time it takes too.
func (s clientSpec) udpIn() (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := s.udpSocket(s.Ports.Discard)
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = unix.Close(fd) }()
	size, count := s.messageSize(), s.datagrams()
	if count > 1 {
		if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size); err != nil {
			return sample{}, fmt.Errorf("set UDP_SEGMENT to %d: %w", size, err)
		}
	}
	server, err := s.askReceived()
	if err != nil {
		return sample{}, err
	}
	defer server.close()

	payload := chargenBytes[:count*size]
	flood := func(d time.Duration) error {
		for end := time.Now().Add(d); time.Now().Before(end); {
			for range floodClock {
				_, err := unix.Write(fd, payload)
				if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
					return fmt.Errorf("write: %w", err)
				}
			}
		}
		return nil
	}
	if err := flood(s.Warmup); err != nil {
		return sample{}, err
	}
	before, _, err := server.drained()
	if err != nil {
		return sample{}, err
	}
	cpu, err := processCPU(s.ServerPID)
	if err != nil {
		return sample{}, err
	}
	began := time.Now()
	if err := flood(s.Duration); err != nil {
		return sample{}, err
	}
	after, at, err := server.drained()
	if err != nil {
		return sample{}, err
	}
	cpuAfter, err := processCPU(s.ServerPID)
	if err != nil {
		return sample{}, err
	}
	if after == before {
		return sample{}, fmt.Errorf("nothing was received in the window of %v", s.Duration)
	}
	return sample{
		Elapsed: at.Sub(began), CPU: cpuAfter - cpu,
		Bytes: after.Bytes - before.Bytes, Ops: after.Datagrams - before.Datagrams,
	}, nil
}

// receiver tells what the server has received.
type receiver struct {
	ask   func() (counts, error)
	close func()
}

// askReceived connects to the server's port for that, or looks at the TAP's counters.
func (s clientSpec) askReceived() (*receiver, error) {
	if s.Link != "" {
		return &receiver{ask: s.linkReceived, close: func() {}}, nil
	}
	dialer := net.Dialer{Timeout: stallTimeout}
	c, err := dialer.Dial("tcp4", netip.AddrPortFrom(s.Server, s.Ports.Count).String())
	if err != nil {
		return nil, err
	}
	answers := json.NewDecoder(c)
	ask := func() (got counts, err error) {
		if err := c.SetDeadline(time.Now().Add(stallTimeout)); err != nil {
			return got, err
		}
		if _, err := c.Write([]byte{'\n'}); err != nil {
			return got, err
		}
		return got, answers.Decode(&got)
	}
	return &receiver{ask: ask, close: func() { _ = c.Close() }}, nil
}

// linkReceived returns what was read from the TAP: the kernel counts a frame when it is
// (tun_put_user of drivers/net/tun.c), so it is not one that was dropped.
func (s clientSpec) linkReceived() (counts, error) {
	link, err := netlink.LinkByName(s.Link)
	if err != nil {
		return counts{}, fmt.Errorf("find link %q: %w", s.Link, err)
	}
	stats := link.Attrs().Statistics
	const headers = 14 + udpHeaders // once per frame
	bytes := int64(stats.TxBytes) - int64(stats.TxPackets)*headers
	return counts{Bytes: bytes, Datagrams: bytes / int64(s.messageSize())}, nil
}

// drained waits until the server has received nothing for a while, and returns what it has,
// and since when.
func (r *receiver) drained() (got counts, at time.Time, err error) {
	for began := time.Now(); ; {
		now, err := r.ask()
		if err != nil {
			return got, at, fmt.Errorf("ask for what was received: %w", err)
		}
		switch {
		case at.IsZero() || now != got:
			got, at = now, time.Now()
		case time.Since(at) >= 2*drainStep:
			return got, at, nil
		}
		if time.Since(began) > stallTimeout {
			return got, at, fmt.Errorf("the server still receives %v after the last datagram", stallTimeout)
		}
		time.Sleep(drainStep)
	}
}

const (
	// udpWindow and udpWindowCount bound what the client has asked for and not got: about
	// numastack's send buffer in bytes, and as datagrams what a receive buffer of
	// udpReceiveBuffer holds of small ones, which take 768 bytes there.
	udpWindow      = 768 << 10
	udpWindowCount = 1024
	// udpBurst is how many datagrams one request asks for, and udpBurstFrames how many
	// frames of many datagrams instead.
	udpBurst         = 64
	udpBurstFrames   = 4
	udpReceiveBuffer = 4 << 20
	// udpLostAfter is how long the client waits for what it asked for before it asks again.
	udpLostAfter = 20 * time.Millisecond
)

// udpOut asks the server for bursts of datagrams, always so many that udpWindow bytes are on
// their way: a server that sends as fast as it can would measure how fast the client drops.
func (s clientSpec) udpOut() (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := s.udpSocket(s.Ports.Chargen)
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = unix.Close(fd) }()
	// More than net.core.rmem_max where we may; the kernel says no more than EPERM.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpReceiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, udpReceiveBuffer)
	}
	// A frame of many datagrams stays in one piece.
	if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
		return sample{}, fmt.Errorf("set UDP_GRO: %w", err)
	}
	limit := unix.NsecToTimeval(udpLostAfter.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return sample{}, fmt.Errorf("set SO_RCVTIMEO: %w", err)
	}

	size := s.messageSize()
	ask := burst{count: udpBurst, size: size, gso: s.GSO}
	if s.GSO {
		ask.count = udpBurstFrames * s.datagrams()
	}
	request := ask.append(nil)
	window := max(min(udpWindow/size, udpWindowCount), ask.count)
	buf := make([]byte, maxDatagramSize)
	m := newMeter(s)
	var bytes int64
	progress := time.Now()
	for outstanding := 0; ; {
		for ; outstanding+ask.count <= window; outstanding += ask.count {
			if _, err := unix.Write(fd, request); err != nil {
				return sample{}, fmt.Errorf("ask for datagrams: %w", err)
			}
		}
		n, err := unix.Read(fd, buf)
		now := time.Now()
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			if now.Sub(progress) > stallTimeout {
				return sample{}, errStalled
			}
			outstanding = 0 // lost
			continue
		case err != nil:
			return sample{}, fmt.Errorf("read: %w", err)
		case n%size != 0:
			return sample{}, fmt.Errorf("read %d bytes, want datagrams of %d", n, size)
		}
		progress = now
		outstanding = max(outstanding-n/size, 0)
		if m.running {
			bytes += int64(n)
			m.ops += int64(n / size)
		}
		if over, err := m.tick(now); err != nil {
			return sample{}, err
		} else if over {
			out, err := m.sample()
			out.Bytes = bytes
			return out, err
		}
	}
}
