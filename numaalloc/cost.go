package numaalloc

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// CostSource says where costs come from.
type CostSource string

const (
	// CostsMeasured are latencies that Measure saw.
	CostsMeasured CostSource = "measured"
	// CostsFromSLIT are distances that the firmware claims, often only the
	// number of hops dressed up.
	CostsFromSLIT CostSource = "distances"
)

// Costs is the NUMA cost function: what it costs the CPUs of one node to use
// the memory of another. M. Friedman, "Mainstream NUMA and the TCP/IP stack",
// asks the operating system for such a function, so that a stack can place
// queues, buffers and threads by it and an application can weigh a remote idle
// CPU against a local busy one. Linux hands out only the firmware's distances;
// Measure finds the rest out.
//
// In the matrices, row i is for the CPUs of node CPUNodes[i] and column j for
// the memory of node MemoryNodes[j]. Those of a unit are nil when the source is
// CostsFromSLIT. Nothing changes a Costs once it is made: it is shared, any
// goroutine may read it, and nobody may write to it.
type Costs struct {
	Source      CostSource `json:"source"`
	CPUNodes    []int      `json:"cpu_nodes"`    // ascending
	MemoryNodes []int      `json:"memory_nodes"` // ascending

	// Relative is what Cost returns.
	Relative [][]float64 `json:"cost"`
	// LatencyNS is how many nanoseconds one access takes when the next
	// one's address depends on it.
	LatencyNS [][]float64 `json:"latency_ns,omitempty"`
	// ReadBandwidth and WriteBandwidth are what one CPU streams, in bytes per
	// second.
	ReadBandwidth  [][]float64 `json:"read_bytes_per_second,omitempty"`
	WriteBandwidth [][]float64 `json:"write_bytes_per_second,omitempty"`
}

// Cost returns what an access costs from the CPUs of one node to the memory of
// another, as a multiple of a local access, by latency: 1 is local and nothing
// is less. For CPUs without memory of their own, local is the nearest memory.
// It is not symmetric. +Inf stands for a pair that has no cost: a node without
// CPUs, without memory, or unknown, and any pair for a nil Costs.
func (c *Costs) Cost(from, to int) float64 {
	if c == nil {
		return math.Inf(1)
	}
	i, hasCPUs := slices.BinarySearch(c.CPUNodes, from)
	j, hasMemory := slices.BinarySearch(c.MemoryNodes, to)
	if !hasCPUs || !hasMemory {
		return math.Inf(1)
	}
	return c.Relative[i][j]
}

// String prints the matrices as tables, a row per node with CPUs and a column
// per node with memory.
func (c *Costs) String() string {
	var b strings.Builder
	c.table(&b, fmt.Sprintf("cost (%s, local = 1)", c.Source), c.Relative, "%.2f", 1)
	c.table(&b, "latency (ns)", c.LatencyNS, "%.1f", 1)
	c.table(&b, "read (GB/s)", c.ReadBandwidth, "%.2f", 1e9)
	c.table(&b, "write (GB/s)", c.WriteBandwidth, "%.2f", 1e9)
	return b.String()
}

func (c *Costs) table(b *strings.Builder, title string, matrix [][]float64, format string, unit float64) {
	if matrix == nil {
		return
	}
	fmt.Fprintln(b, title)
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "cpus \\ memory\t")
	for _, to := range c.MemoryNodes {
		fmt.Fprintf(w, "node %d\t", to)
	}
	fmt.Fprintln(w)
	for i, from := range c.CPUNodes {
		fmt.Fprintf(w, "node %d\t", from)
		for _, v := range matrix[i] {
			fmt.Fprintf(w, format+"\t", v/unit)
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush() // a strings.Builder takes everything
}

// CostsFromDistances makes the cost function from the SLIT, for when nobody
// asked for a measurement or Measure failed. The nodes are those that Measure
// takes; distance returns the table's value for the CPUs of one node and the
// memory of another: 10 is local, 255 unreachable.
func CostsFromDistances(cpuNodes map[int][]int, memNodes []int, distance func(from, to int) int) (*Costs, error) {
	c, err := newCosts(CostsFromSLIT, cpuNodes, memNodes)
	if err != nil {
		return nil, fmt.Errorf("costs from distances: %w", err)
	}
	distances := c.matrix()
	for i, from := range c.CPUNodes {
		for j, to := range c.MemoryNodes {
			d := distance(from, to)
			// Below 10 is reserved (ACPI specification, System
			// Locality Information Table).
			if d < 10 || d > 255 {
				return nil, fmt.Errorf("costs from distances: %d from node %d to node %d; want 10 (local) to 255 (unreachable)", d, from, to)
			}
			distances[i][j] = float64(d)
		}
	}
	c.relate(distances)
	return c, nil
}

// newCosts makes a Costs without matrices.
func newCosts(source CostSource, cpuNodes map[int][]int, memNodes []int) (*Costs, error) {
	if len(cpuNodes) == 0 || len(memNodes) == 0 {
		return nil, fmt.Errorf("%d nodes with CPUs and %d with memory; want at least one of each", len(cpuNodes), len(memNodes))
	}
	c := &Costs{
		Source:      source,
		CPUNodes:    slices.Sorted(maps.Keys(cpuNodes)),
		MemoryNodes: slices.Compact(slices.Sorted(slices.Values(memNodes))),
	}
	for _, node := range []int{c.CPUNodes[0], c.MemoryNodes[0]} {
		if node < 0 {
			return nil, fmt.Errorf("node %d: want 0 or more", node)
		}
	}
	for _, node := range c.CPUNodes {
		if len(cpuNodes[node]) == 0 {
			return nil, fmt.Errorf("node %d: no CPU given; want at least one of its CPUs", node)
		}
	}
	return c, nil
}

func (c *Costs) matrix() [][]float64 {
	m := make([][]float64, len(c.CPUNodes))
	for i := range m {
		m[i] = make([]float64, len(c.MemoryNodes))
	}
	return m
}

// relate fills Relative from something that grows with the cost.
func (c *Costs) relate(price [][]float64) {
	c.Relative = c.matrix()
	for i, row := range price {
		local := slices.Min(row)
		if j, ok := slices.BinarySearch(c.MemoryNodes, c.CPUNodes[i]); ok {
			local = row[j]
		}
		for j, p := range row {
			// Noise can make remote memory look nearer than local.
			c.Relative[i][j] = max(1, p/local)
		}
	}
}
