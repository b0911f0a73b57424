package numaalloc

import (
	"slices"
	"strings"
	"testing"
)

func TestParseCPUList(t *testing.T) {
	tests := []struct {
		list string
		want []int
		err  string // part of the error text; empty means no error
	}{
		{list: "", want: nil},
		{list: "\n", want: nil},
		{list: "0\n", want: []int{0}},
		{list: "0-3,8", want: []int{0, 1, 2, 3, 8}},
		{list: "8,0-3", want: []int{0, 1, 2, 3, 8}},
		{list: " 1 , 3-4 ", want: []int{1, 3, 4}},
		{list: "2-2", want: []int{2}},
		{list: "0-2,1-3", want: []int{0, 1, 2, 3}},
		{list: "65535", want: []int{65535}},
		{list: "65536", err: `"65536" is not a CPU number`},
		{list: "0-99999999999", err: "is not a CPU number"},
		{list: "3-1", err: "runs backwards"},
		{list: "-1", err: `"" is not a CPU number`},
		{list: "1-", err: `"" is not a CPU number`},
		{list: "1,,2", err: `"" is not a CPU number`},
		{list: "0-7:2/4", err: `"7:2/4" is not a CPU number`},
		{list: "all", err: `"all" is not a CPU number`},
	}
	for _, test := range tests {
		got, err := ParseCPUList(test.list)
		switch {
		case test.err == "" && err != nil:
			t.Errorf("ParseCPUList(%q): %v", test.list, err)
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("ParseCPUList(%q) error = %v, want one with %q", test.list, err, test.err)
		case !slices.Equal(got, test.want):
			t.Errorf("ParseCPUList(%q) = %v, want %v", test.list, got, test.want)
		}
	}
}

func TestFormatCPUList(t *testing.T) {
	tests := []struct {
		cpus []int
		want string
	}{
		{nil, ""},
		{[]int{5}, "5"},
		{[]int{3, 2, 1, 0, 8}, "0-3,8"},
		{[]int{0, 1}, "0-1"},
		{[]int{0, 2, 2, 4}, "0,2,4"},
	}
	for _, test := range tests {
		given := slices.Clone(test.cpus)
		if got := FormatCPUList(test.cpus); got != test.want {
			t.Errorf("FormatCPUList(%v) = %q, want %q", given, got, test.want)
		}
		if !slices.Equal(test.cpus, given) {
			t.Errorf("FormatCPUList changed its argument from %v to %v", given, test.cpus)
		}
	}
}

func FuzzParseCPUList(f *testing.F) {
	for _, seed := range []string{"", "0", "0-3,8", "3-1", "65535", " 1 ,2", "0-7:2/4", "0-65535,0-65535"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		cpus, err := ParseCPUList(list)
		if err != nil {
			return
		}
		for i, cpu := range cpus {
			if cpu < 0 || cpu >= maxCPUs {
				t.Fatalf("ParseCPUList(%q)[%d] = %d, outside 0..%d", list, i, cpu, maxCPUs-1)
			}
			if i > 0 && cpus[i-1] >= cpu {
				t.Fatalf("ParseCPUList(%q) = %v, not ascending", list, cpus)
			}
		}
		again, err := ParseCPUList(FormatCPUList(cpus))
		if err != nil || !slices.Equal(again, cpus) {
			t.Fatalf("%q became %v, then %v (%v)", list, cpus, again, err)
		}
	})
}
