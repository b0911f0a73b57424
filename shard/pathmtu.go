package shard

import (
	"encoding/binary"
	"math"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// This file is path MTU discovery (RFC 1191, RFC 8201), and what is believed of
// ICMP errors at all. Where routers do not say that a packet is too big, see
// blackhole.go.

// minPathMTU is the size in bytes below which IPv4 packets are not made smaller,
// whatever a router says, as on Linux (net.ipv4.route.min_pmtu). Routers cut
// them where that is still too large.
const minPathMTU = 552

// A shard knows this many narrow paths, and for this long (RFC 1191 section 6.3,
// RFC 8201 section 4); then a larger packet is tried.
const (
	maxNarrowPaths = 1024
	narrowPathTime = int64(10 * time.Minute)
)

// narrowPath is the way to a host. A forged word about a datagram takes nothing
// but its ports, so connections do without it.
type narrowPath struct {
	mtu    uint32 // smallest that a router has said, in bytes of an IP packet
	proved uint32 // the same, about segments that were on their way
	until  int64  // when it is forgotten
}

// minQuote is how many bytes behind the IP header any router quotes (RFC 792).
const minQuote = 8

const noMTU = math.MaxUint32 // nothing is known

// path returns what is known of the way to a host.
func (s *Shard) path(to tcpip.Address) narrowPath {
	if len(s.paths) > 0 {
		if p, known := s.paths[to]; known {
			if s.now < p.until {
				return p
			}
			delete(s.paths, to)
		}
	}
	return narrowPath{mtu: noMTU, proved: noMTU}
}

// learn keeps what a router has said of the way to a host, and returns whether
// that was new.
func (s *Shard) learn(to tcpip.Address, mtu uint32, proved bool) bool {
	p := s.path(to)
	if mtu >= p.mtu && (!proved || mtu >= p.proved) {
		return false
	}
	p.mtu = min(p.mtu, mtu)
	if proved {
		p.proved = mtu
	}
	p.until = s.now + narrowPathTime
	if _, known := s.paths[to]; !known && len(s.paths) == maxNarrowPaths {
		s.counters.PathsForgotten++
		for other, o := range s.paths {
			if proved || s.now >= o.until { // or anybody could make it forget others
				delete(s.paths, other)
				break
			}
		}
		if len(s.paths) == maxNarrowPaths {
			return false
		}
	}
	if s.paths == nil {
		s.paths = make(map[tcpip.Address]narrowPath)
	}
	s.paths[to] = p
	return true
}

// learn tells every shard: other flow groups send to the same host.
func (g *Group) learn(to tcpip.Address, mtu uint32, proved bool) {
	if !g.shard.learn(to, mtu, proved) {
		return
	}
	for _, other := range g.set.shards {
		if other != g.shard {
			other.post(taskFunc(func(s *Shard) { s.learn(to, mtu, proved) })) // one that has ended sends nothing
		}
	}
}

// transportError handles an ICMP error about a packet from id's local to its
// remote address. quote is how that goes on behind the IP header, minQuote bytes at
// least. It returns whether the endpoint should hear of it.
//
// gVisor would take everybody's word. What quotes a segment that is not on its
// way is late or forged (RFC 5927 section 4.1).
func (g *Group) transportError(id stack.TransportEndpointID, network tcpip.NetworkProtocolNumber, transport tcpip.TransportProtocolNumber, err stack.TransportError, quote []byte) bool {
	id.LocalPort, id.RemotePort = binary.BigEndian.Uint16(quote), binary.BigEndian.Uint16(quote[2:])
	found := g.stack.FindTransportEndpoint(network, transport, id, nicID)
	ep, isTCP := found.(*tcp.Endpoint)
	if found == nil || isTCP && (ep.ID != id || !onItsWay(ep, seqnum.Value(binary.BigEndian.Uint32(quote[4:])))) {
		g.shard.counters.ErrorsIgnored++
		return false
	}
	if err.Kind() != stack.PacketTooBigTransportError {
		return true
	}
	headerLen := uint32(header.IPv4MinimumSize)
	if network == header.IPv6ProtocolNumber {
		headerLen = header.IPv6MinimumSize
	}
	// gVisor has taken the header off, and makes 0 of what no link may have.
	size := err.Info()
	mtu := size + headerLen
	switch {
	case size == 0 && network == header.IPv6ProtocolNumber, // RFC 8201 section 4
		mtu >= g.link.mtu,
		!isTCP && uint32(binary.BigEndian.Uint16(quote[4:])) <= size: // the datagram would have fitted
		g.shard.counters.ErrorsIgnored++
	case isTCP:
		g.learn(id.RemoteAddress, mtu, true)
		if hasSender(ep) {
			narrow(ep, mtu, headerLen)
		}
	default:
		g.learn(id.RemoteAddress, mtu, false)
		// Linux, too, tells a connected socket that a datagram was lost.
		if found, ok := found.(tcpip.Endpoint); ok {
			if s := g.sockets[found]; s != nil && s.failed != nil {
				s.failed(syscall.EMSGSIZE)
			}
		}
	}
	return false
}

// followPath makes the segments of a new connection fit what is known of its
// path.
func (c *Conn) followPath() {
	if mtu := c.g.shard.path(c.ep.ID.RemoteAddress).proved; mtu < c.g.link.mtu {
		narrow(c.ep, mtu, uint32(networkHeaderLen(c.remote.Addr())))
	}
}

// narrow makes the segments of ep fit packets of mtu bytes.
func narrow(ep *tcp.Endpoint, mtu, headerLen uint32) {
	if mtu < minPathMTU {
		_ = ep.SetSockOptInt(tcpip.MTUDiscoverOption, int(tcpip.PMTUDiscoveryDont)) // a value that it knows
	}
	makeSmaller(ep, max(mtu, minPathMTU)-headerLen)
}

// makeSmaller makes the segments of ep fit packets with size bytes behind the IP
// header, and sends what is on its way again: it is too large, and lost. gVisor
// would do so for one segment and wait for the others.
func makeSmaller(ep *tcp.Endpoint, size uint32) {
	snd := sending(ep)
	outstanding, payload := snd.Outstanding, snd.MaxPayloadSize
	snd.Outstanding = 0
	ep.HandleError(packetTooBig{size: size}, nil)
	if snd.MaxPayloadSize == payload {
		snd.Outstanding = outstanding // they fit
		return
	}
	forgetSent(ep)
}

// packetTooBig tells an endpoint how large its packets may be.
type packetTooBig struct {
	stack.TransportError
	size uint32 // bytes of an IP packet's payload that fit
}

// Kind implements stack.TransportError.
func (packetTooBig) Kind() stack.TransportErrorKind { return stack.PacketTooBigTransportError }

// Info implements stack.TransportError.
func (p packetTooBig) Info() uint32 { return p.size }
