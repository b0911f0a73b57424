package shard

import (
	"errors"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// NetPacketDialed is a NetPacketConn that talks to one peer only. It gets
// nothing from others, and learns from ICMP that the peer has no such port:
// the next Read or Write returns ECONNREFUSED. With EMSGSIZE they say that a
// datagram was lost because the path does not carry its size; later ones leave in
// fragments.
type NetPacketDialed struct {
	*NetPacketConn
	peer netip.AddrPort
	home *Socket // in the group that the peer's datagrams hash into
	moveHook
}

var _ net.Conn = (*NetPacketDialed)(nil)

// dialPacketTries is how many local ports DialNetPacket tries. A port may be
// taken by a listener, which has it in all groups, or by another peer's socket.
const dialPacketTries = 256

// DialNetPacket opens a UDP port that talks to remote, in the one group that
// remote's answers hash into. It may be called from any goroutine but a
// shard's.
func (set *Set) DialNetPacket(remote netip.AddrPort) (*NetPacketDialed, error) {
	p, err := set.dialAnyPort(remote)
	if err != nil {
		return nil, opError("dial", "udp", netip.AddrPort{}, remote, err)
	}
	return p, nil
}

func (set *Set) dialAnyPort(remote netip.AddrPort) (*NetPacketDialed, error) {
	if !remote.IsValid() || remote.Port() == 0 {
		return nil, syscall.EINVAL
	}
	source, ok := set.datagramSource(remote.Addr())
	if !ok {
		return nil, syscall.ENETUNREACH
	}
	tries := 0
	for port := range ephemeralPorts {
		if tries++; tries > dialPacketTries {
			break
		}
		p, err := set.dialPacket(netip.AddrPortFrom(source, port), remote)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return p, err
		}
	}
	return nil, syscall.EADDRNOTAVAIL
}

// dialPacket dials from a given port. When it is taken the error is EADDRINUSE.
func (set *Set) dialPacket(local, remote netip.AddrPort) (*NetPacketDialed, error) {
	p := &NetPacketDialed{NetPacketConn: set.newPacketConn(dialedBacklog), peer: remote}
	p.l = &UDPListener{set: set, addr: local, sockets: make([][]*Socket, len(set.groups))}
	home := set.groupOf(protoUDP, local, remote)
	err := set.groups[home].do(func(g *Group) (err error) {
		if p.home, err = g.listenUDP(local, p.arrived); err != nil {
			return err
		}
		p.l.sockets[home] = []*Socket{p.home}
		p.home.moved = p.movedTo
		return p.home.connect(remote, p.failed)
	})
	if err != nil {
		p.l.Close()
		return nil, err
	}
	return p, nil
}

// connect makes the socket talk to remote only. failed is told what ICMP says
// about datagrams that were sent.
func (s *Socket) connect(remote netip.AddrPort, failed func(error)) error {
	s.failed = failed
	to := fullAddress(remote)
	if onLink(remote.Addr()) {
		to.NIC = nicID
	}
	if err := s.ep.Connect(to); err != nil {
		if _, unreachable := err.(*tcpip.ErrHostUnreachable); unreachable {
			return syscall.ENETUNREACH // there is no route
		}
		return errno(err)
	}
	s.peer = remote
	return nil
}

// failed keeps an error for the next Read or Write. Called by the shard.
func (p *NetPacketDialed) failed(err error) {
	p.fault.Store(&err)
	p.readable.give()
}

// Read implements net.Conn.
func (p *NetPacketDialed) Read(b []byte) (int, error) {
	n, _, err := p.receive(b)
	return n, p.peerError("read", err)
}

// ReadFromAddrPort is Read with the peer's address.
func (p *NetPacketDialed) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := p.receive(b)
	return n, from, p.peerError("read", err)
}

// Write implements net.Conn.
func (p *NetPacketDialed) Write(b []byte) (int, error) {
	if err := p.send(b, p.peer); err != nil {
		return 0, p.peerError("write", err)
	}
	return len(b), nil
}

// WriteTo implements net.PacketConn. As with package net's connections, the
// error is net.ErrWriteToConnected: the peer is fixed.
func (p *NetPacketDialed) WriteTo([]byte, net.Addr) (int, error) {
	return 0, p.peerError("write", net.ErrWriteToConnected)
}

// WriteToUDP is WriteTo.
func (p *NetPacketDialed) WriteToUDP([]byte, *net.UDPAddr) (int, error) {
	return 0, p.peerError("write", net.ErrWriteToConnected)
}

// WriteToAddrPort is WriteTo.
func (p *NetPacketDialed) WriteToAddrPort([]byte, netip.AddrPort) (int, error) {
	return 0, p.peerError("write", net.ErrWriteToConnected)
}

// RemoteAddr implements net.Conn.
func (p *NetPacketDialed) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(p.peer) }

// Shard returns the shard that processes the peer's datagrams.
func (p *NetPacketDialed) Shard() int { return p.home.g.at.Load().id }

// CPU returns the CPU that the shard's thread is pinned to.
func (p *NetPacketDialed) CPU() int { return p.home.g.at.Load().cpu }

// NUMANode returns the NUMA node of that CPU.
func (p *NetPacketDialed) NUMANode() int { return p.home.g.at.Load().node }

func (p *NetPacketDialed) peerError(op string, err error) error {
	return p.opError(op, p.peer, err)
}
