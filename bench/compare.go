package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/perf/benchmath"
)

// confidence of the intervals around medians, as benchstat has it.
const confidence = 0.95

// writeComparison compares two results as benchstat does: medians with their confidence
// intervals, and "~" where the Mann-Whitney U test finds no difference (p >= 0.05). The
// second table compares ratios to the kernel of the same round: machines differ, and one
// machine drifts.
func writeComparison(w io.Writer, old, cur *report) error {
	head := fmt.Sprintf("old: %s\nnew: %s\n", old.Environment.where(), cur.Environment.where())
	if !old.Environment.sameMachine(cur.Environment) {
		head += "The machines differ: only the ratios can be compared.\n"
	}
	var c comparison
	figures := sheet{title: "figures", head: []string{"row", "peer", "old", "new", "change", "", ""}}
	ratios := sheet{title: "ratios to the kernel in the same round", head: slices.Clone(figures.head)}
	for _, r := range cur.Rows {
		i := slices.IndexFunc(old.Rows, func(o rowReport) bool { return o.Name == r.Name })
		if i < 0 {
			c.note("only the new file has row " + r.Name)
			continue
		}
		if o := old.Rows[i]; o.Unit != r.Unit || o.Better != r.Better {
			c.note(fmt.Sprintf("row %s is in %s (%s is better) in the old file and in %s (%s) in the new one: not compared",
				r.Name, o.Unit, o.Better, r.Unit, r.Better))
			continue
		}
		for _, peer := range cur.peers() {
			before, after := old.Rows[i].Samples[peer], r.Samples[peer]
			c.line(&figures, r, peer, before, after)
			if peer != peerKernel {
				c.line(&ratios, r, peer, perRound(old.Rows[i], peer), perRound(r, peer))
			}
		}
	}
	for _, o := range old.Rows {
		if !slices.ContainsFunc(cur.Rows, func(r rowReport) bool { return r.Name == o.Name }) {
			c.note("only the old file has row " + o.Name)
		}
	}
	if len(figures.lines) == 0 {
		c.note("no row has samples of the same peer in both files")
	}
	sheets := []sheet{figures, ratios, {title: "notes", notes: c.notes}}
	sheets = slices.DeleteFunc(sheets, func(s sheet) bool { return len(s.lines) == 0 && len(s.notes) == 0 })
	return writeSheets(w, head+"\n", sheets)
}

// perRound divides a peer's samples by the kernel's of the same round. Where a sample has
// failed, rounds cannot be told apart any more and there is no ratio.
func perRound(r rowReport, peer string) []float64 {
	samples, kernel := r.Samples[peer], r.Samples[peerKernel]
	if len(samples) != len(kernel) || slices.Contains(kernel, 0) {
		return nil
	}
	ratios := make([]float64, len(samples))
	for i := range samples {
		ratios[i] = samples[i] / kernel[i]
	}
	return ratios
}

// comparison collects what is to be said once.
type comparison struct{ notes []string }

func (c *comparison) note(s string) {
	if !slices.Contains(c.notes, s) {
		c.notes = append(c.notes, s)
	}
}

func (c *comparison) line(s *sheet, r rowReport, peer string, before, after []float64) {
	if len(before) == 0 || len(after) == 0 {
		return
	}
	thresholds := &benchmath.DefaultThresholds
	a := benchmath.NewSample(slices.Clone(before), thresholds)
	b := benchmath.NewSample(slices.Clone(after), thresholds)
	sa, sb := benchmath.AssumeNothing.Summary(a, confidence), benchmath.AssumeNothing.Summary(b, confidence)
	diff := benchmath.AssumeNothing.Compare(a, b)
	for _, warning := range slices.Concat(sa.Warnings, sb.Warnings, diff.Warnings) {
		c.note(warning.Error())
	}

	verdict := ""
	if change := diff.FormatDelta(sa.Center, sb.Center); change != "~" && sa.Center != sb.Center {
		verdict = "worse"
		if (sb.Center > sa.Center) == (r.Better == betterHigher) {
			verdict = "better"
		}
	}
	s.line(r.Name, peer, interval(sa), interval(sb), diff.FormatDelta(sa.Center, sb.Center), verdict, "("+diff.String()+")")
}

func interval(s benchmath.Summary) string {
	return figure(&s.Center) + " ± " + strings.TrimSpace(s.PctRangeString())
}
