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
// bound: it is a dry run.
func Plan(cfg Config) (*Placement, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("stack config: %w", err)
	}
	_, plan, err := cfg.place()
	return plan, err
}

// place makes the plan.
func (cfg *Config) place() (*numaalloc.Topology, *Placement, error) {
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		return nil, nil, err
	}
	plan, err := numaalloc.Placement{
		Profile: cfg.Profile, Shards: cfg.Shards, CPUs: cfg.CPUs,
		BaseCPU: cfg.BaseCPU, MaxCPU: cfg.MaxCPU, Nodes: cfg.Nodes, Device: cfg.CloseTo,
	}.Plan(topology)
	if err != nil {
		return nil, nil, fmt.Errorf("stack config: %w", err)
	}
	return topology, plan, nil
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
func (cfg *Config) costs(topology *numaalloc.Topology) (*Costs, error) {
	if cfg.MeasureCosts {
		costs, err := numaalloc.MeasureCached(context.Background(), topology.Key(), topology.CPUNodes(), topology.MemoryNodes())
		if err == nil {
			return costs, nil
		}
		cfg.Logger.Warn("memory not measured, the firmware's distances count", "error", err)
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

// Costs returns what memory of one node costs the CPUs of another.
func (s *Stack) Costs() *Costs { return s.costs }

// VerifyMemory asks the kernel where the receive buffers of each shard are. The
// shards wait meanwhile: it is for tests and for the curious.
func (s *Stack) VerifyMemory() ([]MemoryPages, error) { return s.set.VerifyMemory() }
