package dispatch

import (
	"encoding/binary"
	"errors"
	"strings"
)

// VnetHeaderLen is the length in bytes of the header in front of every frame
// on a queue: struct virtio_net_hdr of linux/virtio_net.h, without the
// num_buffers field of the longer form.
const VnetHeaderLen = 10

// MaxFrameLen is the length in bytes of the longest frame the kernel hands
// over, without the vnet header: an IP packet of 65,535 bytes behind an
// Ethernet header with one VLAN tag. A shorter read buffer truncates frames
// silently.
const MaxFrameLen = 65535 + ethernetLen + vlanTagLen

// vlanTagLen is the length in bytes of an IEEE 802.1Q tag.
const vlanTagLen = 4

// Values of VnetHeader.Flags: VIRTIO_NET_HDR_F_* of linux/virtio_net.h.
const (
	// VnetNeedsCsum says that the transport checksum holds only the sum of
	// the pseudo header; the rest starts at CsumStart and goes to CsumOffset
	// from there. On a frame we read, the kernel vouches for its bytes.
	VnetNeedsCsum = 1
	// VnetDataValid says that the checksum has been checked.
	VnetDataValid = 2
)

// Values of VnetHeader.GSOType: VIRTIO_NET_HDR_GSO_* of linux/virtio_net.h.
const (
	VnetGSONone  = 0
	VnetGSOTCPv4 = 1
	VnetGSOUDP   = 3 // UDP fragmentation; not asked for, so never read
	VnetGSOTCPv6 = 4
	VnetGSOUDPL4 = 5 // UDP segmentation, IPv4 and IPv6
	// VnetGSOECN is added to a TCP type when the first segment carries CWR
	// and only the first may (RFC 3168, section 6.1.2).
	VnetGSOECN = 0x80
)

// VnetHeader says how much of a frame's work is still to be done: checksum
// and segmentation. All lengths are in bytes and count from the start of the
// Ethernet frame.
type VnetHeader struct {
	Flags   uint8
	GSOType uint8
	// HdrLen is the length of the headers that each segment repeats. On a
	// frame we read it is a hint and may cover payload too.
	HdrLen uint16
	// GSOSize is the payload of one segment (the MSS of TCP).
	GSOSize uint16
	// CsumStart is where the checksum begins to count, CsumOffset where it
	// goes, from CsumStart.
	CsumStart, CsumOffset uint16
}

// Decode reads the header from the first VnetHeaderLen bytes of b, which must
// be there. Fields are little endian on every machine, because OpenDevice
// asks the kernel for that; nothing is judged, see Valid.
func (h *VnetHeader) Decode(b []byte) {
	_ = b[VnetHeaderLen-1]
	h.Flags = b[0]
	h.GSOType = b[1]
	h.HdrLen = binary.LittleEndian.Uint16(b[2:])
	h.GSOSize = binary.LittleEndian.Uint16(b[4:])
	h.CsumStart = binary.LittleEndian.Uint16(b[6:])
	h.CsumOffset = binary.LittleEndian.Uint16(b[8:])
}

// Encode writes the header to the first VnetHeaderLen bytes of b, which must
// be there.
func (h *VnetHeader) Encode(b []byte) {
	_ = b[VnetHeaderLen-1]
	b[0] = h.Flags
	b[1] = h.GSOType
	binary.LittleEndian.PutUint16(b[2:], h.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], h.CsumStart)
	binary.LittleEndian.PutUint16(b[8:], h.CsumOffset)
}

// What Valid finds. They carry no values, because the data path counts them
// and must not allocate.
var (
	errVnetFrameShort  = errors.New("vnet header: frame is shorter than an Ethernet header")
	errVnetGSOType     = errors.New("vnet header: unknown GSO type; want none, TCPv4, TCPv6 or UDP_L4")
	errVnetGSOSize     = errors.New("vnet header: GSO without a segment size, or a segment size without GSO")
	errVnetGSOChecksum = errors.New("vnet header: GSO without NEEDS_CSUM, so segments would get no checksum")
	errVnetChecksum    = errors.New("vnet header: checksum lies outside the packet")
	errVnetHeaderLen   = errors.New("vnet header: header is longer than the frame")
)

// Valid judges the header of a received frame of frameLen bytes, the vnet
// header not counted: what it accepts can be used as an offset into the frame
// without another check. Flags it does not know are accepted, like a NIC's
// receive flags, since none of them changes where bytes are. It does not
// allocate.
func (h *VnetHeader) Valid(frameLen int) error {
	if frameLen < ethernetLen {
		return errVnetFrameShort
	}
	if h.Flags&VnetNeedsCsum != 0 {
		start := int(h.CsumStart)
		if start < ethernetLen || start+int(h.CsumOffset)+2 > frameLen {
			return errVnetChecksum
		}
	}
	if int(h.HdrLen) > frameLen {
		return errVnetHeaderLen
	}

	switch h.GSOType {
	case VnetGSONone:
		if h.GSOSize != 0 {
			return errVnetGSOSize
		}
		return nil
	case VnetGSOTCPv4, VnetGSOTCPv6, VnetGSOTCPv4 | VnetGSOECN, VnetGSOTCPv6 | VnetGSOECN, VnetGSOUDPL4:
		if h.GSOSize == 0 {
			return errVnetGSOSize
		}
		if h.Flags&VnetNeedsCsum == 0 {
			return errVnetGSOChecksum
		}
		return nil
	default:
		return errVnetGSOType
	}
}

// Offloads is the set of what the kernel may leave to us on frames we read,
// and with that the kinds of vnet header that can arrive. On frames we write,
// all of them are always allowed.
type Offloads uint8

// What DeviceConfig.Offload asks for (TUN_F_* of linux/if_tun.h). The kernel
// takes USO for IPv4 and IPv6 only together.
const (
	OffloadChecksum Offloads = 1 << iota // transport checksums may be partial
	OffloadTSO4                          // TCP over IPv4 comes as super-frames
	OffloadTSO6                          // TCP over IPv6 comes as super-frames
	OffloadECN                           // so do TCP segments that carry CWR
	OffloadUSO                           // UDP_SEGMENT sends come as one frame
)

// String names the set, as in "csum,tso4,tso6,ecn,uso"; the empty one is
// "none".
func (o Offloads) String() string {
	var names []string
	for i, name := range [...]string{"csum", "tso4", "tso6", "ecn", "uso"} {
		if o&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ",")
}
