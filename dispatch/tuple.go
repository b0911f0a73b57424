package dispatch

import "net/netip"

// Tuple names a flow as its received frames do: Src is the peer, Dst is us.
type Tuple struct {
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16

	// Proto is the IP protocol: 6 (TCP) or 17 (UDP). 0 counts as TCP; the two
	// differ only where just one of their hash types is on.
	Proto uint8
}

// HashTuple returns the hash that [Toeplitz.Parse] gives to unfragmented TCP and
// UDP frames of the flow. The control plane uses it to choose a local port
// (DstPort) for an outgoing flow, so that the replies reach the group that
// dials. Where the hash types leave the ports out, no choice of a port changes
// the group.
//
// IPv4-mapped addresses count as IPv4, as they do on the wire, and zones are
// ignored. The hash is 0 if the addresses are invalid or of two families: there
// is no such frame.
func (t *Toeplitz) HashTuple(flow Tuple) uint32 {
	h, ipv6, ok := t.addrs(flow.Src, flow.Dst)
	if !ok {
		return 0
	}
	if flow.Proto == 0 {
		flow.Proto = protoTCP
	}
	return t.byFlow(ipv6, flow.Proto, h, uint32(flow.SrcPort)<<16|uint32(flow.DstPort))
}

// HashAddrs is [Toeplitz.HashTuple] for frames hashed by their addresses alone:
// fragments, ICMP other than errors, and protocols that are not TCP or UDP.
func (t *Toeplitz) HashAddrs(src, dst netip.Addr) uint32 {
	h, ipv6, _ := t.addrs(src, dst)
	return t.byAddrs(ipv6, h)
}

func (t *Toeplitz) addrs(src, dst netip.Addr) (h uint32, ipv6, ok bool) {
	src, dst = src.Unmap(), dst.Unmap()
	switch {
	case src.Is4() && dst.Is4():
		s, d := src.As4(), dst.As4()
		return t.addrs4(&s, &d), false, true
	case src.Is6() && dst.Is6():
		s, d := src.As16(), dst.As16()
		return t.addrs6(&s, &d), true, true
	}
	return 0, false, false
}
