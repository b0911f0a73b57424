package dispatch

import (
	"encoding/binary"
	"iter"
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

// authentication makes an authentication header, whose length counts in four
// bytes (RFC 4302 section 2.2).
func authentication(next uint8, extra int) []byte {
	b := make([]byte, 8+4*extra)
	b[0], b[1] = next, uint8(extra)
	return b
}

const fragmentID = 0x600dcafe

// fragmentHeader has the offset in units of eight bytes.
func fragmentHeader(next uint8, offset uint16, more bool) []byte {
	b := extension(next, 0)
	binary.BigEndian.PutUint16(b[2:], offset<<3)
	binary.BigEndian.PutUint32(b[4:], fragmentID)
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
			Version: 4, SrcIP: peer4.AsSlice(), DstIP: us4.AsSlice(), Protocol: layers.IPProtocolUDP,
			Id: fragmentID & 0xffff, FragOffset: offset, Flags: flags,
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
	quotedFragment6 := func(offset uint16) []byte {
		return packet(t, ipLayer(us6, peer6, protoFragment), gopacket.Payload(slices.Concat(
			fragmentHeader(protoUDP, offset, true), sent6[ipv6Len:])))
	}
	igmp := serialize(t, &layers.IPv4{
		Version: 4, SrcIP: peer4.AsSlice(), DstIP: []byte{224, 0, 0, 1}, Protocol: layers.IPProtocolIGMP,
		Options: []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}},
	}, gopacket.Payload{0x11, 0, 0, 0, 0, 0, 0, 0})
	// longExtensions are so many bytes of extension headers.
	longExtensions := func(n int) []byte {
		return slices.Concat(extension(protoRouting, 99), extension(protoTCP, n/8-101), tcpHeader6)
	}
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
	fragment := func(p Parsed, offset uint16) Parsed {
		p.Fragment, p.FragmentID, p.FragmentOffset = true, fragmentID, offset*8
		if !p.IPv6 {
			p.FragmentID &= 0xffff
		}
		return p
	}
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
		{"other protocol", serialize(t, ipLayer(peer4, us4, 47), hello), flow(47, addrs4, 34, 0, 39)},
		{"ICMPv6 over IPv4 is another protocol", serialize(t, ipLayer(peer4, us4, 58), gopacket.Payload{135}), flow(58, addrs4, 34, 0, 35)},
		{"ICMP over IPv6 is another protocol", raw6(t, 1, []byte{3}), flow6(1, addrs6, 54, 0, 55)},
		{"IPv6 without next header", raw6(t, 59), flow6(59, addrs6, 54, 0, 54)},

		{"first fragment", fragment4(0, layers.IPv4MoreFragments), fragment(flow(17, addrs4, 34, 0, 42), 0)},
		{"middle fragment", fragment4(100, layers.IPv4MoreFragments), fragment(flow(17, addrs4, 0, 0, 42), 100)},
		{"last fragment", fragment4(8191, 0), fragment(flow(17, addrs4, 0, 0, 42), 8191)},
		{"first IPv6 fragment", raw6(t, 44, fragmentHeader(60, 0, true), extension(17, 0), udpFrame6[54:]), fragment(flow6(17, addrs6, 70, 0, 83), 0)},
		{"first IPv6 fragment cut in its headers", raw6(t, 44, fragmentHeader(60, 0, true), extension(17, 1)[:8]), fragment(flow6(17, addrs6, 0, 0, 70), 0)},
		{"first IPv6 fragment without the next header", raw6(t, 44, fragmentHeader(60, 0, true)), fragment(flow6(60, addrs6, 0, 0, 62), 0)},
		{"last IPv6 fragment", raw6(t, 44, fragmentHeader(60, 8191, false), extension(17, 0), udpFrame6[54:]), fragment(flow6(60, addrs6, 0, 0, 83), 8191)},
		{"first fragment with a second fragment header", raw6(t, 44, fragmentHeader(44, 0, true), edit(fragmentHeader(17, 0, true), 4, 1), udpFrame6[54:]), fragment(flow6(17, addrs6, 70, 0, 83), 0)},
		{"fragment behind a whole fragment", raw6(t, 44, edit(fragmentHeader(44, 0, false), 4, 1), fragmentHeader(17, 3, false), udpFrame6[54:]), fragment(flow6(17, addrs6, 0, 0, 83), 3)},
		{"IPv6 fragment header on a whole packet", raw6(t, 44, fragmentHeader(6, 0, false), tcpHeader6), flow6(6, tuple6, 62, 94, 99)},
		{"reserved bits in a fragment header", edit(raw6(t, 44, fragmentHeader(6, 0, false), tcpHeader6), 57, 6), flow6(6, tuple6, 62, 94, 99)},

		{"IPv6 extension headers", raw6(t, 0, extension(60, 0), extension(43, 2), extension(6, 1), tcpHeader6), flow6(6, tuple6, 102, 134, 139)},
		{"most extension headers", raw6(t, 60, manyExtensions(MaxExtensionHeaders)), flow6(6, tuple6, 118, 150, 155)},
		{"authentication header", raw6(t, 51, authentication(60, 4), extension(6, 0), tcpHeader6), flow6(6, tuple6, 86, 118, 123)},
		{"authentication header outside the packet", raw6(t, 51, authentication(6, 4)[:23]), drop(ClassMalformed)},
		{"encapsulating security is another protocol", raw6(t, 50, extension(6, 0), tcpHeader6), flow6(50, addrs6, 54, 0, 99)},
		{"longest extension headers", raw6(t, 43, longExtensions(MaxExtensionBytes)), flow6(6, tuple6, 1294, 1326, 1331)},
		{"too long extension headers", raw6(t, 43, longExtensions(MaxExtensionBytes+8)), drop(ClassMalformed)},
		{"too many extension headers", raw6(t, 60, manyExtensions(MaxExtensionHeaders+1)), drop(ClassMalformed)},
		{"extension header outside the packet", raw6(t, 0, extension(6, 4)[:32]), drop(ClassMalformed)},
		{"half an extension header", raw6(t, 0, extension(6, 0)[:4]), drop(ClassMalformed)},
		{"IPv6 jumbo payload", edit(raw6(t, 0, extension(6, 0), tcpHeader6), 18, 0, 0), drop(ClassMalformed)},

		{"ICMP error, TCP", error4(3, sent4), flow(1, tuple4, 34, 0, 99)},
		{"ICMP error, eight bytes of TCP", error4(11, sent4[:28]), flow(1, tuple4, 34, 0, 70)},
		{"ICMP error, no ports left", error4(11, sent4[:23]), flow(1, router4Addrs, 34, 0, 65)},
		{"ICMP error, quoted first fragment", error4(11, edit(sent4, 6, 0x20)), flow(1, tuple4, 34, 0, 99)},
		{"ICMP error, quoted other fragment", error4(11, edit(sent4, 6, 0x20, 1)), flow(1, router4Addrs, 34, 0, 99)},
		{"ICMP error, quoted options", error4(3, options4[14:]), flow(1, input(us4, peer4, ourPort, peerPort), 34, 0, 79)},
		{"ICMP error, quoted ping", error4(12, sentPing4), flow(1, addrs4, 34, 0, 75)},
		{"ICMP error, quote without addresses", error4(3, sent4[:19]), flow(1, router4Addrs, 34, 0, 61)},
		{"ICMP error, quoted IPv6", error4(3, sent6), flow(1, router4Addrs, 34, 0, 95)},
		{"ICMP error, quoted header too short", error4(3, edit(sent4, 0, 0x44)), flow(1, router4Addrs, 34, 0, 99)},
		{"ICMP timestamp is no error", error4(13, sent4), flow(1, router4Addrs, 34, 0, 99)},
		{"ICMPv6 error, UDP", error6(2, sent6), flow6(58, tuple6, 54, 0, 115)},
		{"ICMPv6 error of unknown type", error6(99, sent6), flow6(58, tuple6, 54, 0, 115)},
		{"ICMPv6 error, no ports left", error6(1, sent6[:43]), flow6(58, router6Addrs, 54, 0, 105)},
		{"ICMPv6 error, quoted extension headers", error6(3, quotedExtensions6), flow6(58, tuple6, 54, 0, 147)},
		{"ICMPv6 error, quoted extension header cut", error6(3, quotedExtensions6[:60]), flow6(58, router6Addrs, 54, 0, 122)},
		{"ICMPv6 error, quoted first fragment", error6(3, quotedFragment6(0)), flow6(58, tuple6, 54, 0, 123)},
		{"ICMPv6 error, quoted other fragment", error6(3, quotedFragment6(1)), flow6(58, router6Addrs, 54, 0, 123)},
		{"ICMPv6 error, quoted ping", error6(3, packet(t, ipLayer(us6, peer6, 58), icmp6(128))), flow6(58, addrs6, 54, 0, 110)},
		{"ICMPv6 error, quote without addresses", error6(3, sent6[:39]), flow6(58, router6Addrs, 54, 0, 101)},
		{"ICMPv6 error, quoted IPv4", error6(3, sent4), flow6(58, router6Addrs, 54, 0, 119)},

		{"ARP", ethernet(etherTypeARP, make([]byte, 46)), neighbor(Parsed{L3: 14, Length: 60})},
		{"IGMP query", igmp, neighbor(flow(2, 0, 38, 0, 46))},
		{"IGMP over IPv6 is another protocol", raw6(t, 2, make([]byte, 8)), flow6(2, addrs6, 54, 0, 62)},
		{"half an IGMP message", edit(igmp, 16, 0, 31), drop(ClassMalformed)},
		{"listener query", raw6(t, 0, []byte{58, 0, 5, 2, 0, 0, 1, 0}, icmp6(130)), neighbor(flow6(58, 0, 62, 0, 70))},
		{"listener report", raw6(t, 58, icmp6(131)), neighbor(flow6(58, 0, 54, 0, 62))},
		{"listener done", raw6(t, 58, icmp6(132)), neighbor(flow6(58, 0, 54, 0, 62))},
		{"listener report, version 2", raw6(t, 58, icmp6(143)), neighbor(flow6(58, 0, 54, 0, 62))},
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
	return Parsed{
		Class: 77, Proto: 77, IPv6: true, Fragment: true, Steered: true, Hash: 77,
		L3: 77, L4: 77, Payload: 77, FragmentOffset: 77, FragmentID: 77, Length: 77,
	}
}

func TestParseMatchesModel(t *testing.T) {
	rules := map[string]int{}
	check := func(m steeringModel, toeplitz *Toeplitz, frame []byte) {
		t.Helper()
		got := dirtyParsed()
		toeplitz.Parse(frame, &got)
		want, rule := m.parse(frame)
		if got != want {
			t.Fatalf("got  %+v\nwant %+v\nby rule %q, types %s, key %x, of\n%x", got, want, rule, m.types, m.key, frame)
		}
		rules[rule]++
	}
	cuts := cutFrames(t)
	forAllTypes(t, func(k Key, types HashTypes, frames iter.Seq[[]byte]) {
		m, toeplitz := steeringModel{k, types}, NewToeplitzTypes(k, types)
		for frame := range frames {
			check(m, toeplitz, frame)
		}
		if types == HashAll || types == 0 {
			for _, frame := range cuts {
				check(m, toeplitz, frame)
			}
		}
	})
	checkRules(t, rules)
}

// checkRules fails if a rule decided too few frames for a comparison to say
// something about it.
func checkRules(t *testing.T, rules map[string]int) {
	t.Helper()
	for _, rule := range []string{
		"dropped", "ARP", "TCP", "UDP", "other protocol", "control message", "control message for all",
		"first fragment", "first fragment, headers cut", "other fragment",
		"error, by quoted flow", "error, by quoted addresses", "error, quote is no packet",
		"error, quote without transport header", "error, quote without ports",
	} {
		t.Logf("%-38s %d", rule, rules[rule])
		if rules[rule] < soakFrames()/3000 {
			t.Errorf("rule %q decided %d of %d frames", rule, rules[rule], soakFrames())
		}
	}
}

// Without its type, a flow hashes by its addresses, and so do the errors about
// it; without the type of IP as well, to 0.
func TestParseHashTypes(t *testing.T) {
	k := randomKey(t)
	all := NewToeplitz(k)
	tcp4, addrs4 := all.HashTuple(Tuple{peer4, us4, peerPort, ourPort, protoTCP}), all.HashAddrs(peer4, us4)
	udp6, addrs6 := all.HashTuple(Tuple{peer6, us6, peerPort, ourPort, protoUDP}), all.HashAddrs(peer6, us6)
	frames := map[string][]byte{
		"tcp4": serialize(t, ipLayer(peer4, us4, layers.IPProtocolTCP), tcpLayer(peerPort, ourPort)),
		"err4": serialize(t, ipLayer(router4, us4, layers.IPProtocolICMPv4), icmp4(3), gopacket.Payload(
			packet(t, ipLayer(us4, peer4, layers.IPProtocolTCP), tcpLayer(ourPort, peerPort)))),
		"ping4": serialize(t, ipLayer(peer4, us4, layers.IPProtocolICMPv4), icmp4(8)),
		"udp6":  serialize(t, ipLayer(peer6, us6, layers.IPProtocolUDP), udpLayer(peerPort, ourPort)),
		"err6": raw6(t, 58, icmp6(1),
			packet(t, ipLayer(us6, peer6, layers.IPProtocolUDP), udpLayer(ourPort, peerPort))),
		"ping6": raw6(t, 58, icmp6(128)),
	}
	for _, c := range []struct {
		types                  HashTypes
		flow4, ip4, flow6, ip6 uint32
	}{
		{HashAll, tcp4, addrs4, udp6, addrs6},
		{HashAll &^ HashTCPIPv4, addrs4, addrs4, udp6, addrs6},
		{HashAll &^ HashUDPIPv6, tcp4, addrs4, addrs6, addrs6},
		{HashAll &^ (HashIPv4 | HashIPv6), tcp4, 0, udp6, 0},
		{HashUDPIPv4 | HashIPv4 | HashTCPIPv6, addrs4, addrs4, 0, 0},
		{0, 0, 0, 0, 0},
	} {
		toeplitz := NewToeplitzTypes(k, c.types)
		if toeplitz.Types() != c.types {
			t.Errorf("types %s, want %s", toeplitz.Types(), c.types)
		}
		for name, want := range map[string]uint32{
			"tcp4": c.flow4, "err4": c.flow4, "ping4": c.ip4, "udp6": c.flow6, "err6": c.flow6, "ping6": c.ip6,
		} {
			var p Parsed
			toeplitz.Parse(frames[name], &p)
			if p.Hash != want || p.Class != ClassFlow {
				t.Errorf("%s: %s hashes to %08x, class %s, want %08x, class flow", c.types, name, p.Hash, p.Class, want)
			}
		}
		if got := toeplitz.HashTuple(Tuple{peer4, us4, peerPort, ourPort, 0}); got != c.flow4 {
			t.Errorf("%s: TCP tuple hashes to %08x, want %08x", c.types, got, c.flow4)
		}
		if got := toeplitz.HashTuple(Tuple{peer6, us6, peerPort, ourPort, protoUDP}); got != c.flow6 {
			t.Errorf("%s: UDP tuple hashes to %08x, want %08x", c.types, got, c.flow6)
		}
		if got := toeplitz.HashAddrs(peer6, us6); got != c.ip6 {
			t.Errorf("%s: addresses hash to %08x, want %08x", c.types, got, c.ip6)
		}
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
		f.Add(uint8(HashAll), v.frame(f, true))
		f.Add(uint8(HashAll), v.frame(f, false))
	}
	maker := newFrameMaker(1)
	for i := range 300 {
		f.Add(uint8(i), maker.frame())
	}
	toeplitz := NewToeplitz(VerificationKey)
	f.Fuzz(func(t *testing.T, types uint8, frame []byte) {
		m := steeringModel{VerificationKey, HashTypes(types) & HashAll}
		typed := *toeplitz
		typed.types = m.types
		p := dirtyParsed()
		typed.Parse(frame, &p)
		if want, rule := m.parse(frame); p != want {
			t.Errorf("got  %+v\nwant %+v\nby rule %q", p, want, rule)
		}
		if p.Class > ClassNeighbor || p.Proto == 0 && !p.IPv6 && !p.Fragment && p.L4 == 0 {
			return // dropped, or ARP: there is no length but the frame's
		}
		var padded, exact Parsed
		typed.Parse(append(frame[:p.Length:p.Length], 0xff, 0xff, 0xff), &padded)
		typed.Parse(frame[:p.Length], &exact)
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
			b.ReportAllocs()
			for b.Loop() {
				toeplitz.Parse(frame, &p)
			}
			if p.Payload == 0 {
				b.Fatalf("not parsed as TCP: %+v", p)
			}
		})
	}
}
