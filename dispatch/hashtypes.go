package dispatch

import (
	"fmt"
	"strings"
)

// HashTypes is a set of RSS hash types: which headers the hash may look at.
// They are those of Windows ("RSS Hashing Types" of the NDIS documentation;
// NDIS_HASH_IPV4 and so on in ntddndis.h).
//
// A TCP or UDP packet is hashed by addresses and ports if the type of its
// protocol is in the set, else by its addresses like all other IP packets. If
// the IP type is not in the set either, its hash is 0.
//
// What to give up which type for:
//
//   - Without TCP and UDP types all flows between two hosts share a flow group,
//     so their packets keep one order and fragments need no memory: they go
//     where the unfragmented ones go. But a single peer (a proxy, a load
//     generator) then loads a single shard.
//   - Network cards often leave only the UDP types out, because a card puts the
//     fragments of a flow on another queue than its unfragmented datagrams.
//     Here user space brings them together (see [Fragments]), for the price of
//     a copy to another shard.
//   - Without an IP type, everything of that family that has no type of its own
//     gathers in bucket 0: fragments on their way to their flow, pings, other
//     protocols.
type HashTypes uint8

// The hash types. HashAll is what to use without a reason for less.
const (
	HashIPv4 HashTypes = 1 << iota
	HashTCPIPv4
	HashUDPIPv4
	HashIPv6
	HashTCPIPv6
	HashUDPIPv6

	HashAll HashTypes = 1<<iota - 1
)

const (
	// hashPorts are the types that look at ports.
	hashPorts = HashTCPIPv4 | HashUDPIPv4 | HashTCPIPv6 | HashUDPIPv6

	// ipv6Types is how far the types of IPv6 lie above those of IPv4.
	ipv6Types = 3
)

// hashTypeNames are the names in ntddndis.h without their prefix, by bit.
var hashTypeNames = [...]string{"IPV4", "TCP_IPV4", "UDP_IPV4", "IPV6", "TCP_IPV6", "UDP_IPV6"}

// String returns the names of the types, such as "IPV4,TCP_IPV4", or "NONE".
func (types HashTypes) String() string {
	var names []string
	for bit, name := range hashTypeNames {
		if types&(1<<bit) != 0 {
			names = append(names, name)
		}
	}
	if rest := types &^ HashAll; rest != 0 {
		names = append(names, fmt.Sprintf("%#x", uint8(rest)))
	}
	if names == nil {
		return "NONE"
	}
	return strings.Join(names, ",")
}

// ParseHashTypes is the reverse of [HashTypes.String]. It takes the names in
// any order and case, and "ALL" and "NONE" in place of a list.
func ParseHashTypes(s string) (HashTypes, error) {
	switch strings.ToUpper(strings.TrimSpace(s)) {
	case "ALL":
		return HashAll, nil
	case "NONE":
		return 0, nil
	}
	var types HashTypes
names:
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		for bit, name := range hashTypeNames {
			if strings.EqualFold(part, name) {
				types |= 1 << bit
				continue names
			}
		}
		return 0, fmt.Errorf("hash type %q in %q: want ALL, NONE, or a list of %s", part, s, strings.Join(hashTypeNames[:], ","))
	}
	return types, nil
}

// hashType returns the type that decides how packets of an IP protocol are
// hashed.
func hashType(ipv6 bool, proto uint8) HashTypes {
	kind := HashIPv4
	switch proto {
	case protoTCP:
		kind = HashTCPIPv4
	case protoUDP:
		kind = HashUDPIPv4
	}
	if ipv6 {
		kind <<= ipv6Types
	}
	return kind
}

// usePorts reports whether packets of an IP protocol are hashed by ports too.
func (types HashTypes) usePorts(ipv6 bool, proto uint8) bool {
	return types&hashPorts&hashType(ipv6, proto) != 0
}
