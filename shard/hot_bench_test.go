package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

// timersOf returns a clock with n armed timers, the time it goes by, and the timers.
func timersOf(n int) (c *clock, now *int64, timers []*timer) {
	now, earliest := new(int64), new(int64)
	*earliest = never
	c = &clock{now: now, earliest: earliest}
	rng := rand.New(rand.NewPCG(1, 2))
	for range n {
		timers = append(timers, c.AfterFunc(time.Duration(1+rng.IntN(int(time.Second))), func() {}).(*timer))
	}
	return c, now, timers
}

// BenchmarkTimers re-arms one timer of many for 200 ms, as each segment does with
// its connection's retransmission timer, and fires and re-arms one.
func BenchmarkTimers(b *testing.B) {
	for _, n := range []int{1, 64, 4096} {
		b.Run(fmt.Sprintf("reset/timers=%d", n), func(b *testing.B) {
			_, now, timers := timersOf(n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				*now += int64(10 * time.Microsecond)
				timers[i%n].Reset(200 * time.Millisecond)
			}
		})
		b.Run(fmt.Sprintf("fire/timers=%d", n), func(b *testing.B) {
			c, now, _ := timersOf(n)
			b.ReportAllocs()
			for b.Loop() {
				first := c.timers[0]
				*now = first.when
				c.fire()
				first.Reset(time.Second)
			}
		})
	}
}

func TestTimersAllocateNothing(t *testing.T) {
	c, now, timers := timersOf(64)
	i := 0
	allocs := testing.AllocsPerRun(1000, func() {
		i++
		*now += int64(time.Millisecond)
		timers[i%len(timers)].Reset(200 * time.Millisecond)
		timers[(i+1)%len(timers)].Stop()
		c.fire()
	})
	if allocs != 0 {
		t.Errorf("%v allocations, want none", allocs)
	}
}

// lendAndReturn is what a large frame does with its receive buffer: a connection
// holds it until the application has read.
func lendAndReturn(r *rxBuffers) {
	buf := r.take()
	loan := buf.view.Clone()
	r.give(buf)
	loan.Release()
	r.sweep()
}

// BenchmarkRxBuffers takes a buffer and gives it back, free as after a small frame,
// and lent, with other buffers that stay lent.
func BenchmarkRxBuffers(b *testing.B) {
	b.Run("copied", func(b *testing.B) {
		r := newRxBuffers(64, noArena(b))
		b.ReportAllocs()
		for b.Loop() {
			r.give(r.take())
		}
	})
	for _, others := range []int{0, 32} {
		b.Run(fmt.Sprintf("lent/others=%d", others), func(b *testing.B) {
			r := newRxBuffers(64, noArena(b))
			defer lend(&r, others)()
			b.ReportAllocs()
			for b.Loop() {
				lendAndReturn(&r)
			}
		})
	}
}

// lend leaves n buffers with a connection until it is called back.
func lend(r *rxBuffers, n int) (release func()) {
	var releases []func()
	for range n {
		buf := r.take()
		releases = append(releases, buf.view.Clone().Release)
		r.give(buf)
	}
	return func() {
		for _, f := range releases {
			f()
		}
	}
}

func TestRxBuffersAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop what it is given")
	}
	r := newRxBuffers(64, noArena(t))
	defer lend(&r, 32)()
	if allocs := testing.AllocsPerRun(1000, func() { lendAndReturn(&r) }); allocs != 0 {
		t.Errorf("%v allocations, want none", allocs)
	}
}

// sink is a queue that takes every frame and copies none: /dev/null.
func sink(t testing.TB) *dispatch.Queue {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = null.Close() })
	return dispatch.NewQueue(int(null.Fd()))
}

// burstOf returns a burst of packets with payloads of one size, half of them with a pure
// ACK of the same flow before, which they supersede.
func burstOf(payload int) []*stack.PacketBuffer {
	const flows = 16
	var burst []*stack.PacketBuffer
	for i := range flows {
		s := segment{port: uint16(1000 + i), ack: 5, flags: header.TCPFlagAck}
		if i%2 == 0 {
			burst = append(burst, s.packet())
		}
		s.payload = payload
		burst = append(burst, s.packet())
	}
	return burst
}

// BenchmarkTx queues and flushes a burst without what the kernel does with it.
func BenchmarkTx(b *testing.B) {
	for _, size := range []int{64, 1448, 60 << 10} {
		b.Run(fmt.Sprintf("payload=%d", size), func(b *testing.B) {
			var counters Counters
			tx := newTxQueue(sink(b), Offloads{TCP: true, UDP: true}, &counters)
			b.ReportAllocs()
			frames := 0
			for b.Loop() {
				b.StopTimer() // a packet can be sent once
				burst := burstOf(size)
				frames += len(burst)
				b.StartTimer()
				for _, pkt := range burst {
					tx.push(pkt, nil)
				}
				tx.flush()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(frames), "ns/frame")
			if counters.TxErrors > 0 || counters.AcksSuperseded == 0 {
				b.Errorf("%d errors, %d ACKs superseded", counters.TxErrors, counters.AcksSuperseded)
			}
		})
	}
}

func TestTxAllocatesNothing(t *testing.T) {
	for _, size := range []int{64, 60 << 10} {
		var counters Counters
		tx := newTxQueue(sink(t), Offloads{TCP: true, UDP: true}, &counters)
		const runs = 20
		var bursts [runs + 1][]*stack.PacketBuffer // AllocsPerRun runs once more
		for i := range bursts {
			bursts[i] = burstOf(size)
		}
		run := 0
		allocs := testing.AllocsPerRun(runs, func() {
			for _, pkt := range bursts[run] {
				tx.push(pkt, nil)
			}
			tx.flush()
			run++
		})
		if allocs != 0 || counters.TxErrors > 0 {
			t.Errorf("payload of %d bytes: %v allocations and %d errors, want none", size, allocs, counters.TxErrors)
		}
	}
}

// BenchmarkTurn is a message and its echo between two shards that take turns on one
// thread: both sides' read, steer, deliver, TCP, application and flush, and what a
// socket pair takes for a frame, which is less than a TAP does.
func BenchmarkTurn(b *testing.B) {
	for _, size := range []int{64, 1 << 10, 16 << 10, 60 << 10} {
		b.Run(fmt.Sprintf("message=%d", size), func(b *testing.B) {
			client, server := steppedPair(b)
			listenStepped(b, server, 7, echoHandler())
			received := 0
			conn := dialStepped(b, client, netip.AddrPortFrom(addrB, 7), &testHandler{
				data: func(_ *Conn, p []byte) int { received += len(p); return len(p) },
			})
			settle(b, client, server)
			message := bytes.Repeat([]byte{'x'}, size)
			b.SetBytes(int64(2 * size))
			b.ReportAllocs()
			for b.Loop() {
				if n, err := conn.Write(message); n != size || err != nil {
					b.Fatalf("wrote %d bytes: %v", n, err)
				}
				for want := received + size; received < want; {
					client.turn()
					server.turn()
				}
			}
		})
	}
}
