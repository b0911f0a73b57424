package integration

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"numastack/numaalloc"
	"numastack/stack"
)

// place answers each byte with where it is: what the connection says of itself,
// and the CPU that the kernel names.
type place struct{ t *testing.T }

func (place) Open(*stack.Conn) {}

func (p place) Data(c *stack.Conn, b []byte) int {
	answer := fmt.Sprintln(c.Shard(), c.CPU(), c.NUMANode(), lastCPU(p.t, "/proc/thread-self"))
	if _, err := c.Write([]byte(answer)); err != nil {
		p.t.Error(err)
	}
	return len(b)
}

func (place) Writable(*stack.Conn)     {}
func (place) Close(*stack.Conn, error) {}

// TestNodesMove moves the group of two connections to every shard: both say
// where they are, and groups that leave their memory behind are counted.
func TestNodesMove(t *testing.T) {
	const placePort, netPort = 9010, 9011
	if runtime.NumCPU() < 2 {
		t.Skip("needs 2 CPUs")
	}
	nodes := sysNodes(t)
	r := openOnNodes(t, stack.Config{Profile: stack.ProfileClosest})
	r.handleTCP(t, placePort, place{t})
	l, err := r.Listen("tcp", fmt.Sprint(":", netPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	onShard := dialTCP(t, r.self4, placePort)
	client := dialTCP(t, r.self4, netPort)
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()

	plan := r.Placement().Shards
	answers := bufio.NewReader(onShard)
	from := [2]int{r.locate(t, onShard, placePort).Shard, r.locate(t, client, netPort).Shard}
	far := uint64(0)
	for range 2 { // the second time it begins elsewhere
		for to, p := range plan {
			for i, group := range []int{r.locate(t, onShard, placePort).Group, r.locate(t, client, netPort).Group} {
				if i == 1 && group == r.locate(t, onShard, placePort).Group {
					from[1] = to // it came along
				}
				if err := r.Move(group, to); err != nil {
					t.Fatal(err)
				}
				if memoryOf(nodes, plan[from[i]].Node) != memoryOf(nodes, p.Node) {
					far++
				}
				from[i] = to
			}
			if _, err := onShard.Write([]byte{0}); err != nil {
				t.Fatal(err)
			}
			got, err := answers.ReadString('\n')
			if want := fmt.Sprintln(to, p.CPU, nodeOf(nodes, p.CPU), p.CPU); got != want || err != nil {
				t.Errorf("on shard %d the handler's shard, CPU, node and the thread's CPU are %q (%v), want %q", to, got, err, want)
			}
			if err := passOne(client, server); err != nil {
				t.Fatal(err)
			}
			if w := server.(stack.Where); w.Shard() != to || w.CPU() != p.CPU || w.NUMANode() != nodeOf(nodes, p.CPU) {
				t.Errorf("on shard %d the net.Conn says shard %d, CPU %d, node %d", to, w.Shard(), w.CPU(), w.NUMANode())
			}
		}
	}
	counted := uint64(0)
	for _, s := range r.Stats().Shards {
		counted += s.GroupsFar
	}
	if counted != far {
		t.Errorf("%d groups counted that left their memory behind, want %d", counted, far)
	}
}

// passOne sends a byte from one end to the other.
func passOne(from, to net.Conn) error {
	b := []byte{7}
	if _, err := from.Write(b); err != nil {
		return err
	}
	_, err := to.Read(b)
	return err
}

// TestNodesCPUOffline takes the CPU of a shard away and gives it back, under
// connections that ask and answer all the time.
func TestNodesCPUOffline(t *testing.T) {
	if !inGuest() {
		t.Skip("takes a CPU offline: needs " + guestVar + "=1, a throw-away guest")
	}
	nodes := sysNodes(t)
	r := openOnNodes(t, stack.Config{Profile: stack.ProfileClosest})
	r.serveEcho(t, nil)
	plan := r.Placement()
	victim := plan.Shards[len(plan.Shards)-1]
	mine := func() (groups []int) {
		for group, owner := range r.owners() {
			if owner == victim.Shard {
				groups = append(groups, group)
			}
		}
		slices.Sort(groups)
		return groups
	}
	groups := mine()
	farBefore := r.far()

	// Each connection goes on until the end, and counts.
	conns := slices.Concat(r.each(t, echoPort, 2)...)
	exchanged := make([]atomic.Int64, len(conns))
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer func() { stop.Store(true); wg.Wait() }()
	for i, c := range conns {
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				setDeadline(t, c)
				if err := roundTrip(c, payload(uint64(n<<8|i), 3000)); err != nil {
					t.Errorf("exchange %d of connection %d: %v", n, i, err)
					return
				}
				exchanged[i].Add(1)
			}
		})
	}
	allAlive := func() {
		t.Helper()
		var before []int64
		for i := range exchanged {
			before = append(before, exchanged[i].Load())
		}
		eventually(t, func() error {
			for i := range exchanged {
				if exchanged[i].Load() < before[i]+2 {
					return fmt.Errorf("connection %d does not go on", i)
				}
			}
			return nil
		})
	}
	online := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", victim.CPU)
	set := func(state string) {
		t.Helper()
		if err := os.WriteFile(online, []byte(state), 0); err != nil {
			t.Fatal(err)
		}
	}
	allAlive()

	set("0")
	defer set("1")
	eventually(t, func() error {
		if left := mine(); len(left) > 0 {
			return fmt.Errorf("groups %v are still on shard %d, whose CPU %d is offline", left, victim.Shard, victim.CPU)
		}
		return nil
	})
	near := slices.ContainsFunc(plan.Shards, func(p numaalloc.Place) bool { return p.Node == victim.Node && p.Shard != victim.Shard })
	owners := r.owners()
	for _, group := range groups {
		to := plan.Shards[owners[group]]
		if near && to.Node != victim.Node {
			t.Errorf("group %d went to shard %d on node %d, though node %d has another shard", group, to.Shard, to.Node, victim.Node)
		}
	}
	left := uint64(len(groups))
	if near {
		left = 0
	}
	if far := r.far() - farBefore; far != left {
		t.Errorf("%d groups left their node, want %d", far, left)
	}
	allAlive()

	set("1")
	eventually(t, func() error {
		if back := mine(); len(back) != len(groups) {
			return fmt.Errorf("shard %d has %d groups, want its %d back", victim.Shard, len(back), len(groups))
		}
		return nil
	})
	allAlive()
	wantThreads(t, "self", plan.CPUs())
	if node := nodeOf(sysNodes(t), victim.CPU); node != nodeOf(nodes, victim.CPU) {
		t.Errorf("CPU %d came back on node %d", victim.CPU, node)
	}
	if s := r.Stats().Rebalance; s.Drains != 1 || s.Resumes != 1 {
		t.Errorf("%d drains and %d resumes, want 1 and 1", s.Drains, s.Resumes)
	}
	r.wantPages(t, nodes)
}

// owners returns the shard of each group.
func (r *rig) owners() map[int]int {
	_, owner := r.groupFrames()
	return owner
}

// far returns how many groups have left their node.
func (r *rig) far() (n uint64) {
	for _, s := range r.Stats().Shards {
		n += s.GroupsFar
	}
	return n
}
