package dispatch

import (
	"encoding/binary"
	"strings"
)

// steeringModel is the rules of steering once more, slow and plain, to check
// Parse and the steering program against.
type steeringModel struct {
	key   Key
	types HashTypes
}

// packetModel is what steering needs to know of a packet, also of a quoted one.
type packetModel struct {
	v6       bool
	src, dst []byte
	proto    byte // as far as the headers were followed
	l4       int  // where the transport header begins, -1 if it is not there

	fragment bool
	id       uint32
	offset   int // in bytes

	length int
}

// parse returns what Parse should find out, and the name of the rule that
// decided the hash or the class.
func (m steeringModel) parse(frame []byte) (p Parsed, rule string) {
	if len(frame) < 14 {
		return m.drop(frame, ClassTruncated)
	}
	b := frame[14:]
	switch uint16(frame[12])<<8 | uint16(frame[13]) {
	case 0x0806:
		if len(b) < 28 {
			return m.drop(frame, ClassTruncated)
		}
		return Parsed{Class: ClassNeighbor, L3: 14, Length: len(frame)}, "ARP"
	case 0x0800:
		if len(b) < 20 {
			return m.drop(frame, ClassTruncated)
		}
		total := int(binary.BigEndian.Uint16(b[2:]))
		if b[0]/16 != 4 || b[0]%16 < 5 || total < int(b[0]%16)*4 {
			return m.drop(frame, ClassMalformed)
		}
		if total > len(b) {
			return m.drop(frame, ClassTruncated)
		}
		return m.ip(frame, b[:total], decode4(b[:total]))
	case 0x86dd:
		if len(b) < 40 {
			return m.drop(frame, ClassTruncated)
		}
		if b[0]/16 != 6 {
			return m.drop(frame, ClassMalformed)
		}
		total := 40 + int(binary.BigEndian.Uint16(b[4:]))
		if total > len(b) {
			return m.drop(frame, ClassTruncated)
		}
		return m.ip(frame, b[:total], decode6(b[:total]))
	case 0x8100, 0x88a8, 0x9100:
		return m.drop(frame, ClassVLAN)
	}
	return m.drop(frame, ClassUnknownEtherType)
}

func (steeringModel) drop(frame []byte, c Class) (Parsed, string) {
	return Parsed{Class: c, Length: len(frame)}, "dropped"
}

// decode4 reads an IPv4 header that is there and has a legal length.
func decode4(b []byte) packetModel {
	field := binary.BigEndian.Uint16(b[6:])
	k := packetModel{
		src: b[12:16], dst: b[16:20], proto: b[9], l4: int(b[0]%16) * 4,
		fragment: field&0x2000 != 0 || field&0x1fff != 0,
		offset:   int(field%0x2000) * 8,
		length:   len(b),
	}
	if k.fragment {
		k.id = uint32(binary.BigEndian.Uint16(b[4:]))
	}
	if k.offset != 0 {
		k.l4 = -1
	}
	return k
}

// decode6 reads an IPv6 header that is there, and its extension headers.
func decode6(b []byte) packetModel {
	k := packetModel{v6: true, src: b[8:24], dst: b[24:40], proto: b[6], l4: -1, length: len(b)}
	k.extensions(b, 40, 1)
	return k
}

// extensions reads the nth header of an IPv6 packet, which begins at offset at,
// and all that follow.
func (k *packetModel) extensions(b []byte, at, nth int) {
	units := map[byte]int{0: 8, 43: 8, 60: 8, 51: 4, 44: 0} // of the length field
	unit, ok := units[k.proto]
	if !ok {
		k.l4 = at
		return
	}
	if nth > 8 || at+8 > len(b) || at+8 > 1280 {
		return
	}
	kind := k.proto
	k.proto = b[at]
	if kind == 44 {
		field := binary.BigEndian.Uint16(b[at+2:])
		offset, more := int(field/8)*8, field%2 == 1
		if (offset != 0 || more) && !k.fragment {
			k.fragment, k.offset, k.id = true, offset, binary.BigEndian.Uint32(b[at+4:])
		}
		if offset != 0 {
			return
		}
	}
	at += 8 + unit*int(b[at+1])
	if at <= len(b) && at <= 1280 {
		k.extensions(b, at, nth+1)
	}
}

// ip applies the rules to an IP packet.
func (m steeringModel) ip(frame, b []byte, k packetModel) (Parsed, string) {
	p := Parsed{
		Proto: k.proto, IPv6: k.v6, L3: 14, Length: 14 + k.length,
		Fragment: k.fragment, FragmentID: k.id, FragmentOffset: uint16(k.offset),
	}
	p.Hash = m.addrs(k.v6, k.src, k.dst)
	if k.l4 >= 0 {
		p.L4 = uint16(14 + k.l4)
	}
	switch {
	case k.fragment && k.offset != 0:
		return p, "other fragment"
	case k.fragment && k.l4 < 0:
		return p, "first fragment, headers cut"
	case k.fragment:
		return p, "first fragment"
	case k.l4 < 0:
		return m.drop(frame, ClassMalformed)
	}
	rest := b[k.l4:]
	atLeast := func(n int) bool { return len(rest) >= n }
	switch {
	case k.proto == 6:
		if !atLeast(20) || rest[12]/16 < 5 || !atLeast(int(rest[12]/16)*4) {
			return m.drop(frame, ClassMalformed)
		}
		p.Payload = p.L4 + uint16(rest[12]/16)*4
		p.Hash = m.flow(k.v6, "TCP", k.src, k.dst, rest[0:2], rest[2:4])
		return p, "TCP"
	case k.proto == 17:
		if !atLeast(8) {
			return m.drop(frame, ClassMalformed)
		}
		if length := int(binary.BigEndian.Uint16(rest[4:])); length < 8 || !atLeast(length) {
			return m.drop(frame, ClassMalformed)
		}
		p.Payload = p.L4 + 8
		p.Hash = m.flow(k.v6, "UDP", k.src, k.dst, rest[0:2], rest[2:4])
		return p, "UDP"
	case k.proto == 1 && !k.v6, k.proto == 58 && k.v6, k.proto == 2 && !k.v6:
		if !atLeast(8) {
			return m.drop(frame, ClassMalformed)
		}
		return m.control(p, k.proto, rest)
	}
	return p, "other protocol"
}

// control applies the rules to an ICMP, ICMPv6 or IGMP message.
func (m steeringModel) control(p Parsed, proto byte, message []byte) (Parsed, string) {
	kind := message[0]
	isError := proto == 1 && (kind == 3 || kind == 4 || kind == 5 || kind == 11 || kind == 12) || proto == 58 && kind < 128
	everybody := proto == 2 || proto == 58 && (kind >= 130 && kind <= 137 || kind == 143)
	switch {
	case everybody:
		p.Class, p.Hash = ClassNeighbor, 0
		return p, "control message for all"
	case !isError:
		return p, "control message"
	}
	b := message[8:]
	var k packetModel
	switch {
	case proto == 1 && len(b) >= 20 && b[0]/16 == 4 && b[0]%16 >= 5:
		k = decode4(b)
	case proto == 58 && len(b) >= 40 && b[0]/16 == 6:
		k = decode6(b)
	default:
		return p, "error, quote is no packet"
	}
	name := map[byte]string{6: "TCP", 17: "UDP"}[k.proto]
	switch {
	case k.l4 < 0:
		return p, "error, quote without transport header"
	case name == "" || !m.on(name, k.v6):
		p.Hash = m.addrs(k.v6, k.dst, k.src)
		return p, "error, by quoted addresses"
	case len(b) < k.l4+4:
		return p, "error, quote without ports"
	}
	p.Hash = m.flow(k.v6, name, k.dst, k.src, b[k.l4+2:k.l4+4], b[k.l4:k.l4+2])
	return p, "error, by quoted flow"
}

// on reports whether a hash type is on: of a transport protocol, or "" for IP.
func (m steeringModel) on(name string, v6 bool) bool {
	if name != "" {
		name += "_"
	}
	name += map[bool]string{false: "IPV4", true: "IPV6"}[v6]
	return strings.Contains(","+m.types.String()+",", ","+name+",")
}

func (m steeringModel) addrs(v6 bool, src, dst []byte) uint32 {
	if !m.on("", v6) {
		return 0
	}
	return m.key.hashBits(append(append([]byte{}, src...), dst...))
}

func (m steeringModel) flow(v6 bool, name string, src, dst, srcPort, dstPort []byte) uint32 {
	if !m.on(name, v6) {
		return m.addrs(v6, src, dst)
	}
	input := append(append([]byte{}, src...), dst...)
	return m.key.hashBits(append(append(input, srcPort...), dstPort...))
}

// hashBits is the definition of the hash, bit by bit: for every set bit of the
// input, the 32 bits of the key that start there.
func (k Key) hashBits(b []byte) uint32 {
	var h uint32
	for i := range len(b) * 8 {
		if b[i/8]>>(7-i%8)&1 == 0 {
			continue
		}
		for j := range 32 {
			bit := uint32(k[(i+j)/8]>>(7-(i+j)%8)) & 1
			h ^= bit << (31 - j)
		}
	}
	return h
}
