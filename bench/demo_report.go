package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// demoReport collects what the demo prints at its end.
type demoReport struct {
	env    environment
	client string
	shards int
	lines  []demoLine
	apps   []appStats
}

// demoLine is one load.
type demoLine struct {
	name     string
	gbit     float64
	requests float64 // per second; 0 for streams
	p50, p99 float64 // µs; 0 for streams

	udp         bool
	lossPercent float64

	cpuPerByte float64
	cpuUnit    string
}

// setCPU notes the server's CPU per byte in cycles, or in ns where the TSC's rate is not
// known.
func (l *demoLine) setCPU(cpu time.Duration, bytes int64, tscHz float64) {
	bulk := row{load: loadBulkIn}
	l.cpuPerByte, l.cpuUnit = bulk.cpuCost(sample{CPU: cpu, Bytes: bytes}, tscHz)
}

// appStats is the file an application writes for -stats-json.
type appStats struct {
	app    string
	Shards []shardStats `json:"shards"`
}

// shardStats are the counters of one shard that this program shows or reckons with.
type shardStats struct {
	Shard     int    `json:"shard"`
	CPU       int    `json:"cpu"`
	Node      int    `json:"node"`
	RxFrames  uint64 `json:"rx_frames"`
	RxBytes   uint64 `json:"rx_bytes"`
	TxFrames  uint64 `json:"tx_frames"`
	TxBytes   uint64 `json:"tx_bytes"`
	Missteer  uint64 `json:"missteered"`
	Forwarded uint64 `json:"forwarded"`
	Dropped   uint64 `json:"dropped"`
	Turns     uint64 `json:"turns"`
	Wakes     uint64 `json:"wakes"`

	Stages []stageTime `json:"stages"`
}

// stageTime is how long a stage of the turn took in those turns that were timed.
type stageTime struct {
	Stage string `json:"stage"`
	Count uint64 `json:"count"` // timed turns in which it took any time
	Total uint64 `json:"total_ns"`
	Max   uint64 `json:"max_ns"`
}

// readCounters reads that file.
func readCounters(path string) (appStats, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return appStats{}, fmt.Errorf("read the server's counters: %w", err)
	}
	var counted appStats
	if err := json.Unmarshal(content, &counted); err != nil {
		return appStats{}, fmt.Errorf("the server's counters in %s: %w", path, err)
	}
	return counted, nil
}

// add keeps a line for the table, and prints it as progress.
func (rep *demoReport) add(l demoLine) {
	rep.lines = append(rep.lines, l)
	progress := fmt.Sprintf("%.2f Gbit/s", l.gbit)
	if l.requests > 0 {
		progress = fmt.Sprintf("%.0f requests/s", l.requests)
	}
	fmt.Printf("  %s: %s\n", l.name, progress)
}

func (rep *demoReport) write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s, %d CPUs, Linux %s, %s, MTU %d, %d shards\nstreams driven by %s\n\n",
		rep.env.CPU, rep.env.CPUs, rep.env.Kernel, rep.env.Go, rep.env.MTU, rep.shards, rep.client)

	unit := "CPU/byte"
	if len(rep.lines) > 0 {
		unit = rep.lines[0].cpuUnit
	}
	t := newGrid(&b)
	t.line("load", "", "Gbit/s", "requests/s", "p50 µs", "p99 µs", unit, "lost")
	for _, l := range rep.lines {
		requests, p50, p99, lost := "-", "-", "-", "-"
		if l.requests > 0 {
			requests, p50, p99 = figure(&l.requests), figure(&l.p50), figure(&l.p99)
		}
		if l.udp {
			lost = fmt.Sprintf("%.2f %%", l.lossPercent)
		}
		t.line(l.name, "", fmt.Sprintf("%.2f", l.gbit), requests, p50, p99, figure(&l.cpuPerByte), lost)
	}
	t.flush()

	fmt.Fprintln(&b)
	t = newGrid(&b)
	t.line("application", "shard", "cpu", "node", "frames in", "frames out", "mis-steered", "forwarded", "dropped", "frames/wake")
	for _, a := range rep.apps {
		for _, s := range a.Shards {
			t.line("apps/"+a.app, fmt.Sprint(s.Shard), fmt.Sprint(s.CPU), fmt.Sprint(s.Node),
				fmt.Sprint(s.RxFrames), fmt.Sprint(s.TxFrames), fmt.Sprint(s.Missteer),
				fmt.Sprint(s.Forwarded), fmt.Sprint(s.Dropped), framesPerWake(s))
		}
	}
	t.flush()
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the table: %w", err)
	}
	return nil
}

// framesPerWake is what moderation is about: how much work one sleep and wake-up paid for.
func framesPerWake(s shardStats) string {
	if s.Wakes == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f", float64(s.RxFrames)/float64(s.Wakes))
}

// iperfResult is what the receiving side of an iperf3 test counted.
type iperfResult struct {
	bytes       int64
	gbit        float64
	lossPercent float64
}

// parseIperf reads the JSON of an iperf3 client (seen with 3.12).
func parseIperf(out []byte, udp bool) (iperfResult, error) {
	type sum struct {
		Bytes         float64 `json:"bytes"`
		BitsPerSecond float64 `json:"bits_per_second"`
		LostPercent   float64 `json:"lost_percent"`
		Packets       float64 `json:"packets"`
	}
	var parsed struct {
		Error string `json:"error"`
		End   struct {
			Sum         sum `json:"sum"`          // UDP
			SumReceived sum `json:"sum_received"` // TCP
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &parsed); err != nil {
		return iperfResult{}, fmt.Errorf("iperf3 printed %d bytes that are no JSON: %w", len(out), err)
	}
	if parsed.Error != "" {
		return iperfResult{}, fmt.Errorf("iperf3: %s", parsed.Error)
	}
	received := parsed.End.SumReceived
	r := iperfResult{bytes: int64(received.Bytes), gbit: received.BitsPerSecond / 1e9}
	if udp {
		// The UDP sum counts what was sent, and the share of it that was lost.
		s := parsed.End.Sum
		arrived := 1 - s.LostPercent/100
		r = iperfResult{
			bytes: int64(s.Bytes * arrived), gbit: s.BitsPerSecond * arrived / 1e9,
			lossPercent: s.LostPercent,
		}
	}
	if r.bytes <= 0 {
		return iperfResult{}, fmt.Errorf("iperf3: the receiver counted %d bytes", r.bytes)
	}
	return r, nil
}
