package shard

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"numastack/numaalloc"
)

// twoNodes is this machine with every other CPU on a node of its own: what is to
// be told apart is, and where nothing can be bound, nothing is.
func twoNodes(t testing.TB) *numaalloc.Topology {
	t.Helper()
	topology := thisMachine(t)
	if len(topology.AllowedCPUs) < 2 {
		t.Skip("takes two CPUs")
	}
	var cpus [2][]int
	for i, cpu := range topology.AllowedCPUs {
		cpus[i%2] = append(cpus[i%2], cpu)
	}
	for i := range topology.CPUs {
		c := &topology.CPUs[i]
		c.Node = 0
		if slices.Contains(cpus[1], c.ID) {
			c.Node = 1
		}
	}
	topology.Nodes = []numaalloc.Node{
		{ID: 0, CPUs: cpus[0], Memory: 1 << 30, Distances: []int{10, 20}},
		{ID: 1, CPUs: cpus[1], Memory: 1 << 30, Distances: []int{20, 10}},
	}
	topology.AllowedMemory = []int{0, 1}
	return topology
}

// acrossNodes makes two shards of a stack live on different nodes.
func acrossNodes(t testing.TB) func(*Config) {
	return func(cfg *Config) {
		cfg.Topology = twoNodes(t)
		cfg.CPUs = []int{cfg.Topology.Nodes[0].CPUs[0], cfg.Topology.Nodes[1].CPUs[0]}
		var err error
		if cfg.Costs, err = numaalloc.CostsFromDistances(cfg.Topology.CPUNodes(), cfg.Topology.MemoryNodes(), cfg.Topology.Distance); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOffloadRunsOnItsNode: offloaded functions run on the node of their shard.
// When so many wait there that memory of another node costs less, they run there,
// and the shard counts them.
func TestOffloadRunsOnItsNode(t *testing.T) {
	a, b := startWide(t, 2, 4, acrossNodes(t))
	var mu sync.Mutex
	var wrong []int
	l, err := b.Serve([]netip.Addr{addrB}, 0, 16, func(c net.Conn) {
		served := c.(*ServedConn)
		buf := make([]byte, 1)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
			served.Offload(func() {
				var cpus unix.CPUSet
				_ = unix.SchedGetaffinity(0, &cpus)
				cpu := b.cfg.Topology.Nodes[served.NUMANode()].CPUs[0]
				if !cpus.IsSet(cpu) {
					mu.Lock()
					wrong = append(wrong, served.NUMANode())
					mu.Unlock()
				}
			})
			_, _ = c.Write(buf)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	exchange := func(c net.Conn) {
		if _, err := c.Write([]byte{1}); err != nil {
			t.Error(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	var conns []net.Conn
	shards := make(map[int]int)
	for range 32 {
		c, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		local := c.LocalAddr().(*net.TCPAddr).AddrPort()
		shards[b.reta.Owner(b.groupOf(protoTCP, l.Addr(), local))]++
		conns = append(conns, c)
		exchange(c)
	}
	if len(wrong) > 0 || len(shards) < 2 {
		t.Errorf("functions of nodes %v ran elsewhere; connections by shard %v, want both", wrong, shards)
	}
	if c := b.Stats(); c[0].Offloads+c[1].Offloads != 32 || c[0].OffloadsSpilled+c[1].OffloadsSpilled != 0 {
		t.Errorf("%d and %d functions counted, %d and %d spilled; want 32 and none",
			c[0].Offloads, c[1].Offloads, c[0].OffloadsSpilled, c[1].OffloadsSpilled)
	}

	// Node 0 has two threads: with both busy and two waiting, the next ones go to
	// node 1.
	pool, err := b.NodePool(0)
	if err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	var busy sync.WaitGroup
	for range 4 {
		busy.Go(func() { _ = pool.Do(t.Context(), func(*numaalloc.PoolThread) { <-release }) })
	}
	eventually(t, "busy node", func() bool { return pool.Stats().Load == 4 })
	mu.Lock()
	wrong = nil
	mu.Unlock()
	for _, c := range conns {
		exchange(c) // does not wait for release
	}
	close(release)
	busy.Wait()
	c := b.Stats()
	if n := uint64(shards[0]); c[0].OffloadsSpilled != n || c[1].OffloadsSpilled != 0 || len(wrong) != shards[0] {
		t.Errorf("%d and %d functions spilled, %d ran elsewhere; want the %d of shard 0", c[0].OffloadsSpilled, c[1].OffloadsSpilled, len(wrong), n)
	}
	if s := b.PoolStats(); len(s) != 2 || s[0].Spilled != uint64(shards[0]) || s[0].Ran+s[1].Ran != 64+4 {
		t.Errorf("pools have counted %+v", s)
	}
}

// TestWhereAfterMove: what the doors say about a connection is true of the thread
// that processes its segments, before and after a move to another node, and what
// the move leaves behind is counted.
func TestWhereAfterMove(t *testing.T) {
	a, b := startWide(t, 2, 4, acrossNodes(t))
	h := &moveHandler{moved: make(chan int, 4)}
	data := make(chan [3]int, 1)
	h.data = func(c *Conn, p []byte) int {
		var cpu int
		var mask unix.CPUSet
		_ = unix.SchedGetaffinity(0, &mask)
		for cpu = 0; !mask.IsSet(cpu); cpu++ {
		}
		if cpu != c.CPU() {
			t.Errorf("data on CPU %d, the connection says %d", cpu, c.CPU())
		}
		data <- [3]int{c.Shard(), c.CPU(), c.NUMANode()}
		return len(p)
	}
	l, err := b.Listen([]netip.Addr{addrB}, 0, 16, h)
	if err != nil {
		t.Fatal(err)
	}
	u, err := a.ListenUDP([]netip.Addr{addrA}, 53, func(s *Socket, p []byte, from netip.AddrPort) {})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	client, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	group := b.groupOf(protoTCP, l.Addr(), client.LocalAddr().(*net.TCPAddr).AddrPort())
	var packets *NetPacketDialed
	for packets == nil || packets.home.g.id == group { // moves by itself
		if packets, err = b.DialNetPacket(netip.AddrPortFrom(addrA, 53)); err != nil {
			t.Fatal(err)
		}
		defer packets.Close()
	}

	// The connections of the other doors note where they are told to be.
	type place struct{ shard, cpu, node int }
	told := make(chan place, 4)
	note := func(shard, cpu, node int) { told <- place{shard, cpu, node} }
	client.OnMove(note)
	packets.OnMove(note)
	for _, to := range []int{1, 0, 1} {
		if err := b.Move(group, to); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if got, want := <-data, [3]int{to, b.cfg.CPUs[to], to}; got != want {
			t.Errorf("server: shard, CPU and node %v after a move to %v", got, want)
		}
		for _, test := range []struct {
			name  string
			set   *Set
			group int
			where interface {
				Shard() int
				CPU() int
				NUMANode() int
			}
		}{
			{"TCP", a, client.c.g.id, client},
			{"UDP", b, packets.home.g.id, packets},
		} {
			from := test.set.reta.Owner(test.group)
			want := place{to, test.set.cfg.CPUs[to], to}
			if err := test.set.Move(test.group, to); err != nil {
				t.Fatal(err)
			}
			if from != to {
				if got := <-told; got != want {
					t.Errorf("%s: told of a move to %+v, want %+v", test.name, got, want)
				}
			}
			if got := (place{test.where.Shard(), test.where.CPU(), test.where.NUMANode()}); got != want {
				t.Errorf("%s: is at %+v after a move to %+v", test.name, got, want)
			}
		}
	}
	client.OnMove(nil)
	if err := a.Move(client.c.g.id, 0); err != nil {
		t.Fatal(err)
	}
	if len(told) > 0 {
		t.Errorf("told of %+v after OnMove(nil)", <-told)
	}

	if err := b.Move(0, 1); err != nil { // where it was not made
		t.Fatal(err)
	}
	away := uint64(0)
	for _, c := range b.Stats() {
		away += c.GroupsAway
		for _, g := range c.Groups {
			if g.Group == group && g.Memory != group%2 {
				t.Errorf("group %d was made on node %d, want %d", group, g.Memory, group%2)
			}
		}
	}
	want := uint64(0)
	for g := range b.groups {
		if b.reta.Owner(g) != g%2 {
			want++
		}
	}
	if away != want || want == 0 {
		t.Errorf("%d groups are away from their memory, want %d of those at %v", away, want, b.RETA()[:4])
	}
}

// TestBuffersOfAnotherNode: a frame that comes through a ring from a shard of
// another node is used there from here.
func TestBuffersOfAnotherNode(t *testing.T) {
	for _, far := range []bool{true, false} {
		tune := acrossNodes(t)
		_, b := startWide(t, 2, 4, func(cfg *Config) {
			if tune(cfg); !far {
				cfg.CPUs[1] = cfg.CPUs[0]
			}
		})
		const frames = 5
		b.shards[0].do(func(s *Shard) {
			for n := range byte(frames) {
				h := &handover{frame: udpFrame(t, b, n)}
				b.toeplitz.Parse(h.frame, &h.parsed)
				h.parsed.Hash = 1 // a group of shard 1
				s.route(h, true)
			}
		})
		eventually(t, "frames", func() bool { return b.Stats()[1].Received >= frames })
		want := uint64(0)
		if far {
			want = b.Stats()[1].Received
		}
		if n := b.Stats()[1].BuffersFar; n != want {
			t.Errorf("on different nodes %t: %d frames in buffers of another node, want %d", far, n, want)
		}
	}
}

// TestDrainByCost: the groups of a drained shard go to its node, or to the node
// whose CPUs pay least for the memory that they leave.
func TestDrainByCost(t *testing.T) {
	set := &Set{draining: []bool{0: true, 4: true}}
	for id, node := range []int{0, 2, 1, 1, 0} {
		set.shards = append(set.shards, &Shard{id: id, node: node, memory: node})
	}
	nodes := map[int][]int{0: {0}, 1: {1}, 2: {2}}
	distances := [][]int{{10, 30, 20}, {15, 10, 20}, {20, 20, 10}}
	costs, err := numaalloc.CostsFromDistances(nodes, []int{0, 1, 2}, func(from, to int) int { return distances[from][to] })
	if err != nil {
		t.Fatal(err)
	}
	set.costs.Store(costs)
	counts := []int{0, 0, 3, 2, 9}
	if to := set.roomiest(0, counts); to != 3 {
		t.Errorf("a group of node 0 goes to shard %d, want 3: node 1 pays less than node 2, and shard 2 has more", to)
	}
	set.draining[4] = false
	if to := set.roomiest(0, counts); to != 4 {
		t.Errorf("a group of node 0 goes to shard %d, want 4 of the same node", to)
	}
	copy(set.draining[2:], []bool{true, true, true})
	if to := set.roomiest(0, counts); to != 1 {
		t.Errorf("a group of node 0 goes to shard %d, want the only one left", to)
	}
}
