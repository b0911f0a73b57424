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
	peerGVisorGSO = "gvisor_gso"
	peerKernel    = "kernel"
	peerLimit     = "limit"
)

var peerOrder = []string{peerNumastack, peerGVisor, peerGVisorGSO, peerKernel, peerLimit}

// load is what the client does with the server.
type load string

const (
	loadBulkIn   load = "bulk_in"  // client to discard
	loadBulkOut  load = "bulk_out" // chargen to client
	loadPingPong load = "pingpong" // echo, one request outstanding per connection
	loadLatency  load = "latency"  // echo at a given rate, whether or not answers come (open loop)
	loadUDPIn    load = "udp_in"   // datagrams to discard, as fast as the client sends
	loadUDPOut   load = "udp_out"  // datagrams from chargen, as the client asks for them
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

const (
	// messageBytes is the size of a request and of its answer, unless the row has another.
	messageBytes = 64
	// standardMTU of TAP and veth, in bytes, unless the row has another.
	standardMTU = 1500
	// udpHeaders are the bytes of an IPv4 header without options and of a UDP header.
	udpHeaders = 20 + 8
)

// row is one line of the comparison.
type row struct {
	name  string
	load  load
	door  door
	conns int // 0: options.idleConns
	unit  string
	size  int // of a message or datagram in bytes; 0: messageBytes, udpGSO: as large as the MTU allows
	mtu   int // 0: standardMTU
	// full leaves the row out of a -quick run that does not name it.
	full bool
	// shards of numastack, which is then alone in the row; 0: 1, beside peers.
	shards int
	// quickRounds bounds the rounds of a -quick run, 0: does not.
	quickRounds int
	// copies has numastack's chargen send with Write, like a server that has made what it
	// sends just now, instead of a block that needs no copy.
	copies bool
	// lower is set where a smaller figure is better.
	lower bool
	// spin is how long numastack looks for frames before it sleeps; 0: its default.
	spin time.Duration
	// Targets for the ratio numastack / peer: at least, or at most where lower is set; 0:
	// none, the peer's figure is only shown.
	vsGVisor, vsKernel float64
	value              func(sample) float64
}

const (
	spinLong  = time.Second // longer than any answer takes
	spinNever = -1
)

var allRows = []row{
	{name: "bulk_in_1", load: loadBulkIn, door: doorEvents, conns: 1, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_in_8", load: loadBulkIn, door: doorEvents, conns: 8, unit: "Gbit/s", vsGVisor: 6, vsKernel: 0.5, value: gbitPerSecond},
	{name: "bulk_out_1", load: loadBulkOut, door: doorEvents, conns: 1, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "bulk_out_8", load: loadBulkOut, door: doorEvents, conns: 8, unit: "Gbit/s", vsGVisor: 10, vsKernel: 0.55, value: gbitPerSecond},
	{name: "pingpong_1", load: loadPingPong, door: doorEvents, conns: 1, unit: "µs", lower: true, spin: spinLong, vsGVisor: 0.5, vsKernel: 0.7, value: medianMicros},
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

	{name: "bulk_in_32", load: loadBulkIn, door: doorEvents, conns: 32, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_in_128", load: loadBulkIn, door: doorEvents, conns: 128, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_32", load: loadBulkOut, door: doorEvents, conns: 32, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_128", load: loadBulkOut, door: doorEvents, conns: 128, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_1_copy", load: loadBulkOut, door: doorEvents, conns: 1, unit: "Gbit/s", full: true, copies: true, value: gbitPerSecond},
	{name: "bulk_out_8_copy", load: loadBulkOut, door: doorEvents, conns: 8, unit: "Gbit/s", full: true, copies: true, value: gbitPerSecond},
	{name: "bulk_out_128_copy", load: loadBulkOut, door: doorEvents, conns: 128, unit: "Gbit/s", full: true, copies: true, value: gbitPerSecond},
	{name: "bulk_in_1_mtu9000", load: loadBulkIn, door: doorEvents, conns: 1, mtu: 9000, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_in_8_mtu9000", load: loadBulkIn, door: doorEvents, conns: 8, mtu: 9000, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_1_mtu9000", load: loadBulkOut, door: doorEvents, conns: 1, mtu: 9000, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_8_mtu9000", load: loadBulkOut, door: doorEvents, conns: 8, mtu: 9000, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_in_1_mtu65521", load: loadBulkIn, door: doorEvents, conns: 1, mtu: 65521, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_in_8_mtu65521", load: loadBulkIn, door: doorEvents, conns: 8, mtu: 65521, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_1_mtu65521", load: loadBulkOut, door: doorEvents, conns: 1, mtu: 65521, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "bulk_out_8_mtu65521", load: loadBulkOut, door: doorEvents, conns: 8, mtu: 65521, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "pingpong_1_sleep", load: loadPingPong, door: doorEvents, conns: 1, unit: "µs", lower: true, spin: spinNever, full: true, value: medianMicros},
	{name: "pingpong_1_1b", load: loadPingPong, door: doorEvents, conns: 1, size: 1, unit: "µs", lower: true, spin: spinLong, full: true, value: medianMicros},
	{name: "pingpong_1_1k", load: loadPingPong, door: doorEvents, conns: 1, size: 1 << 10, unit: "µs", lower: true, spin: spinLong, full: true, value: medianMicros},
	{name: "pingpong_1_16k", load: loadPingPong, door: doorEvents, conns: 1, size: 16 << 10, unit: "µs", lower: true, spin: spinLong, full: true, value: medianMicros},
	{name: "pingpong_64_1b", load: loadPingPong, door: doorEvents, conns: 64, size: 1, unit: "requests/s", full: true, value: perSecond},
	{name: "pingpong_64_1k", load: loadPingPong, door: doorEvents, conns: 64, size: 1 << 10, unit: "requests/s", full: true, value: perSecond},
	{name: "pingpong_64_16k", load: loadPingPong, door: doorEvents, conns: 64, size: 16 << 10, unit: "requests/s", full: true, value: perSecond},
	{name: "pingpong_512", load: loadPingPong, door: doorEvents, conns: 512, unit: "requests/s", full: true, value: perSecond},
	{name: "latency_1", load: loadLatency, door: doorEvents, conns: 1, unit: "µs", lower: true, full: true, value: p99Micros},
	{name: "latency_64", load: loadLatency, door: doorEvents, conns: 64, unit: "µs", lower: true, full: true, value: p99Micros},
	{name: "udp_in_64", load: loadUDPIn, door: doorEvents, conns: 1, unit: "datagrams/s", full: true, value: perSecond},
	{name: "udp_in_gso", load: loadUDPIn, door: doorEvents, conns: 1, size: udpGSO, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "udp_out_64", load: loadUDPOut, door: doorEvents, conns: 1, unit: "datagrams/s", full: true, value: perSecond},
	{name: "udp_out_gso", load: loadUDPOut, door: doorEvents, conns: 1, size: udpGSO, unit: "Gbit/s", full: true, value: gbitPerSecond},
	{name: "shards_1", load: loadPingPong, door: doorEvents, conns: 64, shards: 1, spin: spinNever, unit: "µs CPU/op", lower: true, full: true, value: cpuMicrosPerOp},
	{name: "shards_2", load: loadPingPong, door: doorEvents, conns: 64, shards: 2, spin: spinNever, unit: "µs CPU/op", lower: true, full: true, value: cpuMicrosPerOp},
	{name: "shards_4", load: loadPingPong, door: doorEvents, conns: 64, shards: 4, spin: spinNever, unit: "µs CPU/op", lower: true, full: true, value: cpuMicrosPerOp},
}

// udpGSO as a row's size stands for the largest datagram that the MTU allows, as many of
// them in one frame as UDP segmentation offload takes.
const udpGSO = -1

// linkMTU is the MTU of r in bytes.
func (r row) linkMTU() int {
	if r.mtu != 0 {
		return r.mtu
	}
	return standardMTU
}

// messageSize is the size of a request or datagram of r in bytes.
func (r row) messageSize() int {
	switch r.size {
	case 0:
		return messageBytes
	case udpGSO:
		return r.linkMTU() - udpHeaders
	default:
		return r.size
	}
}

// queueLen is how many frames may wait in a peer's TAP; 0: its default. Where no window holds
// the client back, the queue is always full, and with numastack's 4096 frames of 64 KiB it
// would never be in the cache: so it has about the bytes of a window.
func (r row) queueLen(peer string) int {
	const window, most = 1 << 20, 4096
	switch {
	case peer != peerLimit && r.load != loadUDPIn && r.load != loadUDPOut:
		return 0
	case r.perByte():
		return window / (64 << 10)
	default:
		return min(window/r.messageSize(), most)
	}
}

// ownServer reports whether this program serves numastack's side of r, not an application.
func (r row) ownServer() bool { return r.app() == "" }

// perByte reports whether bytes are what r counts, rather than operations.
func (r row) perByte() bool {
	return r.load == loadBulkIn || r.load == loadBulkOut || r.size == udpGSO
}

// timed reports whether r's samples have latencies.
func (r row) timed() bool {
	switch r.load {
	case loadPingPong, loadLatency, loadShort, loadHTTP:
		return true
	default:
		return false
	}
}

// quickRows are those of a -quick run.
func quickRows() []row {
	return slices.DeleteFunc(slices.Clone(allRows), func(r row) bool { return r.full })
}

// app names the application that serves numastack's side of r; empty: this program does.
func (r row) app() string {
	switch {
	case r.load == loadHTTP:
		return "httpd"
	case r.load == loadUDPIn || r.load == loadUDPOut || r.load == loadIdle || r.door != doorEvents || r.copies:
		return ""
	default:
		return "echo"
	}
}

// maxIdleRounds bounds the rounds of the idle rows: memory hardly varies.
const maxIdleRounds = 3

// maxFullRounds bounds the rounds of the rows that only a full run has, so that its 1,100
// samples end within 40 minutes. Fewer than four samples against four could never differ
// significantly (Mann and Whitney, 1947).
const maxFullRounds = 6

// quickLimitRounds bounds the limit's rounds of a -quick run: it has no target.
const quickLimitRounds = 2

// rounds returns how many samples a run takes of r.
func (r row) rounds(o options) int {
	n := o.rounds
	if o.quick && r.quickRounds > 0 {
		n = min(n, r.quickRounds)
	}
	if r.full {
		n = min(n, maxFullRounds)
	}
	if r.load == loadIdle {
		n = min(n, maxIdleRounds)
	}
	return n
}

// peerRounds returns how many samples of r a run takes of peer.
func (r row) peerRounds(peer string, o options) int {
	if o.quick && peer == peerLimit {
		return min(r.rounds(o), quickLimitRounds)
	}
	return r.rounds(o)
}

// measures reports whether peer has a place in r.
func (r row) measures(peer string) bool {
	stream := r.load == loadBulkIn || r.load == loadBulkOut
	datagrams := r.load == loadUDPIn || r.load == loadUDPOut
	switch {
	case peer == peerNumastack:
		return true
	case r.shards != 0:
		return false // numastack against itself
	case peer == peerLimit:
		return stream && r.door == doorEvents || datagrams
	case peer == peerGVisor || peer == peerGVisorGSO:
		// Its memory per connection is of no use to anybody here, and 20,000 of its
		// connections take long to open. With a vnet header it takes a frame of many
		// datagrams for one datagram.
		return r.load != loadIdle && (peer == peerGVisor || r.load != loadUDPIn || r.size != udpGSO)
	default:
		return true
	}
}

// sampleKey says what makes two samples of one round the same measurement.
type sampleKey struct {
	peer  string
	load  load
	conns int
	door  door
	spin  time.Duration
	size  int
	mtu   int
	// shards is the row's, so that 0, one shard beside peers, differs from 1.
	shards int
	copies bool
}

// key lets rows share the samples of peers that do the same in both: what differs is
// which of numastack's doors the figure is compared with.
func (r row) key(peer string) sampleKey {
	k := sampleKey{peer: peer, load: r.load, conns: r.conns, size: r.messageSize(), mtu: r.linkMTU(), shards: r.shards}
	if peer == peerLimit {
		k.conns = 0 // it knows no connections
	}
	if peer == peerNumastack || r.load == loadHTTP {
		k.door = r.door
	}
	if peer == peerNumastack {
		k.spin, k.copies = r.spin, r.copies
	}
	return k
}

const (
	// minScaling is the least that many streams may reach of what one stream reaches.
	minScaling = 0.85
	// maxShardCost is the most that an operation may cost on four shards of what it
	// costs on one.
	maxShardCost = 1.1
)

// cell is one figure of the report.
type cell struct{ row, peer string }

// cellTarget holds one cell to another: at least limit times as much.
type cellTarget struct {
	name       string
	over, base cell
	limit      float64
	lower      bool // at most limit times as much instead
}

// scalingTargets compare numastack with itself.
var scalingTargets = []cellTarget{
	numastackTarget("bulk_in_8", "bulk_in_1", minScaling, false),
	numastackTarget("bulk_out_8", "bulk_out_1", minScaling, false),
	numastackTarget("bulk_in_128", "bulk_in_1", minScaling, false),
	numastackTarget("bulk_out_128", "bulk_out_1", minScaling, false),
	numastackTarget("shards_4", "shards_1", maxShardCost, true),
}

func numastackTarget(over, base string, limit float64, lower bool) cellTarget {
	return cellTarget{over + " / " + base + " of numastack", cell{over, peerNumastack}, cell{base, peerNumastack}, limit, lower}
}

// libraryTargets compare what a user would change from and to.
var libraryTargets = []cellTarget{
	{"http_shard of numastack / http_net of kernel", cell{"http_shard", peerNumastack}, cell{"http_net", peerKernel}, 1.2, false},
}

// sample is what one client process reports about one window.
type sample struct {
	Elapsed time.Duration `json:"elapsed_ns"`
	CPU     time.Duration `json:"cpu_ns"` // user and system time of the server process
	Bytes   int64         `json:"bytes"`
	Ops     int64         `json:"ops"`
	// Latency percentiles; zero for bulk and idle loads.
	P50 time.Duration `json:"p50_ns"`
	// Curve holds the percentiles of curvePoints; zero unless the load has a rate.
	Curve [len(curvePoints)]time.Duration `json:"curve_ns,omitzero"`
	// Rate is what the client was to ask for, in requests/s; 0: as many as were answered.
	Rate float64 `json:"rate,omitempty"`
	// Late is the 99th percentile of how late the client itself sent them.
	Late time.Duration `json:"late_ns,omitempty"`
	P99  time.Duration `json:"p99_ns"`
	Max  time.Duration `json:"max_ns"`
	// Memory is what the server took for Ops open connections; zero for all other loads.
	Memory memory `json:"memory"`
	// Traffic is what numastack counted, where an application with counters served; see newTraffic.
	Traffic *traffic `json:"-"`
}

func gbitPerSecond(s sample) float64 { return float64(s.Bytes) * 8 / float64(s.Elapsed) }
func perSecond(s sample) float64     { return float64(s.Ops) / s.Elapsed.Seconds() }
func medianMicros(s sample) float64  { return micros(s.P50) }
func p99Micros(s sample) float64     { return micros(s.P99) }
func bytesPerConn(s sample) float64  { return float64(s.Memory.RSS) / float64(s.Ops) }

func cpuMicrosPerOp(s sample) float64 { return micros(s.CPU) / float64(s.Ops) }

// curvePoints are the percentiles of a latency curve; the last one is the maximum.
var curvePoints = [...]float64{1, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 100}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// cpuCost returns the server's CPU per byte for bulk loads (in cycles when the TSC rate is
// known, else in ns) and per operation in µs for the others. An idle load has no unit: it
// costs no CPU.
func (r row) cpuCost(s sample, tscHz float64) (cost float64, unit string) {
	switch {
	case r.load == loadIdle:
		return 0, ""
	case !r.perByte():
		return cpuMicrosPerOp(s), "µs/op"
	case tscHz > 0:
		return s.CPU.Seconds() * tscHz / float64(s.Bytes), "cycles/byte"
	default:
		return float64(s.CPU.Nanoseconds()) / float64(s.Bytes), "ns/byte"
	}
}

// selectRows returns the rows whose name, or a prefix of it, is in the comma-separated
// list. The empty list selects all, or those of a -quick run.
func selectRows(list string, quick bool) ([]row, error) {
	switch {
	case list == "" && quick:
		return quickRows(), nil
	case list == "":
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
