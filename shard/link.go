package shard

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

const (
	ethernetLen = header.EthernetMinimumSize

	// gsoMaxSize is the largest packet that fits the 16-bit length of an IP
	// header.
	gsoMaxSize = 65535
)

// link is the network device that a group's netstack sees. What the netstack
// sends is queued on the owner's transmit queue; what the owner receives goes
// to the dispatcher that the netstack attaches here.
//
// Owned by the thread that owns the group; the addresses are immutable.
type link struct {
	g          *Group
	dispatcher stack.NetworkDispatcher
	sent       uint64 // packets that the netstack has sent
	mtu        uint32
	mac        tcpip.LinkAddress
	gso        bool // the kernel takes segments larger than the MTU

	// vouched is whether the kernel vouches for the transport checksum of the
	// packet that is being delivered.
	vouched bool

	// muted drops answers to neighbor requests: every group learns from a
	// request, one answers it.
	muted bool
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)

	_ stack.QueueingDiscipline = (*link)(nil)
)

// WritePacket implements stack.QueueingDiscipline. Being the discipline itself
// spares the list that gVisor's own one makes for each packet.
func (l *link) WritePacket(pkt *stack.PacketBuffer) tcpip.Error {
	l.sent++
	if !l.muted || !isNeighborAnswer(pkt) {
		var queue *dispatch.Queue
		if l.g.arrivals != nil {
			queue = l.g.arrivals.queue(pkt)
		}
		l.g.shard.tx.push(pkt, queue)
	}
	return nil
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		_ = l.WritePacket(pkt)
	}
	return pkts.Len(), nil
}

// AddHeader implements stack.NetworkLinkEndpoint.
func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	eth := header.Ethernet(pkt.LinkHeader().Push(ethernetLen))
	eth.Encode(&header.EthernetFields{
		SrcAddr: l.mac,
		DstAddr: pkt.EgressRoute.RemoteLinkAddress,
		Type:    pkt.NetworkProtocolNumber,
	})
}

// ParseHeader implements stack.NetworkLinkEndpoint.
func (l *link) ParseHeader(pkt *stack.PacketBuffer) bool {
	_, ok := pkt.LinkHeader().Consume(ethernetLen)
	return ok
}

// Attach implements stack.NetworkLinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) { l.dispatcher = d }

// IsAttached implements stack.NetworkLinkEndpoint.
func (l *link) IsAttached() bool { return l.dispatcher != nil }

// MTU implements stack.NetworkLinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu }

// SetMTU implements stack.NetworkLinkEndpoint.
func (l *link) SetMTU(mtu uint32) { l.mtu = mtu }

// MaxHeaderLength implements stack.NetworkLinkEndpoint. The vnet header is
// pushed in front of the frame when it is flushed.
func (l *link) MaxHeaderLength() uint16 { return dispatch.VnetHeaderLen + ethernetLen }

// LinkAddress implements stack.NetworkLinkEndpoint.
func (l *link) LinkAddress() tcpip.LinkAddress { return l.mac }

// SetLinkAddress implements stack.NetworkLinkEndpoint.
func (l *link) SetLinkAddress(mac tcpip.LinkAddress) { l.mac = mac }

// Capabilities implements stack.NetworkLinkEndpoint. gVisor asks for receive
// checksum offload once per packet, when it is delivered. Transmit checksum
// offload is not among them: with it gVisor leaves the checksum out of packets
// without GSO options too, and those carry no instruction for the kernel to
// fill it in.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if l.vouched {
		return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityResolutionRequired
}

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.gso {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// GSOMaxSize implements stack.GSOEndpoint.
func (l *link) GSOMaxSize() uint32 { return gsoMaxSize }

// ARPHardwareType implements stack.NetworkLinkEndpoint.
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// Wait, Close and SetOnCloseAction implement stack.NetworkLinkEndpoint: the
// link has no goroutine and owns no device.
func (l *link) Wait()                   {}
func (l *link) Close()                  {}
func (l *link) SetOnCloseAction(func()) {}

// isNeighborAnswer reports whether pkt is an ARP reply or an NDP neighbor
// advertisement (RFC 826, RFC 4861 section 4.4).
func isNeighborAnswer(pkt *stack.PacketBuffer) bool {
	switch {
	case pkt.NetworkProtocolNumber == header.ARPProtocolNumber:
		return header.ARP(pkt.NetworkHeader().Slice()).Op() == header.ARPReply
	case pkt.TransportProtocolNumber == header.ICMPv6ProtocolNumber:
		h := pkt.TransportHeader().Slice()
		return len(h) > 0 && header.ICMPv6(h).Type() == header.ICMPv6NeighborAdvert
	}
	return false
}
