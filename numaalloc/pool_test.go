package numaalloc

import (
	"context"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// taskOf is a PoolTask of a function.
type taskOf func(t *PoolThread)

func (f taskOf) Run(t *PoolThread) { f(t) }

// newTestPools returns the pools of a machine in the words of describeMachine.
func newTestPools(t testing.TB, cfg PoolConfig, description ...string) *NodePools {
	t.Helper()
	topology, err := describeMachine(t, description).source().read()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Topology = topology
	if cfg.Costs, err = CostsFromDistances(topology.CPUNodes(), topology.MemoryNodes(), topology.Distance); err != nil {
		t.Fatal(err)
	}
	cfg.Reserved = 100
	all, err := NewPools(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(all.Close)
	return all
}

func poolOf(t testing.TB, all *NodePools, node int) *NodePool {
	t.Helper()
	p, err := all.Pool(node)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// until waits for something that other goroutines bring about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// The machine of the tests of the rule: from the CPUs of node 1, memory of node 0
// costs twice as much as at home, from those of node 2 four times.
var ruleMachine = []string{
	"node 0 cpus 0 memory 1G distances 10 20 40",
	"node 1 cpus 1 memory 1G distances 20 10 20",
	"node 2 cpus 2 memory 1G distances 40 20 10",
}

// TestPoolSpills hands in functions for node 0 and looks which node runs them.
// With two threads, one may wait per thread before the next goes to node 1, and
// three before one goes to node 2.
func TestPoolSpills(t *testing.T) {
	all := newTestPools(t, PoolConfig{Threads: 2}, ruleMachine...)
	home, near, far := poolOf(t, all, 0), poolOf(t, all, 1), poolOf(t, all, 2)
	release := make(chan struct{})
	ran := make(chan int, 20)
	blocking := taskOf(func(t *PoolThread) { <-release; ran <- t.Node() })
	hold := func(p *NodePool, n int) {
		for range n {
			p.Submit(blocking)
		}
	}
	expect := func(what string, loads ...int) {
		t.Helper()
		for i, p := range []*NodePool{home, near, far} {
			if s := p.Stats(); s.Load != loads[i] {
				t.Errorf("%s: node %d has %d functions, want %d; %+v", what, i, s.Load, loads[i], s)
			}
		}
	}
	hold(home, 2)
	expect("as many as threads", 2, 0, 0)
	hold(home, 2)
	expect("one in the queue per thread: waiting costs as much as node 1", 4, 0, 0)
	hold(home, 1)
	expect("more than that: node 1 is idle", 4, 1, 0)
	hold(home, 1)
	expect("and has another thread", 4, 2, 0)
	hold(home, 2)
	expect("both nodes are busy, and node 2 costs more than waiting", 6, 2, 0)
	hold(home, 3)
	expect("six wait for two threads: with a seventh, node 2 costs less", 8, 2, 1)
	if s := home.Stats(); s.Spilled != 3 {
		t.Errorf("%d functions spilled, want 3", s.Spilled)
	}
	close(release)
	on := make(map[int]int)
	for range 11 {
		on[<-ran]++
	}
	if on[1] < 2 || on[2] < 1 {
		t.Errorf("functions ran on nodes %v, want 2 or more on node 1 and one or more on node 2", on)
	}
	until(t, "end of all", func() bool {
		return home.Stats().Load+near.Stats().Load+far.Stats().Load == 0
	})
	total := uint64(0)
	for _, s := range all.Stats() {
		total += s.Ran
	}
	if total != 11 {
		t.Errorf("%d functions counted, want 11: %+v", total, all.Stats())
	}
}

// TestPoolTakes: a thread without work of its own takes what waits elsewhere, by
// the same rule.
func TestPoolTakes(t *testing.T) {
	all := newTestPools(t, PoolConfig{Threads: 2},
		"node 0 cpus 0 memory 1G distances 10 20", "node 1 cpus 1 memory 1G distances 20 10")
	home, other := poolOf(t, all, 0), poolOf(t, all, 1)
	releaseHome, releaseOther := make(chan struct{}), make(chan struct{})
	defer close(releaseHome)
	begun := make(chan struct{})
	for range 2 {
		other.Submit(taskOf(func(*PoolThread) { begun <- struct{}{}; <-releaseOther }))
		home.Submit(taskOf(func(*PoolThread) { begun <- struct{}{}; <-releaseHome }))
	}
	for range 4 {
		<-begun
	}
	ran := make(chan int, 20)
	for range 5 { // two too many for two threads at twice the cost
		home.Submit(taskOf(func(t *PoolThread) { ran <- t.Node() }))
	}
	if s := home.Stats(); s.Load != 7 || s.Spilled != 0 {
		t.Fatalf("with both nodes busy: %+v, want 7 functions on their node", s)
	}
	close(releaseOther)
	for range 3 {
		if node := <-ran; node != 1 {
			t.Errorf("function ran on node %d, want 1", node)
		}
	}
	until(t, "rest", func() bool { return other.Stats().Load == 0 })
	if s := home.Stats(); s.Load != 4 || s.Spilled != 3 {
		t.Errorf("%+v: want two running and two waiting, as that costs no more than node 1", s)
	}
}

// TestPoolWithoutCosts: nobody knows what another node costs, so nothing goes
// there.
func TestPoolWithoutCosts(t *testing.T) {
	topology, err := describeMachine(t, ruleMachine).source().read()
	if err != nil {
		t.Fatal(err)
	}
	all, err := NewPools(PoolConfig{Topology: topology, Threads: 1, Reserved: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	release := make(chan struct{})
	p := poolOf(t, all, 0)
	for range 10 {
		p.Submit(taskOf(func(*PoolThread) { <-release }))
	}
	if s := p.Stats(); s.Load != 10 || s.Spilled != 0 {
		t.Errorf("%+v, want 10 functions on their node", s)
	}
	close(release)
}

func TestPoolOfNode(t *testing.T) {
	all := newTestPools(t, PoolConfig{},
		"node 0 cpus 0-1 memory 1G distances 10 30 40",
		"node 2 cpus 2 memory 1G distances 30 10 20",
		"node 5 memory 1G distances 40 20 10")
	for node, want := range map[int]int{0: 0, 2: 2, 5: 2} {
		if p, err := all.Pool(node); err != nil || p.Node() != want {
			t.Errorf("Pool(%d) is that of node %d, %v; want %d", node, p.Node(), err, want)
		}
	}
	for _, node := range []int{-1, 1, 6} {
		if _, err := all.Pool(node); err == nil || !strings.Contains(err.Error(), "there are 0,2,5") {
			t.Errorf("Pool(%d): %v, want an error that says which nodes there are", node, err)
		}
	}
	for node, threads := range map[int]int{0: 2, 2: minPoolThreads} {
		if p := poolOf(t, all, node); p.threads != threads {
			t.Errorf("node %d has %d threads at most, want %d", node, p.threads, threads)
		}
	}
}

func TestPoolConfigErrors(t *testing.T) {
	topology, err := describeMachine(t, ruleMachine).source().read()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		cfg  PoolConfig
		want string
	}{
		{PoolConfig{}, "Topology"},
		{PoolConfig{Topology: &Topology{}}, "Topology"},
		{PoolConfig{Topology: &Topology{Nodes: []Node{{}}, CPUs: []CPU{{ID: 3, Node: -1}}, AllowedCPUs: []int{3}}}, "none of its nodes has one of the CPUs 3"},
		{PoolConfig{Topology: topology, Threads: -1}, "Threads: -1, want 0 (default) to"},
		{PoolConfig{Topology: topology, Queue: 1<<20 + 1}, "Queue: 1048577, want"},
		{PoolConfig{Topology: topology, Scratch: -5}, "Scratch: -5, want"},
		{PoolConfig{Topology: topology, Reserved: -5}, "Reserved: -5, want"},
	} {
		if _, err := NewPools(test.cfg); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("NewPools(%+v): %v, want an error with %q", test.cfg, err, test.want)
		}
	}
}

func TestPoolDo(t *testing.T) {
	all := newTestPools(t, PoolConfig{Threads: 1, Queue: 1, Scratch: 1000}, "node 0 cpus 0 memory 1G distances 10")
	p := poolOf(t, all, 0)
	ran := false
	if err := p.Do(t.Context(), func(thread *PoolThread) {
		ran = true
		if n := len(thread.Scratch()); n != 1000 || thread.Node() != 0 {
			t.Errorf("%d bytes of scratch memory on node %d, want 1000 on node 0", n, thread.Node())
		}
	}); err != nil || !ran {
		t.Fatalf("Do: %v, ran %t", err, ran)
	}
	if err := p.Do(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "nil") {
		t.Errorf("Do without a function: %v", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Do(over, func(*PoolThread) { t.Error("ran") }); !errors.Is(err, context.Canceled) {
		t.Errorf("Do with a context that is over: %v", err)
	}

	// A panic comes back with its stack, and the thread goes on.
	func() {
		defer func() {
			if err, ok := recover().(error); !ok || !strings.Contains(err.Error(), "on purpose") || !strings.Contains(err.Error(), "pool_test.go") {
				t.Errorf("Do panicked with %v, want the function's panic and its stack", err)
			}
		}()
		_ = p.Do(t.Context(), func(*PoolThread) { panic("on purpose") })
	}()
	if err := p.Do(t.Context(), func(*PoolThread) { runtime.Goexit() }); err != nil {
		t.Errorf("Do of a function that ends its goroutine: %v", err)
	}
	// One runs, one waits in the queue, one waits for room there.
	begun, release := make(chan struct{}), make(chan struct{})
	var wg, withdrawn sync.WaitGroup
	wg.Go(func() {
		if err := p.Do(t.Context(), func(*PoolThread) { close(begun); <-release }); err != nil {
			t.Error(err)
		}
	})
	<-begun
	wait, giveUp := context.WithCancelCause(t.Context())
	reason := errors.New("no time")
	for range 2 {
		withdrawn.Go(func() {
			if err := p.Do(wait, func(*PoolThread) { t.Error("a function that was withdrawn ran") }); !errors.Is(err, reason) {
				t.Errorf("Do: %v, want the reason why its context is over", err)
			}
		})
	}
	until(t, "full queue", func() bool { return p.Stats().Waits == 1 && p.Stats().Load == 2 })
	giveUp(reason)
	withdrawn.Wait() // while the thread is busy
	close(release)
	wg.Wait()
	if err := p.Do(t.Context(), func(*PoolThread) {}); err != nil {
		t.Errorf("after all that: %v", err)
	}
	// Five have run: the first one, two that ended badly, the one that took its
	// time, and the last.
	if s := p.Stats(); s.Threads != 1 || s.Load > 1 || s.Ran != 5 {
		t.Errorf("%+v, want one thread with nothing to do that ran 5 functions", s)
	}
}

// TestPoolClose: what runs is waited for, what waits does not run.
func TestPoolClose(t *testing.T) {
	all := newTestPools(t, PoolConfig{Threads: 1, Queue: 1}, "node 0 cpus 0 memory 1G distances 10")
	p := poolOf(t, all, 0)
	begun, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	ended := false
	wg.Go(func() {
		if err := p.Do(t.Context(), func(*PoolThread) { close(begun); <-release; ended = true }); err != nil {
			t.Error(err)
		}
	})
	<-begun
	for range 2 {
		wg.Go(func() {
			if err := p.Do(t.Context(), func(*PoolThread) { t.Error("ran after Close") }); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Do: %v, want net.ErrClosed", err)
			}
		})
	}
	until(t, "full queue", func() bool { return p.Stats().Waits == 1 && p.Stats().Load == 2 })
	closed := make(chan struct{})
	go func() { all.Close(); close(closed) }()
	<-all.done
	select {
	case <-closed:
		t.Error("Close did not wait for a function that runs")
	default:
	}
	close(release)
	<-closed
	wg.Wait()
	if !ended {
		t.Error("Close returned before the function has ended")
	}
	all.Close()
	if err := p.Do(t.Context(), func(*PoolThread) {}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Do after Close: %v, want net.ErrClosed", err)
	}
	if p.Submit(taskOf(func(*PoolThread) {})) {
		t.Error("Submit after Close was accepted")
	}
}

func BenchmarkPoolDo(b *testing.B) {
	all := newTestPools(b, PoolConfig{}, "node 0 cpus 0-1 memory 1G distances 10")
	p := poolOf(b, all, 0)
	for b.Loop() {
		if err := p.Do(b.Context(), func(*PoolThread) {}); err != nil {
			b.Fatal(err)
		}
	}
}
