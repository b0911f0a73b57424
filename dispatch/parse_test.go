package dispatch

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// The flow of the tests as its received frames show it: peer to us.
var (
	peer4, us4 = netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("198.51.100.1")
	peer6, us6 = netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("2001:db8:1::1")
	router4    = netip.MustParseAddr("203.0.113.9")
	router6    = netip.MustParseAddr("2001:db8:2::9")
)

const (
	peerPort = 40000
	ourPort  = 443
)

func ipLayer(src, dst netip.Addr, proto layers.IPProtocol) gopacket.SerializableLayer {
	if src.Is4() {
		return &layers.IPv4{Version: 4, TTL: 64, SrcIP: src.AsSlice(), DstIP: dst.AsSlice(), Protocol: proto}
	}
	return &layers.IPv6{Version: 6, HopLimit: 64, SrcIP: src.AsSlice(), DstIP: dst.AsSlice(), NextHeader: proto}
}

// serialize builds an Ethernet frame, or only the packet if told so by packet.
func serialize(tb testing.TB, ip gopacket.SerializableLayer, rest ...gopacket.SerializableLayer) []byte {
	tb.Helper()
	etherType := uint16(etherTypeIPv6)
	if _, ok := ip.(*layers.IPv4); ok {
		etherType = etherTypeIPv4
	}
	return ethernet(etherType, packet(tb, ip, rest...))
}

func packet(tb testing.TB, ip gopacket.SerializableLayer, rest ...gopacket.SerializableLayer) []byte {
	tb.Helper()
	for _, l := range rest {
		if l, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			if err := l.SetNetworkLayerForChecksum(ip.(gopacket.NetworkLayer)); err != nil {
				tb.Fatal(err)
			}
		}
	}
	buf := gopacket.NewSerializeBuffer()
	options := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, options, append([]gopacket.SerializableLayer{ip}, rest...)...); err != nil {
		tb.Fatal(err)
	}
	return slices.Clone(buf.Bytes())
}

func tcpLayer(src, dst uint16) *layers.TCP {
	return &layers.TCP{
		SrcPort: layers.TCPPort(src), DstPort: layers.TCPPort(dst), ACK: true,
		Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)}},
	}
}

func udpLayer(src, dst uint16) *layers.UDP {
	return &layers.UDP{SrcPort: layers.UDPPort(src), DstPort: layers.UDPPort(dst)}
}

func icmp4(kind uint8) gopacket.SerializableLayer {
	return &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(kind, 0)}
}

// icmp6 makes the whole eight-byte header by hand; gopacket's has four.
func icmp6(kind uint8) gopacket.Payload {
	return gopacket.Payload{kind, 0, 0, 0, 0, 0, 0, 0}
}

// extension makes an IPv6 extension header of eight bytes, or more for extra.
func extension(next uint8, extra int) []byte {
	b := make([]byte, 8+8*extra)
	b[0], b[1] = next, uint8(extra)
	return b
}

// fragmentHeader has the offset in units of eight bytes.
func fragmentHeader(next uint8, offset uint16, more bool) []byte {
	b := extension(next, 0)
	binary.BigEndian.PutUint16(b[2:], offset<<3)
	if more {
		b[3] |= 1
	}
	return b
}

// raw6 is a frame of an IPv6 packet with the given first header and payload.
func raw6(tb testing.TB, first uint8, payload ...[]byte) []byte {
	tb.Helper()
	return serialize(tb, ipLayer(peer6, us6, layers.IPProtocol(first)), gopacket.Payload(slices.Concat(payload...)))
}

func TestParse(t *testing.T) {
	k := randomKey(t)
	toeplitz := NewToeplitz(k)

	// What a frame may be hashed by, from the definition.
	input := func(src, dst netip.Addr, ports ...uint16) uint32 {
		b := append(src.AsSlice(), dst.AsSlice()...)
		for _, p := range ports {
			b = binary.BigEndian.AppendUint16(b, p)
		}
		return k.hashBits(b)
	}
	tuple4, addrs4 := input(peer4, us4, peerPort, ourPort), input(peer4, us4)
	tuple6, addrs6 := input(peer6, us6, peerPort, ourPort), input(peer6, us6)
	router4Addrs, router6Addrs := input(router4, us4), input(router6, us6)

	hello := gopacket.Payload("hello")
	tcp, udp := tcpLayer(peerPort, ourPort), udpLayer(peerPort, ourPort)
	tcpFrame4 := serialize(t, ipLayer(peer4, us4, layers.IPProtocolTCP), tcp, hello)
	tcpFrame6 := serialize(t, ipLayer(peer6, us6, layers.IPProtocolTCP), tcp, hello)
	udpFrame4 := serialize(t, ipLayer(peer4, us4, layers.IPProtocolUDP), udp, hello)
	udpFrame6 := serialize(t, ipLayer(peer6, us6, layers.IPProtocolUDP), udp, hello)
	tcpHeader6 := tcpFrame6[ethernetLen+ipv6Len:]

	// What we sent and what may be quoted: us to peer.
	sent4 := packet(t, ipLayer(us4, peer4, layers.IPProtocolTCP), tcpLayer(ourPort, peerPort), hello)
	sent6 := packet(t, ipLayer(us6, peer6, layers.IPProtocolUDP), udpLayer(ourPort, peerPort), hello)
	sentPing4 := packet(t, ipLayer(us4, peer4, layers.IPProtocolICMPv4), icmp4(8), hello)
	error4 := func(kind uint8, quote []byte) []byte {
		return serialize(t, ipLayer(router4, us4, layers.IPProtocolICMPv4), icmp4(kind), gopacket.Payload(quote))
	}
	error6 := func(kind uint8, quote []byte) []byte {
		return serialize(t, ipLayer(router6, us6, layers.IPProtocolICMPv6), icmp6(kind), gopacket.Payload(quote))
	}
	// edit returns a copy with bytes from offset at on replaced.
	edit := func(b []byte, at int, by ...byte) []byte {
		b = slices.Clone(b)
		copy(b[at:], by)
		return b
	}
	options4 := serialize(t, &layers.IPv4{
		Version: 4, SrcIP: peer4.AsSlice(), DstIP: us4.AsSlice(), Protocol: layers.IPProtocolUDP,
		Options: []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}},
	}, udp, hello)
	fragment4 := func(offset uint16, flags layers.IPv4Flag) []byte {
		return serialize(t, &layers.IPv4{
			Version: 4, SrcIP: peer4.AsSlice(), DstIP: us4.AsSlice(), Protocol: layers.IPProtocolUDP, FragOffset: offset, Flags: flags,
		}, gopacket.Payload("eight by"))
	}
	manyExtensions := func(n int) []byte {
		var b []byte
		for range n - 1 {
			b = append(b, extension(protoDestination, 0)...)
		}
		return append(append(b, extension(protoTCP, 0)...), tcpHeader6...)
	}
	quotedExtensions6 := packet(t, ipLayer(us6, peer6, protoHopByHop), gopacket.Payload(slices.Concat(
		extension(protoRouting, 1), extension(protoFragment, 0), fragmentHeader(protoUDP, 0, false), sent6[ipv6Len:])))
	quotedFragment6 := packet(t, ipLayer(us6, peer6, protoFragment), gopacket.Payload(slices.Concat(
		fragmentHeader(protoUDP, 0, true), sent6[ipv6Len:])))
	superFrame := serialize(t, ipLayer(peer4, us4, layers.IPProtocolTCP), tcp, gopacket.Payload(make([]byte, 65535-20-32)))
	superFrame6 := serialize(t, ipLayer(peer6, us6, layers.IPProtocolTCP), tcp, gopacket.Payload(make([]byte, 65535-32)))

	flow := func(proto uint8, hash uint32, l4, payload, length int) Parsed {
		return Parsed{Proto: proto, Hash: hash, L3: 14, L4: uint16(l4), Payload: uint16(payload), Length: length}
	}
	flow6 := func(proto uint8, hash uint32, l4, payload, length int) Parsed {
		p := flow(proto, hash, l4, payload, length)
		p.IPv6 = true
		return p
	}
	fragment := func(p Parsed) Parsed { p.Fragment = true; return p }
	neighbor := func(p Parsed) Parsed { p.Class = ClassNeighbor; return p }
	drop := func(c Class) Parsed { return Parsed{Class: c, Length: -1} } // -1: that of the frame

	for _, c := range []struct {
		name  string
		frame []byte
		want  Parsed
	}{
		{"TCP over IPv4", tcpFrame4, flow(6, tuple4, 34, 66, 71)},
		{"TCP over IPv6", tcpFrame6, flow6(6, tuple6, 54, 86, 91)},
		{"UDP over IPv4", udpFrame4, flow(17, tuple4, 34, 42, 47)},
		{"UDP over IPv6", udpFrame6, flow6(17, tuple6, 54, 62, 67)},
		{"padding is not payload", append(slices.Clone(udpFrame4), make([]byte, 13)...), flow(17, tuple4, 34, 42, 47)},
		{"IPv4 options", options4, flow(17, tuple4, 38, 46, 51)},
		{"don't fragment is not a fragment", edit(tcpFrame4, 20, 0x40), flow(6, tuple4, 34, 66, 71)},
		{"super-frame over IPv4", superFrame, flow(6, tuple4, 34, 66, 65549)},
		{"super-frame over IPv6", superFrame6, flow6(6, tuple6, 54, 86, 65589)},
		{"UDP shorter than the packet", edit(udpFrame4, 38, 0, 9), flow(17, tuple4, 34, 42, 47)},
		{"TCP without payload", serialize(t, ipLayer(peer4, us4, layers.IPProtocolTCP), tcp), flow(6, tuple4, 34, 66, 66)},

		{"ping", serialize(t, ipLayer(peer4, us4, layers.IPProtocolICMPv4), icmp4(8), hello), flow(1, addrs4, 34, 0, 47)},
		{"ping over IPv6", raw6(t, 58, icmp6(128), hello), flow6(58, addrs6, 54, 0, 67)},
		{"listener report", raw6(t, 58, icmp6(143)), flow6(58, addrs6, 54, 0, 62)},
		{"other protocol", serialize(t, ipLayer(peer4, us4, 47), hello), flow(47, addrs4, 34, 0, 39)},
		{"ICMPv6 over IPv4 is another protocol", serialize(t, ipLayer(peer4, us4, 58), gopacket.Payload{135}), flow(58, addrs4, 34, 0, 35)},
		{"ICMP over IPv6 is another protocol", raw6(t, 1, []byte{3}), flow6(1, addrs6, 54, 0, 55)},
		{"IPv6 without next header", raw6(t, 59), flow6(59, addrs6, 54, 0, 54)},

		{"first fragment", fragment4(0, layers.IPv4MoreFragments), fragment(flow(17, addrs4, 34, 0, 42))},
		{"middle fragment", fragment4(100, layers.IPv4MoreFragments), fragment(flow(17, addrs4, 0, 0, 42))},
		{"last fragment", fragment4(100, 0), fragment(flow(17, addrs4, 0, 0, 42))},
		{"first IPv6 fragment", raw6(t, 44, fragmentHeader(60, 0, true), extension(17, 0), udpFrame6[54:]), fragment(flow6(17, addrs6, 70, 0, 83))},
		{"first IPv6 fragment cut in its headers", raw6(t, 44, fragmentHeader(60, 0, true), extension(17, 1)[:8]), fragment(flow6(17, addrs6, 0, 0, 70))},
		{"last IPv6 fragment", raw6(t, 44, fragmentHeader(60, 9, false), extension(17, 0), udpFrame6[54:]), fragment(flow6(60, addrs6, 0, 0, 83))},
		{"first fragment with a second fragment header", raw6(t, 44, fragmentHeader(44, 0, true), fragmentHeader(17, 0, false), udpFrame6[54:]), fragment(flow6(17, addrs6, 70, 0, 83))},
		{"IPv6 fragment header on a whole packet", raw6(t, 44, fragmentHeader(6, 0, false), tcpHeader6), flow6(6, tuple6, 62, 94, 99)},
		{"reserved bits in a fragment header", edit(raw6(t, 44, fragmentHeader(6, 0, false), tcpHeader6), 57, 6), flow6(6, tuple6, 62, 94, 99)},

		{"IPv6 extension headers", raw6(t, 0, extension(60, 0), extension(43, 2), extension(6, 1), tcpHeader6), flow6(6, tuple6, 102, 134, 139)},
		{"most extension headers", raw6(t, 60, manyExtensions(MaxExtensionHeaders)), flow6(6, tuple6, 118, 150, 155)},
		{"too many extension headers", raw6(t, 60, manyExtensions(MaxExtensionHeaders+1)), drop(ClassMalformed)},
		{"extension header outside the packet", raw6(t, 0, extension(6, 4)[:32]), drop(ClassMalformed)},
		{"half an extension header", raw6(t, 0, extension(6, 0)[:4]), drop(ClassMalformed)},
		{"IPv6 jumbo payload", edit(raw6(t, 0, extension(6, 0), tcpHeader6), 18, 0, 0), drop(ClassMalformed)},

		{"ICMP error, TCP", error4(3, sent4), flow(1, tuple4, 34, 0, 99)},
		{"ICMP error, eight bytes of TCP", error4(11, sent4[:28]), flow(1, tuple4, 34, 0, 70)},
		{"ICMP error, no ports left", error4(11, sent4[:23]), flow(1, addrs4, 34, 0, 65)},
		{"ICMP error, quoted fragment", error4(11, edit(sent4, 6, 0x20)), flow(1, addrs4, 34, 0, 99)},
		{"ICMP error, quoted ping", error4(12, sentPing4), flow(1, addrs4, 34, 0, 75)},
		{"ICMP error, quote without addresses", error4(3, sent4[:19]), flow(1, router4Addrs, 34, 0, 61)},
		{"ICMP error, quoted IPv6", error4(3, sent6), flow(1, router4Addrs, 34, 0, 95)},
		{"ICMP error, quoted header too short", error4(3, edit(sent4, 0, 0x44)), flow(1, router4Addrs, 34, 0, 99)},
		{"ICMP timestamp is no error", error4(13, sent4), flow(1, router4Addrs, 34, 0, 99)},
		{"ICMPv6 error, UDP", error6(2, sent6), flow6(58, tuple6, 54, 0, 115)},
		{"ICMPv6 error of unknown type", error6(99, sent6), flow6(58, tuple6, 54, 0, 115)},
		{"ICMPv6 error, no ports left", error6(1, sent6[:43]), flow6(58, addrs6, 54, 0, 105)},
		{"ICMPv6 error, quoted extension headers", error6(3, quotedExtensions6), flow6(58, tuple6, 54, 0, 147)},
		{"ICMPv6 error, quoted fragment", error6(3, quotedFragment6), flow6(58, addrs6, 54, 0, 123)},
		{"ICMPv6 error, quote without addresses", error6(3, sent6[:39]), flow6(58, router6Addrs, 54, 0, 101)},
		{"ICMPv6 error, quoted IPv4", error6(3, sent4), flow6(58, router6Addrs, 54, 0, 119)},

		{"ARP", ethernet(etherTypeARP, make([]byte, 46)), neighbor(Parsed{L3: 14, Length: 60})},
		{"router solicitation", raw6(t, 58, icmp6(133)), neighbor(flow6(58, 0, 54, 0, 62))},
		{"neighbor advertisement", raw6(t, 58, icmp6(136), hello), neighbor(flow6(58, 0, 54, 0, 67))},
		{"redirect", raw6(t, 58, icmp6(137)), neighbor(flow6(58, 0, 54, 0, 62))},
		{"after neighbor discovery", raw6(t, 58, icmp6(138)), flow6(58, addrs6, 54, 0, 62)},

		{"empty", nil, drop(ClassTruncated)},
		{"half an Ethernet header", tcpFrame4[:13], drop(ClassTruncated)},
		{"half an ARP packet", ethernet(etherTypeARP, make([]byte, 27)), drop(ClassTruncated)},
		{"half an IPv4 header", tcpFrame4[:33], drop(ClassTruncated)},
		{"half an IPv6 header", tcpFrame6[:53], drop(ClassTruncated)},
		{"IPv4 packet one byte short", tcpFrame4[:70], drop(ClassTruncated)},
		{"IPv6 packet one byte short", tcpFrame6[:90], drop(ClassTruncated)},

		{"IPv6 in an IPv4 frame", edit(tcpFrame6, 12, 0x08, 0x00), drop(ClassMalformed)},
		{"IPv4 in an IPv6 frame", edit(tcpFrame4, 12, 0x86, 0xdd), drop(ClassMalformed)},
		{"IPv4 header of 16 bytes", edit(tcpFrame4, 14, 0x44), drop(ClassMalformed)},
		{"IPv4 header longer than the packet", edit(tcpFrame4, 14, 0x4f, 0, 0, 59), drop(ClassMalformed)},
		{"IPv4 total length 0", edit(tcpFrame4, 16, 0, 0), drop(ClassMalformed)},
		{"TCP data offset 4", edit(tcpFrame4, 46, 0x40), drop(ClassMalformed)},
		{"TCP header longer than the packet", edit(tcpFrame4, 46, 0xf0), drop(ClassMalformed)},
		{"TCP header one byte longer than the packet", edit(tcpFrame4, 16, 0, 51), drop(ClassMalformed)},
		{"half a TCP header", edit(tcpFrame4, 16, 0, 39), drop(ClassMalformed)},
		{"half a UDP header", edit(udpFrame4, 16, 0, 27), drop(ClassMalformed)},
		{"UDP length 7", edit(udpFrame4, 38, 0, 7), drop(ClassMalformed)},
		{"UDP longer than the packet", edit(udpFrame4, 38, 0, 14), drop(ClassMalformed)},
		{"half an ICMP header", serialize(t, ipLayer(peer4, us4, 1), gopacket.Payload(make([]byte, 7))), drop(ClassMalformed)},
		{"half an ICMPv6 header", raw6(t, 58, make([]byte, 7)), drop(ClassMalformed)},

		{"VLAN tag", ethernet(0x8100, make([]byte, 46)), drop(ClassVLAN)},
		{"provider tag", ethernet(0x88a8, make([]byte, 46)), drop(ClassVLAN)},
		{"old provider tag", ethernet(0x9100, make([]byte, 46)), drop(ClassVLAN)},
		{"LLDP", ethernet(0x88cc, make([]byte, 46)), drop(ClassUnknownEtherType)},
		{"802.3 length", ethernet(46, make([]byte, 46)), drop(ClassUnknownEtherType)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want.Length < 0 {
				c.want.Length = len(c.frame)
			}
			got := dirtyParsed()
			toeplitz.Parse(c.frame, &got)
			if got != c.want {
				t.Errorf("got  %+v\nwant %+v\nof %x", got, c.want, c.frame[:min(len(c.frame), 200)])
			}
		})
	}
}

// dirtyParsed is what Parse has to overwrite.
func dirtyParsed() Parsed {
	return Parsed{Class: 77, Proto: 77, IPv6: true, Fragment: true, Hash: 77, L3: 77, L4: 77, Payload: 77, Length: 77}
}

// What a flow's own frames and errors about it have in common is the reason for
// the rules: they reach one group.
func TestErrorsFollowTheirFlow(t *testing.T) {
	k := randomKey(t)
	toeplitz := NewToeplitz(k)
	want := toeplitz.HashTuple(Tuple{peer4, us4, peerPort, ourPort})
	sent := packet(t, ipLayer(us4, peer4, layers.IPProtocolTCP), tcpLayer(ourPort, peerPort))
	frame := serialize(t, ipLayer(router4, us4, layers.IPProtocolICMPv4), icmp4(3), gopacket.Payload(sent))
	var p Parsed
	toeplitz.Parse(frame, &p)
	if p.Hash != want {
		t.Errorf("error hashes to %08x, its flow to %08x", p.Hash, want)
	}
}

func TestClassString(t *testing.T) {
	seen := map[string]Class{}
	for c := range NumClasses {
		name := c.String()
		if other, ok := seen[name]; ok || strings.HasPrefix(name, "class ") {
			t.Errorf("class %d is named %q, class %d too", c, name, other)
		}
		seen[name] = c
	}
	if got := NumClasses.String(); got != "class 6" {
		t.Errorf("name of no class: %q, want \"class 6\"", got)
	}
}

func TestParseAllocs(t *testing.T) {
	toeplitz := NewToeplitz(VerificationKey)
	maker := newFrameMaker(3)
	frames := make([][]byte, 200)
	for i := range frames {
		frames[i] = maker.frame()
	}
	var p Parsed
	n := testing.AllocsPerRun(10, func() {
		for _, f := range frames {
			toeplitz.Parse(f, &p)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations per run, want 0", n)
	}
}

func FuzzParse(f *testing.F) {
	for _, v := range vectors {
		f.Add(v.frame(f, true))
		f.Add(v.frame(f, false))
	}
	maker := newFrameMaker(1)
	for range 300 {
		f.Add(maker.frame())
	}
	toeplitz := NewToeplitz(VerificationKey)
	f.Fuzz(func(t *testing.T, frame []byte) {
		p := dirtyParsed()
		toeplitz.Parse(frame, &p)
		if p.Class >= NumClasses {
			t.Fatalf("class %d", p.Class)
		}
		if p.Class != ClassFlow && p.Hash != 0 {
			t.Errorf("hash %08x on a frame of class %s", p.Hash, p.Class)
		}
		if p.Length > len(frame) || int(p.L4) > p.Length || int(p.Payload) > p.Length {
			t.Errorf("offsets outside of %d bytes: %+v", len(frame), p)
		}
		if p.Class > ClassNeighbor {
			if want := (Parsed{Class: p.Class, Length: len(frame)}); p != want {
				t.Errorf("dropped, but described as %+v", p)
			}
			return
		}
		if p.Payload != 0 && (p.Fragment || p.Payload < p.L4+udpLen) {
			t.Errorf("payload without a whole transport header: %+v", p)
		}
		if p.L3 != ethernetLen || p.L4 != 0 && p.L4 < p.L3+ipv4Len {
			t.Errorf("offsets inside other headers: %+v", p)
		}
		if p.Proto == 0 && !p.IPv6 && p.L4 == 0 && !p.Fragment {
			return // ARP has no length of its own
		}
		var padded, exact Parsed
		toeplitz.Parse(append(frame[:p.Length:p.Length], 0xff, 0xff, 0xff), &padded)
		toeplitz.Parse(frame[:p.Length], &exact)
		if padded != p || exact != p {
			t.Errorf("depends on bytes after the packet: %+v, padded %+v, without %+v", p, padded, exact)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	toeplitz := NewToeplitz(VerificationKey)
	for _, bench := range []struct {
		name     string
		src, dst netip.Addr
	}{{"tcp4", peer4, us4}, {"tcp6", peer6, us6}} {
		b.Run(bench.name, func(b *testing.B) {
			frame := serialize(b, ipLayer(bench.src, bench.dst, layers.IPProtocolTCP), tcpLayer(peerPort, ourPort), gopacket.Payload(make([]byte, 1400)))
			var p Parsed
			for b.Loop() {
				toeplitz.Parse(frame, &p)
			}
			if p.Payload == 0 {
				b.Fatalf("not parsed as TCP: %+v", p)
			}
		})
	}
}
