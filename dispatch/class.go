package dispatch

import "strconv"

// Class says what steering does with a frame.
type Class uint8

// Only ClassFlow and ClassNeighbor go on. The classes after them are dropped
// and counted, each as a cause of its own.
const (
	// ClassFlow frames go to one flow group: the hash decides.
	ClassFlow Class = iota

	// ClassNeighbor is what every group learns from and one answers: ARP, NDP
	// (ICMPv6 133 to 137, RFC 4861), IGMP and MLD (ICMPv6 130 to 132 and 143,
	// RFC 2710 and 3810).
	ClassNeighbor

	// ClassTruncated frames end before the length they claim.
	ClassTruncated

	// ClassMalformed frames contradict themselves: the EtherType and the IP
	// version, a header and the packet it should fit in, more than
	// [MaxExtensionHeaders] or [MaxExtensionBytes].
	ClassMalformed

	// ClassVLAN frames carry a VLAN tag, which we do not speak.
	ClassVLAN

	// ClassUnknownEtherType frames are neither IP nor ARP. Frames with an IEEE
	// 802.3 length in place of the EtherType are among them.
	ClassUnknownEtherType

	// NumClasses is the number of classes, for tables of counters.
	NumClasses
)

// String returns the name of the class as counters use it.
func (c Class) String() string {
	switch c {
	case ClassFlow:
		return "flow"
	case ClassNeighbor:
		return "neighbor"
	case ClassTruncated:
		return "truncated"
	case ClassMalformed:
		return "malformed"
	case ClassVLAN:
		return "vlan"
	case ClassUnknownEtherType:
		return "unknown_ethertype"
	default:
		return "class " + strconv.Itoa(int(c))
	}
}
