package numaalloc

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// severalNodes returns this machine, or one with its last CPU on a node of its
// own, without memory.
func severalNodes(t *testing.T) *Topology {
	t.Helper()
	topology, err := ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	if len(topology.CPUNodes()) > 1 {
		return topology
	}
	last := slices.Max(topology.AllowedCPUs)
	if len(topology.AllowedCPUs) < 2 || len(topology.Nodes) > 1 {
		t.Skip("takes two CPUs")
	}
	n := &topology.Nodes[0]
	n.CPUs = slices.DeleteFunc(n.CPUs, func(cpu int) bool { return cpu == last })
	n.Distances = []int{10, 20}
	topology.Nodes = append(topology.Nodes, Node{ID: n.ID + 1, CPUs: []int{last}, Distances: []int{20, 10}})
	for i := range topology.CPUs {
		if topology.CPUs[i].ID == last {
			topology.CPUs[i].Node = n.ID + 1
		}
	}
	return topology
}

// TestPoolThreads: threads are pinned to the CPUs of their node, named, and take
// memory from it, or from the nearest one with some. They follow the topology.
func TestPoolThreads(t *testing.T) {
	topology := severalNodes(t)
	all, err := NewPools(PoolConfig{Topology: topology, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	refused := false
	check := func(topology *Topology) {
		t.Helper()
		for node, cpus := range topology.CPUNodes() {
			err := poolOf(t, all, node).Do(t.Context(), func(thread *PoolThread) {
				if mask, err := affinity(0); err != nil || !slices.Equal(mask, cpus) || thread.Node() != node {
					t.Errorf("thread of node %d runs on CPUs %v (%v), node %d; want %v", node, mask, err, thread.Node(), cpus)
				}
				if unix.Gettid() != os.Getpid() {
					if name, err := os.ReadFile("/proc/thread-self/comm"); err != nil || !strings.HasPrefix(string(name), "numapool/") {
						t.Errorf("thread is named %q (%v)", name, err)
					}
				}
				scratch := thread.Scratch()
				if &thread.Scratch()[0] != &scratch[0] {
					t.Error("the second call of Scratch returned other memory")
				}
				if refused = thread.arena.FirstTouch() != nil; refused {
					return
				}
				memory := topology.MemoryNode(node)
				if pages, err := Where(WholePages(scratch)); err != nil || pages.OnNode[memory]*os.Getpagesize() != DefaultPoolScratch {
					t.Errorf("scratch memory of node %d is at %+v (%v), want all on node %d", node, pages, err, memory)
				}
				if mode, mask, err := getMempolicy(nil, 0); err != nil || mode != preferOnly || !slices.Equal(mask.nodes(), []int{memory}) {
					t.Errorf("thread of node %d has memory policy %#x of nodes %v (%v), want %d", node, mode, mask.nodes(), err, memory)
				}
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	check(topology)

	// A node whose CPUs are gone lives on with those of another.
	gone := *topology
	nodes := topology.CPUNodes()
	var left []int
	for node, cpus := range nodes {
		if node != topology.Nodes[0].ID {
			left = append(left, cpus...)
		}
	}
	gone.AllowedCPUs = sortedUnique(left)
	homeless := all.pools[0]
	all.Follow(&gone, nil)
	if p, err := all.Pool(homeless.node); err != nil || p == homeless {
		t.Errorf("pool of a node without CPUs is its own (%v)", err)
	}
	if err := homeless.Do(t.Context(), func(thread *PoolThread) {
		if mask, err := affinity(0); err != nil || thread.Node() == homeless.node || !slices.Equal(mask, nodes[thread.Node()]) {
			t.Errorf("without CPUs of its own, the thread is on node %d, CPUs %v (%v)", thread.Node(), mask, err)
		}
	}); err != nil {
		t.Error(err)
	}
	all.Follow(topology, nil)
	check(topology)
	if refused {
		t.Skip("memory not looked at: policies are refused")
	}
}

// TestPoolOfOneNode: where there is nothing to choose, nothing is pinned or bound.
func TestPoolOfOneNode(t *testing.T) {
	topology, err := ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	node, cpus := topology.Nodes[0].ID, topology.AllowedCPUs
	topology.Nodes = []Node{{ID: node, CPUs: cpus, Memory: 1, Distances: []int{10}}}
	for i := range topology.CPUs {
		topology.CPUs[i].Node = node
	}
	all, err := NewPools(PoolConfig{Topology: topology})
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	if err := poolOf(t, all, node).Do(t.Context(), func(thread *PoolThread) {
		if thread.Scratch(); thread.locked || thread.arena.Node() != noNode {
			t.Errorf("the thread is locked (%t), or its memory bound to node %d", thread.locked, thread.arena.Node())
		}
	}); err != nil {
		t.Error(err)
	}
}
