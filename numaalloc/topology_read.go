package numaalloc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// The kernel's view of the machine, below the root of the file system
// (Documentation/ABI/stable/sysfs-devices-system-cpu and -node).
const (
	cpuDir     = "sys/devices/system/cpu"
	nodeDir    = "sys/devices/system/node"
	netDir     = "sys/class/net"
	statusFile = "proc/self/status"
	memsLabel  = "Mems_allowed_list:"
)

const (
	// maxNodes is the most nodes that Linux can be built for (CONFIG_NODES_SHIFT
	// is at most 10).
	maxNodes = 1 << 10
	// maxCaches bounds the caches looked at per CPU. Four are usual: L1 for data
	// and for instructions, L2, L3.
	maxCaches = 16
)

// ReadTopology reads the machine from /sys and /proc. Where there is no sysfs,
// the machine is one node with the CPUs that the process may use; a kernel
// without NUMA is one node with all CPUs. An error names the file and what is
// wrong with it.
//
// It reads some twenty files per CPU: 1 ms on a machine with two. To follow
// changes, see Watch.
func ReadTopology() (*Topology, error) {
	t, err := machine().read()
	if err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	return t, nil
}

// source is where a topology comes from.
type source struct {
	root    fs.FS                 // with sys and proc
	allowed func() ([]int, error) // CPUs that the process may use, ascending
}

// machine is the one that this process runs on.
func machine() source { return source{root: os.DirFS("/"), allowed: allowedNow} }

func (s source) read() (*Topology, error) {
	allowed, err := s.allowed()
	if err != nil {
		return nil, err
	}
	online, err := s.list(cpuDir + "/online")
	if errors.Is(err, fs.ErrNotExist) {
		// No sysfs: what sched_getaffinity says is all there is.
		online, err = allowed, nil
	}
	if err != nil {
		return nil, err
	}
	present, err := s.list(cpuDir + "/present")
	if errors.Is(err, fs.ErrNotExist) {
		present, err = online, nil
	}
	if err != nil {
		return nil, err
	}

	t := new(Topology)
	if t.Nodes, err = s.nodes(online); err != nil {
		return nil, err
	}
	nodeOf := make(map[int]int)
	for _, n := range t.Nodes {
		for _, cpu := range n.CPUs {
			nodeOf[cpu] = n.ID
		}
	}
	for _, id := range present {
		c := CPU{ID: id, Package: -1, Core: -1, CacheCPU: -1}
		c.Node, c.Online = nodeOf[id]
		if c.Online {
			err = s.describe(&c)
		} else {
			c.Node, err = s.nodeLink(id)
		}
		if err != nil {
			return nil, err
		}
		t.CPUs = append(t.CPUs, c)
	}
	for _, id := range allowed {
		if c, ok := t.CPU(id); ok && c.Online {
			t.AllowedCPUs = append(t.AllowedCPUs, id)
		}
	}
	if len(t.AllowedCPUs) == 0 {
		return nil, fmt.Errorf("the process may use CPUs %q; want one of those online, %q", FormatCPUList(allowed), FormatCPUList(online))
	}
	if t.AllowedMemory, err = s.allowedMemory(t.Nodes); err != nil {
		return nil, err
	}
	t.Devices, err = s.devices()
	return t, err
}

// nodes returns the online nodes with those of their CPUs that are in online.
func (s source) nodes(online []int) ([]Node, error) {
	ids, err := s.nodeList(nodeDir + "/online")
	if errors.Is(err, fs.ErrNotExist) {
		// A kernel without CONFIG_NUMA.
		memory, err := s.memTotal("proc/meminfo", "MemTotal:")
		return []Node{{CPUs: online, Memory: memory, Distances: []int{localDistance}}}, err
	}
	if err != nil {
		return nil, err
	}
	// N_MEMORY is what mbind(2) goes by. Older kernels have no such file.
	withMemory, err := s.nodeList(nodeDir + "/has_memory")
	if errors.Is(err, fs.ErrNotExist) {
		withMemory, err = ids, nil
	}
	if err != nil {
		return nil, err
	}

	nodes := make([]Node, len(ids))
	for i, id := range ids {
		dir := fmt.Sprintf("%s/node%d", nodeDir, id)
		cpus, err := s.list(dir + "/cpulist")
		if err != nil {
			return nil, err
		}
		// A CPU that changes between the two files is offline, for now.
		cpus = slices.DeleteFunc(cpus, func(cpu int) bool { return !slices.Contains(online, cpu) })
		nodes[i] = Node{ID: id, CPUs: cpus}
		if nodes[i].Distances, err = s.distances(dir+"/distance", len(ids)); err != nil {
			return nil, err
		}
		if !slices.Contains(withMemory, id) {
			continue
		}
		if nodes[i].Memory, err = s.memTotal(dir+"/meminfo", fmt.Sprintf("Node %d MemTotal:", id)); err != nil {
			return nil, err
		}
	}
	return nodes, nil
}

// distances reads a node's row of the SLIT, which has a column per online node.
func (s source) distances(file string, n int) ([]int, error) {
	text, err := s.text(file)
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(text)
	row := make([]int, len(fields))
	for i, field := range fields {
		// Below 10 is reserved, 255 says that there is no path.
		if row[i], err = strconv.Atoi(field); err != nil || row[i] < localDistance || row[i] > Unreachable {
			return nil, badFile(file, text, fmt.Sprintf("distances of %d to %d", localDistance, Unreachable))
		}
	}
	if len(row) != n {
		return nil, badFile(file, text, fmt.Sprintf("%d distances, one per online node", n))
	}
	return row, nil
}

// memTotal returns in bytes what a meminfo file has in kB behind label, or -1
// where there is no such file.
func (s source) memTotal(file, label string) (int64, error) {
	line, err := s.line(file, label)
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	number, _ := strings.CutSuffix(line, " kB")
	kB, err := strconv.ParseInt(number, 10, 64)
	if err != nil || kB < 0 || kB > 1<<50 {
		return 0, badFile(file, label+" "+line, "a number of kB")
	}
	return kB << 10, nil
}

// describe reads what an online CPU is part of. What a container hides stays
// unknown.
func (s source) describe(c *CPU) (err error) {
	dir := fmt.Sprintf("%s/cpu%d", cpuDir, c.ID)
	if c.Package, err = s.number(dir + "/topology/physical_package_id"); err != nil {
		return err
	}
	if c.Core, err = s.number(dir + "/topology/core_id"); err != nil {
		return err
	}
	siblings, err := s.list(dir + "/topology/core_cpus_list")
	if errors.Is(err, fs.ErrNotExist) {
		siblings, err = s.list(dir + "/topology/thread_siblings_list") // its name before Linux 5.3
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.Siblings = sortedUnique(append(siblings, c.ID))
	return s.describeCache(c, dir+"/cache")
}

// describeCache finds the cache of the highest level: the last one that is not
// for instructions.
func (s source) describeCache(c *CPU, caches string) error {
	for i := range maxCaches {
		dir := fmt.Sprintf("%s/index%d", caches, i)
		if level, err := s.number(dir + "/level"); err != nil || level < 0 {
			return err
		}
		kind, err := s.text(dir + "/type")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if kind == "Instruction" {
			continue
		}
		// The kernel leaves out what the hardware does not tell, as often on ARM.
		if c.CacheSize, err = s.size(dir + "/size"); err != nil {
			return err
		}
		// Not the file id: some hypervisors number each CPU's cache.
		sharing, err := s.list(dir + "/shared_cpu_list")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.CacheCPU = c.ID
		if len(sharing) > 0 {
			c.CacheCPU = sharing[0]
		}
	}
	return nil
}

// nodeLink returns M of the link cpuN/nodeM, or -1 if there is none. The kernel
// keeps the link while the CPU is offline (seen with 6.12 on x86).
func (s source) nodeLink(cpu int) (int, error) {
	entries, err := fs.ReadDir(s.root, fmt.Sprintf("%s/cpu%d", cpuDir, cpu))
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	for _, entry := range entries {
		if number, isNode := strings.CutPrefix(entry.Name(), "node"); isNode {
			if node, err := strconv.Atoi(number); err == nil {
				return node, nil
			}
		}
	}
	return -1, nil
}

// allowedMemory returns which of the nodes the process may take memory from.
func (s source) allowedMemory(nodes []Node) ([]int, error) {
	all := make([]int, len(nodes))
	for i, n := range nodes {
		all[i] = n.ID
	}
	list, err := s.line(statusFile, memsLabel)
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil // no /proc, or a kernel without cpusets
	}
	if err != nil {
		return nil, err
	}
	allowed, err := parseNodes(list)
	if err != nil {
		return nil, badFile(statusFile, memsLabel+" "+list, err.Error())
	}
	return slices.DeleteFunc(all, func(node int) bool { return !slices.Contains(allowed, node) }), nil
}

// devices returns the network devices with their nodes.
func (s source) devices() (map[string]int, error) {
	entries, err := fs.ReadDir(s.root, netDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	devices := make(map[string]int)
	for _, entry := range entries {
		link, err := fs.ReadLink(s.root, netDir+"/"+entry.Name())
		if err != nil {
			continue // bonding_masters is a file, and devices come and go
		}
		node, err := s.deviceNode(path.Join(netDir, link))
		if err != nil {
			return nil, err
		}
		devices[entry.Name()] = node
	}
	return devices, nil
}

// deviceNode returns the node of the bus device that a network device belongs
// to, or -1. Between the two may be others that know no node, such as virtio's.
func (s source) deviceNode(dir string) (int, error) {
	for ; strings.HasPrefix(dir, "sys/devices/"); dir = path.Dir(dir) {
		file := dir + "/numa_node"
		if _, err := fs.Stat(s.root, file); err == nil {
			return s.number(file)
		}
	}
	return -1, nil
}

// text returns what a file contains, without blanks around it.
func (s source) text(file string) (string, error) {
	b, err := fs.ReadFile(s.root, file)
	return strings.TrimSpace(string(b)), err
}

// list reads a file with a list of CPUs.
func (s source) list(file string) ([]int, error) {
	text, err := s.text(file)
	if err != nil {
		return nil, err
	}
	numbers, err := ParseCPUList(text)
	if err != nil {
		return nil, fmt.Errorf("/%s: %w", file, err)
	}
	return numbers, nil
}

// nodeList reads a file with a list of nodes.
func (s source) nodeList(file string) ([]int, error) {
	text, err := s.text(file)
	if err != nil {
		return nil, err
	}
	nodes, err := parseNodes(text)
	if err != nil {
		return nil, badFile(file, text, err.Error())
	}
	return nodes, nil
}

// parseNodes reads a list of nodes. Its error is only what would be accepted.
func parseNodes(list string) ([]int, error) {
	nodes, err := ParseCPUList(list)
	if err != nil || len(nodes) > 0 && nodes[len(nodes)-1] >= maxNodes {
		return nil, fmt.Errorf("nodes of 0 to %d, as in \"0-3,8\"", maxNodes-1)
	}
	return nodes, nil
}

// number reads a file with one number, -1 at least; -1 if there is no such file.
func (s source) number(file string) (int, error) {
	text, err := s.text(file)
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < -1 {
		return 0, badFile(file, text, "a number, or -1 for none")
	}
	return int(n), nil
}

// size reads a file with a number of KiB such as 512K, and returns bytes; 0 if
// there is no such file.
func (s source) size(file string) (int64, error) {
	text, err := s.text(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	number, inK := strings.CutSuffix(text, "K")
	kB, err := strconv.ParseInt(number, 10, 32)
	if err != nil || !inK || kB < 0 {
		return 0, badFile(file, text, "a size such as 512K")
	}
	return kB << 10, nil
}

// line returns the rest of the line that begins with label. Without one, the
// error is fs.ErrNotExist.
func (s source) line(file, label string) (string, error) {
	text, err := s.text(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, label); ok {
			return strings.TrimSpace(rest), nil
		}
	}
	return "", fmt.Errorf("/%s has no %q: %w", file, label, fs.ErrNotExist)
}

func badFile(file, value, want string) error {
	return fmt.Errorf("/%s: %q, want %s", file, value, want)
}
