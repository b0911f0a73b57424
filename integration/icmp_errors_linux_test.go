package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// TestPortUnreachable has a router report that nobody is where the stack sends
// to. The error has other addresses than the flow, and reaches its socket all
// the same: a connected UDP port and a TCP connection that is being opened learn
// that they were refused, one that is open goes on (RFC 1122 section 4.2.3.9).
func TestPortUnreachable(t *testing.T) {
	const flows = 6
	forSteerings(t, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			hosts := l.known(t, f, 2)
			h, router := hosts[0], hosts[1]
			// Routers quote as little as that (RFC 792), or all.
			lengths := []int{h.headers() - 14 + 8, 1 << 16}
			for i := range uint16(flows) {
				length := lengths[i%2]
				t.Run(fmt.Sprintf("UDP/%d", i), func(t *testing.T) {
					c := l.dial(t, "udp", netip.AddrPortFrom(h.addr, 5000+i).String())
					sent := l.sentTo(t, h, isUDP, func() { writeAll(t, c, "anybody there?") })
					l.account(t, func() { l.send(t, router.portUnreachable(sent[:min(length, len(sent))])) })
					_, err := c.Read(make([]byte, 10))
					wantOpError(t, err, syscall.ECONNREFUSED)
					// Once.
					writeAll(t, c, "anybody now?")
					local := c.LocalAddr().(*net.UDPAddr).AddrPort()
					l.send(t, h.udp(5000+i, local.Port(), []byte("yes")))
					if err := readAll(c, "yes"); err != nil {
						t.Error(err)
					}
				})
				t.Run(fmt.Sprintf("TCP/%d", i), func(t *testing.T) {
					d := l.startDial(t, h.addr, 5000+i)
					sent := l.sentTo(t, h, isTCP(func(s *layers.TCP) bool { return s.SYN && s.DstPort == layers.TCPPort(5000+i) }), nil)
					l.account(t, func() { l.send(t, router.portUnreachable(sent[:min(length, len(sent))])) })
					c, err := d.wait()
					wantOpError(t, err, syscall.ECONNREFUSED)
					if c != nil {
						_ = c.Close()
					}
				})
				t.Run(fmt.Sprintf("open TCP/%d", i), func(t *testing.T) {
					c := l.connect(t, h, 6000+i)
					sent := h.quote(layers.IPProtocolTCP, h.tcp(layers.TCP{SrcPort: echoPort, DstPort: layers.TCPPort(6000 + i), ACK: true, Seq: c.ack, Ack: c.seq}, nil)[h.headers():])
					l.account(t, func() { l.send(t, router.portUnreachable(sent[:min(length, len(sent))])) })
					l.converse(t, c)
				})
			}
		})
	})
}

// TestNonsenseErrors sends ICMP errors whose quotes are cut off, spoilt or of
// other flows. They change nothing for the flows that they might be about.
func TestNonsenseErrors(t *testing.T) {
	forSteerings(t, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			hosts := l.known(t, f, 2)
			h, router := hosts[0], hosts[1]
			datagrams := l.dial(t, "udp", netip.AddrPortFrom(h.addr, 5000).String())
			sent := [][]byte{l.sentTo(t, h, isUDP, func() { writeAll(t, datagrams, "anybody there?") })}
			open := l.connect(t, h, 6000)
			sent = append(sent, h.quote(layers.IPProtocolTCP, h.tcp(layers.TCP{SrcPort: echoPort, DstPort: 6000, ACK: true, Seq: open.ack, Ack: open.seq}, nil)[h.headers():]))
			dial := l.startDial(t, h.addr, 5000)
			isSYN := isTCP(func(s *layers.TCP) bool { return s.SYN && !s.ACK })
			syn := l.sentTo(t, h, isSYN, nil)
			sent = append(sent, syn)
			for _, quote := range sent {
				frames := l.account(t, func() {
					for _, spoilt := range spoiltQuotes(quote) {
						l.send(t, router.portUnreachable(spoilt))
					}
					for kind := range uint8(128) { // errors that do not exist, among others
						known := []uint8{1, 2} // unreachable, too big
						if f.self.Is4() {
							known = []uint8{3, echoRequest4}
						}
						if !slices.Contains(known, kind) {
							l.send(t, router.icmp(kind, 4, 0, quote))
						}
					}
					wrong := bytes.Clone(router.portUnreachable(quote))
					wrong[router.headers()+2] ^= 0xff // checksum
					l.send(t, wrong)
				})
				if n := len(answers(frames, func(p gopacket.Packet) bool { return router.got(p) && isAnything(p) })); n != 0 && f.self.Is4() {
					t.Errorf("%d answers to ICMP errors, want none (RFC 1122 section 3.2.2)", n)
				}
			}

			local := datagrams.LocalAddr().(*net.UDPAddr).AddrPort()
			l.send(t, h.udp(5000, local.Port(), []byte("yes")))
			if err := readAll(datagrams, "yes"); err != nil {
				t.Errorf("the connected UDP port: %v", err)
			}
			l.converse(t, open)
			p := gopacket.NewPacket(append(make([]byte, 12), slices.Concat(etherType(f), syn)...), layers.LayerTypeEthernet, gopacket.Default)
			s := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
			l.send(t, h.tcp(layers.TCP{SrcPort: 5000, DstPort: s.SrcPort, SYN: true, ACK: true, Seq: 7, Ack: s.Seq + 1}, nil))
			c, err := dial.wait()
			if err != nil {
				t.Fatalf("the connection that was being opened: %v", err)
			}
			l.send(t, h.tcp(layers.TCP{SrcPort: 5000, DstPort: s.SrcPort, RST: true, Seq: 8}, nil))
			_ = c.Close()
		})
	})
}

// spoiltQuotes are quotes of a packet that no longer say which flow it was of.
func spoiltQuotes(quote []byte) (all [][]byte) {
	headers, fragmentAt, protoAt := 20, 6, 9
	if quote[0]>>4 == 6 {
		headers, protoAt = 40, 6
	}
	for n := range headers + 4 { // the ports are not there
		all = append(all, quote[:n])
	}
	change := func(at int, b ...byte) {
		spoilt := bytes.Clone(quote)
		copy(spoilt[at:], b)
		all = append(all, spoilt)
	}
	// Another version is not among them: gVisor does not look at it, so the quote
	// still says all, where such errors come by their own addresses.
	change(headers, 0, 1)                  // another source port
	change(headers+2, 0, 1)                // another destination port
	change(headers-1, quote[headers-1]+77) // another peer
	if layers.IPProtocol(quote[protoAt]) == layers.IPProtocolTCP {
		change(headers+4, quote[headers+4]^0x80) // a segment that was not sent
	}
	if headers == 20 {
		for length := range byte(16) {
			if length != 5 {
				change(0, 4<<4|length)
			}
		}
		change(protoAt, 1)       // another protocol
		change(protoAt, 253)     // another one
		change(fragmentAt, 0, 5) // a later fragment
		change(15, quote[15]+77) // not from us
		change(0, make([]byte, 20)...)
	} else {
		for _, next := range []byte{0, 43, 44, 51, 58, 59, 60, 253} {
			change(6, next)
		}
		change(23, quote[23]+77) // not from us
		endless := bytes.Clone(quote[:40])
		endless[6] = 60
		for range 100 {
			endless = append(endless, 60, 0, 1, 4, 0, 0, 0, 0)
		}
		all = append(all, endless)
		later := slices.Concat(quote[:40], []byte{quote[6], 0, 0, 8, 0, 0, 0, 1}, quote[40:])
		later[6] = 44
		all = append(all, later)
	}
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		b := make([]byte, random.IntN(200))
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		if len(b) > 0 && random.IntN(2) == 0 {
			b[0] = quote[0]
		}
		all = append(all, b)
	}
	return all
}

func etherType(f family) []byte {
	if f.self.Is4() {
		return []byte{0x08, 0x00}
	}
	return []byte{0x86, 0xdd}
}

// sentTo runs f and returns the first packet that the stack then sends to the
// host; with nil for f it may have done so already.
func (l *link) sentTo(t *testing.T, h *fakeHost, want func(p gopacket.Packet) bool, f func()) []byte {
	t.Helper()
	begin := 0
	if f != nil {
		begin = len(l.since(0))
		f()
	}
	found := l.await(t, begin, func(c *captured) bool {
		if !c.ours {
			return false
		}
		p := gopacket.NewPacket(c.bytes, layers.LayerTypeEthernet, gopacket.Default)
		return h.got(p) && want(p)
	})
	return found.bytes[14:]
}

// dialing is a dial on its way.
type dialing struct {
	done chan struct{}
	c    net.Conn
	err  error
}

func (l *link) startDial(t *testing.T, to netip.Addr, port uint16) *dialing {
	d := &dialing{done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	go func() {
		defer close(d.done)
		defer cancel()
		d.c, d.err = l.DialContext(ctx, "tcp", netip.AddrPortFrom(to, port).String())
	}()
	return d
}

func (d *dialing) wait() (net.Conn, error) {
	<-d.done
	return d.c, d.err
}

// converse has a connection echo something, and ends it.
func (l *link) converse(t *testing.T, c *fakeConn) {
	t.Helper()
	want := []byte("still there?")
	frames := l.account(t, func() {
		l.send(t, c.host.tcp(c.segment(layers.TCP{PSH: true, ACK: true}), want))
	})
	if err := same(c.received(frames), want); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	c.seq += uint32(len(want))
	l.send(t, c.host.tcp(c.segment(layers.TCP{RST: true}), nil))
}

func writeAll(t *testing.T, c io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

// readAll reads what has to be there next.
func readAll(c io.Reader, want string) error {
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	return same(got, []byte(want))
}
