package main

import (
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// datagramBuffer is the receive buffer asked for, in bytes: one socket takes the bursts of all streams. The kernel gives
// at most net.core.rmem_max.
const datagramBuffer = 4 << 20

// datagrams is the server's one UDP socket. Streams are told apart by the address of their peer, so it needs nothing a
// userspace stack may not have: no second socket on the same port, no connect.
//
// A datagram of a known peer goes to its stream; a connect message of an unknown one opens a stream while a test waits
// for them; everything else is dropped.
type datagrams struct {
	conn net.PacketConn
	// Both nil when conn has only the methods of net.PacketConn, which allocate an address per datagram. Package net and
	// package stack have different names for those that do not.
	fastRead  func([]byte) (int, netip.AddrPort, error)
	fastWrite func([]byte, netip.AddrPort) (int, error)

	peers atomic.Pointer[map[netip.AddrPort]*peer] // read per datagram, replaced under mu
	mu    sync.Mutex
	join  *joining // nil: no test waits for streams
}

// joining is a test that waits for streams.
type joining struct {
	from   netip.Addr // only this host may open streams: a forged source cannot aim our traffic at somebody else
	left   int        // streams still missing
	opened chan *peer // has room for all
}

// peer is one stream's end of the socket. It is a wire, not a net.Conn: what arrives is delivered, not read.
type peer struct {
	socket *datagrams
	at     netip.AddrPort
	addr   net.Addr
	reply  [4]byte
	stream atomic.Pointer[stream] // nil until the test starts
	amount *quota
}

var _ wire = (*peer)(nil)

func newDatagrams(conn net.PacketConn) *datagrams {
	d := &datagrams{conn: conn}
	switch fast := conn.(type) {
	case interface {
		ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
		WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error)
	}:
		d.fastRead, d.fastWrite = fast.ReadFromUDPAddrPort, fast.WriteToUDPAddrPort
	case interface {
		ReadFromAddrPort(b []byte) (int, netip.AddrPort, error)
		WriteToAddrPort(b []byte, addr netip.AddrPort) (int, error)
	}:
		d.fastRead, d.fastWrite = fast.ReadFromAddrPort, fast.WriteToAddrPort
	}
	if b, ok := conn.(buffered); ok {
		_ = b.SetReadBuffer(datagramBuffer) // a smaller one only means more loss, which is reported
	}
	d.peers.Store(&map[netip.AddrPort]*peer{})
	return d
}

// serve receives until the socket fails, which is the error it returns; closing it is one way.
func (d *datagrams) serve() error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := d.readFrom(b)
		if err != nil {
			return err
		}
		p, known := (*d.peers.Load())[from]
		switch {
		case known && n != len(p.reply):
			if s := p.stream.Load(); s != nil {
				s.arrived(b[:n], time.Now(), p.amount)
			}
		case known: // the answer to the connect message was lost
			_, _ = d.writeTo(p.reply[:], p)
		default:
			d.admit(b[:n], from)
		}
	}
}

// admit opens a stream if b is a connect message a test is waiting for.
func (d *datagrams) admit(b []byte, from netip.AddrPort) {
	reply, ok := connectReply(b)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	j := d.join
	if j == nil || j.left == 0 || from.Addr().Unmap() != j.from {
		return
	}
	p := &peer{socket: d, at: from, addr: net.UDPAddrFromAddrPort(from), reply: reply}
	peers := map[netip.AddrPort]*peer{from: p}
	maps.Copy(peers, *d.peers.Load())
	d.peers.Store(&peers)
	j.left--
	j.opened <- p
	_, _ = d.writeTo(reply[:], p) // if it does not arrive, the client asks again or gives up
}

// expect admits n streams from one host until release.
func (d *datagrams) expect(n int, from netip.Addr) <-chan *peer {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.conn.SetWriteDeadline(time.Time{})
	d.join = &joining{from: from.Unmap(), left: n, opened: make(chan *peer, n)}
	return d.join.opened
}

// release forgets all streams and admits no more.
func (d *datagrams) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.join = nil
	d.peers.Store(&map[netip.AddrPort]*peer{})
}

func (d *datagrams) readFrom(b []byte) (int, netip.AddrPort, error) {
	if d.fastRead != nil {
		return d.fastRead(b)
	}
	n, addr, err := d.conn.ReadFrom(b)
	if err != nil {
		return n, netip.AddrPort{}, err
	}
	if udp, ok := addr.(*net.UDPAddr); ok {
		return n, udp.AddrPort(), nil
	}
	return n, netip.AddrPort{}, nil
}

func (d *datagrams) writeTo(b []byte, p *peer) (int, error) {
	if d.fastWrite != nil {
		return d.fastWrite(b, p.at)
	}
	return d.conn.WriteTo(b, p.addr)
}

// Write sends one datagram.
func (p *peer) Write(b []byte) (int, error) { return p.socket.writeTo(b, p) }

// SetWriteDeadline is shared by all streams of the socket, which end together.
func (p *peer) SetWriteDeadline(t time.Time) error { return p.socket.conn.SetWriteDeadline(t) }

// LocalAddr is the socket's, whose IP address may be unspecified.
func (p *peer) LocalAddr() net.Addr { return p.socket.conn.LocalAddr() }

// RemoteAddr is the client's.
func (p *peer) RemoteAddr() net.Addr { return p.addr }

// Close does nothing: release ends all streams at once.
func (p *peer) Close() error { return nil }
