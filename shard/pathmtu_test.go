package shard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"numastack/dispatch"
)

// ipOf is the IP packet in a frame.
func ipOf(p gopacket.Packet) []byte { return p.Data()[ethernetLen:] }

// injectError has a router tell s what became of a packet. second is the ICMP
// header's second word.
func injectError(t *testing.T, s *Shard, kind, code uint8, second uint32, packet []byte) {
	t.Helper()
	rest := gopacket.Payload(packet)
	if packet[0]>>4 == 4 {
		inject(t, s, dispatch.VnetHeader{}, ethernetTo(s),
			&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolICMPv4, SrcIP: rawPeerAddr.AsSlice(), DstIP: packet[12:16]},
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(kind, code), Id: uint16(second >> 16), Seq: uint16(second)}, rest)
		return
	}
	ethernet := ethernetTo(s)
	ethernet.EthernetType = layers.EthernetTypeIPv6
	ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolICMPv6, SrcIP: addr6[0].AsSlice(), DstIP: packet[8:24]}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, code)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	inject(t, s, dispatch.VnetHeader{}, ethernet, ip, icmp, gopacket.Payload(binary.BigEndian.AppendUint32(nil, second)), rest)
}

// injectTooBig says that packet was larger than mtu.
func injectTooBig(t *testing.T, s *Shard, mtu uint32, packet []byte) {
	t.Helper()
	if packet[0]>>4 == 4 {
		injectError(t, s, 3, 4, mtu, packet) // RFC 1191 section 4
	} else {
		injectError(t, s, 2, 0, mtu, packet) // RFC 4443 section 3.2
	}
}

// TestTooBig: a router's word makes segments smaller, and all that was on its
// way is sent again at once, but only if it quotes something that was.
func TestTooBig(t *testing.T) {
	const size = 4000 // of up to 9 segments
	for _, test := range []struct {
		name    string
		mtu     uint32
		offset  uint32 // of the quoted segment, from what was acknowledged
		largest int    // payload sent then; 0: nothing is
		df      bool   // nobody else may cut it
	}{
		{"1300", 1300, 0, 1260, true},
		{"1499", 1499, 0, 1459, true},
		{"the last byte on its way", 1300, size - 1, 1260, true},
		{"not sent yet", 1300, size, 0, true},
		{"acknowledged", 1300, 1<<32 - 1, 0, true},
		{"far off", 1300, 1 << 31, 0, true},
		{"the link's own", 1500, 0, 0, true},
		{"552", 552, 0, 512, true},
		{"551", 551, 0, 512, false},
		{"68", 68, 0, 512, false},
		{"0", 0, 0, 512, false}, // a router older than RFC 1191
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			for _, g := range b.groups {
				g.link.gso = false // one frame per segment
			}
			r := newRawPeer(t, b)
			if n, err := r.conn.Write(make([]byte, size)); n != size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			quote := slices.Clone(ipOf(takeFrames(t, b)[0])[:28])
			binary.BigEndian.PutUint32(quote[24:], r.ack+test.offset)
			injectTooBig(t, b, test.mtu, quote)
			bytes, largest := 0, 0
			for _, p := range takeFrames(t, b) {
				n := len(p.Layer(layers.LayerTypeTCP).LayerPayload())
				bytes, largest = bytes+n, max(largest, n)
				if df := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4).Flags&layers.IPv4DontFragment != 0; df != test.df {
					t.Errorf("DF of a segment of %d bytes: %v, want %v", n, df, test.df)
				}
			}
			want, ignored := size, uint64(0)
			if test.largest == 0 {
				want, ignored = 0, 1
			}
			if bytes != want || largest != test.largest {
				t.Errorf("sent %d bytes again in segments of up to %d, want %d of up to %d", bytes, largest, want, test.largest)
			}
			if n := b.count().ErrorsIgnored; n != ignored {
				t.Errorf("%d errors ignored, want %d", n, ignored)
			}
			// The next connection knows.
			paths := uint64(1) - ignored
			if n := b.count().NarrowPaths; n != paths {
				t.Errorf("%d narrow paths known, want %d", n, paths)
			}
		})
	}
}

// TestTooBigAgain: a router says it of each packet. The second time there is
// nothing new in it, and nothing to send.
func TestTooBigAgain(t *testing.T) {
	_, b := steppedPair(t)
	r := newRawPeer(t, b)
	if _, err := r.conn.Write(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	quote := ipOf(takeFrames(t, b)[0])[:28]
	injectTooBig(t, b, 1300, quote)
	if n := len(r.receive()); n == 0 {
		t.Fatal("nothing was sent again")
	}
	outstanding := sending(r.conn.ep).Outstanding
	injectTooBig(t, b, 1300, quote)
	if got := r.receive(); len(got) != 0 || sending(r.conn.ep).Outstanding != outstanding {
		t.Errorf("sent %s %d segments count as outstanding, before %d", show(got), sending(r.conn.ep).Outstanding, outstanding)
	}
}

// TestTooBigWithOptions: the room that TCP options take counts. A link of PPPoE
// (RFC 2516 section 7) is too narrow by less than they take.
func TestTooBigWithOptions(t *testing.T) {
	a, b := steppedPair(t)
	var got []byte
	listenStepped(t, a, 7, &testHandler{data: func(_ *Conn, p []byte) int { got = append(got, p...); return len(p) }})
	for _, g := range b.groups {
		g.link.gso = false // one frame per segment
	}
	c := dialStepped(t, b, netip.AddrPortFrom(addrA, 7), &testHandler{})
	settle(t, a, b)
	sent := bytes.Repeat([]byte("0123456789"), 1000)
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	first := takeFrames(t, b) // lost
	largest := 0
	for _, p := range first {
		largest = max(largest, len(ipOf(p)))
	}
	injectTooBig(t, b, uint32(largest)-1, ipOf(first[0]))
	again := takeFrames(t, b)
	if len(again) <= len(first) {
		t.Errorf("%d packets in place of %d that were too large", len(again), len(first))
	}
	for _, p := range again {
		if n := len(ipOf(p)); n >= largest {
			t.Errorf("packet of %d bytes, the path carries %d", n, largest-1)
		}
	}
	for range 20 { // these are lost, too
		later(a, 100*time.Millisecond)
		later(b, 100*time.Millisecond)
		settle(t, a, b)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes arrived of %d, or not in order", len(got), len(sent))
	}
}

// TestTooBigInBulk: a narrow link takes one window to be sent again, and nothing
// else. It is no congestion, and no reason to wait for a timer.
func TestTooBigInBulk(t *testing.T) {
	const size = 1 << 20
	for _, pathMTU := range []int{1471, 1300, 700} {
		t.Run(fmt.Sprint(pathMTU), func(t *testing.T) {
			a, b := steppedPair(t)
			for _, g := range slices.Concat(a.groups, b.groups) {
				g.link.gso = false // one frame per segment
			}
			got := 0
			listenStepped(t, a, 7, &testHandler{data: func(_ *Conn, p []byte) int { got += len(p); return len(p) }})
			left := size
			write := func(c *Conn) {
				for n := 1; left > 0 && n > 0; left -= n {
					n, _ = c.Write(make([]byte, min(left, 10_000)))
				}
			}
			c := dialStepped(t, b, netip.AddrPortFrom(addrA, 7), &testHandler{writable: write})
			settle(t, a, b)
			write(c)
			tooBig := uint64(0)
			pass := func(from, to *Shard) (passed bool) {
				for _, p := range takeFrames(t, from) {
					passed = true
					if len(ipOf(p)) > pathMTU {
						tooBig++
						injectTooBig(t, from, uint32(pathMTU), ipOf(p)[:28])
						continue
					}
					inject(t, to, dispatch.VnetHeader{}, gopacket.Payload(p.Data()))
				}
				return passed
			}
			for passed := true; passed; {
				there := pass(b, a)
				passed = pass(a, b) || there // with what the router has told b
			}
			stats := c.g.stack.Stats().TCP
			if got != size || tooBig == 0 {
				t.Errorf("%d of %d bytes arrived without a timer; %d packets were too big", got, size, tooBig)
			}
			if n := stats.Retransmits.Value(); n > tcp.InitialCwnd {
				t.Errorf("%d retransmissions, the first window was %d", n, tcp.InitialCwnd)
			}
			if n := stats.SACKRecovery.Value() + stats.FastRecovery.Value() + stats.Timeouts.Value(); n != 0 {
				t.Errorf("taken for congestion %d times", n)
			}
		})
	}
}

func later(s *Shard, d time.Duration) { (&rawPeer{s: s}).later(d) }

// TestPathOfNewConnection: what TCP has learnt holds for later connections to
// the same host, what was said of datagrams does not, and none of it for ever.
func TestPathOfNewConnection(t *testing.T) {
	to := tcpipAddress(rawPeerAddr)
	for _, test := range []struct {
		name  string
		learn func(s *Shard)
		want  int
	}{
		{"nothing known", func(*Shard) {}, 1460},
		{"a segment", func(s *Shard) { s.learn(to, 1300, true) }, 1260},
		{"segments", func(s *Shard) { s.learn(to, 1300, true); s.learn(to, 1400, true) }, 1260},
		{"a datagram", func(s *Shard) { s.learn(to, 600, false) }, 1460},
		{"both", func(s *Shard) { s.learn(to, 600, false); s.learn(to, 1300, true) }, 1260},
		{"another host", func(s *Shard) { s.learn(tcpipAddress(addrA), 1300, true) }, 1460},
		{"long ago", func(s *Shard) { s.learn(to, 1300, true); later(s, time.Duration(narrowPathTime)) }, 1460},
		{"not that long ago", func(s *Shard) {
			s.learn(to, 1300, true)
			later(s, time.Duration(narrowPathTime)-time.Second)
		}, 1260},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			for _, g := range b.groups {
				g.link.gso = false
			}
			test.learn(b)
			r := newRawPeer(t, b)
			if _, err := r.conn.Write(make([]byte, 5000)); err != nil {
				t.Fatal(err)
			}
			if n := largestPayload(r.receive()); n != test.want {
				t.Errorf("segments of up to %d bytes, want %d", n, test.want)
			}
		})
	}
}

// TestNarrowPaths: what a shard knows has a limit, and an end.
func TestNarrowPaths(t *testing.T) {
	_, b := steppedPair(t)
	host := func(i int) tcpip.Address { return tcpip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }
	for i := range maxNarrowPaths + 7 {
		if !b.learn(host(i), 1300, true) {
			t.Fatalf("path %d is not news", i)
		}
	}
	if b.learn(host(maxNarrowPaths+6), 1300, true) || b.learn(host(maxNarrowPaths+6), 1400, false) {
		t.Error("what is known is news")
	}
	if c := b.count(); c.NarrowPaths != maxNarrowPaths || c.PathsForgotten != 7 {
		t.Errorf("%d paths known and %d forgotten, want %d and 7", c.NarrowPaths, c.PathsForgotten, maxNarrowPaths)
	}
	if b.learn(host(9000), 1300, false) || b.count().NarrowPaths != maxNarrowPaths {
		t.Error("a word about a datagram has taken the place of what is proved")
	}
	b.now += narrowPathTime
	if !b.learn(host(9000), 1300, false) {
		t.Error("a path has not taken the place of one that is forgotten")
	}
	b.now += narrowPathTime
	if p := b.path(host(maxNarrowPaths + 6)); p.mtu != noMTU || p.proved != noMTU {
		t.Errorf("%+v is known after its time", p)
	}
	if n := b.count().NarrowPaths; n != 0 {
		t.Errorf("%d paths known after their time", n)
	}
}

// TestEveryShardLearns: flow groups of all shards send to the same host.
func TestEveryShardLearns(t *testing.T) {
	_, b := startWide(t, 3, 12)
	if err := b.groups[0].do(func(g *Group) error { g.learn(tcpipAddress(addrA), 1300, true); return nil }); err != nil {
		t.Fatal(err)
	}
	for i, c := range b.Stats() { // behind what the shards tell each other
		if c.NarrowPaths != 1 {
			t.Errorf("shard %d knows %d narrow paths, want 1", i, c.NarrowPaths)
		}
	}
}

// TestNarrowDatagrams: what is too large for the path leaves in fragments that
// fit once that is known, and a connected socket is told of the one that was
// lost, as by Linux.
func TestNarrowDatagrams(t *testing.T) {
	const pathMTU, port = 1300, 9
	for _, test := range []struct {
		name     string
		self, to netip.Addr
		headers  int
	}{
		{"IPv4", addrB, addrA, 28},
		{"IPv6", addr6[1], addr6[0], 48},
	} {
		for _, connected := range []bool{false, true} {
			t.Run(test.name+map[bool]string{true: "/connected"}[connected], func(t *testing.T) {
				a, b := steppedPair(t)
				var got [][]byte
				for _, g := range a.groups {
					if _, err := g.listenUDP(netip.AddrPortFrom(test.to, port), func(_ *Socket, b []byte, _ netip.AddrPort) { got = append(got, slices.Clone(b)) }); err != nil {
						t.Fatal(err)
					}
				}
				to := netip.AddrPortFrom(test.to, port)
				home := b.groups[b.set.groupOf(protoUDP, netip.AddrPortFrom(test.self, port), to)]
				s, err := home.listenUDP(netip.AddrPortFrom(test.self, port), func(*Socket, []byte, netip.AddrPort) {})
				if err != nil {
					t.Fatal(err)
				}
				var failed []error
				if connected {
					if err := s.connect(to, func(err error) { failed = append(failed, err) }); err != nil {
						t.Fatal(err)
					}
				}
				sent := byte(0)
				send := func(size int) []byte {
					t.Helper()
					sent++
					b := bytes.Repeat([]byte{sent}, size-test.headers)
					if n, err := s.WriteTo(b, to); n != len(b) || err != nil {
						t.Fatalf("WriteTo = %d, %v", n, err)
					}
					return b
				}
				arrives := func(size int) {
					t.Helper()
					got = nil
					want := send(size)
					settle(t, a, b)
					if len(got) != 1 || !bytes.Equal(got[0], want) {
						t.Fatalf("%d datagrams arrived, want the one of %d bytes", len(got), len(want))
					}
				}
				arrives(100) // now the peer's address is known
				// packets sends a datagram and returns the packets it leaves in.
				packets := func(size int) []gopacket.Packet {
					t.Helper()
					send(size)
					return takeFrames(t, b)
				}
				// What a router would not say: that a datagram was too large that
				// fits, or a path that IPv6 does not have (RFC 8201 section 4).
				lost := packets(1400)
				injectTooBig(t, b, 1400, ipOf(lost[0]))
				nonsense := uint64(1)
				if test.self.Is6() {
					injectTooBig(t, b, 1279, ipOf(lost[0]))
					nonsense++
				}
				if got := packets(1400); len(got) != 1 || b.count().ErrorsIgnored != nonsense || len(failed) != 0 {
					t.Fatalf("after nonsense: %d packets, %d errors ignored, told %v; want 1, %d, nothing", len(got), b.count().ErrorsIgnored, failed, nonsense)
				}
				injectTooBig(t, b, pathMTU, ipOf(lost[0])[:test.headers]) // as much as any router quotes
				settle(t, b)
				if connected && !slices.Equal(failed, []error{syscall.EMSGSIZE}) || !connected && len(failed) != 0 {
					t.Errorf("told %v of the lost datagram", failed)
				}
				for _, size := range []int{pathMTU, pathMTU + 1, 1500, 1501, 5000, pathMTU} {
					fits := size <= pathMTU
					ids := make(map[uint32]bool)
					for range 2 {
						sent := packets(size)
						if (len(sent) == 1) != fits {
							t.Errorf("%d bytes in %d packets, the path carries %d", size, len(sent), pathMTU)
						}
						for _, p := range sent {
							if n := len(ipOf(p)); n > pathMTU {
								t.Errorf("packet of %d bytes, the path carries %d", n, pathMTU)
							}
							id, df := fragmentID(p)
							ids[id] = true
							if df != (fits && test.self.Is4()) {
								t.Errorf("DF of one of %d packets: %v", len(sent), df)
							}
						}
					}
					if !fits && len(ids) != 2 {
						t.Errorf("fragments of 2 datagrams have %d identifications", len(ids))
					}
					arrives(size)
				}
				later(b, time.Duration(narrowPathTime))
				settle(t, b)
				if got := packets(1500); len(got) != 1 || len(ipOf(got[0])) != 1500 {
					t.Errorf("a datagram of the link's size leaves in %d packets when the path's size is old", len(got))
				}
			})
		}
	}
}

// fragmentID is the identification of a fragment, and whether it may not be cut.
func fragmentID(p gopacket.Packet) (id uint32, df bool) {
	if ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
		return uint32(ip.Id), ip.Flags&layers.IPv4DontFragment != 0
	}
	if f, ok := p.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment); ok {
		return f.Identification, false
	}
	return 0, false
}

// TestErrorsInHandshake: an error ends a connection that is being opened if it
// quotes the very segment that was sent (RFC 5927 section 4.1).
func TestErrorsInHandshake(t *testing.T) {
	unreachable := func(t *testing.T, s *Shard, sent gopacket.Packet, offset uint32) {
		t.Helper()
		quote := slices.Clone(ipOf(sent)[:28])
		binary.BigEndian.PutUint32(quote[24:], binary.BigEndian.Uint32(quote[24:])+offset)
		injectError(t, s, 3, 3, 0, quote) // port unreachable
		settle(t, s)
	}
	forgeries := []uint32{1, 1<<32 - 1, 1 << 31}
	t.Run("dialed", func(t *testing.T) {
		_, b := steppedPair(t)
		newRawPeer(t, b) // its address is known now
		var end error
		c := dialStepped(t, b, netip.AddrPortFrom(rawPeerAddr, 7), &testHandler{close: func(_ *Conn, err error) { end = err }})
		sent := takeFrames(t, b)
		if len(sent) != 1 {
			t.Fatalf("%d frames, want a SYN", len(sent))
		}
		for _, offset := range forgeries {
			unreachable(t, b, sent[0], offset)
		}
		if state := tcp.EndpointState(c.ep.State()); state != tcp.StateSynSent || b.count().ErrorsIgnored != uint64(len(forgeries)) {
			t.Fatalf("state %v after forgeries, %v; %d errors ignored", state, end, b.count().ErrorsIgnored)
		}
		unreachable(t, b, sent[0], 0)
		if !errors.Is(end, syscall.ECONNREFUSED) {
			t.Errorf("ended with %v, want ECONNREFUSED", end)
		}
	})
	for _, refused := range []bool{false, true} {
		t.Run(map[bool]string{false: "accepted", true: "accepted, refused"}[refused], func(t *testing.T) {
			_, b := steppedPair(t)
			r := newRawPeer(t, b) // another connection; its peer opens one more
			first := r.conn
			r.port, r.seq, r.ack = rawPort+1, 5000, 0
			r.send(&layers.TCP{SYN: true}, 0, "")
			sent := takeFrames(t, b)
			if len(sent) != 1 {
				t.Fatalf("SYN was answered with %d frames", len(sent))
			}
			for _, offset := range forgeries {
				unreachable(t, b, sent[0], offset)
			}
			if n := b.count().ErrorsIgnored; n != uint64(len(forgeries)) {
				t.Errorf("%d errors ignored, want %d", n, len(forgeries))
			}
			if refused {
				unreachable(t, b, sent[0], 0)
			}
			r.seq++
			r.ack = sent[0].Layer(layers.LayerTypeTCP).(*layers.TCP).Seq + 1
			r.send(&layers.TCP{ACK: true}, 0, "")
			settle(t, b)
			if open := r.conn != first; open == refused {
				t.Errorf("connection open: %v", open)
			}
		})
	}
}
