package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"numastack/stack"
)

// pathMTU is what the narrow link carries, in bytes of an IP packet.
const pathMTU = 1300

// path is a stack whose peer is behind a router and a narrow link:
//
//	stack ── TAP, 1500 ── the tests' namespace, which forwards ── 1300 ── peer
//
// Both devices of the second link say 1500, and nobody but the router knows
// better, so that neither side's MSS tells.
type path struct {
	*rig
	far  subnet // host is the router's side of the second link, self is the peer
	peer *namespace
}

// openPath makes a path and a stack at its end.
func openPath(t *testing.T, cfg stack.Config) *path {
	t.Helper()
	near := newSubnet()
	cfg = near.configure(t, cfg)
	cfg.Gateways = []netip.Addr{near.host4, near.host6}
	p := &path{rig: near.open(t, cfg), far: newSubnet()}
	forward(t)
	p.peer = newNamespace(t)
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: p.far.device, MTU: 1500},
		PeerName:  p.far.device, PeerMTU: 1500, PeerNamespace: netlink.NsFd(p.peer.fd),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Skipf("needs a veth device: %v", err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(veth); err != nil {
			t.Error(err)
		}
	})
	if err := p.far.configureLink(p.far.host4, p.far.host6, nil); err != nil {
		t.Fatal(err)
	}
	if err := p.peer.do(func() error {
		return p.far.configureLink(p.far.self4, p.far.self6, []netip.Addr{p.far.host4, p.far.host6})
	}); err != nil {
		t.Fatal(err)
	}
	p.widen(t, pathMTU)
	return p
}

// widen sets what the second link carries.
func (p *path) widen(t *testing.T, mtu int) {
	t.Helper()
	link, err := netlink.LinkByName(p.far.device)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.Addr{p.far.self4, p.far.self6} {
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: one(to), MTU: mtu, MTULock: true}); err != nil {
			t.Fatalf("route to %v: %v", to, err)
		}
	}
}

// configureLink gives the device of the subnet two addresses and default routes.
func (n subnet) configureLink(v4, v6 netip.Addr, gateways []netip.Addr) error {
	link, err := netlink.LinkByName(n.device)
	if err != nil {
		return err
	}
	// The link-local address too is there at once, or the first packets wait for
	// it: neighbor discovery needs one.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+n.device+"/accept_dad", []byte("0"), 0o644); err != nil {
		return err
	}
	for _, p := range n.prefixes(v4, v6, 0) {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %v: %w", p, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, gw := range gateways {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw.AsSlice()}); err != nil {
			return fmt.Errorf("route by way of %v: %w", gw, err)
		}
	}
	return nil
}

// one is the subnet of one address.
func one(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// forward makes the tests' namespace a router until the test ends.
func forward(t *testing.T) {
	t.Helper()
	for _, name := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		before, err := os.ReadFile(name)
		if err == nil {
			err = os.WriteFile(name, []byte("1"), 0o644)
		}
		if err != nil {
			t.Skipf("needs a router: %v", err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(name, before, 0o644); err != nil {
				t.Error(err)
			}
		})
	}
}

// dropErrors keeps the router's ICMP errors from the stack, but nothing else:
// packets of its own do not go there, those that it forwards do.
func (p *path) dropErrors(t *testing.T) {
	t.Helper()
	for _, f := range p.families() {
		rule := netlink.NewRule()
		rule.IifName, rule.Dst, rule.Type = "lo", one(f.self), unix.RTN_BLACKHOLE
		rule.Family = unix.AF_INET
		if f.self.Is6() {
			rule.Family = unix.AF_INET6
		}
		if err := netlink.RuleAdd(rule); err != nil {
			t.Skipf("needs a rule for routes: %v", err)
		}
		t.Cleanup(func() {
			if err := netlink.RuleDel(rule); err != nil {
				t.Error(err)
			}
		})
	}
}

// peers are the addresses of the peer and the stack.
func (p *path) peers() []family {
	return []family{{"IPv4", p.far.self4, p.self4}, {"IPv6", p.far.self6, p.self6}}
}

// namespace is a network namespace of its own, with a thread in it.
type namespace struct {
	fd    int // of the namespace
	calls chan func()
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{calls: make(chan func())}
	ready, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread would not end, and /proc/net is its namespace's.
			defer runtime.UnlockOSThread()
			locked := make(chan struct{})
			go func() {
				runtime.LockOSThread()
				close(locked)
				n.serve(ready, ended)
			}()
			<-locked
			return
		}
		n.serve(ready, ended)
	}()
	if err := <-ready; err != nil {
		t.Skipf("needs a second network namespace: %v", err)
	}
	t.Cleanup(func() {
		close(n.calls)
		<-ended
	})
	return n
}

func (n *namespace) serve(ready chan<- error, ended chan<- struct{}) {
	defer close(ended)
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	ready <- err
	if err != nil {
		return
	}
	for call := range n.calls {
		call()
	}
	_ = unix.Close(n.fd)
}

// do runs f in the namespace. Sockets that f opens stay there.
func (n *namespace) do(f func() error) error {
	done := make(chan error)
	n.calls <- func() { done <- f() }
	return <-done
}

// bulkSize is more than the windows, in bytes.
const bulkSize = 4 << 20

// bulk moves a lot from the stack to the peer, in both families at once, on
// connections that the stack has opened and on ones that the peer has.
func (p *path) bulk(t *testing.T) {
	t.Helper()
	p.handleTCP(t, chargenPort, chargen{})
	deadline := time.Now().Add(time.Minute)
	var wg sync.WaitGroup
	for _, f := range p.peers() {
		transfer := func(how string, move func() error) {
			wg.Go(func() {
				begin := time.Now()
				if err := move(); err != nil {
					t.Errorf("%s, a connection of the %s: %v", f.name, how, err)
				}
				t.Logf("%s, a connection of the %s: %d MiB in %v", f.name, how, bulkSize>>20, time.Since(begin).Round(time.Millisecond))
			})
		}
		ours, theirs := p.connect(t, f)
		_, _ = ours.SetDeadline(deadline), theirs.SetDeadline(deadline) // as when they were opened
		want := payload(1, bulkSize)
		transfer("stack", func() error { return send(ours, theirs, want) })
		var c net.Conn
		if err := p.peer.do(func() (err error) {
			c, err = net.DialTimeout("tcp", netip.AddrPortFrom(f.self, chargenPort).String(), patience)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(deadline)
		transfer("peer", func() error {
			defer c.Close()
			return chargenStream(c, bulkSize)
		})
	}
	wg.Wait()
}

// connect opens a connection from the stack to the peer and returns both ends.
func (p *path) connect(t *testing.T, f family) (ours, theirs net.Conn) {
	t.Helper()
	var l net.Listener
	if err := p.peer.do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(f.host, 0).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours = p.dial(t, "tcp", l.Addr().String())
	return ours, accept(t, l)
}

// send moves b from one end of a connection to the other, and closes the first.
func send(from, to net.Conn, b []byte) error {
	sent := sendAll(from, b)
	got, err := io.ReadAll(to)
	return errors.Join(err, <-sent, same(got, b))
}

// sendAll writes b and closes, in the background.
func sendAll(c net.Conn, b []byte) <-chan error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(b)
		sent <- errors.Join(err, c.Close())
	}()
	return sent
}

// offloads are both settings, or with -short the default.
func offloads() []stack.OffloadMode {
	if testing.Short() {
		return []stack.OffloadMode{stack.OffloadAuto}
	}
	return []stack.OffloadMode{stack.OffloadAuto, stack.OffloadOff}
}

// TestPathMTU sends in bulk to a peer behind a narrow link. The stack's segments
// are too large at first; the router says so, and they become smaller.
func TestPathMTU(t *testing.T) {
	for _, offload := range offloads() {
		t.Run("offload="+offload.String(), func(t *testing.T) {
			p := openPath(t, stack.Config{Shards: 2, Offload: offload})
			c := captureDevice(t, p.device)
			p.bulk(t)
			// A connection may also find out by itself, when its timeouts come
			// first.
			tooBig, wide := p.survey(c.end(t))
			t.Logf("the router said %d times that a packet is too big; %d connections found out by themselves", tooBig, p.blackHoles())
			if tooBig == 0 || wide > 0 {
				t.Errorf("%d messages of the router that packets are too big, want some; %d of the last frames are too large", tooBig, wide)
			}
		})
	}
}

// TestBlackHole is TestPathMTU with a router whose messages are lost. Large
// segments just vanish, and the connections have to find out why.
func TestBlackHole(t *testing.T) {
	for _, offload := range offloads() {
		t.Run("offload="+offload.String(), func(t *testing.T) {
			p := openPath(t, stack.Config{Shards: 2, Offload: offload})
			p.dropErrors(t)
			c := captureDevice(t, p.device)
			p.bulk(t)
			if tooBig, wide := p.survey(c.end(t)); tooBig != 0 || wide > 0 {
				t.Errorf("%d messages of the router, want none; %d of the last frames are too large", tooBig, wide)
			}
			if n := p.blackHoles(); n < 4 {
				t.Errorf("%d connections found the black hole, want all 4", n)
			}
		})
	}
}

// survey counts what the router said about too large packets, and the frames
// that are too large for the path all the same among the last of the stack's.
func (p *path) survey(frames []captured) (tooBig, wide int) {
	ours := 0
	for i := len(frames) - 1; i >= 0; i-- {
		f := &frames[i]
		if f.ours {
			if ours++; ours <= 50 && f.wireLen() > pathMTU+14 {
				wide++
			}
			continue
		}
		m, _ := dissect(f.bytes[14:])
		if len(m.l4) > 1 && (m.proto == 1 && m.l4[0] == 3 && m.l4[1] == 4 || m.proto == 58 && m.l4[0] == 2) {
			tooBig++
		}
	}
	return tooBig, wide
}

func (p *path) blackHoles() (n uint64) {
	for _, s := range p.Stats().Shards {
		n += s.BlackHoles
	}
	return n
}

// TestPathNarrows makes the link narrow in the middle of a transfer, with a
// window's worth of large segments on the way.
func TestPathNarrows(t *testing.T) {
	p := openPath(t, stack.Config{Shards: 2})
	for _, f := range p.peers() {
		p.widen(t, 1500)
		deadline := time.Now().Add(time.Minute)
		c := captureDevice(t, p.device)
		ours, theirs := p.connect(t, f)
		_, _ = ours.SetDeadline(deadline), theirs.SetDeadline(deadline) // as when they were opened
		want := payload(2, 16*bulkSize)
		sent := sendAll(ours, want)
		// The rest waits for us to read on.
		got := make([]byte, bulkSize)
		if _, err := io.ReadFull(theirs, got); err != nil {
			t.Errorf("%s: %v", f.name, err)
		}
		p.widen(t, pathMTU)
		rest, err := io.ReadAll(theirs)
		if err := errors.Join(err, <-sent, same(append(got, rest...), want)); err != nil {
			t.Errorf("%s: %v", f.name, err)
		}
		if tooBig, wide := p.survey(c.end(t)); tooBig == 0 || wide > 0 {
			t.Errorf("%s: %d messages of the router that packets are too big, want some; %d of the last frames are too large", f.name, tooBig, wide)
		}
	}
	if n := p.blackHoles(); n != 0 {
		t.Errorf("%d connections found a black hole, which is not there", n)
	}
}
