package shard

import (
	"net/netip"
	"slices"
	"testing"

	"numastack/numaalloc"
)

// TestStages: the time that a handler takes is the application's, whatever else
// the turn does, and a turn that finds nothing to do has no stages.
func TestStages(t *testing.T) {
	a, b := steppedPair(t)
	const toil = 1000 // much more than all looks at the clock in one turn
	now := b.now
	b.readClock = func() int64 { now++; return now }
	listenStepped(t, b, 7, &testHandler{data: func(c *Conn, p []byte) int {
		now += toil
		n, _ := c.Write(p)
		return n
	}})
	answers := 0
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{data: func(_ *Conn, p []byte) int { answers++; return len(p) }})
	settle(t, a, b)
	b.stages = stageTimes{}
	const rounds = 64 * timedTurns
	for round := range rounds {
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		for a.turn(); answers <= round; a.turn() {
			b.turn()
		}
	}
	for i, c := range b.count().Stages {
		t.Logf("%+v", c)
		if c.Stage == "" || c.Total < c.Count || c.Max > c.Total {
			t.Errorf("%+v does not add up", c)
		}
		switch stage(i) {
		case stageApplication:
			if c.Count == 0 || c.Count > rounds/timedTurns || c.Average() < toil || c.Max > 2*toil {
				t.Errorf("%+v, want %d ns and a little in one of %d turns", c, toil, timedTurns)
			}
		case stageTimers, stageWait:
		default:
			if c.Count == 0 || c.Max >= toil {
				t.Errorf("%+v, want some time, but not the handler's", c)
			}
		}
	}
	for b.turn() {
	}
	before := b.count().Stages[stageRead].Count
	for range 2 * timedTurns {
		b.turn()
	}
	if n := b.count().Stages[stageRead].Count; n != before {
		t.Errorf("%d turns without work were timed", n-before)
	}
}

// TestAstray: a shard whose thread runs on another CPU than it was pinned to
// tells.
func TestAstray(t *testing.T) {
	others := slices.Clone(thisMachine(t).AllowedCPUs)
	if len(others) < 2 {
		t.Skipf("needs two CPUs, has %v", others)
	}
	a, b := steppedPair(t)
	listenStepped(t, b, 7, echoHandler())
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{data: func(_ *Conn, p []byte) int { return len(p) }})
	settle(t, a, b)
	work := func() uint64 {
		for range 2 * timedTurns {
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			settle(t, a, b)
		}
		return b.count().Astray
	}
	if n := work(); n != 0 {
		t.Errorf("%d turns on another CPU than %d", n, b.cpu)
	}
	for _, cpu := range others {
		if cpu != b.cpu {
			if err := numaalloc.Pin(cpu); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if n := work(); n == 0 {
		t.Errorf("the shard of CPU %d does not know that CPU %d runs it", b.cpu, numaalloc.CurrentCPU())
	}
}
