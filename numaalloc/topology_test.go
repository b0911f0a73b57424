package numaalloc

import (
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// twoNodes is a machine with CPUs 0 and 2 on node 0, CPU 1 on node 3, and
// CPU 3 offline.
var twoNodes = fstest.MapFS{
	"devices/system/cpu/online":             {Data: []byte("0-2\n")},
	"devices/system/cpu/cpu0/node0":         {Mode: fs.ModeSymlink},
	"devices/system/cpu/cpu1/node3":         {Mode: fs.ModeSymlink},
	"devices/system/cpu/cpu1/nodename":      {Data: []byte("not a node number")},
	"devices/system/cpu/cpu2/node0":         {Mode: fs.ModeSymlink},
	"devices/system/cpu/cpu3/topology/core": {Data: []byte("0\n")},
	"devices/system/node/online":            {Data: []byte("0,3\n")},
}

// noNUMA is a machine whose kernel is built without CONFIG_NUMA.
var noNUMA = fstest.MapFS{
	"devices/system/cpu/online":        {Data: []byte("0-1\n")},
	"devices/system/cpu/cpu0/uevent":   {},
	"devices/system/cpu/cpu1/uevent":   {},
	"devices/system/memory/block_size": {},
}

func TestNodeOf(t *testing.T) {
	tests := []struct {
		name  string
		sysfs fs.FS
		cpu   int
		want  int
		err   string // part of the error text; empty means no error
	}{
		{"first node", twoNodes, 0, 0, ""},
		{"node numbers with a gap", twoNodes, 1, 3, ""},
		{"offline", twoNodes, 3, 0, "cpu 3: the CPU is offline; online are 0-2"},
		{"no such cpu", twoNodes, 4, 0, "cpu 4: no such CPU; online are 0-2"},
		{"negative", twoNodes, -1, 0, "cpu -1: no such CPU"},
		{"kernel without NUMA", noNUMA, 1, 0, ""},
		{"no sysfs", fstest.MapFS{}, 0, 0, "online are unknown"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := nodeOf(test.sysfs, test.cpu)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error = %v, want %q", err, test.err)
			}
			if got != test.want {
				t.Errorf("node = %d, want %d", got, test.want)
			}
		})
	}
}

func TestOnlineCPUs(t *testing.T) {
	tests := []struct {
		name  string
		sysfs fs.FS
		want  []int
		err   string
	}{
		{"list", twoNodes, []int{0, 1, 2}, ""},
		{"no sysfs", fstest.MapFS{}, nil, "file does not exist"},
		{"empty list", fstest.MapFS{"devices/system/cpu/online": {Data: []byte("\n")}}, nil, "list is empty"},
		{"garbage", fstest.MapFS{"devices/system/cpu/online": {Data: []byte("x\n")}}, nil, "not a CPU number"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := onlineCPUs(test.sysfs)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error = %v, want %q", err, test.err)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("cpus = %v, want %v", got, test.want)
			}
		})
	}
}

func TestSpread(t *testing.T) {
	tests := []struct {
		name    string
		allowed []int
		n       int
		want    []int
		err     string
	}{
		{"fewer threads", []int{1, 4, 6}, 2, []int{1, 4}, ""},
		{"as many", []int{1, 4}, 2, []int{1, 4}, ""},
		{"wraps round", []int{1, 4}, 5, []int{1, 4, 1, 4, 1}, ""},
		{"no thread", []int{1}, 0, nil, "0 threads; want 1 or more"},
		{"no cpu", nil, 1, nil, "no CPU is allowed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := spread(test.allowed, test.n)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error = %v, want %q", err, test.err)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("cpus = %v, want %v", got, test.want)
			}
		})
	}
}
