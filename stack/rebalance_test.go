package stack

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"numastack/numaalloc"
	"numastack/shard"
)

// model is a machine whose flow groups cause fixed loads, wherever they are. A
// shard that has more than it can do is busy all the time.
type model struct {
	nodes    []int // of each shard
	owner    []int // of each group
	load     []float64
	served   map[int]bool // groups that have to stay
	draining []bool
	busy     []uint64 // by group
	moved    []string
	pinned   []int
	now      time.Duration
}

func newModel(nodes []int, load ...float64) *model {
	m := &model{nodes: nodes, load: load, served: make(map[int]bool)}
	m.owner = make([]int, len(load))
	m.busy = make([]uint64, len(load))
	m.draining = make([]bool, len(nodes))
	return m
}

func (m *model) pass(d time.Duration) {
	m.now += d
	for id := range m.nodes {
		total := m.demand(id)
		for g, owner := range m.owner {
			if owner == id {
				m.busy[g] += uint64(float64(d) * m.load[g] / max(total, 1))
			}
		}
	}
}

// demand is what the groups of a shard would like to have of its time.
func (m *model) demand(id int) (total float64) {
	for g, owner := range m.owner {
		if owner == id {
			total += m.load[g]
		}
	}
	return total
}

func (m *model) Stats() []shard.Counters {
	all := make([]shard.Counters, len(m.nodes))
	for id, node := range m.nodes {
		all[id] = shard.Counters{Shard: id, CPU: 10 + id, Node: node, At: uint64(m.now)}
		for g, owner := range m.owner {
			if owner == id {
				served := 0
				if m.served[g] {
					served = 1
				}
				all[id].Groups = append(all[id].Groups, shard.GroupCounters{Group: g, Busy: m.busy[g], Served: served})
			}
		}
	}
	return all
}

func (m *model) Move(group, to int) error {
	if m.draining[to] || m.served[group] {
		return errors.New("refused")
	}
	m.moved = append(m.moved, fmt.Sprintf("%d:%d>%d", group, m.owner[group], to))
	m.owner[group] = to
	return nil
}

func (m *model) Drain(id int) error {
	m.draining[id] = true
	for g, owner := range m.owner {
		if owner == id {
			m.owner[g] = slices.Index(m.draining, false)
		}
	}
	return nil
}

func (m *model) Resume(id int) error { m.draining[id] = false; return nil }
func (m *model) Draining() []bool    { return slices.Clone(m.draining) }
func (m *model) Repin(id int) error  { m.pinned = append(m.pinned, id); return nil }

// watch lets the rebalancer look n times.
func (m *model) watch(r *rebalancer, n int) {
	for range n {
		m.pass(rebalanceEvery)
		r.look()
	}
}

func (m *model) rebalancer(mode Rebalance) *rebalancer {
	r := newRebalancer(mode, m, slog.New(slog.DiscardHandler))
	var all numaalloc.Topology
	for id := range m.nodes {
		all.AllowedCPUs = append(all.AllowedCPUs, 10+id)
	}
	r.watch = func() (*numaalloc.Topology, bool, error) { return &all, false, nil }
	r.costs = func() *Costs { return nil }
	return r
}

func repeat(load float64, n int) []float64 { return slices.Repeat([]float64{load}, n) }

func TestRebalance(t *testing.T) {
	for _, test := range []struct {
		name  string
		nodes []int
		load  []float64
		owner []int // of the first groups; the others are on shard 0
		moves int   // at most
		least int   // moves, at least
		limit float64
	}{
		{"all on one of two", []int{0, 0}, repeat(0.2, 8), nil, 4, 4, 0.81},
		{"all on one of four", []int{0, 0, 0, 0}, repeat(0.1, 16), nil, 12, 10, 0.51},
		{"even already", []int{0, 0}, repeat(0.2, 4), []int{0, 1, 0, 1}, 0, 0, 0.41},
		{"a little uneven", []int{0, 0}, []float64{0.3, 0.3, 0.25, 0.25}, []int{0, 0, 1, 1}, 0, 0, 0.61},
		{"idle and uneven", []int{0, 0}, repeat(0.05, 6), nil, 0, 0, 0.31},
		{"one flow fills a shard", []int{0, 0}, []float64{0.9, 0.1, 0.1, 0.1}, nil, 3, 3, 0.91},
		{"one flow, alone", []int{0, 0}, []float64{0.9}, nil, 0, 0, 0.91},
		{"three equal flows", []int{0, 0}, repeat(0.45, 3), []int{0, 0, 1}, 0, 0, 0.91},
		{"more than there is room for", []int{0, 0}, repeat(0.5, 8), nil, 4, 3, 2.6},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newModel(test.nodes, test.load...)
			copy(m.owner, test.owner)
			r := m.rebalancer(RebalanceAuto)
			m.watch(r, 8) // two seconds
			if n := len(m.moved); n < test.least || n > test.moves {
				t.Errorf("%d moves, want %d to %d: %v", n, test.least, test.moves, m.moved)
			}
			for id := range m.nodes {
				if d := m.demand(id); d > test.limit {
					t.Errorf("shard %d has a load of %.2f, want %.2f or less; owners %v", id, d, test.limit, m.owner)
				}
			}
			before := len(m.moved)
			m.watch(r, 240) // a minute
			if n := len(m.moved) - before; n != 0 {
				t.Errorf("%d moves under a steady load: %v", n, m.moved[before:])
			}
			if got := r.stats().Moves; got != uint64(len(m.moved)) {
				t.Errorf("%d moves counted, want %d", got, len(m.moved))
			}
		})
	}
}

// TestRebalanceNoise: a peak that is gone at the next look moves nothing.
func TestRebalanceNoise(t *testing.T) {
	m := newModel([]int{0, 0}, 0.3, 0.3, 0.3, 0.3)
	copy(m.owner, []int{0, 0, 1, 1})
	r := m.rebalancer(RebalanceAuto)
	for range 100 {
		m.load[0], m.load[1] = 0.4, 0.5
		m.watch(r, 1)
		m.load[0], m.load[1] = 0.3, 0.3
		m.watch(r, 1)
	}
	if len(m.moved) != 0 {
		t.Errorf("moved %v", m.moved)
	}
}

// TestRebalanceGivesUp: a load that comes and goes on both shards in turn, each
// time for longer than it takes to act, costs fewer and fewer moves.
func TestRebalanceGivesUp(t *testing.T) {
	m := newModel([]int{0, 0}, repeat(0.2, 8)...)
	copy(m.owner, []int{0, 1, 0, 1, 0, 1, 0, 1})
	r := m.rebalancer(RebalanceAuto)
	moves := func(looks int) int {
		before := len(m.moved)
		for i := range looks {
			for g := range m.load {
				m.load[g] = 0.05
				if m.owner[g] == i/6%2 { // where the groups are is what is busy, as if by another program
					m.load[g] = 0.2
				}
			}
			m.watch(r, 1)
		}
		return len(m.moved) - before
	}
	first, later := moves(48), moves(480)
	if first == 0 || later > 5*first {
		t.Errorf("%d moves in 12 seconds, then %d in two minutes, want some, then half as many per second at most", first, later)
	}
	for g := range m.load {
		m.load[g], m.owner[g] = 0.2, 0
	}
	m.watch(r, rebalanceMostLooks+8)
	if d := m.demand(1); d < 0.6 {
		t.Errorf("a load that lasts is evened out to %.2f of 1.60 only", d)
	}
}

func TestRebalancePrefersItsNode(t *testing.T) {
	m := newModel([]int{0, 0, 1}, repeat(0.2, 4)...)
	m.owner = []int{0, 0, 0, 0}
	r := m.rebalancer(RebalanceAuto)
	m.watch(r, 4)
	if m.demand(2) != 0 || m.demand(1) < 0.39 {
		t.Errorf("owners %v, want shards 0 and 1 of one node to share", m.owner)
	}
	m = newModel([]int{0, 0, 1}, repeat(0.2, 10)...)
	r = m.rebalancer(RebalanceAuto)
	m.watch(r, 16)
	if m.demand(2) < 0.59 || r.stats().CrossNode == 0 {
		t.Errorf("owners %v, %d moves to another node: want all three shards to share", m.owner, r.stats().CrossNode)
	}
}

// TestRebalanceGoesByCost: of other nodes, groups go where the memory that they
// leave behind costs least, while that helps.
func TestRebalanceGoesByCost(t *testing.T) {
	nodes := map[int][]int{0: {10}, 1: {11}, 2: {12}}
	distances := [][]int{{10, 15, 30}, {30, 10, 15}, {15, 30, 10}} // links that run one way round
	costs, err := numaalloc.CostsFromDistances(nodes, []int{0, 1, 2}, func(from, to int) int { return distances[from][to] })
	if err != nil {
		t.Fatal(err)
	}
	m := newModel([]int{0, 1, 2}, repeat(0.1, 10)...)
	copy(m.owner, []int{2, 2}) // without costs, shard 1 would be the one
	r := m.rebalancer(RebalanceAuto)
	r.costs = func() *Costs { return costs }
	m.watch(r, rebalanceLooks)
	if len(m.moved) == 0 || !strings.HasSuffix(m.moved[0], ">2") {
		t.Errorf("moved %v, want to shard 2, whose node pays least for the memory of node 0", m.moved)
	}
	m = newModel([]int{0, 1, 2}, repeat(0.1, 20)...)
	for g := 10; g < 18; g++ {
		m.owner[g] = 2 // it is at 80 %: no help
	}
	r = m.rebalancer(RebalanceAuto)
	r.costs = func() *Costs { return costs }
	m.watch(r, rebalanceLooks)
	if len(m.moved) == 0 || !strings.HasSuffix(m.moved[0], ">1") {
		t.Errorf("moved %v, want to shard 1: shard 2 has its own to do", m.moved)
	}
}

func TestRebalanceLeavesServedGroups(t *testing.T) {
	m := newModel([]int{0, 0}, repeat(0.2, 4)...)
	m.served = map[int]bool{0: true, 1: true, 2: true}
	r := m.rebalancer(RebalanceAuto)
	m.watch(r, 8)
	if !slices.Equal(m.moved, []string{"3:0>1"}) || r.stats().Refused != 0 {
		t.Errorf("moved %v, %d refused: want only the group without handlers", m.moved, r.stats().Refused)
	}
}

func TestRebalanceOffMovesNothing(t *testing.T) {
	m := newModel([]int{0, 0}, repeat(0.2, 8)...)
	m.watch(m.rebalancer(RebalanceOff), 20)
	if len(m.moved) != 0 {
		t.Errorf("moved %v", m.moved)
	}
}

// TestProfileRebalances: a profile says what RebalanceAuto means; what the user
// asks for wins.
func TestProfileRebalances(t *testing.T) {
	for _, test := range []struct {
		profile   Profile
		rebalance Rebalance
		want      Rebalance
	}{
		{ProfileClosest, RebalanceAuto, RebalanceAuto},
		{ProfileNUMA, RebalanceAuto, RebalanceAuto},
		{ProfileClosestStatic, RebalanceAuto, RebalanceOff},
		{ProfileNUMAStatic, RebalanceAuto, RebalanceOff},
		{ProfileConservative, RebalanceAuto, RebalanceConserve},
		{ProfileNUMAStatic, RebalanceConserve, RebalanceConserve},
		{ProfileConservative, RebalanceOff, RebalanceOff},
	} {
		if got := (&Config{Profile: test.profile, Rebalance: test.rebalance}).rebalance(); got != test.want {
			t.Errorf("profile %v with rebalance %v: %v, want %v", test.profile, test.rebalance, got, test.want)
		}
	}
}

func TestRebalanceConserve(t *testing.T) {
	m := newModel([]int{0, 0, 0}, repeat(0.02, 6)...)
	copy(m.owner, []int{0, 1, 2, 0, 1, 2})
	r := m.rebalancer(RebalanceConserve)
	m.watch(r, conserveLooks-1)
	if slices.Contains(m.draining, true) {
		t.Fatal("drained before its time")
	}
	m.watch(r, 3*conserveLooks)
	if !slices.Equal(m.draining, []bool{false, true, true}) || r.stats().Drains != 2 {
		t.Fatalf("draining %v after a long time without load, want all but shard 0", m.draining)
	}
	for g := range m.load {
		m.load[g] = 0.25
	}
	m.watch(r, 8)
	if d := m.demand(1); m.draining[1] || d < 0.4 || d > 0.8 {
		t.Errorf("shard 1 draining %v with %.2f of 1.5 to do, want about half; owners %v", m.draining[1], d, m.owner)
	}
}

// TestFollowCPUs: a shard whose CPU is gone is drained, and comes back with it,
// also when nothing else is rebalanced. What the user has drained stays so.
func TestFollowCPUs(t *testing.T) {
	m := newModel([]int{0, 0, 0}, repeat(0.1, 6)...)
	copy(m.owner, []int{0, 1, 2, 0, 1, 2})
	r := m.rebalancer(RebalanceOff)
	all := r.watch
	if err := m.Drain(2); err != nil {
		t.Fatal(err)
	}
	var adapted []*numaalloc.Topology
	r.adapt = func(t *numaalloc.Topology) { adapted = append(adapted, t) }
	fewer := &numaalloc.Topology{AllowedCPUs: []int{0, 10}}
	r.watch = func() (*numaalloc.Topology, bool, error) { return fewer, len(adapted) == 0, nil }
	m.watch(r, 3)
	if want := map[int]bool{1: true, 2: false}; !m.draining[1] || !maps.Equal(r.lost, want) {
		t.Errorf("draining %v, lost %v; want %v", m.draining, r.lost, want)
	}
	if len(adapted) != 1 || adapted[0] != fewer {
		t.Errorf("adapted to %v, want once to the topology without the CPUs", adapted)
	}
	r.watch = all
	m.watch(r, 3)
	if m.draining[1] || !m.draining[2] || !slices.Equal(m.pinned, []int{1, 2}) {
		t.Errorf("draining %v, pinned %v; want shard 1 back, shard 2 drained, both pinned", m.draining, m.pinned)
	}
	if s := r.stats(); s.Drains != 1 || s.Resumes != 1 {
		t.Errorf("%d drains and %d resumes counted, want 1 each", s.Drains, s.Resumes)
	}
}
