package numaalloc

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// A file with nonsense in it is named, with its value.
func TestTopologyErrors(t *testing.T) {
	const (
		node1 = nodeDir + "/node1"
		cpu1  = cpuDir + "/cpu1"
	)
	for _, test := range []struct{ file, content, want string }{
		{cpuDir + "/online", "0-x", `/sys/devices/system/cpu/online: cpu list "0-x"`},
		{cpuDir + "/present", "3-1", `/sys/devices/system/cpu/present: cpu list "3-1"`},
		{cpuDir + "/online", "7", `the process may use CPUs "0-3"; want one of those online, "7"`},
		{nodeDir + "/online", "none", `/sys/devices/system/node/online: "none", want nodes of 0 to 1023`},
		{nodeDir + "/online", "0-1024", `/sys/devices/system/node/online: "0-1024", want nodes`},
		{nodeDir + "/has_memory", "-", `/sys/devices/system/node/has_memory: "-", want nodes`},
		{node1 + "/cpulist", "all", `/sys/devices/system/node/node1/cpulist: cpu list "all"`},
		{node1 + "/distance", "10", `/sys/devices/system/node/node1/distance: "10", want 2 distances`},
		{node1 + "/distance", "10 ten", `"10 ten", want distances of 10 to 255`},
		{node1 + "/distance", "10 9", `"10 9", want distances of 10 to 255`},
		{node1 + "/distance", "256 10", `"256 10", want distances of 10 to 255`},
		{node1 + "/meminfo", "Node 1 MemTotal: much", `/sys/devices/system/node/node1/meminfo: "Node 1 MemTotal: much", want a number of kB`},
		{node1 + "/meminfo", "Node 1 MemTotal: -1 kB", `want a number of kB`},
		{cpu1 + "/topology/core_id", "zero", `/sys/devices/system/cpu/cpu1/topology/core_id: "zero", want a number`},
		{cpu1 + "/topology/physical_package_id", "-2", `physical_package_id: "-2", want a number, or -1`},
		{cpu1 + "/topology/core_cpus_list", "1;", `core_cpus_list: cpu list "1;"`},
		{cpu1 + "/cache/index0/level", "L1", `index0/level: "L1", want a number`},
		{statusFile, "Mems_allowed_list:\tall", `/proc/self/status: "Mems_allowed_list: all", want nodes`},
		{"sys/devices/pci0000:00/0000:00:03.0/eth0/numa_node", "?", `eth0/numa_node: "?", want a number`},
	} {
		m := describeMachine(t, []string{
			"node 0 cpus 0-1 memory 1G distances 10 20",
			"node 1 cpus 2-3 memory 1G distances 20 10",
			"device eth0 node 0",
		})
		m.tree[test.file] = &fstest.MapFile{Data: []byte(test.content + "\n")}
		topology, err := m.source().read()
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s with %q: %v, error %v; want %q", test.file, test.content, topology, err, test.want)
		}
	}

	// Files that have to be there.
	for _, file := range []string{node1 + "/cpulist", node1 + "/distance"} {
		m := describeMachine(t, []string{"node 1 cpus 0 memory 1G distances 10"})
		delete(m.tree, file)
		if topology, err := m.source().read(); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), file) {
			t.Errorf("without %s: %v, error %v; want one that names it", file, topology, err)
		}
	}

	// A size of a cache, which described machines have none of.
	tree := recordedTree(t, "odd.tree")
	size := cpuDir + "/cpu0/cache/index3/size"
	tree[size] = &fstest.MapFile{Data: []byte("16 MB\n")}
	s := source{root: tree, allowed: func() ([]int, error) { return []int{0}, nil }}
	if topology, err := s.read(); err == nil || !strings.Contains(err.Error(), size+`: "16 MB", want a size such as 512K`) {
		t.Errorf("%s of 16 MB: %v, error %v", size, topology, err)
	}
}

// What a container may hide is unknown, not an error.
func TestTopologyHiddenFiles(t *testing.T) {
	m := describeMachine(t, []string{"node 0 cpus 0-1 memory 1G distances 10", "cores 0-1"})
	for file := range m.tree {
		if strings.Contains(file, "/topology/") || strings.HasPrefix(file, "proc/") || strings.HasSuffix(file, "meminfo") || strings.HasSuffix(file, "has_memory") {
			delete(m.tree, file)
		}
	}
	topology, err := m.source().read()
	if err != nil {
		t.Fatal(err)
	}
	c := topology.CPUs[1]
	if c.Package != -1 || c.Core != -1 || !slices.Equal(c.Siblings, []int{1}) || c.CacheCPU != -1 {
		t.Errorf("CPU 1 is %+v, want nothing but its node", c)
	}
	if topology.Nodes[0].Memory != -1 || topology.MemoryNode(0) != 0 {
		t.Errorf("memory %d from node %d, want an unknown amount from node 0", topology.Nodes[0].Memory, topology.MemoryNode(0))
	}
	// Without the amount, the kernel still says which nodes have memory.
	m.tree[nodeDir+"/has_memory"] = &fstest.MapFile{Data: []byte("1\n")}
	if topology, err = m.source().read(); err != nil || topology.Nodes[0].Memory != 0 {
		t.Errorf("memory %d, %v; want none", topology.Nodes[0].Memory, err)
	}
	// The name that a list of siblings had before.
	m.tree[cpuDir+"/cpu1/topology/thread_siblings_list"] = &fstest.MapFile{Data: []byte("0-1\n")}
	if topology, err = m.source().read(); err != nil || !slices.Equal(topology.CPUs[1].Siblings, []int{0, 1}) {
		t.Errorf("siblings %v, %v; want 0 and 1", topology.CPUs[1].Siblings, err)
	}
}

func TestTopologyEqual(t *testing.T) {
	base := []string{
		"node 0 cpus 0-1 memory 1G distances 10 20",
		"node 1 cpus 2-3 memory 1G distances 20 10",
	}
	read := func(extra ...string) *Topology {
		topology, err := describeMachine(t, append(extra, base...)).source().read()
		if err != nil {
			t.Fatal(err)
		}
		return topology
	}
	before := read()
	for _, extra := range []string{"offline 3", "allowed cpus 0-2", "allowed memory 1"} {
		if after := read(extra); after.Equal(before) || after.Key() == before.Key() {
			t.Errorf("%q makes no difference: %s", extra, after.Key())
		}
	}
	for _, change := range []func(*Topology){
		func(t *Topology) { t.Nodes[0].Distances[1] = 21 },
		func(t *Topology) { t.Nodes[1].Memory = 0 },
	} {
		after := read()
		change(after)
		if after.Equal(before) {
			t.Errorf("%+v is equal to %+v", after, before)
		}
	}
	same := read("device eth0 node 1")
	same.Nodes[0].Memory++
	if !same.Equal(before) {
		t.Errorf("%s is not equal to %s", same.Key(), before.Key())
	}
	var none *Topology
	if before.Equal(nil) || none.Equal(before) || !none.Equal(nil) {
		t.Error("a topology equals none at all, or none does not equal none")
	}
}

func TestTopologyLookups(t *testing.T) {
	topology, err := describeMachine(t, []string{
		"node 1 cpus 4-5 distances 10 20 30",
		"node 3 cpus 6 memory 1G distances 25 10 20",
		"node 4 memory 1G distances 30 20 10",
		"allowed cpus 4,6",
		"allowed memory 1,3-4",
	}).source().read()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range [][3]int{{1, 1, 10}, {1, 3, 20}, {3, 1, 25}, {4, 3, 20}, {0, 1, Unreachable}, {1, 5, Unreachable}} {
		if d := topology.Distance(test[0], test[1]); d != test[2] {
			t.Errorf("Distance(%d, %d) = %d, want %d", test[0], test[1], d, test[2])
		}
	}
	nodes := topology.CPUNodes()
	if len(nodes) != 2 || !slices.Equal(nodes[1], []int{4}) || !slices.Equal(nodes[3], []int{6}) {
		t.Errorf("CPUNodes() = %v, want CPU 4 of node 1 and 6 of 3", nodes)
	}
	if memory := topology.MemoryNodes(); !slices.Equal(memory, []int{3, 4}) {
		t.Errorf("MemoryNodes() = %v, want 3 and 4", memory)
	}
	for node, memory := range map[int]int{1: 3, 3: 3, 4: 4} {
		if got := topology.MemoryNode(node); got != memory {
			t.Errorf("MemoryNode(%d) = %d, want %d", node, got, memory)
		}
	}
	// One way round node 3 is nearer to node 1, the other way node 4.
	copy(topology.Nodes[0].Distances, []int{10, 30, 20})
	topology.Nodes[1].Distances[0], topology.Nodes[2].Distances[0] = 20, 30
	if memory := topology.MemoryNode(1); memory != 4 {
		t.Errorf("MemoryNode(1) = %d with distances %v, want 4", memory, topology.Nodes[0].Distances)
	}
	// Firmware that fills the table with 10.
	copy(topology.Nodes[2].Distances, []int{10, 10, 10})
	if memory := topology.MemoryNode(4); memory != 4 {
		t.Errorf("MemoryNode(4) = %d where all nodes seem equally near, want its own", memory)
	}
	if _, ok := topology.Node(2); ok {
		t.Error("there is a node 2")
	}
	if cpu, ok := topology.CPU(6); !ok || cpu.ID != 6 || cpu.Node != 3 {
		t.Errorf("CPU(6) = %+v, %t", cpu, ok)
	}
	if _, ok := topology.CPU(0); ok {
		t.Error("there is a CPU 0")
	}
}

func TestWatch(t *testing.T) {
	nodes := []string{
		"node 0 cpus 0-1 memory 1G distances 10 20",
		"node 1 cpus 2-3 memory 1G distances 20 10",
	}
	w := new(Watch)
	become := func(extra ...string) { w.from = describeMachine(t, append(extra, nodes...)).source() }
	look := func(what string, wantChange, wantRead bool) *Topology {
		t.Helper()
		before := w.last
		topology, changed, err := w.Look()
		if read := topology != before; err != nil || changed != wantChange || read != wantRead {
			t.Errorf("%s: changed %t, read %t, %v; want %t, %t", what, changed, read, err, wantChange, wantRead)
		}
		return topology
	}
	become()
	look("first look", true, true)
	look("nothing new", false, false)
	become("offline 3")
	if topology := look("CPU offline", true, true); topology.CPUs[3].Online {
		t.Error("CPU 3 is offline and still online")
	}
	look("still offline", false, false)
	become()
	look("CPU online", true, true)
	become("allowed cpus 0-2")
	if topology := look("cpuset", true, true); !slices.Equal(topology.AllowedCPUs, []int{0, 1, 2}) {
		t.Errorf("allowed are %v", topology.AllowedCPUs)
	}
	become("allowed cpus 0-2", "allowed memory 0")
	look("memory of the cpuset", true, true)
	become("allowed cpus 0-2", "allowed memory 0", "offline 3")
	look("CPU offline that is not allowed", true, true)
	become("allowed cpus 0-2", "allowed memory 0")
	look("it is back", true, true)

	node1 := nodes[1]
	nodes[1] = "node 1 cpus 2-3 distances 20 10"
	become("allowed cpus 0-2", "allowed memory 0")
	look("node 1 has lost its memory", true, true)
	nodes[1] = node1
	become("allowed cpus 0-2", "allowed memory 0")
	look("its memory is back", true, true)

	// A new sign that means nothing.
	become("allowed cpus 0-2,7", "allowed memory 0")
	look("a CPU that does not exist", false, true)
	look("a CPU that still does not exist", false, false)

	// An error passes, and what changed meanwhile is not lost.
	last := w.last
	become("offline 2")
	good := w.from.root.(fstest.MapFS)[nodeDir+"/node1/distance"]
	delete(w.from.root.(fstest.MapFS), nodeDir+"/node1/distance")
	if topology, changed, err := w.Look(); err == nil || changed || topology != last {
		t.Errorf("without a file: %v, changed %t, %v; want the last one and an error", topology, changed, err)
	}
	w.from.root.(fstest.MapFS)[nodeDir+"/node1/distance"] = good
	look("after an error", true, true)
}
