package shard

import (
	"encoding/binary"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"numastack/dispatch"
)

// This file is the short way of a segment: from the hash that steered its frame
// to the connection it belongs to, and from there to its acknowledgement.

// flow is what a connection keeps for the short way. Owned by its shard.
type flow struct {
	hash uint32 // its key in Group.flows
	id   stack.TransportEndpointID

	touched bool         // has segments of this burst
	next    seqnum.Value // after those of them that merely continue the stream

	confirmed int64 // when it has confirmed its neighbor

	// The acknowledgement of what has arrived.
	waiting int   // segments with data that came since nothing was unacknowledged
	owed    bool  // in Shard.owed
	delayed bool  // in Shard.delayed
	ackAt   int64 // when it is sent if the application does not answer before
	quick   uint8 // how many more are sent without delay
}

// addFlow lets the frames of an open connection take the short way.
func (g *Group) addFlow(c *Conn) {
	h := g.shard.set.toeplitz.HashTuple(dispatch.Tuple{
		Src: c.remote.Addr(), SrcPort: c.remote.Port(),
		Dst: c.local.Addr(), DstPort: c.local.Port(),
	})
	if g.flows[h] != nil {
		return // another one has the same hash; the netstack finds this one too
	}
	c.flow.hash = h
	c.flow.id = c.ep.ID
	g.flows[h] = c
}

func (g *Group) removeFlow(c *Conn) {
	if g.flows[c.flow.hash] == c {
		delete(g.flows, c.flow.hash)
	}
}

// flowOf returns the open connection that a frame with a TCP segment belongs
// to, or nil when the netstack has to find out. It is what Linux calls early
// demultiplexing (tcp_v4_early_demux): an established connection has passed
// every check that IP and the demultiplexers would make for its addresses and
// ports, so what is left is the packet's own: no options, a valid checksum.
func (g *Group) flowOf(p *dispatch.Parsed, frame []byte) *Conn {
	if p.Proto != uint8(header.TCPProtocolNumber) || p.Payload == 0 {
		return nil
	}
	c := g.flows[p.Hash]
	if c == nil || c.ep.EndpointState() != tcp.StateEstablished {
		return nil
	}
	id := stack.TransportEndpointID{
		RemotePort: binary.BigEndian.Uint16(frame[p.L4:]),
		LocalPort:  binary.BigEndian.Uint16(frame[p.L4+2:]),
	}
	packet := frame[p.L3:p.Length]
	if p.IPv6 {
		if p.L4 != p.L3+header.IPv6MinimumSize {
			return nil
		}
		ip := header.IPv6(packet)
		id.RemoteAddress, id.LocalAddress = ip.SourceAddress(), ip.DestinationAddress()
	} else {
		ip := header.IPv4(packet)
		if p.L4 != p.L3+header.IPv4MinimumSize || !ip.IsChecksumValid() {
			return nil
		}
		id.RemoteAddress, id.LocalAddress = ip.SourceAddress(), ip.DestinationAddress()
	}
	if id != c.flow.id {
		return nil
	}
	return c
}

// needsNoIP reports whether a frame has a segment that IP would just hand on: of no
// open connection, but unfragmented, from a host, to one of the stack's addresses.
func (g *Group) needsNoIP(p *dispatch.Parsed, frame []byte) bool {
	if p.Proto != uint8(header.TCPProtocolNumber) || p.Payload == 0 {
		return false
	}
	src, dst, usual := usualAddresses(p, frame)
	return usual && g.set.isOurs(dst) && g.set.mayBePeer(src)
}

// consumeHeaders makes a packet with a segment what IP would have made of it.
func (g *Group) consumeHeaders(p *dispatch.Parsed, pkt *stack.PacketBuffer) bool {
	pkt.NICID = nicID
	pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
	if p.IPv6 {
		pkt.NetworkProtocolNumber = header.IPv6ProtocolNumber
	}
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	pkt.RXChecksumValidated = g.link.vouched
	_, okNetwork := pkt.NetworkHeader().Consume(int(p.L4 - p.L3))
	_, okTransport := pkt.TransportHeader().Consume(int(p.Payload - p.L4))
	return okNetwork && okTransport
}

// deliverSegment queues the segment of a frame on its connection.
func (g *Group) deliverSegment(c *Conn, p *dispatch.Parsed, frame []byte, pkt *stack.PacketBuffer) {
	if !g.consumeHeaders(p, pkt) || !g.tcp.receive(c.ep, c.flow.id, pkt) {
		return
	}
	f := &c.flow
	if !f.touched {
		f.touched = true
		f.next = receiving(c.ep).RcvNxt
		if sending(c.ep).MaxSentAck == f.next {
			f.waiting, f.ackAt = 0, 0
		}
		g.tcp.touchedConns = append(g.tcp.touchedConns, c)
		g.activate()
	}
	if n := p.Length - int(p.Payload); n > 0 {
		f.waiting++
		switch seq := seqnum.Value(header.TCP(frame[p.L4:]).SequenceNumber()); {
		case seq == f.next:
			f.next.UpdateForward(seqnum.Size(n))
		case f.next.LessThan(seq):
			g.outOfOrder++
		}
	}
}

// runConn runs TCP for a connection of the short way. gVisor acknowledges what
// arrived as soon as it is processed, before the application can answer, and an
// answer carries the acknowledgement for nothing. So gVisor is told that what
// merely continues the stream is acknowledged already; acknowledge makes up for
// it later in the turn. When anything else has arrived, a segment behind a gap,
// one that fills it, a FIN, gVisor finds that this is not all, and acknowledges
// at once as RFC 5681 wants it.
//
// One thing differs from RFC 7323 section 4.3: the time stamp that is echoed is
// that of the last segment, also when an earlier one waits for its
// acknowledgement, so the peer does not count our delay into its round trip time.
func (p *inlineTCP) runConn(c *Conn) {
	f := &c.flow
	f.touched = false
	acked := &sending(c.ep).MaxSentAck
	if f.next == *acked || receiving(c.ep).PendingBufUsed > 0 { // all or part of a gap is filled
		p.run(c.ep)
		return
	}
	before, sent := *acked, p.g.link.sent
	*acked = f.next
	p.run(c.ep)
	if p.g.link.sent != sent {
		return // whatever it was, it has acknowledged
	}
	*acked = before
	if !f.owed {
		f.owed = true
		s := p.g.shard
		s.owed = append(s.owed, c)
	}
}

const (
	// ackDelay is how long an acknowledgement waits for an answer that may
	// carry it: RFC 5681 section 4.2 allows half a second, Linux takes 40 ms
	// and more.
	ackDelay = 10 * time.Millisecond

	// quickAcks is how many acknowledgements are not delayed after one that
	// waited in vain: an application that only listens is no reason to wait.
	quickAcks = 8
)

// unacknowledged returns how many bytes have arrived that the peer was not told
// about.
func (c *Conn) unacknowledged() int {
	return int(sending(c.ep).MaxSentAck.Size(receiving(c.ep).RcvNxt))
}

// acknowledge comes after the application's step of the turn. It acknowledges
// what no answer has, but leaves the application some more time where a single
// segment of no more than the usual size waits.
func (s *Shard) acknowledge() {
	for i, c := range s.owed {
		s.owed[i] = nil
		f := &c.flow
		f.owed = false
		switch n := c.unacknowledged(); {
		case n == 0:
			s.counters.AcksSuperseded++
		case f.waiting > 1 || f.quick > 0 || c.done || n > s.set.cfg.MTU-header.IPv4MinimumSize-header.TCPMinimumSize:
			f.quick = max(f.quick, 1) - 1
			c.ack()
		default:
			if f.ackAt == 0 { // the first that waits
				f.ackAt = s.now + int64(ackDelay)
			}
			if !f.delayed {
				f.delayed = true
				s.delayed.push(delayedAck{c, f.ackAt})
			}
		}
	}
	s.owed = s.owed[:0]
}

// delayedAcks sends the acknowledgements whose time has come, and returns how
// many these were.
func (s *Shard) delayedAcks() (sent int) {
	for s.delayed.next() <= s.now {
		c := s.delayed.pop().c
		f := &c.flow
		switch {
		case c.unacknowledged() == 0, f.ackAt == 0: // answered; what came in this turn is acknowledge's
			f.delayed = false
		case f.ackAt > s.now: // that one was answered, and another is waiting
			s.delayed.push(delayedAck{c, f.ackAt})
		default:
			f.delayed = false
			f.quick = quickAcks
			c.ack()
			sent++
		}
	}
	return sent
}

// ack sends a pure ACK.
func (c *Conn) ack() {
	c.ep.LockUser()
	switch c.ep.EndpointState() {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing:
		sendAck(c.ep)
	default: // it has no peer any more
	}
	c.ep.UnlockUser()
}

// delayedAck is a connection whose peer waits for an acknowledgement.
type delayedAck struct {
	c  *Conn
	at int64
}

// delayedAckQueue holds them by time. A connection is in it once.
type delayedAckQueue struct {
	first int // of the entries in use
	all   []delayedAck
}

// push adds an entry. The delay is the same for all, so it is nearly always the
// last one.
func (q *delayedAckQueue) push(d delayedAck) {
	if q.first > len(q.all)/2 && len(q.all) == cap(q.all) {
		n := copy(q.all, q.all[q.first:])
		clear(q.all[n:])
		q.first, q.all = 0, q.all[:n]
	}
	q.all = append(q.all, d)
	for i := len(q.all) - 1; i > q.first && q.all[i-1].at > d.at; i-- {
		q.all[i-1], q.all[i] = d, q.all[i-1]
	}
}

// flush sends those of one group.
func (q *delayedAckQueue) flush(g *Group) {
	q.all = slices.DeleteFunc(q.all[q.first:], func(d delayedAck) bool {
		if d.c.g != g {
			return false
		}
		d.c.flow.delayed = false
		if d.c.unacknowledged() > 0 {
			d.c.ack()
		}
		return true
	})
	q.first = 0
}

func (q *delayedAckQueue) pop() delayedAck {
	d := q.all[q.first]
	q.all[q.first] = delayedAck{}
	q.first++
	if q.first == len(q.all) {
		q.first, q.all = 0, q.all[:0]
	}
	return d
}

// next returns when the first one is due.
func (q *delayedAckQueue) next() int64 {
	if len(q.all) == 0 {
		return never
	}
	return q.all[q.first].at
}
