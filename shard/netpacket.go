package shard

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// packetBacklog is how many datagrams wait for ReadFrom, and per shard for
	// the shard after WriteTo. More are dropped and counted on the way in, and
	// make WriteTo wait on the way out.
	packetBacklog = 1024

	// smallDatagram is the size in bytes of the buffers that are kept for
	// re-use; larger datagrams get one of their own.
	smallDatagram = 2048
)

// datagram is one on its way between a shard and a goroutine.
type datagram struct {
	b    []byte
	peer netip.AddrPort
	from *Socket // it leaves from, on the way out
}

var datagramPool = sync.Pool{New: func() any { return &datagram{b: make([]byte, 0, smallDatagram)} }}

func newDatagram(b []byte, peer netip.AddrPort) *datagram {
	d := datagramPool.Get().(*datagram)
	d.b = append(d.b[:0], b...)
	d.peer = peer
	return d
}

func (d *datagram) release() {
	d.from = nil
	if cap(d.b) == smallDatagram {
		datagramPool.Put(d)
	}
}

// NetPacketConn is a UDP port for any goroutine. Datagrams pass through
// bounded queues; the endpoints are touched by their shards alone.
type NetPacketConn struct {
	set  *Set
	l    *UDPListener // set before the first WriteTo
	in   chan *datagram
	outs []packetOut // by shard

	readDeadline, writeDeadline deadline

	once   sync.Once
	closed chan struct{}
}

var _ net.PacketConn = (*NetPacketConn)(nil)

// packetOut is what waits for one shard.
type packetOut struct {
	queue  chan *datagram
	posted atomic.Bool
}

// run implements task: the shard sends what waits.
func (o *packetOut) run(s *Shard) {
	o.posted.Store(false)
	for range packetBacklog {
		select {
		case d := <-o.queue:
			if !d.from.closed {
				if _, err := d.from.WriteTo(d.b, d.peer); err != nil {
					s.counters.DatagramsDropped++ // as UDP may
				}
			}
			d.release()
		default:
			return
		}
	}
	// Goroutines fill the queue faster than it empties: the rest waits for the
	// next turn.
	if o.posted.CompareAndSwap(false, true) {
		s.post(o)
	}
}

// ListenNetPacket is ListenUDP for any goroutine.
func (set *Set) ListenNetPacket(addrs []netip.Addr, port uint16) (*NetPacketConn, error) {
	p := &NetPacketConn{
		set:          set,
		in:           make(chan *datagram, packetBacklog),
		outs:         make([]packetOut, len(set.shards)),
		readDeadline: newDeadline(), writeDeadline: newDeadline(),
		closed: make(chan struct{}),
	}
	for i := range p.outs {
		p.outs[i].queue = make(chan *datagram, packetBacklog)
	}
	var err error
	p.l, err = set.ListenUDP(addrs, port, func(s *Socket, b []byte, from netip.AddrPort) {
		d := newDatagram(b, from)
		select {
		case p.in <- d:
		default:
			d.release()
			s.g.shard.counters.DatagramsDropped++
		}
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// ReadFrom implements net.PacketConn. What does not fit into b is lost.
func (p *NetPacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := p.ReadFromAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// ReadFromAddrPort is ReadFrom without an allocation for the address.
func (p *NetPacketConn) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	if err := p.over(); err != nil {
		return 0, netip.AddrPort{}, p.opError("read", err)
	}
	if p.readDeadline.passed() {
		return 0, netip.AddrPort{}, p.opError("read", os.ErrDeadlineExceeded)
	}
	select {
	case d := <-p.in:
		n, from := copy(b, d.b), d.peer
		d.release()
		return n, from, nil
	case <-p.closed:
		return 0, netip.AddrPort{}, p.opError("read", net.ErrClosed)
	case <-p.set.done:
		return 0, netip.AddrPort{}, p.opError("read", p.over())
	case <-p.readDeadline.wait():
		return 0, netip.AddrPort{}, p.opError("read", os.ErrDeadlineExceeded)
	}
}

// WriteTo implements net.PacketConn. It waits while the queue to the shard
// that sends the datagram is full.
func (p *NetPacketConn) WriteTo(b []byte, to net.Addr) (int, error) {
	addr, ok := to.(*net.UDPAddr)
	if !ok || addr == nil {
		return 0, p.opError("write", syscall.EINVAL)
	}
	return p.WriteToAddrPort(b, addr.AddrPort())
}

// WriteToAddrPort is WriteTo without an allocation for the address.
func (p *NetPacketConn) WriteToAddrPort(b []byte, to netip.AddrPort) (int, error) {
	const maxPayload = 65535 - 8 - 20 // UDP and IPv4 header
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	switch {
	case p.over() != nil:
		return 0, p.opError("write", p.over())
	case p.writeDeadline.passed():
		return 0, p.opError("write", os.ErrDeadlineExceeded)
	case len(b) > maxPayload:
		return 0, p.opError("write", syscall.EMSGSIZE)
	case !to.IsValid() || to.Addr().IsUnspecified():
		return 0, p.opError("write", syscall.EINVAL)
	}
	local, ok := p.source(to.Addr())
	if !ok {
		return 0, p.opError("write", syscall.ENETUNREACH)
	}
	// The group that the peer's answer hashes into sends.
	group := p.set.groupOf(netip.AddrPortFrom(local, p.l.addr.Port()), to)
	var from *Socket
	for _, s := range p.l.sockets[group] {
		if s.local.Addr() == local {
			from = s
		}
	}
	if from == nil {
		return 0, p.opError("write", syscall.ENETUNREACH) // the port is not open at the address the peer is reached from
	}
	d := newDatagram(b, to)
	d.from = from
	shard := p.set.reta.Owner(group)
	out := &p.outs[shard]
	select {
	case out.queue <- d:
	default:
		select {
		case out.queue <- d:
		case <-p.closed:
			return 0, p.opError("write", net.ErrClosed)
		case <-p.set.done:
			return 0, p.opError("write", p.over())
		case <-p.writeDeadline.wait():
			return 0, p.opError("write", os.ErrDeadlineExceeded)
		}
	}
	if out.posted.CompareAndSwap(false, true) && !p.set.shards[shard].post(out) {
		out.posted.Store(false)
		return 0, p.opError("write", net.ErrClosed)
	}
	return len(b), nil
}

// source returns the local address for datagrams to a peer: the only one that
// the port is bound to, or what the stack would choose.
func (p *NetPacketConn) source(to netip.Addr) (netip.Addr, bool) {
	if a := p.l.addr.Addr(); !a.IsUnspecified() {
		return a, a.Is4() == to.Is4()
	}
	return p.set.source(to)
}

// over returns why the port can no longer be used, or nil.
func (p *NetPacketConn) over() error {
	select {
	case <-p.closed:
		return net.ErrClosed
	case <-p.set.done:
		return cmp.Or(p.set.Err(), net.ErrClosed)
	default:
		return nil
	}
}

// Close implements net.PacketConn. Datagrams that wait to be sent may be lost.
func (p *NetPacketConn) Close() error {
	err := p.opError("close", net.ErrClosed)
	p.once.Do(func() {
		err = nil
		close(p.closed)
		p.l.Close()
	})
	return err
}

// LocalAddr implements net.PacketConn.
func (p *NetPacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.l.addr) }

// SetDeadline implements net.PacketConn.
func (p *NetPacketConn) SetDeadline(t time.Time) error {
	p.readDeadline.set(t)
	p.writeDeadline.set(t)
	return nil
}

// SetReadDeadline implements net.PacketConn.
func (p *NetPacketConn) SetReadDeadline(t time.Time) error {
	p.readDeadline.set(t)
	return nil
}

// SetWriteDeadline implements net.PacketConn.
func (p *NetPacketConn) SetWriteDeadline(t time.Time) error {
	p.writeDeadline.set(t)
	return nil
}

func (p *NetPacketConn) opError(op string, err error) error {
	return opError(op, "udp", p.l.addr, netip.AddrPort{}, err)
}

// NetPacketDialed is a NetPacketConn that talks to one peer only.
type NetPacketDialed struct {
	*NetPacketConn
	peer netip.AddrPort
}

var _ net.Conn = (*NetPacketDialed)(nil)

// dialPacketTries is how many ports DialNetPacket tries: the port is chosen by
// one group, and another may have given it away.
const dialPacketTries = 16

// DialNetPacket opens a UDP port that talks to remote. It may be called from
// any goroutine but a shard's.
func (set *Set) DialNetPacket(remote netip.AddrPort) (*NetPacketDialed, error) {
	source, ok := set.source(remote.Addr())
	if !ok {
		return nil, opError("dial", "udp", netip.AddrPort{}, remote, syscall.ENETUNREACH)
	}
	var err error
	for range dialPacketTries {
		var p *NetPacketConn
		if p, err = set.ListenNetPacket([]netip.Addr{source}, 0); err == nil {
			return &NetPacketDialed{NetPacketConn: p, peer: remote}, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, err
}

// Read implements net.Conn. Datagrams of others are thrown away.
func (p *NetPacketDialed) Read(b []byte) (int, error) {
	for {
		n, from, err := p.ReadFromAddrPort(b)
		if err != nil || from == p.peer {
			return n, err
		}
	}
}

// Write implements net.Conn.
func (p *NetPacketDialed) Write(b []byte) (int, error) { return p.WriteToAddrPort(b, p.peer) }

// RemoteAddr implements net.Conn.
func (p *NetPacketDialed) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(p.peer) }
