package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// traffic is what numastack's device carried in one sample's window, by its own counters.
type traffic struct {
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_seconds"` // user and system time of the server process
	Payload    int64   `json:"payload_bytes"`
	RxFrames   float64 `json:"rx_frames"` // these are whole numbers
	RxBytes    float64 `json:"rx_bytes"`  // from the Ethernet header on
	TxFrames   float64 `json:"tx_frames"`
	TxBytes    float64 `json:"tx_bytes"`
	Turns      float64 `json:"turns"`
	Wakes      float64 `json:"wakes"`

	// Stages are the turn's, of the server's whole life.
	Stages []stageTime `json:"stages,omitempty"`
}

// newTraffic takes the window's part of what an application counted in its whole life: the
// load runs as fast in the warm-up as in the window, and hardly before and after.
func newTraffic(s sample, warmup time.Duration, counted appStats) *traffic {
	t := traffic{Seconds: s.Elapsed.Seconds(), CPUSeconds: s.CPU.Seconds(), Payload: s.Bytes}
	part := func(n uint64) float64 {
		return math.Round(float64(n) * float64(s.Elapsed) / float64(warmup+s.Elapsed))
	}
	for _, c := range counted.Shards {
		t.RxFrames += part(c.RxFrames)
		t.RxBytes += part(c.RxBytes)
		t.TxFrames += part(c.TxFrames)
		t.TxBytes += part(c.TxBytes)
		t.Turns += part(c.Turns)
		t.Wakes += part(c.Wakes)
		for _, st := range c.Stages {
			t.addStage(st)
		}
	}
	return &t
}

// addStage adds what one shard counted.
func (t *traffic) addStage(st stageTime) {
	i := slices.IndexFunc(t.Stages, func(s stageTime) bool { return s.Stage == st.Stage })
	if i < 0 {
		t.Stages = append(t.Stages, st)
		return
	}
	s := &t.Stages[i]
	s.Count += st.Count
	s.Total += st.Total
	s.Max = max(s.Max, st.Max)
}

func (t traffic) frames() float64 { return t.RxFrames + t.TxFrames }
func (t traffic) bytes() float64  { return t.RxBytes + t.TxBytes }

// typical returns the sample with the median payload per second, or per frame where there
// is no payload to count: one window's figures, which belong together. Nil without samples.
func typical(samples []traffic) *traffic {
	if len(samples) == 0 {
		return nil
	}
	rate := func(t traffic) float64 {
		if t.Payload > 0 {
			return float64(t.Payload) / t.Seconds
		}
		return t.frames() / t.Seconds
	}
	sorted := slices.SortedFunc(slices.Values(samples), func(a, b traffic) int { return cmp.Compare(rate(a), rate(b)) })
	return &sorted[(len(sorted)-1)/2]
}

// paperHost is Table 1 of M. Friedman, "Mainstream NUMA and the TCP/IP stack" (2008): NTttcp
// on Windows Vista at 2.2 GHz.
var paperHost = struct {
	mbit, frameBytes, sent, received, framesPerInterrupt, interruptsPerSec, cyclesPerByte, hz float64
}{131.8, 764, 1_309_892, 2_586_923, 2, 9_494, 129.3, 2.2e9}

// paperSheet shows the TCP bulk rows as NTttcp reports them, beside the paper's Table 1.
func (rep *report) paperSheet() sheet {
	s := sheet{
		name: "paper", title: "As NTttcp reports it",
		head: []string{
			"row", "stack", "KB/s", "Mbit/s", "average frame", "frames sent", "received", "frames/wake", "wakes/s", "cycles/byte",
		},
	}
	for _, r := range rep.Rows {
		t := typical(r.Traffic)
		if t == nil || t.Payload <= 0 || r.Load != loadBulkIn && r.Load != loadBulkOut {
			continue
		}
		frames, bytes := t.RxFrames, t.RxBytes
		if r.Load == loadBulkOut {
			frames, bytes = t.TxFrames, t.TxBytes
		}
		rate := float64(t.Payload) / t.Seconds
		perByte := "-"
		if hz := rep.Environment.TSCHz; hz > 0 {
			perByte = fmt.Sprintf("%.2f", t.CPUSeconds*hz/float64(t.Payload))
		}
		s.line(r.Name, peerNumastack, whole(rate/1024), decimal(rate*8/1e6), whole(bytes/frames),
			whole(t.TxFrames), whole(t.RxFrames), decimal(t.RxFrames/t.Wakes), whole(t.Wakes/t.Seconds), perByte)
	}
	if len(s.lines) == 0 {
		s.notes = append(s.notes, "the file has no frame counters")
		return s
	}
	p := paperHost
	s.line("paper, Table 1", "Windows Vista", "-", decimal(p.mbit), whole(p.frameBytes),
		whole(p.sent), whole(p.received), decimal(p.framesPerInterrupt), whole(p.interruptsPerSec), decimal(p.cyclesPerByte))
	s.notes = append(s.notes,
		"KB is 1024 bytes of payload; frames are those of the bulk direction in \"average frame\", in bytes from the Ethernet header on, and of one sample in the counts; "+
			"a frame of up to 64 KB counts once, as the TAP carries it; a wake is a return from a blocking wait, frames/wake are received ones, and the paper has interrupts in their place; "+
			"cycles are the server's CPU time × the TSC's rate")
	return s
}

// waitStage is not work: it has no part in the time of a turn.
const waitStage = "wait"

// stagesSheet shows where the time of a turn goes, with the columns of the paper's Tables 2
// to 4: of the first row of each load in which the server does not spin.
func (rep *report) stagesSheet() sheet {
	s := sheet{
		name: "stages", title: "Where the time of a turn goes",
		head: []string{"row", "stage", "turns timed", "maximum µs", "average µs", "total ms", "part of the work"},
	}
	shown := map[load]bool{}
	for _, r := range rep.Rows {
		t := typical(r.Traffic)
		if t == nil || len(t.Stages) == 0 || r.Spin || shown[r.Load] {
			continue
		}
		shown[r.Load] = true
		var work float64
		for _, st := range t.Stages {
			if st.Stage != waitStage {
				work += float64(st.Total)
			}
		}
		for _, st := range t.Stages {
			average, part := "-", "-"
			if st.Count > 0 {
				average = fmt.Sprintf("%.2f", float64(st.Total)/float64(st.Count)/1e3)
			}
			if st.Stage != waitStage && work > 0 {
				part = fmt.Sprintf("%.1f %%", 100*float64(st.Total)/work)
			}
			s.line(r.Name, st.Stage, whole(float64(st.Count)), decimal(float64(st.Max)/1e3), average, decimal(float64(st.Total)/1e6), part)
		}
	}
	if len(s.lines) == 0 {
		s.notes = append(s.notes, "the file has no times of stages")
		return s
	}
	s.notes = append(s.notes, "one of 16 turns is timed, and every wait; of the server's whole life in one sample")
	return s
}

// whole prints a count with its thousands apart.
func whole(v float64) string {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return "-"
	}
	digits := fmt.Sprintf("%.0f", v)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// decimal prints one digit behind the point, and none of a large figure.
func decimal(v float64) string {
	if math.Abs(v) >= 1000 || math.IsNaN(v) || math.IsInf(v, 0) {
		return whole(v)
	}
	return fmt.Sprintf("%.1f", v)
}
