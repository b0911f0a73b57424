package shard

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestWriteToErrors: what cannot be sent is refused at once.
func TestWriteToErrors(t *testing.T) {
	second := netip.MustParseAddr("10.1.0.5")
	peer := net.UDPAddrFromAddrPort(netip.AddrPortFrom(addrA, 9))
	peer6 := net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr6[0], 9))
	gone := errors.New("gone")
	for _, test := range []struct {
		name    string
		addrs   []netip.Addr
		to      net.Addr
		prepare func(t *testing.T, set *Set, p *NetPacketConn)
		want    error
	}{
		{name: "no address", to: nil, want: syscall.EINVAL},
		{name: "nil UDP address", to: (*net.UDPAddr)(nil), want: syscall.EINVAL},
		{name: "UDP address without an IP address", to: &net.UDPAddr{Port: 1}, want: syscall.EINVAL},
		{name: "unspecified IP address", to: &net.UDPAddr{IP: net.IPv4zero, Port: 1}, want: syscall.EINVAL},
		{name: "address of another network", to: &net.TCPAddr{IP: peer.IP, Port: 9}, want: syscall.EINVAL},
		{name: "other family", to: peer6, want: syscall.ENETUNREACH},
		{name: "other family, several addresses", addrs: []netip.Addr{addrB, second}, to: peer6, want: syscall.ENETUNREACH},
		{name: "no route", to: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}, want: syscall.ENETUNREACH},
		{name: "no route, several addresses", to: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}, addrs: []netip.Addr{addrB, second}, want: syscall.ENETUNREACH},
		{name: "deadline passed", to: peer, want: os.ErrDeadlineExceeded, prepare: func(_ *testing.T, _ *Set, p *NetPacketConn) {
			_ = p.SetWriteDeadline(time.Now().Add(-time.Second))
		}},
		{name: "port closed", to: peer, want: net.ErrClosed, prepare: func(t *testing.T, _ *Set, p *NetPacketConn) {
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "stack closed", to: peer, want: net.ErrClosed, prepare: func(_ *testing.T, set *Set, _ *NetPacketConn) {
			set.Close()
		}},
		{name: "device lost", to: peer, want: gone, prepare: func(_ *testing.T, set *Set, _ *NetPacketConn) {
			set.fail(gone)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := startPair(t, func(cfg *Config) {
				cfg.Addrs = append(cfg.Addrs, netip.PrefixFrom(second, 24))
			})
			addrs := test.addrs
			if addrs == nil {
				addrs = []netip.Addr{addrB}
			}
			p, err := b.ListenNetPacket(addrs, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = p.Close() })
			if test.prepare != nil {
				test.prepare(t, b, p)
			}
			for range 50 { // each time, not now and then
				n, err := p.WriteTo([]byte("x"), test.to)
				var op *net.OpError
				if n != 0 || !errors.Is(err, test.want) || !errors.As(err, &op) {
					t.Fatalf("WriteTo(%v) = %d, %v; want 0 and a net.OpError with %v", test.to, n, err, test.want)
				}
			}
		})
	}
}

// TestReadFromClosedPort: a port that was closed gives nothing more, although
// datagrams wait in it.
func TestReadFromClosedPort(t *testing.T) {
	a, b := startPair(t, nil)
	server, err := b.ListenNetPacket([]netip.Addr{addrB}, 0)
	if err != nil {
		t.Fatal(err)
	}
	client, err := a.DialNetPacket(netip.AddrPortFrom(addrB, server.l.addr.Port()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	const waiting = 20
	for range waiting {
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the datagrams arrive", func() bool { return len(server.in) == waiting })
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	for range waiting {
		if _, _, err := server.ReadFrom(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("ReadFrom after Close: %v, want net.ErrClosed", err)
		}
	}
}

// TestDatagramsBeyondSendBuffer: what goroutines have queued leaves although
// it is more than a socket's send buffer holds.
func TestDatagramsBeyondSendBuffer(t *testing.T) {
	a, b := steppedPair(t)
	received := 0
	for _, g := range b.groups {
		if _, err := g.listenUDP(netip.AddrPortFrom(addrB, 53), func(*Socket, []byte, netip.AddrPort) { received++ }); err != nil {
			t.Fatal(err)
		}
	}
	p := listenPacketStepped(t, a)
	to := netip.AddrPortFrom(addrB, 53)
	send := func(n int) {
		for range n {
			if _, err := p.WriteToAddrPort(make([]byte, 1400), to); err != nil {
				t.Fatal(err)
			}
		}
		settle(t, a, b)
	}
	send(1) // resolves the neighbor
	const burst = 250
	send(burst)
	if received != 1+burst || a.counters.DatagramsDropped != 0 {
		t.Errorf("%d datagrams of %d arrived, %d dropped by the sender", received, 1+burst, a.counters.DatagramsDropped)
	}
}

// TestSendersDoNotHoldTurn: a queue that is filled as fast as it empties ends
// no turn late. The rest leaves in the next ones, and nobody has to ask for it.
func TestSendersDoNotHoldTurn(t *testing.T) {
	a, b := steppedPair(t)
	p := listenPacketStepped(t, a)
	to := netip.AddrPortFrom(addrB, 9)
	if _, err := p.WriteToAddrPort([]byte("x"), to); err != nil { // resolves the neighbor
		t.Fatal(err)
	}
	settle(t, a, b)
	before := datagramsSent(a)
	// More room stands for goroutines that fill it again.
	const waiting = 2*packetBacklog + 1
	p.outs[0].queue = make(chan *datagram, waiting)
	for range waiting {
		if _, err := p.WriteToAddrPort([]byte("x"), to); err != nil {
			t.Fatal(err)
		}
	}
	for turn, want := range []uint64{packetBacklog, 2 * packetBacklog, waiting, waiting} {
		a.turn()
		if sent := datagramsSent(a) - before; sent != want {
			t.Fatalf("%d datagrams sent after %d turns, want %d", sent, turn+1, want)
		}
	}
}

func datagramsSent(s *Shard) (n uint64) {
	for _, g := range s.groups {
		n += g.link.sent
	}
	return n
}

// listenPacketStepped opens a port on a stepped shard at its IPv4 address.
func listenPacketStepped(t *testing.T, s *Shard) *NetPacketConn {
	t.Helper()
	var p *NetPacketConn
	var err error
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		p, err = s.set.ListenNetPacket([]netip.Addr{s.set.cfg.Addrs[0].Addr()}, 0)
	}()
	for {
		select {
		case <-opened:
			if err != nil {
				t.Fatal(err)
			}
			return p
		default:
			s.turn()
		}
	}
}
