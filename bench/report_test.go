package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// compareGolden holds got to a file in testdata.
func compareGolden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("differs from %s (rewrite it with -update):\n%s", path, got)
	}
}

func TestMedian(t *testing.T) {
	tests := []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1, 5}, 5},
		{[]float64{4, 1, 2, 100}, 3},
	}
	for _, tt := range tests {
		before := append([]float64(nil), tt.values...)
		if got := median(tt.values); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", before, got, tt.want)
		}
		for i := range before {
			if tt.values[i] != before[i] {
				t.Errorf("median changed its argument %v to %v", before, tt.values)
			}
		}
	}
}

func TestTarget(t *testing.T) {
	tests := []struct {
		ratio, limit float64
		lower, met   bool
	}{
		{ratio: 6.01, limit: 6, met: true},
		{ratio: 6, limit: 6, met: true},
		{ratio: 5.99, limit: 6, met: false},
		{ratio: 0.49, limit: 0.5, lower: true, met: true},
		{ratio: 0.5, limit: 0.5, lower: true, met: true},
		{ratio: 0.51, limit: 0.5, lower: true, met: false},
		{ratio: math.NaN(), limit: 0.5, met: false},
		{ratio: math.NaN(), limit: 0.5, lower: true, met: false},
	}
	for _, tt := range tests {
		if got := newTarget("", tt.ratio, tt.limit, tt.lower); got.Met != tt.met {
			t.Errorf("%s %v with %v: met = %t, want %t", got.Bound, tt.limit, tt.ratio, got.Met, tt.met)
		}
	}
}

// testReport has a row of each kind, a peer without samples, a miss and a failure.
func testReport() *report {
	env := environment{
		Time: "2026-01-02T03:04:05Z", Commit: "0123456", Go: "go1.26", Kernel: "6.18.0",
		CPU: "Test CPU", CPUs: 2, TSCHz: 2.5e9, ServerCPU: 0, ClientCPU: 1,
		Rounds: 3, SampleSec: 1, MTU: 1500, HTTPClient: "wrk", IdleConns: 1000,
	}
	bulk := func(gbit ...float64) []sample {
		var s []sample
		for _, g := range gbit {
			s = append(s, sample{Elapsed: time.Second, CPU: time.Second, Bytes: int64(g * 1e9 / 8)})
		}
		return s
	}
	ops := func(p50 time.Duration, counts ...int64) []sample {
		var s []sample
		for _, n := range counts {
			s = append(s, sample{Elapsed: 2 * time.Second, CPU: time.Second, Ops: n, P50: p50, P99: 3 * p50, Max: 9 * p50})
		}
		return s
	}
	return newReport(env, quickRows(), map[string]map[string][]sample{
		"bulk_in_1": {
			peerNumastack: bulk(21, 18, 20), peerGVisor: bulk(2.5, 2, 1.5), peerKernel: bulk(40, 30, 50),
			peerGVisorGSO: bulk(8), peerLimit: bulk(60, 80),
		},
		"bulk_in_8": {
			peerNumastack: bulk(15, 16, 17), peerGVisor: bulk(1, 1, 1), peerKernel: bulk(40, 40, 40),
		},
		"bulk_out_1": {peerNumastack: bulk(25), peerKernel: bulk(30)},
		"pingpong_1": {
			peerNumastack: ops(30*time.Microsecond, 100000), peerGVisor: ops(100*time.Microsecond, 20000),
			peerKernel: ops(40*time.Microsecond, 30000),
		},
		"pingpong_64": {
			peerNumastack: ops(600*time.Microsecond, 200000), peerGVisor: ops(time.Millisecond, 100000),
			peerKernel: ops(500*time.Microsecond, 260000),
		},
		"http_shard": {
			peerNumastack: ops(time.Millisecond, 180000), peerGVisor: ops(2*time.Millisecond, 60000),
			peerKernel: ops(500*time.Microsecond, 240000),
		},
		"http_net": {peerKernel: ops(time.Millisecond, 160000)},
		"idle_net": {
			peerNumastack: {{Elapsed: time.Second, Ops: 1000, Memory: memory{RSS: 16e6, Heap: 12e6, Stacks: 3e6}}},
			peerKernel:    {{Elapsed: time.Second, Ops: 1000, Memory: memory{RSS: 8e6, Heap: 5e6, Stacks: 2e6}}},
		},
		"short": {peerNumastack: nil, peerGVisor: ops(time.Millisecond, 14000)},
	}, []string{"round 1, short, numastack: echo ended with exit status 1"})
}

func TestReportGolden(t *testing.T) {
	var table, object bytes.Buffer
	rep := testReport()
	if err := rep.writeTable(&table); err != nil {
		t.Fatal(err)
	}
	if err := rep.writeJSON(&object); err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "report.txt", table.Bytes())
	compareGolden(t, "report.json", object.Bytes())
}

func TestReportTargets(t *testing.T) {
	rep := testReport()
	// Per row vs gVisor and vs kernel; then the two scaling pairs, one of them measured, and
	// the one of libraries.
	want := map[string][2]any{
		"bulk_in_1":   {true, true},
		"bulk_in_8":   {true, false},
		"bulk_out_1":  {nil, true},
		"bulk_out_8":  {nil, nil},
		"pingpong_1":  {true, false},
		"pingpong_64": {true, true},
		"short":       {nil, nil},
		"http_shard":  {true, false},
	}
	met, all := 0, 0
	for _, r := range rep.Rows {
		for i, target := range []*target{r.VsGVisor, r.VsKernel} {
			var got any
			if target != nil {
				got = target.Met
				all++
				if target.Met {
					met++
				}
			}
			if got != want[r.Name][i] {
				t.Errorf("%s, ratio %d: met is %v, want %v", r.Name, i, got, want[r.Name][i])
			}
		}
	}
	if len(rep.Scaling) != 1 || rep.Scaling[0].Ratio != 0.8 || rep.Scaling[0].Met {
		t.Errorf("scaling is %+v, want one ratio of 0.8 that misses", rep.Scaling)
	}
	if len(rep.Libraries) != 1 || rep.Libraries[0].Ratio != 1.125 || rep.Libraries[0].Met {
		t.Errorf("libraries is %+v, want one ratio of 1.125 that misses", rep.Libraries)
	}
	if rep.TargetsMet != met || rep.Targets != all+2 {
		t.Errorf("%d of %d targets, want %d of %d", rep.TargetsMet, rep.Targets, met, all+2)
	}
}

// Other programs read these keys.
func TestReportKeys(t *testing.T) {
	var object bytes.Buffer
	if err := testReport().writeJSON(&object); err != nil {
		t.Fatal(err)
	}
	var parsed struct {
		Rows []map[string]any `json:"rows"`
	}
	if err := json.Unmarshal(object.Bytes(), &parsed); err != nil {
		t.Fatal(err)
	}
	if len(parsed.Rows) != len(quickRows()) {
		t.Fatalf("%d rows, want %d", len(parsed.Rows), len(quickRows()))
	}
	first := parsed.Rows[0]
	for key, want := range map[string]any{
		"name": "bulk_in_1", "unit": "Gbit/s", "numastack": 20.0, "gvisor": 2.0, "kernel": 40.0,
	} {
		if first[key] != want {
			t.Errorf("%q is %v, want %v", key, first[key], want)
		}
	}
	for i, name := range []string{
		"bulk_in_1", "bulk_in_8", "bulk_out_1", "bulk_out_8", "pingpong_1", "pingpong_64", "short",
		"net_in_1", "net_out_1", "net_pingpong_64", "http_shard", "http_net", "idle_events", "idle_shard", "idle_net",
	} {
		if parsed.Rows[i]["name"] != name {
			t.Errorf("row %d is %v, want %s", i, parsed.Rows[i]["name"], name)
		}
	}
}

func TestCPUCost(t *testing.T) {
	tests := []struct {
		load  load
		tscHz float64
		cost  float64
		unit  string
	}{
		{loadBulkIn, 2e9, 4, "cycles/byte"},
		{loadBulkOut, 2e9, 4, "cycles/byte"},
		{loadBulkIn, 0, 2, "ns/byte"},
		{loadPingPong, 2e9, 20, "µs/op"},
		{loadShort, 0, 20, "µs/op"},
		{loadHTTP, 2e9, 20, "µs/op"},
		{loadIdle, 2e9, 0, ""},
	}
	s := sample{CPU: 2 * time.Millisecond, Bytes: 1e6, Ops: 100}
	for _, tt := range tests {
		cost, unit := row{load: tt.load}.cpuCost(s, tt.tscHz)
		if math.Abs(cost-tt.cost) > 1e-9 || unit != tt.unit {
			t.Errorf("%s at %v Hz: %v %s, want %v %s", tt.load, tt.tscHz, cost, unit, tt.cost, tt.unit)
		}
	}
}
