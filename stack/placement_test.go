package stack

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

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
