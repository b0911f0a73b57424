package stack

import (
	"fmt"
	"net"
	"net/netip"

	"numastack/dispatch"
	"numastack/shard"
)

// Errors of Move, SetRETA and Drain.
var (
	// ErrServing is returned when a flow group has to stay on its shard: a
	// blocking handler of one of its connections (Serve) runs as a coroutine of
	// the shard's thread.
	ErrServing = shard.ErrServing
	// ErrDraining is returned when the shard was closed to flow groups by Drain.
	ErrDraining = shard.ErrDraining
)

// Location is where the frames of a flow are processed.
type Location = shard.Location

// RETA returns the indirection table: for each of the 128 buckets of the hash,
// the shard that processes its frames, like `ethtool -x` for a network card.
// Bucket b belongs to flow group b % Config.Groups.
func (s *Stack) RETA() []int { return s.set.RETA() }

// SetRETA moves flow groups, with their live connections, until the indirection
// table is the given one, like `ethtool -X` for a network card. A table has a
// shard for each of the 128 buckets, and one shard for all buckets of a flow
// group. Groups that cannot move stay; the error says which, and why, as for
// Move. With the rebalancer on, it may move them again.
//
// It may be called from any goroutine but a shard's, like all methods here.
func (s *Stack) SetRETA(table []int) error { return s.set.SetRETA(table) }

// Move gives one flow group with its live connections to a shard and returns
// when that has taken it. No frame is lost or overtakes another, timers go on,
// and handlers with a method Move(*Conn) are told. The error matches ErrServing
// when the group has to stay, ErrDraining, or net.ErrClosed.
func (s *Stack) Move(group, shard int) error { return s.set.Move(group, shard) }

// Drain moves all flow groups of a shard to others, of the same NUMA node if
// there are any, and keeps new ones away until Resume. Groups that cannot move
// stay; the error names them, and Drain may be called again. The last shard
// cannot be drained.
func (s *Stack) Drain(shard int) error { return s.set.Drain(shard) }

// Resume lets flow groups onto a drained shard again, and moves its share there.
func (s *Stack) Resume(shard int) error { return s.set.Resume(shard) }

// Lookup returns where the frames that remote sends to local are processed:
// bucket, flow group, shard, CPU and NUMA node. network is "tcp" or "udp". There
// need be no such flow.
func (s *Stack) Lookup(network string, local, remote netip.AddrPort) (Location, error) {
	protocols := map[string]uint8{"tcp": 6, "udp": 17} // IANA protocol numbers
	proto, known := protocols[network]
	if !known {
		return Location{}, fmt.Errorf("look up flow: %w", net.UnknownNetworkError(network))
	}
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	if !local.IsValid() || !remote.IsValid() || local.Addr().Is4() != remote.Addr().Is4() {
		return Location{}, fmt.Errorf("look up flow from %v to %v: want two addresses of one family", remote, local)
	}
	return s.set.Lookup(dispatch.Tuple{
		Proto: proto,
		Src:   remote.Addr(), SrcPort: remote.Port(),
		Dst: local.Addr(), DstPort: local.Port(),
	}), nil
}
