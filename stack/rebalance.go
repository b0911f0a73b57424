package stack

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"numastack/numaalloc"
	"numastack/shard"
)

// Rebalance says what moves flow groups between shards.
type Rebalance int

// The ways of rebalancing.
const (
	// RebalanceAuto moves the fewest flow groups that even out the load, unless
	// the profile asks for something else.
	RebalanceAuto Rebalance = iota
	// RebalanceOff moves none; Move and SetRETA still do.
	RebalanceOff
	// RebalanceConserve is RebalanceAuto on as few shards as carry the load: the
	// others are drained while it is low.
	RebalanceConserve
)

var rebalanceNames = [...]string{"auto", "off", "conserve"}

// String returns the name that UnmarshalText accepts.
func (r Rebalance) String() string { return enumName(rebalanceNames[:], int(r)) }

// MarshalText implements encoding.TextMarshaler.
func (r Rebalance) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText accepts auto, off and conserve.
func (r *Rebalance) UnmarshalText(b []byte) error {
	i, err := enumValue(rebalanceNames[:], string(b))
	*r = Rebalance(i)
	return err
}

// How the rebalancer decides. Loads are shares of a shard's time: 1 is a shard
// that never waits.
const (
	// rebalanceEvery is how often it looks, and over what time loads are taken.
	rebalanceEvery = 250 * time.Millisecond

	// A difference between two shards is acted on when it was rebalanceGap or
	// more in rebalanceLooks looks in a row and the busier shard is at
	// rebalanceBusy or above: below that nobody waits. For a move to another NUMA
	// node that is rebalanceFar, as memory stays behind. Groups are moved until
	// the difference is below rebalanceDone, or a move would only turn it around.
	rebalanceGap   = 0.20
	rebalanceDone  = 0.08
	rebalanceBusy  = 0.40
	rebalanceFar   = 0.70
	rebalanceLooks = 2

	// rebalanceMoves bounds the moves per look, 20 per second.
	rebalanceMoves = 5

	// A shard that has to give groups away soon after it has got some shows a
	// load that changes faster than moves can follow, or that another program
	// causes: it makes shards busy that wait for their CPU. Then the rebalancer
	// wants to see the difference in twice as many looks in a row, up to
	// rebalanceMostLooks (8 s), and in half as many again for each
	// rebalanceForget (20 s) without a move.
	rebalanceMostLooks = 32
	rebalanceForget    = 80

	// minGroupLoad is the load of a group that is not worth a move.
	minGroupLoad = 0.005

	// With RebalanceConserve, a shard is drained when the others would be at
	// conserveLow or below after conserveLooks looks in a row, and one comes back
	// when a shard is at conserveHigh.
	conserveLow   = 0.50
	conserveHigh  = 0.75
	conserveLooks = 20
)

// RebalanceStats is what the rebalancer has done.
type RebalanceStats struct {
	Moves     uint64 `json:"moves"`      // flow groups moved to even out the load
	Refused   uint64 `json:"refused"`    // of those, the ones that could not leave
	CrossNode uint64 `json:"cross_node"` // of those, the ones that left their NUMA node
	Drains    uint64 `json:"drains"`     // shards drained: low load, or CPU gone
	Resumes   uint64 `json:"resumes"`    // shards that came back
}

// shards is what the rebalancer sees of a stack.
type shards interface {
	Stats() []shard.Counters
	Move(group, to int) error
	Drain(id int) error
	Resume(id int) error
	Draining() []bool
	Repin(id int) error
}

// rebalancer watches how busy the shards are and moves flow groups. The idea of
// moving as few as will do is RSS++'s (Barbette et al., CoNEXT 2019).
//
// Its goroutine owns all but the counters.
type rebalancer struct {
	mode  Rebalance
	set   shards
	log   *slog.Logger
	watch func() (t *numaalloc.Topology, changed bool, err error) // as numaalloc.Watch.Look
	costs func() *Costs
	adapt func(*numaalloc.Topology) // to a change

	before   []shard.Counters
	uneven   int          // looks in a row that found a difference
	wanted   int          // before something is done about it
	unmoved  int          // looks since the last move
	looks    int          // so far
	received map[int]int  // by shard that got groups, and gave none away since: in which look
	idle     int          // looks in a row that found a shard to spare
	resting  map[int]bool // shards that were drained to conserve
	lost     map[int]bool // shards whose CPU is gone; true: drained for that

	moves, refused, crossNode, drains, resumes atomic.Uint64

	stop    context.CancelFunc
	stopped chan struct{}
}

// startRebalancer begins to look after the shards of a stack.
func startRebalancer(mode Rebalance, set shards, log *slog.Logger, costs func() *Costs, adapt func(context.Context, *numaalloc.Topology)) *rebalancer {
	r := newRebalancer(mode, set, log)
	ctx, cancel := context.WithCancel(context.Background())
	r.watch, r.costs, r.stop = new(numaalloc.Watch).Look, costs, cancel
	r.adapt = func(t *numaalloc.Topology) { adapt(ctx, t) }
	go func() {
		defer close(r.stopped)
		tick := time.NewTicker(rebalanceEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				r.look()
			}
		}
	}()
	return r
}

func newRebalancer(mode Rebalance, set shards, log *slog.Logger) *rebalancer {
	return &rebalancer{
		mode: mode, set: set, log: log,
		before: set.Stats(), wanted: rebalanceLooks, received: make(map[int]int),
		resting: make(map[int]bool), lost: make(map[int]bool),
		stopped: make(chan struct{}),
	}
}

func (r *rebalancer) close() {
	r.stop()
	<-r.stopped
}

func (r *rebalancer) stats() RebalanceStats {
	return RebalanceStats{
		Moves: r.moves.Load(), Refused: r.refused.Load(), CrossNode: r.crossNode.Load(),
		Drains: r.drains.Load(), Resumes: r.resumes.Load(),
	}
}

// look compares the counters with those of the last time and acts.
func (r *rebalancer) look() {
	now := r.set.Stats()
	loads := loadsBetween(r.before, now)
	r.before = now
	for i, draining := range r.set.Draining() {
		loads[i].closed = draining
	}
	if r.followCPUs(loads) || r.mode == RebalanceOff {
		return
	}
	if r.mode == RebalanceConserve && r.conserve(loads) {
		return
	}
	if r.uneven = r.uneven + 1; !uneven(loads, r.costs()) {
		r.uneven = 0
	}
	r.looks++
	if r.unmoved++; r.unmoved%rebalanceForget == 0 {
		r.wanted = max(r.wanted/2, rebalanceLooks)
	}
	if r.uneven >= r.wanted && r.even(loads) {
		r.wanted, r.uneven = min(2*r.wanted, rebalanceMostLooks), 0
	}
}

// shardLoad is how busy a shard was.
type shardLoad struct {
	id, cpu, node int
	busy          float64
	closed        bool // takes no groups
	groups        []groupLoad
}

// groupLoad is a flow group's part of it.
type groupLoad struct {
	id    int
	busy  float64
	stays bool // handlers of Serve run on the shard's thread
}

// loadsBetween returns the loads of the shards with the groups they have now.
func loadsBetween(before, now []shard.Counters) []shardLoad {
	type point struct{ at, busy uint64 }
	earlier := make(map[int]point) // by group
	for _, c := range before {
		for _, g := range c.Groups {
			earlier[g.Group] = point{c.At, g.Busy}
		}
	}
	loads := make([]shardLoad, len(now))
	for i, c := range now {
		loads[i] = shardLoad{id: c.Shard, cpu: c.CPU, node: c.Node}
		for _, g := range c.Groups {
			busy := 0.0
			if was, known := earlier[g.Group]; known && c.At > was.at {
				busy = float64(g.Busy-was.busy) / float64(c.At-was.at)
			}
			loads[i].busy += busy
			loads[i].groups = append(loads[i].groups, groupLoad{id: g.Group, busy: busy, stays: g.Served > 0})
		}
	}
	return loads
}

// uneven reports whether one shard has much more to do than another that could
// help it.
func uneven(loads []shardLoad, costs *Costs) bool {
	busiest, idlest := extremes(loads, costs)
	return idlest != nil && busiest.busy >= rebalanceBusy && busiest.busy-idlest.busy >= rebalanceGap
}

// extremes returns the busiest shard, and the one to relieve it: the least busy
// open one of the same node, or, when that one is no help, of the node whose CPUs
// pay least for the memory that a group leaves behind; nil if there is none.
func extremes(loads []shardLoad, costs *Costs) (busiest, idlest *shardLoad) {
	for i := range loads {
		if busiest == nil || loads[i].busy > busiest.busy {
			busiest = &loads[i]
		}
	}
	var far *shardLoad
	farCost := 0.0
	for i := range loads {
		l := &loads[i]
		switch {
		case l.closed || l == busiest:
		case l.node == busiest.node:
			if idlest == nil || l.busy < idlest.busy {
				idlest = l
			}
		case busiest.busy-l.busy >= rebalanceGap:
			cost := costs.Cost(l.node, busiest.node)
			if far == nil || cost < farCost || cost == farCost && l.busy < far.busy {
				far, farCost = l, cost
			}
		}
	}
	if far != nil && busiest.busy >= rebalanceFar && (idlest == nil || busiest.busy-idlest.busy < rebalanceGap) {
		idlest = far
	}
	return busiest, idlest
}

// even moves groups until the loads are even, or no group is small enough to
// help. A flow that alone fills a shard is never moved: the difference would
// only change sides. Its neighbors are. It returns whether a shard has given
// away after it had received.
func (r *rebalancer) even(loads []shardLoad) (inVain bool) {
	for range rebalanceMoves {
		from, to := extremes(loads, r.costs())
		if to == nil || from.busy-to.busy < rebalanceDone {
			return inVain
		}
		i := candidate(from, (from.busy-to.busy)/2)
		if i < 0 {
			return inVain
		}
		g := from.groups[i]
		from.groups = slices.Delete(from.groups, i, i+1)
		if err := r.set.Move(g.id, to.id); err != nil {
			r.refused.Add(1)
			r.log.Debug("flow group not moved", "error", err)
			continue
		}
		r.moves.Add(1)
		r.unmoved = 0
		if look, known := r.received[from.id]; known && r.looks-look < rebalanceForget {
			inVain = true
		}
		delete(r.received, from.id)
		r.received[to.id] = r.looks
		if from.node != to.node {
			r.crossNode.Add(1)
		}
		r.log.Info("flow group moved",
			"group", g.id, "from", from.id, "to", to.id, "load", percent(g.busy),
			"reason", fmt.Sprintf("shard %d busy %s, shard %d %s", from.id, percent(from.busy), to.id, percent(to.busy)))
		from.busy -= g.busy
		to.busy += g.busy
		to.groups = append(to.groups, g)
	}
	return inVain
}

// candidate returns the index of the group with the largest load up to limit
// that may leave, or -1.
func candidate(l *shardLoad, limit float64) int {
	best := -1
	for i, g := range l.groups {
		if g.stays || g.busy > limit || g.busy < minGroupLoad {
			continue
		}
		if best < 0 || g.busy > l.groups[best].busy {
			best = i
		}
	}
	return best
}

// conserve drains a shard that is not needed, or brings one back. It returns
// whether it did.
func (r *rebalancer) conserve(loads []shardLoad) bool {
	open, total, highest := 0, 0.0, 0.0
	for _, l := range loads {
		total += l.busy
		if !l.closed {
			open++
			highest = max(highest, l.busy)
		}
	}
	if highest >= conserveHigh {
		r.idle = 0
		for _, l := range loads {
			if _, lost := r.lost[l.id]; r.resting[l.id] && !lost {
				delete(r.resting, l.id)
				r.resume(l.id, "shards are at "+percent(highest))
				return true
			}
		}
		return false
	}
	if r.idle++; open < 2 || total/float64(open-1) > conserveLow {
		r.idle = 0
	}
	if r.idle < conserveLooks {
		return false
	}
	r.idle = 0
	// The last one of those with the least to do: what is left is close together.
	candidates := slices.DeleteFunc(slices.Clone(loads), func(l shardLoad) bool {
		return l.closed || slices.ContainsFunc(l.groups, func(g groupLoad) bool { return g.stays })
	})
	if len(candidates) == 0 {
		return false
	}
	least := slices.MinFunc(candidates, func(a, b shardLoad) int {
		return cmp.Or(cmp.Compare(a.busy, b.busy), cmp.Compare(b.id, a.id))
	})
	r.resting[least.id] = true
	r.drain(least.id, fmt.Sprintf("all shards together are at %s", percent(total)))
	return true
}

// followCPUs drains shards whose CPU went offline or out of the cpuset: the kernel
// lets their threads run anywhere then. It returns whether something has changed.
func (r *rebalancer) followCPUs(loads []shardLoad) (changed bool) {
	topology, isNew, err := r.watch()
	if err != nil {
		return false // no sysfs, no news
	}
	if isNew {
		defer r.adapt(topology)
	}
	for _, l := range loads {
		drained, lost := r.lost[l.id]
		switch here := slices.Contains(topology.AllowedCPUs, l.cpu); {
		case !here && !lost:
			changed = true
			r.lost[l.id] = !l.closed
			if !l.closed {
				r.drain(l.id, fmt.Sprintf("CPU %d is offline or not allowed", l.cpu))
			}
		case here && lost:
			changed = true
			delete(r.lost, l.id)
			if err := r.set.Repin(l.id); err != nil {
				r.log.Warn("shard not pinned again", "shard", l.id, "error", err)
			}
			if drained {
				r.resume(l.id, fmt.Sprintf("CPU %d is back", l.cpu))
			}
		}
	}
	return changed
}

func (r *rebalancer) drain(id int, reason string) {
	r.drains.Add(1)
	if err := r.set.Drain(id); err != nil {
		r.log.Warn("shard not drained", "shard", id, "reason", reason, "error", err)
		return
	}
	r.log.Info("shard drained", "shard", id, "reason", reason)
}

func (r *rebalancer) resume(id int, reason string) {
	r.resumes.Add(1)
	if err := r.set.Resume(id); err != nil {
		r.log.Warn("shard has too few flow groups", "shard", id, "reason", reason, "error", err)
		return
	}
	r.log.Info("shard is back", "shard", id, "reason", reason)
}

func percent(load float64) string { return fmt.Sprintf("%.0f%%", 100*load) }
