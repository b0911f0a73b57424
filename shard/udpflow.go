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
	var src, dst netip.Addr
	packet := frame[p.L3:p.Length]
	if p.IPv6 {
		if p.L4 != p.L3+header.IPv6MinimumSize {
			return nil, none
		}
		src, dst = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:]))
	} else {
		if p.L4 != p.L3+header.IPv4MinimumSize || !header.IPv4(packet).IsChecksumValid() {
			return nil, none
		}
		src, dst = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:]))
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

// mayBePeer reports whether packets may come from an address, and go to it as to
// a single host: RFC 1122 section 3.2.1.3, RFC 4291 section 2.
func (set *Set) mayBePeer(a netip.Addr) bool {
	if !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast() { // those leave out the limited broadcast
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
	if vnet.GSOType != dispatch.VnetGSONone {
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

// maxHops is how many neighbors a flow group keeps at hand; with one more it
// forgets them all.
const maxHops = 256

// hop is a neighbor that datagrams to one or more hosts go to.
type hop struct {
	route  *stack.Route
	mac    [6]byte
	known  bool
	asked  int64                            // the turn in which gVisor has said so
	answer func(stack.ResolvedFieldsResult) // keeps mac; made once
}

type hopKey struct{ local, next netip.Addr }

// hop returns the neighbor for datagrams from one of the stack's addresses to a
// host, or nil when gVisor has to find out what to do with them.
func (g *Group) hop(local, to netip.Addr) *hop {
	switch {
	case !g.set.mayBePeer(to), to.Is4() != local.Is4(), to.Zone() != "":
		return nil
	case g.set.onLink(to):
	case to.IsLinkLocalUnicast():
		return nil
	default:
		i := slices.IndexFunc(g.set.cfg.Gateways, func(gw netip.Addr) bool { return gw.Is4() == to.Is4() })
		if i < 0 {
			return nil
		}
		to = g.set.cfg.Gateways[i]
	}
	key := hopKey{local, to}
	h := g.hops[key]
	if h == nil {
		r, err := g.stack.FindRoute(nicID, tcpipAddress(local), tcpipAddress(to), networkProtocol(to), false)
		if err != nil {
			return nil
		}
		if len(g.hops) == maxHops {
			for _, other := range g.hops {
				other.route.Release()
			}
			clear(g.hops)
		}
		h = &hop{route: r, asked: -1}
		h.answer = func(r stack.ResolvedFieldsResult) { copy(h.mac[:], r.RouteInfo.RemoteLinkAddress) }
		g.hops[key] = h
	}
	// gVisor is asked once per turn, as it would be for every packet: it then
	// confirms, in time, that the neighbor is still there (RFC 4861 section 7.3).
	if now := g.shard.turnBegan; h.asked != now {
		h.asked = now
		h.known = h.route.ResolvedFields(nil) == nil && h.route.ResolvedFields(h.answer) == nil
	}
	if !h.known {
		return nil
	}
	return h
}

// datagramFrame is a frame of one or more datagrams of one flow, all of the size
// of the first but the last, which may be shorter. The kernel, or the device it
// hands the frame to, cuts it into the datagrams.
type datagramFrame struct {
	b     []byte // with the vnet header; its capacity is the frame's limit
	from  *Socket
	to    netip.AddrPort
	size  int // of the first datagram's payload, in bytes
	count int
}

const (
	// smallFrame is the size in bytes of the buffer for a frame with a single
	// datagram; larger ones, and those with several, take the largest.
	smallFrame   = 2048
	largestFrame = dispatch.VnetHeaderLen + ethernetLen + gsoMaxSize

	// maxLargeFrames is how many of the largest wait at most in one burst.
	maxLargeFrames = 32

	// maxDatagrams is how many datagrams a frame may have: UDP_MAX_SEGMENTS of
	// linux/udp.h, which newer kernels have doubled.
	maxDatagrams = 64
)

// frameSlots is the number of flows whose last frame of the burst is remembered; a
// flow that shares its slot with another merely begins a new frame.
const frameSlots = 256

// datagramFrames are the frames of datagrams of one burst. Owned by the shard's
// thread.
type datagramFrames struct {
	last         [frameSlots]*datagramFrame // by flow: takes more datagrams
	pending      bool                       // last is not empty
	small, large []*datagramFrame           // free, last in, first out
	largeMade    int
}

func frameSlot(s *Socket, to netip.AddrPort) int {
	a := to.Addr().As16()
	x := binary.LittleEndian.Uint32(a[12:]) ^ uint32(to.Port())<<16 ^ uint32(s.local.Port())
	return int(x * golden >> 24)
}

// add puts a datagram into the last frame of its flow, and returns false when
// that has ended.
func (f *datagramFrames) add(s *Socket, to netip.AddrPort, payload []byte) bool {
	slot := &f.last[frameSlot(s, to)]
	d := *slot
	if d == nil || d.from != s || d.to != to {
		return false
	}
	if len(payload) > d.size || len(payload) == 0 || d.count == maxDatagrams || len(d.b)+len(payload) > largestFrame {
		*slot = nil
		return false
	}
	if cap(d.b) < largestFrame {
		large := f.takeLarge()
		if large == nil {
			*slot = nil
			return false
		}
		large.b = append(large.b[:0], d.b...)
		d.b, large.b = large.b, d.b[:0]
		f.small = append(f.small, large) // the buffers have changed places
	}
	d.b = append(d.b, payload...)
	d.count++
	if len(payload) < d.size {
		*slot = nil
	}
	return true
}

func (f *datagramFrames) takeLarge() *datagramFrame {
	if n := len(f.large); n > 0 {
		d := f.large[n-1]
		f.large = f.large[:n-1]
		return d
	}
	if f.largeMade == maxLargeFrames {
		return nil
	}
	f.largeMade++
	return &datagramFrame{b: make([]byte, 0, largestFrame)}
}

func (f *datagramFrames) takeSmall() *datagramFrame {
	if n := len(f.small); n > 0 {
		d := f.small[n-1]
		f.small = f.small[:n-1]
		return d
	}
	return &datagramFrame{b: make([]byte, 0, smallFrame)}
}

// give takes a frame back that was written.
func (f *datagramFrames) give(d *datagramFrame) {
	d.from = nil
	if cap(d.b) == largestFrame {
		f.large = append(f.large, d)
	} else {
		f.small = append(f.small, d)
	}
}

// begin makes a frame of a datagram; nil when all large ones wait for the flush.
func (f *datagramFrames) begin(s *Socket, to netip.AddrPort, payload []byte, mac [6]byte) *datagramFrame {
	v6 := !to.Addr().Is4()
	headers := dispatch.VnetHeaderLen + ethernetLen + networkHeaderLen(to.Addr()) + header.UDPMinimumSize
	var d *datagramFrame
	if headers+len(payload) <= smallFrame {
		d = f.takeSmall()
	} else if d = f.takeLarge(); d == nil {
		return nil
	}
	d.from, d.to, d.size, d.count = s, to, len(payload), 1
	d.b = d.b[:headers]
	frame := d.b[dispatch.VnetHeaderLen:]
	copy(frame, mac[:])
	copy(frame[6:], s.g.set.mac[:])
	// What is 0 here, finish fills in, and else stays so.
	ip := frame[ethernetLen:]
	if v6 {
		binary.BigEndian.PutUint16(frame[12:], uint16(header.IPv6ProtocolNumber))
		header.IPv6(ip).Encode(&header.IPv6Fields{
			TransportProtocol: header.UDPProtocolNumber,
			HopLimit:          datagramTTL,
			SrcAddr:           tcpipAddress(s.local.Addr()),
			DstAddr:           tcpipAddress(to.Addr()),
		})
	} else {
		binary.BigEndian.PutUint16(frame[12:], uint16(header.IPv4ProtocolNumber))
		header.IPv4(ip).Encode(&header.IPv4Fields{
			Flags:    header.IPv4FlagDontFragment, // and so needs no identification (RFC 6864 section 4.1)
			TTL:      datagramTTL,
			Protocol: protoUDP,
			SrcAddr:  tcpipAddress(s.local.Addr()),
			DstAddr:  tcpipAddress(to.Addr()),
		})
	}
	header.UDP(frame[len(frame)-header.UDPMinimumSize:]).Encode(&header.UDPFields{SrcPort: s.local.Port(), DstPort: to.Port()})
	d.b = append(d.b, payload...)
	return d
}

// datagramTTL is gVisor's default for IPv4 (ipv4.DefaultTTL) and for IPv6.
const datagramTTL = 64

// finish fills in what depends on the datagrams: lengths, checksums, and what is
// left for the kernel to do. partial leaves the transport checksum to it.
func (d *datagramFrame) finish(partial bool) {
	v6 := !d.to.Addr().Is4()
	frame := d.b[dispatch.VnetHeaderLen:]
	ip := frame[ethernetLen:]
	l4 := networkHeaderLen(d.to.Addr())
	udp := header.UDP(ip[l4:])
	length := uint16(len(udp))
	if v6 {
		header.IPv6(ip).SetPayloadLength(length)
	} else {
		header.IPv4(ip).SetTotalLength(uint16(len(ip)))
		header.IPv4(ip).SetChecksum(^header.IPv4(ip).CalculateChecksum())
	}
	udp.SetLength(length)
	sum := pseudoHeaderSum(ip, v6, length)
	var vnet dispatch.VnetHeader
	if partial {
		udp.SetChecksum(sum)
		vnet.Flags = dispatch.VnetNeedsCsum
		vnet.CsumStart, vnet.CsumOffset = uint16(ethernetLen+l4), udpChecksumOffset
		if d.count > 1 {
			vnet.GSOType, vnet.GSOSize = dispatch.VnetGSOUDPL4, uint16(d.size)
			vnet.HdrLen = uint16(ethernetLen + l4 + header.UDPMinimumSize)
		}
	} else {
		sum = ^checksum.Checksum(udp, sum)
		if sum == 0 {
			sum = 0xffff // 0 says that there is none (RFC 768)
		}
		udp.SetChecksum(sum)
	}
	vnet.Encode(d.b)
}

// udpChecksumOffset is where the checksum stands in a UDP header (RFC 768).
const udpChecksumOffset = 6

// sendAlong puts a datagram into a frame of its flow that is on the transmit queue,
// and returns false when none takes it.
func (s *Socket) sendAlong(b []byte, to netip.AddrPort) bool {
	t := s.g.shard.tx
	if s.closed || !t.datagrams.pending || !t.datagrams.add(s, to, b) {
		return false
	}
	s.g.link.sent++
	return true
}

// sendFrame puts a datagram into a frame of its own on the transmit queue, and returns
// false when it has to go through gVisor.
func (s *Socket) sendFrame(b []byte, to netip.AddrPort) bool {
	if s.closed {
		return false
	}
	h := s.g.hop(s.local.Addr(), to.Addr())
	if h == nil {
		return false
	}
	t := s.g.shard.tx
	d := t.datagrams.begin(s, to, b, h.mac)
	if d == nil {
		t.flush()
		d = t.datagrams.begin(s, to, b, h.mac)
	}
	var via *dispatch.Queue
	if a := s.g.arrivals; a != nil {
		frame := d.b[dispatch.VnetHeaderLen:]
		via = a.queueOf(frame[ethernetLen:], frame[len(frame)-len(b)-header.UDPMinimumSize:], !to.Addr().Is4())
	}
	t.pushDatagram(d, via)
	s.g.link.sent++
	return true
}
