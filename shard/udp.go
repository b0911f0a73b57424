package shard

import (
	"errors"
	"net/netip"
	"sync"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// datagramBudget is how many datagrams of one socket are read in a turn.
const datagramBudget = 256

// DatagramHandler is called on the shard's thread for each datagram. b is
// valid until it returns, and must not be written to.
type DatagramHandler func(s *Socket, b []byte, from netip.AddrPort)

// UDPListener receives datagrams on one port in every flow group.
type UDPListener struct {
	// Immutable after ListenUDP.
	set     *Set
	addr    netip.AddrPort
	h       DatagramHandler
	sockets [][]*Socket // by flow group, then by local address; each is its group's

	mu      sync.Mutex               // held while flow groups do what a method asks for
	closed  bool                     // guarded by mu
	members map[netip.Addr][]*Socket // by multicast group, then by flow group; guarded by mu
}

// Socket is the part of a UDPListener that belongs to one flow group and one
// local address. Its methods are called on the shard's thread, from its
// DatagramHandler or from a function that Do runs.
type Socket struct {
	g      *Group
	ep     tcpip.Endpoint
	wq     waiter.Queue
	entry  waiter.Entry
	h      DatagramHandler
	local  netip.AddrPort
	l      *UDPListener // of a multicast group's socket, which cannot send; else nil
	queued bool
	closed bool

	peer   netip.AddrPort // of a connected socket
	failed func(error)    // what became of earlier datagrams; nil unless connected
	moved  func(*Shard)   // the group has come there; may be nil
}

// ListenUDP gives the datagrams that arrive at port of one of addrs to h; each
// address is one of the stack's, so that an answer leaves from the one that was
// asked. Port 0 chooses one. It may be called from any goroutine but a shard's.
func (set *Set) ListenUDP(addrs []netip.Addr, port uint16, h DatagramHandler) (*UDPListener, error) {
	return set.listenUDP(addrs, port, false, h)
}

// listenUDP is ListenUDP. A port that is shared may be opened again by others
// who share it, and the last one gets the datagrams that are not multicast.
func (set *Set) listenUDP(addrs []netip.Addr, port uint16, shared bool, h DatagramHandler) (*UDPListener, error) {
	for tries := 1; ; tries++ {
		l := &UDPListener{set: set, addr: reportedAddr(addrs, port), h: h, sockets: make([][]*Socket, len(set.groups))}
		err := l.open(addrs, shared)
		if err == nil {
			return l, nil
		}
		l.Close()
		if port != 0 || tries == listenTries || !errors.Is(err, syscall.EADDRINUSE) {
			return nil, opError("listen", "udp", netip.AddrPort{}, reportedAddr(addrs, port), err)
		}
	}
}

// open opens the port in every flow group.
func (l *UDPListener) open(addrs []netip.Addr, shared bool) error {
	for id := range l.set.groups {
		for _, a := range addrs {
			err := l.set.groups[id].do(func(g *Group) error {
				s := &Socket{g: g, h: l.h}
				if err := s.bind(netip.AddrPortFrom(a, l.addr.Port()), shared); err != nil {
					return err
				}
				l.sockets[id] = append(l.sockets[id], s)
				// The first group chooses port 0; the others follow.
				l.addr = netip.AddrPortFrom(l.addr.Addr(), s.local.Port())
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Addr returns the address that the listener receives on.
func (l *UDPListener) Addr() netip.AddrPort { return l.addr }

// Close releases the port. It may be called from any goroutine but a shard's.
func (l *UDPListener) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	_ = l.each(func(s *Socket) error { // a set that has ended has none
		s.shut()
		return nil
	})
	for _, sockets := range l.members {
		l.shut(sockets)
	}
}

// each runs f for every socket that is bound to an address of the stack, on the
// thread of its flow group, until f returns an error.
func (l *UDPListener) each(f func(s *Socket) error) error {
	for id, sockets := range l.sockets {
		if len(sockets) == 0 {
			continue
		}
		err := l.set.groups[id].do(func(*Group) error {
			for _, s := range sockets {
				if err := f(s); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// source returns the address from which datagrams to a peer leave; false when
// none can reach it.
func (l *UDPListener) source(to netip.Addr) (netip.Addr, bool) {
	nearest, ok := l.set.datagramSource(to)
	if local := l.addr.Addr(); !local.IsUnspecified() {
		return local, ok && local.Is4() == to.Is4()
	}
	return nearest, ok
}

// socket returns the flow group's socket at an address of the stack, or nil.
func (l *UDPListener) socket(id int, local netip.Addr) *Socket {
	for _, s := range l.sockets[id] {
		if s.local.Addr() == local {
			return s
		}
	}
	return nil
}

func (g *Group) listenUDP(addr netip.AddrPort, h DatagramHandler) (*Socket, error) {
	s := &Socket{g: g, h: h}
	return s, s.bind(addr, false)
}

// bind opens the socket's endpoint.
func (s *Socket) bind(addr netip.AddrPort, shared bool) error {
	g := s.g
	if g.shard.over() {
		return ErrClosed
	}
	ep, err := g.stack.NewEndpoint(udp.ProtocolNumber, networkProtocol(addr.Addr()), &s.wq)
	if err != nil {
		return errno(err)
	}
	if networkProtocol(addr.Addr()) == ipv6.ProtocolNumber {
		ep.SocketOptions().SetV6Only(true)
	}
	ep.SocketOptions().SetReuseAddress(shared)
	ep.SocketOptions().SetBroadcast(true) // as package net does
	if err := ep.Bind(fullAddress(addr)); err != nil {
		ep.Close()
		return errno(err)
	}
	ep.SocketOptions().SetReceiveBufferSize(udpReceiveBuffer, false)
	s.ep = ep
	local, _ := ep.GetLocalAddress() // a bound endpoint has one
	s.local = netip.AddrPortFrom(addr.Addr(), local.Port)
	s.entry.Init(s, waiter.ReadableEvents|waiter.EventErr)
	s.wq.EventRegister(&s.entry)
	g.sockets[ep] = s
	if !shared {
		g.ports[s.local] = s
	}
	return nil
}

// udpReceiveBuffer is the size in bytes of a socket's receive buffer: a
// super-frame of small datagrams, each with gVisor's overhead, has to fit.
const udpReceiveBuffer = 1 << 20

// NotifyEvent implements waiter.EventListener.
func (s *Socket) NotifyEvent(waiter.EventMask) {
	if !s.queued && !s.closed {
		s.queued = true
		s.g.shard.ready = append(s.g.shard.ready, s)
	}
}

func (s *Socket) group() *Group { return s.g }

func (s *Socket) serve(sh *Shard) {
	s.queued = false
	for range datagramBudget {
		if s.closed {
			return
		}
		peek := &sh.scratch.datagramIn
		peek.n = 0
		r, err := s.ep.Read(peek, tcpip.ReadOptions{NeedRemoteAddr: true})
		if err != nil {
			// Nothing waits, or an ICMP error for an earlier datagram, which
			// is not this one's.
			if _, ok := err.(*tcpip.ErrWouldBlock); ok {
				return
			}
			if s.failed != nil {
				s.failed(errno(err))
			}
			continue
		}
		s.h(s, peek.buf[:peek.n], addrPort(r.RemoteAddr))
	}
	s.NotifyEvent(waiter.ReadableEvents)
}

// WriteTo sends b as one datagram, in fragments if it is larger than the path to
// the peer carries, as far as that is known; above 65,507 bytes (65,487 for
// IPv6) the error is EMSGSIZE. The socket of a multicast group
// sends from the stack's address that is nearest to the peer.
func (s *Socket) WriteTo(b []byte, to netip.AddrPort) (int, error) {
	if s.l != nil {
		local, _ := s.l.source(to.Addr())
		if s = s.l.socket(s.g.id, local); s == nil {
			return 0, syscall.ENETUNREACH
		}
	}
	if s.sendAlong(b, to) {
		return len(b), nil
	}
	sc := s.g.shard.scratch
	sc.payload.b = b
	sc.to = fullAddress(to)
	var err tcpip.Error
	mtu := min(s.g.link.mtu, s.g.shard.path(sc.to.Addr).mtu)
	switch {
	case networkHeaderLen(to.Addr())+header.UDPMinimumSize+len(b) > int(mtu):
		err = s.writeFragments(b, mtu)
	case !s.sendFrame(b, to):
		err = s.write(b)
	}
	sc.payload.b = nil
	if err != nil {
		return 0, errno(err)
	}
	return len(b), nil
}

// write sends b to the address in the scratch space.
func (s *Socket) write(b []byte) tcpip.Error {
	sc := s.g.shard.scratch
	_, err := s.ep.Write(&sc.payload, tcpip.WriteOptions{To: &sc.to})
	if _, full := err.(*tcpip.ErrWouldBlock); full {
		s.g.shard.tx.flush() // the socket's send buffer waits in our own queue
		sc.payload.b = b
		_, err = s.ep.Write(&sc.payload, tcpip.WriteOptions{To: &sc.to})
	}
	return err
}

// writeFragments is write in packets of mtu bytes. gVisor cuts by the link's MTU
// alone, and all at once. It would give the fragments of all IPv4 datagrams the
// same identification, if others were not allowed to cut them further.
func (s *Socket) writeFragments(b []byte, mtu uint32) tcpip.Error {
	link := &s.g.link.mtu
	before := *link
	*link = min(before, max(mtu, minPathMTU))
	_ = s.ep.SetSockOptInt(tcpip.MTUDiscoverOption, int(tcpip.PMTUDiscoveryDont)) // values that it knows
	err := s.write(b)
	_ = s.ep.SetSockOptInt(tcpip.MTUDiscoverOption, int(tcpip.PMTUDiscoveryWant))
	*link = before
	return err
}

// Do runs f on the thread of the socket's shard, like Conn.Do.
func (s *Socket) Do(f func()) bool { return s.g.perform(f) }

// LocalAddr returns the address that the socket's datagrams were sent to: one of
// the stack's, or a multicast group's.
func (s *Socket) LocalAddr() netip.AddrPort { return s.local }

// Shard returns the shard that processes the socket's datagrams.
func (s *Socket) Shard() int { return s.g.shard.id }

// CPU returns the CPU that the shard's thread is pinned to.
func (s *Socket) CPU() int { return s.g.shard.cpu }

// NUMANode returns the NUMA node of that CPU.
func (s *Socket) NUMANode() int { return s.g.shard.node }

func (s *Socket) shut() {
	if !s.closed {
		s.closed = true
		delete(s.g.sockets, s.ep)
		if s.g.ports[s.local] == s {
			delete(s.g.ports, s.local)
		}
		s.wq.EventUnregister(&s.entry)
		s.ep.Close()
	}
}

// gatherer copies a datagram, which gVisor gives back before its reader is
// done with it.
type gatherer struct {
	buf [65535]byte
	n   int
}

func (g *gatherer) Write(b []byte) (int, error) {
	n := copy(g.buf[g.n:], b)
	g.n += n
	return len(b), nil
}
