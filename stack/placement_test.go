package stack

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"numastack/numaalloc"
)

// openStack returns a running stack on a device of its own.
func openStack(t *testing.T, cfg Config) *Stack {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil || os.Getenv(insideVar) == "" {
		t.Skip("takes a TAP device in a network namespace:", err)
	}
	f.Close()
	cfg.Addrs = prefixes("10.98.0.2/24")
	cfg.Device = "numatest"
	cfg.Logger = slog.New(slog.DiscardHandler)
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestNodePool: any goroutine reaches the pools of a stack, and the stack counts
// what they run.
func TestNodePool(t *testing.T) {
	s := openStack(t, Config{Shards: 1, NodeScratch: 12345})
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	nodes := topology.CPUNodes()
	for _, n := range topology.Nodes {
		pool, err := s.NodePool(n.ID)
		if err != nil {
			t.Fatal(err)
		}
		if nodes[n.ID] != nil && pool.Node() != n.ID || nodes[pool.Node()] == nil {
			t.Errorf("pool of node %d is that of node %d; there are CPUs on %v", n.ID, pool.Node(), nodes)
		}
		if err := pool.Do(t.Context(), func(thread *PoolThread) {
			if len(thread.Scratch()) != 12345 || thread.Node() != pool.Node() {
				t.Errorf("%d bytes of scratch memory on node %d, want 12345 on node %d", len(thread.Scratch()), thread.Node(), pool.Node())
			}
		}); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.NodePool(99); err == nil || !strings.Contains(err.Error(), "node 99: no such") {
		t.Errorf("pool of node 99: %v", err)
	}
	ran := uint64(0)
	for _, p := range s.Stats().Pools {
		ran += p.Ran
	}
	if ran != uint64(len(topology.Nodes)) {
		t.Errorf("%d functions counted, want %d", ran, len(topology.Nodes))
	}
	pool, _ := s.NodePool(topology.Nodes[0].ID)
	s.Close()
	if err := pool.Do(t.Context(), func(*PoolThread) {}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Do after Close: %v, want net.ErrClosed", err)
	}
}

// TestAdapt: when the topology changes, costs and pools do. What is the same is
// left alone.
func TestAdapt(t *testing.T) {
	s := openStack(t, Config{Shards: 1})
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	before := s.Costs()
	if s.adapt(t.Context(), topology); s.Costs() != before {
		t.Error("costs are new although the topology is not")
	}
	// A node with one of the CPUs appears.
	grown := *topology
	last := len(grown.CPUs) - 1
	grown.CPUs = slices.Clone(grown.CPUs)
	grown.CPUs[last].Node = 77
	grown.Nodes = append(slices.Clone(grown.Nodes), numaalloc.Node{ID: 77, CPUs: []int{grown.CPUs[last].ID}, Distances: []int{25}})
	if len(topology.Nodes) > 1 || len(grown.AllowedCPUs) < 2 {
		t.Skip("takes one node with two CPUs")
	}
	s.adapt(t.Context(), &grown)
	if cost := s.Costs().Cost(77, topology.Nodes[0].ID); cost != 1 {
		t.Errorf("the only memory costs the new node %v, want 1", cost)
	}
	pool, err := s.NodePool(topology.Nodes[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := pool.Do(t.Context(), func(*PoolThread) {
		status, err := os.ReadFile("/proc/thread-self/status")
		if want := "Cpus_allowed_list:\t" + numaalloc.FormatCPUList(grown.CPUNodes()[pool.Node()]) + "\n"; err != nil || !strings.Contains(string(status), want) {
			t.Errorf("thread of the pool has\n%s(%v), want %q", status, err, want)
		}
	}); err != nil {
		t.Error(err)
	}
}

// TestFollowsMachine takes a CPU of a shard offline and brings it back: the
// machine's topology changes, so it runs in a guest made for that.
func TestFollowsMachine(t *testing.T) {
	if os.Getenv("NUMASTACK_GUEST") == "" {
		t.Skip("takes CPUs offline: runs with NUMASTACK_GUEST=1, in a throw-away guest only")
	}
	s := openStack(t, Config{Shards: 2, Profile: ProfileNUMA})
	place := s.Placement().Shards[1]
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	cpus := topology.CPUNodes()[place.Node]
	pool, err := s.NodePool(place.Node)
	if err != nil {
		t.Fatal(err)
	}
	poolCPUs := func() (list string) {
		if err := pool.Do(t.Context(), func(*PoolThread) {
			status, err := os.ReadFile("/proc/thread-self/status")
			if err != nil {
				t.Error(err)
			}
			_, list, _ = strings.Cut(string(status), "Cpus_allowed_list:\t")
			list, _, _ = strings.Cut(list, "\n")
		}); err != nil {
			t.Error(err)
		}
		return list
	}
	if len(cpus) < 2 || len(topology.CPUNodes()) < 2 {
		t.Skip("takes two nodes with two CPUs")
	}
	if list := poolCPUs(); list != numaalloc.FormatCPUList(cpus) {
		t.Errorf("threads of the pool are on CPUs %s, want %v", list, cpus)
	}
	for _, online := range []bool{false, true} {
		state, left := "0", slices.DeleteFunc(slices.Clone(cpus), func(cpu int) bool { return cpu == place.CPU })
		if online {
			state, left = "1", cpus
		}
		before := s.Costs()
		if err := os.WriteFile(fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", place.CPU), []byte(state), 0); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); s.set.Draining()[1] == online || s.Costs() == before; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("CPU %d online is %t, and yet shard 1 drained is %t, costs are new %t", place.CPU, online, !online, s.Costs() != before)
			}
		}
		if list := poolCPUs(); list != numaalloc.FormatCPUList(left) {
			t.Errorf("CPU %d online %t: threads of the pool are on CPUs %s, want %v", place.CPU, online, list, left)
		}
		if groups := len(s.Stats().Shards[1].Groups); (groups > 0) != online {
			t.Errorf("CPU %d online %t: shard 1 has %d flow groups", place.CPU, online, groups)
		}
	}
}
