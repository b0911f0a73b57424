package shard

import (
	"fmt"
	"maps"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"

	"numastack/dispatch"
	"numastack/numaalloc"
)

// Shard is one locked OS thread with its TAP queue, its receive buffers, its
// inbox rings and the flow groups it owns.
type Shard struct {
	// Immutable after start.
	id, cpu, node int
	sharesCPU     bool // with another shard
	memory        int  // the node of its memory: its own, or the nearest with some
	set           *Set
	queue         *dispatch.Queue
	inbox         []*dispatch.Ring[handover] // by sending shard; nil for itself
	eventFD       int
	pool          *numaalloc.NodePool // of its node

	// Any thread.
	_        [64]byte // keeps other threads' writes away from the loop's fields
	mail     mailbox
	parked   atomic.Bool   // true only while the thread waits, or is about to
	progress atomic.Uint64 // passes of the loop; the shard writes, the watchdog reads
	_        [64]byte

	// Owned by the shard's thread.
	readClock    func() int64 // nanoseconds since the stack started; called once per turn
	now          int64        // what it returned
	turnBegan    int64        // what it was then; now moves on
	lastWork     int64        // now of the last turn that did work
	moderation   moderation
	earliest     int64 // no timer of its groups is due before
	groups       []*Group
	owns         []bool          // by group: it is here
	awaited      []*awaitedGroup // by group: what is kept for one on its way here
	leavingGroup *move           // nil: none is on its way out
	popped       []uint64        // frames taken out of inbox, by sending shard
	active       []*Group        // groups whose TCP has work in this turn
	ready        []readyTask
	readyNext    []readyTask
	tx           *txQueue
	arena        *numaalloc.Arena // its methods count for themselves
	rx           rxBuffers
	wakeList     []*Shard // shards that got a frame in this burst
	scratch      *scratch
	fullBuffers  int // connections whose send buffer is full
	bulk         bulkCount
	unsent       []*Conn                  // connections that something was written to in this turn
	owed         []*Conn                  // connections that received something in this turn
	delayed      delayedAckQueue          // those whose peers wait for an acknowledgement
	served       map[*ServedConn]struct{} // handlers that have not ended
	offloading   int                      // functions that the pool has
	offloadWaits []*ServedConn            // handlers whose function waits for room there
	paths        map[tcpip.Address]narrowPath

	stages  stageTimes
	settled uint64 // busy time that was divided among the groups

	leaving    bool // Close was called: nothing new begins
	stopping   bool // leave the loop
	deviceGone bool // leave the queue alone
	counters   Counters
	dropped    [dropEnd]uint64
}

// handover is a frame on its way to the shard that owns its group. The view
// is a reference of its own and belongs to whoever pops the handover.
type handover struct {
	vnet   dispatch.VnetHeader
	parsed dispatch.Parsed
	queue  int          // that it came from
	view   *buffer.View // nil: frame must not be lent
	offset int          // of frame in view
	frame  []byte       // from the Ethernet header on
}

// readyTask is a connection, listener or socket with something to do. serve
// runs in the application's step of the turn.
type readyTask interface {
	serve(s *Shard)
	group() *Group
}

// Reasons to drop a frame beyond the parser's classes.
const (
	dropOtherHost = int(dispatch.NumClasses) + iota
	dropVnet
	dropMoving
	dropEnd
)

func dropCause(i int) string {
	switch i {
	case dropOtherHost:
		return "other_host"
	case dropVnet:
		return "bad_vnet_header"
	case dropMoving:
		return "moving"
	default:
		return dispatch.Class(i).String()
	}
}

// start makes the shard's thread and its groups, and returns when it is ready
// to run its loop.
func (s *Shard) start() error {
	ready := make(chan error)
	go onOwnThread(func() { s.thread(ready) })
	return <-ready
}

// onOwnThread runs f locked to a thread that ends with it. The process's main
// thread never ends, and its name is the process's: if the runtime has chosen
// that one, a second goroutine gets another while this one keeps it busy.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f() // never unlocked: the thread is pinned and named, so it ends
		return
	}
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(locked)
		f()
	}()
	<-locked
	runtime.UnlockOSThread()
}

func (s *Shard) thread(ready chan<- error) {
	defer s.set.running.Done()
	if err := s.setup(); err != nil {
		s.teardown()
		ready <- err
		return
	}
	ready <- nil
	<-s.set.begin
	s.loop()
	s.teardown()
}

func (s *Shard) setup() error {
	if err := numaalloc.Pin(s.cpu); err != nil {
		return fmt.Errorf("shard %d: %w", s.id, err)
	}
	_ = numaalloc.NameThread(fmt.Sprintf("numastack/%d", s.id)) // cosmetic
	// Made here, so that the memory is first touched on the shard's node.
	s.now = s.readClock()
	s.earliest = never
	memory := -1
	if s.set.cfg.MemoryNodes != nil {
		memory = s.set.cfg.MemoryNodes[s.id]
	}
	if memory >= 0 && memory != s.node {
		_ = numaalloc.BindThread(memory) // the CPU's node has no memory; any other is as good
	}
	arena, err := numaalloc.NewArena(numaalloc.ArenaConfig{Node: memory})
	if err != nil {
		return fmt.Errorf("shard %d: %w", s.id, err)
	}
	s.arena = arena
	s.rx = newRxBuffers(s.set.cfg.RxBuffers, arena)
	s.tx = newTxQueue(s.queue, s.set.cfg.Offloads, &s.counters)
	s.scratch = new(scratch)
	s.served = make(map[*ServedConn]struct{})
	for id := range s.set.reta.Groups() {
		if s.set.reta.Owner(id) != s.id {
			continue
		}
		g, err := newGroup(id, s, s.set.start)
		if err != nil {
			return err
		}
		s.groups = append(s.groups, g)
		s.owns[id] = true
		s.set.groups[id] = g
	}
	return nil
}

func (s *Shard) teardown() {
	s.leaving = true
	s.mail.close(s)
	for co := range s.served {
		co.stop() // wherever it waits, it learns that this is the end
	}
	for _, g := range s.groups {
		g.stack.Destroy()
	}
	if s.tx != nil {
		s.tx.flush()
	}
	for _, ring := range s.inbox {
		for ring != nil {
			h, ok := ring.Pop()
			if !ok {
				break
			}
			h.view.Release()
		}
	}
	if s.arena != nil {
		_ = s.arena.Close() // the heap gets its memory back without a policy
	}
}

// bytesPerFrame is how many bytes of received frames weigh as much as one more
// frame: one of the largest size costs about five times as much as a small one.
const bytesPerFrame = 16 << 10

// settle divides the shard's busy time since the last call among its groups. To
// measure it would take two looks at the clock per group and turn.
func (s *Shard) settle() {
	busy := s.counters.Busy - s.settled
	s.settled = s.counters.Busy
	total := uint64(0)
	for _, g := range s.groups {
		total += g.newWeight()
	}
	for _, g := range s.groups {
		if w := g.newWeight(); w > 0 {
			g.busy += uint64(float64(busy) * float64(w) / float64(total))
			g.weight += w
		}
	}
}

func (g *Group) newWeight() uint64 {
	return g.frames + g.link.sent + g.bytes/bytesPerFrame - g.weight
}

// count copies the counters. Called on the shard's thread.
func (s *Shard) count() Counters {
	s.settle()
	c := s.counters
	c.Shard, c.CPU, c.Node, c.At = s.id, s.cpu, s.node, uint64(s.turnBegan)
	c.DroppedByCause = make(map[string]uint64)
	for i, n := range s.dropped {
		if n > 0 {
			c.Dropped += n
			c.DroppedByCause[dropCause(i)] += n
		}
	}
	for _, g := range s.groups {
		if g.fragments == nil {
			continue
		}
		g.fragments.Expire(s.now)
		f := g.fragments.Counters()
		c.FragmentsHeld += f.Held
		for cause, n := range map[string]uint64{"fragment_full": f.Full, "fragment_expired": f.Expired, "fragment_too_small": f.TooSmall} {
			if n > 0 {
				c.Dropped += n
				c.DroppedByCause[cause] += n
			}
		}
	}
	maps.DeleteFunc(s.paths, func(_ tcpip.Address, p narrowPath) bool { return s.now >= p.until })
	c.NarrowPaths = uint64(len(s.paths))
	if s.arena != nil {
		a := s.arena.Stats()
		c.MemoryNode, c.BytesBound, c.BindFallbacks = s.arena.Node(), uint64(a.BoundBytes), uint64(a.Fallbacks)
	}
	c.Stages = s.stages.counters()
	c.Spin = uint64(s.moderation.now)
	c.Buffers = uint64(s.rx.made)
	c.BuffersLent = uint64(len(s.rx.lent))
	for _, g := range s.groups {
		c.Groups = append(c.Groups, g.counters())
		if g.memory != s.memory {
			c.GroupsAway++
		}
	}
	return c
}

func newEventFD() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("create eventfd: %w", err)
	}
	return fd, nil
}
