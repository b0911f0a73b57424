package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// writeJSON prints the report as one indented JSON object.
func (rep *report) writeJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(rep); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// writeTable prints the report for a reader: figures and targets first, then what the
// server's CPU paid, latencies and spread.
func (rep *report) writeTable(w io.Writer) error {
	env := rep.Environment
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d CPUs, Linux %s, %s", env.CPU, env.CPUs, env.Kernel, env.Go)
	if env.Commit != "" {
		fmt.Fprintf(&b, ", commit %s", env.Commit)
	}
	fmt.Fprintf(&b, "\nserver on CPU %d, client on CPU %d, MTU %d, medians of up to %d rounds of %.3g s\n",
		env.ServerCPU, env.ClientCPU, env.MTU, env.Rounds, env.SampleSec)
	if env.Congestion != "" {
		fmt.Fprintf(&b, "the kernel's TCP, client and server, with %s\n", env.Congestion)
	}
	if env.PageLists != 0 {
		fmt.Fprintln(&b, env.pageListsText())
	}
	if env.RPS {
		fmt.Fprintf(&b, "numastack with %s\n", rpsText)
	}
	if env.HTTPClient != "" {
		fmt.Fprintf(&b, "HTTP client %s\n", env.HTTPClient)
	}
	if env.IdleConns != 0 {
		fmt.Fprintf(&b, "%d idle connections\n", env.IdleConns)
	}
	b.WriteByte('\n')

	t := newGrid(&b)
	t.line("row", "unit", "numastack", "gvisor", "gvisor_gso", "kernel", "limit", "/ limit", "/ gvisor", "target", "", "/ kernel", "target", "")
	for _, r := range rep.Rows {
		cells := []string{r.Name, r.Unit, figure(r.Numastack), figure(r.GVisor), figure(r.GVisorGSO), figure(r.Kernel), figure(r.Limit), figure(r.OfLimit)}
		t.line(append(append(cells, r.VsGVisor.cells()...), r.VsKernel.cells()...)...)
	}
	t.flush()

	for _, s := range slices.Concat(rep.Scaling, rep.Libraries) {
		fmt.Fprintf(&b, "%s: %s\n", s.Name, strings.Join(s.cells(), ", "))
	}
	fmt.Fprintf(&b, "%d of %d targets met\n\n", rep.TargetsMet, rep.Targets)

	rep.byPeer(&b, "server CPU", func(r rowReport) (string, func(string) string) {
		return r.CPUUnit, func(peer string) string { return lookup(r.CPU, peer) }
	})
	rep.byPeer(&b, "p50 / p99", func(r rowReport) (string, func(string) string) {
		return "µs", func(peer string) string { return pair(r.P50, r.P99, peer) }
	})
	rep.byPeer(&b, "heap / stacks", func(r rowReport) (string, func(string) string) {
		return r.Unit, func(peer string) string { return pair(r.Heap, r.Stacks, peer) }
	})
	rep.byPeer(&b, "min..max", func(r rowReport) (string, func(string) string) {
		return r.Unit, func(peer string) string { return spread(r.Samples[peer]) }
	})

	for _, e := range rep.Errors {
		fmt.Fprintf(&b, "failed: %s\n", e)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the table: %w", err)
	}
	return nil
}

// byPeer prints one secondary table: a unit per row and a cell per peer. Rows for which no
// peer has a cell are left out, and a table without rows too.
func (rep *report) byPeer(b *strings.Builder, title string, column func(rowReport) (unit string, cell func(peer string) string)) {
	t := newGrid(b)
	t.line(append([]string{title, "unit"}, peerOrder...)...)
	for _, r := range rep.Rows {
		unit, cell := column(r)
		cells := []string{r.Name, unit}
		empty := true
		for _, peer := range peerOrder {
			c := cell(peer)
			cells = append(cells, c)
			empty = empty && c == "-"
		}
		if !empty {
			t.line(cells...)
		}
	}
	if len(t.pending) > 1 {
		t.flush()
		b.WriteByte('\n')
	}
}

// cells renders a target as ratio, limit and verdict. A nil target was not measured.
func (t *target) cells() []string {
	if t == nil {
		return []string{"-", "-", ""}
	}
	bound, verdict := "≥", "missed"
	if t.Bound == "at most" {
		bound = "≤"
	}
	if t.Met {
		verdict = "met"
	}
	return []string{fmt.Sprintf("%.2fx", t.Ratio), fmt.Sprintf("%s%gx", bound, t.Limit), verdict}
}

// figure prints three significant digits without ever using an exponent.
func figure(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v >= 100:
		return fmt.Sprintf("%.0f", *v)
	case *v >= 10:
		return fmt.Sprintf("%.1f", *v)
	default:
		return fmt.Sprintf("%.2f", *v)
	}
}

func lookup(byPeer map[string]float64, peer string) string {
	v, ok := byPeer[peer]
	if !ok {
		return "-"
	}
	return figure(&v)
}

func pair(a, b map[string]float64, peer string) string {
	if _, ok := a[peer]; !ok {
		return "-"
	}
	return lookup(a, peer) + " / " + lookup(b, peer)
}

func spread(samples []float64) string {
	if len(samples) == 0 {
		return "-"
	}
	return figure(new(slices.Min(samples))) + ".." + figure(new(slices.Max(samples)))
}

// grid aligns cells in columns, the first two to the left and figures to the right.
type grid struct {
	tw *tabwriter.Writer
	// pending holds the rows until the width of the left-aligned columns is known.
	pending [][]string
}

func newGrid(w io.Writer) *grid {
	return &grid{tw: tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)}
}

func (g *grid) line(cells ...string) { g.pending = append(g.pending, cells) }

// flush prints the lines. The writer below keeps errors for itself: it writes to memory.
func (g *grid) flush() {
	const leftColumns = 2
	var width [leftColumns]int
	for _, cells := range g.pending {
		for i, c := range cells[:min(leftColumns, len(cells))] {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	var lines strings.Builder
	for _, cells := range g.pending {
		for i, c := range cells {
			if i < leftColumns {
				c += strings.Repeat(" ", width[i]-len([]rune(c)))
			}
			lines.WriteString(c + "\t")
		}
		lines.WriteByte('\n')
	}
	_, _ = io.WriteString(g.tw, lines.String())
	_ = g.tw.Flush()
	g.pending = nil
}
