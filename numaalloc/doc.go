// Package numaalloc knows the machine: CPUs, NUMA nodes and their memory, where
// to put threads, and how to keep memory near them.
//
//	ReadTopology ──► Placement.Plan ──► a CPU and a memory node per shard
//	                                        │
//	             on the shard's thread:     ├──► Pin
//	                                        └──► NewArena, Adopt: buffers bound to the node
//
// [NodePools] are threads on each node that run functions for others.
//
// [Watch] tells when CPUs or memory come and go. [Measure] finds out what memory
// of one node costs the CPUs of another; [CostsFromDistances] believes the
// firmware instead. [Where] and [Arena.Verify] ask the kernel where pages are.
//
// CPU and node numbers are the kernel's own, as in /sys/devices/system and in
// taskset(1). Nodes need not be consecutive, and a node may have CPUs without
// memory or memory without CPUs.
//
// Pin, NameThread and BindThread act on the calling OS thread, so their caller
// has to be a goroutine that holds it (runtime.LockOSThread). What an [Arena]
// asks of its callers stands there; everything else may be called from any
// goroutine.
//
// A thread pinned to a CPU that goes offline is moved away by the kernel without
// a word.
//
// The package knows no packet and imports nothing of this module.
package numaalloc
