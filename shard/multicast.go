package shard

import (
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// maxMemberships is how many multicast groups a UDP port may join. Linux has 20
// by default, per socket (net.ipv4.igmp_max_memberships). Each takes an endpoint
// of some 4 KB in every flow group.
const maxMemberships = 64

// A multicast datagram is steered by its hash like any other, so it may reach
// any flow group, and each one joins. One alone says so to switches and routers
// (answerer).

// JoinGroup is [NetPacketConn.JoinGroup].
func (l *UDPListener) JoinGroup(group netip.Addr) error {
	return l.setError(l.join(group.Unmap().WithZone("")))
}

func (l *UDPListener) join(group netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return net.ErrClosed
	case !group.IsMulticast(), !l.speaks(group):
		return syscall.EINVAL
	case l.members[group] != nil:
		return syscall.EADDRINUSE
	case len(l.members) == maxMemberships:
		return syscall.ENOBUFS
	}
	sockets := make([]*Socket, len(l.set.groups))
	for id := range sockets {
		err := l.set.groups[id].do(func(g *Group) (err error) {
			sockets[id], err = g.join(l, group)
			return err
		})
		if err != nil {
			l.shut(sockets)
			return err
		}
	}
	if l.members == nil {
		l.members = make(map[netip.Addr][]*Socket)
	}
	l.members[group] = sockets
	return nil
}

// speaks reports whether the port has an address of a's family.
func (l *UDPListener) speaks(a netip.Addr) bool {
	for _, s := range l.sockets[0] {
		if s.local.Addr().Is4() == a.Is4() {
			return true
		}
	}
	return false
}

// join opens the flow group's socket for a multicast group.
func (g *Group) join(l *UDPListener, group netip.Addr) (*Socket, error) {
	s := &Socket{g: g, h: l.h, l: l}
	// Shared: several ports of the same number may be in the multicast group,
	// and each gets a copy.
	if err := s.bind(netip.AddrPortFrom(group, l.addr.Port()), true); err != nil {
		return nil, err
	}
	option := tcpip.AddMembershipOption{NIC: nicID, MulticastAddr: tcpipAddress(group)}
	if err := s.ep.SetSockOpt(&option); err != nil {
		s.shut()
		return nil, errno(err)
	}
	return s, nil
}

// LeaveGroup is [NetPacketConn.LeaveGroup].
func (l *UDPListener) LeaveGroup(group netip.Addr) error {
	group = group.Unmap().WithZone("")
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return l.setError(net.ErrClosed)
	}
	sockets := l.members[group]
	if sockets == nil {
		return l.setError(syscall.EADDRNOTAVAIL)
	}
	delete(l.members, group)
	l.shut(sockets)
	return nil
}

// shut closes the sockets of a multicast group, with which they leave it.
func (l *UDPListener) shut(members []*Socket) {
	for id, s := range members {
		if s != nil {
			_ = l.set.groups[id].do(func(*Group) error { // a set that has ended has none
				s.shut()
				return nil
			})
		}
	}
}

// SetMulticastTTL is [NetPacketConn.SetMulticastTTL].
func (l *UDPListener) SetMulticastTTL(ttl int) error {
	if ttl < 1 || ttl > 255 {
		return l.setError(syscall.EINVAL)
	}
	return l.option(func(s *Socket) error { return errno(s.ep.SetSockOptInt(tcpip.MulticastTTLOption, ttl)) })
}

// SetMulticastLoopback is [NetPacketConn.SetMulticastLoopback].
func (l *UDPListener) SetMulticastLoopback(on bool) error {
	return l.option(func(s *Socket) error { s.ep.SocketOptions().SetMulticastLoop(on); return nil })
}

// option sets something on the sockets that send.
func (l *UDPListener) option(set func(s *Socket) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return l.setError(net.ErrClosed)
	}
	return l.setError(l.each(set))
}

func (l *UDPListener) setError(err error) error {
	return opError("set", "udp", netip.AddrPort{}, l.addr, err)
}

// datagramSource is source for datagrams: what only the device can tell where it
// goes leaves from the first address of the family.
func (set *Set) datagramSource(to netip.Addr) (netip.Addr, bool) {
	if !onLink(to) {
		return set.source(to)
	}
	for _, p := range set.cfg.Addrs {
		if p.Addr().Is4() == to.Is4() {
			return p.Addr(), true
		}
	}
	return netip.Addr{}, false
}

// onLink reports whether an address means hosts on the link, to which no route
// leads: a multicast group, or all of them (RFC 919 section 7).
func onLink(a netip.Addr) bool {
	return a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// ListenNetMulticast opens a UDP port at addrs that is in a multicast group and
// does not hear itself. Several may be open with the same port, as with
// net.ListenMulticastUDP: each gets what is sent to its group, the last one what
// is sent to the stack's addresses. It may be called from any goroutine but a
// shard's.
func (set *Set) ListenNetMulticast(addrs []netip.Addr, group netip.AddrPort) (*NetPacketConn, error) {
	p := set.newPacketConn(packetBacklog)
	var err error
	if p.l, err = set.listenUDP(addrs, group.Port(), true, p.arrived); err != nil {
		return nil, err
	}
	if err = p.l.JoinGroup(group.Addr()); err == nil {
		err = p.l.SetMulticastLoopback(false)
	}
	if err != nil {
		_ = p.Close()
		return nil, err
	}
	return p, nil
}

// JoinGroup lets the port receive what any source sends to a multicast group
// (RFC 1112 section 7.1, RFC 3493 section 5.2). A port at one address receives
// it as well, which it would not on Linux. Switches and routers are told by
// IGMPv3 (RFC 3376) and MLDv2 (RFC 3810), from the unspecified address where the
// stack has no link-local one (RFC 3590).
//
// The errors are the kernel's: EINVAL if group is no multicast address, or of a
// family in which the port has no address; EADDRINUSE if it was joined before;
// ENOBUFS after 64 groups; net.ErrClosed after Close.
func (p *NetPacketConn) JoinGroup(group netip.Addr) error { return p.l.JoinGroup(group) }

// LeaveGroup ends what JoinGroup began. Datagrams that have arrived can still be
// read. The error is EADDRNOTAVAIL if the group was not joined, net.ErrClosed
// after Close.
func (p *NetPacketConn) LeaveGroup(group netip.Addr) error { return p.l.LeaveGroup(group) }

// SetMulticastTTL sets over how many hops multicast datagrams go, 1 to 255: the
// TTL of IPv4 and the hop limit of IPv6. The default is 1, which no router
// forwards.
func (p *NetPacketConn) SetMulticastTTL(ttl int) error { return p.l.SetMulticastTTL(ttl) }

// SetMulticastLoopback says whether multicast datagrams reach members in the
// same stack, this port for one. They do by default.
func (p *NetPacketConn) SetMulticastLoopback(on bool) error { return p.l.SetMulticastLoopback(on) }

// JoinGroup returns EISCONN: the port gets nothing but what its peer sends to
// it.
func (p *NetPacketDialed) JoinGroup(netip.Addr) error { return p.setError(syscall.EISCONN) }

// LeaveGroup returns EADDRNOTAVAIL: there is none to leave.
func (p *NetPacketDialed) LeaveGroup(netip.Addr) error { return p.setError(syscall.EADDRNOTAVAIL) }
