package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
)

// sheets returns the tables that documents quote.
func (rep *report) sheets() []sheet {
	capacity, err := rep.capacitySheet(defaultMixes)
	if err != nil {
		capacity.notes = []string{"not reckoned: " + strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	return []sheet{
		rep.rowsSheet(),
		rep.peerSheet("cpu", "CPU time of the server", func(r rowReport) (string, func(string) string) {
			return r.CPUUnit, func(peer string) string { return lookup(r.CPU, peer) }
		}),
		rep.peerSheet("latency", "Latency, p50 / p99", func(r rowReport) (string, func(string) string) {
			return "µs", func(peer string) string { return pair(r.P50, r.P99, peer) }
		}),
		rep.peerSheet("spread", "Least and greatest sample", func(r rowReport) (string, func(string) string) {
			return r.Unit, func(peer string) string { return spread(r.Samples[peer]) }
		}),
		rep.paperSheet(),
		rep.stagesSheet(),
		capacity,
	}
}

// rowsSheet has the medians of all peers, and numastack's ratio to each. Rows that were not
// measured are left out.
func (rep *report) rowsSheet() sheet {
	env := rep.Environment
	s := sheet{
		name:  "rows",
		title: fmt.Sprintf("Medians of up to %d rounds of %.3g s", env.Rounds, env.SampleSec),
		head:  []string{"row", "unit"},
		notes: []string{env.where()},
	}
	peers := rep.peers()
	others := slices.DeleteFunc(slices.Clone(peers), func(p string) bool { return p == peerNumastack })
	s.head = append(s.head, peers...)
	for _, p := range others {
		s.head = append(s.head, "/ "+p)
	}
	for _, r := range rep.Rows {
		if !slices.ContainsFunc(peers, func(p string) bool { return r.median(p) != nil }) {
			continue
		}
		unit := r.Unit
		if r.Better == betterLower {
			unit += ", lower is better"
		}
		cells := []string{r.Name, unit}
		for _, p := range peers {
			cells = append(cells, figure(r.median(p)))
		}
		for _, p := range others {
			cells = append(cells, times(r.over(peerNumastack, p)))
		}
		s.line(cells...)
	}
	return s
}

func times(ratio *float64) string {
	if ratio == nil {
		return "-"
	}
	return fmt.Sprintf("%.2f×", *ratio)
}

// peerSheet has a cell per peer, and leaves out rows for which no peer has one.
func (rep *report) peerSheet(name, title string, column func(rowReport) (unit string, cell func(peer string) string)) sheet {
	peers := rep.peers()
	s := sheet{name: name, title: title, head: append([]string{"row", "unit"}, peers...)}
	for _, r := range rep.Rows {
		unit, cell := column(r)
		cells := []string{r.Name, unit}
		for _, p := range peers {
			cells = append(cells, cell(p))
		}
		if slices.ContainsFunc(cells[2:], func(c string) bool { return c != "-" }) {
			s.line(cells...)
		}
	}
	return s
}

// writeMarkdown prints all tables, each in the comments that mark it in a document.
func (rep *report) writeMarkdown(w io.Writer, path string) error {
	var b strings.Builder
	for _, s := range rep.sheets() {
		fmt.Fprintf(&b, "%s\n", blockStart(path, s.name))
		s.writeMarkdown(&b)
		fmt.Fprintf(&b, "%s\n\n", blockEnd)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the tables: %w", err)
	}
	return nil
}

const (
	blockPrefix = "<!-- go run ./bench -markdown "
	blockEnd    = "<!-- end -->"
)

func blockStart(path, name string) string {
	return blockPrefix + filepath.ToSlash(path) + " : " + name + " -->"
}

// fillBlocks returns a document with the tables between its marks replaced by those of the
// result files that the marks name, whose paths begin at root.
func fillBlocks(document []byte, root string) ([]byte, error) {
	var (
		out     bytes.Buffer
		inBlock bool
	)
	for line := range bytes.Lines(document) {
		mark := strings.TrimSpace(string(line))
		if inBlock && mark != blockEnd {
			continue
		}
		out.Write(line)
		inBlock = false
		rest, ok := strings.CutPrefix(mark, blockPrefix)
		if !ok {
			continue
		}
		path, name, ok := strings.Cut(strings.TrimSuffix(rest, " -->"), " : ")
		if !ok {
			return nil, fmt.Errorf("mark %q: must be like %q", mark, blockStart("FILE", "TABLE"))
		}
		rep, err := readResult(filepath.Join(root, path))
		if err != nil {
			return nil, err
		}
		sheets := rep.sheets()
		i := slices.IndexFunc(sheets, func(s sheet) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("mark %q: no table %q: accepted are %s", mark, name, sheetNames(sheets))
		}
		var b strings.Builder
		sheets[i].writeMarkdown(&b)
		out.WriteString(b.String())
		inBlock = true
	}
	if inBlock {
		return nil, errors.New("a table's mark has no " + blockEnd + " after it")
	}
	return out.Bytes(), nil
}

func sheetNames(sheets []sheet) string {
	names := make([]string, len(sheets))
	for i, s := range sheets {
		names[i] = s.name
	}
	return strings.Join(names, ", ")
}
