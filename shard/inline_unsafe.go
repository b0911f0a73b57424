package shard

// This file is the only place that reaches into gVisor's transport/tcp and
// pkg/buffer. Why: gVisor hands every received segment to one of GOMAXPROCS
// processor goroutines per netstack, so that a connection's TCP state, its
// ACKs and its application never stay on one thread. We enqueue a segment on
// its endpoint ourselves and run the endpoint's own segment handlers on the
// shard's thread instead (tcp/dispatcher.go, processor.start, is the model).
//
// What it assumes, checked by init and by TestInlineTCP for the version of
// gVisor that go.mod pins:
//   - the functions below exist with these signatures;
//   - tcp.Endpoint has a field segmentQueue of type segmentQueue;
//   - tcp.protocol has a field dispatcher with a slice processors, whose
//     elements begin with a queue of endpoints named epQ;
//   - tcp.Endpoint has fields snd and rcv, pointers to a sender and a receiver
//     with the exported TCPSenderState and TCPReceiverState, and h, a pointer to
//     a handshake with the initial sequence number iss; the sender has a list of
//     segments in writeList, from writeNext on those to send next, each with its
//     packet, the number of its transmissions, and no flags before the first;
//   - tcp.Endpoint has a field sndQueueInfo with the exported TCPSndBufState;
//   - buffer.View has a method sharesChunk and a pointer to a chunk, which begins its
//     life in a pool with one reference.
//
// What would end the need: options of gVisor's TCP to process segments in the
// calling goroutine, and to take a View to send; a public way to ask whether a View
// is shared, and to make one that is not cleared.

import (
	"fmt"
	"reflect"
	"sync"
	"unsafe"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// tcpSegment stands for gVisor's unexported tcp.segment.
type tcpSegment struct{ _ byte }

//go:linkname newIncomingSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.newIncomingSegment
func newIncomingSegment(id stack.TransportEndpointID, clock tcpip.Clock, pkt *stack.PacketBuffer) (*tcpSegment, error)

//go:linkname segmentDecRef gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*segment).DecRef
func segmentDecRef(s *tcpSegment)

//go:linkname enqueueSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).enqueueSegment
func enqueueSegment(e *tcp.Endpoint, s *tcpSegment) bool

//go:linkname drainClosingSegmentQueue gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).drainClosingSegmentQueue
func drainClosingSegmentQueue(e *tcp.Endpoint)

//go:linkname handleConnecting gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnecting
func handleConnecting(e *tcp.Endpoint)

//go:linkname handleConnected gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnected
func handleConnected(e *tcp.Endpoint)

//go:linkname handleTimeWait gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleTimeWait
func handleTimeWait(e *tcp.Endpoint)

//go:linkname handleListen gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleListen
func handleListen(e *tcp.Endpoint)

//go:linkname senderSendAck gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sender).sendAck
func senderSendAck(s unsafe.Pointer)

//go:linkname newOutgoingSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.newOutgoingSegment
func newOutgoingSegment(id stack.TransportEndpointID, clock tcpip.Clock, buf buffer.Buffer, mark uint32) *tcpSegment

//go:linkname writeListPushBack gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*protectedWriteList).PushBack
func writeListPushBack(list unsafe.Pointer, s *tcpSegment)

// sendRoom returns how many bytes e's send buffer has room for.
//
//go:linkname sendRoom gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).isEndpointWritableLocked
func sendRoom(e *tcp.Endpoint) (int, tcpip.Error)

//go:linkname endpointSendData gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).sendData
func endpointSendData(e *tcp.Endpoint, next unsafe.Pointer)

//go:linkname segmentQueueEmpty gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*segmentQueue).empty
func segmentQueueEmpty(q unsafe.Pointer) bool

//go:linkname epQueueDequeue gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*epQueue).dequeue
func epQueueDequeue(q unsafe.Pointer) *tcp.Endpoint

//go:linkname viewSharesChunk gvisor.dev/gvisor/pkg/buffer.(*View).sharesChunk
func viewSharesChunk(v *buffer.View) bool

var _, segmentQueueOffset = field(reflect.TypeFor[tcp.Endpoint](), "segmentQueue", "tcp.segmentQueue")

// field returns the type of t's field name and where t keeps it, and panics
// when the pinned gVisor no longer has it: every connection depends on it.
func field(t reflect.Type, name, typ string) (reflect.Type, uintptr) {
	f, ok := t.FieldByName(name)
	if !ok || f.Type.String() != typ {
		panic(fmt.Sprintf("shard: gVisor's %v has no field %s of type %s: the pinned version changed, see inline_unsafe.go", t, name, typ))
	}
	return f.Type, f.Offset
}

var (
	sender, senderOffset       = field(reflect.TypeFor[tcp.Endpoint](), "snd", "*tcp.sender")
	receiver, receiverOffset   = field(reflect.TypeFor[tcp.Endpoint](), "rcv", "*tcp.receiver")
	_, senderStateOffset       = field(sender.Elem(), "TCPSenderState", "tcp.TCPSenderState")
	_, receiverStateOffset     = field(receiver.Elem(), "TCPReceiverState", "tcp.TCPReceiverState")
	handshake, handshakeOffset = field(reflect.TypeFor[tcp.Endpoint](), "h", "*tcp.handshake")
	_, issOffset               = field(handshake.Elem(), "iss", "seqnum.Value")
	outgoing, writeNextOffset  = field(sender.Elem(), "writeNext", "*tcp.segment")
	_, xmitCountOffset         = field(outgoing.Elem(), "xmitCount", "uint32")
	_, flagsOffset             = field(outgoing.Elem(), "flags", "header.TCPFlags")
	_, pktOffset               = field(outgoing.Elem(), "pkt", "*stack.PacketBuffer")
	entry, entryOffset         = field(outgoing.Elem(), "segmentEntry", "tcp.segmentEntry")
	_, nextOffset              = field(entry, "next", "*tcp.segment")
	_, prevOffset              = field(entry, "prev", "*tcp.segment")
	writeList, writeListOffset = field(sender.Elem(), "writeList", "tcp.protectedWriteList")
	segments, segmentsOffset   = field(writeList, "writeList", "tcp.segmentList")
	_, tailOffset              = field(segments, "tail", "*tcp.segment")
	sndQueue, sndQueueOffset   = field(reflect.TypeFor[tcp.Endpoint](), "sndQueueInfo", "tcp.sndQueueInfo")
	_, sndBufStateOffset       = field(sndQueue, "TCPSndBufState", "tcp.TCPSndBufState")

	chunk, chunkOffset = field(reflect.TypeFor[buffer.View](), "chunk", "*buffer.chunk")
	_, chunkRefsOffset = field(chunk.Elem(), "chunkRefs", "buffer.chunkRefs")
)

// pointerAt returns the pointer that e keeps at offset.
func pointerAt(e *tcp.Endpoint, offset uintptr) unsafe.Pointer {
	return *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(e), offset))
}

// sending returns the state of e's sender. Like receiving and sendAck it is for
// endpoints that have been connected.
func sending(e *tcp.Endpoint) *tcp.TCPSenderState {
	return (*tcp.TCPSenderState)(unsafe.Add(pointerAt(e, senderOffset), senderStateOffset))
}

// receiving returns the state of e's receiver.
func receiving(e *tcp.Endpoint) *tcp.TCPReceiverState {
	return (*tcp.TCPReceiverState)(unsafe.Add(pointerAt(e, receiverOffset), receiverStateOffset))
}

// sendAck sends a pure ACK. The caller has locked e.
func sendAck(e *tcp.Endpoint) { senderSendAck(pointerAt(e, senderOffset)) }

// queueSend appends the bytes of v to what e has to send, in segments of limit bytes,
// the last of which may be smaller. It takes over v. Like gVisor's queueSegment it does
// not send, and the caller has asked sendRoom; the lock of the send queue, which that
// one takes, is for other goroutines.
func queueSend(e *tcp.Endpoint, clock tcpip.Clock, v *buffer.View, limit int) {
	state := (*tcp.TCPSndBufState)(unsafe.Add(unsafe.Pointer(e), sndQueueOffset+sndBufStateOffset))
	state.SndBufUsed += v.Size()
	list := unsafe.Add(pointerAt(e, senderOffset), writeListOffset)
	if tail := *(*unsafe.Pointer)(unsafe.Add(list, segmentsOffset+tailOffset)); neverSent(tail) {
		payload := (*(**stack.PacketBuffer)(unsafe.Add(tail, pktOffset))).Data()
		if room := limit - payload.Size(); room > 0 {
			payload.AppendView(cut(&v, room))
		}
	}
	for v != nil {
		writeListPushBack(list, newOutgoingSegment(e.ID, clock, buffer.MakeWithView(cut(&v, limit)), 0))
	}
}

// sendQueued sends what may leave of what was queued on e. The caller has locked e.
func sendQueued(e *tcp.Endpoint) {
	s := pointerAt(e, senderOffset)
	if *(*unsafe.Pointer)(unsafe.Add(s, writeNextOffset)) != nil {
		endpointSendData(e, nil)
		return
	}
	// Everything before was sent, so the sender has to be told where to go on.
	var first unsafe.Pointer
	next := *(*unsafe.Pointer)(unsafe.Add(s, writeListOffset+segmentsOffset+tailOffset))
	for neverSent(next) {
		first = next
		next = *(*unsafe.Pointer)(unsafe.Add(next, entryOffset+prevOffset))
	}
	endpointSendData(e, first)
}

// neverSent reports whether a segment of a send queue, or nil, has no sequence number
// yet (isAssignedSequenceNumber).
func neverSent(s unsafe.Pointer) bool {
	return s != nil && *(*header.TCPFlags)(unsafe.Add(s, flagsOffset)) == 0
}

// cut returns the first n bytes of *v, and makes that the rest, or nil.
func cut(v **buffer.View, n int) *buffer.View {
	whole := *v
	if whole.Size() <= n {
		*v = nil
		return whole
	}
	part := whole.Clone()
	part.CapLength(n)
	whole.TrimFront(n)
	return part
}

//go:linkname chunkPool gvisor.dev/gvisor/pkg/buffer.getChunkPool
func chunkPool(size int) *sync.Pool

//go:linkname viewPool gvisor.dev/gvisor/pkg/buffer.viewPool
var viewPool sync.Pool

//go:linkname chunkInitRefs gvisor.dev/gvisor/pkg/buffer.(*chunkRefs).InitRefs
func chunkInitRefs(refs unsafe.Pointer)

// newView returns a view of n bytes that holds anything: it is buffer.NewViewSize
// without clearing, which would bring memory into the cache a second time.
func newView(n int) *buffer.View {
	if n > buffer.MaxChunkSize {
		return buffer.NewViewSize(n)
	}
	chunk := chunkPool(n).Get()
	c := (*[2]unsafe.Pointer)(unsafe.Pointer(&chunk))[1] // an interface's second word is its pointer
	chunkInitRefs(unsafe.Add(c, chunkRefsOffset))
	v := viewPool.Get().(*buffer.View)
	*v = buffer.View{}
	*(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(v), chunkOffset)) = c
	v.Grow(n)
	return v
}

// hasSender reports whether e has been connected.
func hasSender(e *tcp.Endpoint) bool { return pointerAt(e, senderOffset) != nil }

// onItsWay reports whether e has sent the sequence number, and not heard that it
// was received.
func onItsWay(e *tcp.Endpoint, seq seqnum.Value) bool {
	if hasSender(e) {
		return seq.InRange(sending(e).SndUna, sending(e).SndNxt)
	}
	h := pointerAt(e, handshakeOffset) // nil for a listener
	return h != nil && seq == *(*seqnum.Value)(unsafe.Add(h, issOffset))
}

// forgetSent makes the segments that e has to send next, some of them again, such
// that were never sent. Otherwise gVisor takes them for lost a second time at the
// next acknowledgement (RACK), and for outstanding in the recovery that follows,
// which therefore sends nothing until the retransmission timer fires.
func forgetSent(e *tcp.Endpoint) {
	s := *(*unsafe.Pointer)(unsafe.Add(pointerAt(e, senderOffset), writeNextOffset))
	for s != nil {
		*(*uint32)(unsafe.Add(s, xmitCountOffset)) = 0
		s = *(*unsafe.Pointer)(unsafe.Add(s, entryOffset+nextOffset))
	}
}

// segmentsQueued reports whether e holds segments that were not processed.
func segmentsQueued(e *tcp.Endpoint) bool {
	return !segmentQueueEmpty(unsafe.Add(unsafe.Pointer(e), segmentQueueOffset))
}

// strayQueue is the endpoint queue of one of gVisor's closed processors.
// gVisor still fills it when it re-queues an endpoint by itself.
type strayQueue struct {
	queue unsafe.Pointer  // *tcp.epQueue
	head  *unsafe.Pointer // its first endpoint, nil when empty
}

// pop returns the next endpoint, or nil. Looking at the head first spares two
// mutexes per turn; nobody else touches the queue.
func (q strayQueue) pop() *tcp.Endpoint {
	if *q.head == nil {
		return nil
	}
	return epQueueDequeue(q.queue)
}

// strayQueues returns the queues of proto's processors.
func strayQueues(proto stack.TransportProtocol) []strayQueue {
	v := reflect.ValueOf(proto)
	dispatcher, dispatcherOffset := field(v.Type().Elem(), "dispatcher", "tcp.dispatcher")
	processors, processorsOffset := field(dispatcher, "processors", "[]tcp.processor")
	epQ, epQOffset := field(processors.Elem(), "epQ", "tcp.epQueue")
	list, listOffset := field(epQ, "list", "tcp.endpointList")
	_, headOffset := field(list, "head", "*tcp.Endpoint")

	// A slice header starts with the pointer to its first element; its length
	// follows.
	header := unsafe.Add(v.UnsafePointer(), dispatcherOffset+processorsOffset)
	first := *(*unsafe.Pointer)(header)
	queues := make([]strayQueue, *(*int)(unsafe.Add(header, unsafe.Sizeof(first))))
	for i := range queues {
		q := unsafe.Add(first, uintptr(i)*processors.Elem().Size()+epQOffset)
		queues[i] = strayQueue{queue: q, head: (*unsafe.Pointer)(unsafe.Add(q, listOffset+headOffset))}
	}
	return queues
}
