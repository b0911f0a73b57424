package dispatch

import "encoding/binary"

// Limits of the chain of IPv6 extension headers that the parser and the steering
// program follow. A chain beyond them only costs time, so it is malformed.
const (
	// MaxExtensionHeaders is how many headers there may be: hop-by-hop options,
	// routing, fragment, destination options, authentication. RFC 8200 section
	// 4.1 asks for at most six per packet; the rest is tolerance.
	MaxExtensionHeaders = 8

	// MaxExtensionBytes is how long they may be together, 1240: what fits behind
	// the IPv6 header in a packet that every link carries (RFC 8200 section 5).
	MaxExtensionBytes = minMTUIPv6 - ipv6Len
)

// extensionLen is the least that an extension header takes, in bytes.
const extensionLen = 8

// The second word of the fragment header without its reserved bits (RFC 8200
// section 4.5). The offset is in bytes as it stands.
const (
	ipv6FragmentBits   = 0xfff9 // offset, more fragments
	ipv6FragmentOffset = 0xfff8
)

// extensions is where a walk along IPv6 extension headers ended.
type extensions struct {
	proto uint8 // what comes after the last header
	whole bool  // the walk reached a transport header, at end
	end   int   // offset in the packet

	// fragment is the offset of the first fragment header that does not say
	// "first and last", 0 if there is none.
	fragment int
}

// walkExtensions follows the extension headers of an IPv6 packet from offset at
// on, where a header of type next begins. Headers of an unknown type end the
// walk like a transport protocol does, and so does encapsulating security,
// behind which there is nothing we could read. A fragment with an offset ends
// it too: what follows is no header.
func walkExtensions(packet []byte, at int, next uint8) extensions {
	e := extensions{proto: next, end: at}
	last := min(at+MaxExtensionBytes, len(packet))
	for n := 0; ; n++ {
		if !isExtension(e.proto) {
			e.whole = true
			return e
		}
		if n == MaxExtensionHeaders || e.end+extensionLen > last {
			return e
		}
		header := packet[e.end:]
		length := extensionLen + int(header[1])*8
		switch e.proto {
		case protoAuth: // RFC 4302 section 2.2
			length = extensionLen + int(header[1])*4
		case protoFragment:
			length = extensionLen
			bits := binary.BigEndian.Uint16(header[2:])
			if bits&ipv6FragmentBits != 0 && e.fragment == 0 {
				e.fragment = e.end
			}
			if bits&ipv6FragmentOffset != 0 {
				e.proto = header[0]
				return e
			}
		}
		e.proto, e.end = header[0], e.end+length
		if e.end > last {
			return e
		}
	}
}

func isExtension(proto uint8) bool {
	switch proto {
	case protoHopByHop, protoRouting, protoFragment, protoDestination, protoAuth:
		return true
	}
	return false
}
