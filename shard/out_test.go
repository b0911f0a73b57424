package shard

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// tcpPacket is a segment as gVisor's TCP hands it to IP.
func tcpPacket(payload int, gso stack.GSO) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: 128, Payload: buffer.MakeWithView(fullViewOf(noise(payload)))})
	tcp := header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize + len(timestamp)))
	tcp.Encode(&header.TCPFields{
		SrcPort: 7, DstPort: 1234, SeqNum: 5, AckNum: 6, WindowSize: 100, Checksum: 0x1234,
		Flags: header.TCPFlagAck | header.TCPFlagPsh, DataOffset: uint8(header.TCPMinimumSize + len(timestamp)),
	})
	copy(tcp[header.TCPMinimumSize:], timestamp)
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	pkt.GSOOptions = gso
	return pkt
}

// TestSegmentFrame: the short way out sends, byte by byte, what gVisor's IP would have
// sent.
func TestSegmentFrame(t *testing.T) {
	for _, family := range []struct {
		name           string
		local, on, off netip.Addr
		gsoType        stack.GSOType
		ep             func(g *Group) (short, long stack.NetworkEndpoint)
	}{
		{"IPv4", addrA, addrB, netip.MustParseAddr("192.0.2.1"), stack.GSOTCPv4, func(g *Group) (stack.NetworkEndpoint, stack.NetworkEndpoint) {
			ep, _ := g.stack.GetNetworkEndpoint(nicID, header.IPv4ProtocolNumber)
			return ep, ep.(outEndpoint4).ip4Endpoint
		}},
		{"IPv6", addr6[0], addr6[1], netip.MustParseAddr("2001:db8::1"), stack.GSOTCPv6, func(g *Group) (stack.NetworkEndpoint, stack.NetworkEndpoint) {
			ep, _ := g.stack.GetNetworkEndpoint(nicID, header.IPv6ProtocolNumber)
			return ep, ep.(outEndpoint6).ip6Endpoint
		}},
	} {
		for _, to := range []netip.Addr{family.on, family.off} {
			for _, payload := range []int{0, 1, 100, 1448, 60_000} {
				t.Run(fmt.Sprintf("%v/%d", to, payload), func(t *testing.T) {
					a, b := steppedPair(t)
					g := a.groups[1]
					subnet := header.IPv4EmptySubnet
					if to.Is6() {
						subnet = header.IPv6EmptySubnet
					}
					g.stack.AddRoute(tcpip.Route{Destination: subnet, Gateway: tcpipAddress(family.on), NIC: nicID})
					r, err := g.stack.FindRoute(nicID, tcpipAddress(family.local), tcpipAddress(to), networkProtocol(to), false)
					if err != nil {
						t.Fatal(err)
					}
					defer r.Release()
					var gso stack.GSO
					if payload > 1000 {
						gso = stack.GSO{Type: family.gsoType, NeedsCsum: true, CsumOffset: header.TCPChecksumOffset, MSS: 1448, MaxSize: gsoMaxSize}
					}
					params := stack.NetworkHeaderParams{Protocol: header.TCPProtocolNumber, TTL: 63, TOS: 4, DF: true}
					short, long := family.ep(g)
					write := func(ep stack.NetworkEndpoint) {
						pkt := tcpPacket(payload, gso)
						defer pkt.DecRef()
						if err := ep.WritePacket(r, params, pkt); err != nil {
							t.Fatal(err)
						}
					}
					write(short) // resolves the neighbor, and goes the long way
					settle(t, a, b)
					write(long)
					longs := len(a.tx.frames)
					write(short)
					if !g.sendSegment(r, params, tcpPacket(payload, gso)) {
						t.Fatal("it does not take the short way")
					}
					a.turn()
					if frames := wire(t, a); longs != 1 || len(frames) != 3 || !bytes.Equal(frames[0], frames[1]) || !bytes.Equal(frames[0], frames[2]) {
						t.Errorf("%d frames, want three equal ones: %.200x", len(frames), frames)
					}
				})
			}
		}
	}
}

// TestSegmentTakesLongWay: what the short way cannot do, gVisor does.
func TestSegmentTakesLongWay(t *testing.T) {
	a, b := steppedPair(t)
	g := a.groups[1]
	dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{}) // the neighbor is known then
	settle(t, a, b)
	r, err := g.stack.FindRoute(nicID, tcpipAddress(addrA), tcpipAddress(addrB), header.IPv4ProtocolNumber, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	self, err := g.stack.FindRoute(nicID, tcpipAddress(addrA), tcpipAddress(addrA), header.IPv4ProtocolNumber, false)
	if err != nil {
		t.Fatal(err)
	}
	defer self.Release()
	usual := stack.NetworkHeaderParams{Protocol: header.TCPProtocolNumber, TTL: 64, DF: true}
	for _, test := range []struct {
		name   string
		route  *stack.Route
		change func(params *stack.NetworkHeaderParams, pkt *stack.PacketBuffer)
		short  bool
	}{
		{"usual", r, func(*stack.NetworkHeaderParams, *stack.PacketBuffer) {}, true},
		{"no segment", r, func(_ *stack.NetworkHeaderParams, pkt *stack.PacketBuffer) {
			pkt.TransportProtocolNumber = header.ICMPv4ProtocolNumber
		}, false},
		{"an option", r, func(params *stack.NetworkHeaderParams, _ *stack.PacketBuffer) { params.ExperimentOptionValue = 1 }, false},
		{"to the stack itself", self, func(*stack.NetworkHeaderParams, *stack.PacketBuffer) {}, false},
		{"larger than the link", r, func(*stack.NetworkHeaderParams, *stack.PacketBuffer) { g.link.mtu = 100 }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			defer func(mtu uint32) { g.link.mtu = mtu }(g.link.mtu)
			params, pkt := usual, tcpPacket(100, stack.GSO{})
			defer pkt.DecRef()
			test.change(&params, pkt)
			if short := g.sendSegment(test.route, params, pkt); short != test.short {
				t.Errorf("takes the short way: %t, want %t", short, test.short)
			}
		})
	}
}

// TestNeighborIsNotProbed: while a neighbor acknowledges, nobody asks whether it is
// still there (RFC 4861 section 7.3.1), also when the connection never waited for it.
func TestNeighborIsNotProbed(t *testing.T) {
	for _, remote := range []netip.Addr{addrB, addr6[1]} {
		a, b := steppedPair(t)
		later := delayed(a, b)
		listenStepped(t, b, 7, echoHandler())
		asked := func() (n uint64) {
			for _, s := range []*Shard{a, b} {
				for _, g := range s.groups {
					stats := g.stack.Stats()
					n += stats.ARP.RequestsReceived.Value() + stats.ICMP.V6.PacketsReceived.NeighborSolicit.Value()
				}
			}
			return n
		}
		first := dialStepped(t, a, netip.AddrPortFrom(remote, 7), &testHandler{})
		settle(t, a, b)
		if asked() == 0 {
			t.Fatal("nobody asked for the neighbor at first")
		}
		first.Close()
		settle(t, a, b)
		c := dialStepped(t, a, netip.AddrPortFrom(remote, 7), &testHandler{})
		settle(t, a, b)
		minutes := func(n int) {
			for range n * 60 {
				*later += time.Second
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				settle(t, a, b)
			}
		}
		minutes(1) // the first connection's flow group does ask: nothing is heard there any more
		before := asked()
		minutes(2)
		if n := asked() - before; n != 0 {
			t.Errorf("%v was asked for %d times in two minutes of traffic, want 0", remote, n)
		}
	}
}
