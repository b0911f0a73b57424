package shard

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"numastack/dispatch"
)

// deliverDatagrams cuts a UDP super-frame into the datagrams it was made of
// and delivers each. The kernel sends many datagrams of one flow in one frame
// (UDP segmentation offload, linux/virtio_net.h, VIRTIO_NET_HDR_GSO_UDP_L4);
// gVisor knows no such frame, but a system call for each would cost more than
// the copy here.
func (s *Shard) deliverDatagrams(g *Group, vnet *dispatch.VnetHeader, p *dispatch.Parsed, frame []byte) {
	size := int(vnet.GSOSize)
	if size == 0 || p.Payload == 0 || int(p.Payload)+size > len(s.scratch.datagram) {
		s.dropped[dropVnet]++
		return
	}
	headers := frame[:p.Payload]
	payload := frame[p.Payload:p.Length]
	out := s.scratch.datagram[:]
	copy(out, headers)
	one := *p
	for len(payload) > 0 {
		n := min(size, len(payload))
		copy(out[p.Payload:], payload[:n])
		payload = payload[n:]
		one.Length = int(p.Payload) + n
		datagram := out[:one.Length]

		// The lengths are those of the super-frame. The checksum of the UDP
		// header is not looked at: the kernel vouches for the frame.
		header.UDP(datagram[p.L4:]).SetLength(uint16(one.Length - int(p.L4)))
		if p.IPv6 {
			header.IPv6(datagram[p.L3:]).SetPayloadLength(uint16(one.Length - int(p.L3) - header.IPv6MinimumSize))
		} else {
			ip := header.IPv4(datagram[p.L3:])
			ip.SetTotalLength(uint16(one.Length - int(p.L3)))
			ip.SetChecksum(0)
			ip.SetChecksum(^ip.CalculateChecksum())
		}
		g.deliver(&dispatch.VnetHeader{Flags: dispatch.VnetDataValid}, &one, datagram, nil, 0)
	}
}
