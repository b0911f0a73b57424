package dispatch

import (
	"encoding/binary"
	"math/rand/v2"
)

// frameMaker makes random frames from bytes, well-formed at first, then damaged
// now and then. It is independent of gopacket so that it can make what no
// library would.
type frameMaker struct {
	rng *rand.Rand
}

func newFrameMaker(seed uint64) *frameMaker {
	return &frameMaker{rng: rand.New(rand.NewPCG(seed, 1))}
}

func (m *frameMaker) chance(n int) bool { return m.rng.IntN(n) == 0 }

func (m *frameMaker) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(m.rng.Uint32())
	}
	return b
}

func (m *frameMaker) pick(values ...uint8) uint8 { return values[m.rng.IntN(len(values))] }

// frame returns any frame of at least one byte.
func (m *frameMaker) frame() []byte {
	var b []byte
	switch m.rng.IntN(20) {
	case 0:
		b = m.bytes(1 + m.rng.IntN(128))
	case 1:
		types := []uint16{etherTypeARP, etherTypeVLAN, etherTypeQinQ, etherTypeOldQinQ, 0x0026, 0x88cc}
		b = ethernet(types[m.rng.IntN(len(types))], m.bytes(m.rng.IntN(64)))
	case 2, 3, 4, 5, 6, 7, 8, 9:
		b = ethernet(etherTypeIPv4, m.ipv4(0))
	default:
		b = ethernet(etherTypeIPv6, m.ipv6(0))
	}
	if m.chance(4) {
		b = append(b, m.bytes(m.rng.IntN(30))...)
	}
	if m.chance(8) { // damage, mostly to headers
		for range 1 + m.rng.IntN(3) {
			b[m.rng.IntN(min(len(b), 90))] = byte(m.rng.Uint32())
		}
	}
	if m.chance(12) {
		b = b[:1+m.rng.IntN(len(b))]
	}
	return b
}

func ethernet(etherType uint16, payload []byte) []byte {
	b := append([]byte{0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2}, byte(etherType>>8), byte(etherType))
	return append(b, payload...)
}

// ipv4 returns a packet; quoted counts how deep it is inside ICMP errors.
func (m *frameMaker) ipv4(quoted int) []byte {
	options := 0
	if m.chance(3) {
		options = 4 * m.rng.IntN(11)
	}
	b := m.bytes(ipv4Len + options)
	b[0] = 0x40 | uint8(len(b)/4)
	b[9] = m.pick(protoTCP, protoUDP, protoICMP, protoICMP, protoICMPv6, 2, 50, byte(m.rng.Uint32()))
	fragment := uint16(m.pick(0, 0x40)) << 8 // Don't Fragment is not a fragment
	if m.chance(5) {
		fragment = uint16(m.rng.Uint32())
	}
	binary.BigEndian.PutUint16(b[6:], fragment)
	b = append(b, m.short(m.transport(b[9], false, quoted))...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

func (m *frameMaker) ipv6(quoted int) []byte {
	b := m.bytes(ipv6Len)
	b[0] = 0x60 | b[0]&0xf
	proto := m.pick(protoTCP, protoUDP, protoICMPv6, protoICMPv6, protoICMP, 59, 51, byte(m.rng.Uint32()))
	next := 6 // where to write the type of the header that follows
	if m.chance(2) {
		for range m.rng.IntN(MaxExtensionHeaders + 2) {
			kind := m.pick(protoHopByHop, protoRouting, protoDestination, protoFragment)
			b[next] = kind
			next = len(b)
			header := m.bytes(8)
			if kind == protoFragment {
				binary.BigEndian.PutUint16(header[2:], 0x0006*uint16(m.rng.IntN(2))) // reserved bits
				if m.chance(4) {
					binary.BigEndian.PutUint16(header[2:], uint16(m.rng.Uint32()))
				}
			} else {
				header[1] = uint8(m.rng.IntN(3))
				header = append(header, m.bytes(8*int(header[1]))...)
			}
			b = append(b, header...)
		}
	}
	b[next] = proto
	b = append(b, m.short(m.transport(proto, true, quoted))...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6Len))
	return b
}

func (m *frameMaker) transport(proto uint8, ipv6 bool, quoted int) []byte {
	switch {
	case proto == protoTCP:
		options := 4 * m.rng.IntN(11)
		b := m.bytes(tcpLen + options)
		b[12] = uint8(len(b)/4)<<4 | b[12]&0xf
		return append(b, m.bytes(m.rng.IntN(40))...)
	case proto == protoUDP:
		b := m.bytes(udpLen + m.rng.IntN(40))
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
		return b
	case proto == protoICMP && !ipv6 && quoted < 2:
		b := m.bytes(icmpLen)
		b[0] = m.pick(0, 3, 3, 4, 5, 8, 11, 12, 13, b[0])
		return append(b, m.cut(m.ipv4(quoted+1))...)
	case proto == protoICMPv6 && ipv6 && quoted < 2:
		b := m.bytes(icmpLen)
		b[0] = m.pick(0, 1, 2, 3, 4, 127, 128, 129, 132, 133, 135, 137, 138, 143, b[0])
		return append(b, m.cut(m.ipv6(quoted+1))...)
	}
	return m.bytes(m.rng.IntN(40))
}

// short makes some payloads of packets too short for their protocol; the IP
// length will agree.
func (m *frameMaker) short(b []byte) []byte {
	if m.chance(10) {
		return b[:m.rng.IntN(min(len(b), 24)+1)]
	}
	return b
}

// cut ends a quote early, as routers do, or spoils its first byte.
func (m *frameMaker) cut(b []byte) []byte {
	if m.chance(8) {
		b[0] = byte(m.rng.Uint32())
	}
	if m.chance(2) {
		return b
	}
	return b[:m.rng.IntN(len(b)+1)]
}
