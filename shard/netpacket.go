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

	// dialedBacklog is packetBacklog for a port that talks to one peer: there
	// may be many of them.
	dialedBacklog = 128

	// packetBuffer is how many bytes wait for ReadFrom, unless SetReadBuffer
	// says otherwise.
	packetBuffer = 2 << 20

	// smallDatagram is the size in bytes of the buffers that are kept for
	// re-use; larger datagrams get one of their own.
	smallDatagram = 2048

	// maxDatagramPayload is what fits into an IPv4 packet behind its header
	// and UDP's.
	maxDatagramPayload = 65535 - 20 - 8
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
//
// All methods may be called by any goroutine but a shard's, several at a time.
type NetPacketConn struct {
	set  *Set
	l    *UDPListener // set before the first WriteTo
	in   chan *datagram
	outs []packetOut // by shard

	inBytes, inLimit atomic.Int64 // waiting in in, and how many may

	readMu, writeMu             sync.Mutex // held while waiting
	readDeadline, writeDeadline deadline
	readable, writable          hint

	fault  atomic.Pointer[error] // what became of an earlier datagram; told once
	closed atomic.Bool
}

var _ net.PacketConn = (*NetPacketConn)(nil)

// packetOut is what waits for one shard.
type packetOut struct {
	queue  chan *datagram
	posted atomic.Bool
}

func (set *Set) newPacketConn(backlog int) *NetPacketConn {
	p := &NetPacketConn{
		set:      set,
		in:       make(chan *datagram, backlog),
		outs:     make([]packetOut, len(set.shards)),
		readable: newHint(), writable: newHint(),
	}
	p.inLimit.Store(packetBuffer)
	p.readDeadline.hint, p.writeDeadline.hint = &p.readable, &p.writable
	for i := range p.outs {
		p.outs[i].queue = make(chan *datagram, backlog)
	}
	return p
}

// ListenNetPacket is ListenUDP for any goroutine.
func (set *Set) ListenNetPacket(addrs []netip.Addr, port uint16) (*NetPacketConn, error) {
	p := set.newPacketConn(packetBacklog)
	var err error
	if p.l, err = set.ListenUDP(addrs, port, p.arrived); err != nil {
		return nil, err
	}
	return p, nil
}

// arrived is the DatagramHandler of all sockets.
func (p *NetPacketConn) arrived(s *Socket, b []byte, from netip.AddrPort) {
	if p.inBytes.Add(int64(len(b))) <= p.inLimit.Load() {
		d := newDatagram(b, from)
		select {
		case p.in <- d:
			return
		default:
			d.release()
		}
	}
	p.inBytes.Add(-int64(len(b)))
	s.g.shard.counters.DatagramsDropped++
}

// run implements task: the shard sends what waits.
func (o *packetOut) run(s *Shard) {
	o.posted.Store(false)
	for range packetBacklog {
		select {
		case d := <-o.queue:
			d.run(s)
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

// run implements task: the datagram is sent by the shard that has the socket now.
func (d *datagram) run(s *Shard) {
	if g := d.from.g; !s.owns[g.id] {
		if kept := s.awaited[g.id]; kept != nil && len(kept.tasks) >= maxAwaited || !s.passOn(g, d) {
			s.counters.DatagramsDropped++
			d.release()
		}
		return
	}
	if !d.from.closed {
		if _, err := d.from.WriteTo(d.b, d.peer); err != nil {
			s.counters.DatagramsDropped++ // as UDP may
			if d.from.failed != nil {
				d.from.failed(err)
			}
		}
	}
	d.release()
}

// ReadFrom implements net.PacketConn. What does not fit into b is lost.
func (p *NetPacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := p.ReadFromAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// ReadFromUDP is ReadFrom with a typed address.
func (p *NetPacketConn) ReadFromUDP(b []byte) (int, *net.UDPAddr, error) {
	n, from, err := p.ReadFromAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// ReadFromAddrPort is ReadFrom without an allocation for the address.
func (p *NetPacketConn) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := p.receive(b)
	return n, from, p.opError("read", netip.AddrPort{}, err)
}

// receive waits for a datagram and copies it to b.
func (p *NetPacketConn) receive(b []byte) (int, netip.AddrPort, error) {
	p.readMu.Lock()
	defer p.readMu.Unlock()
	for {
		p.readable.expect()
		if err := p.obstacle(&p.readDeadline); err != nil {
			p.readable.cancel()
			return 0, netip.AddrPort{}, err
		}
		select {
		case d := <-p.in:
			p.readable.cancel()
			return p.take(d, b)
		case <-p.readable.ch:
		case <-p.set.done:
		}
	}
}

func (p *NetPacketConn) take(d *datagram, b []byte) (int, netip.AddrPort, error) {
	n, from := copy(b, d.b), d.peer
	p.inBytes.Add(-int64(len(d.b)))
	d.release()
	return n, from, nil
}

// WriteTo implements net.PacketConn. It waits while the queue to the shard
// that sends the datagram is full.
func (p *NetPacketConn) WriteTo(b []byte, to net.Addr) (int, error) {
	addr, ok := to.(*net.UDPAddr)
	if !ok && to != nil {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: p.LocalAddr(), Addr: to, Err: syscall.EINVAL}
	}
	return p.WriteToUDP(b, addr)
}

// WriteToUDP is WriteTo with a typed address.
func (p *NetPacketConn) WriteToUDP(b []byte, to *net.UDPAddr) (int, error) {
	if to == nil {
		return 0, &net.OpError{Op: "write", Net: "udp", Source: p.LocalAddr(), Err: syscall.EINVAL}
	}
	return p.WriteToAddrPort(b, to.AddrPort())
}

// WriteToAddrPort is WriteTo without an allocation for the address.
func (p *NetPacketConn) WriteToAddrPort(b []byte, to netip.AddrPort) (int, error) {
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	if err := p.send(b, to); err != nil {
		return 0, p.opError("write", to, err)
	}
	return len(b), nil
}

// send queues a datagram for the shard that the peer's answer hashes to.
func (p *NetPacketConn) send(b []byte, to netip.AddrPort) error {
	if err := p.obstacle(&p.writeDeadline); err != nil {
		return err
	}
	switch {
	case len(b) > maxDatagramPayload:
		return syscall.EMSGSIZE
	case !to.IsValid() || to.Addr().IsUnspecified() || to.Port() == 0:
		return syscall.EINVAL
	}
	from, group := p.route(to)
	if from == nil {
		return syscall.ENETUNREACH
	}
	d := newDatagram(b, to)
	d.from = from
	shard := p.set.reta.Owner(group)
	out := &p.outs[shard]
	select {
	case out.queue <- d:
	default:
		if err := p.sendLater(out, d); err != nil {
			d.release()
			return err
		}
	}
	if out.posted.CompareAndSwap(false, true) && !p.set.shards[shard].post(out) {
		out.posted.Store(false)
		return net.ErrClosed
	}
	return nil
}

// sendLater waits for room in the queue.
func (p *NetPacketConn) sendLater(out *packetOut, d *datagram) error {
	p.writeMu.Lock()
	defer p.writeMu.Unlock()
	for {
		p.writable.expect()
		if err := p.obstacle(&p.writeDeadline); err != nil {
			p.writable.cancel()
			return err
		}
		select {
		case out.queue <- d:
			p.writable.cancel()
			return nil
		case <-p.writable.ch:
		case <-p.set.done:
		}
	}
}

// route returns the socket from which datagrams to a peer leave, and its
// group; nil when the port is not open at the address the peer is reached from.
func (p *NetPacketConn) route(to netip.AddrPort) (*Socket, int) {
	local, ok := p.l.source(to.Addr())
	if !ok {
		return nil, 0
	}
	group := p.set.groupOf(protoUDP, netip.AddrPortFrom(local, p.l.addr.Port()), to)
	return p.l.socket(group, local), group
}

// obstacle returns why an operation may not begin or go on, or nil.
func (p *NetPacketConn) obstacle(d *deadline) error {
	switch {
	case p.closed.Load():
		return net.ErrClosed
	case d.passed():
		return os.ErrDeadlineExceeded
	case p.fault.Load() != nil:
		if fault := p.fault.Swap(nil); fault != nil {
			return *fault
		}
	}
	select {
	case <-p.set.done:
		return cmp.Or(p.set.Err(), net.ErrClosed)
	default:
		return nil
	}
}

// Close implements net.PacketConn. Datagrams that wait to be sent may be lost.
func (p *NetPacketConn) Close() error {
	if !p.closed.CompareAndSwap(false, true) {
		return p.opError("close", netip.AddrPort{}, net.ErrClosed)
	}
	p.readable.give()
	p.writable.give()
	p.readDeadline.stop()
	p.writeDeadline.stop()
	p.l.Close()
	return nil
}

// LocalAddr implements net.PacketConn.
func (p *NetPacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.l.addr) }

// SetDeadline implements net.PacketConn.
func (p *NetPacketConn) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// SetReadDeadline implements net.PacketConn.
func (p *NetPacketConn) SetReadDeadline(t time.Time) error {
	if p.closed.Load() {
		return p.setError(net.ErrClosed)
	}
	p.readDeadline.set(t)
	return nil
}

// SetWriteDeadline implements net.PacketConn.
func (p *NetPacketConn) SetWriteDeadline(t time.Time) error {
	if p.closed.Load() {
		return p.setError(net.ErrClosed)
	}
	p.writeDeadline.set(t)
	return nil
}

// SetReadBuffer sets how many bytes wait for ReadFrom before further datagrams
// are dropped and counted; 2 MiB is the default. The number of datagrams has a
// limit of its own: 1024, or 128 with one peer.
func (p *NetPacketConn) SetReadBuffer(bytes int) error {
	switch {
	case p.closed.Load():
		return p.setError(net.ErrClosed)
	case bytes <= 0:
		return p.setError(syscall.EINVAL)
	}
	p.inLimit.Store(int64(max(bytes, smallDatagram)))
	return nil
}

// SetWriteBuffer is there for programs that want to set it; it has no effect.
// Per shard as many datagrams wait as SetReadBuffer says, then WriteTo does.
func (p *NetPacketConn) SetWriteBuffer(bytes int) error {
	switch {
	case p.closed.Load():
		return p.setError(net.ErrClosed)
	case bytes <= 0:
		return p.setError(syscall.EINVAL)
	default:
		return nil
	}
}

func (p *NetPacketConn) opError(op string, to netip.AddrPort, err error) error {
	return opError(op, "udp", p.l.addr, to, err)
}

func (p *NetPacketConn) setError(err error) error { return p.l.setError(err) }
