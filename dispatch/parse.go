package dispatch

import "encoding/binary"

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
	protoIGMP        = 2
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoAuth        = 51
	protoICMPv6      = 58
	protoDestination = 60
)

// Header lengths in bytes: the least that each header takes.
const (
	ethernetLen = 14
	arpLen      = 28 // for Ethernet and IPv4, RFC 826
	ipv4Len     = 20
	ipv6Len     = 40
	tcpLen      = 20
	udpLen      = 8
	portsLen    = 4 // of TCP and UDP, at the start
	igmpLen     = 8
	icmpLen     = 8 // ahead of the quoted packet in errors, both families
)

// The fragment field of IPv4 without Don't Fragment (RFC 791 section 3.1).
const (
	ipv4FragmentBits   = 0x3fff // more fragments, offset
	ipv4FragmentOffset = 0x1fff // in units of eight bytes
)

// ICMPv6 types. Errors are below 128 and unknown ones too belong to whoever sent
// the quoted packet (RFC 4443 sections 2.1 and 2.4). Multicast listener
// discovery is 130 to 132 (RFC 2710) and 143 (RFC 3810), neighbor discovery 133
// to 137 (RFC 4861 section 4).
const (
	icmpv6FirstInformational = 128
	mldFirst                 = 130
	ndpLast                  = 137
	mldReport2               = 143
)

// Parsed is what one pass over a frame finds out for steering and delivery.
//
// Offsets count from the start of the frame. For a frame to be dropped only
// Class and Length mean something, for ARP also L3.
type Parsed struct {
	Class Class

	// Proto is the IP protocol after all extension headers, 0 if there is none.
	// In a fragment without L4 it is as far as the headers could be followed, so
	// it may be an extension header.
	Proto uint8

	IPv6 bool

	// Fragment is set if the packet is one of several; see [Fragments]. L4 tells
	// the first fragment, whose transport header is here, from the others, where
	// L4 is 0. An IPv6 packet whose fragment header says "first and last" (RFC
	// 6946) is whole and counts as unfragmented.
	Fragment bool

	// Steered is set by [Fragments]: Hash is the one of the fragment's flow.
	Steered bool

	// Hash decides the flow group of ClassFlow frames, and is 0 otherwise.
	Hash uint32

	L3 uint16
	L4 uint16 // 0 if there is no transport header here

	// Payload is where the payload of unfragmented TCP and UDP begins, else 0.
	// It equals Length if there is none.
	Payload uint16

	// FragmentOffset, in bytes, and FragmentID are the ones of a fragment, else
	// 0. IPv4 has 16 bits for the latter.
	FragmentOffset uint16
	FragmentID     uint32

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
//   - Fragments, ICMP, all other IP protocols: addresses. [Fragments] then finds
//     the flow of a fragment.
//   - ICMP and ICMPv6 errors: what the frames of the flow that earned the error
//     hash by, taken from the quoted packet. The quote is a packet we sent, so
//     source and destination are exchanged. If the quote is no IP packet, a
//     fragment other than the first, or ends before the ports: the error's own
//     addresses.
//   - ARP, NDP, IGMP, MLD: nothing.
//
// Hash types that are off change this as [HashTypes] says, for quoted packets
// too.
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
	addrs := t.addrs4((*[4]byte)(ip[12:]), (*[4]byte)(ip[16:]))
	*p = Parsed{
		Proto:  ip[9],
		Hash:   t.byAddrs(false, addrs),
		L3:     ethernetLen,
		L4:     uint16(ethernetLen + headerLen),
		Length: ethernetLen + total,
	}
	if fragment := binary.BigEndian.Uint16(ip[6:]) & ipv4FragmentBits; fragment != 0 {
		p.Fragment = true
		p.FragmentID = uint32(binary.BigEndian.Uint16(ip[4:]))
		p.FragmentOffset = fragment & ipv4FragmentOffset * 8
		if p.FragmentOffset != 0 {
			p.L4 = 0
		}
		return
	}
	t.parseTransport(frame, p, addrs)
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
	addrs := t.addrs6((*[16]byte)(ip[8:]), (*[16]byte)(ip[24:]))
	*p = Parsed{
		Proto:  ip[6],
		IPv6:   true,
		Hash:   t.byAddrs(true, addrs),
		L3:     ethernetLen,
		L4:     ethernetLen + ipv6Len,
		Length: ethernetLen + total,
	}
	if isExtension(p.Proto) {
		chain := walkExtensions(ip[:total], ipv6Len, p.Proto)
		p.Proto, p.L4 = chain.proto, uint16(ethernetLen+chain.end)
		if !chain.whole {
			p.L4 = 0
		}
		if chain.fragment != 0 {
			header := ip[chain.fragment:]
			p.Fragment = true
			p.FragmentID = binary.BigEndian.Uint32(header[4:])
			p.FragmentOffset = binary.BigEndian.Uint16(header[2:]) & ipv6FragmentOffset
			return
		}
		if !chain.whole {
			p.drop(ClassMalformed, frame)
			return
		}
	}
	t.parseTransport(frame, p, addrs)
}

// parseTransport finishes p for a whole packet whose transport header begins at
// p.L4 and whose addresses hash to addrs.
func (t *Toeplitz) parseTransport(frame []byte, p *Parsed, addrs uint32) {
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
		p.Hash = t.byFlow(p.IPv6, protoTCP, addrs, binary.BigEndian.Uint32(segment))
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
		p.Hash = t.byFlow(p.IPv6, protoUDP, addrs, binary.BigEndian.Uint32(segment))
	case p.Proto == protoICMP && !p.IPv6:
		if len(segment) < icmpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		if icmpv4Error(segment[0]) {
			t.hashQuoted4(segment[icmpLen:], p)
		}
	case p.Proto == protoIGMP && !p.IPv6:
		if len(segment) < igmpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		p.Class, p.Hash = ClassNeighbor, 0
	case p.Proto == protoICMPv6 && p.IPv6:
		if len(segment) < icmpLen {
			p.drop(ClassMalformed, frame)
			return
		}
		switch kind := segment[0]; {
		case kind < icmpv6FirstInformational:
			t.hashQuoted6(segment[icmpLen:], p)
		case kind >= mldFirst && kind <= ndpLast, kind == mldReport2:
			p.Class, p.Hash = ClassNeighbor, 0
		}
	}
}
