package shard

import (
	"encoding/binary"
	"fmt"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// This file is the short way out: from a segment or a datagram to its frame, with a
// neighbor that is known. What gVisor's IP would look at on the way, filters, loops,
// fragments, is not there or was looked at; everything else goes through it.

// ip4Endpoint and ip6Endpoint are what gVisor's IP endpoints are to its stack.
type (
	ip4Endpoint interface {
		stack.AddressableEndpoint
		stack.GroupAddressableEndpoint
		stack.LinkResolvableNetworkEndpoint
		stack.ForwardingNetworkEndpoint
		stack.MulticastForwardingNetworkEndpoint
	}
	ip6Endpoint interface {
		ip4Endpoint
		stack.DuplicateAddressDetector
		stack.LinkAddressResolver
		stack.NDPEndpoint
	}
)

// outEndpoint4 and outEndpoint6 are gVisor's endpoints with the short way out for
// segments.
type (
	outEndpoint4 struct {
		ip4Endpoint
		g *Group
	}
	outEndpoint6 struct {
		ip6Endpoint
		g *Group
	}
)

// withShortWay gives one of gVisor's IP endpoints the short way out.
func (g *Group) withShortWay(ep stack.NetworkEndpoint) stack.NetworkEndpoint {
	switch ep := ep.(type) {
	case ip6Endpoint:
		return outEndpoint6{ep, g}
	case ip4Endpoint:
		return outEndpoint4{ep, g}
	default:
		panic(fmt.Sprintf("shard: gVisor's %T is no IP endpoint any more: the pinned version changed, see out.go", ep))
	}
}

// WritePacket implements stack.NetworkEndpoint.
func (e outEndpoint4) WritePacket(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) tcpip.Error {
	// Only packets that nobody may cut go without an identification.
	if params.DF && e.g.sendSegment(r, params, pkt) {
		return nil
	}
	return e.ip4Endpoint.WritePacket(r, params, pkt)
}

// WritePacket implements stack.NetworkEndpoint.
func (e outEndpoint6) WritePacket(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) tcpip.Error {
	if e.g.sendSegment(r, params, pkt) {
		return nil
	}
	return e.ip6Endpoint.WritePacket(r, params, pkt)
}

// sendSegment queues the frame of a segment, and returns false when gVisor's IP has to
// do that.
func (g *Group) sendSegment(r *stack.Route, params stack.NetworkHeaderParams, pkt *stack.PacketBuffer) bool {
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber || r.Loop() != stack.PacketOut || params.ExperimentOptionValue != 0 {
		return false
	}
	local, remote, next := r.LocalAddress(), r.RemoteAddress(), r.NextHop()
	if next.Len() == 0 {
		next = remote
	}
	headers := l3 + header.IPv4MinimumSize
	if local.Len() == header.IPv6AddressSize {
		headers = l3 + header.IPv6MinimumSize
	}
	size := headers - l3 + pkt.Size()
	if pkt.GSOOptions.Type == stack.GSONone && size > int(g.link.mtu) {
		return false
	}
	h := g.hop(local, next)
	if h == nil {
		return false
	}
	t := g.shard.tx
	f := t.take()
	f.b = f.b[:headers]
	g.putHeaders(f.b, h.mac, local, remote, params)
	putLength(f.b[l3:], size)
	if g.arrivals != nil {
		f.via = g.arrivals.queueOf(f.b[l3:], pkt.TransportHeader().Slice(), headers != l3+header.IPv4MinimumSize)
	}
	t.finish(f, pkt)
	g.link.sent++
	return true
}

// putHeaders writes the Ethernet and IP header of a frame, all but what depends on its
// length, behind the vnet header in b.
func (g *Group) putHeaders(b []byte, mac [6]byte, local, remote tcpip.Address, params stack.NetworkHeaderParams) {
	eth, ip := b[l3-ethernetLen:l3], b[l3:]
	copy(eth, mac[:])
	copy(eth[6:], g.set.mac[:])
	if local.Len() == header.IPv4AddressSize {
		binary.BigEndian.PutUint16(eth[12:], uint16(header.IPv4ProtocolNumber))
		header.IPv4(ip).Encode(&header.IPv4Fields{
			Flags:    header.IPv4FlagDontFragment, // and so needs no identification (RFC 6864 section 4.1)
			TTL:      params.TTL,
			TOS:      params.TOS,
			Protocol: uint8(params.Protocol),
			SrcAddr:  local,
			DstAddr:  remote,
		})
	} else {
		binary.BigEndian.PutUint16(eth[12:], uint16(header.IPv6ProtocolNumber))
		header.IPv6(ip).Encode(&header.IPv6Fields{
			TransportProtocol: params.Protocol,
			HopLimit:          params.TTL,
			TrafficClass:      params.TOS,
			SrcAddr:           local,
			DstAddr:           remote,
		})
	}
}

// putLength writes what depends on the length of a packet into its IP header.
func putLength(ip []byte, size int) {
	if ip[0]>>4 == header.IPv4Version {
		header.IPv4(ip).SetTotalLength(uint16(size))
		header.IPv4(ip).SetChecksum(^header.IPv4(ip).CalculateChecksum())
	} else {
		header.IPv6(ip).SetPayloadLength(uint16(size - header.IPv6MinimumSize))
	}
}

// maxHops is how many neighbors a flow group keeps at hand; with one more it
// forgets them all.
const maxHops = 256

// hopTime is for how long gVisor is not asked again for a neighbor that is known,
// unless a neighbor has said something.
const hopTime = int64(10 * time.Millisecond)

// forgetHops has gVisor asked for all neighbors again.
func (g *Group) forgetHops() {
	for _, h := range g.hops {
		h.known = false
		h.asked = -1
	}
}

// confirmTime is how long a connection that was heard of does not confirm its neighbor
// again. gVisor believes in one for 15 s at least.
const confirmTime = int64(time.Second)

// confirm tells gVisor that the neighbor of a connection is there, as the peer has
// acknowledged something, so that it need not be probed (RFC 4861 section 7.3.1).
// gVisor's TCP does that only for those whose frames went the long way.
func (g *Group) confirm(c *Conn) {
	if g.shard.now-c.flow.confirmed < confirmTime {
		return
	}
	c.flow.confirmed = g.shard.now
	next, ok := g.set.nextHop(c.local.Addr(), c.remote.Addr())
	if !ok {
		return
	}
	if h := g.hops[hopKey{c.flow.id.LocalAddress, tcpipAddress(next)}]; h != nil {
		h.route.ConfirmReachable()
	}
}

// hop is a neighbor that frames to one or more hosts go to.
type hop struct {
	key    hopKey
	route  *stack.Route
	mac    [6]byte
	known  bool
	asked  int64                            // when gVisor has said so
	answer func(stack.ResolvedFieldsResult) // keeps mac; made once
}

type hopKey struct{ local, next tcpip.Address }

// hop returns a neighbor for packets from one of the stack's addresses, or nil when
// gVisor has to find out about it.
func (g *Group) hop(local, next tcpip.Address) *hop {
	h := g.lastHop
	if key := (hopKey{local, next}); h == nil || h.key != key {
		if h = g.hops[key]; h == nil {
			if h = g.newHop(key); h == nil {
				return nil
			}
		}
		g.lastHop = h
	}
	// gVisor wants to be asked for every packet: then it confirms, in time, that the
	// neighbor is still there (RFC 4861 section 7.3). Its times are seconds.
	if now := g.shard.turnBegan; now-h.asked >= hopTime || !h.known && now > h.asked {
		h.asked = now
		h.known = h.route.ResolvedFields(nil) == nil && h.route.ResolvedFields(h.answer) == nil
	}
	if !h.known {
		return nil
	}
	return h
}

func (g *Group) newHop(key hopKey) *hop {
	network := header.IPv4ProtocolNumber
	if key.local.Len() == header.IPv6AddressSize {
		network = header.IPv6ProtocolNumber
	}
	r, err := g.stack.FindRoute(nicID, key.local, key.next, network, false)
	if err != nil {
		return nil
	}
	if len(g.hops) == maxHops {
		for _, other := range g.hops {
			other.route.Release()
		}
		clear(g.hops)
	}
	h := &hop{key: key, route: r, asked: -1}
	h.answer = func(r stack.ResolvedFieldsResult) { copy(h.mac[:], r.RouteInfo.RemoteLinkAddress) }
	g.hops[key] = h
	return h
}
