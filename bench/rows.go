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
	loadHTTP     load = "http"     // GET / on kept connections, one request outstanding on each
	loadIdle     load = "idle"     // echo once on each connection, then memory with all of them open
)

// door is how an application meets numastack's connections. The peers know one way only,
// a goroutine per connection, so for them it matters in the HTTP rows alone: there it
// chooses the library.
type door string

const (
	doorEvents door = "events" // callbacks on the shard: apps/echo
	doorShard  door = "shard"  // coroutines on the shard; HTTP: fasthttp's request loop
	doorNet    door = "net"    // net.Listener and net.Conn; HTTP: net/http
)

// messageBytes is the size of a ping-pong request and of its answer.
const messageBytes = 64

// row is one line of the comparison.
type row struct {
	name  string
	load  load
	door  door
	conns int // 0: options.idleConns
	unit  string
	// quickRounds bounds the rounds of a -quick run, 0: does not.
	quickRounds int
	// lower is set where a smaller figure is better.
	lower bool
	// spin asks numastack to spin instead of sleeping between frames.
	spin bool
	// Targets for the ratio numastack / peer: at least, or at most where lower is set; 0:
	// none, the peer's figure is only shown.
	vsGVisor, vsKernel float64
	value              func(sample) float64
}

var allRows = []row{
	{name: "bulk_in_1", load: loadBulkIn, door: doorEvents, conns: 1, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_in_8", load: loadBulkIn, door: doorEvents, conns: 8, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_out_1", load: loadBulkOut, door: doorEvents, conns: 1, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "bulk_out_8", load: loadBulkOut, door: doorEvents, conns: 8, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "pingpong_1", load: loadPingPong, door: doorEvents, conns: 1, unit: "µs", lower: true, spin: true, vsGVisor: 0.5, vsKernel: 0.7, value: medianMicros},
	{name: "pingpong_64", load: loadPingPong, door: doorEvents, conns: 64, unit: "requests/s", vsGVisor: 1.6, vsKernel: 0.65, value: perSecond},
	{name: "short", load: loadShort, door: doorEvents, conns: 8, unit: "connections/s", vsGVisor: 1.8, vsKernel: 0.9, value: perSecond},
	{name: "net_in_1", load: loadBulkIn, door: doorNet, conns: 1, unit: "Gbit/s", quickRounds: 3, vsGVisor: 1.5, vsKernel: 0.4, value: gbitPerSecond},
	{name: "net_out_1", load: loadBulkOut, door: doorNet, conns: 1, unit: "Gbit/s", quickRounds: 3, vsGVisor: 1.5, vsKernel: 0.4, value: gbitPerSecond},
	{name: "net_pingpong_64", load: loadPingPong, door: doorNet, conns: 64, unit: "requests/s", quickRounds: 3, vsGVisor: 1.5, vsKernel: 0.5, value: perSecond},
	{name: "http_shard", load: loadHTTP, door: doorShard, conns: 64, unit: "requests/s", quickRounds: 3, vsGVisor: 1.5, vsKernel: 0.8, value: perSecond},
	{name: "http_net", load: loadHTTP, door: doorNet, conns: 64, unit: "requests/s", quickRounds: 3, vsGVisor: 1.5, vsKernel: 0.5, value: perSecond},
	{name: "idle_events", load: loadIdle, door: doorEvents, unit: "bytes/connection", quickRounds: 1, lower: true, value: bytesPerConn},
	{name: "idle_shard", load: loadIdle, door: doorShard, unit: "bytes/connection", quickRounds: 1, lower: true, value: bytesPerConn},
	{name: "idle_net", load: loadIdle, door: doorNet, unit: "bytes/connection", quickRounds: 1, lower: true, value: bytesPerConn},
}

// app names the application that serves numastack's side of r; empty: this program does.
func (r row) app() string {
	switch {
	case r.load == loadHTTP:
		return "httpd"
	case r.load != loadIdle && r.door == doorEvents:
		return "echo"
	default:
		return ""
	}
}

// maxIdleRounds bounds the rounds of the idle rows: memory hardly varies.
const maxIdleRounds = 3

// rounds returns how many samples a run takes of r.
func (r row) rounds(o options) int {
	n := o.rounds
	if o.quick && r.quickRounds > 0 {
		n = min(n, r.quickRounds)
	}
	if r.load == loadIdle {
		n = min(n, maxIdleRounds)
	}
	return n
}

// measures reports whether peer has a place in r. gVisor's memory per connection is of no
// use to anybody here, and 20,000 of its connections take long to open.
func (r row) measures(peer string) bool {
	return r.load != loadIdle || peer != peerGVisor
}

// sampleKey says what makes two samples of one round the same measurement.
type sampleKey struct {
	peer  string
	load  load
	conns int
	door  door
	spin  bool
}

// key lets rows share the samples of peers that do the same in both: what differs is
// which of numastack's doors the figure is compared with.
func (r row) key(peer string) sampleKey {
	k := sampleKey{peer: peer, load: r.load, conns: r.conns}
	if peer == peerNumastack || r.load == loadHTTP {
		k.door = r.door
	}
	k.spin = r.spin && peer == peerNumastack
	return k
}

// minScaling is the least that eight streams may reach of what one stream reaches.
const minScaling = 0.85

// cell is one figure of the report.
type cell struct{ row, peer string }

// cellTarget holds one cell to another: at least limit times as much.
type cellTarget struct {
	name       string
	over, base cell
	limit      float64
}

// scalingTargets compare numastack with itself.
var scalingTargets = []cellTarget{
	{"bulk_in_8 / bulk_in_1 of numastack", cell{"bulk_in_8", peerNumastack}, cell{"bulk_in_1", peerNumastack}, minScaling},
	{"bulk_out_8 / bulk_out_1 of numastack", cell{"bulk_out_8", peerNumastack}, cell{"bulk_out_1", peerNumastack}, minScaling},
}

// libraryTargets compare what a user would change from and to.
var libraryTargets = []cellTarget{
	{"http_shard of numastack / http_net of kernel", cell{"http_shard", peerNumastack}, cell{"http_net", peerKernel}, 1.2},
}

// sample is what one client process reports about one window.
type sample struct {
	Elapsed time.Duration `json:"elapsed_ns"`
	CPU     time.Duration `json:"cpu_ns"` // user and system time of the server process
	Bytes   int64         `json:"bytes"`
	Ops     int64         `json:"ops"`
	// Latency percentiles; zero for bulk and idle loads.
	P50 time.Duration `json:"p50_ns"`
	P99 time.Duration `json:"p99_ns"`
	Max time.Duration `json:"max_ns"`
	// Memory is what the server took for Ops open connections; zero for all other loads.
	Memory memory `json:"memory"`
}

func gbitPerSecond(s sample) float64 { return float64(s.Bytes) * 8 / float64(s.Elapsed) }
func perSecond(s sample) float64     { return float64(s.Ops) / s.Elapsed.Seconds() }
func medianMicros(s sample) float64  { return micros(s.P50) }
func bytesPerConn(s sample) float64  { return float64(s.Memory.RSS) / float64(s.Ops) }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// cpuCost returns the server's CPU per byte for bulk loads (in cycles when the TSC rate is
// known, else in ns) and per operation in µs for the others. An idle load has no unit: it
// costs no CPU.
func (r row) cpuCost(s sample, tscHz float64) (cost float64, unit string) {
	switch {
	case r.load == loadIdle:
		return 0, ""
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
