package integration

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"numastack/stack"
)

// patience is how long a test waits for what should take milliseconds: the
// machine may be busy with others, and a guest is emulated, one CPU at a time.
var patience = map[bool]time.Duration{false: 10 * time.Second, true: time.Minute}[inGuest()]

// variant is one way to set up a stack.
type variant struct {
	shards   int
	steering stack.Steering
	offload  stack.OffloadMode
}

func (v variant) String() string {
	return fmt.Sprintf("shards=%d/steering=%v/offload=%v", v.shards, v.steering, v.offload)
}

// variants are all combinations, or with -short the two that differ most.
func variants() []variant {
	if testing.Short() {
		return []variant{
			{2, stack.SteeringKernel, stack.OffloadAuto},
			{2, stack.SteeringUser, stack.OffloadOff},
		}
	}
	var all []variant
	for _, shards := range []int{1, 2, 4} {
		for _, steering := range []stack.Steering{stack.SteeringKernel, stack.SteeringUser} {
			for _, offload := range []stack.OffloadMode{stack.OffloadAuto, stack.OffloadOff} {
				all = append(all, variant{shards, steering, offload})
			}
		}
	}
	return all
}

// forVariants runs f on a stack of each variant.
func forVariants(t *testing.T, f func(t *testing.T, r *rig)) {
	for _, v := range variants() {
		t.Run(v.String(), func(t *testing.T) {
			f(t, open(t, v.config()))
		})
	}
}

// config has groups stay where they are, as tests say on which shard a flow is.
func (v variant) config() stack.Config {
	return stack.Config{Shards: v.shards, Steering: v.steering, Offload: v.offload, Rebalance: stack.RebalanceOff}
}

// rig is a stack on a device and in subnets that no other test uses.
type rig struct {
	*stack.Stack
	subnet
	cfg stack.Config
}

// subnet is where the stack and the kernel meet.
type subnet struct {
	device       string
	host4, self4 netip.Addr // the kernel's address and the stack's
	host6, self6 netip.Addr
}

var subnets atomic.Uint32

func newSubnet() subnet {
	n := subnets.Add(1)
	v4 := func(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 64 + byte(n>>8), byte(n), last}) }
	v6 := func(last byte) netip.Addr {
		return netip.AddrFrom16([16]byte{0: 0xfd, 2: byte(n >> 8), 3: byte(n), 15: last})
	}
	return subnet{
		device: "it" + strconv.Itoa(int(n)),
		host4:  v4(1), self4: v4(2),
		host6: v6(1), self6: v6(2),
	}
}

// prefixes returns the addresses of one side with their lengths; below MTU 1280
// there is no IPv6.
func (n subnet) prefixes(v4, v6 netip.Addr, mtu int) []netip.Prefix {
	p := []netip.Prefix{netip.PrefixFrom(v4, 24)}
	if mtu == 0 || mtu >= 1280 {
		p = append(p, netip.PrefixFrom(v6, 64))
	}
	return p
}

// family is one address family of a rig.
type family struct {
	name       string
	host, self netip.Addr
}

func (r *rig) families() []family {
	f := []family{{"IPv4", r.host4, r.self4}}
	if len(r.cfg.Addrs) > 1 {
		f = append(f, family{"IPv6", r.host6, r.self6})
	}
	return f
}

// forFamilies runs f with IPv4 and, where the MTU allows it, IPv6.
func (r *rig) forFamilies(t *testing.T, f func(t *testing.T, f family)) {
	for _, fam := range r.families() {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

// configure fills in what makes cfg the configuration of a test.
func (n subnet) configure(t testing.TB, cfg stack.Config) stack.Config {
	cfg.Device = n.device
	cfg.Addrs = n.prefixes(n.self4, n.self6, cfg.MTU)
	cfg.HostAddrs = n.prefixes(n.host4, n.host6, cfg.MTU)
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
	return cfg
}

// open starts a stack with the settings of cfg, on a device and addresses of its
// own. When the test ends, connections and receive buffers must have come back.
func open(t *testing.T, cfg stack.Config) *rig {
	t.Helper()
	n := newSubnet()
	return n.open(t, n.configure(t, cfg))
}

// open starts a stack with the whole of cfg.
func (n subnet) open(t *testing.T, cfg stack.Config) *rig {
	t.Helper()
	needNetwork(t)
	s, err := stack.New(cfg)
	if errors.Is(err, os.ErrPermission) && cfg.Steering == stack.SteeringKernel {
		t.Skipf("needs the right to load a steering program: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Stack: s, subnet: n, cfg: cfg}
	t.Cleanup(func() {
		if s.Err() == nil {
			r.settle(t)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close the stack: %v", err)
		}
	})
	return r
}

// settle waits until every connection has ended and every buffer is back.
func (r *rig) settle(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		sum := r.sum()
		if sum.ConnsOpen != 0 || sum.BuffersLent != 0 {
			return fmt.Errorf("%d connections open and %d of %d buffers lent after the clients have gone, want 0",
				sum.ConnsOpen, sum.BuffersLent, sum.Buffers)
		}
		return nil
	})
}

// totals are counters added up over shards and groups.
type totals struct {
	stack.ShardStats
	frames, checksumErrors, outOfOrder uint64
}

func (r *rig) sum() (sum totals) {
	sum.DroppedByCause = make(map[string]uint64)
	for _, s := range r.Stats().Shards {
		sum.RxFrames += s.RxFrames
		sum.RxBytes += s.RxBytes
		sum.Missteered += s.Missteered
		sum.RingFull += s.RingFull
		sum.Dropped += s.Dropped
		for cause, n := range s.DroppedByCause {
			sum.DroppedByCause[cause] += n
		}
		sum.FramesKept += s.FramesKept
		sum.MoveStallMax = max(sum.MoveStallMax, s.MoveStallMax)
		sum.ConnsOpen += s.ConnsOpen
		sum.ConnsAccepted += s.ConnsAccepted
		sum.ConnsDialed += s.ConnsDialed
		sum.ConnsRefused += s.ConnsRefused
		sum.DatagramsDropped += s.DatagramsDropped
		sum.Buffers += s.Buffers
		sum.BuffersLent += s.BuffersLent
		for _, g := range s.Groups {
			sum.frames += g.Frames
			sum.checksumErrors += g.ChecksumErrors
			sum.outOfOrder += g.OutOfOrder
		}
	}
	return sum
}

// groupFrames returns the frames delivered to each group, and its shard.
func (r *rig) groupFrames() (frames map[int]uint64, owner map[int]int) {
	frames, owner = make(map[int]uint64), make(map[int]int)
	for _, s := range r.Stats().Shards {
		for _, g := range s.Groups {
			frames[g.Group], owner[g.Group] = g.Frames, s.Shard
		}
	}
	return frames, owner
}

// eventually waits until check returns nil, and fails with its last error.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	end := time.Now().Add(patience)
	for err := check(); err != nil; err = check() {
		if time.Now().After(end) {
			t.Errorf("after %v: %v", patience, err)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// dialTCP connects from the kernel to port of the stack. The connection ends
// with the test, and no call on it takes longer than patience.
func dialTCP(t *testing.T, to netip.Addr, port int) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, uint16(port)).String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // most tests have closed it
	setDeadline(t, c)
	return c.(*net.TCPConn)
}

// dialUDP opens a socket of the kernel towards port of the stack.
func dialUDP(t *testing.T, to netip.Addr, port int) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", netip.AddrPortFrom(to, uint16(port)).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	setDeadline(t, c)
	return c.(*net.UDPConn)
}

func setDeadline(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
}

// offloadsSegments reports whether UDP_SEGMENT sends arrive in one frame.
func (r *rig) offloadsSegments() bool { return strings.Contains(r.Offloads(), "uso") }
