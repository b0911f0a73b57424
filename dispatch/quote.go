package dispatch

import "encoding/binary"

// icmpv4Error reports whether messages of this type quote a packet (RFC 1122
// section 3.2.2; icmp_pointers in net/ipv4/icmp.c).
func icmpv4Error(kind uint8) bool {
	switch kind {
	case 3, // destination unreachable
		4,  // source quench
		5,  // redirect
		11, // time exceeded
		12: // parameter problem
		return true
	}
	return false
}

// hashQuoted4 replaces the hash of an ICMP error by the one of the flow that it
// is about. The quote may end anywhere and its lengths are not to be trusted:
// routers quote as little as the header and eight bytes (RFC 792).
func (t *Toeplitz) hashQuoted4(quote []byte, p *Parsed) {
	if len(quote) < ipv4Len {
		return
	}
	headerLen := int(quote[0]&0xf) * 4
	if quote[0]>>4 != 4 || headerLen < ipv4Len || binary.BigEndian.Uint16(quote[6:])&ipv4FragmentOffset != 0 {
		return
	}
	t.hashQuoted(quote, headerLen, quote[9], t.addrs4((*[4]byte)(quote[16:]), (*[4]byte)(quote[12:])), p)
}

// hashQuoted6 is hashQuoted4 for ICMPv6.
func (t *Toeplitz) hashQuoted6(quote []byte, p *Parsed) {
	if len(quote) < ipv6Len || quote[0]>>4 != 6 {
		return
	}
	chain := walkExtensions(quote, ipv6Len, quote[6])
	if !chain.whole {
		return
	}
	t.hashQuoted(quote, chain.end, chain.proto, t.addrs6((*[16]byte)(quote[24:]), (*[16]byte)(quote[8:])), p)
}

// hashQuoted takes over the flow of a quoted packet whose transport header
// begins at offset l4 and whose exchanged addresses hash to addrs, if the quote
// reaches as far as the hash of the flow does.
func (t *Toeplitz) hashQuoted(quote []byte, l4 int, proto uint8, addrs uint32, p *Parsed) {
	switch {
	case !t.types.usePorts(p.IPv6, proto):
		p.Hash = t.byAddrs(p.IPv6, addrs)
	case l4+portsLen <= len(quote):
		ports := binary.BigEndian.Uint32(quote[l4:])
		p.Hash = addrs ^ t.ports(p.IPv6, ports<<16|ports>>16)
	}
}
