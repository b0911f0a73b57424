package numaalloc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// DefaultPoolQueue is how many functions wait for a thread of a node at most.
	DefaultPoolQueue = 256

	// DefaultPoolScratch is the size in bytes of a thread's scratch memory: it
	// fits a second-level cache.
	DefaultPoolScratch = 256 << 10

	// minPoolThreads lets one function of a node block, on a file for example,
	// while another runs.
	minPoolThreads = 2
)

// PoolConfig says what the pools of a machine are like. A zero field means its
// documented default.
type PoolConfig struct {
	Topology *Topology // required
	// Costs decides where functions go that their node has no thread for. Nil:
	// they wait there.
	Costs *Costs
	// Threads is how many functions run at once per node. Default: the number of
	// the node's CPUs that the process may use, at least 2.
	Threads int
	// Queue is how many functions of Do wait per node before Do itself waits.
	// Default 256.
	Queue int
	// Reserved is how many tasks the callers of Submit have under way at most,
	// all together. Default 0.
	Reserved int
	// Scratch is the size in bytes of a thread's scratch memory. Default 256 KiB.
	Scratch int
}

// NodePools are threads on each NUMA node that run functions for others. They
// start when there is something to run, up to a limit per node, and stay.
//
// Where there are several nodes with CPUs, the threads are pinned to the CPUs of
// their node and take memory from there. On one node they are goroutines like
// others: every thread is as near as a pinned one, and cheaper to wake.
//
// # Spill
//
// A function runs on its node, unless all threads there are busy, another node
// has an idle one, and waiting would cost more than remote memory. With q
// functions in the queue, itself included, and k threads, a function of duration
// d waits about d·q/k. Elsewhere it takes d·c/c₀ if all it does is to use its
// node's memory, where c is what that costs the other node's CPUs and c₀ what it
// costs its own ([Costs]). The duration cancels out: a function goes elsewhere
// when
//
//	q/k > c/c₀ − 1
//
// to the cheapest such node, and is counted. So with a cost of 1.5, functions
// spill when the queue is half as long as there are threads. The rule is applied
// when a function is handed in and when a thread of another node has nothing to
// do. M. Friedman, "Mainstream NUMA and the TCP/IP stack", has the question: when
// is a remote idle CPU better than a local busy one?
type NodePools struct {
	pools []*NodePool // one per node of the topology, ascending; immutable

	// Held for reading while something is put into a queue, so that Close can
	// close them.
	mu     sync.RWMutex
	closed bool          // guarded by mu
	done   chan struct{} // closed with it

	running sync.WaitGroup // threads
}

// NodePool is the threads of one node. Any goroutine may call its methods.
type NodePool struct {
	// Immutable.
	node    int
	all     *NodePools
	threads int           // at most
	scratch int           // bytes
	queue   chan PoolTask // has room for all there may be, so that no sender waits
	room    chan struct{} // holds one for each call of Do that waits in a queue

	place   atomic.Pointer[poolPlace]
	load    atomic.Int64 // functions in queue and running
	started atomic.Int64 // threads

	ran, spilled, waits atomic.Uint64
}

// poolPlace is what the topology says about a pool. Immutable.
type poolPlace struct {
	cpus   []int // that its threads run on
	memory int   // node of their memory, -1 for none
	pin    bool
	home   *NodePool // of the nearest node with CPUs: the pool itself, if it has some
	others []poolPrice
}

// poolPrice is another pool, and what a node's memory costs there: c/c₀.
type poolPrice struct {
	pool *NodePool
	cost float64
}

// PoolTask is something to run on a pool's thread. Run must not panic.
type PoolTask interface{ Run(t *PoolThread) }

// PoolStats are the counters of a pool.
type PoolStats struct {
	Node    int    `json:"node"`
	Threads int    `json:"threads"` // started so far
	Load    int    `json:"load"`    // functions that run or wait now
	Ran     uint64 `json:"ran"`     // functions that its threads have begun, also those of other nodes
	Spilled uint64 `json:"spilled"` // functions of this node that ran on another
	Waits   uint64 `json:"waits"`   // calls of Do that found the queue full
}

// NewPools makes a pool for each node. No thread starts yet.
func NewPools(cfg PoolConfig) (*NodePools, error) {
	for _, field := range []struct {
		name        string
		value, most int
	}{{"Threads", cfg.Threads, maxCPUs}, {"Queue", cfg.Queue, 1 << 20}, {"Reserved", cfg.Reserved, 1 << 20}, {"Scratch", cfg.Scratch, 1 << 30}} {
		if field.value < 0 || field.value > field.most {
			return nil, fmt.Errorf("node pools: %s: %d, want 0 (default) to %d", field.name, field.value, field.most)
		}
	}
	if cfg.Topology == nil || len(cfg.Topology.CPUNodes()) == 0 {
		return nil, errors.New("node pools: Topology: want one with a CPU that this process may use")
	}
	if cfg.Queue == 0 {
		cfg.Queue = DefaultPoolQueue
	}
	if cfg.Scratch == 0 {
		cfg.Scratch = DefaultPoolScratch
	}
	all := &NodePools{done: make(chan struct{})}
	cpus := cfg.Topology.CPUNodes()
	for _, n := range cfg.Topology.Nodes {
		p := &NodePool{
			node: n.ID, all: all, threads: cfg.Threads, scratch: cfg.Scratch,
			queue: make(chan PoolTask, len(cfg.Topology.Nodes)*cfg.Queue+cfg.Reserved),
			room:  make(chan struct{}, cfg.Queue),
		}
		if p.threads == 0 {
			p.threads = max(len(cpus[n.ID]), minPoolThreads)
		}
		all.pools = append(all.pools, p)
	}
	all.Follow(cfg.Topology, cfg.Costs)
	for _, p := range all.pools {
		if p.place.Load() == nil {
			return nil, fmt.Errorf("node pools: Topology: none of its nodes has one of the CPUs %s", FormatCPUList(cfg.Topology.AllowedCPUs))
		}
	}
	return all, nil
}

// Follow makes the pools go by another topology and other costs. Threads move
// before they run the next function. Pools whose node has no CPUs any more go on
// with those of the nearest one; nodes that are new get no pool.
func (all *NodePools) Follow(t *Topology, costs *Costs) {
	cpus := t.CPUNodes()
	for _, p := range all.pools {
		memory := t.MemoryNode(p.node)
		// What the node's memory costs the CPUs of a node.
		price := func(node int) float64 {
			if costs == nil {
				return float64(t.Distance(node, p.node))
			}
			return costs.Cost(node, memory)
		}
		place := &poolPlace{memory: memory, pin: len(cpus) > 1}
		for _, other := range all.pools {
			near := place.home == nil || other == p || place.home != p && price(other.node) < price(place.home.node)
			if near && len(cpus[other.node]) > 0 {
				place.home = other
			}
		}
		if place.home == nil {
			continue // the nodes have all changed
		}
		place.cpus = cpus[place.home.node]
		for _, other := range all.pools {
			if other != p && costs != nil && len(cpus[other.node]) > 0 {
				place.others = append(place.others, poolPrice{other, price(other.node) / price(place.home.node)})
			}
		}
		slices.SortStableFunc(place.others, func(a, b poolPrice) int { return cmp.Compare(a.cost, b.cost) })
		p.place.Store(place)
	}
}

// Pool returns the pool of a node. For a node without CPUs that the process may
// use it is that of the nearest node with some, by what the node's memory costs
// there: NodePool.Node tells which one.
func (all *NodePools) Pool(node int) (*NodePool, error) {
	for _, p := range all.pools {
		if p.node == node {
			return p.place.Load().home, nil
		}
	}
	nodes := make([]int, len(all.pools))
	for i, p := range all.pools {
		nodes[i] = p.node
	}
	return nil, fmt.Errorf("pool of node %d: no such NUMA node; there are %s", node, FormatCPUList(nodes))
}

// Stats returns the counters of the pools that have been used.
func (all *NodePools) Stats() []PoolStats {
	var stats []PoolStats
	for _, p := range all.pools {
		if s := p.Stats(); s.Threads > 0 || s.Spilled > 0 {
			stats = append(stats, s)
		}
	}
	return stats
}

// Close refuses further functions, withdraws those that wait, and waits for those
// that run. It is idempotent.
func (all *NodePools) Close() {
	all.mu.Lock()
	if !all.closed {
		all.closed = true
		close(all.done)
		for _, p := range all.pools {
			close(p.queue)
		}
	}
	all.mu.Unlock()
	all.running.Wait()
}

// Node returns the pool's node.
func (p *NodePool) Node() int { return p.node }

// Stats returns the pool's counters.
func (p *NodePool) Stats() PoolStats {
	return PoolStats{
		Node: p.node, Threads: int(p.started.Load()), Load: int(p.load.Load()),
		Ran: p.ran.Load(), Spilled: p.spilled.Load(), Waits: p.waits.Load(),
	}
}

// Do runs f on a thread of the node, or of another as [NodePools] says, and
// returns when it has ended. While the queue is full and while f waits in it, ctx
// counts: when that is done before f has begun, f does not run, and the error
// wraps the context's cause. After Close it wraps net.ErrClosed. A panic of f is one of
// Do, with the stack it happened on.
//
// f may block, which keeps others from its thread. When f calls Do in turn, it
// holds its own thread meanwhile: give that a context that ends. It must not close
// the pools, or the stack they belong to: that waits for it.
func (p *NodePool) Do(ctx context.Context, f func(t *PoolThread)) error {
	if f == nil {
		return fmt.Errorf("pool of node %d: the function is nil", p.node)
	}
	if ctx.Err() != nil {
		return p.withdrawn(ctx)
	}
	select {
	case p.room <- struct{}{}:
	default:
		p.waits.Add(1)
		select {
		case p.room <- struct{}{}:
		case <-ctx.Done():
			return p.withdrawn(ctx)
		case <-p.all.done:
			return p.withdrawn(ctx)
		}
	}
	c := &poolCall{f: f, room: p.room, ended: make(chan struct{})}
	if !p.Submit(c) {
		<-p.room
		return p.withdrawn(ctx)
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
	case <-p.all.done:
	}
	if c.taken.CompareAndSwap(false, true) {
		return p.withdrawn(ctx)
	}
	<-c.ended
	if c.panicked != nil {
		panic(c.panicked)
	}
	return nil
}

// withdrawn says why a function was not run.
func (p *NodePool) withdrawn(ctx context.Context) error {
	err := context.Cause(ctx)
	if err == nil {
		err = net.ErrClosed
	}
	return fmt.Errorf("pool of node %d: function not run: %w", p.node, err)
}

// Submit hands in a task and returns at once, so that a shard's thread may call
// it. It returns false when the pools are closed. The callers keep within
// PoolConfig.Reserved.
func (p *NodePool) Submit(task PoolTask) bool {
	p.all.mu.RLock()
	defer p.all.mu.RUnlock()
	if p.all.closed {
		return false
	}
	to := p.choose()
	to.queue <- task
	for {
		n := to.started.Load()
		if n >= int64(to.threads) || n >= to.load.Load() {
			return true
		}
		if to.started.CompareAndSwap(n, n+1) {
			to.all.running.Add(1)
			go to.thread()
		}
	}
}

// choose returns the pool that runs the next function, and adds it to its load.
func (p *NodePool) choose() *NodePool {
	waiting := p.load.Add(1) - int64(p.threads)
	if waiting <= 0 {
		return p
	}
	for _, other := range p.place.Load().others {
		if !p.spills(waiting, other.cost) {
			break
		}
		if other.pool.load.Load() < int64(other.pool.threads) {
			p.spillTo(other.pool)
			return other.pool
		}
	}
	return p
}

// spills is the rule of NodePools.
func (p *NodePool) spills(waiting int64, cost float64) bool {
	return float64(waiting) > (cost-1)*float64(p.threads)
}

func (p *NodePool) spillTo(other *NodePool) {
	other.load.Add(1)
	p.load.Add(-1)
	p.spilled.Add(1)
}

// thread runs tasks until the pools are closed.
func (p *NodePool) thread() {
	t := &PoolThread{pool: p}
	defer t.end()
	for task, ok := p.next(); ok; task, ok = p.next() {
		t.settle(p.place.Load())
		if c, isCall := task.(*poolCall); !isCall || c.take(p.all) {
			p.ran.Add(1) // before, so that who has waited for the task sees it
			t.busy = true
			task.Run(t)
			t.busy = false
		}
		p.load.Add(-1)
	}
}

// next waits for a task, of another node if need be.
func (p *NodePool) next() (PoolTask, bool) {
	if p.place.Load().pin {
		select {
		case task, ok := <-p.queue:
			return task, ok
		default:
		}
		for _, from := range p.all.pools {
			if task := p.takeFrom(from); task != nil {
				return task, true
			}
		}
	}
	task, ok := <-p.queue
	return task, ok
}

// takeFrom takes a task out of another pool's queue, if it spills; else it
// returns nil.
func (p *NodePool) takeFrom(from *NodePool) PoolTask {
	waiting := from.load.Load() - int64(from.threads)
	if waiting <= 0 {
		return nil
	}
	for _, other := range from.place.Load().others {
		if other.pool != p || !from.spills(waiting, other.cost) {
			continue
		}
		select {
		case task := <-from.queue: // nil when it was closed
			if task != nil {
				from.spillTo(p)
			}
			return task
		default:
		}
	}
	return nil
}

// PoolThread is the thread that runs a function. It is valid until the function
// returns.
type PoolThread struct {
	pool    *NodePool
	place   *poolPlace // that it has settled at
	locked  bool
	busy    bool
	arena   *Arena
	scratch []byte
}

// Node returns the NUMA node that the function runs on. That is another than the
// pool's when it has spilled.
func (t *PoolThread) Node() int { return t.place.home.node }

// Scratch returns memory of the thread's node for the function to work with:
// PoolConfig.Scratch bytes, with what an earlier function has left in them. It
// must not be used after the function has returned.
func (t *PoolThread) Scratch() []byte {
	if t.scratch == nil {
		node := noNode
		if t.place.pin {
			node = t.place.memory
		}
		arena, err := NewArena(ArenaConfig{Node: node})
		if err != nil {
			arena, _ = NewArena(ArenaConfig{Node: noNode}) // the thread's own pages, then
		}
		t.arena, t.scratch = arena, make([]byte, t.pool.scratch)
		_ = t.arena.Adopt(t.scratch) // unbound memory works too
	}
	return t.scratch
}

// settle moves the thread to where its pool is now.
func (t *PoolThread) settle(place *poolPlace) {
	if t.place == place {
		return
	}
	t.dropScratch()
	t.place = place
	if !place.pin && !t.locked {
		return
	}
	if !t.locked {
		t.locked = true
		lockThread(fmt.Sprintf("numapool/%d", t.pool.node))
	}
	// Both fail in some container or other; the functions run all the same.
	_ = PinAny(place.cpus)
	if place.memory != noNode {
		_ = BindThread(place.memory)
	}
}

func (t *PoolThread) dropScratch() {
	if t.arena != nil {
		_ = t.arena.Close() // the heap gets its memory back without a policy
		t.arena, t.scratch = nil, nil
	}
}

// end replaces a thread that a function has ended by runtime.Goexit.
func (t *PoolThread) end() {
	t.dropScratch()
	if t.busy {
		t.pool.load.Add(-1)
		go t.pool.thread()
		return
	}
	t.pool.all.running.Done()
}

// poolCall is a function of Do.
type poolCall struct {
	f        func(*PoolThread)
	room     chan struct{}
	taken    atomic.Bool   // to be run, or to be left
	ended    chan struct{} // closed after f
	panicked any           // written before that
}

// take leaves the queue, and returns false if the function was withdrawn.
func (c *poolCall) take(all *NodePools) bool {
	<-c.room
	select {
	case <-all.done:
		return false
	default:
		return c.taken.CompareAndSwap(false, true)
	}
}

// Run implements PoolTask.
func (c *poolCall) Run(t *PoolThread) {
	defer close(c.ended)
	defer func() {
		if r := recover(); r != nil {
			c.panicked = poolPanicError{r, debug.Stack()}
		}
	}()
	c.f(t)
}

// poolPanicError is a panic of a function, with the stack it happened on.
type poolPanicError struct {
	value any
	stack []byte
}

func (p poolPanicError) Error() string {
	return fmt.Sprintf("function of a node pool panicked: %v\n%s", p.value, p.stack)
}
