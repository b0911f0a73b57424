package shard

import (
	"bytes"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestSteadyTurnAllocations: a turn of an established connection allocates
// nothing in this module's code. What gVisor allocates is listed with -v.
func TestSteadyTurnAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop what it is given")
	}
	for _, test := range []struct {
		name string
		size int // of a message
	}{{"64 B", 64}, {"60 KB", 60 << 10}} {
		t.Run(test.name, func(t *testing.T) {
			a, b := steppedPair(t)
			listenStepped(t, b, 7, echoHandler())
			received := 0
			client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{
				data: func(_ *Conn, p []byte) int { received += len(p); return len(p) },
			})
			settle(t, a, b)
			message := bytes.Repeat([]byte{'x'}, test.size)
			round := func() {
				if _, err := client.Write(message); err != nil {
					t.Fatal(err)
				}
				for want := received + test.size; received < want; {
					a.turn()
					b.turn()
				}
			}
			for range 200 {
				round() // fills the pools and grows the lists
			}
			const rounds = 500
			sites := allocationSites(func() {
				for range rounds {
					round()
				}
			})
			for _, s := range sites {
				// Fewer than one in ten rounds is a pool that the collector
				// has emptied.
				perRound := float64(s.objects) / rounds
				if perRound < 0.1 {
					continue
				}
				if strings.HasPrefix(s.function, "numastack/") {
					t.Errorf("%s allocates %.1f objects (%d bytes) per round trip", s.function, perRound, s.bytes/rounds)
				} else {
					t.Logf("%s allocates %.1f objects (%d bytes) per round trip", s.function, perRound, s.bytes/rounds)
				}
			}
		})
	}
}

type allocationSite struct {
	function       string
	objects, bytes int64
}

// allocationSites runs f and returns which functions allocated meanwhile. An
// allocation counts for the first caller outside the runtime and the standard
// library.
func allocationSites(f func()) []allocationSite {
	rate := runtime.MemProfileRate
	runtime.MemProfileRate = 1
	defer func() { runtime.MemProfileRate = rate }()
	before := memProfile()
	f()
	after := memProfile()
	byFunction := make(map[string]allocationSite)
	for stack, r := range after {
		objects, size := r.AllocObjects-before[stack].AllocObjects, r.AllocBytes-before[stack].AllocBytes
		if objects == 0 {
			continue
		}
		var function string
		frames := runtime.CallersFrames(r.Stack())
		for {
			frame, more := frames.Next()
			if first, _, _ := strings.Cut(frame.Function, "/"); strings.Contains(first, ".dev") || first == "numastack" || !more {
				function = frame.Function
				break
			}
		}
		if strings.Contains(function, "memProfile") || strings.Contains(function, "allocationSites") {
			continue
		}
		s := byFunction[function]
		s.function, s.objects, s.bytes = function, s.objects+objects, s.bytes+size
		byFunction[function] = s
	}
	var sites []allocationSite
	for _, s := range byFunction {
		sites = append(sites, s)
	}
	slices.SortFunc(sites, func(a, b allocationSite) int { return int(b.objects - a.objects) })
	return sites
}

func memProfile() map[string]runtime.MemProfileRecord {
	runtime.GC() // a profile shows what was allocated before the last collection
	runtime.GC()
	records := make([]runtime.MemProfileRecord, 10_000)
	n, ok := runtime.MemProfile(records, true)
	if !ok {
		panic("memory profile has more than 10,000 records")
	}
	byStack := make(map[string]runtime.MemProfileRecord, n)
	for _, r := range records[:n] {
		key := fmt.Sprint(r.Stack())
		sum := byStack[key]
		sum.Stack0 = r.Stack0
		sum.AllocObjects += r.AllocObjects
		sum.AllocBytes += r.AllocBytes
		byStack[key] = sum
	}
	return byStack
}
