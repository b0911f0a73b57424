package shard

import (
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
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
	set     *Set
	addr    netip.AddrPort
	close   sync.Once
	sockets [][]*Socket // by group, then by local address; owned by the group's thread
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
	queued bool
	closed bool

	failed func(error) // what became of earlier datagrams; nil unless connected
}

// ListenUDP gives the datagrams that arrive at port of one of addrs to h; each
// address is one of the stack's, so that an answer leaves from the one that was
// asked. Port 0 chooses one. It may be called from any goroutine but a shard's.
func (set *Set) ListenUDP(addrs []netip.Addr, port uint16, h DatagramHandler) (*UDPListener, error) {
	l := &UDPListener{set: set, addr: reportedAddr(addrs, port), sockets: make([][]*Socket, len(set.groups))}
	for id := range set.groups {
		err := set.doGroup(id, func(g *Group) error {
			for _, a := range addrs {
				s, err := g.listenUDP(netip.AddrPortFrom(a, l.addr.Port()), h)
				if err != nil {
					return err
				}
				l.sockets[id] = append(l.sockets[id], s)
				// The first group chooses port 0; the others follow.
				l.addr = netip.AddrPortFrom(l.addr.Addr(), s.local.Port())
			}
			return nil
		})
		if err != nil {
			l.Close()
			return nil, opError("listen", "udp", netip.AddrPort{}, l.addr, err)
		}
	}
	return l, nil
}

// Addr returns the address that the listener receives on.
func (l *UDPListener) Addr() netip.AddrPort { return l.addr }

// Close releases the port. It may be called from any goroutine but a shard's.
func (l *UDPListener) Close() {
	l.close.Do(func() {
		for id := range l.sockets {
			_ = l.set.doGroup(id, func(*Group) error { // a set that has ended has none
				for _, s := range l.sockets[id] {
					s.shut()
				}
				return nil
			})
		}
	})
}

func (g *Group) listenUDP(addr netip.AddrPort, h DatagramHandler) (*Socket, error) {
	if g.shard.over() {
		return nil, ErrClosed
	}
	s := &Socket{g: g, h: h}
	ep, err := g.stack.NewEndpoint(udp.ProtocolNumber, networkProtocol(addr.Addr()), &s.wq)
	if err != nil {
		return nil, errno(err)
	}
	if networkProtocol(addr.Addr()) == ipv6.ProtocolNumber {
		ep.SocketOptions().SetV6Only(true)
	}
	if err := ep.Bind(fullAddress(addr)); err != nil {
		ep.Close()
		return nil, errno(err)
	}
	ep.SocketOptions().SetReceiveBufferSize(udpReceiveBuffer, false)
	s.ep = ep
	local, _ := ep.GetLocalAddress() // a bound endpoint has one
	s.local = netip.AddrPortFrom(addr.Addr(), local.Port)
	s.entry.Init(s, waiter.ReadableEvents|waiter.EventErr)
	s.wq.EventRegister(&s.entry)
	g.sockets[s] = struct{}{}
	return s, nil
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

// WriteTo sends b as one datagram. It may be fragmented by IP; above 65,507
// bytes (65,487 for IPv6) the error is EMSGSIZE.
func (s *Socket) WriteTo(b []byte, to netip.AddrPort) (int, error) {
	sc := s.g.shard.scratch
	sc.payload.b = b
	sc.to = fullAddress(to)
	_, err := s.ep.Write(&sc.payload, tcpip.WriteOptions{To: &sc.to})
	if _, full := err.(*tcpip.ErrWouldBlock); full {
		s.g.shard.tx.flush() // the socket's send buffer waits in our own queue
		sc.payload.b = b
		_, err = s.ep.Write(&sc.payload, tcpip.WriteOptions{To: &sc.to})
	}
	sc.payload.b = nil
	if err != nil {
		return 0, errno(err)
	}
	return len(b), nil
}

// Do runs f on the thread of the socket's shard, like Conn.Do.
func (s *Socket) Do(f func()) bool { return s.g.shard.do(func(*Shard) { f() }) }

// LocalAddr returns the address that the socket is bound to.
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
		delete(s.g.sockets, s)
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
