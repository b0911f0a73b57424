package integration

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"numastack/numaalloc"
	"numastack/stack"
)

// TestNodesPages asks the kernel in two ways where the receive buffers are,
// before and after 10,000 requests.
func TestNodesPages(t *testing.T) {
	const requests, size, inFlight = 10_000, 64, 50
	nodes := sysNodes(t)
	r := openOnNodes(t, stack.Config{Profile: stack.ProfileNUMA})
	r.serveEcho(t, nil)
	conns := slices.Concat(r.each(t, echoPort, 2)...)
	for i, c := range conns { // large ones, for each shard to make some buffers
		if err := roundTrip(c, payload(uint64(i), 256<<10)); err != nil {
			t.Fatal(err)
		}
	}
	before := r.wantPages(t, nodes)

	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() {
			for n := 0; n*len(conns) < requests; n += inFlight {
				setDeadline(t, c)
				if err := request(c, payload(uint64(n<<8|i), size*inFlight), size); err != nil {
					t.Errorf("request %d of connection %d: %v", n, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	after := r.wantPages(t, nodes)
	t.Logf("%d pages before, %d after", before, after)
	if after < before || before == 0 && len(memories(nodes)) > 1 {
		t.Errorf("%d pages are bound before the requests and %d after, want some and no fewer", before, after)
	}
	for _, s := range r.Stats().Shards {
		if looks := s.Stages[0].Count; s.Astray != 0 || looks == 0 {
			t.Errorf("shard %d: %d of %d turns looked at ran on another CPU than %d; want none of some", s.Shard, s.Astray, looks, s.CPU)
		}
	}
}

// request sends b in requests of a size, one write each, and reads all
// answers.
func request(c net.Conn, b []byte, size int) error {
	for part := range slices.Chunk(b, size) {
		if _, err := c.Write(part); err != nil {
			return err
		}
	}
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	return same(got, b)
}

// wantPages checks that all pages of receive buffers are on their shard's node,
// and returns how many.
func (r *rig) wantPages(t *testing.T, nodes map[int]sysNode) (pages int) {
	t.Helper()
	found, err := r.VerifyMemory()
	if err != nil {
		t.Fatal(err)
	}
	byNode := make(map[int]int)
	for i, m := range found {
		want := r.Placement().Shards[i].Memory
		if len(memories(nodes)) == 1 {
			want = -1
		}
		if m.Node != want || m.Elsewhere != 0 || m.Absent != 0 || m.OnNode == 0 && want >= 0 {
			t.Errorf("shard %d: %+v, want all pages on node %d", i, m, want)
		}
		if m.Node >= 0 {
			byNode[m.Node] += m.OnNode
		}
		pages += m.OnNode
	}
	if got := boundPages(t); !maps.Equal(got, byNode) {
		t.Errorf("bound pages by node are %v in numa_maps, %v by VerifyMemory", got, byNode)
	}
	return pages
}

// boundPages returns how many pages are bound to each node, by what
// /proc/self/numa_maps tells of this process. One elsewhere is an error.
func boundPages(t *testing.T) map[int]int {
	t.Helper()
	f, err := os.Open("/proc/self/numa_maps")
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	bound := make(map[int]int)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text()) // address, policy, what is there
		policy, isOurs := strings.CutPrefix(fields[1], "prefer=static:")
		if !isOurs {
			continue
		}
		node, err := strconv.Atoi(policy)
		if err != nil {
			t.Errorf("numa_maps: %q: %v", lines.Text(), err)
		}
		for _, field := range fields[2:] {
			var at, pages int
			if n, _ := fmt.Sscanf(field, "N%d=%d", &at, &pages); n < 2 {
				continue
			}
			if at != node {
				t.Errorf("numa_maps: %d pages on node %d: %q", pages, at, lines.Text())
				continue
			}
			bound[node] += pages
		}
	}
	if err := lines.Err(); err != nil {
		t.Error(err)
	}
	return bound
}

// TestNodesLargeFrames: what a handler sees of a frame larger than the MTU lies
// in the shard's own memory. Buffers that connections hold come back.
func TestNodesLargeFrames(t *testing.T) {
	nodes := sysNodes(t)
	r := openOnNodes(t, stack.Config{Profile: stack.ProfileNUMA})
	if r.Offloads() == "none" {
		t.Skip("the kernel grants no offload, so there are no large frames")
	}
	h := &holder{t: t, r: r, one: len(memories(nodes)) == 1}
	h.large = make([]atomic.Int64, len(r.Placement().Shards))
	r.handleTCP(t, discardPort, h)

	h.consume.Store(true)
	conns := r.each(t, discardPort, 1)
	send := func() {
		t.Helper()
		for i := range conns {
			if _, err := conns[i][0].Write(payload(uint64(i), 512<<10)); err != nil {
				t.Fatal(err)
			}
		}
	}
	send()
	eventually(t, func() error {
		for i := range h.large {
			if h.large[i].Load() == 0 {
				return fmt.Errorf("shard %d has not seen a large frame", i)
			}
		}
		return nil
	})
	eventually(t, func() error {
		if sum := r.sum(); sum.BuffersLent > 0 {
			return fmt.Errorf("%d of %d buffers lent, want none after all was read", sum.BuffersLent, sum.Buffers)
		}
		return nil
	})
	free := r.sum().Buffers

	h.consume.Store(false)
	send()
	eventually(t, func() error {
		for _, s := range r.Stats().Shards {
			if s.BuffersLent == 0 {
				return fmt.Errorf("shard %d lends no buffer to a connection that nobody reads", s.Shard)
			}
		}
		return nil
	})
	for i := range conns {
		_ = conns[i][0].SetLinger(0) // a reset: nobody waits for the reader
		_ = conns[i][0].Close()
	}
	r.settle(t)
	sum := r.sum()
	t.Logf("%d buffers free before, %d after", free, sum.Buffers-sum.BuffersLent)
	if sum.Buffers-sum.BuffersLent < free || sum.BuffersExhausted > 0 {
		t.Errorf("%d buffers are free, %d were before; %d times there was none", sum.Buffers-sum.BuffersLent, free, sum.BuffersExhausted)
	}
	r.wantPages(t, nodes)
}

// holder reads or does not, and looks where large pieces are.
type holder struct {
	t       *testing.T
	r       *rig
	one     bool // memory node
	consume atomic.Bool
	large   []atomic.Int64 // by shard: pieces larger than two packets
}

func (*holder) Open(*stack.Conn) {}

func (h *holder) Data(c *stack.Conn, b []byte) int {
	if len(b) > 2*stack.DefaultMTU { // smaller ones are copied
		h.large[c.Shard()].Add(1)
		if where, err := numaalloc.Where(b); !h.one && (err != nil || len(where.OnNode) != 1 || where.Absent > 0 ||
			where.OnNode[h.r.Placement().Shards[c.Shard()].Memory] == 0) {
			h.t.Errorf("%d bytes on shard %d lie in %v (%v)", len(b), c.Shard(), where, err)
		}
	}
	if h.consume.Load() {
		return len(b)
	}
	return 0
}

func (*holder) Writable(*stack.Conn)     {}
func (*holder) Close(*stack.Conn, error) {}

// TestNodesCosts looks whether the cost function is complete, says where it comes
// from, and is measured once. In a guest its numbers mean nothing.
func TestNodesCosts(t *testing.T) {
	nodes := sysNodes(t)
	fromDistances := open(t, stack.Config{Shards: 1}).Costs()
	measured := open(t, stack.Config{Shards: 1, MeasureCosts: true}).Costs()
	if again := open(t, stack.Config{Shards: 1, MeasureCosts: true}).Costs(); again != measured {
		t.Errorf("a second stack measured again: %v and %v", measured, again)
	}
	if fromDistances.Source != numaalloc.CostsFromSLIT || measured.Source != numaalloc.CostsMeasured {
		t.Errorf("sources are %q and %q, want %q and %q",
			fromDistances.Source, measured.Source, numaalloc.CostsFromSLIT, numaalloc.CostsMeasured)
	}
	for from, n := range nodes {
		local := n.distances[memoryOf(nodes, from)]
		for to := range nodes {
			want := math.Inf(1)
			if len(n.cpus) > 0 && nodes[to].memory {
				want = float64(n.distances[to]) / float64(local)
			}
			if got := fromDistances.Cost(from, to); got != want {
				t.Errorf("by distances, node %d to node %d costs %v, want %v", from, to, got, want)
			}
			got := measured.Cost(from, to)
			if math.IsInf(got, 1) != math.IsInf(want, 1) || !(got >= 1) || from == to && n.memory && len(n.cpus) > 0 && got != 1 {
				t.Errorf("by measurement, node %d to node %d costs %v, want 1 or more, and 1 where it is local; none where there is no way", from, to, got)
			}
		}
	}
	for name, matrix := range map[string][][]float64{
		"latency": measured.LatencyNS, "read": measured.ReadBandwidth, "write": measured.WriteBandwidth,
	} {
		if len(matrix) != len(measured.CPUNodes) {
			t.Errorf("%s has %d rows, want %d", name, len(matrix), len(measured.CPUNodes))
		}
		for i, row := range matrix {
			if len(row) != len(memories(nodes)) || slices.ContainsFunc(row, func(v float64) bool { return !(v > 0) || math.IsInf(v, 1) }) {
				t.Errorf("%s from node %d is %v, want %d numbers above 0", name, measured.CPUNodes[i], row, len(memories(nodes)))
			}
		}
	}
}

// TestNodesWithoutMemory: shards on CPUs without memory use the nearest node's,
// and the log says so once.
func TestNodesWithoutMemory(t *testing.T) {
	nodes := sysNodes(t)
	poor := -1
	for id, n := range nodes {
		if len(n.cpus) > 0 && !n.memory {
			poor = id
		}
	}
	if poor < 0 {
		t.Skip("needs a node with CPUs and without memory")
	}
	n := newSubnet()
	cfg := n.configure(t, stack.Config{Shards: shardsHere(), Spin: -1, Rebalance: stack.RebalanceOff})
	log := new(output)
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	r := n.open(t, cfg)
	r.serveEcho(t, nil)
	for _, c := range slices.Concat(r.each(t, echoPort, 1)...) {
		if err := roundTrip(c, payload(0, 256<<10)); err != nil {
			t.Fatal(err)
		}
	}
	r.wantPages(t, nodes)
	there := 0
	for _, p := range r.Placement().Shards {
		if p.Node == poor {
			there++
			if p.Memory != memoryOf(nodes, poor) {
				t.Errorf("shard %d has memory of node %d, want that of node %d, the nearest", p.Shard, p.Memory, memoryOf(nodes, poor))
			}
		}
	}
	if there != len(nodes[poor].cpus) {
		t.Errorf("%d shards on node %d, want one for each of its CPUs %v", there, poor, nodes[poor].cpus)
	}
	if said := strings.Count(log.String(), fmt.Sprintf("node %d has no memory", poor)); said != 1 {
		t.Errorf("the log says %d times that node %d has no memory, want once:\n%s", said, poor, log)
	}
}
