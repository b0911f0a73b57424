package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// The peers, in the order they are printed.
const (
	peerNumastack = "numastack"
	peerGVisor    = "gvisor"
	peerKernel    = "kernel"
)

var peerOrder = []string{peerNumastack, peerGVisor, peerKernel}

// load is what the client does with the server.
type load string

const (
	loadBulkIn   load = "bulk_in"  // client to discard
	loadBulkOut  load = "bulk_out" // chargen to client
	loadPingPong load = "pingpong" // 64-byte echo, one request outstanding per connection
	loadShort    load = "short"    // connect, 64-byte echo, reset
)

// messageBytes is the size of a ping-pong request and of its answer.
const messageBytes = 64

// row is one line of the comparison.
type row struct {
	name  string
	load  load
	conns int
	unit  string
	// lower is set where a smaller figure is better.
	lower bool
	// spin asks numastack to spin instead of sleeping between frames.
	spin bool
	// Targets for the ratio numastack / peer: at least, or at most where lower is set.
	vsGVisor, vsKernel float64
	value              func(sample) float64
}

var allRows = []row{
	{name: "bulk_in_1", load: loadBulkIn, conns: 1, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_in_8", load: loadBulkIn, conns: 8, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_out_1", load: loadBulkOut, conns: 1, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "bulk_out_8", load: loadBulkOut, conns: 8, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "pingpong_1", load: loadPingPong, conns: 1, unit: "µs", lower: true, spin: true, vsGVisor: 0.5, vsKernel: 0.7, value: medianMicros},
	{name: "pingpong_64", load: loadPingPong, conns: 64, unit: "requests/s", vsGVisor: 1.6, vsKernel: 0.65, value: perSecond},
	{name: "short", load: loadShort, conns: 8, unit: "connections/s", vsGVisor: 1.8, vsKernel: 0.9, value: perSecond},
}

// minScaling is the least that eight streams may reach of what one stream reaches.
const minScaling = 0.85

// scalingPairs are the rows that minScaling compares: the second over the first.
var scalingPairs = [][2]string{{"bulk_in_1", "bulk_in_8"}, {"bulk_out_1", "bulk_out_8"}}

// sample is what one client process reports about one window.
type sample struct {
	Elapsed time.Duration `json:"elapsed_ns"`
	CPU     time.Duration `json:"cpu_ns"` // user and system time of the server process
	Bytes   int64         `json:"bytes"`
	Ops     int64         `json:"ops"`
	// Latency percentiles; zero for bulk loads.
	P50 time.Duration `json:"p50_ns"`
	P99 time.Duration `json:"p99_ns"`
	Max time.Duration `json:"max_ns"`
}

func gbitPerSecond(s sample) float64 { return float64(s.Bytes) * 8 / float64(s.Elapsed) }
func perSecond(s sample) float64     { return float64(s.Ops) / s.Elapsed.Seconds() }
func medianMicros(s sample) float64  { return micros(s.P50) }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// cpuCost returns the server's CPU per byte for bulk loads (in cycles when the TSC rate is
// known, else in ns) and per operation in µs for the others.
func (r row) cpuCost(s sample, tscHz float64) (cost float64, unit string) {
	switch {
	case r.load != loadBulkIn && r.load != loadBulkOut:
		return micros(s.CPU) / float64(s.Ops), "µs/op"
	case tscHz > 0:
		return s.CPU.Seconds() * tscHz / float64(s.Bytes), "cycles/byte"
	default:
		return float64(s.CPU.Nanoseconds()) / float64(s.Bytes), "ns/byte"
	}
}

// selectRows returns the rows whose name, or a prefix of it, is in the comma-separated
// list. The empty list selects all.
func selectRows(list string) ([]row, error) {
	if list == "" {
		return allRows, nil
	}
	var names []string
	for _, r := range allRows {
		names = append(names, r.name)
	}
	asked := strings.Split(list, ",")
	for _, a := range asked {
		if a == "" || !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, a) }) {
			return nil, fmt.Errorf("-rows %q: accepted are %s, and prefixes of them", a, strings.Join(names, ", "))
		}
	}
	var rows []row
	for _, r := range allRows {
		// An exact name means that row alone, although it may begin another's name.
		if slices.Contains(asked, r.name) || slices.ContainsFunc(asked, func(a string) bool {
			return !slices.Contains(names, a) && strings.HasPrefix(r.name, a)
		}) {
			rows = append(rows, r)
		}
	}
	return rows, nil
}

// median returns the middle value, or the mean of the two middle ones. It panics on an
// empty slice.
func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}
