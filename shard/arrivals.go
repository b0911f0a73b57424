package shard

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

// arrivalSlots is how many flows' queues are remembered; two flows that share
// a slot may be answered on each other's queue.
const arrivalSlots = 1024

// arrivals remembers on which queue the frames of a flow arrive, for stacks
// without kernel steering. An answer must leave on the same one: the kernel
// moves a flow to the queue that last sent for it, after the answer was
// processed (tun_flow_update of drivers/net/tun.c), and what arrives there
// then overtakes what the other queue and the ring still hold.
//
// Each group has its own, and takes it along to another shard.
type arrivals struct {
	queues []*dispatch.Queue   // by shard
	slots  [arrivalSlots]uint8 // 1 + shard, 0: unknown
}

// note records that a frame came through the queue of a shard.
func (a *arrivals) note(frame []byte, p *dispatch.Parsed, shard int) {
	var ports []byte
	if p.Payload != 0 { // unfragmented TCP or UDP
		ports = frame[p.L4:]
	}
	a.slots[flowSlot(frame[p.L3:], ports, p.IPv6)] = uint8(shard) + 1
}

// queue returns where to send pkt, or nil when its flow is unknown.
func (a *arrivals) queue(pkt *stack.PacketBuffer) *dispatch.Queue {
	var ports []byte
	if p := pkt.TransportProtocolNumber; p == header.TCPProtocolNumber || p == header.UDPProtocolNumber {
		ports = pkt.TransportHeader().Slice()
	}
	switch pkt.NetworkProtocolNumber {
	case header.IPv4ProtocolNumber:
		return a.queueOf(pkt.NetworkHeader().Slice(), ports, false)
	case header.IPv6ProtocolNumber:
		return a.queueOf(pkt.NetworkHeader().Slice(), ports, true)
	}
	return nil
}

// queueOf is queue for a packet's headers.
func (a *arrivals) queueOf(ip, ports []byte, v6 bool) *dispatch.Queue {
	shard := a.slots[flowSlot(ip, ports, v6)]
	if shard == 0 {
		return nil
	}
	return a.queues[shard-1]
}

// flowSlot is the same for both directions of a flow.
func flowSlot(ip, ports []byte, v6 bool) uint32 {
	var x uint32
	if v6 {
		for i := 8; i < 40; i += 4 {
			x ^= binary.LittleEndian.Uint32(ip[i:])
		}
	} else {
		x = binary.LittleEndian.Uint32(ip[12:]) ^ binary.LittleEndian.Uint32(ip[16:])
	}
	if len(ports) >= 4 {
		x ^= uint32(binary.LittleEndian.Uint16(ports) ^ binary.LittleEndian.Uint16(ports[2:]))
	}
	return x * golden >> 22 % arrivalSlots
}

// golden is 2^32 divided by the golden ratio (Knuth, TAOCP 6.4).
const golden = 0x9e3779b1
