package shard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"numastack/dispatch"
)

// arrived is a datagram as a handler gets it.
type arrived struct {
	payload string
	from    netip.AddrPort
}

// listenEverywhere opens a port in each flow group at each of the shard's
// addresses, and has what arrives there added to got.
func listenEverywhere(t testing.TB, s *Shard, port uint16, got *[]arrived) {
	t.Helper()
	for _, g := range s.groups {
		for _, p := range s.set.cfg.Addrs {
			_, err := g.listenUDP(netip.AddrPortFrom(p.Addr(), port), func(_ *Socket, b []byte, from netip.AddrPort) {
				*got = append(*got, arrived{string(b), from})
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// portAt opens a port of one flow group that hears nothing.
func portAt(t testing.TB, g *Group, local netip.AddrPort) *Socket {
	t.Helper()
	s, err := g.listenUDP(local, func(*Socket, []byte, netip.AddrPort) {})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// datagramOf makes a frame of a datagram for the shard.
func datagramOf(s *Shard, from, to netip.AddrPort, payload []byte) []byte {
	n := networkHeaderLen(to.Addr())
	frame := make([]byte, ethernetLen+n+header.UDPMinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: "\x02\x00\x00\x00\x00\x09", DstAddr: s.groups[0].link.mac, Type: networkProtocol(to.Addr())})
	ip := frame[ethernetLen:]
	udp := header.UDP(ip[n:])
	if to.Addr().Is4() {
		header.IPv4(ip).Encode(&header.IPv4Fields{TotalLength: uint16(len(ip)), TTL: 64, Protocol: protoUDP, SrcAddr: tcpipAddress(from.Addr()), DstAddr: tcpipAddress(to.Addr())})
		header.IPv4(ip).SetChecksum(^header.IPv4(ip).CalculateChecksum())
	} else {
		header.IPv6(ip).Encode(&header.IPv6Fields{PayloadLength: uint16(len(udp)), TransportProtocol: header.UDPProtocolNumber, HopLimit: 64, SrcAddr: tcpipAddress(from.Addr()), DstAddr: tcpipAddress(to.Addr())})
	}
	udp.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(udp))})
	copy(udp[header.UDPMinimumSize:], payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, tcpipAddress(from.Addr()), tcpipAddress(to.Addr()), uint16(len(udp)))
	udp.SetChecksum(^checksum.Checksum(udp, sum))
	return frame
}

// bothWays delivers a frame the short way, if it takes that, and the long way, and
// returns what arrived on either.
func bothWays(t testing.TB, s *Shard, vnet dispatch.VnetHeader, frame []byte, got *[]arrived) (short, long []arrived, isShort bool) {
	t.Helper()
	h := &handover{vnet: vnet, frame: frame}
	s.set.toeplitz.Parse(frame, &h.parsed)
	if h.parsed.Class != dispatch.ClassFlow || h.parsed.Fragment {
		return nil, nil, false
	}
	g := s.set.groups[s.set.reta.GroupOf(h.parsed.Hash)]
	u, _ := g.socketOf(&h.vnet, &h.parsed, frame)
	*got = nil
	s.deliver(g, h)
	settle(t, s)
	short = *got
	ports := g.ports
	g.ports = nil
	*got = nil
	s.deliver(g, h)
	settle(t, s)
	g.ports = ports
	return short, *got, u != nil
}

// TestDatagramTakesShortWay: what is as usual does, all else goes through gVisor, and
// either way the same arrives.
func TestDatagramTakesShortWay(t *testing.T) {
	_, b := steppedPair(t)
	var got []arrived
	listenEverywhere(t, b, 9, &got)
	from4, to4 := netip.AddrPortFrom(addrA, 1234), netip.AddrPortFrom(addrB, 9)
	from6, to6 := netip.AddrPortFrom(addr6[0], 1234), netip.AddrPortFrom(addr6[1], 9)
	plain4 := func() []byte { return datagramOf(b, from4, to4, []byte("hello")) }
	plain6 := func() []byte { return datagramOf(b, from6, to6, []byte("hello")) }
	udp4 := func(f []byte) header.UDP { return f[ethernetLen+header.IPv4MinimumSize:] }
	udp6 := func(f []byte) header.UDP { return f[ethernetLen+header.IPv6MinimumSize:] }
	source4 := func(a string) []byte {
		return datagramOf(b, netip.AddrPortFrom(netip.MustParseAddr(a), 1234), to4, []byte("hello"))
	}
	source6 := func(a string) []byte {
		return datagramOf(b, netip.AddrPortFrom(netip.MustParseAddr(a), 1234), to6, []byte("hello"))
	}
	for _, test := range []struct {
		name    string
		flags   uint8
		frame   func() []byte
		short   bool
		arrives bool
	}{
		{"IPv4", 0, plain4, true, true},
		{"IPv6", 0, plain6, true, true},
		{"IPv4 from beyond the link", 0, func() []byte { return source4("192.0.2.1") }, true, true},
		{"IPv6 from an IPv4 address", 0, func() []byte { return source6("::ffff:192.0.2.1") }, false, false},
		{"IPv6 link-local", 0, func() []byte { return source6("fe80::9") }, true, true},
		{"empty", 0, func() []byte { return datagramOf(b, from4, to4, nil) }, true, true},
		{"padding behind the packet", 0, func() []byte { return append(plain4(), 0, 0, 0) }, true, true},
		{"no checksum", 0, func() []byte { f := plain4(); udp4(f).SetChecksum(0); return f }, true, true},
		{"vouched for", dispatch.VnetDataValid, func() []byte { f := plain6(); udp6(f).SetChecksum(1); return f }, true, true},
		{"IPv4 wrong checksum", 0, func() []byte { f := plain4(); f[len(f)-1]++; return f }, false, false},
		{"IPv6 wrong checksum", 0, func() []byte { f := plain6(); f[len(f)-1]++; return f }, false, false},
		{"IPv6 no checksum", 0, func() []byte { f := plain6(); udp6(f).SetChecksum(0); return f }, false, false},
		{"wrong checksum of the IP header", 0, func() []byte { f := plain4(); f[ethernetLen+8]--; return f }, false, false},
		{"another port", 0, func() []byte { return datagramOf(b, from4, netip.AddrPortFrom(addrB, 10), nil) }, false, false},
		{"another host", 0, func() []byte { return datagramOf(b, from4, netip.MustParseAddrPort("10.1.0.3:9"), nil) }, false, false},
		{"from our own address", 0, func() []byte { return source4(addrB.String()) }, false, false},
		{"from the broadcast address of the subnet", 0, func() []byte { return source4("10.1.0.255") }, false, false},
		{"from the limited broadcast address", 0, func() []byte { return source4("255.255.255.255") }, false, false},
		{"from a multicast address", 0, func() []byte { return source4("224.0.0.5") }, false, false},
		{"from loopback", 0, func() []byte { return source4("127.0.0.1") }, false, false},
		{"from an IPv6 multicast address", 0, func() []byte { return source6("ff02::5") }, false, false},
		{"from our own IPv6 address", 0, func() []byte { return source6(addr6[1].String()) }, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			short, long, isShort := bothWays(t, b, dispatch.VnetHeader{Flags: test.flags}, test.frame(), &got)
			if isShort != test.short {
				t.Errorf("takes the short way: %t, want %t", isShort, test.short)
			}
			if !slices.Equal(short, long) || (len(long) == 1) != test.arrives {
				t.Errorf("%v arrived, through gVisor %v; want that something does: %t", short, long, test.arrives)
			}
		})
	}
}

// fuzzFixHeader makes FuzzDatagram put the right checksum into an IPv4 header, which
// else few changes would survive. It is no flag of a vnet header.
const fuzzFixHeader = 0x80

// FuzzDatagram: whatever a frame with a datagram is made into, the short way brings
// what gVisor would have brought.
func FuzzDatagram(f *testing.F) {
	_, b := steppedPair(f)
	var got []arrived
	listenEverywhere(f, b, 9, &got)
	from4, to4 := netip.AddrPortFrom(addrA, 1234), netip.AddrPortFrom(addrB, 9)
	from6, to6 := netip.AddrPortFrom(addr6[0], 1234), netip.AddrPortFrom(addr6[1], 9)
	payload := []byte("some bytes to send")
	for _, flags := range []uint8{0, dispatch.VnetDataValid, fuzzFixHeader | dispatch.VnetDataValid} {
		f.Add(flags, datagramOf(b, from4, to4, payload)[ethernetLen:])
		f.Add(flags, datagramOf(b, from6, to6, payload)[ethernetLen:])
		f.Add(flags, datagramOf(b, from4, to4, nil)[ethernetLen:])
	}
	f.Fuzz(func(t *testing.T, flags uint8, packet []byte) {
		if len(packet) == 0 || len(packet) > 1500 {
			return
		}
		etherType := uint16(header.IPv4ProtocolNumber)
		if packet[0]>>4 == 6 {
			etherType = uint16(header.IPv6ProtocolNumber)
		}
		frame := append([]byte{}, b.set.mac[:]...)
		frame = append(frame, 2, 0, 0, 0, 0, 9)
		frame = binary.BigEndian.AppendUint16(frame, etherType)
		frame = append(frame, packet...)
		if ip := header.IPv4(frame[ethernetLen:]); flags&fuzzFixHeader != 0 && len(ip) >= header.IPv4MinimumSize && ip.HeaderLength() == header.IPv4MinimumSize {
			ip.SetChecksum(0)
			ip.SetChecksum(^ip.CalculateChecksum())
		}
		flags &= dispatch.VnetDataValid
		short, long, isShort := bothWays(t, b, dispatch.VnetHeader{Flags: flags}, frame, &got)
		if isShort && !slices.Equal(short, long) {
			t.Errorf("%v arrived, through gVisor %v", short, long)
		}
	})
}

// wire returns the frames that a shard sends, instead of the shard at the other
// end of its cable.
func wire(t testing.TB, s *Shard) (frames [][]byte) {
	t.Helper()
	other, _ := cables.Load(s.queue.FD())
	for {
		b := make([]byte, rxBufferLen)
		n, err := unix.Read(other.(int), b)
		if err != nil {
			return frames
		}
		frames = append(frames, b[:n])
	}
}

// TestDatagramFrame: the short way sends, byte by byte, what gVisor would have sent.
func TestDatagramFrame(t *testing.T) {
	a, b := steppedPair(t)
	a.tx.offloads = Offloads{} // gVisor computes the checksums of datagrams
	for _, test := range []struct{ local, peer netip.Addr }{{addrA, addrB}, {addr6[0], addr6[1]}} {
		for _, size := range []int{0, 1, 2, 999, 1400} {
			t.Run(fmt.Sprintf("%v/%d", test.local, size), func(t *testing.T) {
				s := portAt(t, a.groups[1], netip.AddrPortFrom(test.local, 0))
				defer s.shut()
				to := netip.AddrPortFrom(test.peer, 9)
				payload := make([]byte, size)
				for i := range payload {
					payload[i] = byte(rand.Uint32())
				}
				if _, err := s.WriteTo(payload, to); err != nil { // resolves the neighbor
					t.Fatal(err)
				}
				settle(t, a, b)
				sc := a.scratch
				sc.payload.b, sc.to = payload, fullAddress(to)
				if err := s.write(payload); err != nil {
					t.Fatal(err)
				}
				if !s.sendFrame(payload, to) {
					t.Fatal("it does not take the short way")
				}
				a.turn()
				frames := wire(t, a)
				if len(frames) != 2 || !bytes.Equal(frames[0], frames[1]) {
					t.Errorf("gVisor and the short way sent %d frames, want 2 equal ones: %x", len(frames), frames)
				}
			})
		}
	}
}

// TestDatagramsShareFrame: datagrams of one size to one peer leave in one frame, and
// arrive as what they were.
func TestDatagramsShareFrame(t *testing.T) {
	many := func(n, size int) (sizes []int) {
		for range n {
			sizes = append(sizes, size)
		}
		return sizes
	}
	for _, test := range []struct {
		name  string
		sizes []int
		want  int // frames
	}{
		{"one", many(1, 1000), 1},
		{"two", many(2, 1000), 1},
		{"as many as there may be", many(64, 100), 1},
		{"one more", many(65, 100), 2},
		{"as many as fit", many(46, 1400), 1}, // 64,428 bytes with the headers
		{"one more than fits", many(47, 1400), 2},
		{"a shorter one ends it", append(many(3, 1000), 999, 1000), 2},
		{"a longer one begins another", append(many(3, 1000), 1001, 1001), 2},
		{"empty ones", many(3, 0), 3},
		{"an empty one between", []int{10, 10, 0, 10}, 3},
	} {
		for _, local := range []netip.Addr{addrA, addr6[0]} {
			t.Run(fmt.Sprintf("%s/%v", test.name, local), func(t *testing.T) {
				a, b := steppedPair(t)
				var got []arrived
				listenEverywhere(t, b, 9, &got)
				s := portAt(t, a.groups[1], netip.AddrPortFrom(local, 0))
				to := netip.AddrPortFrom(addrB, 9)
				if !local.Is4() {
					to = netip.AddrPortFrom(addr6[1], 9)
				}
				if _, err := s.WriteTo([]byte("x"), to); err != nil { // resolves the neighbor
					t.Fatal(err)
				}
				settle(t, a, b)
				got = nil
				before := a.counters.TxFrames
				var want []arrived
				for i, size := range test.sizes {
					payload := bytes.Repeat([]byte{byte(i)}, size)
					want = append(want, arrived{string(payload), s.local})
					if n, err := s.WriteTo(payload, to); n != size || err != nil {
						t.Fatalf("WriteTo = %d, %v", n, err)
					}
				}
				settle(t, a, b)
				if !slices.Equal(got, want) {
					t.Errorf("%d datagrams arrived, want the %d that were sent", len(got), len(want))
				}
				if frames := a.counters.TxFrames - before; frames != uint64(test.want) {
					t.Errorf("%d frames, want %d", frames, test.want)
				}
			})
		}
	}
}

// TestDatagramsToManyPeers: the datagrams of several flows are told apart, however
// they are interleaved, and the memory of a burst is bounded.
func TestDatagramsToManyPeers(t *testing.T) {
	a, b := steppedPair(t)
	const ports, each = 3 * maxLargeFrames, 10
	got := make(map[netip.AddrPort][]arrived)
	for _, g := range b.groups {
		for port := range ports {
			_, err := g.listenUDP(netip.AddrPortFrom(addrB, uint16(1+port)), func(s *Socket, b []byte, from netip.AddrPort) {
				got[s.local] = append(got[s.local], arrived{string(b), from})
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	s := portAt(t, a.groups[1], netip.AddrPortFrom(addrA, 0))
	if _, err := s.WriteTo([]byte("x"), netip.AddrPortFrom(addrB, 1000)); err != nil { // resolves the neighbor
		t.Fatal(err)
	}
	settle(t, a, b)
	for i := range each {
		for port := range ports {
			to := netip.AddrPortFrom(addrB, uint16(1+port))
			if _, err := s.WriteTo(fmt.Appendf(nil, "%3d %1000d", port, i), to); err != nil {
				t.Fatal(err)
			}
		}
	}
	settle(t, a, b)
	for port := range ports {
		var want []arrived
		for i := range each {
			want = append(want, arrived{fmt.Sprintf("%3d %1000d", port, i), s.local})
		}
		if to := netip.AddrPortFrom(addrB, uint16(1+port)); !slices.Equal(got[to], want) {
			t.Errorf("port %d got %d datagrams, want %d in order", to.Port(), len(got[to]), each)
		}
	}
	if n := a.tx.datagrams.largeMade; n == 0 || n > maxLargeFrames {
		t.Errorf("%d large frames were made, want 1 to %d", n, maxLargeFrames)
	}
}

// TestDatagramsWaitForNeighbor: what waited for a neighbor's answer leaves before what
// the frame behind that answer makes a handler send.
func TestDatagramsWaitForNeighbor(t *testing.T) {
	a, b := steppedPair(t)
	var got []arrived
	listenEverywhere(t, b, 9, &got)
	to := netip.AddrPortFrom(addrB, 9)
	local := netip.AddrPortFrom(addrA, 1234)
	s, err := a.set.groups[a.set.groupOf(protoUDP, local, to)].listenUDP(local, func(s *Socket, p []byte, from netip.AddrPort) {
		_, _ = s.WriteTo(p, from)
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []arrived{{"1", local}, {"2", local}, {"3", local}}
	for _, d := range want {
		if _, err := s.WriteTo([]byte(d.payload), to); err != nil {
			t.Fatal(err)
		}
	}
	a.turn() // asks for the neighbor
	b.turn() // answers
	write(t, a, append(make([]byte, dispatch.VnetHeaderLen), datagramOf(a, to, local, []byte("4"))...))
	settle(t, a, b)
	if want = append(want, arrived{"4", local}); !slices.Equal(got, want) {
		t.Errorf("%v arrived, want %v", got, want)
	}
}

// TestHops: gVisor is asked for a neighbor once per turn, and what it has to find out
// itself is left to it.
func TestHops(t *testing.T) {
	a, b := steppedPair(t)
	a.set.cfg.Gateways = []netip.Addr{addrB}
	g := a.groups[1]
	s := portAt(t, g, netip.AddrPortFrom(addrA, 0))
	if s.sendFrame([]byte("x"), netip.AddrPortFrom(addrB, 9)) {
		t.Error("a neighbor that nobody has asked for is known")
	}
	if _, err := s.WriteTo([]byte("x"), netip.AddrPortFrom(addrB, 9)); err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	for _, test := range []struct {
		to    string
		short bool
	}{
		{addrB.String(), true},
		{"192.0.2.1", true}, // by the gateway, which is the same neighbor
		{"10.1.0.255", false},
		{"255.255.255.255", false},
		{"224.0.0.9", false},
		{"127.0.0.1", false},
		{addrA.String(), false},
		{addr6[1].String(), false}, // from an IPv4 address
		{"fe80::1", false},
	} {
		next, short := a.set.nextHop(addrA, netip.MustParseAddr(test.to))
		if short = short && g.hop(tcpipAddress(addrA), tcpipAddress(next)) != nil; short != test.short {
			t.Errorf("to %s: short way %t, want %t", test.to, short, test.short)
		}
	}
	a.turn()
	for i := range 2*maxHops + 1 {
		g.hop(tcpipAddress(addrA), tcpipAddress(netip.AddrFrom4([4]byte{10, 1, 0, byte(3 + i%200)})))
		g.hop(tcpipAddress(addr6[0]), tcpipAddress(netip.AddrFrom16([16]byte{0: 0xfd, 1: 1, 14: byte(i >> 8), 15: byte(i)})))
	}
	if len(g.hops) > maxHops {
		t.Errorf("%d neighbors kept, want at most %d", len(g.hops), maxHops)
	}
}

// TestHopMoves: a neighbor that says it has another address is found there at once.
func TestHopMoves(t *testing.T) {
	a, b := steppedPair(t)
	s := portAt(t, a.groups[1], netip.AddrPortFrom(addrA, 0))
	to := netip.AddrPortFrom(addrB, 9)
	send := func() (mac string) {
		t.Helper()
		if _, err := s.WriteTo([]byte("x"), to); err != nil {
			t.Fatal(err)
		}
		a.turn()
		for _, f := range wire(t, a) {
			mac = net.HardwareAddr(f[dispatch.VnetHeaderLen:][:6]).String()
		}
		return mac
	}
	if _, err := s.WriteTo([]byte("x"), to); err != nil { // resolves the neighbor
		t.Fatal(err)
	}
	settle(t, a, b)
	if mac, want := send(), b.set.cfg.MAC.String(); mac != want {
		t.Fatalf("sent to %s, want %s", mac, want)
	}
	moved := net.HardwareAddr{2, 0, 0, 0, 0, 77}
	inject(t, a, dispatch.VnetHeader{}, &layers.Ethernet{
		SrcMAC: moved, DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP,
	}, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: moved, SourceProtAddress: addrB.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: addrA.AsSlice(),
	})
	a.turn()
	wire(t, a)
	if mac := send(); mac != moved.String() {
		t.Errorf("sent to %s, want %s", mac, moved)
	}
}

func TestDatagramsAllocateNothing(t *testing.T) {
	a, b := steppedPair(t)
	received := 0
	for _, g := range b.groups {
		if _, err := g.listenUDP(netip.AddrPortFrom(addrB, 9), func(s *Socket, p []byte, from netip.AddrPort) {
			received++
			_, _ = s.WriteTo(p, from)
		}); err != nil {
			t.Fatal(err)
		}
	}
	local, to := netip.AddrPortFrom(addrA, 1234), netip.AddrPortFrom(addrB, 9)
	s := portAt(t, a.set.groups[a.set.groupOf(protoUDP, local, to)], local) // where the answers come
	payload := make([]byte, 1200)
	round := func() {
		for range 10 {
			_, _ = s.WriteTo(payload, to)
		}
		a.turn()
		b.turn()
		a.turn()
	}
	for range 10 {
		round() // resolves the neighbors, makes buffers
	}
	before := received
	if allocs := testing.AllocsPerRun(100, round); allocs != 0 {
		t.Errorf("%v allocations for ten datagrams and their answers, want none", allocs)
	}
	if received-before < 1000 {
		t.Errorf("%d datagrams received, want 10 a round", received-before)
	}
}

// BenchmarkDatagrams sends bursts to one peer, or to several in turn, without what the
// kernel does with the frames.
func BenchmarkDatagrams(b *testing.B) {
	for _, peers := range []int{1, 16} {
		for _, size := range []int{64, 1400} {
			b.Run(fmt.Sprintf("send/peers=%d/size=%d", peers, size), func(b *testing.B) {
				x, y := steppedPair(b)
				s := portAt(b, x.groups[1], netip.AddrPortFrom(addrA, 1234))
				_, _ = s.WriteTo([]byte("x"), netip.AddrPortFrom(addrB, 9)) // resolves the neighbor
				settle(b, x, y)
				x.tx.queue = sink(b)
				payload := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					_, _ = s.WriteTo(payload, netip.AddrPortFrom(addrB, uint16(9+i%peers)))
					if i%(32*peers) == 0 {
						x.tx.flush()
					}
				}
			})
		}
	}
	b.Run("receive/size=1400", func(b *testing.B) {
		_, y := steppedPair(b)
		received := 0
		for _, g := range y.groups {
			if _, err := g.listenUDP(netip.AddrPortFrom(addrB, 9), func(*Socket, []byte, netip.AddrPort) { received++ }); err != nil {
				b.Fatal(err)
			}
		}
		h := &handover{
			vnet:  dispatch.VnetHeader{Flags: dispatch.VnetDataValid},
			frame: datagramOf(y, netip.AddrPortFrom(addrA, 1234), netip.AddrPortFrom(addrB, 9), make([]byte, 1400)),
		}
		b.SetBytes(1400)
		b.ReportAllocs()
		for b.Loop() {
			y.set.toeplitz.Parse(h.frame, &h.parsed)
			y.route(h, true)
		}
	})
}
