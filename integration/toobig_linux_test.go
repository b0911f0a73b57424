package integration

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket/layers"

	"numastack/stack"
)

// TestPathMTUDatagrams sends datagrams that the narrow link does not carry
// whole, and no router may cut. As with the kernel's sockets, the first one is
// lost, a socket that has one peer reports EMSGSIZE for it, and the others leave
// in fragments; and the other sockets of the stack know the path then.
func TestPathMTUDatagrams(t *testing.T) {
	const size, tries = 1400, 100
	p := openPath(t, stack.Config{Shards: 2})
	for _, f := range p.peers() {
		t.Run(f.name, func(t *testing.T) {
			var peer net.PacketConn
			if err := p.peer.do(func() (err error) {
				peer, err = net.ListenPacket("udp", netip.AddrPortFrom(f.host, 0).String())
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			listening, err := p.ListenPacket("udp", netip.AddrPortFrom(f.self, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer listening.Close()
			dialed := p.dial(t, "udp", peer.LocalAddr().String())
			want, buf := payload(1, size), make([]byte, size+1)
			arrives := func(wait time.Duration) bool {
				t.Helper()
				_ = peer.SetReadDeadline(time.Now().Add(wait)) // it is open
				n, _, err := peer.ReadFrom(buf)
				if err != nil {
					return false
				}
				if err := same(buf[:n], want); err != nil {
					t.Error(err)
				}
				return true
			}
			told := 0
			for try := 1; ; try++ {
				switch _, err := dialed.Write(want); {
				case errors.Is(err, syscall.EMSGSIZE):
					told++
				case err != nil:
					t.Fatal(err)
				}
				if arrives(50 * time.Millisecond) {
					break
				}
				if try == tries {
					t.Fatalf("none of %d datagrams arrived; told %d times that they are too large", tries, told)
				}
			}
			if told == 0 {
				t.Error("never told that a datagram was too large")
			}
			for name, write := range map[string]func(b []byte) (int, error){
				"dialed":    dialed.Write,
				"listening": func(b []byte) (int, error) { return listening.WriteTo(b, peer.LocalAddr()) },
			} {
				if _, err := write(want); err != nil || !arrives(patience) {
					t.Errorf("a later datagram of the %s socket did not arrive; error of the write: %v", name, err)
				}
			}
			for _, s := range p.Stats().Shards {
				if s.NarrowPaths == 0 {
					t.Errorf("shard %d does not know the path", s.Shard)
				}
			}
		})
	}
}

// tooBig is the word of a router that a packet does not fit the next link.
func (h *fakeHost) tooBig(mtu uint32, quote []byte) []byte {
	if h.is4() {
		return h.icmp(3, 4, mtu, quote) // RFC 1191 section 4
	}
	return h.icmp(2, 0, mtu, quote) // RFC 4443 section 3.2
}

// TestForgedTooBig sends what no router would: links too narrow for IP, and
// quotes of what the stack has never sent, or long ago. IPv4 segments do not
// become smaller than for net.ipv4.route.min_pmtu of Linux, IPv6 ones not for a
// link that IPv6 does not have (RFC 8201 section 4), and none for a forgery
// (RFC 5927 section 4.1).
func TestForgedTooBig(t *testing.T) {
	forSteerings(t, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			router := l.known(t, f, 1)[0]
			for i, test := range []struct {
				name     string
				mtu      uint32
				shift    uint32 // of the sequence number
				ip4, ip6 int    // payload of the full segments that follow, in bytes
			}{
				{"1300 bytes", 1300, 0, 1260, 1240}, // no forgery
				{"1280 bytes", 1280, 0, 1240, 1220},
				{"1279 bytes", 1279, 0, 1239, fakeMSS},
				{"552 bytes", 552, 0, 512, fakeMSS},
				{"551 bytes", 551, 0, 512, fakeMSS},
				{"0 bytes", 0, 0, 512, fakeMSS},
				{"sequence number too high", 1300, 1 << 20, fakeMSS, fakeMSS},
				{"sequence number too low", 1300, 1<<32 - 1<<20, fakeMSS, fakeMSS},
			} {
				t.Run(test.name, func(t *testing.T) {
					h := l.known(t, f, 1)[0] // the way to it is not known
					c := l.connect(t, h, uint16(6000+i))
					l.exchange(t, c)
					lost := h.tcp(layers.TCP{SrcPort: echoPort, DstPort: layers.TCPPort(c.port), ACK: true, Seq: c.ack + test.shift}, nil)
					l.account(t, func() { l.send(t, router.tooBig(test.mtu, h.quote(layers.IPProtocolTCP, lost[h.headers():]))) })
					c.ack += 2 * fakeMSS // it has come, after all
					want := test.ip4
					if f.self.Is6() {
						want = test.ip6
					}
					if largest := l.exchange(t, c); largest != want {
						t.Errorf("segments of up to %d bytes, want %d", largest, want)
					}
					l.send(t, h.tcp(c.segment(layers.TCP{RST: true}), nil))
				})
			}
		})
	})
}

// exchange has two full segments echoed and returns how large the segments with
// the echo are on the wire, which is not acknowledged.
func (l *link) exchange(t *testing.T, c *fakeConn) (largest int) {
	t.Helper()
	want := payload(uint64(c.seq), 2*fakeMSS)
	frames := l.account(t, func() {
		for _, b := range [][]byte{want[:fakeMSS], want[fakeMSS:]} {
			l.send(t, c.host.tcp(c.segment(layers.TCP{PSH: true, ACK: true}), b))
			c.seq += uint32(len(b))
		}
	})
	if err := same(c.received(frames), want); err != nil {
		t.Errorf("the echo: %v", err)
	}
	for i := range frames {
		if s := c.host.segmentFor(&frames[i], c.port); s != nil && int32(s.Seq-c.ack) >= 0 {
			n := len(s.Payload)
			if frames[i].segment > 0 {
				n = min(n, frames[i].segment)
			}
			largest = max(largest, n)
		}
	}
	return largest
}
