package integration

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"numastack/numaalloc"
	"numastack/stack"
)

// The tests in this file are about places: CPUs, NUMA nodes, pages. What they
// compare with comes from /proc and /sys, not from numaalloc. On a machine with
// one node they find that there is nothing to choose, or skip; `make numa` runs
// them in guests with several.

// guestVar is set in a throw-away guest, whose CPUs a test may take offline.
const guestVar = "NUMASTACK_GUEST"

func inGuest() bool { return os.Getenv(guestVar) != "" }

// sysNode is a NUMA node as /sys/devices/system/node shows it.
type sysNode struct {
	cpus      []int // online ones
	memory    bool
	distances map[int]int // to each node
}

func sysNodes(t *testing.T) map[int]sysNode {
	t.Helper()
	const dir = "/sys/devices/system/node/"
	list := func(file string) []int {
		b, err := os.ReadFile(dir + file)
		if err != nil {
			t.Skipf("needs a kernel with NUMA: %v", err)
		}
		numbers, err := numaalloc.ParseCPUList(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return numbers
	}
	nodes := make(map[int]sysNode)
	ids := list("online")
	for _, id := range ids {
		n := sysNode{
			cpus:      list(fmt.Sprintf("node%d/cpulist", id)),
			memory:    slices.Contains(list("has_memory"), id),
			distances: make(map[int]int),
		}
		b, err := os.ReadFile(fmt.Sprintf(dir+"node%d/distance", id))
		if err != nil {
			t.Fatal(err)
		}
		for i, field := range strings.Fields(string(b)) {
			if n.distances[ids[i]], err = strconv.Atoi(field); err != nil {
				t.Fatal(err)
			}
		}
		nodes[id] = n
	}
	return nodes
}

// nodeOf returns the node of a CPU that is online, or -1.
func nodeOf(nodes map[int]sysNode, cpu int) int {
	for id, n := range nodes {
		if slices.Contains(n.cpus, cpu) {
			return id
		}
	}
	return -1
}

// memoryOf returns the node whose memory is nearest to the CPUs of a node.
func memoryOf(nodes map[int]sysNode, node int) int {
	best := -1
	for _, id := range slices.Sorted(maps.Keys(nodes)) {
		if nodes[id].memory && (best < 0 || nodes[node].distances[id] < nodes[node].distances[best]) {
			best = id
		}
	}
	return best
}

// memories returns the nodes that have memory.
func memories(nodes map[int]sysNode) (ids []int) {
	for id, n := range nodes {
		if n.memory {
			ids = append(ids, id)
		}
	}
	return ids
}

// thread is where the kernel lets a thread run, and where it did.
type thread struct {
	allowed string // CPU list
	cpu     int    // last
}

// shardThreads returns the threads of a process that are named after shards.
func shardThreads(t *testing.T, pid string) map[int]thread {
	t.Helper()
	found := make(map[int]thread)
	tasks, err := filepath.Glob("/proc/" + pid + "/task/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		name, err := os.ReadFile(task + "/comm")
		id, isShard := strings.CutPrefix(strings.TrimSpace(string(name)), "numastack/")
		if err != nil || !isShard { // some have just ended
			continue
		}
		shard, err := strconv.Atoi(id)
		if err != nil {
			continue // one of a shard's pool
		}
		th := thread{cpu: lastCPU(t, task)}
		status, err := os.ReadFile(task + "/status")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if list, ok := strings.CutPrefix(line, "Cpus_allowed_list:"); ok {
				th.allowed = strings.TrimSpace(list)
			}
		}
		found[shard] = th
	}
	return found
}

// lastCPU returns the CPU that a thread runs on, or ran on last: field 39 of
// proc_pid_stat(5). It returns -1 when the thread is gone.
func lastCPU(t *testing.T, task string) int {
	t.Helper()
	stat, err := os.ReadFile(task + "/stat")
	if err != nil {
		return -1
	}
	_, fields, _ := strings.Cut(string(stat), ") ") // the name may hold spaces
	cpu, err := strconv.Atoi(strings.Fields(fields)[39-3])
	if err != nil {
		t.Errorf("%s/stat: %v", task, err)
	}
	return cpu
}

// wantThreads waits until each shard's thread is where the CPUs say.
func wantThreads(t *testing.T, pid string, cpus []int) {
	t.Helper()
	want := make(map[int]thread)
	for shard, cpu := range cpus {
		want[shard] = thread{strconv.Itoa(cpu), cpu}
	}
	eventually(t, func() error {
		if got := shardThreads(t, pid); !maps.Equal(got, want) {
			return fmt.Errorf("threads of shards are allowed on and run on %v, want %v", got, want)
		}
		return nil
	})
}

// shardsHere is one per CPU, but fewer than [procs].
func shardsHere() int { return min(runtime.NumCPU(), procs-1) }

// openOnNodes opens a stack with a shard per CPU that moves nothing by itself
// and does not spin: under emulation that keeps the others from running.
func openOnNodes(t *testing.T, cfg stack.Config) *rig {
	t.Helper()
	cfg.Shards = shardsHere()
	cfg.Rebalance = stack.RebalanceOff
	cfg.Spin = -1
	return open(t, cfg)
}

// each opens n connections to port for every shard.
func (r *rig) each(t *testing.T, port, n int) (conns [][]*net.TCPConn) {
	t.Helper()
	conns = make([][]*net.TCPConn, len(r.Placement().Shards))
	for missing := n * len(conns); missing > 0; {
		c := dialTCP(t, r.self4, port)
		at := r.locate(t, c, port)
		if len(conns[at.Shard]) == n {
			_ = c.Close()
			continue
		}
		conns[at.Shard] = append(conns[at.Shard], c)
		missing--
	}
	return conns
}

func (r *rig) locate(t *testing.T, c *net.TCPConn, port int) stack.Location {
	t.Helper()
	at, err := r.Lookup("tcp", netip.AddrPortFrom(r.self4, uint16(port)), c.LocalAddr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// profiles are those that place differently; the static ones differ in what moves.
var profiles = []stack.Profile{stack.ProfileClosest, stack.ProfileNUMA, stack.ProfileConservative}

// TestNodesThreads: each shard runs where the plan says, on a CPU of the node
// that it claims, with its name, and counts itself there.
func TestNodesThreads(t *testing.T) {
	nodes := sysNodes(t)
	for _, profile := range profiles {
		t.Run(profile.String(), func(t *testing.T) {
			r := openOnNodes(t, stack.Config{Profile: profile})
			plan, err := stack.Plan(r.cfg)
			if err != nil {
				t.Fatal(err)
			}
			if got := r.Placement(); !slices.Equal(got.Shards, plan.Shards) {
				t.Errorf("the stack is at %v, planned was %v", got.Shards, plan.Shards)
			}
			wantThreads(t, "self", plan.CPUs())
			for i, s := range r.Stats().Shards {
				p := plan.Shards[i]
				if node := nodeOf(nodes, p.CPU); p.Node != node || p.Memory != memoryOf(nodes, node) {
					t.Errorf("shard %d on CPU %d: node %d with memory of node %d, want %d and %d",
						i, p.CPU, p.Node, p.Memory, node, memoryOf(nodes, node))
				}
				memory := p.Memory
				if len(memories(nodes)) == 1 {
					memory = -1 // nothing to choose
				}
				if s.CPU != p.CPU || s.Node != p.Node || s.MemoryNode != memory {
					t.Errorf("shard %d counts itself on CPU %d, node %d, memory %d; want %d, %d, %d",
						i, s.CPU, s.Node, s.MemoryNode, p.CPU, p.Node, memory)
				}
			}
		})
	}
}

// TestNodesPlanPrinted runs an application with -plan, and then looks where its
// threads really are.
func TestNodesPlanPrinted(t *testing.T) {
	needNetwork(t)
	n := newSubnet()
	args := []string{
		"-tap", n.device, "-addr", n.self4.String() + "/24", "-spin", "-1ns",
		"-profile", stack.ProfileNUMA.String(), "-shards", strconv.Itoa(shardsHere()),
	}
	printed, err := command(t.Context(), t, "", app(t, "echo"), append(args, "-plan")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var cpus []int
	for line := range strings.Lines(string(printed)) {
		var shard, queue, cpu, node, memory int
		if n, _ := fmt.Sscan(line, &shard, &queue, &cpu, &node, &memory); n < 5 {
			continue
		}
		if shard != len(cpus) || queue != shard {
			t.Errorf("row %q, want shard and queue %d", line, len(cpus))
		}
		cpus = append(cpus, cpu)
	}
	if len(cpus) != shardsHere() {
		t.Fatalf("%d rows, want %d:\n%s", len(cpus), shardsHere(), printed)
	}
	p := start(t, "", "ready:", "echo", args...)
	wantThreads(t, strconv.Itoa(p.cmd.Process.Pid), cpus)
}
