package shard

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

// countingTransport counts the packets that reach the netstack above IP.
type countingTransport struct {
	stack.TransportDispatcher
	packets int
}

func (c *countingTransport) DeliverTransportPacket(proto tcpip.TransportProtocolNumber, pkt *stack.PacketBuffer) stack.TransportPacketDisposition {
	c.packets++
	return c.TransportDispatcher.DeliverTransportPacket(proto, pkt)
}

// countTransport counts those of a flow group from now on.
func countTransport(g *Group) *countingTransport {
	c := &countingTransport{TransportDispatcher: g.transport}
	g.transport = c
	return c
}

// TestShortWay: a request and its answer are two frames, and the netstack's IP
// layer sees neither.
func TestShortWay(t *testing.T) {
	for _, remote := range []netip.Addr{addrB, addr6[1]} {
		t.Run(remote.String(), func(t *testing.T) {
			a, b := steppedPair(t)
			var g *Group
			h := echoHandler()
			h.open = func(c *Conn) { g = c.g }
			listenStepped(t, b, 7, h)
			var got int
			client := dialStepped(t, a, netip.AddrPortFrom(remote, 7), &testHandler{data: func(_ *Conn, p []byte) int { got += len(p); return len(p) }})
			settle(t, a, b)
			exchange := func() {
				if _, err := client.Write([]byte("request")); err != nil {
					t.Fatal(err)
				}
				settle(t, a, b)
			}
			exchange()
			packets, before := g.stack.Stats().IP.PacketsReceived.Value(), b.count()
			above := countTransport(g)
			const rounds = 10
			for range rounds {
				exchange()
			}
			after := b.count()
			if want := (1 + rounds) * len("request"); got != want {
				t.Fatalf("the echo brought %d bytes, want %d", got, want)
			}
			if n := after.TxFrames - before.TxFrames; n != rounds {
				t.Errorf("%d frames sent for %d answers", n, rounds)
			}
			if n := after.AcksSuperseded - before.AcksSuperseded; n != rounds {
				t.Errorf("%d superseded ACKs counted for %d answers", n, rounds)
			}
			if n := g.stack.Stats().IP.PacketsReceived.Value() - packets + uint64(above.packets); n != 0 {
				t.Errorf("%d of %d packets took the netstack's way", n, rounds)
			}
			if g.frames < rounds {
				t.Errorf("%d frames counted", g.frames)
			}
			client.Close()
			settle(t, a, b)
			if n := len(g.flows) + len(client.g.flows); n != 0 {
				t.Errorf("%d flows left after both ends closed", n)
			}
		})
	}
}

// TestStrangersNeedNoIP: the segments of a handshake go past IP as well, unless there is
// something that IP has to judge.
func TestStrangersNeedNoIP(t *testing.T) {
	self4, self6 := addrB.String(), addr6[1].String()
	for _, test := range []struct {
		name, from, to string
		change         func(ip4 *layers.IPv4, ip6 *layers.IPv6)
		past           bool
	}{
		{"IPv4", addrA.String(), self4, nil, true},
		{"IPv6", addr6[0].String(), self6, nil, true},
		{"from beyond the link", "192.0.2.1", self4, nil, true},
		{"to another host", addrA.String(), "10.1.0.7", nil, false},
		{"to all", addrA.String(), "10.1.0.255", nil, false},
		{"to a multicast group", addrA.String(), "224.0.0.1", nil, false},
		{"from a multicast group", "224.0.0.1", self4, nil, false},
		{"from all", "10.1.0.255", self4, nil, false},
		{"from ourselves", self4, self4, nil, false},
		{"from IPv6's ourselves", self6, self6, nil, false},
		{"from an IPv4 address in IPv6", "::ffff:192.0.2.1", self6, nil, false},
		{"with options", addrA.String(), self4, func(ip4 *layers.IPv4, _ *layers.IPv6) {
			ip4.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}}
		}, false},
		{"a fragment", addrA.String(), self4, func(ip4 *layers.IPv4, _ *layers.IPv6) { ip4.Flags = layers.IPv4MoreFragments }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			listenStepped(t, b, 7, &testHandler{})
			var above []*countingTransport
			for _, g := range b.groups {
				above = append(above, countTransport(g))
			}
			from, to := netip.MustParseAddr(test.from), netip.MustParseAddr(test.to)
			eth := ethernetTo(b)
			ip4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
			ip6 := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
			if test.change != nil {
				test.change(ip4, ip6)
			}
			tcp := &layers.TCP{SrcPort: 1000, DstPort: 7, SYN: true, Window: 1000}
			var network gopacket.SerializableLayer = ip4
			if to.Is6() {
				eth.EthernetType, network = layers.EthernetTypeIPv6, ip6
			}
			if err := tcp.SetNetworkLayerForChecksum(network.(gopacket.NetworkLayer)); err != nil {
				t.Fatal(err)
			}
			inject(t, b, dispatch.VnetHeader{}, eth, network, tcp)
			settle(t, b)
			past := 0
			for _, c := range above {
				past += c.packets
			}
			if (past == 1) != test.past {
				t.Errorf("%d packets went past IP, want that it does: %t", past, test.past)
			}
		})
	}
}

// TestLargeFrame: the payload of a large frame reaches the handler in one piece,
// so that its echo is one frame, too.
func TestLargeFrame(t *testing.T) {
	for _, remote := range []netip.Addr{addrB, addr6[1]} {
		t.Run(remote.String(), func(t *testing.T) {
			a, b := steppedPair(t)
			listenStepped(t, b, 7, echoHandler())
			var pieces []int
			client := dialStepped(t, a, netip.AddrPortFrom(remote, 7), &testHandler{data: func(_ *Conn, p []byte) int {
				pieces = append(pieces, len(p))
				return len(p)
			}})
			settle(t, a, b)
			before := b.count().TxFrames
			const size = 10_000
			if _, err := client.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			settle(t, a, b)
			if !slices.Equal(pieces, []int{size}) {
				t.Errorf("the echo came in pieces of %d bytes, want one of %d", pieces, size)
			}
			if n := b.count().TxFrames - before; n != 1 {
				t.Errorf("%d frames sent for one echo", n)
			}
		})
	}
}

// rawPeer is the other end of a connection, frame by frame.
type rawPeer struct {
	t        *testing.T
	s        *Shard
	h        *testHandler
	conn     *Conn
	addr     netip.Addr
	port     layers.TCPPort
	got      string // what the handler received
	seq, ack uint32 // what it sends next, and has acknowledged
}

const rawPort = 40_000

var rawPeerAddr = netip.MustParseAddr("10.1.0.9")

// newRawPeer opens a connection to port 7 of s.
func newRawPeer(t *testing.T, s *Shard) *rawPeer { return newRawPeerAt(t, s, rawPeerAddr) }

// newRawPeerAt opens one from addr, which the host at rawPeerAddr has or routes,
// with more TCP options.
func newRawPeerAt(t *testing.T, s *Shard, addr netip.Addr, options ...layers.TCPOption) *rawPeer {
	t.Helper()
	r := &rawPeer{t: t, s: s, addr: addr, port: rawPort, seq: 1000}
	r.h = &testHandler{
		open: func(c *Conn) { r.conn = c },
		data: func(_ *Conn, p []byte) int { r.got += string(p); return len(p) },
	}
	listenStepped(t, s, 7, r.h)
	local := addrB.As4()
	inject(t, s, dispatch.VnetHeader{}, // so that its address is known
		&layers.Ethernet{SrcMAC: []byte{2, 0, 0, 0, 0, 9}, DstMAC: []byte{255, 255, 255, 255, 255, 255}, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
			Operation: layers.ARPRequest, SourceHwAddress: []byte{2, 0, 0, 0, 0, 9}, SourceProtAddress: rawPeerAddr.AsSlice(),
			DstHwAddress: make([]byte, 6), DstProtAddress: local[:],
		})
	r.receive()
	mss := layers.TCPOption{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{1460 >> 8, 1460 & 0xff}}
	r.send(&layers.TCP{SYN: true, Options: append(options, mss)}, 0, "")
	answer := r.receive()
	if len(answer) != 1 || !answer[0].SYN || !answer[0].ACK {
		t.Fatalf("SYN was answered with %s", show(answer))
	}
	r.seq++
	r.ack = answer[0].Seq + 1
	r.send(&layers.TCP{ACK: true}, 0, "")
	if answer := r.receive(); len(answer) != 0 || r.conn == nil {
		t.Fatalf("end of the handshake was answered with %s, connection open: %v", show(answer), r.conn != nil)
	}
	return r
}

// ip is the header of what it sends.
func (r *rawPeer) ip() *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: r.addr.AsSlice(), DstIP: addrB.AsSlice()}
}

// send sends a segment that begins offset bytes after what was sent before, and
// does not remember it.
func (r *rawPeer) send(tcp *layers.TCP, offset uint32, payload string) {
	r.t.Helper()
	r.sendIP(r.ip(), tcp, offset, payload)
}

func (r *rawPeer) sendIP(ip *layers.IPv4, tcp *layers.TCP, offset uint32, payload string) {
	r.t.Helper()
	tcp.SrcPort, tcp.DstPort, tcp.Seq, tcp.Ack, tcp.Window = r.port, 7, r.seq+offset, r.ack, cmp.Or(tcp.Window, 65535)
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		r.t.Fatal(err)
	}
	inject(r.t, r.s, dispatch.VnetHeader{}, ethernetTo(r.s), ip, tcp, gopacket.Payload(payload))
}

// data sends the next bytes of the stream in one segment.
func (r *rawPeer) data(payload string) {
	r.t.Helper()
	r.send(&layers.TCP{ACK: true, PSH: true}, 0, payload)
	r.seq += uint32(len(payload))
}

// receive runs the shard and returns the segments that it sent.
func (r *rawPeer) receive() (segments []*layers.TCP) {
	r.t.Helper()
	for _, p := range takeFrames(r.t, r.s) {
		if tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP); ok {
			segments = append(segments, tcp)
		}
	}
	return segments
}

// takeFrames runs the shard and returns what it sent, which nobody else gets.
func takeFrames(t *testing.T, s *Shard) (frames []gopacket.Packet) {
	t.Helper()
	settle(t, s)
	fd, _ := cables.Load(s.queue.FD())
	queue := dispatch.NewQueue(fd.(int))
	for {
		frame := make([]byte, rxBufferLen)
		n, errno := queue.Read(frame)
		if errno != 0 {
			return frames
		}
		frames = append(frames, gopacket.NewPacket(frame[dispatch.VnetHeaderLen:n], layers.LayerTypeEthernet, gopacket.Default))
	}
}

// later moves the shard's clock.
func (r *rawPeer) later(d time.Duration) {
	*delayed(r.s) = d
}

// want receives and checks that there are n pure ACKs, the last one of
// everything up to seq.
func (r *rawPeer) want(what string, n int, seq uint32) {
	r.t.Helper()
	got := r.receive()
	if len(got) != n {
		r.t.Fatalf("%s: answered with %d segments, want %d: %s", what, len(got), n, show(got))
	}
	for _, tcp := range got {
		if len(tcp.Payload) > 0 || !tcp.ACK || tcp.Ack != seq {
			r.t.Errorf("%s: answered with %s, want ack %d", what, show(got), seq)
		}
	}
}

func show(segments []*layers.TCP) (s string) {
	for _, tcp := range segments {
		s += fmt.Sprintf("[syn %v fin %v rst %v ack %d, %d bytes]", tcp.SYN, tcp.FIN, tcp.RST, tcp.Ack, len(tcp.Payload))
	}
	return s + "."
}

// TestAcknowledgements: when a pure ACK is sent (RFC 5681 section 4.2).
func TestAcknowledgements(t *testing.T) {
	_, b := steppedPair(t)
	r := newRawPeer(t, b)

	// Nobody answers: the first one waits as long as it may.
	r.data("one")
	r.want("a segment", 0, 0)
	r.later(ackDelay / 2)
	r.want("half the delay later", 0, 0)
	r.later(ackDelay / 2)
	r.want("after the delay", 1, r.seq)
	r.later(ackDelay)
	r.want("another delay later", 0, 0)

	// An application that only listens is not waited for.
	for range quickAcks {
		r.data("more")
		r.want("a segment after a delay in vain", 1, r.seq)
	}
	r.data("and more")
	r.want("a segment after those", 0, 0)

	// The second segment ends the wait of the first.
	r.data("second")
	r.want("a second segment", 1, r.seq)
	r.later(2 * ackDelay)
	r.want("a delay after that", 0, 0)

	// More than a usual segment in one frame is not kept waiting either.
	r.data(strings.Repeat("x", 1461))
	r.want("a super-frame", 1, r.seq)

	// Segments that do not continue the stream are answered at once, all of them.
	r.send(&layers.TCP{ACK: true}, 3, "def")
	r.want("a segment behind a gap", 1, r.seq)
	r.data("abc")
	r.seq += 3
	r.want("the segment that fills it", 1, r.seq)
	r.send(&layers.TCP{ACK: true}, ^uint32(2), "def")
	r.want("a segment that was there before", 1, r.seq)

	// Also the one that fills part of a gap.
	r.send(&layers.TCP{ACK: true}, 6, "ghi")
	r.want("a segment behind a wide gap", 1, r.seq)
	r.data("abc")
	r.want("a segment that fills part of it", 1, r.seq)
	r.data("def")
	r.seq += 3
	r.want("the segment that fills the rest", 1, r.seq)

	// A pure ACK of the peer does not make it wait longer.
	r.data("wait")
	r.want("a segment", 0, 0)
	r.later(ackDelay / 2)
	r.send(&layers.TCP{ACK: true}, 0, "")
	r.want("a pure ACK meanwhile", 0, 0)
	r.later(ackDelay / 2)
	r.want("after the delay", 1, r.seq)
	for range quickAcks {
		r.data("more")
		r.want("a segment after a delay in vain", 1, r.seq)
	}

	// An answer carries the acknowledgement, also one that waited.
	var answer string
	r.h.data = func(c *Conn, p []byte) int {
		if _, err := c.Write([]byte(answer)); err != nil {
			t.Error(err)
		}
		return len(p)
	}
	r.data("wait")
	r.want("a segment that is not answered", 0, 0)
	if n := len(b.delayed.all); n != 1 {
		t.Errorf("%d acknowledgements wait, want 1", n)
	}
	answer = "here"
	r.data("now")
	if got := r.receive(); len(got) != 1 || string(got[0].Payload) != answer || got[0].Ack != r.seq {
		t.Errorf("answered with %s, want one segment with ack %d", show(got), r.seq)
	}
	r.ack += uint32(len(answer))
	r.later(2 * ackDelay)
	r.want("long after the answer", 0, 0)

	// So the next one waits anew, and as long.
	r.h.data = nil
	r.data("wait")
	r.want("a segment after an answer", 0, 0)
	if want := b.now + int64(ackDelay); b.deadline() > want {
		t.Errorf("the shard sleeps until %d, want %d", b.deadline(), want)
	}
	r.later(ackDelay / 2)
	r.want("half a delay later", 0, 0)
	if _, err := r.conn.Write([]byte(answer)); err != nil {
		t.Fatal(err)
	}
	if got := r.receive(); len(got) != 1 || got[0].Ack != r.seq {
		t.Errorf("wrote %s, want one segment with ack %d", show(got), r.seq)
	}
	r.ack += uint32(len(answer))
	r.data("wait")
	r.want("another segment", 0, 0)
	r.later(ackDelay * 3 / 4)
	r.want("after the delay of the one that was answered", 0, 0)
	r.later(ackDelay / 4)
	r.want("after its own delay", 1, r.seq)

	// A FIN is acknowledged at once.
	r.send(&layers.TCP{ACK: true, FIN: true}, 0, "bye")
	got := r.receive()
	if len(got) == 0 || got[0].Ack != r.seq+4 {
		t.Errorf("FIN was answered with %s, want ack %d", show(got), r.seq+4)
	}
	if n := len(b.delayed.all) + len(b.owed); n != 0 {
		t.Errorf("%d acknowledgements wait for a connection that is over", n)
	}
}

// TestSegmentsOffTheShortWay: what an open connection's frames may have wrong
// or unusual.
func TestSegmentsOffTheShortWay(t *testing.T) {
	_, b := steppedPair(t)
	r := newRawPeer(t, b)
	ip := r.conn.g.stack.Stats().IP
	segment := &layers.TCP{ACK: true, PSH: true}
	const payload = "payload"

	frame := func() []byte {
		buf := gopacket.NewSerializeBuffer()
		head := r.ip()
		segment.SrcPort, segment.DstPort, segment.Seq, segment.Ack, segment.Window = rawPort, 7, r.seq, r.ack, 65535
		_ = segment.SetNetworkLayerForChecksum(head)
		if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ethernetTo(b), head, segment, gopacket.Payload(payload)); err != nil {
			t.Fatal(err)
		}
		return append(make([]byte, dispatch.VnetHeaderLen), buf.Bytes()...)
	}

	bad := frame()
	bad[len(bad)-1]++
	write(t, b, bad)
	settle(t, b)
	if n := b.count().Groups[r.conn.g.id].ChecksumErrors; r.got != "" || n != 1 {
		t.Errorf("wrong TCP checksum: received %q, %d errors counted", r.got, n)
	}

	bad = frame()
	bad[dispatch.VnetHeaderLen+ethernetLen+10]++
	malformed := ip.MalformedPacketsReceived.Value()
	write(t, b, bad)
	settle(t, b)
	if n := ip.MalformedPacketsReceived.Value() - malformed; r.got != "" || n != 1 {
		t.Errorf("wrong IP checksum: received %q, %d errors counted", r.got, n)
	}

	packets := ip.PacketsReceived.Value()
	withOptions := r.ip()
	withOptions.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}} // no operation, end (RFC 791)
	r.sendIP(withOptions, &layers.TCP{ACK: true, PSH: true}, 0, payload)
	r.seq += uint32(len(payload))
	settle(t, b)
	if n := ip.PacketsReceived.Value() - packets; r.got != payload || n != 1 {
		t.Errorf("IP options: received %q, want %q; %d packets went through IP", r.got, payload, n)
	}

	// Another connection has the same hash.
	other := &Conn{ep: r.conn.ep}
	b.groups[r.conn.g.id].flows[r.conn.flow.hash] = other
	r.data(payload)
	settle(t, b)
	if r.got != payload+payload {
		t.Errorf("same hash: received %q, want %q", r.got, payload+payload)
	}
	if other.flow.waiting != 0 {
		t.Error("a segment was given to the connection with the same hash")
	}
	r.conn.g.addFlow(r.conn)
	if r.conn.g.removeFlow(r.conn); r.conn.g.flows[r.conn.flow.hash] != other {
		t.Error("the other one was forgotten")
	}
	r.conn.g.flows[r.conn.flow.hash] = r.conn

	// It is open no more, on one side.
	if err := r.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	r.receive()
	packets = ip.PacketsReceived.Value()
	above := countTransport(r.conn.g)
	r.data(payload)
	settle(t, b)
	if n := ip.PacketsReceived.Value() - packets; r.got != payload+payload+payload || n != 0 || above.packets != 1 {
		t.Errorf("after CloseWrite: received %q; %d packets went through IP, %d to the netstack above", r.got, n, above.packets)
	}

	// A reset ends the connection also on the short way.
	var closed error
	r.h.close = func(_ *Conn, err error) { closed = err }
	r.send(&layers.TCP{RST: true, ACK: true}, 0, "")
	settle(t, b)
	if closed == nil || len(r.conn.g.flows) != 0 {
		t.Errorf("reset: closed with %v, %d flows left", closed, len(r.conn.g.flows))
	}
}

// TestDelayedAckQueue: entries leave by time, also one that has to wait anew.
func TestDelayedAckQueue(t *testing.T) {
	var q delayedAckQueue
	for _, at := range []int64{10, 20, 30} {
		q.push(delayedAck{at: at})
	}
	if d := q.pop(); d.at != 10 {
		t.Fatalf("the first one is for %d, want 10", d.at)
	}
	for _, at := range []int64{21, 15, 31} {
		q.push(delayedAck{at: at})
	}
	for _, want := range []int64{15, 20, 21, 30, 31} {
		if q.next() != want {
			t.Errorf("the next one is due at %d, want %d", q.next(), want)
		}
		if d := q.pop(); d.at != want {
			t.Errorf("an entry for %d comes, want %d", d.at, want)
		}
	}
	if q.next() != never {
		t.Error("the empty queue has something due")
	}
}
