package shard

import (
	"errors"
	"fmt"

	"numastack/dispatch"
	"numastack/numaalloc"
)

// RETA returns the shard of each of the 128 buckets of the indirection table.
func (set *Set) RETA() []int { return set.reta.Snapshot() }

// SetRETA moves the flow groups that a table of 128 shards, one per bucket,
// gives to other shards. The buckets of one group need one shard, see
// [dispatch.RETA.Moves]. What cannot be moved stays, and the error says why.
func (set *Set) SetRETA(table []int) error {
	set.moveMu.Lock()
	defer set.moveMu.Unlock()
	moves, err := set.reta.Moves(table)
	for _, m := range moves {
		err = errors.Join(err, set.moveLocked(m.Group, m.To))
	}
	return err
}

// Location is what the indirection table says about a flow.
type Location struct {
	Hash   uint32 `json:"hash"`
	Bucket int    `json:"bucket"`
	Group  int    `json:"group"`
	Shard  int    `json:"shard"`
	CPU    int    `json:"cpu"`
	Node   int    `json:"node"` // NUMA node of CPU
}

// Lookup returns where the frames of a TCP or UDP flow are processed now.
func (set *Set) Lookup(flow dispatch.Tuple) Location {
	l := Location{Hash: set.toeplitz.HashTuple(flow)}
	l.Bucket, l.Group, l.Shard = set.reta.Lookup(l.Hash)
	s := set.shards[l.Shard]
	l.CPU, l.Node = s.cpu, s.node
	return l
}

// Draining reports for each shard whether Drain has closed it to flow groups.
func (set *Set) Draining() []bool {
	set.moveMu.Lock()
	defer set.moveMu.Unlock()
	return append([]bool(nil), set.draining...)
}

// Drain moves all flow groups of a shard to others, those of its NUMA node
// first, and keeps others away from it until Resume. Groups with handlers of
// Serve stay: the error names them, and a later Drain may find them free.
func (set *Set) Drain(shard int) error {
	set.moveMu.Lock()
	defer set.moveMu.Unlock()
	if err := set.checkShard("drain", shard); err != nil {
		return err
	}
	was := set.draining[shard]
	set.draining[shard] = true
	var errs []error
	counts := set.groupCounts()
	for group := range set.groups {
		if set.reta.Owner(group) != shard {
			continue
		}
		to := set.roomiest(shard, counts)
		if to < 0 {
			set.draining[shard] = was
			return fmt.Errorf("drain shard %d: no other shard takes its flow groups", shard)
		}
		if err := set.moveLocked(group, to); err != nil {
			errs = append(errs, err)
			continue
		}
		counts[to]++
	}
	return errors.Join(errs...)
}

// roomiest returns the shard with the fewest groups, by counts, that may take one
// of a draining shard, or -1. Those of the same NUMA node go first, then those of
// the node where its memory costs least: what leaves it leaves its memory behind.
func (set *Set) roomiest(from int, counts []int) int {
	best, bestCost := -1, 0.0
	for id, s := range set.shards {
		if set.draining[id] {
			continue
		}
		cost := 0.0
		if s.node != set.shards[from].node {
			cost = set.costs.Load().Cost(s.node, set.shards[from].memory)
		}
		if best < 0 || cost < bestCost || cost == bestCost && counts[id] < counts[best] {
			best, bestCost = id, cost
		}
	}
	return best
}

func (set *Set) groupCounts() []int {
	counts := make([]int, len(set.shards))
	for group := range set.groups {
		counts[set.reta.Owner(group)]++
	}
	return counts
}

// Resume lets flow groups onto a drained shard again, and gives it its share:
// groups of the shards with the most.
func (set *Set) Resume(shard int) error {
	set.moveMu.Lock()
	defer set.moveMu.Unlock()
	if err := set.checkShard("resume", shard); err != nil {
		return err
	}
	set.draining[shard] = false
	active := 0
	for _, d := range set.draining {
		if !d {
			active++
		}
	}
	counts := set.groupCounts()
	share := len(set.groups) / active
	var errs []error
	for group := len(set.groups) - 1; group >= 0 && counts[shard] < share; group-- {
		from := set.reta.Owner(group)
		if from == shard || counts[from] <= share {
			continue
		}
		if err := set.moveLocked(group, shard); err != nil {
			errs = append(errs, err)
			continue
		}
		counts[from]--
		counts[shard]++
	}
	if counts[shard] >= share {
		return nil // with others than those that had to stay
	}
	return errors.Join(errs...)
}

// Repin pins a shard's thread to its CPU again, after the CPU was offline. Memory
// and groups stay as they are.
func (set *Set) Repin(shard int) error {
	if err := set.checkShard("pin", shard); err != nil {
		return err
	}
	err := ErrClosed
	set.shards[shard].do(func(s *Shard) { err = numaalloc.Pin(s.cpu) })
	return err
}

func (set *Set) checkShard(what string, shard int) error {
	if shard < 0 || shard >= len(set.shards) {
		return fmt.Errorf("%s shard %d: want 0 to %d", what, shard, len(set.shards)-1)
	}
	return nil
}
