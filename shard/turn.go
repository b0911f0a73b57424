package shard

import (
	"fmt"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"numastack/dispatch"
)

// A turn reads so many frames at most, and no more once they have so many bytes:
// large ones leave a core's second-level cache before the application has read
// them, and make the peer wait for its acknowledgement.
const (
	rxBudget      = 32
	rxBudgetBytes = 512 << 10
)

// loop is the life of a shard: turns, and a wait when they find no work. Shards that
// share a CPU take turns: else one would go on with the few frames that came during
// its last turn, while many wait for the others.
func (s *Shard) loop() {
	// Offloaded work still uses what its handler owns.
	worked := false
	for !s.stopping || s.offloading > 0 {
		s.progress.Store(s.progress.Load() + 1)
		before := s.turnBegan
		did := s.turn()
		if worked { // the turn before, which lasted until this one
			s.counters.Busy += uint64(s.turnBegan - before)
		}
		if worked = did; did {
			s.counters.Turns++
			s.lastWork = s.now
		} else if s.now-s.lastWork >= s.moderation.now {
			s.wait()
			continue
		}
		if s.sharesCPU {
			if worked { // the other shards' turns are not this one's
				worked = false
				s.counters.Busy += uint64(s.readClock() - s.turnBegan)
			}
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
	}
}

// turn is one pass: read, steer, deliver, process, timers, run, flush. It
// returns whether there was anything to do.
func (s *Shard) turn() bool {
	s.now = max(s.readClock(), s.now)
	s.turnBegan = s.now
	s.stages.begin(s.now)
	s.rx.sweep()
	work := s.read()
	work += s.readRings()
	s.enter(stageTCP)
	s.process()
	s.enter(stageTimers)
	work += s.fireTimers()
	work += s.delayedAcks()
	s.enter(stageApplication)
	if s.mail.read(s) {
		work++
	}
	s.enter(stageApplication) // a group that came has delivered what was kept for it
	work += s.runReady()
	s.enter(stageTCP)
	s.push()
	// What the application sent to a connection of its own stack, and what the
	// timers left behind.
	s.process()
	s.acknowledge()
	if m := s.leavingGroup; m != nil {
		work++ // it does not wait for a frame
		if s.drained(m) {
			s.release(m)
		}
	}
	s.enter(stageFlush)
	work += s.tx.flush()
	s.endStages(work > 0)
	return work > 0
}

// read takes a budget of frames from the TAP queue, and steers and delivers
// each.
func (s *Shard) read() (frames int) {
	if s.deviceGone {
		return 0
	}
	emptied := false
	for bytes := 0; frames < rxBudget && bytes < rxBudgetBytes; {
		buf := s.rx.take()
		s.enter(stageRead)
		n, errno := s.queue.Read(buf.bytes)
		s.enter(stageSteer)
		if errno != 0 {
			s.rx.give(buf)
			if errno != syscall.EAGAIN && errno != syscall.EINTR {
				s.deviceGone = true // poll would return at once for ever
				s.set.fail(fmt.Errorf("read tap %q queue %d: %w", s.set.cfg.Device, s.id, errno))
			}
			emptied = errno == syscall.EAGAIN
			break
		}
		frames++
		bytes += n
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
	if m := s.leavingGroup; m != nil {
		if m.queued -= frames; emptied {
			m.queued = 0
		}
	}
	return frames
}

// steer finds the group of a frame and delivers it, or hands it to its owner.
func (s *Shard) steer(buf *rxBuffer, n int) {
	h := handover{queue: s.id, view: buf.view, offset: dispatch.VnetHeaderLen, frame: buf.bytes[dispatch.VnetHeaderLen:n]}
	if buf == s.rx.spare {
		h.view = nil
	}
	h.vnet.Decode(buf.bytes)
	if h.vnet.Valid(len(h.frame)) != nil {
		s.dropped[dropVnet]++
		return
	}
	s.set.toeplitz.Parse(h.frame, &h.parsed)
	switch h.parsed.Class {
	case dispatch.ClassFlow:
		if h.frame[0]&1 == 0 && [6]byte(h.frame) != s.set.mac {
			s.dropped[dropOtherHost]++
			return
		}
		s.route(&h, true)
	case dispatch.ClassNeighbor:
		h.view = nil // several groups get it
		for _, to := range s.set.shards {
			if to != s {
				s.forward(to.id, &h)
			}
		}
		s.deliverAll(&h)
	default:
		if !s.isMark(h.frame) {
			s.dropped[h.parsed.Class]++
		}
	}
}

// route takes a frame to its group: delivers it, hands it to the shard that owns
// the group, or keeps it when the group is on its way here. own says that it
// comes from the shard's own queue.
func (s *Shard) route(h *handover, own bool) {
	group := s.set.reta.GroupOf(h.parsed.Hash)
	if s.owns[group] {
		s.deliver(s.set.groups[group], h)
		return
	}
	owner := s.set.reta.Owner(group)
	if owner == s.id {
		s.keep(group, h.stored(), own)
		return
	}
	if own {
		s.counters.Missteered++
	}
	s.forward(owner, h)
}

// deliver hands a frame to its group.
func (s *Shard) deliver(g *Group, h *handover) {
	s.enter(stageDeliver)
	if g.arrivals != nil && h.parsed.Class == dispatch.ClassFlow {
		g.arrivals.note(h.frame, &h.parsed, h.queue)
	}
	if u, from := g.socketOf(&h.vnet, &h.parsed, h.frame); u != nil {
		u.handDatagrams(&h.vnet, &h.parsed, h.frame, from)
		return
	}
	switch {
	case h.parsed.Fragment && !h.parsed.Steered:
		s.steerFragment(g, h)
	case h.vnet.GSOType&^dispatch.VnetGSOECN == dispatch.VnetGSOUDPL4:
		s.deliverDatagrams(g, &h.vnet, &h.parsed, h.frame)
	default:
		g.deliver(&h.vnet, &h.parsed, h.frame, h.view, h.offset)
	}
	if h.parsed.Class == dispatch.ClassNeighbor {
		g.forgetHops()
		g.clock.fireAtOnce() // what waited for the neighbor leaves before what follows
	}
}

// steerFragment sends a fragment, and those that waited for it, to the group of
// its flow. Fragments arrive at the group of their addresses.
func (s *Shard) steerFragment(home *Group, h *handover) {
	if home.fragments == nil {
		home.fragments = dispatch.NewFragments(s.set.toeplitz)
	}
	goesOn := home.fragments.Steer(h.frame, &h.parsed, s.now)
	waited := handover{queue: h.queue}
	for frame, ok := home.fragments.Next(&waited.parsed); ok; frame, ok = home.fragments.Next(&waited.parsed) {
		waited.frame = frame
		s.route(&waited, false)
	}
	if goesOn {
		s.route(h, false)
	}
}

// deliverAll gives a neighbor frame to every group of this shard, also to those
// that are on their way to it.
func (s *Shard) deliverAll(h *handover) {
	for _, g := range s.groups {
		s.deliver(g, h)
	}
	for group := range s.set.groups {
		if !s.owns[group] && s.set.reta.Owner(group) == s.id {
			s.keep(group, h.stored(), false)
		}
	}
}

// stored returns h with a frame that may be kept. A large one stays in its
// receive buffer, which comes home when it was read; a small one would hold up
// 64 KB, so it is copied.
func (h *handover) stored() handover {
	kept := *h
	if h.view == nil || len(h.frame) <= rxCopyLimit {
		kept.view, kept.offset = viewOf(h.frame), 0
		kept.frame = kept.view.AsSlice()
	} else {
		kept.view = h.view.Clone()
	}
	return kept
}

// forward pushes a frame to the ring of the shard that owns its group.
func (s *Shard) forward(to int, h *handover) {
	kept := h.stored()
	target := s.set.shards[to]
	if !target.inbox[s.id].Push(kept) {
		kept.view.Release()
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
			s.popped[from]++
			s.enter(stageSteer)
			if s.set.shards[from].memory != s.memory {
				s.counters.BuffersFar++
			}
			s.receive(&h)
		}
	}
	s.counters.Received += uint64(frames)
	for i, to := range s.wakeList {
		to.wake()
		s.wakeList[i] = nil
	}
	s.wakeList = s.wakeList[:0]
	return frames
}

// receive takes a frame that another shard has read to its group. h's view is
// the shard's own.
func (s *Shard) receive(h *handover) {
	if h.parsed.Class == dispatch.ClassNeighbor {
		s.deliverAll(h)
		h.view.Release()
		return
	}
	s.route(h, false)
	h.view.Release()
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
			g.lookForBlackHoles()
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
	began := s.readClock()
	var timeout *unix.Timespec
	if deadline != never {
		ts := unix.NsecToTimespec(max(deadline-began, 0))
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
	s.stages.add(stageWait, s.now-began)
	s.counters.Spun += uint64(began - s.lastWork)
	s.moderation.waited(s.now - s.lastWork)
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
