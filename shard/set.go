package shard

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"numastack/dispatch"
	"numastack/numaalloc"
)

// ErrClosed is returned for calls to a Set that was closed, or whose device is
// gone. It matches net.ErrClosed.
var ErrClosed = fmt.Errorf("numastack: stack is closed: %w", net.ErrClosed)

// Limits of the rings between shards, in frames. All rings into one shard
// share what is left when there are many shards.
const (
	ringFrames    = 4096
	ringMinFrames = 64
	ringMaxFrames = 1024
)

// Config is what the shards of one stack share. All fields are required
// unless they say otherwise; package stack has defaults and checks them.
type Config struct {
	Device                    string // name of the TAP, for messages
	Queues                    []*dispatch.Queue
	MAC                       net.HardwareAddr // the stack's; nil draws a random one
	MTU                       int              // bytes of an IP packet
	Offloads                  Offloads         // what the kernel does for frames that are written
	Topology                  *numaalloc.Topology
	Costs                     *numaalloc.Costs // of remote memory
	CPUs                      []int            // by shard
	MemoryNodes               []int            // by shard: where its buffers belong; nil: there is nothing to choose
	RETA                      *dispatch.RETA   // flow groups and their owners
	Toeplitz                  *dispatch.Toeplitz
	Program                   *dispatch.Program // steers in the kernel by RETA and Toeplitz; nil: the shards do
	Marker                    *dispatch.Marker  // with Program; nil: moves take longer on a busy shard
	QueueLen                  int               // frames that the kernel holds per queue at most
	Addrs                     []netip.Prefix    // the stack's addresses
	Gateways                  []netip.Addr      // default routes; may be empty
	Spin                      time.Duration     // how long an idle shard looks for work before it blocks at most
	Congestion                string            // gVisor's name of the congestion control; empty: reno
	SendBuffer, ReceiveBuffer int               // bytes per TCP connection to start with

	RxBuffers      int           // receive buffers per shard
	MaxConns       int           // connections per shard
	HandlerLimit   time.Duration // a handler that takes longer is reported; 0: none is
	OffloadThreads int           // of a node pool; 0: as many as CPUs
	NodeScratch    int           // bytes per thread of a node pool; 0: numaalloc's default
	Drain          time.Duration // how long Close lets connections say goodbye
	Logger         *slog.Logger
}

// Set is the shards of one stack, what they share, and the control plane that
// reaches them from other goroutines.
type Set struct {
	cfg      Config // immutable after New
	mac      [6]byte
	start    time.Time
	toeplitz *dispatch.Toeplitz
	reta     *dispatch.RETA
	shards   []*Shard
	groups   []*Group // made by their shards before the loops begin

	begin    chan struct{} // closed when all shards are set up
	running  sync.WaitGroup
	stop     sync.Once
	doneOnce sync.Once
	done     chan struct{} // closed when the device is lost or the set closed
	failure  atomic.Pointer[error]
	halted   chan struct{} // closed after the last shard
	final    []Counters    // the last ones, once halted
	ended    chan struct{} // closed at the end of Close

	dials atomic.Uint32 // spreads dials over groups

	moveMu   sync.Mutex // held during a move; guards what follows
	draining []bool     // by shard: takes no groups
	closing  bool       // no more moves

	pools    *numaalloc.NodePools // immutable after New
	costs    atomic.Pointer[numaalloc.Costs]
	watchdog *watchdog // nil: off

	listenMu  sync.Mutex
	listeners map[*Listener]struct{} // guarded by listenMu
}

// New makes the shards, one per queue, and starts their threads.
func New(cfg Config) (*Set, error) {
	set, err := newSet(cfg)
	if err != nil {
		return nil, err
	}
	if err := set.makePools(); err != nil {
		set.closeEventFDs()
		return nil, err
	}
	for i, s := range set.shards {
		set.running.Add(1)
		if err := s.start(); err != nil {
			for _, started := range set.shards[:i] {
				started.stopping = true // its thread reads it after begin is closed
			}
			close(set.begin)
			set.running.Wait()
			set.closeEventFDs()
			return nil, err
		}
	}
	close(set.begin)
	if cfg.HandlerLimit > 0 {
		set.watchdog = startWatchdog(set, cfg.HandlerLimit)
	}
	return set, nil
}

// newSet makes everything but the threads.
func newSet(cfg Config) (*Set, error) {
	if cfg.MAC == nil {
		cfg.MAC = make(net.HardwareAddr, 6)
		_, _ = rand.Read(cfg.MAC)      // never fails
		cfg.MAC[0] = cfg.MAC[0]&^1 | 2 // unicast, locally administered
	}
	set := &Set{
		cfg:      cfg,
		mac:      [6]byte(cfg.MAC),
		start:    time.Now(), //nolint:forbidigo // the origin of all shards' clocks
		toeplitz: cfg.Toeplitz,
		reta:     cfg.RETA,
		groups:   make([]*Group, cfg.RETA.Groups()),
		draining: make([]bool, len(cfg.Queues)),

		listeners: make(map[*Listener]struct{}),

		begin:  make(chan struct{}),
		done:   make(chan struct{}),
		halted: make(chan struct{}), ended: make(chan struct{}),
	}
	set.costs.Store(cfg.Costs)
	for id, queue := range cfg.Queues {
		s, err := set.newShard(id, queue)
		if err != nil {
			set.closeEventFDs()
			return nil, err
		}
		set.shards = append(set.shards, s)
	}
	return set, nil
}

func (set *Set) newShard(id int, queue *dispatch.Queue) (*Shard, error) {
	cpu := set.cfg.CPUs[id]
	place, exists := set.cfg.Topology.CPU(cpu)
	if !exists {
		return nil, fmt.Errorf("shard %d: no CPU %d in %s", id, cpu, set.cfg.Topology)
	}
	fd, err := newEventFD()
	if err != nil {
		return nil, fmt.Errorf("shard %d: %w", id, err)
	}
	n := len(set.cfg.Queues)
	s := &Shard{
		id: id, cpu: cpu, node: place.Node, memory: set.cfg.Topology.MemoryNode(place.Node),
		set: set, queue: queue, eventFD: fd,
		moderation: newModeration(set.cfg.Spin),
		inbox:      make([]*dispatch.Ring[handover], n), popped: make([]uint64, n),
		owns: make([]bool, len(set.groups)), awaited: make([]*awaitedGroup, len(set.groups)),
		readClock: func() int64 {
			return int64(time.Since(set.start)) //nolint:forbidigo // this is where the turn's time stamp comes from
		},
	}
	if nodes := set.cfg.MemoryNodes; nodes != nil && nodes[id] >= 0 {
		s.memory = nodes[id] // chosen by measured costs, for one
	}
	for from := range s.inbox {
		if from == id {
			continue
		}
		s.sharesCPU = s.sharesCPU || set.cfg.CPUs[from] == cpu
		if s.inbox[from], err = dispatch.NewRing[handover](ringSize(n)); err != nil {
			return nil, fmt.Errorf("shard %d: %w", id, err)
		}
	}
	return s, nil
}

// ringSize returns how many frames a ring between two of n shards holds: a
// power of two.
func ringSize(n int) int {
	size := ringMaxFrames
	for size > ringMinFrames && size*n > ringFrames {
		size /= 2
	}
	return size
}

func (set *Set) closeEventFDs() {
	for _, s := range set.shards {
		_ = unix.Close(s.eventFD)
	}
}

// MAC returns the stack's link address.
func (set *Set) MAC() net.HardwareAddr { return set.cfg.MAC }

// Stats returns a copy of every shard's counters. After Close it returns the
// last ones.
func (set *Set) Stats() []Counters {
	all := make([]Counters, len(set.shards))
	for i, s := range set.shards {
		if !s.do(func(s *Shard) { all[i] = s.count() }) {
			<-set.halted
			return set.final
		}
	}
	return all
}

// Done is closed when the stack was closed or its device is gone.
func (set *Set) Done() <-chan struct{} { return set.done }

// Err returns why Done was closed: nil after Close.
func (set *Set) Err() error {
	if p := set.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// fail ends all connections because the device is gone. Called by the shard
// that found out; the first one wins.
func (set *Set) fail(err error) {
	if !set.failure.CompareAndSwap(nil, &err) {
		return
	}
	set.cfg.Logger.Error("device lost, connections end", "error", err)
	for _, s := range set.shards {
		s.post(taskFunc((*Shard).lose))
	}
	set.doneOnce.Do(func() { close(set.done) })
}

// lose ends the shard's connections after the device has gone.
func (s *Shard) lose() {
	s.deviceGone = true
	for _, g := range s.groups {
		g.lose()
	}
}

func (g *Group) lose() {
	for c := range g.conns.all {
		c.abort = true
		c.end(unix.ENETDOWN)
	}
}

// Close says goodbye to all peers, waits until what was written has reached
// them or the drain time is over, and ends the threads. It is idempotent, and
// waits also for a Close that another goroutine has begun.
func (set *Set) Close() {
	set.stop.Do(func() {
		if set.watchdog != nil {
			set.watchdog.close()
		}
		set.moveMu.Lock() // after the move that is going on
		set.closing = true
		set.moveMu.Unlock()
		for _, s := range set.shards {
			s.do((*Shard).farewell)
		}
		for deadline := time.After(set.cfg.Drain); set.Err() == nil && set.lingering(); {
			select {
			case <-deadline:
			case <-time.After(drainPoll):
				continue
			}
			break
		}
		set.final = make([]Counters, len(set.shards))
		for i, s := range set.shards {
			s.do(func(s *Shard) {
				s.depart()
				set.final[i] = s.count()
			})
		}
		set.running.Wait()
		// Functions of the pools may wait for it, or ask for the counters.
		close(set.halted)
		set.doneOnce.Do(func() { close(set.done) })
		set.pools.Close()
		set.closeEventFDs()
		close(set.ended)
	})
	<-set.ended
}

// drainPoll is how often Close looks whether all peers have answered.
const drainPoll = 2 * time.Millisecond

// farewell closes everything that the shard's groups hold. A connection whose
// bytes wait outside of its endpoint goes on until they have been moved.
func (s *Shard) farewell() {
	s.leaving = true
	for _, g := range s.groups {
		g.farewell()
	}
}

func (g *Group) farewell() {
	for l := range g.listeners {
		l.close()
	}
	for _, u := range g.sockets {
		u.shut()
	}
	for c := range g.conns.all {
		if h, ok := c.h.(leaver); ok {
			h.leave(c)
		} else {
			c.end(net.ErrClosed)
		}
	}
}

// leaver is a Handler that closes a connection when it has nothing more to
// write to it.
type leaver interface{ leave(c *Conn) }

// end ends all that is left of a connection, with err for its Close event.
func (c *Conn) end(err error) {
	c.closing = true
	c.finish(err)
}

// depart ends what is left after the drain time, and the loop.
func (s *Shard) depart() {
	s.stopping = true
	for _, g := range s.groups {
		for c := range g.conns.all {
			c.end(net.ErrClosed)
		}
	}
}

// full reports whether the shard has as many connections as its flow groups may
// have.
func (s *Shard) full() bool {
	groups := len(s.set.groups)
	limit := (s.set.cfg.MaxConns*len(s.set.shards)*len(s.groups) + groups - 1) / groups
	return s.counters.ConnsOpen >= uint64(limit)
}

// over reports whether nothing new may begin on the shard.
func (s *Shard) over() bool { return s.leaving || s.deviceGone }

// lingering reports whether a connection that was closed still has something
// to send, or waits for the peer to acknowledge it.
func (set *Set) lingering() (found bool) {
	for _, s := range set.shards {
		s.do(func(s *Shard) {
			for _, g := range s.groups {
				found = found || g.conns.next != &g.conns.Conn
				for _, ep := range g.stack.RegisteredEndpoints() {
					if ep, ok := ep.(*tcp.Endpoint); ok && waitsForACK(tcp.EndpointState(ep.State())) {
						found = true
					}
				}
			}
		})
	}
	return found
}

// waitsForACK reports whether a closed connection still has something to send.
func waitsForACK(state tcp.EndpointState) bool {
	return state == tcp.StateFinWait1 || state == tcp.StateClosing || state == tcp.StateLastAck
}
