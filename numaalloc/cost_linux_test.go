package numaalloc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cpuNodes returns the CPUs that this process may use, by node.
func cpuNodes(t *testing.T) map[int][]int {
	t.Helper()
	topology, err := ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	return topology.CPUNodes()
}

// TestMeasure sees that every pair gets a figure that can be one. What it should
// be, nobody knows here.
func TestMeasure(t *testing.T) {
	memory, cpus := memoryNodes(t), cpuNodes(t)
	t.Cleanup(func() { cachedCosts = nil })
	c, err := MeasureCached(t.Context(), "test", cpus, memory)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", c)
	if c.Source != CostsMeasured || len(c.CPUNodes) != len(cpus) || !slices.Equal(c.MemoryNodes, memory) {
		t.Errorf("costs are %s, of nodes %v × %v", c.Source, c.CPUNodes, c.MemoryNodes)
	}
	for _, from := range c.CPUNodes {
		nearest := math.Inf(1)
		for _, to := range c.MemoryNodes {
			cost := c.Cost(from, to)
			if cost < 1 || math.IsInf(cost, 0) || math.IsNaN(cost) || from == to && cost != 1 {
				t.Errorf("Cost(%d, %d) = %v", from, to, cost)
			}
			nearest = min(nearest, cost)
		}
		if nearest != 1 {
			t.Errorf("the nearest memory of node %d costs %v, want 1", from, nearest)
		}
	}
	for name, matrix := range map[string][][]float64{"latency": c.LatencyNS, "read": c.ReadBandwidth, "write": c.WriteBandwidth} {
		for _, v := range slices.Concat(matrix...) {
			if !(v > 0) || math.IsInf(v, 0) {
				t.Errorf("%s has %v", name, v)
			}
		}
	}
	again, err := MeasureCached(t.Context(), "test", cpus, memory)
	if err != nil || again != c {
		t.Errorf("measured again (%v)", err)
	}
}

func TestMeasureErrors(t *testing.T) {
	memory, cpus := memoryNodes(t), cpuNodes(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	some := slices.Collect(maps.Values(cpus))[0]
	refused := kernelMemory
	refused.mbind = func([]byte, int, bool) error { return unix.EPERM }
	refused.mmap = func(n int) ([]byte, error) {
		if n > os.Getpagesize() {
			t.Errorf("%d bytes are mapped for nothing", n)
		}
		return kernelMemory.mmap(n)
	}
	notTold := kernelMemory
	notTold.pageNodes = func([]byte, []int32) error { return unix.EPERM }
	full := kernelMemory
	full.pageNodes = func(_ []byte, status []int32) error {
		for i := range status {
			status[i] = int32(memory[0])
		}
		status[0]++
		return nil
	}
	for _, test := range []struct {
		name   string
		ctx    context.Context
		calls  *memoryCalls
		cpus   map[int][]int
		memory []int
		is     error
		want   string
	}{
		{"cancelled", cancelled, &kernelMemory, cpus, memory, context.Canceled, ""},
		{"refused", t.Context(), &refused, cpus, memory, ErrNotPermitted, ""},
		{"not told where pages are", t.Context(), &notTold, cpus, memory, ErrNotPermitted, ""},
		{"full", t.Context(), &full, cpus, memory[:1], nil, "pages; want all: it is full"},
		{"no such cpu", t.Context(), &kernelMemory, map[int][]int{0: {maxCPUs - 1}}, memory, unix.EINVAL, "pin thread to cpu 65535"},
		{"no such cpu on another node", t.Context(), &kernelMemory, map[int][]int{0: some, 99: {maxCPUs - 1}}, memory, unix.EINVAL, "pin thread to cpu 65535"},
		{"no such memory", t.Context(), &kernelMemory, cpus, []int{memory[0], maxNodes - 1}, unix.EINVAL, "the node has no memory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			costs, err := newCosts(CostsMeasured, test.cpus, test.memory)
			if err != nil {
				t.Fatal(err)
			}
			m := &measurement{calls: test.calls, costs: costs, cpuNodes: test.cpus, sweep: 1 << 20}
			err = m.run(test.ctx)
			if err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %v %q", err, test.is, test.want)
			}
		})
	}
	if _, err := Measure(t.Context(), nil, memory); err == nil || !strings.Contains(err.Error(), "0 nodes with CPUs") {
		t.Errorf("Measure without CPUs: %v", err)
	}
}

func TestMeasureUnmapsItsMemory(t *testing.T) {
	memory, cpus := memoryNodes(t), cpuNodes(t)
	mapped := 0
	calls := kernelMemory
	calls.mmap = func(n int) ([]byte, error) { mapped++; return kernelMemory.mmap(n) }
	calls.munmap = func(b []byte) error { mapped--; return kernelMemory.munmap(b) }
	costs, err := newCosts(CostsMeasured, cpus, memory)
	if err != nil {
		t.Fatal(err)
	}
	m := &measurement{calls: &calls, costs: costs, cpuNodes: cpus, sweep: 1 << 20}
	if err := m.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if mapped != 0 {
		t.Errorf("%d mappings are left", mapped)
	}
}

func TestOnPinnedThread(t *testing.T) {
	allowed, err := allowedAtStart()
	if err != nil {
		t.Fatal(err)
	}
	onOwnThread(func() {
		before, err := affinity(0)
		if err != nil {
			t.Error(err)
		}
		for _, cpu := range allowed {
			var thread string
			err := onPinnedThread([]int{maxCPUs - 1, cpu}, func() error {
				thread = fmt.Sprintf("/proc/self/task/%d", unix.Gettid())
				if mask, err := affinity(0); err != nil || !slices.Equal(mask, []int{cpu}) {
					t.Errorf("runs on %v (%v), want %d", mask, err, cpu)
				}
				return unix.EDOM
			})
			if !errors.Is(err, unix.EDOM) {
				t.Errorf("error = %v, want that of the function", err)
			}
			// It is pinned, so nothing else may get it.
			for range 1000 {
				if _, err = os.Stat(thread); err != nil {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
			if !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there (%v)", thread, err)
			}
		}
		if after, err := affinity(0); err != nil || !slices.Equal(after, before) {
			t.Errorf("its caller may run on %v (%v) now, want %v", after, err, before)
		}
	})
	ran := false
	err = onPinnedThread([]int{maxCPUs - 1}, func() error { ran = true; return nil })
	if ran || !errors.Is(err, unix.EINVAL) {
		t.Errorf("ran: %t (%v); want an error", ran, err)
	}
}
