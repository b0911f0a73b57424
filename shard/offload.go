package shard

import (
	"runtime"
	"sync"

	"numastack/numaalloc"
)

// offloadsPerShard is how many offloaded functions of one shard run or wait
// for a thread at most; the handlers of the others wait their turn.
const offloadsPerShard = 64

// offloadPool runs functions that would hold up a shard, on threads of one
// NUMA node.
type offloadPool struct {
	queue chan *ServedConn // has room for all that its shards may send
	ended sync.WaitGroup
}

// newOffloadPool starts n threads for the shards of a node.
func newOffloadPool(node, shards, n int) *offloadPool {
	p := &offloadPool{queue: make(chan *ServedConn, shards*offloadsPerShard)}
	cpus := nodeCPUs(node)
	for range n {
		p.ended.Go(func() {
			if cpus != nil {
				// On a machine with one node a goroutine is as near as a
				// pinned thread, and cheaper to wake.
				runtime.LockOSThread()
				_ = numaalloc.PinAny(cpus) // where it runs is a matter of speed only
			}
			for co := range p.queue {
				co.task()
				co.c.g.shard.post(taskFunc(func(s *Shard) { s.offloaded(co) }))
			}
		})
	}
	return p
}

// nodeCPUs returns the node's CPUs, or nil when there is no other node.
func nodeCPUs(node int) []int {
	all, err := numaalloc.AllowedCPUs()
	if err != nil {
		return nil
	}
	var mine []int
	for _, cpu := range all {
		if n, err := numaalloc.NodeOf(cpu); err == nil && n == node {
			mine = append(mine, cpu)
		}
	}
	if len(mine) == len(all) {
		return nil
	}
	return mine
}

// close ends the threads after their present work.
func (p *offloadPool) close() {
	close(p.queue)
	p.ended.Wait()
}

// offload sends the handler's task to the pool, or makes it wait.
func (s *Shard) offload(co *ServedConn) {
	s.counters.Offloads++
	if s.offloading == offloadsPerShard {
		s.offloadWaits = append(s.offloadWaits, co)
		return
	}
	s.offloading++
	s.set.pools[s.node].queue <- co
}

// offloaded resumes the handler whose task has ended.
func (s *Shard) offloaded(co *ServedConn) {
	s.offloading--
	if len(s.offloadWaits) > 0 {
		next := s.offloadWaits[0]
		s.offloadWaits[0] = nil
		s.offloadWaits = s.offloadWaits[1:]
		s.offloading++
		s.set.pools[s.node].queue <- next
	}
	co.task = nil
	co.resume()
}
