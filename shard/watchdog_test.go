package shard_test

import (
	"bytes"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"numastack/dispatch"
	"numastack/numaalloc"
	"numastack/shard"
)

// TestWatchdog is in a package of its own because the watchdog looks for lines
// that are not the stack's.
func TestWatchdog(t *testing.T) {
	var logged safeBuffer
	a, b := watchedStack(t, 0, &logged), watchedStack(t, 1, &logged)
	_ = a
	held := make(chan struct{})
	l, err := b.Serve([]netip.Addr{netip.MustParseAddr("10.1.0.2")}, 0, 1, func(net.Conn) { holdTheShard(held) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 3 { // one place, one report
		c, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
		if err != nil {
			t.Fatal(err)
		}
		<-held
		_ = c.Close()
	}
	if n := strings.Count(logged.String(), "handler holds its shard"); n != 1 {
		t.Errorf("%d reports, want 1:\n%s", n, logged.String())
	}
	if !strings.Contains(logged.String(), "watchdog_test.go") || !strings.Contains(logged.String(), "holdTheShard") {
		t.Errorf("the report does not say where:\n%s", logged.String())
	}
}

// holdTheShard is the mistake: it sleeps with the shard.
func holdTheShard(held chan<- struct{}) {
	time.Sleep(300 * time.Millisecond)
	held <- struct{}{}
}

var cable = sync.OnceValues(func() ([2]int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return fds, err
})

func watchedStack(t *testing.T, side int, log *safeBuffer) *shard.Set {
	t.Helper()
	fds, err := cable()
	if err != nil {
		t.Fatal(err)
	}
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	plan, err := numaalloc.Placement{Shards: 2}.Plan(topology)
	if err != nil {
		t.Fatal(err)
	}
	cpus := plan.CPUs()
	reta, err := dispatch.NewRETA(4, 1)
	if err != nil {
		t.Fatal(err)
	}
	set, err := shard.New(shard.Config{
		Queues: []*dispatch.Queue{dispatch.NewQueue(fds[side])},
		MTU:    1500, Offloads: shard.Offloads{TCP: true, UDP: true}, Topology: topology, CPUs: cpus[side:], RETA: reta, Toeplitz: dispatch.NewToeplitz(dispatch.VerificationKey),
		Addrs:      []netip.Prefix{netip.MustParsePrefix([2]string{"10.1.0.1/24", "10.1.0.2/24"}[side])},
		SendBuffer: 1 << 20, ReceiveBuffer: 1 << 20, RxBuffers: 16, MaxConns: 10, OffloadThreads: 1,
		Drain: time.Second, HandlerLimit: 20 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(set.Close)
	return set
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
