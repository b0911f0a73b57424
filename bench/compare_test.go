package main

import (
	"bytes"
	"slices"
	"testing"
)

func TestComparisonGolden(t *testing.T) {
	environment := environment{
		Time: "2026-01-02T03:04:05Z", Commit: "0123456", Go: "go1.26", Kernel: "6.18.0", CPU: "Test CPU", CPUs: 2, TSCHz: 2.5e9,
	}
	rows := func(scale float64) []rowReport {
		times := func(v ...float64) []float64 {
			for i := range v {
				v[i] *= scale
			}
			return v
		}
		return []rowReport{
			{Name: "faster", Unit: "Gbit/s", Better: betterHigher, Samples: map[string][]float64{
				peerNumastack: times(10.1, 10, 10.3, 10.2, 10.5, 10.4),
				peerKernel:    {20, 20.1, 20.2, 20.3, 20.4, 20.5},
			}},
			{Name: "slower", Unit: "µs", Better: betterLower, Samples: map[string][]float64{
				peerNumastack: times(10.1, 10, 10.3, 10.2, 10.5, 10.4),
				peerKernel:    times(20, 20.1, 20.2, 20.3, 20.4, 20.5), // the host is slower, not we
			}},
			{Name: "few", Unit: "Gbit/s", Better: betterHigher, Samples: map[string][]float64{
				peerNumastack: times(1, 2, 3), peerKernel: {1, 2}, // a sample of the kernel failed
			}},
		}
	}
	old := &report{Environment: environment, Rows: rows(1)}
	cur := &report{Environment: environment, Rows: rows(1.5)}
	cur.Environment.Commit = "89abcde"
	old.Rows = append(old.Rows,
		rowReport{Name: "gone", Unit: "Gbit/s", Better: betterHigher},
		rowReport{Name: "unit", Unit: "KB/s", Better: betterHigher, Samples: map[string][]float64{peerNumastack: {1}}})
	cur.Rows = append(cur.Rows,
		rowReport{Name: "unit", Unit: "Gbit/s", Better: betterHigher, Samples: map[string][]float64{peerNumastack: {1}}},
		rowReport{Name: "here", Unit: "Gbit/s", Better: betterHigher})
	var b bytes.Buffer
	if err := writeComparison(&b, old, cur); err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "compare.txt", b.Bytes())

	// Samples stay in the order of their rounds: the ratios need it.
	if got := old.Rows[0].Samples[peerNumastack]; !slices.Equal(got, []float64{10.1, 10, 10.3, 10.2, 10.5, 10.4}) {
		t.Errorf("the comparison changed the samples to %v", got)
	}

	b.Reset()
	cur.Environment.CPU = "Other CPU"
	if err := writeComparison(&b, old, cur); err != nil {
		t.Fatal(err)
	}
	if want := []byte("The machines differ: only the ratios can be compared."); !bytes.Contains(b.Bytes(), want) {
		t.Errorf("no line %q in\n%s", want, b.Bytes())
	}
}

func TestPerRound(t *testing.T) {
	tests := []struct{ ours, kernel, want []float64 }{
		{[]float64{3, 1}, []float64{1, 2}, []float64{3, 0.5}},
		{[]float64{3, 1}, []float64{1}, nil},
		{[]float64{3, 1}, []float64{1, 0}, nil},
		{nil, nil, nil},
	}
	for _, tt := range tests {
		r := rowReport{Samples: map[string][]float64{peerNumastack: tt.ours, peerKernel: tt.kernel}}
		if got := perRound(r, peerNumastack); !slices.Equal(got, tt.want) {
			t.Errorf("%v over %v is %v, want %v", tt.ours, tt.kernel, got, tt.want)
		}
	}
}
