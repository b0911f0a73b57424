package dispatch

import (
	"encoding/binary"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// frameMaker makes random frames from bytes, well-formed at first, then damaged
// now and then. It is independent of gopacket so that it can make what no
// library would.
type frameMaker struct {
	rng  *rand.Rand
	long bool // the frame has a long extension header
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
	m.long = false
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
	if m.chance(8) && len(b) >= 6 { // to a multicast group, everybody, anybody
		copy(b, [][]byte{{0x01, 0, 0x5e, 0, 0, 1}, {0x33, 0x33, 0, 0, 0, 1}, {255, 255, 255, 255, 255, 255}, m.bytes(6)}[m.rng.IntN(4)])
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
	b[9] = m.pick(protoTCP, protoUDP, protoICMP, protoICMP, protoICMPv6, protoIGMP, 50, byte(m.rng.Uint32()))
	if quoted > 0 && m.chance(2) {
		b[9] = m.pick(protoTCP, protoUDP)
	}
	if m.chance(8) {
		copy(b[16:], []byte{224, 0, 0})
	}
	fragment := uint16(m.pick(0, 0x40)) << 8 // Don't Fragment is not a fragment
	switch m.rng.IntN(10) {
	case 0:
		fragment = uint16(m.rng.Uint32())
	case 1:
		fragment = ipv4FragmentBits &^ ipv4FragmentOffset // the first one
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
	if quoted > 0 && m.chance(2) {
		proto = m.pick(protoTCP, protoUDP)
	}
	next := 6 // where to write the type of the header that follows
	if m.chance(8) {
		copy(b[24:], []byte{0xff, 0x02})
	}
	if m.chance(2) {
		headers := m.rng.IntN(4)
		if m.chance(4) {
			headers = m.rng.IntN(MaxExtensionHeaders + 2)
		}
		for range headers {
			kind := m.pick(protoHopByHop, protoRouting, protoDestination, protoFragment, protoAuth)
			b[next] = kind
			next = len(b)
			b = append(b, m.extension(kind)...)
		}
	}
	b[next] = proto
	b = append(b, m.short(m.transport(proto, true, quoted))...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6Len))
	return b
}

func (m *frameMaker) extension(kind uint8) []byte {
	b := m.bytes(extensionLen)
	unit := 8
	switch kind {
	case protoAuth:
		unit = 4
	case protoFragment:
		field := 0x0006 * uint16(m.rng.IntN(2)) // reserved bits: still the only fragment
		switch m.rng.IntN(6) {
		case 0:
			field = uint16(m.rng.Uint32())
		case 1:
			field |= 1 // the first one
		}
		binary.BigEndian.PutUint16(b[2:], field)
		return b // its length field is reserved
	}
	b[1] = uint8(m.rng.IntN(3))
	if !m.long && m.chance(12) {
		m.long = true // one is enough, the kernel's test runs take a page
		b[1] = uint8(MaxExtensionBytes/8 - 10 + m.rng.IntN(12))
	}
	return append(b, m.bytes(unit*int(b[1]))...)
}

func (m *frameMaker) transport(proto uint8, ipv6 bool, quoted int) []byte {
	switch {
	case quoted > 0 && m.chance(6):
		return m.bytes(m.rng.IntN(portsLen)) // cut ahead of the ports
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
		b[0] = m.pick(0, 3, 3, 4, 5, 8, 11, 11, 12, 13, b[0])
		return append(b, m.cut(m.ipv4(quoted+1))...)
	case proto == protoICMPv6 && ipv6 && quoted < 2:
		b := m.bytes(icmpLen)
		b[0] = m.pick(0, 1, 2, 3, 4, 1, 2, 3, 4, 127, 128, 129, 130, 131, 132, 133, 135, 137, 138, 142, 143, 144, b[0])
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

// soakFrames is how many random frames a test takes.
func soakFrames() int {
	switch {
	case os.Getenv("NUMASTACK_SOAK") != "":
		return 1_000_000
	case testing.Short():
		return 6_000
	}
	return 60_000
}

// forAllTypes calls f for every set of hash types, each with a key of its own
// and a share of the random frames.
func forAllTypes(t *testing.T, f func(k Key, types HashTypes, frames iter.Seq[[]byte])) {
	t.Helper()
	maker := newFrameMaker(rand.Uint64())
	for types := range HashAll + 1 {
		f(randomKey(t), types, func(yield func([]byte) bool) {
			for range soakFrames() / int(HashAll+1) {
				if !yield(maker.frame()) {
					return
				}
			}
		})
	}
}

// cutFrames returns frames with everything that steering follows, cut short at
// every byte: the frame alone, and the packet with its length. All have at least
// one byte.
func cutFrames(tb testing.TB) (frames [][]byte) {
	tb.Helper()
	sent4 := packet(tb, ipLayer(us4, peer4, layers.IPProtocolTCP), tcpLayer(ourPort, peerPort))
	sent6 := packet(tb, ipLayer(us6, peer6, layers.IPProtocolUDP), udpLayer(ourPort, peerPort), gopacket.Payload("hello"))
	chain := func(last uint8) []byte {
		return slices.Concat(extension(protoDestination, 1), extension(protoFragment, 0), fragmentHeader(protoRouting, 0, false),
			extension(protoAuth, 0), authentication(last, 3))
	}
	quoted6 := packet(tb, ipLayer(us6, peer6, protoHopByHop), gopacket.Payload(slices.Concat(chain(protoUDP), sent6[ipv6Len:])))
	for _, whole := range [][]byte{
		serialize(tb, ipLayer(peer4, us4, layers.IPProtocolTCP), tcpLayer(peerPort, ourPort), gopacket.Payload("hello")),
		serialize(tb, ipLayer(peer4, us4, layers.IPProtocolUDP), udpLayer(peerPort, ourPort), gopacket.Payload("hello")),
		serialize(tb, ipLayer(router4, us4, layers.IPProtocolICMPv4), icmp4(3), gopacket.Payload(sent4)),
		raw6(tb, protoHopByHop, chain(protoTCP), sent4[ipv4Len:]),
		raw6(tb, protoHopByHop, chain(protoFragment), fragmentHeader(protoDestination, 0, true), extension(protoUDP, 0), sent6[ipv6Len:]),
		raw6(tb, protoHopByHop, chain(protoICMPv6), icmp6(1), quoted6),
		raw6(tb, protoHopByHop, chain(protoICMPv6), icmp6(135), make([]byte, 16)),
		ethernet(etherTypeARP, make([]byte, arpLen)),
	} {
		for n := 1; n <= len(whole); n++ {
			frames = append(frames, whole[:n])
			cut := slices.Clone(whole[:n])
			switch {
			case n >= ethernetLen+ipv6Len && cut[12] == etherTypeIPv6>>8:
				binary.BigEndian.PutUint16(cut[ethernetLen+4:], uint16(n-ethernetLen-ipv6Len))
			case n >= ethernetLen+ipv4Len && cut[13] == etherTypeIPv4&0xff:
				binary.BigEndian.PutUint16(cut[ethernetLen+2:], uint16(n-ethernetLen))
			default:
				continue
			}
			frames = append(frames, cut)
		}
	}
	return frames
}
