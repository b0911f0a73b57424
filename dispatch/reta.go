package dispatch

import (
	"fmt"
	"sync/atomic"
)

// Buckets is the number of entries of the indirection table, the usual size of
// network cards that spread by hash.
const Buckets = 128

// RETA is the indirection table: hash → bucket → flow group → shard.
//
// The first two steps never change, so the state of a flow never changes its
// group. The last one does: moving a group moves its live flows.
//
// One control-plane goroutine at a time calls SetOwner; all other methods may
// be called from anywhere.
type RETA struct {
	groups, shards int // immutable after NewRETA

	// group maps a bucket to its flow group; immutable after NewRETA. A table,
	// because the shards ask once per frame and a division costs more.
	group [Buckets]uint8

	// owner maps a flow group to its shard; atomic: control plane writes,
	// shards read. Writes are rare, so the entries share cache lines.
	owner [Buckets]atomic.Uint32
}

// NewRETA returns a table of groups flow groups over shards shards. Bucket b
// belongs to group b % groups for ever, and group g to shard g % shards at
// first. It accepts 1 ≤ shards ≤ groups ≤ 128; below four groups per shard
// there is little to balance with.
func NewRETA(groups, shards int) (*RETA, error) {
	if shards < 1 || shards > Buckets {
		return nil, fmt.Errorf("indirection table: %d shards, want 1 to %d", shards, Buckets)
	}
	if groups < shards || groups > Buckets {
		return nil, fmt.Errorf("indirection table: %d flow groups, want %d (one per shard) to %d", groups, shards, Buckets)
	}
	r := &RETA{groups: groups, shards: shards}
	for b := range r.group {
		r.group[b] = uint8(b % groups)
	}
	for g := range groups {
		r.owner[g].Store(uint32(g % shards))
	}
	return r, nil
}

// Groups returns the number of flow groups.
func (r *RETA) Groups() int { return r.groups }

// Shards returns the number of shards.
func (r *RETA) Shards() int { return r.shards }

// Bucket returns the bucket of a hash, 0 to 127.
func (r *RETA) Bucket(hash uint32) int { return int(hash % Buckets) }

// GroupOf returns the flow group of a hash, the same for the life of the table.
func (r *RETA) GroupOf(hash uint32) int { return int(r.group[hash%Buckets]) }

// Owner returns the shard that owns a flow group now. It panics if there is no
// such group.
func (r *RETA) Owner(group int) int {
	r.check(group)
	return int(r.owner[group].Load())
}

// SetOwner gives a flow group to a shard. It panics if there is no such group
// or shard. It changes this table only: the steps that make the move lossless
// are the caller's, beginning with [Program.SetQueues].
func (r *RETA) SetOwner(group, shard int) {
	r.check(group)
	if shard < 0 || shard >= r.shards {
		panic(fmt.Sprintf("dispatch: flow group %d given to shard %d, want 0 to %d", group, shard, r.shards-1))
	}
	r.owner[group].Store(uint32(shard))
}

// Lookup returns all that the table says about a hash now. The hash of a flow is
// that of [Toeplitz.HashTuple].
func (r *RETA) Lookup(hash uint32) (bucket, group, shard int) {
	bucket, group = r.Bucket(hash), r.GroupOf(hash)
	return bucket, group, r.Owner(group)
}

// Snapshot returns the shard of every bucket, as `ethtool -x` lists the queues
// of a network card. Moves that happen meanwhile may be in it or not.
func (r *RETA) Snapshot() []int {
	table := make([]int, Buckets)
	for b := range table {
		table[b] = int(r.owner[r.group[b]].Load())
	}
	return table
}

// Move is a change of the table: a flow group changes its shard.
type Move struct{ Group, From, To int }

// Moves returns what has to move for the table to become as the given one, by
// group. Like a [RETA.Snapshot], this has a shard for each of the 128 buckets.
// The buckets of one flow group move together, so they must name one shard: the
// buckets b, b + Groups(), b + 2*Groups() and so on. The table is not changed.
func (r *RETA) Moves(table []int) ([]Move, error) {
	if len(table) != Buckets {
		return nil, fmt.Errorf("indirection table: %d entries, want %d", len(table), Buckets)
	}
	var moves []Move
	for b, shard := range table {
		if shard < 0 || shard >= r.shards {
			return nil, fmt.Errorf("indirection table: bucket %d to shard %d, want 0 to %d", b, shard, r.shards-1)
		}
		group := int(r.group[b])
		if first := table[group]; b != group && shard != first {
			return nil, fmt.Errorf("indirection table: bucket %d to shard %d, want %d as for bucket %d: both belong to flow group %d", b, shard, first, group, group)
		}
		if from := r.Owner(group); b == group && shard != from {
			moves = append(moves, Move{group, from, shard})
		}
	}
	return moves, nil
}

// Queues returns the table for the kernel: the queue of every bucket, where
// queue n is the one that shard n reads.
func (r *RETA) Queues() [Buckets]uint32 {
	var queues [Buckets]uint32
	for b := range queues {
		queues[b] = r.owner[r.group[b]].Load()
	}
	return queues
}

func (r *RETA) check(group int) {
	if group < 0 || group >= r.groups {
		panic(fmt.Sprintf("dispatch: flow group %d, want 0 to %d", group, r.groups-1))
	}
}
