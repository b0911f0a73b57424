package shard

import (
	"fmt"

	"numastack/numaalloc"
)

// offloadsPerShard is how many offloaded functions of one shard run or wait
// for a thread at most; the handlers of the others wait their turn.
const offloadsPerShard = 64

// makePools makes the pools of the NUMA nodes, in which offloaded functions run
// beside those of other goroutines.
func (set *Set) makePools() (err error) {
	if set.pools, err = numaalloc.NewPools(numaalloc.PoolConfig{
		Topology: set.cfg.Topology, Costs: set.cfg.Costs, Threads: set.cfg.OffloadThreads,
		Reserved: offloadsPerShard * len(set.shards), Scratch: set.cfg.NodeScratch,
	}); err != nil {
		return err
	}
	for _, s := range set.shards {
		if s.pool, err = set.pools.Pool(s.node); err != nil {
			return fmt.Errorf("shard %d: %w", s.id, err)
		}
	}
	return nil
}

// NodePool returns the pool of a NUMA node, as numaalloc.NodePools.Pool does.
func (set *Set) NodePool(node int) (*numaalloc.NodePool, error) { return set.pools.Pool(node) }

// PoolStats returns the counters of the pools that have been used.
func (set *Set) PoolStats() []numaalloc.PoolStats { return set.pools.Stats() }

// Follow makes the pools and the choices of Drain go by another topology and
// other costs. Shards keep their CPUs.
func (set *Set) Follow(t *numaalloc.Topology, costs *numaalloc.Costs) {
	set.costs.Store(costs)
	set.pools.Follow(t, costs)
}

// offload sends the handler's task to the pool, or makes it wait.
func (s *Shard) offload(co *ServedConn) {
	s.counters.Offloads++
	if s.offloading == offloadsPerShard {
		s.offloadWaits = append(s.offloadWaits, co)
		return
	}
	s.offloading++
	s.pool.Submit((*offloadTask)(co)) // closed only after the last one
}

// offloadTask is a ServedConn whose function runs in a pool.
type offloadTask ServedConn

// Run implements numaalloc.PoolTask.
func (t *offloadTask) Run(thread *numaalloc.PoolThread) {
	co := (*ServedConn)(t)
	s := co.c.g.shard // the group stays while it has a handler
	far := thread.Node() != s.node
	defer s.post(taskFunc(func(s *Shard) { s.offloaded(co, far) }))
	co.task()
}

// offloaded resumes the handler whose task has ended, on another node if far.
func (s *Shard) offloaded(co *ServedConn, far bool) {
	if far {
		s.counters.OffloadsSpilled++
	}
	s.offloading--
	if len(s.offloadWaits) > 0 {
		next := s.offloadWaits[0]
		s.offloadWaits[0] = nil
		s.offloadWaits = s.offloadWaits[1:]
		s.offloading++
		s.pool.Submit((*offloadTask)(next))
	}
	co.task = nil
	co.resume()
}
