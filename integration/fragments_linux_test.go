package integration

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"numastack/stack"
)

// cut makes fragments of size bytes, a multiple of 8, of what a packet carries.
func (h *fakeHost) cut(proto layers.IPProtocol, id uint32, size int, l4 []byte) (frames [][]byte) {
	for at := 0; at < len(l4); at += size {
		end := min(at+size, len(l4))
		frames = append(frames, h.fragment(proto, id, at, end < len(l4), l4[at:end]))
	}
	return frames
}

// newID returns an even number, which the host has not used to tell its
// fragmented packets apart.
func (h *fakeHost) newID() uint32 {
	h.id += 2
	return h.id
}

// fragment is a piece of a packet; at is in bytes.
func (h *fakeHost) fragment(proto layers.IPProtocol, id uint32, at int, more bool, b []byte) []byte {
	if !h.is4() {
		header := binary.BigEndian.AppendUint32([]byte{byte(proto), 0, byte(at >> 8), byte(at)}, id)
		if more {
			header[3] |= 1
		}
		return h.raw(layers.IPProtocolIPv6Fragment, append(header, b...))
	}
	eth, ip := h.to(h.self, proto)
	v4 := ip.(*layers.IPv4)
	v4.Id, v4.FragOffset = uint16(id), uint16(at/8)
	if more {
		v4.Flags = layers.IPv4MoreFragments
	}
	return frame(eth, v4, gopacket.Payload(b))
}

// sink keeps the datagrams that arrive at the discard port.
type sink struct {
	mu  sync.Mutex
	got map[netip.AddrPort][]delivered // by sender; guarded by mu
}

type delivered struct {
	b     []byte
	shard int
}

func (l *link) openSink(t *testing.T) *sink {
	t.Helper()
	s := &sink{got: make(map[netip.AddrPort][]delivered)}
	if _, err := l.HandleUDP("udp", fmt.Sprint(":", discardPort), func(at *stack.Socket, b []byte, from netip.AddrPort) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.got[from] = append(s.got[from], delivered{bytes.Clone(b), at.Shard()})
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

// empty returns what has arrived since the last call.
func (s *sink) empty() map[netip.AddrPort][]delivered {
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.got
	s.got = make(map[netip.AddrPort][]delivered)
	return got
}

// fragmented is a datagram in pieces.
type fragmented struct {
	from    netip.AddrPort
	payload []byte
	frames  [][]byte
}

// datagrams makes one of each flow of the hosts, in four fragments.
func datagrams(hosts []*fakeHost, ports uint16) (all []fragmented) {
	const size = 1000
	for _, h := range hosts {
		for port := range ports {
			d := fragmented{from: netip.AddrPortFrom(h.addr, 2000+port), payload: payload(rand.Uint64(), 3*size+1+int(port))}
			whole := h.udp(d.from.Port(), discardPort, d.payload)
			d.frames = h.cut(layers.IPProtocolUDP, h.newID(), size, whole[h.headers():])
			all = append(all, d)
		}
	}
	return all
}

// TestFragmentedDatagrams sends fragments in every order in which they may come.
// Each datagram reaches its socket on the shard of its flow, once, wherever the
// flow group is in which the fragments of its addresses meet; if a piece is
// missing, or two overlap, it does not.
func TestFragmentedDatagrams(t *testing.T) {
	orders := []struct {
		name    string
		arrange func(all []fragmented) [][]byte
		lost    bool
	}{
		{"in order", eachInTurn(func(f [][]byte) [][]byte { return f }), false},
		{"reversed", eachInTurn(func(f [][]byte) [][]byte { slices.Reverse(f); return f }), false},
		{"twice", eachInTurn(func(f [][]byte) [][]byte { return [][]byte{f[0], f[0], f[1], f[1], f[2], f[2], f[3], f[3]} }), false},
		{"twice, first one last", eachInTurn(func(f [][]byte) [][]byte { return [][]byte{f[1], f[1], f[2], f[2], f[3], f[3], f[0], f[0]} }), false},
		{"interleaved", func(all []fragmented) (frames [][]byte) {
			for i := range all[0].frames {
				for n, d := range all {
					frames = append(frames, d.frames[(i+n)%len(d.frames)])
				}
			}
			return frames
		}, false},
		{"shuffled", func(all []fragmented) [][]byte {
			frames := eachInTurn(func(f [][]byte) [][]byte { return f })(all)
			rand.Shuffle(len(frames), func(i, j int) { frames[i], frames[j] = frames[j], frames[i] })
			return frames
		}, false},
		{"middle one missing", eachInTurn(func(f [][]byte) [][]byte { return [][]byte{f[0], f[2], f[3]} }), true},
		{"last one missing", eachInTurn(func(f [][]byte) [][]byte { return f[:3] }), true},
		{"overlapping", eachInTurn(func(f [][]byte) [][]byte { return [][]byte{f[0], shifted(f[1]), f[1], f[2], f[3]} }), true},
	}
	forSteerings(t, func(t *testing.T, l *link) {
		s := l.openSink(t)
		l.forFamilies(t, func(t *testing.T, f family) {
			hosts := l.known(t, f, 3)
			for _, order := range orders {
				t.Run(order.name, func(t *testing.T) {
					all := datagrams(hosts, 12)
					l.account(t, func() { l.send(t, order.arrange(all)...) })
					l.check(t, s.empty(), all, order.lost)
				})
			}
			t.Run("first one missing", func(t *testing.T) {
				all := datagrams(hosts, 12)
				var held uint64
				before := l.fragmentsHeld()
				l.account(t, func() {
					for _, d := range all {
						l.send(t, d.frames[1:]...)
						held += uint64(len(d.frames) - 1)
					}
				})
				if n := l.fragmentsHeld() - before; n != held {
					t.Errorf("%d fragments held, want %d", n, held)
				}
				l.check(t, s.empty(), all, true)
			})
			if f.self.Is6() {
				t.Run("behind other headers", func(t *testing.T) {
					all := datagrams(hosts, 12)
					l.account(t, func() {
						for _, d := range all {
							for _, b := range slices.Backward(d.frames) {
								h := &fakeHost{mac: b[6:12], addr: d.from.Addr(), self: f.self, stack: l.mac}
								l.send(t, h.behind([]layers.IPProtocol{0, 60}, layers.IPProtocolIPv6Fragment, b[h.headers():]))
							}
						}
					})
					l.check(t, s.empty(), all, false)
				})
			}
		})
	})
}

// eachInTurn sends datagram after datagram.
func eachInTurn(arrange func(f [][]byte) [][]byte) func(all []fragmented) [][]byte {
	return func(all []fragmented) (frames [][]byte) {
		for _, d := range all {
			frames = append(frames, arrange(slices.Clone(d.frames))...)
		}
		return frames
	}
}

// shifted is a fragment that begins eight bytes earlier, where another one is.
func shifted(b []byte) []byte {
	b = bytes.Clone(b)
	if b[14]>>4 == 6 {
		b[14+40+3] -= 8
		return b
	}
	// The offset is in units of eight bytes, the low byte of its word is not 0.
	b[14+7]--
	// The sum of the header becomes one too small.
	sum := uint32(^binary.BigEndian.Uint16(b[14+10:])) + 0xfffe
	binary.BigEndian.PutUint16(b[14+10:], ^uint16(sum+sum>>16))
	return b
}

func (l *link) fragmentsHeld() (n uint64) {
	for _, s := range l.Stats().Shards {
		n += s.FragmentsHeld
	}
	return n
}

// check compares what arrived with what was sent.
func (l *link) check(t *testing.T, got map[netip.AddrPort][]delivered, sent []fragmented, lost bool) {
	t.Helper()
	if lost {
		if len(got) != 0 {
			t.Errorf("datagrams of %d flows arrived, want none", len(got))
		}
		return
	}
	for _, d := range sent {
		arrived := got[d.from]
		if len(arrived) != 1 {
			t.Errorf("the datagram from %v arrived %d times", d.from, len(arrived))
			continue
		}
		if err := same(arrived[0].b, d.payload); err != nil {
			t.Errorf("the datagram from %v: %v", d.from, err)
		}
		to := netip.AddrPortFrom(l.self(d.from.Addr()), discardPort)
		at, err := l.Lookup("udp", to, d.from)
		if err != nil {
			t.Fatal(err)
		}
		if arrived[0].shard != at.Shard {
			t.Errorf("the datagram from %v arrived on shard %d, its flow is on shard %d", d.from, arrived[0].shard, at.Shard)
		}
	}
}

// self is the stack's address of the family of a.
func (l *link) self(a netip.Addr) netip.Addr {
	if a.Is4() {
		return l.self4
	}
	return l.self6
}

// TestFragmentedSegments sends TCP segments in fragments, the first one last.
func TestFragmentedSegments(t *testing.T) {
	const ports = 8
	forSteerings(t, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			for _, h := range l.known(t, f, 2) {
				for port := range uint16(ports) {
					want := payload(uint64(port), 2500)
					c := l.connect(t, h, 3000+port)
					frames := l.account(t, func() {
						whole := h.tcp(c.segment(layers.TCP{PSH: true, ACK: true}), want)
						pieces := h.cut(layers.IPProtocolTCP, h.newID(), 800, whole[h.headers():])
						slices.Reverse(pieces)
						l.send(t, pieces...)
					})
					if err := same(c.received(frames), want); err != nil {
						t.Errorf("from %v port %d: the echo: %v", h.addr, c.port, err)
					}
					c.seq += uint32(len(want))
					l.send(t, h.tcp(c.segment(layers.TCP{RST: true}), nil))
				}
			}
		})
	})
}

// fakeConn is a TCP connection of a host with the echo service.
type fakeConn struct {
	host     *fakeHost
	port     uint16
	seq, ack uint32
}

// connect shakes hands.
func (l *link) connect(t *testing.T, h *fakeHost, port uint16) *fakeConn {
	t.Helper()
	begin := len(l.since(0))
	l.send(t, h.syn(port))
	answer := l.await(t, begin, func(f *captured) bool {
		s := h.segmentFor(f, port)
		return s != nil && s.SYN && s.ACK
	})
	c := &fakeConn{h, port, 1001, h.segmentFor(&answer, port).Seq + 1}
	l.send(t, h.tcp(c.segment(layers.TCP{ACK: true}), nil))
	l.barrier(t)
	return c
}

// segment fills in the ports and sequence numbers.
func (c *fakeConn) segment(s layers.TCP) layers.TCP {
	s.SrcPort, s.DstPort, s.Seq, s.Ack = layers.TCPPort(c.port), echoPort, c.seq, c.ack
	return s
}

// received is the data that the stack sent among frames.
func (c *fakeConn) received(frames []captured) (b []byte) {
	var segments []*layers.TCP
	for i := range frames {
		if s := c.host.segmentFor(&frames[i], c.port); s != nil {
			segments = append(segments, s)
		}
	}
	slices.SortStableFunc(segments, func(a, b *layers.TCP) int { return cmp.Compare(int32(a.Seq-b.Seq), 0) })
	for _, s := range segments {
		if s.Seq == c.ack+uint32(len(b)) {
			b = append(b, s.Payload...)
		}
	}
	return b
}

// segmentFor returns the TCP segment that the stack sent to a port of the host,
// or nil.
func (h *fakeHost) segmentFor(f *captured, port uint16) *layers.TCP {
	if !f.ours {
		return nil
	}
	p := gopacket.NewPacket(f.bytes, layers.LayerTypeEthernet, gopacket.Default)
	s, _ := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if s == nil || !h.got(p) || s.DstPort != layers.TCPPort(port) {
		return nil
	}
	return s
}

// TestFragmentFlood sends fragments that nobody completes. What they take is
// bounded and counted; a connection, and other hosts' fragments beside them, go
// on, and so do fragments between the same hosts afterwards.
func TestFragmentFlood(t *testing.T) {
	const (
		fragments, batch = 10_000, 500
		limit            = 256 // of one flow group, where all between two hosts meet
	)
	forSteerings(t, func(t *testing.T, l *link) {
		s := l.openSink(t)
		l.forFamilies(t, func(t *testing.T, f family) {
			hosts := l.known(t, f, 2)
			flooder, other := hosts[0], hosts[1:]
			witness := dialTCP(t, f.self, echoPort)
			before, heldBefore := l.sum(), l.fragmentsHeld()
			random := rand.New(rand.NewPCG(1, 2))
			for n := 0; n < fragments; {
				for range batch {
					at := 8 * (1 + random.IntN(1000))
					l.send(t, flooder.fragment(layers.IPProtocolUDP, random.Uint32()|1, at, random.IntN(2) == 0, make([]byte, 512)))
					n++
				}
				all := datagrams(other, 4)
				l.send(t, eachInTurn(func(f [][]byte) [][]byte { return f })(all)...)
				if err := roundTrip(witness, payload(uint64(n), 5000)); err != nil {
					t.Fatalf("the connection, after %d fragments: %v", n, err)
				}
				eventually(t, func() error {
					if held := l.fragmentsHeld() - heldBefore; held < uint64(n) {
						return fmt.Errorf("%d fragments of %d held", held, n)
					}
					return nil
				})
				l.barrier(t)
				l.check(t, s.empty(), all, false)
			}
			after := l.sum()
			held := l.fragmentsHeld() - heldBefore
			full := after.DroppedByCause["fragment_full"] - before.DroppedByCause["fragment_full"]
			if left := held - full; held < fragments || left > limit {
				t.Errorf("%d fragments held and %d of them dropped at the limit: %d are left, want at most %d",
					held, full, left, limit)
			}
			all := datagrams(hosts, 12)
			l.account(t, func() {
				l.send(t, eachInTurn(func(f [][]byte) [][]byte { slices.Reverse(f); return f })(all)...)
			})
			l.check(t, s.empty(), all, false)
			_ = witness.SetLinger(0)
			_ = witness.Close()
		})
	})
}
