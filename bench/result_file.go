package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// resultFile is what -out writes: a new file beside the old one, which it replaces when
// the run is over, so that neither an interrupted run nor a full disk costs the old one.
type resultFile struct {
	path string
	temp *os.File
}

// createResult is called before anything is measured: a path that cannot be written should
// not cost a run.
func createResult(path string) (*resultFile, error) {
	temp, err := os.CreateTemp(filepath.Dir(path), ".bench-*.json")
	if err != nil {
		return nil, fmt.Errorf("-out %q: must be a file in a folder that exists and can be written: %w", path, err)
	}
	return &resultFile{path: path, temp: temp}, nil
}

// write puts the report in the place of path.
func (f *resultFile) write(rep *report) error {
	if err := errors.Join(rep.writeJSON(f.temp), f.temp.Chmod(0o644), f.temp.Close()); err != nil {
		return fmt.Errorf("-out %q: %w", f.path, err)
	}
	if err := os.Rename(f.temp.Name(), f.path); err != nil {
		return fmt.Errorf("-out %q: %w", f.path, err)
	}
	return nil
}

// discard removes what write has not put into its place. After write it does nothing.
func (f *resultFile) discard() {
	_ = f.temp.Close()
	_ = os.Remove(f.temp.Name())
}

// maxResultBytes bounds what is read of a file that may be none of ours; a full run with
// all peers takes some 200 KB.
const maxResultBytes = 64 << 20

// readResult reads a file that -out or -json wrote. Files of before MTU, load and door were
// noted get them from the environment and the row of the same name.
func readResult(path string) (*report, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("result file %q: %w (accepted is a file that -out wrote, such as bench/results/quick.json)", path, err)
	}
	defer f.Close()
	rep, err := parseResult(io.LimitReader(f, maxResultBytes))
	if err != nil {
		return nil, fmt.Errorf("result file %q: %w (accepted is a file that -out wrote)", path, err)
	}
	return rep, nil
}

func parseResult(r io.Reader) (*report, error) {
	content, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	rep := new(report)
	if err := json.Unmarshal(content, rep); err != nil {
		return nil, fmt.Errorf("no result in JSON: %w", err)
	}
	if len(rep.Rows) == 0 {
		return nil, errors.New(`"rows" is missing or empty: must have at least one row`)
	}
	for i := range rep.Rows {
		r := &rep.Rows[i]
		switch {
		case r.Name == "":
			return nil, fmt.Errorf(`row %d has no "name"`, i)
		case slices.ContainsFunc(rep.Rows[:i], func(other rowReport) bool { return other.Name == r.Name }):
			return nil, fmt.Errorf("row %q is there twice", r.Name)
		case r.Better != betterHigher && r.Better != betterLower:
			return nil, fmt.Errorf(`row %q: "better" is %q: must be %s or %s`, r.Name, r.Better, betterHigher, betterLower)
		}
		if known := slices.IndexFunc(allRows, func(k row) bool { return k.name == r.Name }); r.Load == "" && known >= 0 {
			k := allRows[known]
			r.Load, r.Door, r.Conns, r.Spin = k.load, k.door, k.conns, k.spin > 0
		}
		if r.MTU == 0 {
			r.MTU = rep.Environment.MTU
		}
	}
	return rep, nil
}

const rpsText = "receive packet steering to the client's CPU"

// where says in a line on what, when and with which versions the figures were taken.
func (env environment) where() string { return env.machine() + ", " + env.versions() }

func (env environment) pageListsText() string {
	return fmt.Sprintf("vm.percpu_pagelist_high_fraction=%d", env.PageLists)
}

func (env environment) machine() string {
	where := fmt.Sprintf("%s, %d CPUs, Linux %s", env.CPU, env.CPUs, env.Kernel)
	if env.Congestion != "" {
		where += ", TCP of the kernel with " + env.Congestion
	}
	if env.PageLists != 0 {
		where += ", " + env.pageListsText()
	}
	if env.RPS {
		where += ", numastack with " + rpsText
	}
	if day, _, ok := strings.Cut(env.Time, "T"); ok {
		where += ", " + day
	}
	return where
}

func (env environment) versions() string {
	versions := env.Go
	if env.GVisor != "" {
		versions += ", gVisor " + env.GVisor
	}
	if env.Commit != "" {
		versions += ", commit " + env.Commit
	}
	return versions
}

// sameMachine reports whether absolute figures of two runs may be compared at all.
func (env environment) sameMachine(other environment) bool {
	return env.CPU == other.CPU && env.CPUs == other.CPUs && env.Kernel == other.Kernel && env.TSCHz == other.TSCHz
}
