package shard

import (
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// maxPasses bounds how often one endpoint is run in a turn. A pass handles up
// to 100 segments, and a burst never brings more than a budget of them.
const maxPasses = 64

// inlineTCP is gVisor's TCP without its processor goroutines: a received
// segment is queued on its endpoint while the burst is delivered, and process
// runs the touched endpoints afterwards, on the same thread. One ACK per
// connection and burst falls out of it.
//
// QueuePacket is called with the demuxer's locks held, so it must not process.
type inlineTCP struct {
	stack.TransportProtocol
	stack.SendBufSizeProto // asserted by gVisor at the first ACK of sent data

	g            *Group
	stats        tcpip.TCPStats  // gVisor's counters, which its own processor would raise
	touched      []*tcp.Endpoint // endpoints with segments of this burst
	touchedConns []*Conn         // the same, of those whose frames take the short way
	strays       []strayQueue    // where gVisor re-queues an endpoint by itself
	routed       bool            // a SYN of this burst came from beyond the link
}

func newInlineTCP(g *Group, s *stack.Stack) *inlineTCP {
	proto := tcp.NewProtocol(s)
	// Ends the processor goroutines; nothing else needs them as long as only
	// the owner's thread calls endpoints.
	proto.Close()
	proto.Wait()
	return &inlineTCP{
		TransportProtocol: proto,
		SendBufSizeProto:  proto.(stack.SendBufSizeProto),
		g:                 g,
		strays:            strayQueues(proto),
	}
}

// QueuePacket implements gVisor's queued transport protocol.
func (p *inlineTCP) QueuePacket(tep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	if ep := tep.(*tcp.Endpoint); p.receive(ep, id, pkt) {
		p.touch(ep)
	}
}

// receive queues a segment on its endpoint and returns whether it is there.
func (p *inlineTCP) receive(ep *tcp.Endpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	if !pkt.RXChecksumValidated {
		if !validChecksum(pkt) {
			p.stats.ChecksumErrors.Increment()
			return false
		}
		pkt.RXChecksumValidated = true
	}
	// Read before the segment shares the packet: after that gVisor copies the
	// memory that the header lies in each time it hands it out.
	flags := header.TCP(pkt.TransportHeader().Slice()).Flags()
	s, err := newIncomingSegment(id, &p.g.clock, pkt)
	if err != nil {
		p.stats.InvalidSegmentsReceived.Increment()
		return false
	}
	p.stats.ValidSegmentsReceived.Increment()
	if flags&header.TCPFlagRst != 0 {
		p.stats.ResetsReceived.Increment()
	} else if flags&header.TCPFlagSyn != 0 && !p.g.set.onLink(netipAddr(id.RemoteAddress)) {
		p.routed = true
	}
	queued := enqueueSegment(ep, s)
	segmentDecRef(s)
	return queued
}

// touch notes that ep has segments. A burst touches few endpoints of a group,
// so a scan beats a map.
func (p *inlineTCP) touch(ep *tcp.Endpoint) {
	if !slices.Contains(p.touched, ep) {
		p.touched = append(p.touched, ep)
		p.g.activate()
	}
}

// process runs TCP for every endpoint that the burst touched, and for those
// that one of them touched in turn. It returns whether there was any.
func (p *inlineTCP) process() (worked bool) {
	for {
		for i, c := range p.touchedConns {
			before := sending(c.ep).SndUna
			p.runConn(c)
			if sending(c.ep).SndUna != before {
				p.g.confirm(c)
			}
			p.touchedConns[i] = nil
			worked = true
		}
		p.touchedConns = p.touchedConns[:0]
		for i := 0; i < len(p.touched); i++ {
			p.run(p.touched[i])
			p.touched[i] = nil
			worked = true
		}
		p.touched = p.touched[:0]
		// gVisor hands an endpoint on by itself when a closed one passes a
		// segment to its successor, when a SYN ends TIME_WAIT, and when the
		// last ACK of a handshake carries data.
		for _, q := range p.strays {
			for ep := q.pop(); ep != nil; ep = q.pop() {
				p.touch(ep)
			}
		}
		if len(p.touched) == 0 {
			p.routed = false
			return worked
		}
	}
}

// Option implements stack.TransportProtocol. gVisor asks for TCPRecovery when a
// connection negotiates SACK. Connections to peers on the link do without RACK
// and its tail loss probes (RFC 8985), with the recovery of RFC 6675: gVisor
// sends a probe after two round-trip times, which is nothing next to the 40 ms
// by which a receiver may delay an ACK while its reader is slow, and cuts the
// congestion window when the probe turns out to have been needless. Beyond a
// router, where round trips are long and tails do get lost, RACK stays.
func (p *inlineTCP) Option(option tcpip.GettableTransportProtocolOption) tcpip.Error {
	if err := p.TransportProtocol.Option(option); err != nil {
		return err
	}
	if recovery, ok := option.(*tcpip.TCPRecovery); ok && !p.routed {
		*recovery &^= tcpip.TCPRACKLossDetection
	}
	return nil
}

// run processes ep's segments as gVisor's own processor does, state by state.
// A handler may return with segments still queued: handleConnecting stops at
// the ACK that ends the handshake, and all of them after 100 segments.
func (p *inlineTCP) run(ep *tcp.Endpoint) {
	for range maxPasses {
		if !segmentsQueued(ep) {
			return
		}
		switch tcp.EndpointState(ep.State()) {
		case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
			handleConnecting(ep)
		case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing:
			handleConnected(ep)
		case tcp.StateTimeWait:
			handleTimeWait(ep)
		case tcp.StateListen:
			handleListen(ep)
		default: // closed or failed: another endpoint may want them, or they earn a RST
			ep.StopWork()
			drainClosingSegmentQueue(ep)
			ep.ResumeWork()
		}
	}
}

// validChecksum verifies the checksum of a received TCP packet whose frame
// came without the kernel's word for it.
func validChecksum(pkt *stack.PacketBuffer) bool {
	network := pkt.Network()
	_, valid, ok := header.TCPValid(
		header.TCP(pkt.TransportHeader().Slice()),
		func() uint16 { return pkt.Data().Checksum() },
		uint16(pkt.Data().Size()),
		network.SourceAddress(),
		network.DestinationAddress(),
		false)
	return ok && valid
}
