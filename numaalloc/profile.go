package numaalloc

import (
	"fmt"
	"slices"
	"strings"
)

// Profile says which CPUs the shards run on. The names and meanings are those of
// the RSS profiles of Windows (Set-NetAdapterRss -Profile, NDIS_RSS_PROFILE in
// ntddndis.h).
//
// All but Conservative take SMT siblings last: a core of a farther node comes
// before the second hardware thread of a near one.
//
// The paper (M. Friedman, Mainstream NUMA and the TCP/IP stack) places queues by
// the policies that Windows has for the interrupts of MSI-X (IRQ_DEVICE_POLICY
// in wdm.h). A shard is what polls a queue, so they map onto placements:
//
//	all processors in the machine   NUMA, NUMAStatic: queues on every node
//	all close processors            Closest, ClosestStatic
//	one close processor             Closest with one shard
//	specified processors            Placement.CPUs, or Nodes, BaseCPU and MaxCPU
//	spread messages                 always: each queue has its own shard
//
// As with those, on a machine with one node close processors are all processors.
type Profile int

// The profiles.
const (
	// ProfileClosest fills the node that the network device is attached to, then
	// the one whose CPUs pay least for that node's memory: as measured, else by
	// the distances. Without a device, or with one that belongs to no
	// node such as a TAP, it begins at the node with the most usable CPUs.
	ProfileClosest Profile = iota
	// ProfileClosestStatic is ProfileClosest without rebalancing.
	ProfileClosestStatic
	// ProfileNUMA goes round robin over all nodes, so that applications on every
	// node find shards of their own. It begins where ProfileClosest does.
	ProfileNUMA
	// ProfileNUMAStatic is ProfileNUMA without rebalancing.
	ProfileNUMAStatic
	// ProfileConservative is for as few CPUs as carry the load: it fills whole
	// cores with their SMT siblings, and a whole node before the next. Letting
	// shards rest while the load is low is up to the rebalancer.
	ProfileConservative
)

var profileNames = [...]string{"Closest", "ClosestStatic", "NUMA", "NUMAStatic", "Conservative"}

// Static reports whether flow groups stay on the shards that they begin with.
func (p Profile) Static() bool { return p == ProfileClosestStatic || p == ProfileNUMAStatic }

// String returns the name of the profile, as UnmarshalText accepts it.
func (p Profile) String() string {
	if p < 0 || int(p) >= len(profileNames) {
		return fmt.Sprintf("unknown(%d)", int(p))
	}
	return profileNames[p]
}

// MarshalText implements encoding.TextMarshaler.
func (p Profile) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText accepts Closest, ClosestStatic, NUMA, NUMAStatic and
// Conservative in any case.
func (p *Profile) UnmarshalText(b []byte) error {
	i := slices.IndexFunc(profileNames[:], func(name string) bool { return strings.EqualFold(name, string(b)) })
	if i < 0 {
		return fmt.Errorf("%q is not one of %q", b, profileNames)
	}
	*p = Profile(i)
	return nil
}
