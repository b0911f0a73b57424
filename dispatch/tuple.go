package dispatch

import "net/netip"

// Tuple names a flow as its received frames do: Src is the peer, Dst is us.
type Tuple struct {
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
}

// HashTuple returns the hash that [Toeplitz.Parse] gives to unfragmented TCP and
// UDP frames of the flow. The control plane uses it to choose a local port
// (DstPort) for an outgoing flow, so that the replies reach the group that
// dials.
//
// IPv4-mapped addresses count as IPv4, as they do on the wire, and zones are
// ignored. The hash is 0 if the addresses are invalid or of two families: there
// is no such frame.
func (t *Toeplitz) HashTuple(flow Tuple) uint32 {
	h, ok := t.addrs(flow.Src, flow.Dst)
	if !ok {
		return 0
	}
	return h ^ t.ports(flow.Dst.Unmap().Is6(), uint32(flow.SrcPort)<<16|uint32(flow.DstPort))
}

// HashAddrs is [Toeplitz.HashTuple] for frames hashed by their addresses alone:
// fragments, ICMP other than errors, and protocols that are not TCP or UDP.
func (t *Toeplitz) HashAddrs(src, dst netip.Addr) uint32 {
	h, _ := t.addrs(src, dst)
	return h
}

func (t *Toeplitz) addrs(src, dst netip.Addr) (h uint32, ok bool) {
	src, dst = src.Unmap(), dst.Unmap()
	switch {
	case src.Is4() && dst.Is4():
		s, d := src.As4(), dst.As4()
		return t.addrs4(&s, &d), true
	case src.Is6() && dst.Is6():
		s, d := src.As16(), dst.As16()
		return t.addrs6(&s, &d), true
	}
	return 0, false
}
