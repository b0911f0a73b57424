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

	// txCopyLimit is the size in bytes up to which a frame is gathered into
	// one piece: for a short one that costs less than the kernel's walk over
	// an iovec.
	txCopyLimit = 2048

	// maxIovec is how many pieces the kernel takes per write (UIO_MAXIOV,
	// linux/uio.h).
	maxIovec = 1024

	// ackSlots is the number of flows whose pure ACK is remembered during a
	// burst; a flow that shares its slot with another merely keeps its ACK.
	ackSlots = 256
)

// txQueue holds the frames of one burst. Owned by the shard's thread.
type txQueue struct {
	queue    *dispatch.Queue
	stats    *Counters
	offloads Offloads

	frames    []txFrame
	acks      [ackSlots]int32 // 1 + index in frames of a flow's last pure ACK
	datagrams datagramFrames
	scratch   [txCopyLimit]byte
	iov       []unix.Iovec
}

// txFrame is a packet of the netstack, or a frame of datagrams, or neither when
// it was superseded.
type txFrame struct {
	pkt       *stack.PacketBuffer
	datagrams *datagramFrame
	via       *dispatch.Queue // nil: the shard's own
}

// Offloads is what the kernel does for frames that are written.
type Offloads struct {
	TCP bool // cuts super-frames of TCP, fills in checksums
	UDP bool // cuts super-frames of datagrams
}

func newTxQueue(q *dispatch.Queue, offloads Offloads, stats *Counters) *txQueue {
	return &txQueue{queue: q, offloads: offloads, stats: stats, frames: make([]txFrame, 0, txBurst)}
}

// push queues pkt, whose Ethernet header is complete, for a queue of the TAP, or
// for the shard's own if that is nil.
func (t *txQueue) push(pkt *stack.PacketBuffer, via *dispatch.Queue) {
	if len(t.frames) == txBurst {
		t.flush()
	}
	if pkt.TransportProtocolNumber == header.TCPProtocolNumber {
		t.supersede(pkt)
	}
	t.frames = append(t.frames, txFrame{pkt: pkt.IncRef(), via: via})
}

// pushDatagram queues a frame that begins with d, and lets more datagrams of its
// flow join it.
func (t *txQueue) pushDatagram(d *datagramFrame, via *dispatch.Queue) {
	if len(t.frames) == txBurst {
		t.flush()
	}
	if t.offloads.UDP {
		t.datagrams.last[frameSlot(d.from, d.to)] = d
		t.datagrams.pending = true
	}
	t.frames = append(t.frames, txFrame{datagrams: d, via: via})
}

// supersede drops the flow's pure ACK from the queue when pkt says the same
// and more. gVisor acknowledges at the end of segment processing, before the
// application can answer, so a request would cost two frames.
//
// An ACK with SACK blocks is kept, and so is a duplicate ACK that no data
// follows: both tell the peer about a loss (RFC 2018, RFC 5681 section 2).
func (t *txQueue) supersede(pkt *stack.PacketBuffer) {
	tcp := header.TCP(pkt.TransportHeader().Slice())
	if len(tcp) < header.TCPMinimumSize {
		return // a fragment
	}
	slot := &t.acks[(tcp.SourcePort()*31^tcp.DestinationPort())%ackSlots]
	pure := pkt.Data().Size() == 0 && tcp.Flags() == header.TCPFlagAck
	if i := *slot - 1; i >= 0 {
		old := t.frames[i].pkt
		oldTCP := header.TCP(old.TransportHeader().Slice())
		if sameFlow(pkt, old, tcp, oldTCP) {
			ack, oldAck := seqnum.Value(tcp.AckNumber()), seqnum.Value(oldTCP.AckNumber())
			if tcp.Flags().Contains(header.TCPFlagAck) && (oldAck.LessThan(ack) || (oldAck == ack && !pure)) {
				old.DecRef()
				t.frames[i].pkt = nil
				t.stats.AcksSuperseded++
			}
		}
	}
	*slot = 0
	if pure && !hasSACK(tcp) {
		*slot = int32(len(t.frames)) + 1
	}
}

func sameFlow(a, b *stack.PacketBuffer, aTCP, bTCP header.TCP) bool {
	return bytes.Equal(aTCP[:4], bTCP[:4]) && // ports
		bytes.Equal(addresses(a), addresses(b))
}

// addresses returns the source and destination address of a packet we send.
func addresses(pkt *stack.PacketBuffer) []byte {
	h := pkt.NetworkHeader().Slice()
	if pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber {
		return h[12:20] // RFC 791 section 3.1
	}
	return h[8:40] // RFC 8200 section 3
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
	for i := range t.frames {
		f := &t.frames[i]
		queue := cmp.Or(f.via, t.queue)
		switch {
		case f.pkt != nil:
			t.write(f.pkt, queue)
			f.pkt.DecRef()
		case f.datagrams != nil:
			f.datagrams.finish(t.offloads.TCP)
			t.count(queue.Write(f.datagrams.b), len(f.datagrams.b))
			t.datagrams.give(f.datagrams)
		}
		*f = txFrame{}
	}
	t.frames = t.frames[:0]
	t.acks = [ackSlots]int32{}
	if t.datagrams.pending {
		t.datagrams.last, t.datagrams.pending = [frameSlots]*datagramFrame{}, false
	}
	return n
}

func (t *txQueue) write(pkt *stack.PacketBuffer, queue *dispatch.Queue) {
	vnet := vnetHeader(pkt)
	vnet.Encode(pkt.VirtioNetHeader().Push(dispatch.VnetHeaderLen))

	views, offset := pkt.AsViewList()
	size := pkt.Size()
	var errno syscall.Errno
	if size <= txCopyLimit {
		n := 0
		for v := views.Front(); v != nil; v = v.Next() {
			b := viewBytes(v, &offset)
			n += copy(t.scratch[n:], b)
		}
		errno = queue.Write(t.scratch[:n])
	} else {
		t.iov = t.iov[:0]
		for v := views.Front(); v != nil; v = v.Next() {
			if b := viewBytes(v, &offset); len(b) > 0 {
				t.iov = append(t.iov, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
			}
		}
		if len(t.iov) <= maxIovec {
			_, errno = queue.Writev(t.iov)
		} else {
			errno = queue.Write(t.gather(pkt, size))
		}
		clear(t.iov)
	}
	t.count(errno, size)
}

// count notes how a write of size bytes ended.
func (t *txQueue) count(errno syscall.Errno, size int) {
	if errno != 0 {
		t.stats.TxErrors++
		return
	}
	t.stats.TxFrames++
	t.stats.TxBytes += uint64(size - dispatch.VnetHeaderLen)
}

// gather returns a frame in one piece. gVisor merges many small writes into one
// segment by linking them, beyond what the kernel takes as pieces.
func (t *txQueue) gather(pkt *stack.PacketBuffer, size int) []byte {
	b := make([]byte, 0, size)
	views, offset := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b = append(b, viewBytes(v, &offset)...)
	}
	return b
}

// viewBytes returns v's bytes after the first *skip bytes of the packet, which
// hold no header, and lowers *skip by what it passed over.
func viewBytes(v *buffer.View, skip *int) []byte {
	b := v.AsSlice()
	n := min(*skip, len(b))
	*skip -= n
	return b[n:]
}

// vnetHeader says what is left for the kernel to do: fill in a checksum, cut a
// super-frame into segments (linux/virtio_net.h).
func vnetHeader(pkt *stack.PacketBuffer) dispatch.VnetHeader {
	gso := &pkt.GSOOptions
	if gso.Type == stack.GSONone || !gso.NeedsCsum {
		return dispatch.VnetHeader{}
	}
	networkLen := len(pkt.NetworkHeader().Slice())
	h := dispatch.VnetHeader{
		Flags:      dispatch.VnetNeedsCsum,
		CsumStart:  uint16(ethernetLen + networkLen),
		CsumOffset: gso.CsumOffset,
	}
	if pkt.Data().Size() > int(gso.MSS) {
		h.HdrLen = uint16(ethernetLen + networkLen + len(pkt.TransportHeader().Slice()))
		h.GSOSize = gso.MSS
		h.GSOType = dispatch.VnetGSOTCPv4
		if gso.Type == stack.GSOTCPv6 {
			h.GSOType = dispatch.VnetGSOTCPv6
		}
	}
	return h
}
