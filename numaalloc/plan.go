package numaalloc

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// Placement is what to place and where it may go. A zero field means its
// documented default; Shards has none.
type Placement struct {
	Profile Profile
	// Shards is how many threads to place, each with its queue: 1 to 65536. More
	// than there are CPUs share them round robin, and the plan warns of it.
	Shards int
	// CPUs are the CPUs to use, in this order, round robin. They win over the
	// profile's choice and all fields below. Default: the profile chooses.
	CPUs []int
	// BaseCPU and MaxCPU are the lowest and the highest CPU to use, as Windows'
	// base and max processor number. Default: 0, and no highest one; a negative
	// MaxCPU means that too. To use CPU 0 only, set CPUs.
	BaseCPU, MaxCPU int
	// Nodes are the only nodes to use. Default: all.
	Nodes []int
	// Device is the network device that the shards should be close to: the one
	// that the frames come through, not the TAP. Default: none.
	Device string
	// Costs says which nodes are near, if they were measured. Default: the
	// distances of the topology do.
	Costs *Costs
}

// Plan says where each shard goes.
type Plan struct {
	Profile Profile `json:"profile"`
	// Home is the node from which the profile measured what is close, or -1
	// where the CPUs were given.
	Home   int     `json:"home"`
	Shards []Place `json:"shards"`
	// Warnings are about what works, but perhaps not as expected.
	Warnings []string `json:"warnings,omitempty"`
	Topology string   `json:"topology"` // in one line
}

// Place is where one shard goes.
type Place struct {
	Shard int `json:"shard"`
	Queue int `json:"queue"` // of the device, read by this shard only
	CPU   int `json:"cpu"`
	Node  int `json:"node"` // of CPU
	// Memory is the node for the shard's memory: Node itself, or the nearest one
	// where that has none; -1 if there is none at all.
	Memory int `json:"memory"`

	SharesCPU  bool `json:"shares_cpu"`  // another shard runs on CPU
	SharesCore bool `json:"shares_core"` // another one runs on an SMT sibling of it
}

// Plan places the shards. It only computes: nothing is pinned or bound, so that
// printing the plan is a dry run. The error names the field that is wrong and
// says what it accepts.
func (p Placement) Plan(t *Topology) (*Plan, error) {
	switch {
	case p.Shards < 1 || p.Shards > maxCPUs:
		return nil, badPlacement("Shards", p.Shards, "1 to %d", maxCPUs)
	case p.Profile < 0 || int(p.Profile) >= len(profileNames):
		return nil, badPlacement("Profile", p.Profile, "one of %q", profileNames)
	}
	plan := &Plan{Profile: p.Profile, Home: -1, Topology: t.String()}
	var order []CPU
	var err error
	if len(p.CPUs) > 0 {
		order, err = p.given(t)
		if p.BaseCPU != 0 || p.MaxCPU > 0 || len(p.Nodes) > 0 || p.Device != "" {
			plan.warn("CPUs are given, so BaseCPU, MaxCPU, Nodes and Device do not count")
		}
	} else if order, err = p.candidates(t); err == nil {
		if plan.Home, err = p.home(t, order); err == nil {
			p.arrange(order, t, plan.Home)
		}
	}
	if err != nil {
		return nil, err
	}
	for i := range p.Shards {
		cpu := order[i%len(order)]
		plan.Shards = append(plan.Shards, Place{Shard: i, Queue: i, CPU: cpu.ID, Node: cpu.Node, Memory: p.memoryNode(t, cpu.Node)})
	}
	plan.findSharing(t)
	plan.warnOfMemory(t)
	return plan, nil
}

// given returns the CPUs of the explicit list.
func (p Placement) given(t *Topology) ([]CPU, error) {
	order := make([]CPU, len(p.CPUs))
	for i, id := range p.CPUs {
		cpu, exists := t.CPU(id)
		if !exists || !slices.Contains(t.AllowedCPUs, id) {
			var value any = id
			if exists && !cpu.Online {
				value = fmt.Sprintf("%d is offline", id)
			}
			return nil, badPlacement("CPUs", value, "CPUs that this process may use: %s", FormatCPUList(t.AllowedCPUs))
		}
		order[i] = cpu
	}
	return order, nil
}

// candidates returns the CPUs that the limits leave, ascending.
func (p Placement) candidates(t *Topology) ([]CPU, error) {
	if p.BaseCPU < 0 {
		return nil, badPlacement("BaseCPU", p.BaseCPU, "0 or more")
	}
	if p.MaxCPU > 0 && p.MaxCPU < p.BaseCPU {
		return nil, badPlacement("MaxCPU", p.MaxCPU, "BaseCPU, which is %d, or more; 0 for no limit", p.BaseCPU)
	}
	usable := t.CPUNodes()
	for _, id := range p.Nodes {
		if _, ok := usable[id]; ok {
			continue
		}
		value := fmt.Sprintf("%d does not exist", id)
		if n, exists := t.Node(id); exists {
			value = fmt.Sprintf("%d has no CPU", id)
			if len(n.CPUs) > 0 {
				value = fmt.Sprintf("%d has only CPUs that this process may not use, %s", id, FormatCPUList(n.CPUs))
			}
		}
		return nil, badPlacement("Nodes", value, "nodes with CPUs that this process may use: %s", FormatCPUList(slices.Collect(maps.Keys(usable))))
	}
	var cpus []CPU
	var onNodes []int
	for _, id := range t.AllowedCPUs {
		cpu, exists := t.CPU(id)
		if !exists || len(p.Nodes) > 0 && !slices.Contains(p.Nodes, cpu.Node) {
			continue
		}
		onNodes = append(onNodes, id)
		if id >= p.BaseCPU && (p.MaxCPU <= 0 || id <= p.MaxCPU) {
			cpus = append(cpus, cpu)
		}
	}
	if len(cpus) == 0 {
		limits := fmt.Sprintf("%d or higher", p.BaseCPU)
		if p.MaxCPU > 0 {
			limits = fmt.Sprintf("%d to %d", p.BaseCPU, p.MaxCPU)
		}
		return nil, badPlacement("BaseCPU, MaxCPU", limits, "a range with some of the CPUs %s", FormatCPUList(onNodes))
	}
	return cpus, nil
}

// home returns the node that others are near to or far from.
func (p Placement) home(t *Topology, cpus []CPU) (int, error) {
	if p.Device != "" {
		node, exists := t.Devices[p.Device]
		if !exists {
			names := slices.Sorted(maps.Keys(t.Devices))
			const most = 8
			if len(names) > most {
				names = append(names[:most], "...")
			}
			if names == nil {
				names = []string{"there is none"}
			}
			return -1, badPlacement("Device", p.Device, "a network device of /sys/class/net: %s", strings.Join(names, ", "))
		}
		if _, online := t.Node(node); online {
			return node, nil
		}
	}
	counts := make(map[int]int)
	for _, cpu := range cpus {
		counts[cpu.Node]++
	}
	remote := func(node int) int { // 1 if its memory is elsewhere
		if t.MemoryNode(node) == node {
			return 0
		}
		return 1
	}
	return slices.MinFunc(slices.Collect(maps.Keys(counts)), func(a, b int) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(remote(a), remote(b)), cmp.Compare(a, b))
	}), nil
}

// far returns what memory of one node costs the CPUs of another, in some unit: as
// measured, or by the distances.
func (p Placement) far(t *Topology, from, to int) float64 {
	if p.Costs != nil && p.Costs.Source == CostsMeasured {
		if cost := p.Costs.Cost(from, t.MemoryNode(to)); !math.IsInf(cost, 1) {
			return cost
		}
	}
	return float64(t.Distance(from, to))
}

// memoryNode returns the node for the memory of shards on a node.
func (p Placement) memoryNode(t *Topology, node int) int {
	nodes := t.MemoryNodes()
	if len(nodes) == 0 || slices.Contains(nodes, node) {
		return t.MemoryNode(node)
	}
	return slices.MinFunc(nodes, func(a, b int) int { return cmp.Compare(p.far(t, node, a), p.far(t, node, b)) })
}

// arrange sorts CPUs, which come ascending, into the order in which shards take
// them.
func (p Placement) arrange(cpus []CPU, t *Topology, home int) {
	type rank struct {
		thread int // how many CPUs of its core come before it
		turn   int // how many CPUs of its node with the same thread number do
	}
	ranks := make(map[int]rank)
	threads := make(map[int]int) // by core
	turns := make(map[[2]int]int)
	for _, cpu := range cpus {
		core := cpu.core()
		r := rank{thread: threads[core]}
		threads[core]++
		level := [2]int{cpu.Node, r.thread}
		r.turn = turns[level]
		turns[level]++
		ranks[cpu.ID] = r
	}
	away := func(node int) int { // 1 unless it is home
		if node == home {
			return 0
		}
		return 1
	}
	near := func(a, b CPU) int {
		return cmp.Or(cmp.Compare(away(a.Node), away(b.Node)),
			cmp.Compare(p.far(t, a.Node, home), p.far(t, b.Node, home)), cmp.Compare(a.Node, b.Node))
	}
	slices.SortFunc(cpus, func(a, b CPU) int {
		byThread := cmp.Compare(ranks[a.ID].thread, ranks[b.ID].thread)
		byCPU := cmp.Compare(a.ID, b.ID)
		switch p.Profile {
		case ProfileNUMA, ProfileNUMAStatic:
			return cmp.Or(byThread, cmp.Compare(ranks[a.ID].turn, ranks[b.ID].turn), near(a, b))
		case ProfileConservative:
			return cmp.Or(near(a, b), cmp.Compare(a.core(), b.core()), byCPU)
		default:
			return cmp.Or(byThread, near(a, b), byCPU)
		}
	})
}

// findSharing notes which shards share a CPU or a core.
func (plan *Plan) findSharing(t *Topology) {
	onCPU := make(map[int]int)
	for _, place := range plan.Shards {
		onCPU[place.CPU]++
	}
	for i := range plan.Shards {
		place := &plan.Shards[i]
		place.SharesCPU = onCPU[place.CPU] > 1
		cpu, _ := t.CPU(place.CPU)
		place.SharesCore = slices.ContainsFunc(cpu.Siblings, func(id int) bool { return id != cpu.ID && onCPU[id] > 0 })
	}
	if len(onCPU) < len(plan.Shards) {
		plan.warn("%s on %s: they wait for each other", count(len(plan.Shards), "shard"), count(len(onCPU), "CPU"))
	}
}

// warnOfMemory names the nodes whose shards have their memory elsewhere.
func (plan *Plan) warnOfMemory(t *Topology) {
	warned := make(map[int]bool)
	for _, place := range plan.Shards {
		if place.Memory == place.Node || warned[place.Node] {
			continue
		}
		warned[place.Node] = true
		why := "has no memory"
		if n, ok := t.Node(place.Node); ok && n.Memory != 0 {
			why = "has memory that this process may not use"
		}
		if place.Memory < 0 {
			plan.warn("node %d %s, and no other node has any for it", place.Node, why)
			continue
		}
		plan.warn("node %d %s: its shards use that of node %d, at distance %d",
			place.Node, why, place.Memory, t.Distance(place.Node, place.Memory))
	}
}

func (plan *Plan) warn(format string, args ...any) {
	plan.Warnings = append(plan.Warnings, fmt.Sprintf(format, args...))
}

// CPUs returns the CPU of each shard.
func (plan *Plan) CPUs() []int {
	cpus := make([]int, len(plan.Shards))
	for i, place := range plan.Shards {
		cpus[i] = place.CPU
	}
	return cpus
}

// String returns the plan as a table, with the profile and the topology above it
// and the warnings below.
func (plan *Plan) String() string {
	var b strings.Builder
	from := "on the CPUs given"
	if plan.Home >= 0 {
		from = fmt.Sprintf("from node %d", plan.Home)
	}
	fmt.Fprintf(&b, "profile:  %s, %s %s\n", plan.Profile, count(len(plan.Shards), "shard"), from)
	fmt.Fprintf(&b, "topology: %s\n", plan.Topology)
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(table, "shard\tqueue\tcpu\tnode\tmemory\t\n")
	for _, place := range plan.Shards {
		note := ""
		switch {
		case place.SharesCPU:
			note = "  shares its CPU"
		case place.SharesCore:
			note = "  shares its core"
		}
		fmt.Fprintf(table, "%d\t%d\t%d\t%d\t%d\t%s\n", place.Shard, place.Queue, place.CPU, place.Node, place.Memory, note)
	}
	_ = table.Flush() // a strings.Builder takes everything
	for _, warning := range plan.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", warning)
	}
	return b.String()
}

// WriteTo writes String to w.
func (plan *Plan) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, plan.String())
	return int64(n), err
}

// badPlacement says that a field has a value that it does not accept.
func badPlacement(field string, value any, want string, args ...any) error {
	return fmt.Errorf("%s: %v, want %s", field, value, fmt.Sprintf(want, args...))
}
