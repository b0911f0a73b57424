package shard

import (
	"fmt"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"numastack/dispatch"
)

// rxBudget is how many frames a turn reads at most. Sixteen 64 KB frames fill
// a core's second-level cache; with more the buffers go cold before the
// application has read them.
const rxBudget = 16

// loop is the life of a shard: turns, and a wait when they find no work.
func (s *Shard) loop() {
	// Offloaded work still uses what its handler owns.
	for !s.stopping || s.offloading > 0 {
		s.progress.Store(s.progress.Load() + 1)
		if s.turn() {
			s.counters.Turns++
			s.lastWork = s.now
			continue
		}
		if s.now-s.lastWork >= s.spin {
			s.wait()
		}
	}
}

// turn is one pass: read, steer, deliver, process, timers, run, flush. It
// returns whether there was anything to do.
func (s *Shard) turn() bool {
	s.now = max(s.readClock(), s.now)
	s.rx.sweep()
	work := s.read()
	work += s.readRings()
	s.process()
	work += s.fireTimers()
	work += s.delayedAcks()
	if s.mail.read(s) {
		work++
	}
	work += s.runReady()
	// What the application did to a connection of its own stack, and what the
	// timers left behind.
	s.process()
	s.acknowledge()
	work += s.tx.flush()
	return work > 0
}

// read takes a budget of frames from the TAP queue, and steers and delivers
// each.
func (s *Shard) read() (frames int) {
	if s.deviceGone {
		return 0
	}
	for frames < rxBudget {
		buf := s.rx.take()
		n, errno := s.queue.Read(buf.bytes)
		if errno != 0 {
			s.rx.give(buf)
			if errno != syscall.EAGAIN && errno != syscall.EINTR {
				s.deviceGone = true // poll would return at once for ever
				s.set.fail(fmt.Errorf("read tap %q queue %d: %w", s.set.cfg.Device, s.id, errno))
			}
			break
		}
		frames++
		if n > dispatch.VnetHeaderLen {
			s.counters.RxFrames++
			s.counters.RxBytes += uint64(n - dispatch.VnetHeaderLen)
			if buf == s.rx.spare && n > rxCopyLimit {
				s.counters.BuffersExhausted++
			}
			s.steer(buf, n)
		} else {
			s.dropped[dropVnet]++
		}
		s.rx.give(buf)
	}
	for i, to := range s.wakeList {
		to.wake()
		s.wakeList[i] = nil
	}
	s.wakeList = s.wakeList[:0]
	return frames
}

// steer finds the group of a frame and delivers it, or hands it to its owner.
func (s *Shard) steer(buf *rxBuffer, n int) {
	var (
		vnet   dispatch.VnetHeader
		parsed dispatch.Parsed
	)
	vnet.Decode(buf.bytes)
	frame := buf.bytes[dispatch.VnetHeaderLen:n]
	view := buf.view
	if buf == s.rx.spare {
		view = nil
	}
	if vnet.Valid(len(frame)) != nil {
		s.dropped[dropVnet]++
		return
	}
	s.set.toeplitz.Parse(frame, &parsed)
	switch parsed.Class {
	case dispatch.ClassFlow:
		if frame[0]&1 == 0 && [6]byte(frame) != s.set.mac {
			s.dropped[dropOtherHost]++
			return
		}
		if parsed.Fragment && parsed.Proto == uint8(header.TCPProtocolNumber) {
			// Fragments go by address, so the segment would come together in a
			// group that has no such connection, and earn it a reset.
			s.dropped[dropTCPFragment]++
			return
		}
		group := s.set.reta.GroupOf(parsed.Hash)
		if owner := s.set.reta.Owner(group); owner != s.id {
			s.counters.Missteered++
			s.forward(owner, &vnet, &parsed, frame, view)
			return
		}
		if s.tx.arrivals != nil {
			s.tx.arrivals.note(frame, &parsed, s.id)
		}
		s.deliver(s.set.groups[group], &vnet, &parsed, frame, view, dispatch.VnetHeaderLen)
	case dispatch.ClassNeighbor:
		for _, to := range s.set.shards {
			if to != s {
				s.forward(to.id, &vnet, &parsed, frame, nil)
			}
		}
		s.deliverAll(&vnet, &parsed, frame)
	default:
		s.dropped[parsed.Class]++
	}
}

// deliver hands a frame to its group. view holds the frame at offset; nil when
// it must not be lent.
func (s *Shard) deliver(g *Group, vnet *dispatch.VnetHeader, parsed *dispatch.Parsed, frame []byte, view *buffer.View, offset int) {
	if vnet.GSOType&^dispatch.VnetGSOECN == dispatch.VnetGSOUDPL4 {
		s.deliverDatagrams(g, vnet, parsed, frame)
		return
	}
	g.deliver(vnet, parsed, frame, view, offset)
}

// deliverAll gives a neighbor frame to every group of this shard.
func (s *Shard) deliverAll(vnet *dispatch.VnetHeader, parsed *dispatch.Parsed, frame []byte) {
	for _, g := range s.groups {
		g.deliver(vnet, parsed, frame, nil, 0)
	}
}

// forward pushes a frame to the ring of the shard that owns its group. A large
// frame travels in its receive buffer, which comes home when it was read; a
// small one would hold up 64 KB, so it is copied.
func (s *Shard) forward(to int, vnet *dispatch.VnetHeader, parsed *dispatch.Parsed, frame []byte, view *buffer.View) {
	h := handover{vnet: *vnet, parsed: *parsed}
	if view == nil || len(frame) <= rxCopyLimit {
		h.view = buffer.NewViewWithData(frame)
		h.frame = h.view.AsSlice()
	} else {
		h.view, h.offset, h.frame = view.Clone(), dispatch.VnetHeaderLen, frame
	}
	target := s.set.shards[to]
	if !target.inbox[s.id].Push(h) {
		h.view.Release()
		s.counters.RingFull++
		return
	}
	s.counters.Forwarded++
	if !slices.Contains(s.wakeList, target) {
		s.wakeList = append(s.wakeList, target)
	}
}

// readRings delivers what other shards read for this one.
func (s *Shard) readRings() (frames int) {
	for from, ring := range s.inbox {
		if ring == nil {
			continue
		}
		for range rxBudget {
			h, ok := ring.Pop()
			if !ok {
				break
			}
			frames++
			if h.parsed.Class == dispatch.ClassNeighbor {
				s.deliverAll(&h.vnet, &h.parsed, h.frame)
			} else {
				if s.tx.arrivals != nil {
					s.tx.arrivals.note(h.frame, &h.parsed, from)
				}
				g := s.set.groups[s.set.reta.GroupOf(h.parsed.Hash)]
				s.deliver(g, &h.vnet, &h.parsed, h.frame, h.view, h.offset)
			}
			h.view.Release()
		}
	}
	s.counters.Received += uint64(frames)
	return frames
}

// process runs TCP for the connections that got segments.
func (s *Shard) process() {
	for i := 0; i < len(s.active); i++ {
		g := s.active[i]
		g.active = false
		g.tcp.process()
		s.active[i] = nil
	}
	s.active = s.active[:0]
}

func (s *Shard) fireTimers() (fired int) {
	if s.now < s.earliest {
		return 0
	}
	for _, g := range s.groups {
		if g.clock.next() <= s.now {
			fired += g.clock.fire()
			g.activate() // a timer may re-queue an endpoint
		}
	}
	// Firing arms timers, so only now is it known which one is next.
	s.earliest = never
	for _, g := range s.groups {
		s.earliest = min(s.earliest, g.clock.next())
	}
	s.counters.TimersFired += uint64(fired)
	return fired
}

// runReady serves the connections, listeners and sockets that are ready. What
// becomes ready meanwhile waits for the next turn.
func (s *Shard) runReady() int {
	n := len(s.ready)
	if n == 0 {
		return 0
	}
	s.ready, s.readyNext = s.readyNext[:0], s.ready
	for i, r := range s.readyNext {
		r.serve(s)
		s.readyNext[i] = nil
	}
	return n
}

// wait blocks until a frame, a task or a timer needs the shard.
func (s *Shard) wait() {
	s.parked.Store(true)
	// Whoever posts looks at parked after posting, so one of both sees the
	// other.
	if s.mail.pending.Load() || s.ringsFilled() || len(s.ready) > 0 {
		s.parked.Store(false)
		return
	}
	deadline := s.deadline()
	fds := [2]unix.PollFd{
		{Fd: int32(s.eventFD), Events: unix.POLLIN},
		{Fd: int32(s.queue.FD()), Events: unix.POLLIN},
	}
	watched := fds[:]
	if s.deviceGone {
		watched = fds[:1]
	}
	var timeout *unix.Timespec
	if deadline != never {
		ts := unix.NsecToTimespec(max(deadline-s.readClock(), 0))
		timeout = &ts
	}
	_, _ = unix.Ppoll(watched, timeout, nil) // an error is a wake: the turn finds out why
	s.parked.Store(false)
	s.counters.Wakes++
	if fds[0].Revents != 0 {
		var b [8]byte
		_, _ = unix.Read(s.eventFD, b[:])
	}
	s.now = max(s.readClock(), s.now)
	s.lastWork = s.now
}

// deadline returns when there is work although nothing arrives.
func (s *Shard) deadline() int64 { return min(s.earliest, s.delayed.next()) }

func (s *Shard) ringsFilled() bool {
	for _, ring := range s.inbox {
		if ring != nil && ring.Len() > 0 {
			return true
		}
	}
	return false
}
