package main

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
)

func near(got, want float64) bool { return math.Abs(got-want) <= 1e-9*math.Abs(want) }

func TestParseMix(t *testing.T) {
	tests := []struct {
		list string
		mean float64
		text string
		err  string
	}{
		{list: "1500:0.5,64:0.5", mean: 782, text: "1500:0.5,64:0.5"},
		{list: "65549:1", mean: 65549, text: "65549"},
		{list: "60:0.9,1514:0.1", mean: 205.4, text: "60:0.9,1514:0.1"},
		{list: "", err: `"" has no colon`},
		{list: "1500", err: `"1500" has no colon`},
		{list: "1500:0.5", err: "the shares add up to 0.5"},
		{list: "1500:0.5,64:0.6", err: "the shares add up to 1.1"},
		{list: "59:1", err: `size "59"`},
		{list: "65550:1", err: `size "65550"`},
		{list: "many:1", err: `size "many"`},
		{list: "64:-1", err: `share "-1"`},
		{list: "64:NaN", err: `share "NaN"`},
		{list: "64:1,", err: `"" has no colon`},
	}
	for _, tt := range tests {
		mix, err := parseMix(tt.list)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), "must be SIZE:SHARE") {
				t.Errorf("%q: error is %v, want one with %q and what is accepted", tt.list, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.list, err)
		} else if !near(mix.mean(), tt.mean) || mix.String() != tt.text {
			t.Errorf("%q: %s of %v bytes, want %s of %v", tt.list, mix, mix.mean(), tt.text, tt.mean)
		}
	}
}

// The fit finds the cost that made the samples.
func TestFitCost(t *testing.T) {
	want := cost{perFrame: 2e-6, perByte: 0.3e-9}
	spend := func(rx, rxSize, tx, txSize float64) traffic {
		s := traffic{RxFrames: rx, RxBytes: rx * rxSize, TxFrames: tx, TxBytes: tx * txSize}
		s.CPUSeconds = s.frames()*want.perFrame + s.bytes()*want.perByte
		return s
	}
	large, small := spend(40_000, 60_000, 20_000, 66), spend(90_000, 130, 90_000, 130)
	got, err := fitCost(large, small)
	if err != nil || !near(got.perFrame, want.perFrame) || !near(got.perByte, want.perByte) {
		t.Errorf("fit is %+v, error %v, want %+v", got, err, want)
	}
	cheap := large
	cheap.CPUSeconds = 0.001 // cheaper than the frames alone
	for name, pair := range map[string][2]traffic{"the same sizes": {small, small}, "a negative cost": {cheap, small}} {
		if c, err := fitCost(pair[0], pair[1]); err == nil {
			t.Errorf("%s: fit is %+v, want an error", name, c)
		}
	}
}

// Checked by hand: 10 Gbit/s are 14,204,545 frames/s of 64 + 24 bytes, and 812,744 of 1514 + 24.
func TestCores(t *testing.T) {
	c := cost{perFrame: 1e-6, perByte: 1e-9}
	for _, tt := range []struct{ bytes, cores, gbit float64 }{
		{64, 10e9 / 8 / 88 * 1.064e-6, 88 * 8 / 1.064e-6 / 1e9},
		{1514, 812_743.8231469441 * 2.514e-6, 1538 * 8 / 2.514e-6 / 1e9},
	} {
		if got := c.cores(10, tt.bytes); !near(got, tt.cores) {
			t.Errorf("%v bytes: %v cores, want %v", tt.bytes, got, tt.cores)
		}
		if got := c.gbit(tt.bytes); !near(got, tt.gbit) || !near(got*c.cores(10, tt.bytes), 10) {
			t.Errorf("%v bytes: one core carries %v Gbit/s, want %v", tt.bytes, got, tt.gbit)
		}
	}
}

func TestCapacityGolden(t *testing.T) {
	var b bytes.Buffer
	if err := trafficReport(t).writeCapacity(&b, nil); err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "capacity.txt", b.Bytes())
}

func TestCostOf(t *testing.T) {
	bulk := traffic{CPUSeconds: 1, RxFrames: 40_000, RxBytes: 2.4e9}
	requests := traffic{CPUSeconds: 1, RxFrames: 200_000, RxBytes: 26e6}
	small := traffic{CPUSeconds: 1, RxFrames: 500_000, RxBytes: 53e6}
	row := func(name string, l load, t traffic) rowReport {
		return rowReport{Name: name, Load: l, Door: doorEvents, Conns: 64, Traffic: []traffic{t}}
	}
	spin, net := row("spin", loadPingPong, requests), row("net", loadPingPong, requests)
	spin.Spin, net.Door = true, doorNet
	tests := []struct {
		name string
		rows []rowReport
		from [2]string
	}{
		{"requests stand in", []rowReport{row("bulk", loadBulkIn, bulk), row("requests", loadPingPong, requests)}, [2]string{"bulk", "requests"}},
		{"its own small frames", []rowReport{row("udp", "udp_in", small), row("bulk", loadBulkIn, bulk), row("requests", loadPingPong, requests)}, [2]string{"bulk", "udp"}},
		{"other direction", []rowReport{row("udp", "udp_out", small), row("bulk", loadBulkIn, bulk), row("requests", loadPingPong, requests)}, [2]string{"bulk", "requests"}},
		{"larger frames of UDP", []rowReport{row("gso", "udp_in", traffic{CPUSeconds: 1, RxFrames: 10, RxBytes: 650_000}), row("udp", "udp_in", small), row("bulk", loadBulkIn, bulk)}, [2]string{"bulk", "udp"}},
		{"no bulk", []rowReport{row("udp", "udp_in", small), row("requests", loadPingPong, requests)}, [2]string{}},
		{"no small frames", []rowReport{row("bulk", loadBulkIn, bulk), spin, net}, [2]string{}},
	}
	for _, tt := range tests {
		_, from, err := (&report{Rows: tt.rows}).costOf("_in")
		if tt.from == [2]string{} {
			if err == nil || !strings.Contains(err.Error(), "needs frame counters of two rows") {
				t.Errorf("%s: rows %v and error %v, want one that says what is needed", tt.name, from, err)
			}
		} else if err != nil || from != tt.from {
			t.Errorf("%s: rows %v and error %v, want %v", tt.name, from, err, tt.from)
		}
	}
}

// A window of 3 s after a warm-up of 1 s has three quarters of what was counted.
func TestNewTraffic(t *testing.T) {
	counted := appStats{Shards: []shardStats{
		{
			RxFrames: 400, RxBytes: 4000, TxFrames: 40, TxBytes: 800, Turns: 12, Wakes: 4,
			Stages: []stageTime{{"read", 2, 300, 200}, {"wait", 4, 900, 400}},
		},
		{RxFrames: 4, RxBytes: 40, Turns: 1, Stages: []stageTime{{"read", 1, 250, 250}, {"wait", 0, 0, 0}}},
	}}
	got := newTraffic(sample{Elapsed: 3 * time.Second, CPU: 2 * time.Second, Bytes: 3000}, time.Second, counted)
	want := traffic{
		Seconds: 3, CPUSeconds: 2, Payload: 3000,
		RxFrames: 303, RxBytes: 3030, TxFrames: 30, TxBytes: 600, Turns: 10, Wakes: 3,
		Stages: []stageTime{{"read", 3, 550, 250}, {"wait", 4, 900, 400}}, // whole
	}
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("traffic is %+v, want %+v", *got, want)
	}
}

func TestTypical(t *testing.T) {
	payload := func(bytes int64, seconds float64) traffic { return traffic{Payload: bytes, Seconds: seconds} }
	if got := typical([]traffic{payload(30, 1), payload(10, 1), payload(40, 2)}); got.Payload != 40 {
		t.Errorf("typical is %+v, want that with 20 bytes/s", *got)
	}
	if got := typical([]traffic{payload(30, 1), payload(10, 1)}); got.Payload != 10 {
		t.Errorf("of two, typical is %+v, want the lesser", *got)
	}
	if got := typical(nil); got != nil {
		t.Errorf("of none, typical is %+v", *got)
	}
}

func TestWhole(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 12.4: "12", 999: "999", 1000: "1,000", 2586923: "2,586,923", math.Inf(1): "-", math.NaN(): "-",
	} {
		if got := whole(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
}
