package integration

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"

	"numastack/stack"
)

// link is a stack of many flow groups on four shards, what crosses its device,
// and hosts that exist only there.
type link struct {
	*rig
	*oracle
	fd, index int
	mac       net.HardwareAddr // the stack's
	hosts     byte

	mu     sync.Mutex
	frames []captured // in both directions; guarded by mu

	patience time.Duration // with frames that are not where they should be

	marks uint64 // barriers sent
	from  int    // what has been accounted for: frames
	base  tally  // and what the stack had counted then
}

const linkGroups = 32

// forSteerings runs f on a link with either way of steering, or with -short
// without help of the kernel, where shards have more to do with each other.
func forSteerings(t *testing.T, f func(t *testing.T, l *link)) {
	ways := []stack.Steering{stack.SteeringUser, stack.SteeringKernel}
	if testing.Short() {
		ways = ways[:1]
	}
	forSteeringsOf(t, ways, f)
}

func forSteeringsOf(t *testing.T, ways []stack.Steering, f func(t *testing.T, l *link)) {
	for _, steering := range ways {
		t.Run(steering.String(), func(t *testing.T) {
			l := openLink(t, steering)
			f(t, l)
			switch n := l.sum().Missteered; {
			case steering == stack.SteeringKernel && n != 0:
				t.Errorf("%d frames arrived on a wrong queue, want 0", n)
			case steering == stack.SteeringUser && n == 0:
				t.Error("no frame was handed from shard to shard, although nobody steers")
			}
		})
	}
}

func openLink(t *testing.T, steering stack.Steering) *link {
	t.Helper()
	key := stack.VerificationKey
	r := open(t, stack.Config{
		Shards: 4, Groups: linkGroups, Steering: steering, HashKey: &key,
		Rebalance: stack.RebalanceOff, // groups stay, so that their shards are known
	})
	l := &link{rig: r, oracle: newOracle(key, linkGroups), hosts: 10, patience: patience}
	l.watch(t)
	r.serveEcho(t, nil)
	for _, f := range r.families() {
		if err := roundTrip(dialUDP(t, f.self, echoPort), []byte("here")); err != nil {
			t.Fatal(err)
		}
	}
	l.mac = newInjector(t, r).self
	l.settleAccounts(t)
	return l
}

// watch keeps the frames that cross the device, as captureDevice does, but
// lets the test look at them meanwhile.
func (l *link) watch(t *testing.T) {
	t.Helper()
	l.fd, l.index = packetSocket(t, l.device, 0)
	fd, index := captureSocket(t, l.device)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		buf := make([]byte, 1<<17)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				select {
				case <-stop:
					return
				default:
					continue
				}
			}
			if at, ok := from.(*unix.SockaddrLinklayer); ok && at.Ifindex == index && n >= vnetLen+14 {
				l.mu.Lock()
				l.frames = append(l.frames, captured{
					bytes:   append([]byte(nil), buf[vnetLen:n]...),
					ours:    at.Pkttype != unix.PACKET_OUTGOING,
					segment: int(binary.NativeEndian.Uint16(buf[4:])),
				})
				l.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
}

// since returns the frames from number n on.
func (l *link) since(n int) []captured {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.frames[n:len(l.frames):len(l.frames)]
}

// counted is what the stack says of the frames that the oracle knows about.
func (l *link) counted() tally {
	c := tally{groups: make([]uint64, l.groups), drops: make(map[string]uint64)}
	for _, s := range l.Stats().Shards {
		for _, g := range s.Groups {
			c.groups[g.Group] = g.Frames
		}
		for cause, n := range s.DroppedByCause {
			if cause == "vlan" || cause == "unknown_ethertype" {
				c.drops[cause] += n
			}
		}
	}
	return c
}

// settleAccounts waits for a moment without frames: from then on the stack's
// counters and what the oracle says of the frames have to agree.
func (l *link) settleAccounts(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		l.barrier(t)
		l.from, l.base = len(l.since(0)), l.counted()
		time.Sleep(20 * time.Millisecond)
		if n := len(l.since(l.from)); n != 0 || l.counted().differs(l.base) != nil {
			return fmt.Errorf("%d frames on a link that nobody uses", n)
		}
		return nil
	})
}

// account runs f, waits until every frame that was sent to the stack is where
// the oracle says, and returns the frames of both directions since f began.
func (l *link) account(t *testing.T, f func()) []captured {
	t.Helper()
	begin := len(l.since(0))
	f()
	l.barrier(t)
	for end := time.Now().Add(l.patience); ; time.Sleep(time.Millisecond) {
		now, frames := l.counted(), l.since(l.from)
		err := now.minus(l.base).differs(newOracle(l.key, l.groups).tally(frames))
		if err == nil {
			l.from, l.base = l.from+len(frames), now
			break
		}
		if time.Now().After(end) {
			t.Errorf("after %v: %v", l.patience, err)
			l.patience = 100 * time.Millisecond // it is no matter of time
			l.settleAccounts(t)
			break
		}
	}
	l.barrier(t)
	return l.since(begin)
}

// barrier waits until all frames sent so far were processed and answered, and
// until the watch has seen the answers.
func (l *link) barrier(t *testing.T) {
	t.Helper()
	l.Stats() // a turn of each shard, at least
	l.Stats() // and the rest of those that were under way
	l.marks++
	mark := append(append([]byte(nil), l.mac...), 2, 0, 0, 0, 0, 0, 0x88, 0xb5) // for experiments, IEEE 802
	mark = append(binary.BigEndian.AppendUint64(mark, l.marks), make([]byte, 38)...)
	begin := len(l.since(0))
	l.send(t, mark)
	l.await(t, begin, func(f *captured) bool {
		return !f.ours && string(f.bytes) == string(mark)
	})
}

// await waits for a frame from number n on.
func (l *link) await(t *testing.T, n int, want func(f *captured) bool) captured {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		frames := l.since(n)
		for i := range frames {
			if want(&frames[i]) {
				return frames[i]
			}
		}
	}
	t.Fatalf("no such frame on the link after %v", patience)
	return captured{}
}

func (l *link) send(t *testing.T, frames ...[]byte) {
	t.Helper()
	for _, f := range frames {
		if err := unix.Sendto(l.fd, f, 0, &unix.SockaddrLinklayer{Ifindex: l.index}); err != nil {
			t.Fatalf("send a frame of %d bytes: %v", len(f), err)
		}
	}
}

// answers returns what the stack sent among frames, decoded.
func answers(frames []captured, want func(p gopacket.Packet) bool) (found []gopacket.Packet) {
	for _, f := range frames {
		if !f.ours {
			continue
		}
		if p := gopacket.NewPacket(f.bytes, layers.LayerTypeEthernet, gopacket.Default); want(p) {
			found = append(found, p)
		}
	}
	return found
}

// fakeHost is a neighbor that speaks only what a test makes it say, so that
// nothing but the stack answers. The kernel takes no part: the frames to it have
// another link address than the kernel's.
type fakeHost struct {
	mac        net.HardwareAddr
	addr, self netip.Addr // its own and the stack's
	stack      net.HardwareAddr
	id         uint32 // of its last fragmented packet
}

// newHost returns a host that the stack does not know.
func (l *link) newHost(f family) *fakeHost {
	l.hosts++
	h := &fakeHost{mac: net.HardwareAddr{2, 0, 0, 0, 0, l.hosts}, self: f.self, stack: l.mac}
	b := f.host.AsSlice()
	b[len(b)-1] = l.hosts
	h.addr, _ = netip.AddrFromSlice(b)
	return h
}

// known returns n hosts that have told the stack their link addresses.
func (l *link) known(t *testing.T, f family, n int) (hosts []*fakeHost) {
	t.Helper()
	for range n {
		h := l.newHost(f)
		l.send(t, h.solicit())
		hosts = append(hosts, h)
	}
	l.barrier(t)
	return hosts
}

func (h *fakeHost) is4() bool { return h.addr.Is4() }

// headers is the length of the headers in front of the transport's.
func (h *fakeHost) headers() int {
	if h.is4() {
		return 14 + 20
	}
	return 14 + 40
}

// networkLayer is IPv4 or IPv6.
type networkLayer interface {
	gopacket.SerializableLayer
	gopacket.NetworkLayer
}

// to returns the headers of a packet to an address.
func (h *fakeHost) to(dst netip.Addr, proto layers.IPProtocol) (*layers.Ethernet, networkLayer) {
	eth := &layers.Ethernet{SrcMAC: h.mac, DstMAC: h.stack, EthernetType: layers.EthernetTypeIPv4}
	b := dst.AsSlice()
	switch {
	case dst == h.self:
	case !h.is4():
		eth.DstMAC = net.HardwareAddr{0x33, 0x33, b[12], b[13], b[14], b[15]} // RFC 2464 section 7
	case dst.IsMulticast():
		eth.DstMAC = net.HardwareAddr{1, 0, 0x5e, b[1] & 0x7f, b[2], b[3]} // RFC 1112 section 6.4
	default:
		eth.DstMAC = layers.EthernetBroadcast
	}
	if h.is4() {
		return eth, &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: h.addr.AsSlice(), DstIP: b}
	}
	eth.EthernetType = layers.EthernetTypeIPv6
	return eth, &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: proto, SrcIP: h.addr.AsSlice(), DstIP: b}
}

// checksummed is a layer above IP.
type checksummed interface {
	gopacket.SerializableLayer
	SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
}

func (h *fakeHost) transport(dst netip.Addr, proto layers.IPProtocol, l checksummed, b []byte) []byte {
	eth, ip := h.to(dst, proto)
	_ = l.SetNetworkLayerForChecksum(ip) // it is one
	return frame(eth, ip, l, gopacket.Payload(b))
}

func (h *fakeHost) udp(from, to uint16, b []byte) []byte { return h.udpTo(h.self, from, to, b) }

func (h *fakeHost) udpTo(dst netip.Addr, from, to uint16, b []byte) []byte {
	return h.transport(dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: layers.UDPPort(from), DstPort: layers.UDPPort(to)}, b)
}

func (h *fakeHost) tcp(segment layers.TCP, b []byte) []byte {
	segment.Window = 65535
	return h.transport(h.self, layers.IPProtocolTCP, &segment, b)
}

// fakeMSS is the payload of the largest segments that hosts take, in bytes.
const fakeMSS = 1400

// syn asks for a connection with the echo service.
func (h *fakeHost) syn(from uint16) []byte {
	mss := layers.TCPOption{
		OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: binary.BigEndian.AppendUint16(nil, fakeMSS),
	}
	return h.tcp(layers.TCP{SrcPort: layers.TCPPort(from), DstPort: echoPort, SYN: true, Seq: 1000, Options: []layers.TCPOption{mss}}, nil)
}

// reset ends what syn began.
func (h *fakeHost) reset(from uint16) []byte {
	return h.tcp(layers.TCP{SrcPort: layers.TCPPort(from), DstPort: echoPort, RST: true, Seq: 1001}, nil)
}

// raw is a packet with anything behind the IP header.
func (h *fakeHost) raw(proto layers.IPProtocol, b []byte) []byte {
	eth, ip := h.to(h.self, proto)
	return frame(eth, ip, gopacket.Payload(b))
}

// icmp is a message of ICMP or ICMPv6. second is the second word of its header,
// where for one the MTU is.
func (h *fakeHost) icmp(kind, code uint8, second uint32, b []byte) []byte {
	if h.is4() {
		eth, ip := h.to(h.self, layers.IPProtocolICMPv4)
		return frame(eth, ip, &layers.ICMPv4{
			TypeCode: layers.CreateICMPv4TypeCode(kind, code), Id: uint16(second >> 16), Seq: uint16(second),
		}, gopacket.Payload(b))
	}
	return h.transport(h.self, layers.IPProtocolICMPv6, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, code)},
		append(binary.BigEndian.AppendUint32(nil, second), b...))
}

// echo is a request that is to be answered.
func (h *fakeHost) echo(second uint32) []byte {
	if h.is4() {
		return h.icmp(echoRequest4, 0, second, []byte("echo"))
	}
	return h.icmp(echoRequest6, 0, second, []byte("echo"))
}

// solicit asks for the link address of the stack, and tells the host's own.
func (h *fakeHost) solicit() []byte { return h.solicitFor(h.self) }

func (h *fakeHost) solicitFor(target netip.Addr) []byte {
	if h.is4() {
		return frame(&layers.Ethernet{SrcMAC: h.mac, DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP}, &layers.ARP{
			AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
			Operation: layers.ARPRequest, SourceHwAddress: h.mac, SourceProtAddress: h.addr.AsSlice(),
			DstHwAddress: make([]byte, 6), DstProtAddress: target.AsSlice(),
		})
	}
	nodes := target.As16()
	copy(nodes[:], []byte{0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff}) // RFC 4291 section 2.7.1
	eth, ip := h.to(netip.AddrFrom16(nodes), layers.IPProtocolICMPv6)
	message := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	_ = message.SetNetworkLayerForChecksum(ip) // it is one
	return frame(eth, ip, message, &layers.ICMPv6NeighborSolicitation{
		TargetAddress: target.AsSlice(),
		Options:       layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: h.mac}},
	})
}

// got reports whether a packet is for the host alone.
func (h *fakeHost) got(p gopacket.Packet) bool {
	return p.LinkLayer().LinkFlow().Dst() == layers.NewMACEndpoint(h.mac)
}
