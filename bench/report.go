package main

import (
	"cmp"
	"maps"
	"slices"
)

// Which way a row's figure is better.
const (
	betterHigher = "higher"
	betterLower  = "lower"
)

// report is the outcome of a run, and the shape of -json, of -out and of the files in
// bench/results.
type report struct {
	Environment environment `json:"environment"`
	Rows        []rowReport `json:"rows"`
	Scaling     []target    `json:"scaling,omitempty"`
	Libraries   []target    `json:"libraries,omitempty"`
	TargetsMet  int         `json:"targets_met"`
	Targets     int         `json:"targets"`
	Errors      []string    `json:"errors,omitempty"`
}

// environment says where and how the figures were taken.
type environment struct {
	Time       string  `json:"time"`
	Commit     string  `json:"commit,omitempty"`
	Go         string  `json:"go"`
	GVisor     string  `json:"gvisor,omitempty"`
	Kernel     string  `json:"kernel"`
	CPU        string  `json:"cpu"`
	CPUs       int     `json:"cpus"`
	TSCHz      float64 `json:"tsc_hz,omitempty"`
	ServerCPU  int     `json:"server_cpu"`
	ClientCPU  int     `json:"client_cpu"`
	Rounds     int     `json:"rounds"`
	SampleSec  float64 `json:"sample_seconds"`
	MTU        int     `json:"mtu"`
	Congestion string  `json:"congestion,omitempty"` // control of the kernel's TCP
	PageLists  int     `json:"percpu_pagelist_high_fraction,omitempty"`
	RPS        bool    `json:"rps,omitempty"` // numastack has HostCPUs
	// Only where rows use them.
	HTTPClient string `json:"http_client,omitempty"` // "wrk", or "bench" where it is not installed
	IdleConns  int    `json:"idle_conns,omitempty"`
}

// rowReport is one row: the peers' medians, beside each other. A peer that was not
// measured, or whose samples all failed, is nil.
type rowReport struct {
	Name      string   `json:"name"`
	Unit      string   `json:"unit"`
	Better    string   `json:"better"` // "higher" or "lower"
	Load      load     `json:"load,omitempty"`
	Door      door     `json:"door,omitempty"`
	Conns     int      `json:"conns,omitempty"` // 0: environment.IdleConns
	MTU       int      `json:"mtu,omitempty"`
	Spin      bool     `json:"spin,omitempty"`
	Numastack *float64 `json:"numastack"`
	GVisor    *float64 `json:"gvisor"`
	Kernel    *float64 `json:"kernel"`
	GVisorGSO *float64 `json:"gvisor_gso,omitempty"`
	Limit     *float64 `json:"limit,omitempty"`
	// OfLimit is how near numastack comes to the limit: Numastack / Limit.
	OfLimit  *float64 `json:"of_limit,omitempty"`
	VsGVisor *target  `json:"vs_gvisor,omitempty"`
	VsKernel *target  `json:"vs_kernel,omitempty"`
	CPUUnit  string   `json:"cpu_unit,omitempty"`
	// The maps' keys are the peers.
	CPU     map[string]float64   `json:"cpu,omitempty"`
	P50     map[string]float64   `json:"p50_us,omitempty"`
	P99     map[string]float64   `json:"p99_us,omitempty"`
	Max     map[string]float64   `json:"max_us,omitempty"`
	Heap    map[string]float64   `json:"heap_bytes,omitempty"`  // per connection
	Stacks  map[string]float64   `json:"stack_bytes,omitempty"` // per connection
	Samples map[string][]float64 `json:"samples"`
	// Curve holds the medians of the latencies at CurvePoints, of a row with a Rate.
	Rate        float64              `json:"rate,omitempty"` // requests/s
	Late        map[string]float64   `json:"sent_late_p99_us,omitempty"`
	CurvePoints []float64            `json:"curve_points,omitempty"`
	Curve       map[string][]float64 `json:"curve_us,omitempty"`

	Traffic []traffic `json:"traffic,omitempty"` // of numastack, one per sample
}

// target is a ratio and the limit it is held to.
type target struct {
	Name  string  `json:"name,omitempty"`
	Ratio float64 `json:"ratio"`
	Limit float64 `json:"limit"`
	Bound string  `json:"bound"` // "at least" or "at most"
	Met   bool    `json:"met"`
}

func newTarget(name string, ratio, limit float64, lower bool) target {
	t := target{Name: name, Ratio: ratio, Limit: limit, Bound: "at least", Met: ratio >= limit}
	if lower {
		t.Bound, t.Met = "at most", ratio <= limit
	}
	return t
}

// newReport reduces samples, by row name and peer, to medians and holds them to the
// targets. Rows without a sample stay in the report, with every peer nil.
func newReport(env environment, rows []row, samples map[string]map[string][]sample, errs []string) *report {
	rep := &report{Environment: env, Errors: errs}
	for _, r := range rows {
		rr := newRowReport(r, samples[r.name], env)
		rep.Rows = append(rep.Rows, rr)
		for _, t := range []*target{rr.VsGVisor, rr.VsKernel} {
			if t != nil {
				rep.count(*t)
			}
		}
	}
	rep.Scaling, rep.Libraries = rep.hold(scalingTargets), rep.hold(libraryTargets)
	return rep
}

// hold returns and counts those targets whose two cells were measured.
func (rep *report) hold(targets []cellTarget) []target {
	var held []target
	for _, ct := range targets {
		over, base := rep.figure(ct.over), rep.figure(ct.base)
		if over == nil || base == nil {
			continue
		}
		t := newTarget(ct.name, *over / *base, ct.limit, ct.lower)
		held = append(held, t)
		rep.count(t)
	}
	return held
}

func (rep *report) count(t target) {
	rep.Targets++
	if t.Met {
		rep.TargetsMet++
	}
}

// figure returns what a cell shows, or nil.
func (rep *report) figure(c cell) *float64 {
	i := slices.IndexFunc(rep.Rows, func(r rowReport) bool { return r.Name == c.row })
	if i < 0 {
		return nil
	}
	return rep.Rows[i].median(c.peer)
}

// median returns a peer's figure, or nil. Every peer has one here, whether or not the row
// has a field for it.
func (rr rowReport) median(peer string) *float64 {
	if len(rr.Samples[peer]) == 0 {
		return nil
	}
	return new(median(rr.Samples[peer]))
}

// over returns the ratio of two peers' figures, or nil.
func (rr rowReport) over(peer, base string) *float64 {
	a, b := rr.median(peer), rr.median(base)
	if a == nil || b == nil || *b == 0 {
		return nil
	}
	return new(*a / *b)
}

// peers returns those that have samples, in the order of peerOrder; peers that this program
// does not know come last, by name.
func (rep *report) peers() []string {
	found := map[string]bool{}
	for _, r := range rep.Rows {
		for peer, samples := range r.Samples {
			if len(samples) > 0 {
				found[peer] = true
			}
		}
	}
	rank := func(peer string) int {
		if i := slices.Index(peerOrder, peer); i >= 0 {
			return i
		}
		return len(peerOrder)
	}
	return slices.SortedFunc(maps.Keys(found), func(a, b string) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
	})
}

func newRowReport(r row, byPeer map[string][]sample, env environment) rowReport {
	rr := rowReport{
		Name: r.name, Unit: r.unit, Better: betterHigher,
		Load: r.load, Door: r.door, Conns: r.conns, MTU: r.linkMTU(), Spin: r.spin > 0,
		CPU: map[string]float64{}, Samples: map[string][]float64{},
	}
	if r.lower {
		rr.Better = betterLower
	}
	_, rr.CPUUnit = r.cpuCost(sample{Bytes: 1, Ops: 1}, env.TSCHz)
	if r.timed() {
		rr.P50, rr.P99, rr.Max = map[string]float64{}, map[string]float64{}, map[string]float64{}
	}
	if r.load == loadIdle {
		rr.Heap, rr.Stacks = map[string]float64{}, map[string]float64{}
	}

	medians := map[string]*float64{}
	for peer, samples := range byPeer {
		if len(samples) == 0 {
			continue
		}
		var values, costs, p50s, p99s, maxima, heaps, stacks []float64
		for _, s := range samples {
			cost, _ := r.cpuCost(s, env.TSCHz)
			values = append(values, r.value(s))
			costs = append(costs, cost)
			p50s = append(p50s, micros(s.P50))
			p99s = append(p99s, micros(s.P99))
			maxima = append(maxima, micros(s.Max))
			heaps = append(heaps, float64(s.Memory.Heap)/float64(s.Ops))
			stacks = append(stacks, float64(s.Memory.Stacks)/float64(s.Ops))
			if s.Traffic != nil {
				rr.Traffic = append(rr.Traffic, *s.Traffic)
			}
		}
		rr.Samples[peer] = values
		if r.load == loadIdle {
			rr.Heap[peer], rr.Stacks[peer] = median(heaps), median(stacks)
		} else {
			rr.CPU[peer] = median(costs)
		}
		if r.timed() {
			rr.P50[peer], rr.P99[peer], rr.Max[peer] = median(p50s), median(p99s), median(maxima)
		}
		if r.load == loadLatency {
			rr.addCurve(peer, samples)
		}
		medians[peer] = new(median(values))
	}

	rr.Numastack, rr.GVisor, rr.Kernel = medians[peerNumastack], medians[peerGVisor], medians[peerKernel]
	rr.GVisorGSO, rr.Limit = medians[peerGVisorGSO], medians[peerLimit]
	if rr.Numastack != nil && rr.Limit != nil {
		rr.OfLimit = new(*rr.Numastack / *rr.Limit)
	}
	hold := func(peer *float64, limit float64) *target {
		if rr.Numastack == nil || peer == nil || limit == 0 {
			return nil
		}
		return new(newTarget("", *rr.Numastack / *peer, limit, r.lower))
	}
	rr.VsGVisor, rr.VsKernel = hold(rr.GVisor, r.vsGVisor), hold(rr.Kernel, r.vsKernel)
	return rr
}

// addCurve reduces a peer's latency curves to their medians, point by point.
func (rr *rowReport) addCurve(peer string, samples []sample) {
	if rr.Curve == nil {
		rr.Curve, rr.Late = map[string][]float64{}, map[string]float64{}
	}
	var lates []float64
	for _, s := range samples {
		lates = append(lates, micros(s.Late))
	}
	rr.Late[peer] = median(lates)
	rr.CurvePoints, rr.Rate = curvePoints[:], samples[0].Rate
	for i := range curvePoints {
		var at []float64
		for _, s := range samples {
			at = append(at, micros(s.Curve[i]))
		}
		rr.Curve[peer] = append(rr.Curve[peer], median(at))
	}
}
