package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"

	"numastack/stack"
)

// strangerPort is where no socket of the stack is.
const strangerPort = 4321

// steeringRow is a kind of frames, and how often the stack answers them.
type steeringRow struct {
	name    string
	send    func()
	answer  func(p gopacket.Packet) bool // nil: however it likes
	answers int
}

// TestSteeringTable sends frames of every row of the steering table and counts
// them in the flow groups, and what the stack answers. What the groups get has
// to be exactly what the oracle says of all that crossed the device.
func TestSteeringTable(t *testing.T) {
	const hosts, ports = 4, 16
	forSteeringsOf(t, []stack.Steering{stack.SteeringKernel, stack.SteeringUser}, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			neighbors := l.known(t, f, hosts)
			// flows calls send for some of each host's ports.
			flows := func(send func(h *fakeHost, port uint16) []byte) func() {
				return func() {
					for _, h := range neighbors {
						for port := range uint16(ports) {
							l.send(t, send(h, 999+port))
						}
					}
				}
			}
			udpEcho := func(h *fakeHost, port uint16) []byte {
				b := h.udp(port, echoPort, []byte("datagram"))
				return b[h.headers():]
			}
			synBytes := func(h *fakeHost, port uint16) []byte { return h.syn(port)[h.headers():] }
			rows := []steeringRow{
				{"TCP to nobody", flows(func(h *fakeHost, port uint16) []byte {
					return h.tcp(layers.TCP{SrcPort: layers.TCPPort(port), DstPort: strangerPort, SYN: true}, nil)
				}), isTCP(func(s *layers.TCP) bool { return s.RST }), hosts * ports},
				{"UDP", flows(func(h *fakeHost, port uint16) []byte {
					return h.udp(port, echoPort, []byte("datagram"))
				}), isUDP, hosts * ports},
				{"ICMP echo", flows(func(h *fakeHost, port uint16) []byte { return h.echo(uint32(port)) }), isEchoReply, hosts * ports},
				{"other IP", flows(func(h *fakeHost, _ uint16) []byte {
					return h.raw(253, []byte("for experiments, RFC 3692"))
				}), nil, 0},
				{"neighbor solicitations", flows(func(h *fakeHost, _ uint16) []byte { return h.solicit() }), isNeighborAnswer, hosts * ports},
				{"neighbor solicitations for another", flows(func(h *fakeHost, _ uint16) []byte {
					return h.solicitFor(h.addr.Next())
				}), isNeighborAnswer, 0},
				{"errors about UDP", flows(func(h *fakeHost, port uint16) []byte {
					return h.portUnreachable(h.quote(layers.IPProtocolUDP, ports4(echoPort, port)))
				}), isAnything, 0},
				{"errors about TCP", flows(func(h *fakeHost, port uint16) []byte {
					return h.portUnreachable(h.quote(layers.IPProtocolTCP, ports4(echoPort, port)))
				}), isAnything, 0},
				{"errors about a flow with another host", flows(func(h *fakeHost, port uint16) []byte {
					other := *neighbors[0]
					return h.portUnreachable(other.quote(layers.IPProtocolUDP, ports4(echoPort, port)))
				}), isAnything, 0},
				{"errors about other IP", flows(func(h *fakeHost, _ uint16) []byte {
					other := *neighbors[0]
					return h.portUnreachable(other.quote(253, make([]byte, 8)))
				}), isAnything, 0},
				{"VLAN", flows(func(h *fakeHost, port uint16) []byte {
					b := h.udp(port, echoPort, nil)
					return slices.Concat(b[:12], []byte{0x81, 0, 0, 5}, b[12:])
				}), isAnything, 0},
				{"VLAN in VLAN", flows(func(h *fakeHost, port uint16) []byte {
					b := h.udp(port, echoPort, nil)
					return slices.Concat(b[:12], []byte{0x88, 0xa8, 0, 5, 0x81, 0, 0, 5}, b[12:])
				}), isAnything, 0},
				{"unknown EtherType", flows(func(h *fakeHost, port uint16) []byte {
					b := h.udp(port, echoPort, nil)
					binary.BigEndian.PutUint16(b[12:], 0x0842) // wake on LAN
					return b
				}), isAnything, 0},
				{"multicast", flows(func(h *fakeHost, port uint16) []byte {
					return h.udpTo(f.group(), port, multicastPort, []byte("datagram"))
				}), isAnything, 0},
			}
			if f.self.Is4() {
				rows = append(rows, []steeringRow{
					{"UDP with IP options", flows(func(h *fakeHost, port uint16) []byte {
						eth, ip := h.to(h.self, layers.IPProtocolUDP)
						ip.(*layers.IPv4).Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}}
						return frame(eth, ip, gopacket.Payload(udpEcho(h, port)))
					}), isUDP, hosts * ports},
					{"broadcast", flows(func(h *fakeHost, port uint16) []byte {
						return h.udpTo(netip.AddrFrom4([4]byte{255, 255, 255, 255}), port, strangerPort, []byte("datagram"))
					}), isAnything, 0},
					{"IGMP", flows(func(h *fakeHost, _ uint16) []byte {
						return h.raw(layers.IPProtocolIGMP, []byte{0x16, 0, 0xfa, 0xfc, 239, 1, 2, 3}) // a member's report
					}), isAnything, 0},
				}...)
			} else {
				for _, chain := range [][]layers.IPProtocol{{0}, {60}, {43}, {44}, {0, 60}, {0, 43, 44, 60}} {
					rows = append(rows, []steeringRow{
						{fmt.Sprintf("UDP behind headers %d", chain), flows(func(h *fakeHost, port uint16) []byte {
							return h.behind(chain, layers.IPProtocolUDP, udpEcho(h, port))
						}), isUDP, hosts * ports},
						{fmt.Sprintf("TCP behind headers %d", chain), func() {
							flows(func(h *fakeHost, port uint16) []byte {
								return h.behind(chain, layers.IPProtocolTCP, synBytes(h, port))
							})()
							l.barrier(t)
							flows((*fakeHost).reset)()
						}, isTCP(func(s *layers.TCP) bool { return s.SYN && s.ACK }), hosts * ports},
					}...)
				}
				rows = append(rows, []steeringRow{
					{"MLD", flows(func(h *fakeHost, _ uint16) []byte {
						return h.icmp(131, 0, 0, f.group().AsSlice()) // a member's report
					}), isAnything, 0},
				}...)
			}
			for _, row := range rows {
				t.Run(row.name, func(t *testing.T) {
					frames := l.account(t, row.send)
					if row.answer == nil {
						return
					}
					got := answers(frames, func(p gopacket.Packet) bool {
						return slices.ContainsFunc(neighbors, func(h *fakeHost) bool { return h.got(p) }) && row.answer(p)
					})
					if len(got) != row.answers {
						t.Errorf("%d answers, want %d", len(got), row.answers)
						if len(got) > 0 {
							t.Logf("the last one: %v", got[len(got)-1])
						}
					}
				})
			}
			t.Run("super-frames", func(t *testing.T) { l.superFrames(t, f) })
		})
	})
}

// superFrames has the kernel send more than the MTU at once.
func (l *link) superFrames(t *testing.T, f family) {
	ended := make(chan discarded, 1)
	listener, err := l.HandleTCP("tcp", fmt.Sprint(":", discardPort), discard{ended})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	const bytes = 1 << 20
	whole := make(map[layers.IPProtocol]int)
	for _, fr := range l.account(t, func() {
		c := dialTCP(t, f.self, discardPort)
		if _, err := c.Write(make([]byte, bytes)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		if got := <-ended; got.bytes != bytes || got.err != nil {
			t.Errorf("%+v arrived", got)
		}
		raw, err := dialUDP(t, f.self, strangerPort).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000); err == nil {
				_, err = unix.Write(int(fd), make([]byte, 9500))
			}
		}); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			t.Logf("no segmented datagrams: %v", err)
		}
	}) {
		if p, _ := dissect(fr.bytes[14:]); !fr.ours && fr.segment > 0 {
			whole[layers.IPProtocol(p.proto)]++
		}
	}
	if whole[layers.IPProtocolTCP] == 0 || l.offloadsSegments() && whole[layers.IPProtocolUDP] != 1 {
		t.Errorf("super-frames by protocol: %v, want many of TCP and one of UDP", whole)
	}
}

// isAnything leaves only neighbor discovery out.
func isAnything(p gopacket.Packet) bool { return !isNeighborAnswer(p) && !isNeighborQuestion(p) }

func isUDP(p gopacket.Packet) bool { return p.Layer(layers.LayerTypeUDP) != nil }

func isTCP(want func(*layers.TCP) bool) func(p gopacket.Packet) bool {
	return func(p gopacket.Packet) bool {
		s, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		return ok && want(s)
	}
}

func isEchoReply(p gopacket.Packet) bool {
	switch m := p.Layer(layers.LayerTypeICMPv4).(type) {
	case *layers.ICMPv4:
		return m.TypeCode.Type() == echoReply4
	}
	m, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
	return ok && m.TypeCode.Type() == echoReply6
}

func isNeighborAnswer(p gopacket.Packet) bool {
	if a, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok {
		return a.Operation == layers.ARPReply
	}
	return p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement) != nil
}

func isNeighborQuestion(p gopacket.Packet) bool {
	if a, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok {
		return a.Operation == layers.ARPRequest
	}
	return p.Layer(layers.LayerTypeICMPv6NeighborSolicitation) != nil
}

// ports4 is how TCP and UDP headers begin.
func ports4(src, dst uint16) []byte {
	return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, src), dst), 0, 8, 0, 0)
}

// quote is a packet from the stack to the host as an ICMP error has it.
func (h *fakeHost) quote(proto layers.IPProtocol, l4 []byte) []byte {
	reversed := &fakeHost{addr: h.self, self: h.addr, mac: h.stack, stack: h.mac}
	return reversed.raw(proto, l4)[14:]
}

// portUnreachable is the ICMP error for a packet that reached nobody.
func (h *fakeHost) portUnreachable(quote []byte) []byte {
	if h.is4() {
		return h.icmp(3, 3, 0, quote) // RFC 792
	}
	return h.icmp(1, 4, 0, quote) // RFC 4443 section 3.1
}

// behind puts IPv6 extension headers in front of a transport header: hop-by-hop
// options (0), routing (43), fragment (44, first and last at once), destination
// options (60).
func (h *fakeHost) behind(chain []layers.IPProtocol, proto layers.IPProtocol, l4 []byte) []byte {
	b := l4
	for _, kind := range slices.Backward(chain) {
		header := []byte{byte(proto), 0, 1, 4, 0, 0, 0, 0} // padding that fills it
		switch kind {
		case 43:
			header = []byte{byte(proto), 0, 2, 0, 0, 0, 0, 0} // no segments left
		case 44:
			header = []byte{byte(proto), 0, 0, 0, 0, 0, 0, 7}
		}
		b, proto = append(header, b...), kind
	}
	return h.raw(proto, b)
}

// TestNeighborsAreLearntByAll lets a host ask for the stack's link address once.
// Then every flow group can answer it, and none has to ask.
func TestNeighborsAreLearntByAll(t *testing.T) {
	const ports = 256
	forSteerings(t, func(t *testing.T, l *link) {
		l.forFamilies(t, func(t *testing.T, f family) {
			talk := func(h *fakeHost) (echoes, questions int) {
				groups := make(map[int]bool)
				frames := l.account(t, func() {
					for port := range uint16(ports) {
						b := h.udp(1000+port, echoPort, []byte("datagram"))
						p, _ := dissect(b[14:])
						groups[l.group(p)] = true
						l.send(t, b)
					}
				})
				if len(groups) != linkGroups {
					t.Fatalf("the flows hash into %d groups, want all %d", len(groups), linkGroups)
				}
				target := h.addr.AsSlice()
				questions = len(answers(frames, func(p gopacket.Packet) bool {
					if a, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok {
						return a.Operation == layers.ARPRequest && slices.Equal(a.DstProtAddress, target)
					}
					s, ok := p.Layer(layers.LayerTypeICMPv6NeighborSolicitation).(*layers.ICMPv6NeighborSolicitation)
					return ok && slices.Equal(s.TargetAddress, target)
				}))
				echoes = len(answers(frames, func(p gopacket.Packet) bool { return h.got(p) && isUDP(p) }))
				return echoes, questions
			}
			if echoes, questions := talk(l.known(t, f, 1)[0]); echoes != ports || questions != 0 {
				t.Errorf("a host that the groups know: %d of %d datagrams answered, %d questions for its link address, want 0", echoes, ports, questions)
			}
			// Otherwise the above means nothing.
			if echoes, questions := talk(l.newHost(f)); echoes != 0 || questions < linkGroups {
				t.Errorf("a host that nobody knows: %d datagrams answered, %d questions, want 0 and one per group", echoes, questions)
			}
		})
	})
}

// TestMulticastOnce has many hosts send to all on the link and to a group that
// a port is in: it gets every datagram of the latter, once.
func TestMulticastOnce(t *testing.T) {
	const ports = 64
	forSteerings(t, func(t *testing.T, l *link) {
		p, err := l.ListenPacket("udp", fmt.Sprint(":", multicastPort))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		member := p.(*stack.PacketConn)
		l.forFamilies(t, func(t *testing.T, f family) {
			if err := member.JoinGroup(f.group()); err != nil {
				t.Fatal(err)
			}
			setPacketDeadline(t, p)
			h := l.newHost(f)
			l.account(t, func() {
				for port := range uint16(ports) {
					l.send(t, h.udpTo(f.group(), 1000+port, multicastPort, []byte("datagram")))
				}
			})
			got := make(map[netip.AddrPort]int)
			buf := make([]byte, 100)
			for range ports {
				_, from, err := member.ReadFromAddrPort(buf)
				if err != nil {
					t.Fatalf("after %d datagrams: %v", len(got), err)
				}
				got[from]++
			}
			if len(got) != ports {
				t.Errorf("%d datagrams came from %d senders", ports, len(got))
			}
			if err := member.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, from, err := member.ReadFromAddrPort(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("one more, from %v; %v", from, err)
			}
		})
	})
}
