package shard

import (
	"bytes"
	"cmp"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

const (
	// txBurst is how many frames wait at most for the flush at the end of the
	// turn; the queue is flushed early when it is full.
	txBurst = 256

	// smallFrame is the size in bytes, with the vnet header, up to which a frame is
	// gathered in one piece: for a short one that costs less than the kernel's walk
	// over an iovec.
	smallFrame = 2048

	// largestFrame is the size in bytes of the longest frame with its vnet header.
	largestFrame = dispatch.VnetHeaderLen + ethernetLen + gsoMaxSize

	// maxIovec is how many pieces the kernel takes per write (UIO_MAXIOV,
	// linux/uio.h).
	maxIovec = 1024

	// ackSlots is the number of flows whose pure ACK is remembered during a
	// burst; a flow that shares its slot with another merely keeps its ACK.
	ackSlots = 256

	// l3 is where the IP header stands in a frame with its vnet header.
	l3 = dispatch.VnetHeaderLen + ethernetLen
)

// txQueue holds the frames of one burst. Owned by the shard's thread.
type txQueue struct {
	queue    *dispatch.Queue
	stats    *Counters
	offloads Offloads

	frames    []*txFrame      // nil: superseded
	acks      [ackSlots]int32 // 1 + index in frames of a flow's last pure ACK
	datagrams datagramFrames
	free      []*txFrame // small ones, last in, first out
	iov       []unix.Iovec
}

// Offloads is what the kernel does for frames that are written.
type Offloads struct {
	TCP bool // cuts super-frames of TCP, fills in checksums
	UDP bool // cuts super-frames of datagrams
}

// txFrame is a frame that waits for the flush.
type txFrame struct {
	b    []byte              // vnet header and frame, up to the payload of rest
	l4   int                 // where the transport header stands in b
	rest *stack.PacketBuffer // nil: b is all
	via  *dispatch.Queue     // nil: the shard's own

	flow datagramFlow // of a frame of datagrams
}

func newTxQueue(q *dispatch.Queue, offloads Offloads, stats *Counters) *txQueue {
	return &txQueue{queue: q, offloads: offloads, stats: stats, frames: make([]*txFrame, 0, txBurst)}
}

// take returns an empty frame with room for smallFrame bytes.
func (t *txQueue) take() *txFrame {
	if n := len(t.free); n > 0 {
		f := t.free[n-1]
		t.free = t.free[:n-1]
		return f
	}
	return &txFrame{b: make([]byte, 0, smallFrame)}
}

// give takes a frame back that was written or superseded.
func (t *txQueue) give(f *txFrame) {
	if f.rest != nil {
		f.rest.DecRef()
	}
	f.b, f.rest, f.via = f.b[:0], nil, nil
	if f.flow.from = nil; cap(f.b) == smallFrame {
		t.free = append(t.free, f)
	} else {
		t.datagrams.large = append(t.datagrams.large, f)
	}
}

// push queues pkt, which is complete from its Ethernet header on, for a queue of the
// TAP, or for the shard's own if that is nil.
func (t *txQueue) push(pkt *stack.PacketBuffer, via *dispatch.Queue) {
	f := t.take()
	f.b = append(f.b[:dispatch.VnetHeaderLen], pkt.LinkHeader().Slice()...)
	f.b = append(f.b, pkt.NetworkHeader().Slice()...)
	f.via = via
	t.finish(f, pkt)
}

// finish queues a frame that lacks the transport header and the payload of pkt.
func (t *txQueue) finish(f *txFrame, pkt *stack.PacketBuffer) {
	if len(t.frames) == txBurst {
		t.flush()
	}
	f.l4 = len(f.b)
	f.b = append(f.b, pkt.TransportHeader().Slice()...)
	payload := pkt.Data().Size()
	f.vnet(&pkt.GSOOptions, payload)
	if pkt.TransportProtocolNumber == header.TCPProtocolNumber {
		t.supersede(f, payload)
	}
	if len(f.b)+payload > smallFrame {
		f.rest = pkt.IncRef()
	} else if payload > 0 {
		views, skip := payloadOf(pkt)
		for v := views.Front(); v != nil; v = v.Next() {
			f.b = append(f.b, viewBytes(v, &skip)...)
		}
	}
	t.frames = append(t.frames, f)
}

// vnet says what is left for the kernel to do: fill in a checksum, cut a
// super-frame into segments (linux/virtio_net.h).
func (f *txFrame) vnet(gso *stack.GSO, payload int) {
	var h dispatch.VnetHeader
	if gso.Type != stack.GSONone && gso.NeedsCsum {
		h.Flags = dispatch.VnetNeedsCsum
		h.CsumStart = uint16(f.l4 - dispatch.VnetHeaderLen)
		h.CsumOffset = gso.CsumOffset
		if payload > int(gso.MSS) {
			h.HdrLen = uint16(len(f.b) - dispatch.VnetHeaderLen)
			h.GSOSize = gso.MSS
			h.GSOType = dispatch.VnetGSOTCPv4
			if gso.Type == stack.GSOTCPv6 {
				h.GSOType = dispatch.VnetGSOTCPv6
			}
		}
	}
	h.Encode(f.b)
}

// supersede drops the flow's pure ACK from the queue when f, which has a TCP header
// and is followed by a payload of so many bytes, says the same and more. gVisor
// acknowledges at the end of segment processing, before the application can answer,
// so a request would cost two frames.
//
// An ACK with SACK blocks is kept, and so is a duplicate ACK that no data
// follows: both tell the peer about a loss (RFC 2018, RFC 5681 section 2). So is
// one before a segment that was sent earlier: a retransmission or the probe of a
// closed window is dropped with its ACK when the peer has it (RFC 9293 section
// 3.10.7.4).
func (t *txQueue) supersede(f *txFrame, payload int) {
	tcp := header.TCP(f.b[f.l4:])
	if len(tcp) < header.TCPMinimumSize {
		return // a fragment
	}
	slot := &t.acks[(tcp.SourcePort()*31^tcp.DestinationPort())%ackSlots]
	pure := payload == 0 && tcp.Flags() == header.TCPFlagAck
	if i := *slot - 1; i >= 0 {
		old := t.frames[i]
		if f.sameFlow(old) {
			oldTCP := header.TCP(old.b[old.l4:])
			ack, oldAck := seqnum.Value(tcp.AckNumber()), seqnum.Value(oldTCP.AckNumber())
			seq, next := seqnum.Value(tcp.SequenceNumber()), seqnum.Value(oldTCP.SequenceNumber())
			if tcp.Flags().Contains(header.TCPFlagAck) && !seq.LessThan(next) && (oldAck.LessThan(ack) || (oldAck == ack && !pure)) {
				t.give(old)
				t.frames[i] = nil
				t.stats.AcksSuperseded++
			}
		}
	}
	*slot = 0
	if pure && !hasSACK(tcp) {
		*slot = int32(len(t.frames)) + 1
	}
}

// sameFlow reports whether two frames with segments have the same addresses and ports.
func (f *txFrame) sameFlow(g *txFrame) bool {
	return f.l4 == g.l4 && bytes.Equal(f.b[f.l4:f.l4+4], g.b[g.l4:g.l4+4]) && bytes.Equal(addresses(f.b[l3:f.l4]), addresses(g.b[l3:g.l4]))
}

// addresses returns the source and destination address of an IP header.
func addresses(ip []byte) []byte {
	if ip[0]>>4 == 4 {
		return ip[12:20] // RFC 791 section 3.1
	}
	return ip[8:40] // RFC 8200 section 3
}

// hasSACK reports whether a pure ACK carries more than the timestamp option,
// in the form in which gVisor encodes it: NOP NOP TS.
func hasSACK(tcp header.TCP) bool {
	options := tcp.Options()
	return len(options) != 0 && (len(options) != header.TCPOptionTSLength+2 || options[2] != header.TCPOptionTS)
}

// flush writes the burst to the TAP queue and returns how many frames it held.
func (t *txQueue) flush() int {
	n := len(t.frames)
	if n == 0 {
		return 0
	}
	for i, f := range t.frames {
		if f == nil {
			continue
		}
		if f.flow.from != nil {
			f.finishDatagrams(t.offloads.TCP)
		}
		t.write(f, cmp.Or(f.via, t.queue))
		t.give(f)
		t.frames[i] = nil
	}
	t.frames = t.frames[:0]
	t.acks = [ackSlots]int32{}
	if t.datagrams.pending {
		t.datagrams.last, t.datagrams.pending = [flowSlots]*txFrame{}, false
	}
	return n
}

func (t *txQueue) write(f *txFrame, queue *dispatch.Queue) {
	size := len(f.b)
	var errno syscall.Errno
	if f.rest == nil {
		errno = queue.Write(f.b)
	} else {
		size += f.rest.Data().Size()
		t.iov = append(t.iov[:0], unix.Iovec{Base: &f.b[0], Len: uint64(len(f.b))})
		views, skip := payloadOf(f.rest)
		for v := views.Front(); v != nil; v = v.Next() {
			if b := viewBytes(v, &skip); len(b) > 0 {
				t.iov = append(t.iov, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
			}
		}
		if len(t.iov) <= maxIovec {
			_, errno = queue.Writev(t.iov)
		} else {
			errno = queue.Write(f.gather(size))
		}
		clear(t.iov)
	}
	if errno != 0 {
		t.stats.TxErrors++
		return
	}
	t.stats.TxFrames++
	t.stats.TxBytes += uint64(size - dispatch.VnetHeaderLen)
}

// gather returns a frame in one piece. gVisor merges many small writes into one
// segment by linking them, beyond what the kernel takes as pieces.
func (f *txFrame) gather(size int) []byte {
	b := append(make([]byte, 0, size), f.b...)
	views, skip := payloadOf(f.rest)
	for v := views.Front(); v != nil; v = v.Next() {
		b = append(b, viewBytes(v, &skip)...)
	}
	return b
}

// payloadOf returns the views that hold a packet, and how many of their bytes come
// before its payload.
func payloadOf(pkt *stack.PacketBuffer) (views buffer.ViewList, skip int) {
	views, offset := pkt.AsViewList()
	return views, offset + pkt.HeaderSize()
}

// viewBytes returns v's bytes after the first *skip bytes of the packet, and lowers
// *skip by what it passed over.
func viewBytes(v *buffer.View, skip *int) []byte {
	b := v.AsSlice()
	n := min(*skip, len(b))
	*skip -= n
	return b[n:]
}
