package main

import (
	"slices"
	"testing"
)

func TestShortfalls(t *testing.T) {
	row := func(name, better string, ours, theirs float64) rowReport {
		return rowReport{Name: name, Better: better, Samples: map[string][]float64{peerNumastack: {ours}, peerGVisor: {theirs}}}
	}
	base := &report{Rows: []rowReport{
		row("higher", betterHigher, 8, 1),    // 8×
		row("lower", betterLower, 100, 1000), // 0.1×
		{Name: "kernel only", Better: betterHigher, Samples: map[string][]float64{peerNumastack: {1}, peerKernel: {1}}},
	}}
	base.Environment.CPU = "A"
	tests := []struct {
		name string
		rows []rowReport
		want []string
	}{
		{"slower host, same ratios", []rowReport{row("higher", betterHigher, 0.8, 0.1), row("lower", betterLower, 1000, 10_000)}, nil},
		{"half is enough", []rowReport{row("higher", betterHigher, 4, 1), row("lower", betterLower, 200, 1000)}, nil},
		{"less is not", []rowReport{row("higher", betterHigher, 3.99, 1), row("lower", betterLower, 201, 1000)}, []string{"higher", "lower"}},
		{"more is better", []rowReport{row("higher", betterHigher, 80, 1), row("lower", betterLower, 1, 1000)}, nil},
		{"unknown rows do not count", []rowReport{row("higher", betterHigher, 8, 1), row("new", betterHigher, 1, 100)}, nil},
	}
	for _, tt := range tests {
		rep := &report{Environment: environment{CPU: "A"}, Rows: tt.rows}
		rows, why, err := rep.shortfalls(base)
		if err != nil || !slices.Equal(rows, tt.want) || len(why) != len(rows) {
			t.Errorf("%s: %v (%v), error %v, want %v", tt.name, rows, why, err, tt.want)
		}
	}
	for what, env := range map[string]environment{"another CPU": {CPU: "B"}, "other page lists": {CPU: "A", PageLists: 8}} {
		elsewhere := &report{Environment: env, Rows: []rowReport{row("higher", betterHigher, 2, 1), row("lower", betterLower, 401, 1000)}}
		if rows, _, err := elsewhere.shortfalls(base); err != nil || !slices.Equal(rows, []string{"lower"}) {
			t.Errorf("%s: %v, error %v, want lower alone, by a quarter", what, rows, err)
		}
	}
	for _, rows := range [][]rowReport{nil, {row("new", betterHigher, 1, 1)}, base.Rows[2:]} {
		if _, _, err := (&report{Rows: rows}).shortfalls(base); err == nil {
			t.Errorf("%v: nothing to compare, and no error", rows)
		}
	}
}
