package numaalloc

import (
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// testdata is in the test binary, which also runs in guests.
//
//go:embed testdata
var testdata embed.FS

// recordedTree reads a recorded file system from testdata. Its lines are
//
//	sys/devices/system/cpu/online:0-3
//	sys/class/net/lo -> ../../devices/virtual/net/lo
//
// as grep -H prints files and find -printf '%p -> %l\n' prints links; lines with #
// are comments.
func recordedTree(t *testing.T, name string) fstest.MapFS {
	t.Helper()
	text, err := testdata.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	tree := fstest.MapFS{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if file, target, ok := strings.Cut(line, " -> "); ok {
			addLink(tree, file, target)
		} else if file, content, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, "#") {
			addLine(tree, file, content)
		}
	}
	return tree
}

func addLine(tree fstest.MapFS, file string, content ...any) {
	if tree[file] == nil {
		tree[file] = &fstest.MapFile{Mode: 0o444}
	}
	tree[file].Data = fmt.Appendln(tree[file].Data, content...)
}

func addLink(tree fstest.MapFS, file, target string) {
	tree[file] = &fstest.MapFile{Mode: fs.ModeSymlink | 0o777, Data: []byte(target)}
}

// describedMachine is a machine in a few words, one thing a line:
//
//	node 0 cpus 0-3 memory 16G distances 10 21
//	cores 0,4 1,5                  CPUs that are SMT siblings
//	cpus 0-3                       instead of nodes: a kernel without NUMA
//	offline 2
//	allowed cpus 0-1
//	allowed memory 0
//	device eth0 node 1             device tap0 node none
type describedMachine struct {
	tree    fstest.MapFS
	cpus    []int
	offline []int
	allowed []int
}

// source returns the machine as the kernel would show it.
func (m *describedMachine) source() source {
	return source{root: m.tree, allowed: func() ([]int, error) { return m.allowed, nil }}
}

func describeMachine(t testing.TB, description []string) *describedMachine {
	t.Helper()
	m := &describedMachine{tree: fstest.MapFS{}}
	list := func(text string) []int {
		cpus, err := ParseCPUList(text)
		if err != nil {
			t.Fatal(err)
		}
		return cpus
	}
	var nodes, withMemory []int
	nodeOf := make(map[int]int)
	siblings := make(map[int]string)
	lines := make(map[string][][]string) // the words of each line by its first
	for _, line := range description {
		words := strings.Fields(line)
		lines[words[0]] = append(lines[words[0]], words[1:])
	}
	for _, words := range lines["offline"] {
		m.offline = list(words[0])
	}
	isOffline := func(cpu int) bool { return slices.Contains(m.offline, cpu) }
	for _, words := range lines["cpus"] {
		m.cpus = list(words[0])
		addLine(m.tree, "proc/meminfo", "MemTotal:       16777216 kB")
	}
	for _, words := range lines["node"] {
		node, err := strconv.Atoi(words[0])
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, node)
		dir := fmt.Sprintf("%s/node%d", nodeDir, node)
		cpus, memory := []int(nil), 0
		for i := 1; i < len(words); i++ {
			switch words[i] {
			case "cpus":
				cpus = list(words[i+1])
			case "memory":
				memory, err = strconv.Atoi(strings.TrimSuffix(words[i+1], "G"))
				if err != nil {
					t.Fatal(err)
				}
				withMemory = append(withMemory, node)
			case "distances":
				addLine(m.tree, dir+"/distance", strings.Join(words[i+1:], " "))
			}
		}
		addLine(m.tree, dir+"/meminfo")
		addLine(m.tree, dir+"/meminfo", fmt.Sprintf("Node %d MemTotal:  %8d kB", node, memory<<20))
		addLine(m.tree, dir+"/meminfo", fmt.Sprintf("Node %d MemFree:   %8d kB", node, memory<<19))
		for _, cpu := range cpus {
			nodeOf[cpu] = node
			addLink(m.tree, fmt.Sprintf("%s/cpu%d/node%d", cpuDir, cpu, node), fmt.Sprintf("../../node/node%d", node))
		}
		m.cpus = append(m.cpus, cpus...)
		addLine(m.tree, dir+"/cpulist", FormatCPUList(slices.DeleteFunc(cpus, isOffline)))
	}
	for _, words := range lines["cores"] {
		for _, core := range words {
			for _, cpu := range list(core) {
				siblings[cpu] = FormatCPUList(slices.DeleteFunc(list(core), isOffline))
			}
		}
	}
	m.cpus = sortedUnique(m.cpus)
	online := slices.DeleteFunc(slices.Clone(m.cpus), isOffline)
	allowed, memory := FormatCPUList(online), FormatCPUList(withMemory)
	for _, words := range lines["allowed"] {
		if words[0] == "cpus" {
			allowed = words[1]
		} else {
			memory = words[1]
		}
	}
	m.allowed = list(allowed)
	if len(m.cpus) > 0 {
		addLine(m.tree, cpuDir+"/online", FormatCPUList(online))
		addLine(m.tree, cpuDir+"/present", FormatCPUList(m.cpus))
	}
	if nodes != nil {
		addLine(m.tree, nodeDir+"/online", FormatCPUList(nodes))
		addLine(m.tree, nodeDir+"/has_memory", FormatCPUList(withMemory))
		addLine(m.tree, statusFile, "Mems_allowed_list:\t"+memory)
	}
	addLine(m.tree, statusFile, "Cpus_allowed_list:\t"+allowed)
	for _, cpu := range online {
		dir := fmt.Sprintf("%s/cpu%d", cpuDir, cpu)
		shared := siblings[cpu]
		if shared == "" {
			shared = strconv.Itoa(cpu)
		}
		addLine(m.tree, dir+"/topology/core_cpus_list", shared)
		addLine(m.tree, dir+"/topology/core_id", list(shared)[0])
		addLine(m.tree, dir+"/topology/physical_package_id", nodeOf[cpu])
	}
	for _, words := range lines["device"] {
		name, node := words[0], words[2]
		if node == "none" {
			addLink(m.tree, netDir+"/"+name, "../../devices/virtual/net/"+name)
			continue
		}
		addLine(m.tree, "sys/devices/pci0000:00/0000:00:03.0/"+name+"/numa_node", node)
		addLink(m.tree, netDir+"/"+name, "../../devices/pci0000:00/0000:00:03.0/"+name+"/virtio0/net/"+name)
	}
	return m
}
