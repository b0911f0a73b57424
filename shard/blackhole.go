package shard

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// gVisor learns the path's MTU from ICMP alone. On a path where such messages
// are lost, a connection stands still with its first full segment. RFC 4821
// section 7.7 calls this a full-stop timeout, and has the packets made smaller.

// blackHoleTimeouts is how many timeouts in a row, without an acknowledgement in
// between, are no accident: about 0.6 s on a near path.
const blackHoleTimeouts = 2

// Packet sizes in bytes to fall back to, one after the other: what every IPv6
// link carries (RFC 8200 section 5), and what every IPv4 host takes (RFC 1122
// section 3.3.3).
const (
	blackHoleMTU  = 1280
	blackHoleMTU4 = 576
)

// leastPayload is the smallest segment in bytes that a peer's small window is a
// reason for: the default of RFC 9293 section 3.7.1.
const leastPayload = blackHoleMTU4 - header.IPv4MinimumSize - header.TCPMinimumSize

// stuck is a connection whose retransmission timer has fired.
type stuck struct {
	una    seqnum.Value // what it waited for then
	seen   uint64       // its timeouts
	inVain uint64       // of those, the last ones with this una
}

// lookForBlackHoles is called when a retransmission timer has fired. It makes
// the segments of connections smaller that have waited for one acknowledgement
// through several timeouts, with at least one full segment on the way.
func (g *Group) lookForBlackHoles() {
	before := g.timeouts
	if g.timeouts = g.tcp.stats.Timeouts.Value(); g.timeouts == before {
		return // it was another timer
	}
	waiting := make(map[*tcp.Endpoint]stuck)
	for _, tep := range g.stack.RegisteredEndpoints() {
		ep, ok := tep.(*tcp.Endpoint)
		if !ok || !hasSender(ep) {
			continue
		}
		snd := sending(ep)
		timeouts := ep.Stats().(*tcp.Stats).SendErrors.Timeouts.Value()
		if timeouts == 0 {
			continue
		}
		s := g.stuck[ep]
		if wnd := int(snd.SndWnd); timeouts != s.seen && snd.SndUna != snd.SndNxt && snd.Outstanding == 0 && wnd > 0 && wnd < snd.MaxPayloadSize {
			// The peer has taken back a part of its window, below the segment
			// that it has lost (RFC 9293 section 3.8.6 wants a sender to cope
			// with that). gVisor would send nothing and set no timer.
			g.shard.counters.WindowsShrunk++
			makeSmaller(ep, uint32(max(wnd, leastPayload)+header.TCPMinimumSize))
		}
		if s.una != snd.SndUna {
			s.una, s.inVain = snd.SndUna, 0
		}
		s.inVain += timeouts - s.seen // none, if it was another connection's
		s.seen = timeouts
		full := int(snd.SndUna.Size(snd.SndNxt)) >= snd.MaxPayloadSize
		if full && s.inVain >= blackHoleTimeouts && shrink(ep, snd.MaxPayloadSize) {
			g.shard.counters.BlackHoles++
			s.inVain = 0
		}
		waiting[ep] = s
	}
	g.stuck = waiting
}

// shrink makes the segments of ep fit the next smaller packet size and sends the
// first one again. It returns false when they are as small as they get.
func shrink(ep *tcp.Endpoint, payload int) bool {
	sizes := []int{blackHoleMTU - header.IPv4MinimumSize, blackHoleMTU4 - header.IPv4MinimumSize}
	if ep.ID.RemoteAddress.BitLen() == header.IPv6AddressSizeBits {
		sizes = []int{blackHoleMTU - header.IPv6MinimumSize}
	}
	for _, size := range sizes {
		if payload > size-header.TCPMinimumSize {
			makeSmaller(ep, uint32(size))
			return true
		}
	}
	return false
}
