package numaalloc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// oddNodes has CPUs only on node 1 and memory only on node 7.
var (
	oddCPUs      = map[int][]int{0: {0, 1}, 1: {2, 3}}
	oddMemory    = []int{7, 0}
	oddDistances = map[[2]int]int{{0, 0}: 10, {0, 7}: 17, {1, 0}: 28, {1, 7}: 20}
)

func TestCostsFromDistances(t *testing.T) {
	c, err := CostsFromDistances(oddCPUs, oddMemory, func(from, to int) int { return oddDistances[[2]int{from, to}] })
	if err != nil {
		t.Fatal(err)
	}
	inf := math.Inf(1)
	for _, test := range []struct {
		from, to int
		want     float64
	}{
		{0, 0, 1},
		{0, 7, 1.7},
		{1, 0, 1.4},
		{1, 7, 1},    // its nearest
		{1, 1, inf},  // no memory
		{7, 7, inf},  // no CPUs
		{0, 2, inf},  // no such node
		{-1, 0, inf}, // nor such
	} {
		if got := c.Cost(test.from, test.to); got != test.want && !(math.Abs(got-test.want) < 1e-9) {
			t.Errorf("Cost(%d, %d) = %v, want %v", test.from, test.to, got, test.want)
		}
	}
	if c.Source != CostsFromSLIT || c.LatencyNS != nil || c.ReadBandwidth != nil || c.WriteBandwidth != nil {
		t.Errorf("%+v claims more than distances", c)
	}
}

// TestCostsOneWay: the way back can cost something else.
func TestCostsOneWay(t *testing.T) {
	distances := [][]int{{10, 16, 22}, {22, 10, 16}, {16, 22, 10}}
	c, err := CostsFromDistances(map[int][]int{0: {0}, 1: {1}, 2: {2}}, []int{0, 1, 2},
		func(from, to int) int { return distances[from][to] })
	if err != nil {
		t.Fatal(err)
	}
	for from, row := range distances {
		for to, d := range row {
			if got, want := c.Cost(from, to), float64(d)/10; math.Abs(got-want) > 1e-9 {
				t.Errorf("Cost(%d, %d) = %v, want %v", from, to, got, want)
			}
		}
	}
}

func TestCostsFromDistancesErrors(t *testing.T) {
	one := map[int][]int{0: {0}}
	for _, test := range []struct {
		cpus     map[int][]int
		memory   []int
		distance int
		want     string
	}{
		{nil, []int{0}, 10, "0 nodes with CPUs and 1 with memory; want at least one of each"},
		{one, nil, 10, "1 nodes with CPUs and 0 with memory"},
		{map[int][]int{0: {0}, 2: nil}, []int{0}, 10, "node 2: no CPU given"},
		{map[int][]int{-1: {0}}, []int{0}, 10, "node -1: want 0 or more"},
		{one, []int{3, -2}, 10, "node -2: want 0 or more"},
		{one, []int{0}, 9, "9 from node 0 to node 0; want 10 (local) to 255"},
		{one, []int{0}, 256, "256 from node 0 to node 0"},
	} {
		_, err := CostsFromDistances(test.cpus, test.memory, func(int, int) int { return test.distance })
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("error = %v, want %q", err, test.want)
		}
	}
}

// measuredCosts is what two nodes with noise in the second row may give.
func measuredCosts(t *testing.T) *Costs {
	t.Helper()
	c, err := newCosts(CostsMeasured, map[int][]int{0: {0}, 1: {1}}, []int{1, 0, 1})
	if err != nil {
		t.Fatal(err)
	}
	c.LatencyNS = [][]float64{{100, 212}, {99, 110}}
	c.ReadBandwidth = [][]float64{{12e9, 8.5e9}, {8.25e9, 12.125e9}}
	c.WriteBandwidth = [][]float64{{9e9, 4e9}, {4e9, 9e9}}
	c.relate(c.LatencyNS)
	return c
}

func TestCostsString(t *testing.T) {
	const want = `cost (measured, local = 1)
  cpus \ memory  node 0  node 1
         node 0    1.00    2.12
         node 1    1.00    1.00
latency (ns)
  cpus \ memory  node 0  node 1
         node 0   100.0   212.0
         node 1    99.0   110.0
read (GB/s)
  cpus \ memory  node 0  node 1
         node 0   12.00    8.50
         node 1    8.25   12.12
write (GB/s)
  cpus \ memory  node 0  node 1
         node 0    9.00    4.00
         node 1    4.00    9.00
`
	if got := measuredCosts(t).String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestCostsJSON(t *testing.T) {
	text, err := json.Marshal(measuredCosts(t))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"source":"measured","cpu_nodes":[0,1],"memory_nodes":[0,1],` +
		`"cost":[[1,2.12],[1,1]],"latency_ns":[[100,212],[99,110]],` +
		`"read_bytes_per_second":[[12000000000,8500000000],[8250000000,12125000000]],` +
		`"write_bytes_per_second":[[9000000000,4000000000],[4000000000,9000000000]]}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	one, err := CostsFromDistances(map[int][]int{0: {0}}, []int{0}, func(int, int) int { return 10 })
	if err != nil {
		t.Fatal(err)
	}
	text, err = json.Marshal(one)
	if want := `{"source":"distances","cpu_nodes":[0],"memory_nodes":[0],"cost":[[1]]}`; err != nil || string(text) != want {
		t.Errorf("got  %s (%v)\nwant %s", text, err, want)
	}
}

func TestRandomCycle(t *testing.T) {
	for _, n := range []int{1, 2, 3, 1000} {
		next := randomCycle(n)
		at, steps := uint32(0), 0
		for {
			at = next[at]
			steps++
			if at == 0 || steps > n {
				break
			}
		}
		if steps != n {
			t.Errorf("a cycle through %d is closed after %d", n, steps)
		}
	}
	// A prefetcher would follow neighbours.
	next := randomCycle(1000)
	neighbours := 0
	for i, to := range next {
		if d := int(to) - i; d == 1 || d == -1 {
			neighbours++
		}
	}
	if neighbours > 20 {
		t.Errorf("%d of 1000 steps go to a neighbour", neighbours)
	}
}

func TestLargestCache(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	const dir = "devices/system/cpu/cpu2/cache/"
	for _, test := range []struct {
		name  string
		sysfs fstest.MapFS
		want  int
	}{
		{"L3", fstest.MapFS{dir + "index0/size": file("48K\n"), dir + "index3/size": file("32768K\n"), dir + "index2/size": file("1024K\n")}, 32 << 20},
		{"without L3", fstest.MapFS{dir + "index0/size": file("48K\n"), dir + "index2/size": file("512K\n")}, 512 << 10},
		{"garbage", fstest.MapFS{dir + "index0/size": file("big\n"), dir + "index1/size": file("1M\n"), dir + "index2/size": file("512\n"), dir + "uevent": file("")}, unknownCache},
		{"beyond sense", fstest.MapFS{dir + "index0/size": file("99999999999K\n")}, unknownCache},
		{"no sysfs", fstest.MapFS{}, unknownCache},
	} {
		if got := largestCache(test.sysfs, 2); got != test.want {
			t.Errorf("%s: %d bytes, want %d", test.name, got, test.want)
		}
	}
}

func TestMeasurementSize(t *testing.T) {
	for cache, want := range map[int]int{1 << 20: 16 << 20, 32 << 20: 64 << 20, 1 << 30: 128 << 20} {
		if got := sweepBytes(cache); got != want {
			t.Errorf("sweep behind a cache of %d is %d, want %d", cache, got, want)
		}
	}
	for pairs, want := range map[int]time.Duration{1: maxPairTime, 4: maxPairTime, 10: 100 * time.Millisecond, 64: minPairTime} {
		if got := pairTime(pairs); got != want {
			t.Errorf("time of each of %d pairs is %v, want %v", pairs, got, want)
		}
	}
}

func TestTimed(t *testing.T) {
	var calls []int
	took, err := timed(t.Context(), 0, 5, func(i int) { calls = append(calls, i) })
	if err != nil || took < 1 || !slices.Equal(calls, []int{0, 1, 2, 3, 4}) {
		t.Errorf("timed called with %v, took %v (%v)", calls, took, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls = nil
	_, err = timed(ctx, time.Hour, 1, func(i int) {
		calls = append(calls, i)
		if i == 2 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) || len(calls) != 3 {
		t.Errorf("timed went on after it was cancelled: %v (%v)", calls, err)
	}
}

func TestCachedCosts(t *testing.T) {
	t.Cleanup(func() { cachedCosts = nil })
	cachedCosts = nil
	measured := 0
	get := func(key string) *Costs {
		c, err := cached(key, func() (*Costs, error) { measured++; return new(Costs), nil })
		if err != nil {
			t.Error(err)
		}
		return c
	}
	failed := errors.New("failed")
	if _, err := cached("a", func() (*Costs, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("error = %v", err)
	}
	first := get("a")
	if first == nil || get("a") != first || get("b") == first || measured != 2 {
		t.Errorf("%d measurements, want one of each key", measured)
	}
	for i := range maxCachedCosts - 1 {
		get(fmt.Sprint(i)) // pushes a out
	}
	if len(cachedCosts) != maxCachedCosts {
		t.Errorf("%d remembered, want %d", len(cachedCosts), maxCachedCosts)
	}
	measured = 0
	get("b")
	if get("a"); measured != 1 {
		t.Errorf("%d measurements, want a's alone", measured)
	}
}

func TestMeasureWaits(t *testing.T) {
	measuring <- struct{}{}
	defer func() { <-measuring }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	one := map[int][]int{0: {0}}
	const want = "wait for another measurement"
	if _, err := Measure(ctx, one, []int{0}); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), want) {
		t.Errorf("Measure = %v, want %q", err, want)
	}
	if _, err := MeasureCached(ctx, "waits", one, []int{0}); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), want) {
		t.Errorf("MeasureCached = %v, want %q", err, want)
	}
}
