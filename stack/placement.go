package stack

import (
	"context"
	"fmt"

	"numastack/numaalloc"
	"numastack/shard"
)

// Profile is a way to spread shards over NUMA nodes and CPUs, see the constants.
type Profile = numaalloc.Profile

// The profiles, by the names that Windows gives its RSS profiles. With the
// static ones, RebalanceAuto moves nothing; with ProfileConservative it is
// RebalanceConserve.
const (
	ProfileClosest       = numaalloc.ProfileClosest
	ProfileClosestStatic = numaalloc.ProfileClosestStatic
	ProfileNUMA          = numaalloc.ProfileNUMA
	ProfileNUMAStatic    = numaalloc.ProfileNUMAStatic
	ProfileConservative  = numaalloc.ProfileConservative
)

// Placement is where each shard is: its CPU, that CPU's node, its memory's node.
type Placement = numaalloc.Plan

// Costs is what memory of a NUMA node costs the CPUs of another, relative to
// that of their own: by measurement or by the firmware's distances, see its
// Source. M. Friedman, "Mainstream NUMA and the TCP/IP stack", asks the operating
// system for such a function; none has it, so the stack measures.
type Costs = numaalloc.Costs

// MemoryPages says where the pages of a shard's receive buffers are.
type MemoryPages = shard.MemoryPages

// Plan returns where New would put the shards. Nothing is opened, pinned or
// bound: it is a dry run, except for a measurement if MeasureCosts asks for one.
func Plan(cfg Config) (*Placement, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("stack config: %w", err)
	}
	_, _, plan, err := cfg.place()
	return plan, err
}

// place looks at the machine and makes the plan.
func (cfg *Config) place() (*numaalloc.Topology, *Costs, *Placement, error) {
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		return nil, nil, nil, err
	}
	costs, err := cfg.costs(context.Background(), topology)
	if err != nil {
		return nil, nil, nil, err
	}
	plan, err := numaalloc.Placement{
		Profile: cfg.Profile, Shards: cfg.Shards, CPUs: cfg.CPUs,
		BaseCPU: cfg.BaseCPU, MaxCPU: cfg.MaxCPU, Nodes: cfg.Nodes, Device: cfg.CloseTo, Costs: costs,
	}.Plan(topology)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("stack config: %w", err)
	}
	return topology, costs, plan, nil
}

// memoryNodes returns the node of each shard's memory, or nil when there is
// nothing to choose.
func memoryNodes(topology *numaalloc.Topology, plan *Placement) []int {
	if len(topology.MemoryNodes()) < 2 {
		return nil
	}
	nodes := make([]int, len(plan.Shards))
	for i, p := range plan.Shards {
		nodes[i] = p.Memory
	}
	return nodes
}

// costs returns what remote memory costs.
func (cfg *Config) costs(ctx context.Context, topology *numaalloc.Topology) (*Costs, error) {
	if cfg.MeasureCosts {
		costs, err := numaalloc.MeasureCached(ctx, topology.Key(), topology.CPUNodes(), topology.MemoryNodes())
		if err == nil {
			return costs, nil
		}
		if ctx.Err() == nil {
			cfg.Logger.Warn("memory not measured, the firmware's distances count", "error", err)
		}
	}
	return numaalloc.CostsFromDistances(topology.CPUNodes(), topology.MemoryNodes(), topology.Distance)
}

// rebalance is what RebalanceAuto means with the profile.
func (cfg *Config) rebalance() Rebalance {
	switch {
	case cfg.Rebalance != RebalanceAuto:
		return cfg.Rebalance
	case cfg.Profile.Static():
		return RebalanceOff
	case cfg.Profile == ProfileConservative:
		return RebalanceConserve
	default:
		return RebalanceAuto
	}
}

// Placement returns where the shards are. The caller must not change it.
func (s *Stack) Placement() *Placement { return s.plan }

// Costs returns what memory of one node costs the CPUs of another. When the
// machine's topology changes, there is a new one.
func (s *Stack) Costs() *Costs { return s.costs.Load() }

// adapt makes the stack go by another topology. Shards stay where they are, as
// far as their CPUs do. Called by the rebalancer.
func (s *Stack) adapt(ctx context.Context, topology *numaalloc.Topology) {
	if topology.Equal(s.topology) {
		return
	}
	s.topology = topology
	costs, err := s.cfg.costs(ctx, topology)
	if err != nil {
		s.cfg.Logger.Warn("costs of memory are those of before", "error", err)
		costs = s.costs.Load()
	}
	s.costs.Store(costs)
	s.set.Follow(topology, costs)
	s.cfg.Logger.Info("topology has changed", "topology", topology.String(), "costs", string(costs.Source))
}

// NodePool is the threads of a NUMA node, for functions that should run near its
// memory; see [numaalloc.NodePools] for where they run and the rule by which they
// spill to other nodes.
type NodePool = numaalloc.NodePool

// PoolThread is the thread that runs a function of a NodePool: it tells its node
// and has scratch memory there.
type PoolThread = numaalloc.PoolThread

// PoolStats is what a NodePool has counted.
type PoolStats = numaalloc.PoolStats

// NodePool returns the pool of a NUMA node, for functions that any goroutine but
// a shard's wants to run near a connection or some data:
//
//	pool, err := s.NodePool(w.NUMANode())
//	...
//	err = pool.Do(ctx, func(t *stack.PoolThread) { compress(t.Scratch(), data) })
//
// Its threads are pinned to the node's CPUs and take memory from there; they are
// those of [Offload], which handlers of Serve use. Config.OffloadThreads of them
// run at once, up to 256 functions of Do wait for one. When that takes longer than
// the memory of this node costs elsewhere, a function runs on another node, and is
// counted: see [numaalloc.NodePools]. On a machine with one node they are ordinary
// threads.
//
// A node without CPUs that the process may use shares the pool of the nearest one
// with some, which is logged; the pool's Node tells which. The error says which
// nodes there are. After Close, Do returns an error that wraps net.ErrClosed; Close
// waits for functions that run.
func (s *Stack) NodePool(node int) (*NodePool, error) {
	pool, err := s.set.NodePool(node)
	if err == nil && pool.Node() != node {
		s.cfg.Logger.Debug("node has no CPU for its pool, that of the nearest one serves", "node", node, "pool", pool.Node())
	}
	return pool, err
}

// VerifyMemory asks the kernel where the receive buffers of each shard are. The
// shards wait meanwhile: it is for tests and for the curious.
func (s *Stack) VerifyMemory() ([]MemoryPages, error) { return s.set.VerifyMemory() }
