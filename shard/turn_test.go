package shard

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"numastack/dispatch"
)

// TestSeveralSegmentsInFlight: what a turn sends is acknowledged in parts,
// because the peer reads a budget of frames per turn. None of it is lost, so
// none may be sent again.
func TestSeveralSegmentsInFlight(t *testing.T) {
	a, b := steppedPair(t)
	a.groups[1].link.gso = false // one frame per segment
	received := 0
	listenStepped(t, b, 7, &testHandler{data: func(_ *Conn, p []byte) int { received += len(p); return len(p) }})
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
	settle(t, a, b)
	message := make([]byte, 700_000)
	const rounds = 10
	for round := range rounds {
		if n, err := client.Write(message); n != len(message) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		settle(t, a, b)
		if want := (round + 1) * len(message); received != want {
			t.Fatalf("received %d bytes, want %d", received, want)
		}
	}
	if frames := a.counters.TxFrames; frames < rounds*700_000/1500 {
		t.Fatalf("%d frames sent: super-frames, so the test shows nothing", frames)
	}
	if n := a.count().Groups[client.g.id].Retransmits; n != 0 {
		t.Errorf("%d retransmissions on a cable that loses nothing", n)
	}
	if size := client.ep.SocketOptions().GetSendBufferSize(); size != int64(a.set.cfg.SendBuffer) {
		t.Errorf("send buffer to a near peer has grown from %d to %d bytes", a.set.cfg.SendBuffer, size)
	}
}

// TestDataBehindHandshake: the ACK that ends the handshake and a segment with
// data arrive in one burst as two frames.
func TestDataBehindHandshake(t *testing.T) {
	a, b := steppedPair(t)
	var got string
	listenStepped(t, b, 7, &testHandler{data: func(_ *Conn, p []byte) int { got += string(p); return len(p) }})
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
	for !client.opened {
		a.turn()
		if !client.opened {
			b.turn()
		}
	}
	if _, err := client.Write([]byte("early")); err != nil {
		t.Fatal(err)
	}
	a.turn()
	b.turn()
	if got != "early" {
		t.Errorf("the turn that read both frames delivered %q, want %q", got, "early")
	}
}

// TestLentBuffers: the payload of a large frame stays in its receive buffer
// until the application has read it.
func TestLentBuffers(t *testing.T) {
	a, b := steppedPair(t)
	refuse := true
	received := 0
	var server *Conn
	listenStepped(t, b, 7, &testHandler{
		open: func(c *Conn) { server = c },
		data: func(_ *Conn, p []byte) int {
			if refuse {
				return 0
			}
			received += len(p)
			return len(p)
		},
	})
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
	settle(t, a, b)
	message := make([]byte, 50_000)
	if _, err := client.Write(message); err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	if lent := b.count().BuffersLent; lent == 0 {
		t.Error("no receive buffer is lent although nothing was read: the payload was copied")
	}
	refuse = false
	server.Resume()
	settle(t, a, b)
	b.turn() // sweeps
	if received != len(message) {
		t.Errorf("received %d bytes after Resume, want %d", received, len(message))
	}
	if lent := b.count().BuffersLent; lent != 0 {
		t.Errorf("%d receive buffers still lent after everything was read", lent)
	}
}

// TestOneAnswerToNeighbors: all groups learn from an ARP request, one answers.
func TestOneAnswerToNeighbors(t *testing.T) {
	_, b := steppedPair(t)
	before := b.counters.TxFrames
	peer := [6]byte{2, 0, 0, 0, 0, 9}
	inject(t, b, dispatch.VnetHeader{}, &layers.Ethernet{
		SrcMAC: peer[:], DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP,
	}, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: peer[:], SourceProtAddress: addrA.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: addrB.AsSlice(),
	})
	settle(t, b)
	if n := b.counters.TxFrames - before; n != 1 {
		t.Errorf("%d answers to one ARP request by %d groups, want 1", n, len(b.groups))
	}
	for _, g := range b.groups {
		neighbors, err := g.stack.Neighbors(nicID, networkProtocol(addrA))
		if err != nil || len(neighbors) != 1 {
			t.Errorf("group %d knows %d neighbors (%v), want 1", g.id, len(neighbors), err)
		}
	}
}

// TestChecksums: a frame that the kernel does not vouch for is checked.
func TestChecksums(t *testing.T) {
	for _, test := range []struct {
		name  string
		flags uint8
		want  uint64 // errors
	}{
		{"no promise", 0, 1},
		{"partial checksum, the kernel vouches", dispatch.VnetNeedsCsum, 0},
		{"checked by the kernel", dispatch.VnetDataValid, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			listenStepped(t, b, 7, &testHandler{})
			ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: addrA.AsSlice(), DstIP: addrB.AsSlice()}
			tcp := &layers.TCP{SrcPort: 1000, DstPort: 7, SYN: true, Window: 1000}
			vnet := dispatch.VnetHeader{Flags: test.flags, CsumStart: 34, CsumOffset: 16}
			injectWith(t, b, vnet, gopacket.SerializeOptions{FixLengths: true},
				ethernetTo(b), withIPChecksum(t, ip), tcp) // the TCP checksum is 0
			settle(t, b)
			var errors, embryonic uint64
			for _, g := range b.groups {
				errors += g.counters().ChecksumErrors
				embryonic += uint64(len(g.stack.RegisteredEndpoints()))
			}
			if errors != test.want {
				t.Errorf("%d checksum errors, want %d", errors, test.want)
			}
			if listening := uint64(2 * len(b.groups)); (embryonic > listening) != (test.want == 0) {
				t.Errorf("%d endpoints with %d listening: the SYN was accepted or not, against its checksum", embryonic, listening)
			}
		})
	}
}

// TestUDPSuperFrame: a frame of many datagrams is delivered as what it was made
// of, the last one shorter.
func TestUDPSuperFrame(t *testing.T) {
	_, b := steppedPair(t)
	type datagram struct {
		payload string
		from    netip.AddrPort
	}
	var got []datagram
	for _, g := range b.groups {
		for _, p := range b.set.cfg.Addrs {
			_, err := g.listenUDP(netip.AddrPortFrom(p.Addr(), 9000), func(_ *Socket, p []byte, from netip.AddrPort) {
				got = append(got, datagram{string(p), from})
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	payload := bytes.Repeat([]byte("0123456789"), 250) // 2500 bytes
	udp := func(network gopacket.NetworkLayer) *layers.UDP {
		u := &layers.UDP{SrcPort: 1234, DstPort: 9000}
		if err := u.SetNetworkLayerForChecksum(network); err != nil {
			t.Fatal(err)
		}
		return u
	}
	ip4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: addrA.AsSlice(), DstIP: addrB.AsSlice()}
	ip6 := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP, SrcIP: addr6[0].AsSlice(), DstIP: addr6[1].AsSlice()}
	eth6 := ethernetTo(b)
	eth6.EthernetType = layers.EthernetTypeIPv6
	for _, test := range []struct {
		name   string
		frame  []gopacket.SerializableLayer
		offset uint16
		from   netip.Addr
	}{
		{"IPv4", []gopacket.SerializableLayer{ethernetTo(b), ip4, udp(ip4), gopacket.Payload(payload)}, 34, addrA},
		{"IPv6", []gopacket.SerializableLayer{eth6, ip6, udp(ip6), gopacket.Payload(payload)}, 54, addr6[0]},
	} {
		t.Run(test.name, func(t *testing.T) {
			got = nil
			inject(t, b, dispatch.VnetHeader{
				Flags: dispatch.VnetNeedsCsum, GSOType: dispatch.VnetGSOUDPL4, GSOSize: 1200,
				CsumStart: test.offset, CsumOffset: 6,
			}, test.frame...)
			settle(t, b)
			from := netip.AddrPortFrom(test.from, 1234)
			want := []datagram{{string(payload[:1200]), from}, {string(payload[1200:2400]), from}, {string(payload[2400:]), from}}
			if len(got) != len(want) {
				t.Fatalf("%d datagrams, want %d; dropped: %v", len(got), len(want), b.count().DroppedByCause)
			}
			for i := range want {
				if got[i] != want[i] {
					t.Errorf("datagram %d: %d bytes from %v, want %d from %v", i, len(got[i].payload), got[i].from, len(want[i].payload), want[i].from)
				}
			}
		})
	}
}

// TestBadFrames: what cannot be used is counted by cause, and nothing else
// happens.
func TestBadFrames(t *testing.T) {
	_, b := steppedPair(t)
	mac := b.set.mac
	frame := func(dst []byte, etherType uint16, rest ...byte) []byte {
		f := append(append([]byte{}, dst...), 2, 0, 0, 0, 0, 9)
		f = binary.BigEndian.AppendUint16(f, etherType)
		return append(f, rest...)
	}
	good := append([]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 99, 0, 0}, 10, 1, 0, 1, 10, 1, 0, 2)
	for _, test := range []struct {
		cause string
		vnet  [dispatch.VnetHeaderLen]byte
		frame []byte
	}{
		{"truncated", [10]byte{}, frame(mac[:], 0x0800, 0x45, 0)},
		{"malformed", [10]byte{}, frame(mac[:], 0x0800, append([]byte{0x65}, good[1:]...)...)},
		{"vlan", [10]byte{}, frame(mac[:], 0x8100, good...)},
		{"unknown_ethertype", [10]byte{}, frame(mac[:], 0x1234, good...)},
		{"other_host", [10]byte{}, frame([]byte{2, 9, 9, 9, 9, 9}, 0x0800, good...)},
		{"bad_vnet_header", [10]byte{1: 77}, frame(mac[:], 0x0800, good...)},
	} {
		before := b.count()
		write(t, b, append(test.vnet[:], test.frame...))
		settle(t, b)
		after := b.count()
		if n := after.DroppedByCause[test.cause] - before.DroppedByCause[test.cause]; n != 1 || after.Dropped-before.Dropped != 1 {
			t.Errorf("%s: counted %d times, %d in total: %v", test.cause, n, after.Dropped-before.Dropped, after.DroppedByCause)
		}
	}
}

// TestForward: two shards per side and frames that arrive on the wrong one's
// queue half of the time.
func TestForward(t *testing.T) {
	a, b := startWide(t, 2, 4)
	for range 12 {
		client, server := netPair(t, a, b)
		sent := bytes.Repeat([]byte("x"), 300_000)
		go func() { _, _ = client.Write(sent); _ = client.Close() }()
		got := 0
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			got += n
			if err != nil {
				break
			}
		}
		if got != len(sent) {
			t.Fatalf("received %d bytes, want %d", got, len(sent))
		}
	}
	var missteered, forwarded, received, full uint64
	for _, c := range b.Stats() {
		missteered += c.Missteered
		forwarded += c.Forwarded
		received += c.Received
		full += c.RingFull
	}
	if missteered == 0 || forwarded < missteered || received != forwarded || full != 0 {
		t.Errorf("missteered %d, forwarded %d, received %d, ring full %d; want some, at least as many, the same, none",
			missteered, forwarded, received, full)
	}
}

// TestSharedCPU: shards know that they share a CPU, and with that when to let others run.
func TestSharedCPU(t *testing.T) {
	cpus := thisMachine(t).AllowedCPUs
	if len(cpus) < 2 {
		t.Skip("one CPU: all shards share it")
	}
	on := []int{cpus[0], cpus[1], cpus[0]}
	set, _ := startWide(t, len(on), 4, func(cfg *Config) { cfg.CPUs = on })
	for i, want := range []bool{true, false, true} {
		if got := set.shards[i].sharesCPU; got != want {
			t.Errorf("shard %d of those on CPUs %v shares its CPU: %t, want %t", i, on, got, want)
		}
	}
}

func ethernetTo(s *Shard) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: []byte{2, 0, 0, 0, 0, 9}, DstMAC: s.set.mac[:], EthernetType: layers.EthernetTypeIPv4}
}

// withIPChecksum fills in the header checksum, which FixLengths leaves alone.
func withIPChecksum(t *testing.T, ip *layers.IPv4) gopacket.SerializableLayer {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, gopacket.Payload(make([]byte, 20))); err != nil {
		t.Fatal(err)
	}
	return ip
}

// inject lets a frame arrive at a stepped shard.
func inject(t *testing.T, s *Shard, vnet dispatch.VnetHeader, frame ...gopacket.SerializableLayer) {
	t.Helper()
	injectWith(t, s, vnet, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, frame...)
}

func injectWith(t *testing.T, s *Shard, vnet dispatch.VnetHeader, options gopacket.SerializeOptions, frame ...gopacket.SerializableLayer) {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, options, frame...); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, dispatch.VnetHeaderLen)
	vnet.Encode(raw)
	write(t, s, append(raw, b.Bytes()...))
}

// write puts a frame with its vnet header into the shard's queue.
func write(t *testing.T, s *Shard, b []byte) {
	t.Helper()
	peer, ok := cables.Load(s.queue.FD())
	if !ok {
		t.Fatal("the shard's queue is no socket pair")
	}
	if errno := dispatch.NewQueue(peer.(int)).Write(b); errno != 0 {
		t.Fatal(errno)
	}
}
