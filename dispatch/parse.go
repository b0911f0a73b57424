package dispatch

import "encoding/binary"

// MaxExtensionHeaders is how many IPv6 extension headers (hop-by-hop options,
// routing, fragment, destination options) the parser and the steering program
// follow. RFC 8200 section 4.1 asks for at most five of these per packet; the
// rest is tolerance. A longer chain only costs time, so it is malformed.
const MaxExtensionHeaders = 8

// EtherTypes that steering tells apart (IEEE 802 numbers).
const (
	etherTypeIPv4    = 0x0800
	etherTypeARP     = 0x0806
	etherTypeVLAN    = 0x8100
	etherTypeIPv6    = 0x86dd
	etherTypeQinQ    = 0x88a8
	etherTypeOldQinQ = 0x9100
)

// IP protocol numbers that steering tells apart (IANA).
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoICMPv6      = 58
	protoDestination = 60
)

// Header lengths in bytes: the least that each header takes.
const (
	ethernetLen  = 14
	arpLen       = 28 // for Ethernet and IPv4, RFC 826
	ipv4Len      = 20
	ipv6Len      = 40
	extensionLen = 8
	tcpLen       = 20
	udpLen       = 8
	icmpLen      = 8 // ahead of the quoted packet in errors, both families
)

// Fragment bits: IPv4 flags and offset without Don't Fragment (RFC 791), IPv6
// offset and M without the reserved bits (RFC 8200 section 4.5).
const (
	ipv4FragmentBits   = 0x3fff
	ipv4FragmentOffset = 0x1fff
	ipv6FragmentBits   = 0xfff9
	ipv6FragmentOffset = 0xfff8
)

// ICMPv6 types: errors are below 128 (RFC 4443 section 2.1), neighbor discovery
// is 133 to 137 (RFC 4861 section 4).
const (
	icmpv6FirstInformational = 128
	ndpFirst                 = 133
	ndpLast                  = 137
)

// Parsed is what one pass over a frame finds out for steering and delivery.
//
// Offsets count from the start of the frame. For a frame to be dropped only
// Class and Length mean something, for ARP also L3.
type Parsed struct {
	Class Class

	// Proto is the IP protocol after all extension headers, 0 if there is none.
	// In a fragment with an offset it is the first of what the fragment header
	// announces, which may be an extension header.
	Proto uint8

	IPv6 bool

	// Fragment is set if the packet is one of several. It is hashed by its
	// addresses. L4 tells the first fragment, whose transport header is here,
	// from the others, where L4 is 0. An IPv6 packet whose fragment header says
	// "first and last" (RFC 6946) is whole and counts as unfragmented.
	Fragment bool

	// Hash decides the flow group of ClassFlow frames, and is 0 otherwise.
	Hash uint32

	L3 uint16
	L4 uint16 // 0 if there is no transport header here

	// Payload is where the payload of unfragmented TCP and UDP begins, else 0.
	// It equals Length if there is none.
	Payload uint16

	// Length is the Ethernet header and what the IP header says, in bytes;
	// padding may follow. It is the length of the frame if there is no IP.
	Length int
}

// drop makes p the description of a dropped frame.
func (p *Parsed) drop(c Class, frame []byte) {
	*p = Parsed{Class: c, Length: len(frame)}
}

// Parse classifies a received Ethernet frame and hashes what its class is
// hashed by. It overwrites all of p, reads nothing after the frame's IP length,
// and does not allocate; any bytes are legal input. Checksums are not looked
// at. A GSO super-frame is one frame and hashed once.
//
//   - TCP and UDP, unfragmented: addresses and ports.
//   - Fragments, ICMP, all other IP protocols: addresses.
//   - ICMP and ICMPv6 errors: what the frames of the flow that earned the error
//     hash by, taken from the quoted packet. The quote is a packet we sent, so
//     source and destination are exchanged. If the quote does not hold ports:
//     its addresses; if it does not even hold those: the error's own.
//
// An IPv4 total length of 0 (left to hardware) and IPv6 jumbo payloads (RFC
// 2675) are malformed.
func (t *Toeplitz) Parse(frame []byte, p *Parsed) {
	if len(frame) < ethernetLen {
		p.drop(ClassTruncated, frame)
		return
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherTypeIPv4:
		t.parseIPv4(frame, p)
	case etherTypeIPv6:
		t.parseIPv6(frame, p)
	case etherTypeARP:
		if len(frame) < ethernetLen+arpLen {
			p.drop(ClassTruncated, frame)
			return
		}
		*p = Parsed{Class: ClassNeighbor, L3: ethernetLen, Length: len(frame)}
	case etherTypeVLAN, etherTypeQinQ, etherTypeOldQinQ:
		p.drop(ClassVLAN, frame)
	default:
		p.drop(ClassUnknownEtherType, frame)
	}
}

func (t *Toeplitz) parseIPv4(frame []byte, p *Parsed) {
	if len(frame) < ethernetLen+ipv4Len {
		p.drop(ClassTruncated, frame)
		return
	}
	ip := frame[ethernetLen:]
	headerLen := int(ip[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || headerLen < ipv4Len || total < headerLen {
		p.drop(ClassMalformed, frame)
		return
	}
	if total > len(ip) {
		p.drop(ClassTruncated, frame)
		return
	}
	*p = Parsed{
		Proto:  ip[9],
		Hash:   t.addrs4((*[4]byte)(ip[12:]), (*[4]byte)(ip[16:])),
		L3:     ethernetLen,
		L4:     uint16(ethernetLen + headerLen),
		Length: ethernetLen + total,
	}
	if fragment := binary.BigEndian.Uint16(ip[6:]) & ipv4FragmentBits; fragment != 0 {
		p.Fragment = true
		if fragment&ipv4FragmentOffset != 0 {
			p.L4 = 0
		}
		return
	}
	t.parseTransport(frame, p)
}

func (t *Toeplitz) parseIPv6(frame []byte, p *Parsed) {
	if len(frame) < ethernetLen+ipv6Len {
		p.drop(ClassTruncated, frame)
		return
	}
	ip := frame[ethernetLen:]
	total := ipv6Len + int(binary.BigEndian.Uint16(ip[4:]))
	if ip[0]>>4 != 6 {
		p.drop(ClassMalformed, frame)
		return
	}
	if total > len(ip) {
		p.drop(ClassTruncated, frame)
		return
	}
	*p = Parsed{
		IPv6:   true,
		Hash:   t.addrs6((*[16]byte)(ip[8:]), (*[16]byte)(ip[24:])),
		L3:     ethernetLen,
		Length: ethernetLen + total,
	}
	chain := walkExtensions(ip[:total], ipv6Len, ip[6])
	p.Proto, p.Fragment = chain.proto, chain.fragment
	if chain.ok {
		p.L4 = uint16(ethernetLen + chain.end)
	}
	switch {
	case p.Fragment:
	case !chain.ok:
		p.drop(ClassMalformed, frame)
	default:
		t.parseTransport(frame, p)
	}
}

// extensions is where a walk along IPv6 extension headers ended.
type extensions struct {
	proto    uint8 // what comes after the last header
	fragment bool  // a fragment header was met that is not "first and last"
	ok       bool  // the walk reached a transport header, at end
	end      int   // offset in the packet
}

// walkExtensions follows the extension headers of an IPv6 packet from offset at
// on, where a header of type next begins. Headers of an unknown type end the
// walk like a transport protocol does; so do authentication and encapsulating
// security, behind which there is nothing we could read.
func walkExtensions(packet []byte, at int, next uint8) extensions {
	e := extensions{proto: next, end: at}
	for n := 0; ; n++ {
		if !isExtension(e.proto) {
			e.ok = true
			return e
		}
		if n == MaxExtensionHeaders || e.end+extensionLen > len(packet) {
			return e
		}
		header := packet[e.end:]
		length := extensionLen
		if e.proto == protoFragment {
			bits := binary.BigEndian.Uint16(header[2:])
			e.fragment = e.fragment || bits&ipv6FragmentBits != 0
			if bits&ipv6FragmentOffset != 0 {
				e.proto = header[0]
				return e
			}
		} else {
			length += int(header[1]) * 8
		}
		e.proto, e.end = header[0], e.end+length
		if e.end > len(packet) {
			return e
		}
	}
}

func isExtension(proto uint8) bool {
	switch proto {
	case protoHopByHop, protoRouting, protoFragment, protoDestination:
		return true
	}
	return false
}

// parseTransport finishes p for a whole packet whose addresses are hashed and
// whose transport header begins at p.L4.
func (t *Toeplitz) parseTransport(frame []byte, p *Parsed) {
	segment := frame[p.L4:p.Length]
	switch {
	case p.Proto == protoTCP:
		if len(segment) < tcpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		headerLen := int(segment[12]>>4) * 4
		if headerLen < tcpLen || headerLen > len(segment) {
			p.drop(ClassMalformed, frame)
			return
		}
		p.Payload = p.L4 + uint16(headerLen)
		p.Hash ^= t.ports(p.IPv6, binary.BigEndian.Uint32(segment))
	case p.Proto == protoUDP:
		if len(segment) < udpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		length := int(binary.BigEndian.Uint16(segment[4:]))
		if length < udpLen || length > len(segment) {
			p.drop(ClassMalformed, frame)
			return
		}
		p.Payload = p.L4 + udpLen
		p.Hash ^= t.ports(p.IPv6, binary.BigEndian.Uint32(segment))
	case p.Proto == protoICMP && !p.IPv6:
		if len(segment) < icmpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		if icmpv4Error(segment[0]) {
			t.hashQuoted4(segment[icmpLen:], p)
		}
	case p.Proto == protoICMPv6 && p.IPv6:
		if len(segment) < icmpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		switch kind := segment[0]; {
		case kind < icmpv6FirstInformational:
			t.hashQuoted6(segment[icmpLen:], p)
		case kind >= ndpFirst && kind <= ndpLast:
			p.Class, p.Hash = ClassNeighbor, 0
		}
	}
}

// icmpv4Error reports whether messages of this type quote a packet (RFC 1122
// section 3.2.2; icmp_pointers in net/ipv4/icmp.c).
func icmpv4Error(kind uint8) bool {
	switch kind {
	case 3, // destination unreachable
		4,  // source quench
		5,  // redirect
		11, // time exceeded
		12: // parameter problem
		return true
	}
	return false
}

// hashQuoted4 replaces the hash of an ICMP error by the one of the flow that it
// is about. The quote may end anywhere and its lengths are not to be trusted:
// routers quote as little as the header and eight bytes (RFC 792).
func (t *Toeplitz) hashQuoted4(quote []byte, p *Parsed) {
	if len(quote) < ipv4Len {
		return
	}
	headerLen := int(quote[0]&0xf) * 4
	if quote[0]>>4 != 4 || headerLen < ipv4Len {
		return
	}
	p.Hash = t.addrs4((*[4]byte)(quote[16:]), (*[4]byte)(quote[12:]))
	if binary.BigEndian.Uint16(quote[6:])&ipv4FragmentBits == 0 {
		t.hashQuotedPorts(quote, headerLen, quote[9], p)
	}
}

// hashQuoted6 is hashQuoted4 for ICMPv6.
func (t *Toeplitz) hashQuoted6(quote []byte, p *Parsed) {
	if len(quote) < ipv6Len || quote[0]>>4 != 6 {
		return
	}
	p.Hash = t.addrs6((*[16]byte)(quote[24:]), (*[16]byte)(quote[8:]))
	if chain := walkExtensions(quote, ipv6Len, quote[6]); chain.ok && !chain.fragment {
		t.hashQuotedPorts(quote, chain.end, chain.proto, p)
	}
}

// hashQuotedPorts adds the exchanged ports of a quoted packet whose transport
// header begins at offset l4, if it has ports and the quote reaches that far.
func (t *Toeplitz) hashQuotedPorts(quote []byte, l4 int, proto uint8, p *Parsed) {
	if proto != protoTCP && proto != protoUDP || l4+4 > len(quote) {
		return
	}
	ports := binary.BigEndian.Uint32(quote[l4:])
	p.Hash ^= t.ports(p.IPv6, ports<<16|ports>>16)
}
