package numaalloc

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// cacheLine is what one access fetches on nearly every machine.
	cacheLine = 64
	// chaseStride keeps two steps of the chase out of the pair of lines that
	// Intel's adjacent-line prefetcher fetches together.
	chaseStride = 2 * cacheLine

	// unknownCache is assumed where sysfs tells no cache size.
	unknownCache = 32 << 20
	// minSweep and maxSweep bound the bytes in cache lines that a chase or a
	// stream goes through: twice the last-level cache, if possible. The upper
	// one keeps a node within 384 MiB, as the lines of a chase lie chaseStride
	// apart. Behind a cache larger than half of it the chase hits in the cache
	// now and then, and costs come out too low.
	minSweep = 16 << 20
	maxSweep = 128 << 20

	// All pairs together take about measureTime, but each at least
	// minPairTime and at most maxPairTime: half for latency, a quarter each
	// for reads and writes.
	measureTime = time.Second
	minPairTime = 20 * time.Millisecond
	maxPairTime = 150 * time.Millisecond

	// A slice is what is timed at once. The median over slices forgets those
	// that were interrupted.
	stepsPerSlice = 2048    // 0.2 ms at 100 ns
	bytesPerSlice = 1 << 20 // 0.1 ms at 10 GB/s

	// maxCachedCosts is how many topologies are remembered: they change when
	// CPUs go offline and come back.
	maxCachedCosts = 8
)

// measuring lets one measurement run at a time, as two would see each other. It
// also guards cachedCosts.
var (
	measuring   = make(chan struct{}, 1)
	cachedCosts []keyedCosts // oldest first
)

type keyedCosts struct {
	key   string
	costs *Costs
}

// Measure measures the cost function: for every node with CPUs and every node
// with memory the latency, by a chase of pointers through a random cycle, and
// the bandwidth of streaming reads and writes, by one CPU, through more memory
// than the last-level cache holds. cpuNodes has for each node the CPUs that may
// be used, of which the first one that is online serves; memNodes are nodes
// with memory.
//
// It takes 0.15 s per pair of nodes, about 1 s for 7 to 50 pairs and 20 ms per
// pair above that, and in addition some 0.1 s per node with memory, to get and
// check six times the last-level cache (48 to 384 MiB) there; a virtual machine
// whose host has yet to find that memory takes longer. It occupies one CPU after
// the other, on threads of its own: call it before the shards start to spin, or
// the figures are those of a busy machine.
//
// A wrong figure would be worse than none: Measure fails when memory cannot be
// bound (ErrNotPermitted) or, as the kernel says afterwards, is not all on its
// node, for example because that is full. CostsFromDistances then remains. Any
// goroutine may call it; a second call waits for the first, or for ctx.
func Measure(ctx context.Context, cpuNodes map[int][]int, memNodes []int) (*Costs, error) {
	if err := startMeasuring(ctx); err != nil {
		return nil, err
	}
	defer stopMeasuring()
	return measure(ctx, cpuNodes, memNodes)
}

// MeasureCached is Measure, once for each key: the key stands for the topology,
// and whoever sees that change asks with another one. The last 8 are kept;
// failures are not.
func MeasureCached(ctx context.Context, key string, cpuNodes map[int][]int, memNodes []int) (*Costs, error) {
	if err := startMeasuring(ctx); err != nil {
		return nil, err
	}
	defer stopMeasuring()
	return cached(key, func() (*Costs, error) { return measure(ctx, cpuNodes, memNodes) })
}

func startMeasuring(ctx context.Context) error {
	select {
	case measuring <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("measure memory costs: wait for another measurement: %w", context.Cause(ctx))
	}
}

func stopMeasuring() { <-measuring }

func cached(key string, measure func() (*Costs, error)) (*Costs, error) {
	for _, c := range cachedCosts {
		if c.key == key {
			return c.costs, nil
		}
	}
	costs, err := measure()
	if err != nil {
		return nil, err
	}
	if len(cachedCosts) == maxCachedCosts {
		cachedCosts = slices.Delete(cachedCosts, 0, 1)
	}
	cachedCosts = append(cachedCosts, keyedCosts{key, costs})
	return costs, nil
}

func measure(ctx context.Context, cpuNodes map[int][]int, memNodes []int) (*Costs, error) {
	costs, err := newCosts(CostsMeasured, cpuNodes, memNodes)
	if err != nil {
		return nil, fmt.Errorf("measure memory costs: %w", err)
	}
	cache := 0
	for _, cpus := range cpuNodes {
		cache = max(cache, largestCache(os.DirFS("/sys"), cpus[0]))
	}
	m := &measurement{
		calls: &kernelMemory, costs: costs, cpuNodes: cpuNodes,
		sweep:   sweepBytes(cache),
		perPair: pairTime(len(costs.CPUNodes) * len(costs.MemoryNodes)),
	}
	if err := m.run(ctx); err != nil {
		return nil, fmt.Errorf("measure memory costs: %w", err)
	}
	return costs, nil
}

func sweepBytes(cache int) int { return min(max(2*cache, minSweep), maxSweep) }

func pairTime(pairs int) time.Duration {
	return min(max(measureTime/time.Duration(pairs), minPairTime), maxPairTime)
}

// largestCache returns the size in bytes of a CPU's largest cache, which is the
// last-level one.
func largestCache(sysfs fs.FS, cpu int) int {
	dir := fmt.Sprintf("devices/system/cpu/cpu%d/cache", cpu)
	entries, _ := fs.ReadDir(sysfs, dir) // without, there is nothing to look at
	largest := 0
	for _, entry := range entries {
		text, err := fs.ReadFile(sysfs, path.Join(dir, entry.Name(), "size"))
		if err != nil {
			continue
		}
		kB, isK := strings.CutSuffix(strings.TrimSpace(string(text)), "K")
		if size, err := strconv.Atoi(kB); err == nil && isK && size <= 1<<30 {
			largest = max(largest, size<<10)
		}
	}
	if largest == 0 {
		return unknownCache
	}
	return largest
}

// measurement is one run of Measure.
type measurement struct {
	calls    *memoryCalls
	costs    *Costs
	cpuNodes map[int][]int
	sweep    int // bytes in cache lines, per chase and per stream
	perPair  time.Duration
}

// run fills the matrices, one memory node after the other so that only one
// node's memory is in use.
func (m *measurement) run(ctx context.Context) error {
	c := m.costs
	c.LatencyNS, c.ReadBandwidth, c.WriteBandwidth = c.matrix(), c.matrix(), c.matrix()
	cycle := randomCycle(m.sweep / cacheLine)
	for j, node := range c.MemoryNodes {
		if err := m.memoryNode(ctx, j, node, cycle); err != nil {
			return err
		}
	}
	c.relate(c.LatencyNS)
	return nil
}

func (m *measurement) memoryNode(ctx context.Context, j, node int, cycle []uint32) error {
	chaseBytes := len(cycle) * chaseStride
	arena, err := newArena(ArenaConfig{
		Node: node, AllocLimit: chaseBytes + m.sweep + 2*hugePage,
		HugePages: true, // fewer TLB misses between us and the memory
	}, m.calls)
	if err != nil {
		return err
	}
	defer func() { _ = arena.Close() }()
	if err := arena.FirstTouch(); err != nil {
		return err
	}
	memory, err := arena.Alloc(chaseBytes)
	if err != nil {
		return err
	}
	stream, err := arena.Alloc(m.sweep)
	if err != nil {
		return err
	}
	onNode, elsewhere, absent, err := arena.Verify()
	if err != nil {
		return err
	}
	if elsewhere+absent > 0 {
		return fmt.Errorf("node %d has %d of %d pages; want all: it is full", node, onNode, onNode+elsewhere+absent)
	}

	for i, next := range cycle {
		binary.NativeEndian.PutUint32(memory[i*chaseStride:], next*chaseStride)
	}
	at := uint32(0)
	for i, from := range m.costs.CPUNodes {
		err := onPinnedThread(m.cpuNodes[from], func() error {
			return m.pair(ctx, i, j, memory, stream, &at)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// pair measures from the thread it runs on. The stream of reads comes before the
// chase, to push the chase's lines out of this CPU's caches, and the stream of
// writes after it, so that the next CPU does not find them there. at is where
// the last chase stopped: the lines ahead are those unused for longest.
func (m *measurement) pair(ctx context.Context, i, j int, memory, stream []byte, at *uint32) error {
	read, err := m.stream(ctx, stream, readLines)
	if err != nil {
		return err
	}
	step, err := timed(ctx, m.perPair/2, 1, func(int) { *at = chase(memory, *at, stepsPerSlice) })
	if err != nil {
		return err
	}
	write, err := m.stream(ctx, stream, func(b []byte) { clear(b) })
	if err != nil {
		return err
	}
	m.costs.LatencyNS[i][j] = float64(step) / stepsPerSlice
	m.costs.ReadBandwidth[i][j] = bytesPerSlice / read.Seconds()
	m.costs.WriteBandwidth[i][j] = bytesPerSlice / write.Seconds()
	return nil
}

// stream runs f over slices of b, all of them at least once.
func (m *measurement) stream(ctx context.Context, b []byte, f func([]byte)) (time.Duration, error) {
	n := len(b) / bytesPerSlice
	return timed(ctx, m.perPair/4, n, func(i int) {
		start := i % n * bytesPerSlice
		f(b[start : start+bytesPerSlice])
	})
}

// timed calls f with 0, 1, 2 and so on for about that long and at least so many
// times, and returns the median of what a call took, 1 ns at least.
func timed(ctx context.Context, long time.Duration, least int, f func(i int)) (time.Duration, error) {
	var took []time.Duration
	begin := time.Now()
	for last := begin; len(took) < least || last.Sub(begin) < long; {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		f(len(took))
		now := time.Now()
		took = append(took, now.Sub(last))
		last = now
	}
	slices.Sort(took)
	return max(took[len(took)/2], 1), nil
}

// randomCycle returns a permutation of 0..n-1 that is a single cycle: where to
// go from each of them (Sattolo's algorithm). It is the same every time.
func randomCycle(n int) []uint32 {
	random := rand.New(rand.NewPCG(0, uint64(n)))
	next := make([]uint32, n)
	for i := range next {
		next[i] = uint32(i)
	}
	for i := n - 1; i > 0; i-- {
		j := random.IntN(i)
		next[i], next[j] = next[j], next[i]
	}
	return next
}

// chase follows the cycle for so many steps. Each load needs the one before, so
// neither the CPU nor a prefetcher can run ahead.
func chase(memory []byte, at uint32, steps int) uint32 {
	for range steps {
		at = binary.NativeEndian.Uint32(memory[at:])
	}
	return at
}

// readLines fetches every cache line of b.
func readLines(b []byte) {
	var sum uint64
	for len(b) >= cacheLine {
		sum += binary.NativeEndian.Uint64(b)
		b = b[cacheLine:]
	}
	runtime.KeepAlive(sum)
}

// onPinnedThread runs f on a thread of its own, pinned to the first of the CPUs
// that is there. The thread ends with f.
func onPinnedThread(cpus []int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread is not used again
		var err error
		for _, cpu := range cpus {
			if err = Pin(cpu); err == nil {
				break
			}
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
