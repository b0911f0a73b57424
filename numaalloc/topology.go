package numaalloc

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Unreachable is the distance of nodes without a path between them: 255 in the
// SLIT (ACPI specification, System Locality Information Table). A node is 10
// away from itself.
const (
	Unreachable   = 255
	localDistance = 10
)

// Topology is the machine and the part of it that the process may use. It is a
// plain value: ReadTopology makes one, tests may write their own. Nothing
// changes it, so any goroutine may read it.
type Topology struct {
	// Nodes are the online NUMA nodes, ascending; numbers may be missing. A
	// machine without NUMA is node 0.
	Nodes []Node `json:"nodes"`
	// CPUs are those in the machine, online or not, ascending.
	CPUs []CPU `json:"cpus"`
	// AllowedCPUs are the online CPUs that the process may use, ascending: those
	// of its cpuset that were in the affinity mask it was started with.
	AllowedCPUs []int `json:"allowed_cpus"`
	// AllowedMemory are the nodes whose memory the process may use, ascending:
	// Mems_allowed of proc_pid_status(5).
	AllowedMemory []int `json:"allowed_memory"`
	// Devices are the network devices that /sys/class/net shows, with the node
	// that each is attached to, or -1: a TAP is attached to none, nor is
	// anything on a machine with one node.
	Devices map[string]int `json:"devices,omitempty"`
}

// Node is a NUMA node. It may lack CPUs or memory.
type Node struct {
	ID   int   `json:"id"`
	CPUs []int `json:"cpus"` // online ones, ascending
	// Memory is in bytes: 0 for a node without, -1 when it is not known.
	Memory int64 `json:"memory"`
	// Distances are those of the SLIT to every node, in the order of
	// Topology.Nodes.
	Distances []int `json:"distances"`
}

// CPU is a logical CPU: a hardware thread. The fields after Node are known of
// an online one only.
type CPU struct {
	ID     int  `json:"id"`
	Online bool `json:"online"`
	Node   int  `json:"node"` // -1: not known

	Package int `json:"package"` // -1: not known
	Core    int `json:"core"`    // the number in its package, -1: not known
	// Siblings are the online hardware threads of its core (SMT) with itself,
	// ascending.
	Siblings []int `json:"siblings"`

	// CacheSize is the size of the last-level cache in bytes, and CacheCPU the
	// lowest CPU that shares it; 0 and -1 when they are not known.
	CacheSize int64 `json:"cache_size"`
	CacheCPU  int   `json:"cache_cpu"`
}

// core returns a number that no other core has: its lowest CPU.
func (c CPU) core() int {
	if len(c.Siblings) == 0 {
		return c.ID
	}
	return c.Siblings[0]
}

// Node returns the node of that number, or false if there is none online.
func (t *Topology) Node(id int) (Node, bool) {
	i, found := t.nodeIndex(id)
	if !found {
		return Node{}, false
	}
	return t.Nodes[i], true
}

func (t *Topology) nodeIndex(id int) (int, bool) {
	return slices.BinarySearchFunc(t.Nodes, id, func(n Node, id int) int { return cmp.Compare(n.ID, id) })
}

// CPU returns the CPU of that number, or false if the machine has none.
func (t *Topology) CPU(id int) (CPU, bool) {
	i, found := slices.BinarySearchFunc(t.CPUs, id, func(c CPU, id int) int { return cmp.Compare(c.ID, id) })
	if !found {
		return CPU{}, false
	}
	return t.CPUs[i], true
}

// Distance returns the SLIT's distance, as seen from the CPUs of one node to the
// memory of another; it need not be the same the other way round. With a node
// that does not exist it is Unreachable.
func (t *Topology) Distance(from, to int) int {
	i, known := t.nodeIndex(from)
	j, reached := t.nodeIndex(to)
	if !known || !reached || j >= len(t.Nodes[i].Distances) {
		return Unreachable
	}
	return t.Nodes[i].Distances[j]
}

// CPUNodes returns the CPUs that the process may use, by node. Nodes without
// one are left out.
func (t *Topology) CPUNodes() map[int][]int {
	nodes := make(map[int][]int)
	for _, id := range t.AllowedCPUs {
		if cpu, ok := t.CPU(id); ok {
			nodes[cpu.Node] = append(nodes[cpu.Node], id)
		}
	}
	return nodes
}

// MemoryNodes returns the nodes with memory that the process may use, ascending.
func (t *Topology) MemoryNodes() []int {
	var nodes []int
	for _, n := range t.Nodes {
		if n.Memory != 0 && slices.Contains(t.AllowedMemory, n.ID) {
			nodes = append(nodes, n.ID)
		}
	}
	return nodes
}

// MemoryNode returns the node whose memory is nearest to the CPUs of a node, of
// those in MemoryNodes: mostly the node itself. Of equally near ones it is the
// lowest; -1 if there is none at all.
func (t *Topology) MemoryNode(node int) int {
	nodes := t.MemoryNodes()
	if len(nodes) == 0 {
		return -1
	}
	if slices.Contains(nodes, node) {
		return node // whatever the table says
	}
	return slices.MinFunc(nodes, func(a, b int) int { return cmp.Compare(t.Distance(node, a), t.Distance(node, b)) })
}

// Key is a text that is the same for two topologies if placement and memory
// costs are: it holds the nodes with their CPUs and distances, which of them
// have memory, and what the process may use. The amount of memory is not in it,
// as a balloon driver changes that all the time, nor are the devices.
func (t *Topology) Key() string {
	var b strings.Builder
	for _, n := range t.Nodes {
		fmt.Fprintf(&b, "node %d cpus %s memory %t distances %v\n", n.ID, FormatCPUList(n.CPUs), n.Memory != 0, n.Distances)
	}
	fmt.Fprintf(&b, "allowed cpus %s memory %s", FormatCPUList(t.AllowedCPUs), FormatCPUList(t.AllowedMemory))
	return b.String()
}

// Equal reports whether the keys of two topologies are equal. A nil one equals
// nil only.
func (t *Topology) Equal(other *Topology) bool {
	if t == nil || other == nil {
		return t == other
	}
	return t.Key() == other.Key()
}

// String describes the topology in one line.
func (t *Topology) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: ", count(len(t.Nodes), "node"))
	for i, n := range t.Nodes {
		if i > 0 {
			b.WriteString("; ")
		}
		cpus, memory := "no CPUs", "no memory"
		if len(n.CPUs) > 0 {
			cpus = cpuText(n.CPUs)
		}
		switch {
		case n.Memory < 0:
			memory = "unknown memory"
		case n.Memory > 0:
			memory = fmt.Sprintf("%.1f GiB", float64(n.Memory)/(1<<30))
		}
		fmt.Fprintf(&b, "node %d: %s, %s", n.ID, cpus, memory)
	}
	fmt.Fprintf(&b, "; allowed: %s, memory of %s", cpuText(t.AllowedCPUs), nodeText(t.AllowedMemory))
	var offline []int
	for _, c := range t.CPUs {
		if !c.Online {
			offline = append(offline, c.ID)
		}
	}
	if len(offline) > 0 {
		fmt.Fprintf(&b, "; offline: %s", cpuText(offline))
	}
	return b.String()
}

// count, cpuText and nodeText put numbers into words.
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

func cpuText(cpus []int) string   { return listText("CPU", cpus) }
func nodeText(nodes []int) string { return listText("node", nodes) }

func listText(noun string, numbers []int) string {
	switch len(numbers) {
	case 0:
		return "no " + noun
	case 1:
		return fmt.Sprintf("%s %d", noun, numbers[0])
	default:
		return noun + "s " + FormatCPUList(numbers)
	}
}
