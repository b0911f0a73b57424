package shard

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

// This file is the short way of a datagram: from its frame to the handler of an
// open port, and from a handler to a frame that may hold more of its flow. gVisor
// has the ports, the routes and the neighbors; what is not as usual (fragments,
// IP options, multicast and broadcast, shared ports, neighbors that are not known
// yet, datagrams larger than the path) goes through it.

// socketOf returns the open port that takes the datagrams of a frame, and their
// sender; nil when the netstack has to find out.
func (g *Group) socketOf(vnet *dispatch.VnetHeader, p *dispatch.Parsed, frame []byte) (*Socket, netip.AddrPort) {
	var none netip.AddrPort
	if p.Proto != protoUDP || p.Payload == 0 || len(g.ports) == 0 {
		return nil, none
	}
	src, dst, usual := usualAddresses(p, frame)
	if !usual {
		return nil, none
	}
	udp := frame[p.L4:]
	from := netip.AddrPortFrom(src, binary.BigEndian.Uint16(udp))
	s := g.ports[netip.AddrPortFrom(dst, binary.BigEndian.Uint16(udp[2:]))]
	switch {
	case s == nil,
		s.peer.IsValid() && s.peer != from,
		from.Port() == 0,
		!g.set.mayBePeer(src),
		vnet.Flags&(dispatch.VnetNeedsCsum|dispatch.VnetDataValid) == 0 && !validDatagram(p, frame):
		return nil, none
	}
	return s, from
}

// usualAddresses returns where a packet comes from and goes to; false if its IP header
// has options or is not valid.
func usualAddresses(p *dispatch.Parsed, frame []byte) (src, dst netip.Addr, usual bool) {
	packet := frame[p.L3:p.Length]
	if p.IPv6 {
		return netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:])), p.L4 == p.L3+header.IPv6MinimumSize
	}
	return netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:])),
		p.L4 == p.L3+header.IPv4MinimumSize && header.IPv4(packet).IsChecksumValid()
}

// isOurs reports whether an address is one of the stack's.
func (set *Set) isOurs(a netip.Addr) bool {
	return slices.ContainsFunc(set.cfg.Addrs, func(p netip.Prefix) bool { return p.Addr() == a })
}

// mayBePeer reports whether packets may come from an address, and go to it as to
// a single host: RFC 1122 section 3.2.1.3, RFC 4291 section 2. No packet has an
// IPv4-mapped address (RFC 6890 table 20): to sockets it would be an IPv4 peer.
func (set *Set) mayBePeer(a netip.Addr) bool {
	if a.Is4In6() || !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast() { // those leave out the limited broadcast
		return false
	}
	return !slices.ContainsFunc(set.cfg.Addrs, func(p netip.Prefix) bool { return p.Addr() == a || isBroadcast(p, a) })
}

// isBroadcast reports whether an address means all hosts of a subnet (RFC 919
// section 7). A subnet with two addresses has none (RFC 3021).
func isBroadcast(subnet netip.Prefix, a netip.Addr) bool {
	if !a.Is4() || subnet.Bits() > 30 || !subnet.Contains(a) {
		return false
	}
	b := a.As4()
	host := ^uint32(0) >> subnet.Bits()
	return binary.BigEndian.Uint32(b[:])&host == host
}

// validDatagram verifies the checksum of a datagram that the kernel does not
// vouch for.
func validDatagram(p *dispatch.Parsed, frame []byte) bool {
	udp := header.UDP(frame[p.L4:p.Length])
	if udp.Checksum() == 0 {
		return !p.IPv6 // RFC 768, RFC 8200 section 8.1
	}
	sum := pseudoHeaderSum(frame[p.L3:], p.IPv6, udp.Length())
	return checksum.Checksum(udp[:udp.Length()], sum) == 0xffff
}

// pseudoHeaderSum is the sum of the pseudo header of an UDP packet.
func pseudoHeaderSum(ip []byte, v6 bool, length uint16) uint16 {
	var sum uint16
	if v6 {
		sum = checksum.Checksum(ip[8:40], 0)
	} else {
		sum = checksum.Checksum(ip[12:20], 0)
	}
	return checksum.Combine(sum, checksum.Combine(uint16(protoUDP), length))
}

// handDatagrams gives the handler of an open port the datagrams of a frame, each
// as a view of the receive buffer. The kernel sends many datagrams of one flow in
// one frame (UDP segmentation offload, VIRTIO_NET_HDR_GSO_UDP_L4 of
// linux/virtio_net.h). Unlike segments they do not wait for the application's
// step of the turn: nothing is left to do for them.
func (s *Socket) handDatagrams(vnet *dispatch.VnetHeader, p *dispatch.Parsed, frame []byte, from netip.AddrPort) {
	g := s.g
	g.frames++
	g.bytes += uint64(p.Length)
	g.shard.enter(stageApplication)
	payload := frame[p.Payload : p.L4+header.UDP(frame[p.L4:]).Length()]
	size := len(payload)
	if vnet.GSOType == dispatch.VnetGSOUDPL4 {
		size = int(vnet.GSOSize)
	}
	for {
		n := min(size, len(payload))
		s.h(s, payload[:n:n], from)
		if payload = payload[n:]; len(payload) == 0 || s.closed {
			return
		}
	}
}

// datagramFlow says whose datagrams a frame holds: all of the size of the first but the
// last, which may be shorter. The kernel, or the device it hands the frame to, cuts it
// into the datagrams.
type datagramFlow struct {
	from  *Socket // nil: none
	to    netip.AddrPort
	size  int // of the first datagram's payload, in bytes
	count int
}

const (
	// maxLargeFrames is how many frames of the largest size, which those with several
	// datagrams take, wait at most in one burst.
	maxLargeFrames = 32

	// maxDatagrams is how many datagrams a frame may have: UDP_MAX_SEGMENTS of
	// linux/udp.h, which newer kernels have doubled.
	maxDatagrams = 64

	// flowSlots is the number of flows whose last frame of the burst is remembered, in
	// sets of flowWays: a flow that takes the place of another merely makes that one
	// begin a new frame.
	flowSlots = 256
	flowWays  = 4
)

// datagramFrames are the frames of datagrams of one burst. Owned by the shard's
// thread.
type datagramFrames struct {
	last      [flowSlots]*txFrame // by flow: takes more datagrams
	pending   bool                // last is not empty
	large     []*txFrame          // free, last in, first out
	largeMade int
}

// slot returns where the last frame of a flow is, or may be.
func (f *datagramFrames) slot(s *Socket, to netip.AddrPort) **txFrame {
	a := to.Addr().As16()
	x := binary.LittleEndian.Uint32(a[12:]) ^ uint32(to.Port())<<16 ^ uint32(s.local.Port())
	set := f.last[x*golden>>26*flowWays:][:flowWays]
	place := &set[0]
	for i := range set {
		switch last := set[i]; {
		case last == nil:
			place = &set[i]
		case last.flow.from == s && last.flow.to == to:
			return &set[i]
		}
	}
	return place
}

func (f *datagramFrames) takeLarge() *txFrame {
	if n := len(f.large); n > 0 {
		large := f.large[n-1]
		f.large = f.large[:n-1]
		return large
	}
	if f.largeMade == maxLargeFrames {
		return nil
	}
	f.largeMade++
	return &txFrame{b: make([]byte, 0, largestFrame)}
}

// join puts a datagram into the last frame of its flow, and returns false when that
// has ended.
func (t *txQueue) join(s *Socket, to netip.AddrPort, payload []byte) bool {
	slot := t.datagrams.slot(s, to)
	f := *slot
	if f == nil || f.flow.from != s || f.flow.to != to {
		return false
	}
	if len(payload) > f.flow.size || len(payload) == 0 || f.flow.count == maxDatagrams || len(f.b)+len(payload) > largestFrame {
		*slot = nil
		return false
	}
	if cap(f.b) < largestFrame {
		large := t.datagrams.takeLarge()
		if large == nil {
			*slot = nil
			return false
		}
		f.b, large.b = append(large.b[:0], f.b...), f.b[:0]
		t.free = append(t.free, large) // the two have changed their memory
	}
	f.b = append(f.b, payload...)
	f.flow.count++
	if len(payload) < f.flow.size {
		*slot = nil
	}
	return true
}

// begin queues a frame of a datagram, which others of its flow may join.
func (t *txQueue) begin(s *Socket, to netip.AddrPort, payload []byte, mac [6]byte) {
	if len(t.frames) == txBurst {
		t.flush()
	}
	f := t.take()
	f.l4 = l3 + networkHeaderLen(to.Addr())
	headers := f.l4 + header.UDPMinimumSize
	if headers+len(payload) > smallFrame {
		large := t.datagrams.takeLarge()
		if large == nil { // all wait for the flush
			t.flush()
			large = t.datagrams.takeLarge()
		}
		f.b, large.b = large.b, f.b
		t.give(large)
	}
	f.flow = datagramFlow{from: s, to: to, size: len(payload), count: 1}
	f.b = f.b[:headers]
	local, remote := tcpipAddress(s.local.Addr()), tcpipAddress(to.Addr())
	s.g.putHeaders(f.b, mac, local, remote, stack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: datagramTTL})
	header.UDP(f.b[f.l4:]).Encode(&header.UDPFields{SrcPort: s.local.Port(), DstPort: to.Port()})
	f.b = append(f.b, payload...)
	if a := s.g.arrivals; a != nil {
		f.via = a.queueOf(f.b[l3:], f.b[f.l4:], !to.Addr().Is4())
	}
	if t.offloads.UDP {
		*t.datagrams.slot(s, to) = f
		t.datagrams.pending = true
	}
	t.frames = append(t.frames, f)
}

// datagramTTL is gVisor's default for IPv4 (ipv4.DefaultTTL) and for IPv6.
const datagramTTL = 64

// finishDatagrams fills in what depends on the datagrams: lengths, checksums, and what
// is left for the kernel to do. partial leaves the transport checksum to it.
func (f *txFrame) finishDatagrams(partial bool) {
	putLength(f.b[l3:], len(f.b)-l3)
	udp := header.UDP(f.b[f.l4:])
	length := uint16(len(udp))
	udp.SetLength(length)
	sum := pseudoHeaderSum(f.b[l3:], !f.flow.to.Addr().Is4(), length)
	var vnet dispatch.VnetHeader
	if partial {
		udp.SetChecksum(sum)
		vnet.Flags = dispatch.VnetNeedsCsum
		vnet.CsumStart, vnet.CsumOffset = uint16(f.l4-dispatch.VnetHeaderLen), udpChecksumOffset
		if f.flow.count > 1 {
			vnet.GSOType, vnet.GSOSize = dispatch.VnetGSOUDPL4, uint16(f.flow.size)
			vnet.HdrLen = uint16(f.l4 - dispatch.VnetHeaderLen + header.UDPMinimumSize)
		}
	} else {
		sum = ^checksum.Checksum(udp, sum)
		if sum == 0 {
			sum = 0xffff // 0 says that there is none (RFC 768)
		}
		udp.SetChecksum(sum)
	}
	vnet.Encode(f.b)
}

// udpChecksumOffset is where the checksum stands in a UDP header (RFC 768).
const udpChecksumOffset = 6

// sendAlong puts a datagram into a frame of its flow that is on the transmit queue,
// and returns false when none takes it.
func (s *Socket) sendAlong(b []byte, to netip.AddrPort) bool {
	t := s.g.shard.tx
	if s.closed || !t.datagrams.pending || !t.join(s, to, b) {
		return false
	}
	s.g.link.sent++
	return true
}

// sendFrame puts a datagram into a frame of its own on the transmit queue, and returns
// false when it has to go through gVisor.
func (s *Socket) sendFrame(b []byte, to netip.AddrPort) bool {
	next, direct := s.g.set.nextHop(s.local.Addr(), to.Addr())
	if s.closed || !direct {
		return false
	}
	h := s.g.hop(tcpipAddress(s.local.Addr()), tcpipAddress(next))
	if h == nil {
		return false
	}
	s.g.shard.tx.begin(s, to, b, h.mac)
	s.g.link.sent++
	return true
}

// nextHop returns the neighbor that datagrams from one of the stack's addresses to a
// host go to; false when it is no usual one, and gVisor has to find out.
func (set *Set) nextHop(local, to netip.Addr) (netip.Addr, bool) {
	switch {
	case !set.mayBePeer(to), to.Is4() != local.Is4(), to.Zone() != "":
		return netip.Addr{}, false
	case set.onLink(to):
		return to, true
	case to.IsLinkLocalUnicast():
		return netip.Addr{}, false
	}
	for _, gw := range set.cfg.Gateways {
		if gw.Is4() == to.Is4() {
			return gw, true
		}
	}
	return netip.Addr{}, false
}
