package shard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// A multicast group per address family, and addresses of a pair to go with it.
var multicastCases = []struct {
	name  string
	group netip.Addr
	a, b  netip.Addr
}{
	{"IPv4", netip.MustParseAddr("239.1.2.3"), addrA, addrB},
	{"IPv6", netip.MustParseAddr("ff02::1234"), addr6[0], addr6[1]},
}

func listenPacket(t *testing.T, set *Set, port uint16, addrs ...netip.Addr) *NetPacketConn {
	t.Helper()
	p, err := set.ListenNetPacket(addrs, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() }) // some tests have closed it
	if err := p.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return p
}

func send(t *testing.T, p *NetPacketConn, b string, to netip.AddrPort) {
	t.Helper()
	if _, err := p.WriteToAddrPort([]byte(b), to); err != nil {
		t.Fatal(err)
	}
}

// wantNext checks what the port gets next, and from where.
func wantNext(t *testing.T, p *NetPacketConn, want string, from netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 100)
	n, sender, err := p.ReadFromAddrPort(buf)
	if err != nil || string(buf[:n]) != want || sender != from {
		t.Errorf("got %q from %v, %v; want %q from %v", buf[:n], sender, err, want, from)
	}
}

// A member gets each datagram once, whatever flow group it is steered to, and
// nothing after it has left.
func TestMulticastMember(t *testing.T) {
	for _, test := range multicastCases {
		t.Run(test.name, func(t *testing.T) {
			a, b := startPair(t, nil)
			member := listenPacket(t, b, 5000, addrB, addr6[1])
			to := netip.AddrPortFrom(test.group, 5000)
			if err := member.JoinGroup(test.group); err != nil {
				t.Fatal(err)
			}
			groups := make(map[int]bool)
			var last *NetPacketConn
			for i := range 32 {
				last = listenPacket(t, a, 0, test.a)
				groups[b.groupOf(protoUDP, to, last.l.addr)] = true
				send(t, last, fmt.Sprint("datagram ", i), to)
				wantNext(t, member, fmt.Sprint("datagram ", i), last.l.addr)
			}
			if len(groups) < 2 {
				t.Errorf("all datagrams were steered to one flow group")
			}
			if err := member.LeaveGroup(test.group); err != nil {
				t.Fatal(err)
			}
			send(t, last, "to nobody", to)
			send(t, last, "to an address", netip.AddrPortFrom(test.b, 5000))
			wantNext(t, member, "to an address", last.l.addr)
			// It may come back.
			if err := member.JoinGroup(test.group); err != nil {
				t.Fatal(err)
			}
			send(t, last, "again", to)
			wantNext(t, member, "again", last.l.addr)
		})
	}
}

// Membership is the port's: another port in the same stack gets nothing.
func TestMulticastOtherPort(t *testing.T) {
	a, b := startPair(t, nil)
	group := multicastCases[0].group
	member, other := listenPacket(t, b, 5000, addrB), listenPacket(t, b, 6000, addrB)
	if err := member.JoinGroup(group); err != nil {
		t.Fatal(err)
	}
	client := listenPacket(t, a, 0, addrA)
	send(t, client, "to nobody", netip.AddrPortFrom(group, 6000))
	send(t, client, "to the member", netip.AddrPortFrom(group, 5000))
	wantNext(t, member, "to the member", client.l.addr)
	if n := len(other.in); n != 0 {
		t.Errorf("%d datagrams for a port that joined nothing", n)
	}
}

func TestMulticastErrors(t *testing.T) {
	_, b := startPair(t, nil)
	group4, group6 := multicastCases[0].group, multicastCases[1].group
	both, four := listenPacket(t, b, 0, addrB, addr6[1]), listenPacket(t, b, 0, addrB)
	closed := listenPacket(t, b, 0, addrB)
	_ = closed.Close()
	dialed, err := b.DialNetPacket(netip.AddrPortFrom(group4, 7))
	if err != nil {
		t.Fatal(err)
	}
	for i, test := range []struct {
		name string
		err  error
		want error
	}{
		{"unicast address", both.JoinGroup(addrA), syscall.EINVAL},
		{"no address", both.JoinGroup(netip.Addr{}), syscall.EINVAL},
		{"broadcast address", both.JoinGroup(netip.AddrFrom4([4]byte{255, 255, 255, 255})), syscall.EINVAL},
		{"family the port does not have", four.JoinGroup(group6), syscall.EINVAL},
		{"leave without having joined", both.LeaveGroup(group4), syscall.EADDRNOTAVAIL},
		{"join", both.JoinGroup(group4), nil},
		{"join twice", both.JoinGroup(group4), syscall.EADDRINUSE},
		{"join twice, mapped", both.JoinGroup(netip.AddrFrom16(group4.As16())), syscall.EADDRINUSE},
		{"join another", both.JoinGroup(group6), nil},
		{"join twice, with a zone", both.JoinGroup(group6.WithZone("tap")), syscall.EADDRINUSE},
		{"leave", both.LeaveGroup(group6.WithZone("tap")), nil},
		{"leave twice", both.LeaveGroup(group6), syscall.EADDRNOTAVAIL},
		{"TTL of 0", both.SetMulticastTTL(0), syscall.EINVAL},
		{"TTL of 256", both.SetMulticastTTL(256), syscall.EINVAL},
		{"TTL of 255", both.SetMulticastTTL(255), nil},
		{"join with a dialled port", dialed.JoinGroup(group4), syscall.EISCONN},
		{"leave with a dialled port", dialed.LeaveGroup(group4), syscall.EADDRNOTAVAIL},
		{"TTL of a dialled port", dialed.SetMulticastTTL(7), nil},
		{"join after Close", closed.JoinGroup(group4), net.ErrClosed},
		{"leave after Close", closed.LeaveGroup(group4), net.ErrClosed},
		{"TTL after Close", closed.SetMulticastTTL(7), net.ErrClosed},
		{"loopback after Close", closed.SetMulticastLoopback(true), net.ErrClosed},
	} {
		op, ok := errors.AsType[*net.OpError](test.err)
		if !errors.Is(test.err, test.want) || test.want != nil && (!ok || op.Op != "set" || op.Net != "udp") {
			t.Errorf("%d, %s: %v, want a *net.OpError with %v", i, test.name, test.err, test.want)
		}
	}
	for i := range maxMemberships - 1 { // it is in one
		if err := both.JoinGroup(netip.AddrFrom4([4]byte{239, 2, 0, byte(i)})); err != nil {
			t.Fatal(err)
		}
	}
	if err := both.JoinGroup(group6); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("join after %d groups: %v, want ENOBUFS", maxMemberships, err)
	}
	b.Close()
	for name, err := range map[string]error{
		"join":  four.JoinGroup(group4),
		"leave": four.LeaveGroup(group6),
		"multicast": func() error {
			_, err := b.ListenNetMulticast([]netip.Addr{addrB}, netip.AddrPortFrom(group4, 1))
			return err
		}(),
	} {
		if want := map[string]error{"leave": syscall.EADDRNOTAVAIL}[name]; want == nil && !errors.Is(err, net.ErrClosed) || want != nil && !errors.Is(err, want) {
			t.Errorf("%s after the stack was closed: %v", name, err)
		}
	}
}

// Closing a port leaves its groups: no endpoint stays, no membership.
func TestMulticastClose(t *testing.T) {
	_, b := startPair(t, nil)
	member := listenPacket(t, b, 0, addrB, addr6[1])
	for _, test := range multicastCases {
		if err := member.JoinGroup(test.group); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (sockets, members int) {
		for id := range b.groups {
			_ = b.groups[id].do(func(g *Group) error {
				sockets += len(g.sockets)
				for _, test := range multicastCases {
					if in, err := g.stack.IsInGroup(nicID, tcpipAddress(test.group)); err != nil {
						t.Error(err)
					} else if in {
						members++
					}
				}
				return nil
			})
		}
		return sockets, members
	}
	n := len(b.groups)
	if sockets, members := left(); sockets != 4*n || members != 2*n {
		t.Errorf("%d sockets and %d memberships in %d flow groups, want %d and %d", sockets, members, n, 4*n, 2*n)
	}
	if err := member.Close(); err != nil {
		t.Fatal(err)
	}
	if sockets, members := left(); sockets != 0 || members != 0 {
		t.Errorf("after Close: %d sockets and %d memberships are left", sockets, members)
	}
}

// A port hears itself unless it says otherwise.
func TestMulticastLoopback(t *testing.T) {
	for _, test := range multicastCases {
		t.Run(test.name, func(t *testing.T) {
			a, b := startPair(t, nil)
			self, peer := listenPacket(t, a, 5000, addrA, addr6[0]), listenPacket(t, b, 5000, addrB, addr6[1])
			for _, p := range []*NetPacketConn{self, peer} {
				if err := p.JoinGroup(test.group); err != nil {
					t.Fatal(err)
				}
			}
			to, from := netip.AddrPortFrom(test.group, 5000), netip.AddrPortFrom(test.a, 5000)
			send(t, self, "to all", to)
			wantNext(t, self, "to all", from)
			wantNext(t, peer, "to all", from)
			if err := self.SetMulticastLoopback(false); err != nil {
				t.Fatal(err)
			}
			send(t, self, "to others", to)
			wantNext(t, peer, "to others", from)
			if n := len(self.in); n != 0 {
				t.Errorf("%d datagrams came back", n)
			}
		})
	}
}

// Several ports share a multicast group and a port, and nobody else gets it.
func TestMulticastShared(t *testing.T) {
	a, b := startPair(t, nil)
	to := netip.AddrPortFrom(multicastCases[0].group, 5000)
	var members []*NetPacketConn
	for range 3 {
		p, err := b.ListenNetMulticast([]netip.Addr{addrB}, to)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		members = append(members, p)
	}
	if _, err := b.ListenNetPacket([]netip.Addr{addrB}, 5000); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listening on a shared port without sharing it: %v, want EADDRINUSE", err)
	}
	client := listenPacket(t, a, 0, addrA)
	for range 10 {
		send(t, client, "to all", to)
		for _, p := range members {
			wantNext(t, p, "to all", client.l.addr)
		}
	}
	send(t, client, "to the last", netip.AddrPortFrom(addrB, 5000))
	wantNext(t, members[2], "to the last", client.l.addr)
	send(t, members[2], "an answer", client.l.addr)
	wantNext(t, client, "an answer", netip.AddrPortFrom(addrB, 5000))
	// What a member sends does not come back to its stack.
	send(t, members[2], "to other stacks", to)
	send(t, client, "to all", to)
	for _, p := range members {
		wantNext(t, p, "to all", client.l.addr)
	}
}

// A handler on the shard sees which group was meant, and answers from an
// address of the stack. A dialled port sends to a group, and gets no answers.
func TestMulticastOnShard(t *testing.T) {
	for _, test := range multicastCases {
		t.Run(test.name, func(t *testing.T) {
			// The port is not at the address that IP would choose.
			second := test.b.Next().Next()
			a, b := startPair(t, func(cfg *Config) {
				if cfg.Addrs[0].Addr() == addrB {
					cfg.Addrs = append(cfg.Addrs, netip.PrefixFrom(second, 24))
				}
			})
			asked := make(chan netip.AddrPort, 1)
			l, err := b.ListenUDP([]netip.Addr{second}, 5000, func(s *Socket, d []byte, from netip.AddrPort) {
				if _, err := s.WriteTo(d, from); err != nil {
					t.Error(err)
				}
				asked <- s.LocalAddr()
			})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := l.JoinGroup(test.group); err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(test.group, 5000)
			client := listenPacket(t, a, 0, test.a)
			send(t, client, "question", to)
			wantNext(t, client, "question", netip.AddrPortFrom(second, 5000))
			if got := <-asked; got != to {
				t.Errorf("the handler's socket is at %v, want %v", got, to)
			}
			dialed, err := a.DialNetPacket(to)
			if err != nil {
				t.Fatal(err)
			}
			defer dialed.Close()
			if _, err := dialed.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			<-asked
			if n := len(dialed.in); n != 0 {
				t.Errorf("%d answers from an address that was not dialled", n)
			}
		})
	}
}

// TestListenUDPChoosesPort: a port that the first flow group has to give may be
// taken in another one; then another one is chosen.
func TestListenUDPChoosesPort(t *testing.T) {
	const first, last = 20_000, 20_999 // instead of all ports, to be quick
	a, _ := startPair(t, nil)
	for id := range a.groups {
		err := a.groups[id].do(func(g *Group) error {
			if err := g.stack.SetPortRange(first, last); err != nil {
				t.Error(err)
			}
			for port := first; id == 3 && port <= last; port += 2 {
				if _, err := g.listenUDP(netip.AddrPortFrom(addrA, uint16(port)), nil); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		p, err := a.ListenNetPacket([]netip.Addr{addrA}, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = p.Close()
	}
}
