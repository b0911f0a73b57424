package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// sheet is a table that can be printed for a terminal or as Markdown. Its first two columns
// hold words, the others figures.
type sheet struct {
	name  string // of its block in a document, see blocks
	title string
	head  []string
	lines [][]string
	notes []string
}

func (s *sheet) line(cells ...string) { s.lines = append(s.lines, cells) }

// writeText prints the sheet in aligned columns.
func (s *sheet) writeText(b *strings.Builder) {
	fmt.Fprintf(b, "%s\n", s.title)
	if len(s.lines) > 0 {
		g := newGrid(b)
		g.line(s.head...)
		for _, cells := range s.lines {
			g.line(cells...)
		}
		g.flush()
	}
	for _, n := range s.notes {
		fmt.Fprintf(b, "%s\n", n)
	}
	b.WriteByte('\n')
}

// writeMarkdown prints the sheet as a table of GitHub Flavored Markdown (section 4.10).
func (s *sheet) writeMarkdown(b *strings.Builder) {
	fmt.Fprintf(b, "**%s**\n\n", s.title)
	if len(s.lines) > 0 {
		rule := make([]string, len(s.head))
		for i := range rule {
			rule[i] = "---"
			if i > 1 {
				rule[i] = "---:"
			}
		}
		for _, cells := range append([][]string{s.head, rule}, s.lines...) {
			fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
		}
		b.WriteByte('\n')
	}
	for _, n := range s.notes {
		fmt.Fprintf(b, "%s\n\n", upperFirst(n)+".")
	}
}

// upperFirst begins a note as a sentence.
func upperFirst(s string) string {
	_, n := utf8.DecodeRuneInString(s)
	return strings.ToUpper(s[:n]) + s[n:]
}

// writeSheets prints sheets for a terminal.
func writeSheets(w io.Writer, head string, sheets []sheet) error {
	var b strings.Builder
	b.WriteString(head)
	for i := range sheets {
		sheets[i].writeText(&b)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the tables: %w", err)
	}
	return nil
}
