package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"numastack/stack"
)

// TestMoveUnderFire moves random flow groups while 16 connections stream and 64
// ask and answer, half of them with events on the shard, half with net.Conn, and
// looks at every byte. They pause, so that the CPUs are not the bottleneck:
// what the kernel counts then is due to the moves, and is compared with a time
// without. A second round without pauses looks at the bytes and their order alone.
func TestMoveUnderFire(t *testing.T) {
	const (
		shards, groups = 4, 32
		pause          = 50 * time.Millisecond
	)
	d := soakTime()
	for _, steering := range []stack.Steering{stack.SteeringKernel, stack.SteeringUser} {
		t.Run(steering.String(), func(t *testing.T) {
			r := open(t, stack.Config{Shards: shards, Groups: groups, Steering: steering, Rebalance: stack.RebalanceOff})
			r.serveEcho(t, nil)
			l, err := r.Listen("tcp", ":9007")
			if err != nil {
				t.Fatal(err)
			}
			go serveEchoOn(l)
			defer l.Close()

			moves := 0
			move := func(ctx context.Context) {
				for ; ctx.Err() == nil; moves++ {
					if err := r.Move(rand.IntN(groups), rand.IntN(shards)); err != nil {
						t.Error(err)
						return
					}
					time.Sleep(5 * time.Millisecond)
				}
			}
			calm := r.fire(t, d/3, pause, nil)
			others := watchOthers(t)
			moved := r.fire(t, d, pause, move)
			quiet := others() < fewOthers
			t.Logf("with pauses: calm:  %v", calm)
			t.Logf("with pauses: moved: %v, %d moves", moved, moves)
			full := r.fire(t, d/3, 0, move)
			t.Logf("at full load: moved: %v", full)
			sum := r.sum()
			t.Logf("%d moves, %d frames kept on the way, longest stall %v", moves, sum.FramesKept, time.Duration(sum.MoveStallMax))
			if moves == 0 {
				t.Error("nothing was moved")
			}
			if moved.outOfOrder+full.outOfOrder > calm.outOfOrder || sum.outOfOrder > 0 {
				t.Errorf("out of order: the kernel got %d segments, %d without moves, the stack got %d; want no more, and none",
					moved.outOfOrder+full.outOfOrder, calm.outOfOrder, sum.outOfOrder)
			}
			// A peer probes when its answer is late (RFC 8985 section 7), which on
			// a busy machine has other causes too.
			if most := 3*calm.retransmitted + moves/20; moved.retransmitted > most && raceFactor == 1 && quiet {
				t.Errorf("the kernel retransmitted %d segments, %d in a third of the time without moves; want %d or less", moved.retransmitted, calm.retransmitted, most)
			}
			if sum.Dropped > 0 || sum.RingFull > 0 {
				t.Errorf("dropped %v, %d frames at full rings; want none", sum.DroppedByCause, sum.RingFull)
			}
		})
	}
}

// fired is what was seen under load.
type fired struct {
	bytes, requests           int
	outOfOrder, retransmitted int // segments, as the kernel counts them
	p50, p99                  time.Duration
}

func (f fired) String() string {
	return fmt.Sprintf("%d MB, %d requests, p50 %v, p99 %v, kernel: %d segments out of order, %d retransmitted",
		f.bytes>>20, f.requests, f.p50, f.p99, f.outOfOrder, f.retransmitted)
}

// fire loads the stack for a while and runs meanwhile. Streams pause after each
// block, for a fifth of that the others after each answer.
func (r *rig) fire(t *testing.T, d, pause time.Duration, meanwhile func(ctx context.Context)) (f fired) {
	t.Helper()
	const bulk, asking = 16, 64
	outOfOrder, retransmitted := kernelCounter(t, "netstat", "TcpExt", "TCPOFOQueue"), kernelCounter(t, "snmp", "Tcp", "RetransSegs")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var (
		wg        sync.WaitGroup
		mu        sync.Mutex
		latencies []time.Duration
	)
	port := func(i int) int { return []int{echoPort, 9007}[i%2] }
	for i := range bulk {
		c := dialTCP(t, r.self4, port(i))
		wg.Go(func() {
			n, err := streamThrough(ctx, c, uint64(i), pause)
			mu.Lock()
			defer mu.Unlock()
			f.bytes += n
			if err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	for i := range asking {
		to := r.families()[i/2%2].self
		c := dialTCP(t, to, port(i))
		wg.Go(func() {
			var mine []time.Duration
			got := make([]byte, 64)
			for n := uint64(0); ctx.Err() == nil; n++ {
				_ = c.SetDeadline(time.Now().Add(patience))
				want := payload(uint64(i)<<32|n, len(got))
				begin := time.Now()
				if _, err := c.Write(want); err != nil {
					t.Errorf("request %d of %d: %v", n, i, err)
					break
				}
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
					t.Errorf("answer %d of %d differs, or is not there: %v", n, i, err)
					break
				}
				mine = append(mine, time.Since(begin))
				time.Sleep(pause / 5)
			}
			_ = c.Close()
			mu.Lock()
			defer mu.Unlock()
			latencies = append(latencies, mine...)
		})
	}
	time.AfterFunc(d, cancel) // from here on: all are connected
	if meanwhile != nil {
		meanwhile(ctx)
	}
	wg.Wait()
	slices.Sort(latencies)
	f.requests = len(latencies)
	if f.requests > 0 {
		f.p50, f.p99 = latencies[f.requests/2], latencies[f.requests*99/100]
	}
	if f.requests < asking || f.bytes == 0 {
		t.Errorf("only %d requests and %d bytes", f.requests, f.bytes)
	}
	f.outOfOrder = kernelCounter(t, "netstat", "TcpExt", "TCPOFOQueue") - outOfOrder
	f.retransmitted = kernelCounter(t, "snmp", "Tcp", "RetransSegs") - retransmitted
	return f
}

// streamThrough sends blocks with their number and checksum through an echo
// server until ctx is done, with a pause after each, and checks what comes back. It returns the bytes.
func streamThrough(ctx context.Context, c net.Conn, seed uint64, pause time.Duration) (int, error) {
	const size = 128 << 10
	_ = c.SetDeadline(time.Now().Add(soakTime() + 2*patience)) // longer than any ctx here
	sent := make(chan error, 1)
	blocks := make(chan struct{}, 1<<20) // sent, so that the reader knows when to stop
	go func() {
		defer close(blocks)
		block := payload(seed, size)
		for n := uint64(0); ctx.Err() == nil; n++ {
			binary.BigEndian.PutUint64(block, n)
			binary.BigEndian.PutUint32(block[size-4:], crc32.ChecksumIEEE(block[:size-4]))
			blocks <- struct{}{}
			if _, err := c.Write(block); err != nil {
				sent <- err
				return
			}
			time.Sleep(pause)
		}
		sent <- nil
	}()
	got := make([]byte, size)
	n := 0
	for range blocks {
		if _, err := io.ReadFull(c, got); err != nil {
			return n * size, fmt.Errorf("block %d: %w", n, err)
		}
		if number := binary.BigEndian.Uint64(got); number != uint64(n) || binary.BigEndian.Uint32(got[size-4:]) != crc32.ChecksumIEEE(got[:size-4]) {
			return n * size, fmt.Errorf("block %d came back as block %d, or with wrong content", n, number)
		}
		n++
	}
	err := <-sent
	_ = c.Close()
	return n * size, err
}

// kernelCounter reads one of the counters of this network namespace.
func kernelCounter(t *testing.T, file, table, name string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/net/" + file)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		switch {
		case fields[0] != table+":":
		case names == nil:
			names = fields
		default:
			if i := slices.Index(names, name); i > 0 {
				n, err := strconv.Atoi(fields[i])
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatalf("/proc/net/%s has no %s %s", file, table, name)
	return 0
}

// TestRebalanceLive forces all heavy connections onto one of two shards; within
// two seconds the other one has its part of them.
func TestRebalanceLive(t *testing.T) {
	const groups = 16
	r := open(t, stack.Config{Shards: 2, Groups: groups, Rebalance: stack.RebalanceAuto})
	r.serveEcho(t, nil)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	// All are connected before the first has load: then groups begin to leave shard 0.
	perGroup := make(map[int]int)
	var conns []net.Conn
	for len(conns) < 16 {
		c := dialTCP(t, r.self4, echoPort)
		at, err := r.Lookup("tcp", netip.AddrPortFrom(r.self4, echoPort), c.LocalAddr().(*net.TCPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		if at.Shard != 0 || perGroup[at.Group] == 2 { // they spread over the groups of shard 0
			_ = c.Close()
			continue
		}
		perGroup[at.Group]++
		conns = append(conns, c)
	}
	for i, c := range conns {
		wg.Go(func() {
			if _, err := streamThrough(ctx, c, uint64(i), 0); err != nil {
				t.Error(err)
			}
		})
	}
	defer func() { cancel(); wg.Wait() }()
	share := func(d time.Duration) float64 {
		framesBefore, _ := r.groupFrames()
		time.Sleep(d)
		frames, owner := r.groupFrames()
		var by [2]float64
		for g, n := range frames {
			by[owner[g]] += float64(n - framesBefore[g])
		}
		return max(by[0], by[1]) / (by[0] + by[1])
	}
	others := watchOthers(t)
	first := share(100 * time.Millisecond)
	time.Sleep(2 * time.Second)
	after := share(time.Second)
	stats := r.Stats().Rebalance
	t.Logf("the busier shard got %.0f %% of the frames at first, %.0f %% after two seconds; %+v", 100*first, 100*after, stats)
	switch {
	case stats.Moves > 0 && after <= 0.75:
	case others() >= fewOthers:
		t.Skip("needs a quiet machine: other programs took CPU time, which makes shards busy")
	default:
		t.Errorf("the busier shard still gets %.0f %% of the frames after %d moves", 100*after, stats.Moves)
	}
}

// BenchmarkMove moves the flow group of a connection that asks and answers all
// the time back and forth between two shards. stall-µs is how long its frames
// are kept; ns/op includes the caller's way to the shards and back.
func BenchmarkMove(b *testing.B) {
	for _, steering := range []stack.Steering{stack.SteeringKernel, stack.SteeringUser} {
		b.Run(steering.String(), func(b *testing.B) {
			n := newSubnet()
			cfg := n.configure(b, stack.Config{Shards: 2, Steering: steering, Rebalance: stack.RebalanceOff})
			s, err := stack.New(cfg)
			if err != nil {
				b.Skip(err)
			}
			defer s.Close()
			if _, err := s.HandleTCP("tcp", ":"+strconv.Itoa(echoPort), echo{}); err != nil {
				b.Fatal(err)
			}
			c, err := net.Dial("tcp", netip.AddrPortFrom(n.self4, echoPort).String())
			if err != nil {
				b.Fatal(err)
			}
			at, err := s.Lookup("tcp", netip.AddrPortFrom(n.self4, echoPort), c.LocalAddr().(*net.TCPAddr).AddrPort())
			if err != nil {
				b.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				message := make([]byte, 64)
				for {
					if _, err := c.Write(message); err != nil {
						return
					}
					if _, err := io.ReadFull(c, message); err != nil {
						return
					}
				}
			})
			stall := func() (sum uint64) {
				for _, s := range s.Stats().Shards {
					sum += s.MoveStall
				}
				return sum
			}
			before, shard := stall(), at.Shard
			for b.Loop() {
				shard = 1 - shard
				if err := s.Move(at.Group, shard); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(stall()-before)/float64(b.N)/1000, "stall-µs")
			_ = c.Close()
			wg.Wait()
		})
	}
}
