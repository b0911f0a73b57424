package shard

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"numastack/dispatch"
)

// portsInto returns n local ports from which g may dial remote.
func portsInto(g *Group, local netip.Addr, remote netip.AddrPort, n int) (ports []uint16) {
	for port := range ephemeralPorts {
		if g.shard.set.groupOf(protoTCP, netip.AddrPortFrom(local, port), remote) == g.id {
			if ports = append(ports, port); len(ports) == n {
				break
			}
		}
	}
	return ports
}

// withGroups gives a stack of one shard n flow groups.
// TestManyDeadNeighbors: gVisor waits for 64 of them at a time, and gives up the
// oldest in a goroutine of its own. Each dial learns that nobody is there.
func TestManyDeadNeighbors(t *testing.T) {
	a, _ := startPair(t, withGroups(t, 1))
	const dials = 100
	errs := make(chan error, dials)
	for i := range dials {
		remote := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(20 + i)}), 7)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_, err := a.DialNet(ctx, netip.AddrPort{}, remote)
			errs <- err
		}()
	}
	for range dials {
		if err := <-errs; !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("dial to nobody: %v, want EHOSTUNREACH", err)
		}
	}
}

func withGroups(t testing.TB, n int) func(*Config) {
	return func(cfg *Config) {
		var err error
		if cfg.RETA, err = dispatch.NewRETA(n, 1); err != nil {
			t.Fatal(err)
		}
	}
}

// One local port serves one connection per destination, and a connection in
// TIME_WAIT gives it back when reuse says so.
func TestDialPorts(t *testing.T) {
	a, b := steppedPair(t)
	h := &testHandler{}
	listenStepped(t, b, 80, h)
	remote := netip.AddrPortFrom(addrB, 80)
	g := a.groups[1]
	ports := portsInto(g, addrA, remote, 3)
	var conns []*Conn
	for i, port := range ports {
		c, err := g.dial(addrA, ports, false, remote, h, nil)
		if err != nil {
			t.Fatal(err)
		}
		settle(t, a, b)
		if c.LocalAddr().Port() != port || !c.opened {
			t.Fatalf("dial %d is from %v, opened %v; want port %d", i, c.LocalAddr(), c.opened, port)
		}
		conns = append(conns, c)
	}
	refused := func(reuse bool) {
		t.Helper()
		if _, err := g.dial(addrA, ports, reuse, remote, h, nil); !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Fatalf("dial from ports that are all used, reuse %v: %v, want EADDRNOTAVAIL", reuse, err)
		}
	}
	refused(false)
	refused(true) // they are alive

	// Another destination takes the same port.
	listenStepped(t, b, 81, h)
	if c, err := g.dial(addrA, ports[:1], false, netip.AddrPortFrom(addrB, 81), h, nil); err != nil {
		t.Errorf("dial to another destination from a used port: %v", err)
	} else {
		c.Close()
	}

	conns[1].Close()
	settle(t, a, b)
	refused(false) // in TIME_WAIT
	c, err := g.dial(addrA, ports, true, remote, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	if c.LocalAddr().Port() != ports[1] || !c.opened {
		t.Errorf("dial is from %v, opened %v; want the port in TIME_WAIT, %d", c.LocalAddr(), c.opened, ports[1])
	}
	// The peer's view: one connection more, and the old ones live.
	for i, c := range []*Conn{conns[0], conns[2], c} {
		if state := tcp.EndpointState(c.ep.State()); state != tcp.StateEstablished {
			t.Errorf("connection %d is in state %v", i, state)
		}
	}
}

// A listener's port is left alone.
func TestDialSkipsListener(t *testing.T) {
	a, b := steppedPair(t)
	h := &testHandler{}
	listenStepped(t, b, 80, h)
	remote := netip.AddrPortFrom(addrB, 80)
	g := a.groups[0]
	ports := portsInto(g, addrA, remote, 2)
	listenStepped(t, a, ports[0], h)
	c, err := g.dial(addrA, ports, false, remote, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	if c.LocalAddr().Port() != ports[1] {
		t.Errorf("dialled from port %d, which has a listener; want %d", c.LocalAddr().Port(), ports[1])
	}
}

// Dial finds the only free port of a group, and says so when there is none.
func TestDialChunks(t *testing.T) {
	a, b := startPair(t, withGroups(t, 1))
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// Every ephemeral port has a listener but one: dial has to find it.
	const open = 40_000
	err = a.groups[0].do(func(g *Group) error {
		for port := firstEphemeral; port <= lastEphemeral; port++ {
			if port != open {
				if _, err := g.listen(netip.AddrPortFrom(addrA, uint16(port)), 1, &testHandler{}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.DialNet(t.Context(), netip.AddrPort{}, l.l.addr)
	if err != nil || c.local.Port() != open {
		t.Fatalf("dialled from %v, %v; want the only free port, %d", c, err, open)
	}
	if _, err := a.DialNet(t.Context(), netip.AddrPort{}, l.l.addr); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("dial without a free port: %v, want EADDRNOTAVAIL", err)
	}
}

func TestLeastLoaded(t *testing.T) {
	reta, err := dispatch.NewRETA(4, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		loads [4]int32
		tried []int
		want  []int
	}{
		{"equals take turns", [4]int32{1, 1, 1, 1}, nil, []int{0, 1, 2, 3}},
		{"fewest on the shard decide", [4]int32{5, 5, 5, 5}, nil, []int{0, 1, 2, 3}},
		{"one free group", [4]int32{3, 3, 0, 3}, nil, []int{2}},
		{"the shard comes first", func() (l [4]int32) {
			for id := range l { // shard of group 0 has 10 and 0, the other 4 and 4
				switch {
				case id == 0:
					l[id] = 10
				case reta.Owner(id) != reta.Owner(0):
					l[id] = 4
				}
			}
			return l
		}(), nil, slices.DeleteFunc([]int{0, 1, 2, 3}, func(id int) bool { return reta.Owner(id) == reta.Owner(0) })},
		{"tried ones are left out", [4]int32{0, 0, 0, 9}, []int{0, 1, 2}, []int{3}},
	} {
		set := &Set{reta: reta, shards: make([]*Shard, 2)}
		for id, load := range test.loads {
			g := &Group{id: id}
			g.load.Store(load)
			set.groups = append(set.groups, g)
		}
		tried := make([]bool, 4)
		for _, id := range test.tried {
			tried[id] = true
		}
		var got []int
		for range 16 {
			got = append(got, set.leastLoaded(tried))
		}
		slices.Sort(got)
		if got = slices.Compact(got); !slices.Equal(got, test.want) {
			t.Errorf("%s: chose %v, want %v", test.name, got, test.want)
		}
	}
}

// Dials spread over the groups, also when many come at once. Not to the last
// one: they look at loads that change meanwhile.
func TestDialSpreads(t *testing.T) {
	a, b := startPair(t, nil)
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const each = 6
	errs := make(chan error)
	for range each * len(a.groups) {
		go func() { _, err := a.DialNet(t.Context(), netip.AddrPort{}, l.l.addr); errs <- err }()
	}
	for range each * len(a.groups) {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range a.groups {
		if n := g.load.Load(); n < each/2 || n > each*2 {
			t.Errorf("group %d has %d connections, want about %d", g.id, n, each)
		}
	}
}

func TestDialNetErrors(t *testing.T) {
	a, _ := startPair(t, nil)
	expired, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	canceled, cancelNow := context.WithCancel(t.Context())
	nobody := netip.MustParseAddrPort("10.1.0.77:1")
	time.AfterFunc(10*time.Millisecond, cancelNow)
	for _, test := range []struct {
		name          string
		ctx           context.Context
		local, remote netip.AddrPort
		want          []error
		timeout       bool
		text          string // at the end of the message
	}{
		{name: "refused", remote: netip.AddrPortFrom(addrB, 1), want: []error{syscall.ECONNREFUSED}, text: ": connect: connection refused"},
		{name: "refused by itself", remote: netip.AddrPortFrom(addrA, 1), want: []error{syscall.ECONNREFUSED}},
		{name: "no route", remote: netip.MustParseAddrPort("192.0.2.1:1"), want: []error{syscall.ENETUNREACH}},
		{name: "foreign source", local: netip.MustParseAddrPort("10.1.0.9:0"), remote: nobody, want: []error{syscall.EADDRNOTAVAIL}},
		{name: "source of the other family", local: netip.AddrPortFrom(addr6[0], 0), remote: nobody, want: []error{syscall.EINVAL}},
		{name: "deadline", ctx: expired, remote: nobody, want: []error{context.DeadlineExceeded, os.ErrDeadlineExceeded}, timeout: true, text: ": i/o timeout"},
		{name: "canceled", ctx: canceled, remote: nobody, want: []error{context.Canceled}, text: ": operation was canceled"},
		{name: "no neighbor", remote: nobody, want: []error{syscall.EHOSTUNREACH}},
	} {
		ctx := test.ctx
		if ctx == nil {
			ctx = t.Context()
		}
		c, err := a.DialNet(ctx, test.local, test.remote)
		op, ok := errors.AsType[*net.OpError](err)
		if c != nil || !ok {
			t.Errorf("%s: %v, %v; want a *net.OpError", test.name, c, err)
			continue
		}
		for _, want := range test.want {
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", test.name, err, want)
			}
		}
		if op.Op != "dial" || op.Net != "tcp" || op.Addr.String() != test.remote.String() || op.Timeout() != test.timeout ||
			(op.Source != nil) != test.local.IsValid() || !strings.HasSuffix(err.Error(), test.text) {
			t.Errorf("%s: Op %q, Net %q, Source %v, Addr %v, Timeout %v", test.name, op.Op, op.Net, op.Source, op.Addr, op.Timeout())
		}
		if n := a.Stats()[0].ConnsOpen; n != 0 {
			t.Errorf("%s: %d connections are left", test.name, n)
		}
	}
}

func TestSource(t *testing.T) {
	set := &Set{cfg: Config{
		Addrs: []netip.Prefix{
			netip.MustParsePrefix("10.0.0.2/24"), netip.MustParsePrefix("10.0.0.3/24"),
			netip.MustParsePrefix("10.0.1.2/24"), netip.MustParsePrefix("fd00::2/64"),
		},
		Gateways: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
	}}
	for remote, want := range map[string]string{
		"10.0.0.9":    "10.0.0.2",
		"10.0.0.3":    "10.0.0.3", // its own
		"10.0.1.9":    "10.0.1.2",
		"192.0.2.1":   "10.0.0.2",
		"fd00::9":     "fd00::2",
		"2001:db8::1": "invalid IP",
	} {
		if got, ok := set.source(netip.MustParseAddr(remote)); got.String() != want || ok != got.IsValid() {
			t.Errorf("packets to %s leave from %v, %v; want %s", remote, got, ok, want)
		}
	}
}
