package main

import (
	"fmt"
	"strings"
)

// nodeMemoryMiB is what each node with memory has: enough for the kernel, the
// initramfs and the tests, all of which may lie on one of them.
const nodeMemoryMiB = 512

// topology is a machine with several NUMA nodes. Nodes are numbered as QEMU
// does; Linux may number them otherwise.
type topology struct {
	name, about string
	smp         string
	nodes       []node
	distances   [][3]int // from, to, SLIT value; the other direction is the same
}

// node is a NUMA node.
type node struct {
	cpus   string // as in 0-1; empty: none
	memory bool
}

var topologies = []topology{
	{
		name: "2", about: "two nodes with two CPUs each",
		smp:       "4,sockets=2,cores=2,threads=1",
		nodes:     []node{{"0-1", true}, {"2-3", true}},
		distances: [][3]int{{0, 1, 21}},
	},
	{
		name: "ring4", about: "four nodes in a ring, with one CPU each",
		smp:       "4,sockets=4,cores=1,threads=1",
		nodes:     []node{{"0", true}, {"1", true}, {"2", true}, {"3", true}},
		distances: [][3]int{{0, 1, 16}, {1, 2, 16}, {2, 3, 16}, {0, 3, 16}, {0, 2, 22}, {1, 3, 22}},
	},
	{
		name: "odd", about: "a node with two CPUs and memory, one with memory only, one with two CPUs only",
		smp:       "4,sockets=4,cores=1,threads=1",
		nodes:     []node{{"0-1", true}, {"", true}, {"2-3", false}},
		distances: [][3]int{{0, 1, 17}, {0, 2, 21}, {1, 2, 28}},
	},
}

func topologyNames() string {
	names := make([]string, len(topologies))
	for i, t := range topologies {
		names[i] = t.name
	}
	return strings.Join(names, ", ")
}

// args returns what makes QEMU build the topology.
func (t topology) args() []string {
	args := []string{"-smp", t.smp}
	memory := 0
	for i, n := range t.nodes {
		numa := fmt.Sprintf("node,nodeid=%d", i)
		if n.memory {
			memory += nodeMemoryMiB
			args = append(args, "-object", fmt.Sprintf("memory-backend-ram,id=m%d,size=%dM", i, nodeMemoryMiB))
			numa += fmt.Sprintf(",memdev=m%d", i)
		}
		if n.cpus != "" {
			numa += ",cpus=" + n.cpus
		}
		args = append(args, "-numa", numa)
	}
	for _, d := range t.distances {
		args = append(args, "-numa", fmt.Sprintf("dist,src=%d,dst=%d,val=%d", d[0], d[1], d[2]))
	}
	return append(args, "-m", fmt.Sprintf("%dM", memory))
}
