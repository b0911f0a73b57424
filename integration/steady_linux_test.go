package integration

import (
	"context"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"numastack/stack"
)

// toil is an echo service that takes its time: the same for each request, also
// when other programs want the CPU.
type toil struct {
	echo
	each time.Duration
}

func (s toil) Data(c *stack.Conn, b []byte) int {
	for begin := time.Now(); time.Since(begin) < s.each; {
	}
	return s.echo.Data(c, b)
}

// TestSteadyLoadMovesNothing keeps the same number of equally busy connections
// on two shards, and busy enough that the rebalancer looks at them. There is
// nothing to gain by moving a flow group, so none is moved.
func TestSteadyLoadMovesNothing(t *testing.T) {
	const (
		groups = 16 // half of them on each shard, with one connection each
		each   = 2 * time.Millisecond
		every  = 26 * time.Millisecond // 62 % of a shard's time
	)
	r := open(t, stack.Config{Shards: 2, Groups: groups, Rebalance: stack.RebalanceAuto})
	r.handleTCP(t, echoPort, toil{each: each})
	d := soakTime()
	if testing.Short() {
		d = 2 * time.Second // eight looks of the rebalancer
	}
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	conns := make(map[int]net.Conn) // by flow group
	for len(conns) < groups {
		c := dialTCP(t, r.self4, echoPort)
		at, err := r.Lookup("tcp", netip.AddrPortFrom(r.self4, echoPort), c.LocalAddr().(*net.TCPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		if conns[at.Group] != nil {
			_ = c.Close()
			continue
		}
		conns[at.Group] = c
	}
	before, begin, others := r.Stats().Shards, time.Now(), watchOthers(t)
	var wg sync.WaitGroup
	for group, c := range conns {
		wg.Go(func() {
			time.Sleep(time.Duration(group) * every / groups) // not all at once
			tick := time.NewTicker(every)
			defer tick.Stop()
			for ctx.Err() == nil {
				_ = c.SetDeadline(time.Now().Add(patience)) // it was set before
				if err := roundTrip(c, []byte("toil")); err != nil {
					t.Errorf("group %d: %v", group, err)
					return
				}
				<-tick.C
			}
			_ = c.Close()
		})
	}
	<-ctx.Done()
	after, elapsed := r.Stats(), time.Since(begin)
	taken := others()
	wg.Wait()
	var shares [2]float64
	for i, s := range after.Shards {
		shares[i] = float64(s.Busy-before[i].Busy) / float64(elapsed)
		t.Logf("shard %d was busy for %.0f %% of the time", i, 100*shares[i])
	}
	// Busy time is that of the clock: who takes a shard's CPU makes it busy.
	quiet := taken < fewOthers && max(shares[0], shares[1])-min(shares[0], shares[1]) < 0.1
	switch moves := after.Rebalance.Moves; {
	case moves != 0 && quiet:
		t.Errorf("%d flow groups moved under a steady load", moves)
	case moves != 0:
		t.Skipf("needs a quiet machine: other programs took %.0f %% of the CPUs, which makes shards busy, and %d flow groups moved",
			100*taken, moves)
	}
}

// fewOthers is the share of the CPUs below which other programs do not matter.
const fewOthers = 0.05

// watchOthers returns what tells which share of the CPUs all programs but this one have
// had since.
func watchOthers(t *testing.T) (share func() float64) {
	t.Helper()
	begin, before := time.Now(), otherPrograms(t)
	return func() float64 {
		t.Helper()
		used := otherPrograms(t) - before
		return float64(used) / float64(runtime.NumCPU()) / float64(time.Since(begin))
	}
}

// otherPrograms is how much CPU time all programs but this one have had.
func otherPrograms(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var all int64
	// user, nice, system, idle, iowait, irq, softirq, steal; in hundredths of a
	// second (proc_stat(5))
	for i, field := range strings.Fields(strings.SplitN(string(b), "\n", 2)[0])[1:9] {
		if i != 3 && i != 4 {
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			all += n
		}
	}
	return time.Duration(all)*10*time.Millisecond - cpuTime(t)
}
