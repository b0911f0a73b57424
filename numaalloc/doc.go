// Package numaalloc knows the machine: which CPUs the process may use, which
// NUMA node each of them belongs to, and how to put a thread on one of them.
//
//	AllowedCPUs ──► Spread(n) ──► one CPU per shard ──► Pin (on the shard's thread)
//	                                   │
//	                                   └──► NodeOf: where the shard's memory belongs
//
// CPU and node numbers are the kernel's own, as in /sys/devices/system and in
// taskset(1). Nodes need not be consecutive, and a node may have CPUs without
// memory or memory without CPUs.
//
// Pin and NameThread act on the calling OS thread, so their caller has to be
// a goroutine that holds it (runtime.LockOSThread). Everything else may be
// called from any goroutine.
//
// What it does not do: watch CPU hotplug. A thread pinned to a CPU that goes
// offline is moved away by the kernel without a word.
//
// The package knows no packet and imports nothing of this module.
package numaalloc
