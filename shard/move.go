package shard

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"numastack/dispatch"
)

// This file moves a flow group from one shard to another while its connections
// are busy. Nothing is copied: what changes hands is who touches the group.
//
//  1. The old owner points the indirection table at the new one, in the kernel
//     and for the other shards. It still runs the group; the new owner keeps
//     the frames that reach it (Shard.awaited).
//  2. The old owner goes on until everything that was on its way to it before
//     that has come: in its TAP queue, and in the rings from other shards.
//  3. At the end of a turn, when all that it sent is written, it lets go of the
//     group and posts it to the new owner (Shard.release).
//  4. The new owner plays the frames it has kept: what came through rings first,
//     what it read itself after (Shard.adopt). A frame that reaches the old
//     owner even later goes through the ring between the two.
//
// So each frame of a flow is delivered once, in the order of arrival: before 3
// by the old owner, after 4 by the new one.

// Errors of Move.
var (
	// ErrServing: blocking handlers (Serve) are coroutines of the shard's
	// thread, so a group stays where it is while one of its connections has one.
	ErrServing = errors.New("handlers of Serve run on its thread")

	// ErrDraining: the shard takes no groups.
	ErrDraining = errors.New("shard is draining")
)

// maxAwaited is how many frames are kept for a group on its way, more than fit
// into a moment; others are dropped and counted.
const maxAwaited = 1024

// Mover is a Handler that wants to know when a connection has come to another
// shard. Move runs on the new one's thread, before any further event: Shard, CPU
// and NUMANode say what has changed.
type Mover interface {
	Move(c *Conn)
}

// moveHook is a function that wants to know when a connection for any goroutine
// has come to another shard.
type moveHook struct {
	moved atomic.Pointer[func(shard, cpu, node int)]
}

// OnMove has the new shard's thread call f, before it processes anything of the
// connection, whenever its flow group has come there. Shard, CPU and NUMANode say
// the same from then on. The calls come one after the other. f must return soon:
// it must not block, which includes Write, Close and all options of a connection.
// Nil ends the calls. To miss no move, call OnMove first and then look where the
// connection is.
func (h *moveHook) OnMove(f func(shard, cpu, node int)) {
	if f == nil {
		h.moved.Store(nil)
	} else {
		h.moved.Store(&f)
	}
}

func (h *moveHook) movedTo(s *Shard) {
	if f := h.moved.Load(); f != nil {
		(*f)(s.id, s.cpu, s.node)
	}
}

// move is a flow group on its way. It belongs to the old owner until that has
// let go of the group, then to the new one.
type move struct {
	g        *Group
	from, to *Shard
	done     chan struct{}

	began int64       // when the table was changed
	left  int64       // when the old owner let go
	ready []readyTask // what is to be served next

	queued int          // so many frames of the TAP queue may be from before
	mark   uint64       // the number of the mark behind them
	busy   atomic.Int32 // shards that may still be forwarding a frame by the old table
	rings  []uint64     // when so many have come out of each ring, all from before have
}

// Move gives a flow group and its live connections to another shard, and
// returns when that has taken it. It may be called from any goroutine but a
// shard's; moves happen one after the other. It returns nil when the group is
// there already, [ErrServing] when it has to stay, [ErrDraining] or [ErrClosed]
// when the shard takes none, or what the kernel said.
func (set *Set) Move(group, to int) error {
	switch {
	case group < 0 || group >= len(set.groups):
		return fmt.Errorf("move flow group %d: want 0 to %d", group, len(set.groups)-1)
	case to < 0 || to >= len(set.shards):
		return fmt.Errorf("move flow group %d to shard %d: want 0 to %d", group, to, len(set.shards)-1)
	}
	set.moveMu.Lock()
	defer set.moveMu.Unlock()
	return set.moveLocked(group, to)
}

func (set *Set) moveLocked(group, to int) error {
	from := set.reta.Owner(group)
	if from == to {
		return nil
	}
	m := &move{g: set.groups[group], from: set.shards[from], to: set.shards[to], done: make(chan struct{})}
	err := ErrClosed
	switch {
	case set.draining[to]:
		err = ErrDraining
	case !set.closing && m.from.do(func(s *Shard) { err = s.begin(m) }) && err == nil:
		<-m.done
	}
	if err != nil {
		return fmt.Errorf("move flow group %d from shard %d to shard %d: %w", group, from, to, err)
	}
	return nil
}

// point makes frames of a flow group go to a shard from now on.
func (set *Set) point(group int, to *Shard) error {
	set.reta.SetOwner(group, to.id)
	if set.cfg.Program == nil {
		return nil
	}
	for bucket := group; bucket < dispatch.Buckets; bucket += len(set.groups) {
		if err := set.cfg.Program.SetQueue(bucket, uint32(to.id)); err != nil {
			return err
		}
	}
	return nil
}

// begin is the first step, on the old owner's thread.
func (s *Shard) begin(m *move) error {
	switch {
	case s.over():
		return ErrClosed
	case m.g.served > 0:
		return fmt.Errorf("%d %w", m.g.served, ErrServing)
	}
	m.began = s.readClock()
	if err := s.set.point(m.g.id, m.to); err != nil {
		err = errors.Join(err, s.set.point(m.g.id, s))
		m.to.post(taskFunc(func(to *Shard) { to.play(m.g) })) // what it has kept comes back
		return err
	}
	s.leavingGroup = m
	if s.set.cfg.Program != nil {
		// The TAP queue does not tell how many frames it holds. A mark behind
		// them says when they have come; without one, an empty queue does, or
		// as many frames as it can hold.
		m.queued = s.set.cfg.QueueLen
		if s.set.cfg.Marker != nil {
			m.mark = uint64(m.began)
			_ = s.set.cfg.Marker.Send(s.id, m.mark) // fails when the queue is full, for one
		}
	} else {
		// What is in the queue goes on to the new owner through the ring, like
		// what comes after it. But the others read frames of the group too, and
		// one of them may just have looked at the table. Between two of its turns
		// it has not.
		for _, other := range s.set.shards {
			if other == s {
				continue
			}
			m.busy.Add(1)
			if !other.post(taskFunc(func(*Shard) { m.busy.Add(-1) })) {
				m.busy.Add(-1) // it has ended
			}
		}
	}
	return nil
}

// drained reports whether everything has come that was on its way to the old
// owner before the move. Called at the end of its turns.
func (s *Shard) drained(m *move) bool {
	if m.g.active || m.busy.Load() > 0 {
		return false
	}
	if m.rings == nil {
		m.rings = make([]uint64, len(s.inbox))
		for from, ring := range s.inbox {
			if ring != nil {
				m.rings[from] = s.popped[from] + uint64(ring.Len())
			}
		}
	}
	for from, n := range m.rings {
		if s.popped[from] < n {
			return false
		}
	}
	return m.queued <= 0 || s.deviceGone
}

// isMark reports whether a frame is a mark, and takes note of the one that the
// move waits for.
func (s *Shard) isMark(frame []byte) bool {
	if s.set.cfg.Marker == nil {
		return false
	}
	n, ok := s.set.cfg.Marker.Number(frame)
	if m := s.leavingGroup; ok && m != nil && n == m.mark {
		m.queued = 0
	}
	return ok
}

// release lets go of the group at the end of a turn.
func (s *Shard) release(m *move) {
	g := m.g
	s.leavingGroup = nil
	s.settle()
	s.delayed.flush(g)
	s.tx.flush()
	s.groups = slices.DeleteFunc(s.groups, func(h *Group) bool { return h == g })
	s.owns[g.id] = false
	s.ready = slices.DeleteFunc(s.ready, func(r readyTask) bool {
		if r.group() == g {
			m.ready = append(m.ready, r)
			return true
		}
		return false
	})
	for c := range g.conns.all {
		s.counters.ConnsOpen--
		if c.full {
			s.fullBuffers--
		}
	}
	s.counters.GroupsReleased++
	m.left = s.now
	m.to.post(taskFunc(func(to *Shard) { to.adopt(m) })) // Close waits for the move, so it has not ended
}

// adopt takes a group over. It runs among the tasks of a turn, so what it
// delivers is processed in the same turn.
func (s *Shard) adopt(m *move) {
	g := m.g
	s.now = max(s.now, m.left) // time does not go back for the group
	g.shard = s
	g.at.Store(s)
	g.clock.now, g.clock.earliest = &s.now, &s.earliest
	s.earliest = min(s.earliest, g.clock.next())
	s.groups = append(s.groups, g)
	s.owns[g.id] = true
	s.ready = append(s.ready, m.ready...)
	for c := range g.conns.all {
		s.counters.ConnsOpen++
		if c.full {
			s.fullBuffers++
		}
		if h, ok := c.h.(Mover); ok && c.opened {
			h.Move(c)
		}
	}
	for _, u := range g.sockets {
		if u.moved != nil {
			u.moved(s)
		}
	}
	if s.deviceGone {
		g.lose()
	}
	s.play(g)
	stall := uint64(max(s.readClock()-m.began, 0))
	s.counters.GroupsAdopted++
	if m.from.memory != s.memory {
		s.counters.GroupsFar++
	}
	s.counters.MoveStall += stall
	s.counters.MoveStallMax = max(s.counters.MoveStallMax, stall)
	close(m.done)
}

// play routes what was kept for a group, now that it has arrived or does not
// come.
func (s *Shard) play(g *Group) {
	kept := s.awaited[g.id]
	if kept == nil {
		return
	}
	s.awaited[g.id] = nil
	for _, frames := range [][]handover{kept.forwarded, kept.own} {
		for _, h := range frames {
			s.replay(g, &h)
			h.view.Release()
		}
	}
	for _, t := range kept.tasks {
		t.run(s)
	}
}

// replay routes a frame that was kept for a group. A neighbor frame was kept for
// this group only, whatever it hashes to.
func (s *Shard) replay(g *Group, h *handover) {
	switch {
	case h.parsed.Class != dispatch.ClassNeighbor:
		s.route(h, false)
	case s.owns[g.id]:
		s.deliver(g, h)
	}
}

// awaitedGroup is what a shard keeps for a group that is on its way to it.
type awaitedGroup struct {
	forwarded, own []handover // frames that came through rings, and from the shard's own queue
	tasks          []task
}

// await returns what is kept for a group that the table gives to the shard,
// but which has not arrived.
func (s *Shard) await(group int) *awaitedGroup {
	if s.awaited[group] == nil {
		s.awaited[group] = new(awaitedGroup)
	}
	return s.awaited[group]
}

// keep stores a frame of a group that has not arrived. It takes over h's view.
func (s *Shard) keep(group int, h handover, own bool) {
	kept := s.await(group)
	if len(kept.forwarded)+len(kept.own) == maxAwaited {
		h.view.Release()
		s.dropped[dropMoving]++
		return
	}
	s.counters.FramesKept++
	if own {
		kept.own = append(kept.own, h)
	} else {
		kept.forwarded = append(kept.forwarded, h)
	}
}

// passOn gives a task for a group that is not here to the shard that has it, or
// keeps it until it comes. It returns false when that shard has ended.
func (s *Shard) passOn(g *Group, t task) bool {
	if owner := s.set.reta.Owner(g.id); owner != s.id {
		return s.set.shards[owner].post(t)
	}
	kept := s.await(g.id)
	kept.tasks = append(kept.tasks, t)
	return true
}

// groupCall is a function that runs on the thread that owns a group.
type groupCall struct {
	g    *Group
	f    func(g *Group) error
	done chan error // buffered
}

// run implements task.
func (t *groupCall) run(s *Shard) {
	switch {
	case s.owns[t.g.id]:
		t.done <- t.f(t.g)
	case !s.passOn(t.g, t):
		t.done <- ErrClosed
	}
}

// do runs f on the thread that owns the group, waits for it and returns its
// error, or ErrClosed when that has ended.
func (g *Group) do(f func(g *Group) error) error {
	t, ok := g.post(f)
	if !ok {
		return ErrClosed
	}
	return <-t.done
}

// perform is do for a function that cannot fail; it returns whether f ran.
func (g *Group) perform(f func()) bool {
	return g.do(func(*Group) error { f(); return nil }) == nil
}

// post is do without the wait.
func (g *Group) post(f func(g *Group) error) (*groupCall, bool) {
	t := &groupCall{g: g, f: f, done: make(chan error, 1)}
	return t, g.set.shards[g.set.reta.Owner(g.id)].post(t)
}
