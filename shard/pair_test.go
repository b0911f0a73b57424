package shard

import (
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"numastack/dispatch"
	"numastack/numaalloc"
)

// The addresses of the two stacks of a pair.
var (
	addrA = netip.MustParseAddr("10.1.0.1")
	addrB = netip.MustParseAddr("10.1.0.2")
	addr6 = [2]netip.Addr{netip.MustParseAddr("fd01::1"), netip.MustParseAddr("fd01::2")}
)

func thisMachine(t testing.TB) *numaalloc.Topology {
	t.Helper()
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	return topology
}

func testConfig(t testing.TB, side, fd int) Config {
	t.Helper()
	topology := thisMachine(t)
	cpus := topology.AllowedCPUs
	key, err := dispatch.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	reta, err := dispatch.NewRETA(4, 1)
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Device: "pair", Queues: []*dispatch.Queue{dispatch.NewQueue(fd)},
		MTU: 1500, Offloads: Offloads{TCP: true, UDP: true}, Topology: topology, CPUs: []int{cpus[side%len(cpus)]}, Toeplitz: dispatch.NewToeplitz(key), RETA: reta,
		Addrs: []netip.Prefix{
			netip.PrefixFrom([2]netip.Addr{addrA, addrB}[side], 24),
			netip.PrefixFrom(addr6[side], 64),
		},
		Spin: 20 * time.Microsecond, SendBuffer: 768 << 10, ReceiveBuffer: 512 << 10, RxBuffers: 64, OffloadThreads: 2, MaxConns: 1000, Drain: time.Second,
		Logger: slog.New(slog.DiscardHandler),
	}
}

// cables maps each end of a socket pair to the other.
var cables sync.Map

// socketPair is a cable: what goes in at one end comes out at the other,
// frame by frame. Super-frames pass whole, as on a TAP.
func socketPair(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20); err != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<20) // what an ordinary user gets
		}
	}
	cables.Store(fds[0], fds[1])
	cables.Store(fds[1], fds[0])
	t.Cleanup(func() { _ = unix.Close(fds[0]); _ = unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// startPair returns two running stacks that are connected to each other.
func startPair(t testing.TB, tune func(*Config)) (a, b *Set) {
	t.Helper()
	fdA, fdB := socketPair(t)
	start := func(side, fd int) *Set {
		cfg := testConfig(t, side, fd)
		if tune != nil {
			tune(&cfg)
		}
		set, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(set.Close)
		return set
	}
	return start(0, fdA), start(1, fdB)
}

// steppedPair returns two shards without threads: the test's goroutine runs
// their turns, one after the other, each 10 microseconds long.
func steppedPair(t testing.TB) (a, b *Shard) {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	fdA, fdB := socketPair(t)
	now := int64(0)
	step := func(side, fd int) *Shard {
		cfg := testConfig(t, side, fd)
		set, err := newSet(cfg)
		if err != nil {
			t.Fatal(err)
		}
		s := set.shards[0]
		s.readClock = func() int64 { now += int64(10 * time.Microsecond); return now }
		if err := s.setup(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.teardown(); set.closeEventFDs() })
		return s
	}
	a, b = step(0, fdA), step(1, fdB)
	t.Cleanup(func() { restoreAffinity(t) })
	settle(t, a, b) // each says which multicast groups it is in
	return a, b
}

// delayed returns by how much the clocks of shards are ahead, for the test to set.
func delayed(shards ...*Shard) *time.Duration {
	later := new(time.Duration)
	for _, s := range shards {
		readClock := s.readClock
		s.readClock = func() int64 { return readClock() + int64(*later) }
	}
	return later
}

// restoreAffinity lets the test's thread run everywhere again.
func restoreAffinity(t testing.TB) {
	t.Helper()
	var set unix.CPUSet
	for _, cpu := range thisMachine(t).AllowedCPUs {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
}

// settle runs turns of both shards until neither finds work.
func settle(t testing.TB, shards ...*Shard) {
	t.Helper()
	for range 10_000 {
		worked := false
		for _, s := range shards {
			worked = s.turn() || worked
		}
		if !worked {
			return
		}
	}
	t.Fatal("the shards find work for ever")
}

// testHandler is a Handler of functions; a nil one does nothing, and a nil
// data consumes everything.
type testHandler struct {
	open     func(*Conn)
	data     func(*Conn, []byte) int
	writable func(*Conn)
	close    func(*Conn, error)
}

func (h *testHandler) Open(c *Conn) {
	if h.open != nil {
		h.open(c)
	}
}

func (h *testHandler) Data(c *Conn, b []byte) int {
	if h.data != nil {
		return h.data(c, b)
	}
	return len(b)
}

func (h *testHandler) Writable(c *Conn) {
	if h.writable != nil {
		h.writable(c)
	}
}

func (h *testHandler) Close(c *Conn, err error) {
	if h.close != nil {
		h.close(c, err)
	}
}

// echoHandler answers with what it got.
func echoHandler() *testHandler {
	return &testHandler{data: func(c *Conn, b []byte) int {
		n, _ := c.Write(b)
		return n
	}}
}

func gettid() int { return unix.Gettid() }
