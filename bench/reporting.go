package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// reporting is the part of the command line that is about result files.
type reporting struct {
	out   string  // also write the result there; empty: do not
	check *report // fail on ratios under half of those in it; nil: do not

	// What to do with a file instead of measuring: at most one has a file or folder.
	compare, plot, markdown, capacity string
	file                              string // the argument of compare and plot after the flags
	mix                               frameMix
}

// reports says whether the command line asks for a report of files and no measurement.
func (r reporting) reports() bool {
	return r.compare+r.plot+r.markdown+r.capacity != ""
}

// arguments checks what the flags leave: the second file of -compare, the file of -plot.
func (r *reporting) arguments(args []string) error {
	modes, want := 0, 0
	for _, m := range []struct {
		value string
		files int
	}{{r.compare, 1}, {r.plot, 1}, {r.markdown, 0}, {r.capacity, 0}} {
		if m.value != "" {
			modes++
			want = m.files
		}
	}
	switch {
	case modes > 1:
		return errors.New("-compare, -plot, -markdown and -capacity: accepted is one of them")
	case r.mix != nil && r.capacity == "":
		return errors.New("-mix: accepted only with -capacity")
	case want == 0 && len(args) > 0:
		return fmt.Errorf("unexpected argument %q: all settings are flags", args[0])
	case len(args) != want:
		return fmt.Errorf("-compare and -plot take one result file after the flags: got %d arguments (%s)", len(args), strings.Join(args, " "))
	case want == 1:
		r.file = args[0]
	}
	return nil
}

// report reads the files and prints what was asked for; -plot prints the names of the files it drew.
func (r reporting) report(w io.Writer) error {
	path := r.markdown + r.capacity + r.compare
	if r.plot != "" {
		path = r.file
	}
	rep, err := readResult(path)
	if err != nil {
		return err
	}
	switch {
	case r.compare != "":
		cur, err := readResult(r.file)
		if err != nil {
			return err
		}
		return writeComparison(w, rep, cur)
	case r.plot != "":
		files, err := rep.plot(r.plot)
		for _, f := range files {
			fmt.Fprintln(w, f)
		}
		return err
	case r.markdown != "":
		return rep.writeMarkdown(w, path)
	default:
		return rep.writeCapacity(w, r.mix)
	}
}
