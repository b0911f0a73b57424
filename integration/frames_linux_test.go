package integration

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"numastack/stack"
)

// TestBadFrames has the kernel's side send frames that nobody should send, and
// looks for each in the counter of its cause. A connection beside them lives.
func TestBadFrames(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		witness := dialTCP(t, r.self4, echoPort)
		if err := roundTrip(witness, []byte("before")); err != nil {
			t.Fatal(err)
		}
		in := newInjector(t, r)
		for _, test := range in.badFrames() {
			t.Run(test.name, func(t *testing.T) {
				const copies = 3
				before := r.sum()
				for range copies {
					in.send(t, test.frame)
				}
				eventually(t, func() error {
					after := r.sum()
					got := after.DroppedByCause[test.cause] - before.DroppedByCause[test.cause]
					if test.cause == checksumErrors {
						got = after.checksumErrors - before.checksumErrors
					}
					if got != copies {
						return fmt.Errorf("%d of %d frames counted as %s; drops before %v, now %v", got, copies,
							test.cause, before.DroppedByCause, after.DroppedByCause)
					}
					return nil
				})
				if err := roundTrip(witness, payload(1, 5000)); err != nil {
					t.Fatalf("the connection beside them: %v", err)
				}
			})
		}
		_ = witness.Close()
	})
}

// TestMutatedFrames sends frames with random faults. What becomes of each does
// not matter; the stack must survive, and serve.
func TestMutatedFrames(t *testing.T) {
	const frames = 2000
	r := open(t, variant{2, stack.SteeringAuto, stack.OffloadAuto}.config())
	r.serveEcho(t, nil)
	witness := dialTCP(t, r.self4, echoPort)
	if err := roundTrip(witness, []byte("before")); err != nil {
		t.Fatal(err)
	}
	in := newInjector(t, r)
	// No ARP among them: who may forge that, may cut a connection off, here as
	// anywhere.
	seeds := [][]byte{in.tcp4(nil), in.udp4(nil), in.udp6(nil)}
	random := rand.New(rand.NewPCG(1, 2))
	before := r.sum()
	for i := range frames {
		frame := append([]byte(nil), seeds[i%len(seeds)]...)
		for range 1 + random.IntN(4) {
			frame[12+random.IntN(len(frame)-12)] ^= 1 << random.IntN(8)
		}
		if random.IntN(4) == 0 {
			frame = frame[:14+random.IntN(len(frame)-14)]
		}
		in.send(t, frame)
		if i%200 == 0 {
			if err := roundTrip(witness, payload(uint64(i), 3000)); err != nil {
				t.Fatalf("after %d frames: %v", i, err)
			}
		}
	}
	eventually(t, func() error {
		// Those that the kernel's side answers and the witness come on top.
		if got := r.sum().RxFrames - before.RxFrames; got < frames {
			return fmt.Errorf("%d frames read, want at least %d", got, frames)
		}
		return nil
	})
	if err := exchange(witness, payload(3, 100_000)); err != nil {
		t.Error(err)
	}
	for _, f := range r.families() {
		if err := exchange(dialTCP(t, f.self, echoPort), payload(4, 10_000)); err != nil {
			t.Errorf("a new connection over %s: %v", f.name, err)
		}
	}
}

// TestOversizedFrame raises the MTU of the kernel's side alone, so that frames
// come that are longer than the stack was told.
func TestOversizedFrame(t *testing.T) {
	r := open(t, variant{1, stack.SteeringAuto, stack.OffloadOff}.config())
	r.serveEcho(t, nil)
	witness := dialTCP(t, r.self4, echoPort)
	if err := roundTrip(witness, []byte("before")); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName(r.device)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetMTU(link, 65_521); err != nil {
		t.Fatal(err)
	}
	before := r.sum()
	c := captureDevice(t, r.device)
	echoDatagrams(t, family{"IPv4", r.host4, r.self4}, 9000, 60_000)
	ours, kernels := longest(c.end(t))
	if limit := 1500 + 14; ours > limit || kernels <= limit {
		t.Errorf("frames of up to %d bytes from the stack, want at most %d, and %d from the kernel, want more", ours, limit, kernels)
	}
	if dropped := r.sum().Dropped - before.Dropped; dropped != 0 {
		t.Errorf("%d frames dropped", dropped)
	}
	if err := exchange(witness, payload(1, 100_000)); err != nil {
		t.Error(err)
	}
}

// injector sends frames from the kernel's side to the stack's queues.
type injector struct {
	fd         int
	index      int
	r          *rig
	host, self net.HardwareAddr
}

// newInjector needs the kernel to know the stack's link address: something was
// exchanged before.
func newInjector(t *testing.T, r *rig) *injector {
	t.Helper()
	in := &injector{r: r}
	in.fd, in.index = packetSocket(t, r.device, 0)
	link, err := netlink.LinkByName(r.device)
	if err != nil {
		t.Fatal(err)
	}
	in.host = link.Attrs().HardwareAddr
	neighbors, err := netlink.NeighList(in.index, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range neighbors {
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == r.self4 {
			in.self = n.HardwareAddr
		}
	}
	if in.self == nil {
		t.Fatalf("the kernel does not know the link address of %v", r.self4)
	}
	return in
}

func (in *injector) send(t *testing.T, frame []byte) {
	t.Helper()
	if err := unix.Sendto(in.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: in.index}); err != nil {
		t.Fatalf("send a frame of %d bytes: %v", len(frame), err)
	}
}

func (in *injector) ethernet(kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: in.host, DstMAC: in.self, EthernetType: kind}
}

func (in *injector) ip4(proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: in.r.host4.AsSlice(), DstIP: in.r.self4.AsSlice()}
}

func (in *injector) ip6(next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: next, SrcIP: in.r.host6.AsSlice(), DstIP: in.r.self6.AsSlice()}
}

// frame serializes layers, with right lengths and checksums.
func frame(l ...gopacket.SerializableLayer) []byte {
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...); err != nil {
		panic(err) // the layers are constants of this file
	}
	return b.Bytes()
}

// tcp4 is a segment to the echo port of no connection; change may spoil it.
func (in *injector) tcp4(change func(frame []byte)) []byte {
	ip := in.ip4(layers.IPProtocolTCP)
	segment := &layers.TCP{SrcPort: 999, DstPort: echoPort, Seq: 1, Ack: 1, ACK: true, Window: 1000}
	_ = segment.SetNetworkLayerForChecksum(ip) // IPv4 is one
	return spoil(frame(in.ethernet(layers.EthernetTypeIPv4), ip, segment, gopacket.Payload("segment")), change)
}

// udp4 is a datagram to the echo port.
func (in *injector) udp4(change func(frame []byte)) []byte {
	ip := in.ip4(layers.IPProtocolUDP)
	datagram := &layers.UDP{SrcPort: 999, DstPort: echoPort}
	_ = datagram.SetNetworkLayerForChecksum(ip) // IPv4 is one
	return spoil(frame(in.ethernet(layers.EthernetTypeIPv4), ip, datagram, gopacket.Payload("datagram")), change)
}

// udp6 is a datagram to the echo port.
func (in *injector) udp6(change func(frame []byte)) []byte {
	ip := in.ip6(layers.IPProtocolUDP)
	datagram := &layers.UDP{SrcPort: 999, DstPort: echoPort}
	_ = datagram.SetNetworkLayerForChecksum(ip) // IPv6 is one
	return spoil(frame(in.ethernet(layers.EthernetTypeIPv6), ip, datagram, gopacket.Payload("datagram")), change)
}

func (in *injector) arp() []byte {
	return frame(in.ethernet(layers.EthernetTypeARP), &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: in.host, SourceProtAddress: in.r.host4.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: in.r.self4.AsSlice(),
	})
}

func spoil(frame []byte, change func([]byte)) []byte {
	if change != nil {
		change(frame)
	}
	return frame
}

// checksumErrors stands for the counter of that name.
const checksumErrors = "checksum_errors"

type badFrame struct {
	name, cause string
	frame       []byte
}

// badFrames are one step away from right. Offsets are those of frames without
// IP options: IP at 14, TCP and UDP at 34 behind IPv4, and at 54 behind IPv6.
func (in *injector) badFrames() []badFrame {
	put16 := func(at int, v uint16) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint16(b[at:], v) }
	}
	put8 := func(at int, v byte) func([]byte) {
		return func(b []byte) { b[at] = v }
	}
	garbage := payload(1, 200)
	copy(garbage, in.self)
	copy(garbage[6:], in.host)
	binary.BigEndian.PutUint16(garbage[12:], 0x88b5) // for experiments, IEEE 802
	tag := func(kind layers.EthernetType) []byte {
		return frame(in.ethernet(kind), &layers.Dot1Q{VLANIdentifier: 5, Type: layers.EthernetTypeIPv4}, in.ip4(layers.IPProtocolUDP))
	}
	manyHeaders := in.udp6(nil)[:54]
	for range 10 {
		// Destination options with the padding that fills 8 bytes, one after the other.
		manyHeaders = append(manyHeaders, 60, 0, 1, 4, 0, 0, 0, 0)
	}
	manyHeaders[20] = 60
	binary.BigEndian.PutUint16(manyHeaders[18:], uint16(len(manyHeaders)-54))
	return []badFrame{
		{"garbage", "unknown_ethertype", garbage},
		{"802.3 length", "unknown_ethertype", in.udp4(put16(12, 42))},
		{"VLAN", "vlan", tag(layers.EthernetTypeDot1Q)},
		{"VLAN in VLAN", "vlan", tag(layers.EthernetTypeQinQ)},
		{"for another host", "other_host", in.udp4(put8(5, in.self[5]^1))},
		{"ARP cut", "truncated", in.arp()[:30]},
		{"IPv4 header cut", "truncated", in.udp4(nil)[:30]},
		{"IPv4 longer than the frame", "truncated", in.udp4(put16(16, 1000))},
		{"IPv4 shorter than its header", "malformed", in.udp4(put16(16, 19))},
		{"IPv4 version", "malformed", in.udp4(put8(14, 0x55))},
		{"IPv4 header length", "malformed", in.udp4(put8(14, 0x44))},
		{"IPv6 header cut", "truncated", in.udp6(nil)[:50]},
		{"IPv6 longer than the frame", "truncated", in.udp6(put16(18, 1000))},
		{"IPv6 version", "malformed", in.udp6(put8(14, 0x40))},
		{"IPv6 with many headers", "malformed", manyHeaders},
		{"UDP length too small", "malformed", in.udp4(put16(38, 7))},
		{"UDP length too large", "malformed", in.udp4(put16(38, 100))},
		{"TCP header length too small", "malformed", in.tcp4(put8(46, 4<<4))},
		{"TCP header length too large", "malformed", in.tcp4(put8(46, 15<<4))},
		{"TCP checksum", checksumErrors, in.tcp4(func(b []byte) { b[50] ^= 0xff })},
	}
}

// TestBadChecksumsAreNotAnswered sends datagrams with a wrong checksum and
// no promise of the kernel about it: nothing comes back, whereas right ones do.
func TestBadChecksumsAreNotAnswered(t *testing.T) {
	r := open(t, variant{2, stack.SteeringAuto, stack.OffloadAuto}.config())
	r.serveEcho(t, nil)
	// The datagrams name this port as their source.
	l, err := net.ListenUDP("udp4", &net.UDPAddr{IP: r.host4.AsSlice(), Port: 999})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	setDeadline(t, l)
	if err := exchange(dialTCP(t, r.self4, echoPort), []byte("so that the neighbors know each other")); err != nil {
		t.Fatal(err)
	}
	in := newInjector(t, r)
	in.send(t, in.udp4(func(b []byte) { b[45] ^= 0xff }))              // UDP checksum
	in.send(t, in.udp4(func(b []byte) { b[24] ^= 0xff; b[42] = 'X' })) // IP checksum
	in.send(t, in.udp4(nil))
	buf := make([]byte, 100)
	n, _, err := l.ReadFromUDP(buf)
	if err != nil || string(buf[:n]) != "datagram" {
		t.Errorf("the first answer is %q and %v, want the one to the good datagram", buf[:n], err)
	}
}
