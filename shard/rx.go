package shard

import (
	"gvisor.dev/gvisor/pkg/buffer"

	"numastack/dispatch"
	"numastack/numaalloc"
)

const (
	// rxBufferLen holds the largest frame the kernel hands over. That is above
	// gVisor's 64 KiB limit for pooled chunks, so the chunk is made once and
	// never recycled by anybody else.
	// It is a multiple of the page size, so that whole buffers can be bound to
	// the shard's node.
	rxBufferLen = (dispatch.VnetHeaderLen + dispatch.MaxFrameLen + pageSize - 1) / pageSize * pageSize

	pageSize = 4096

	// rxCopyLimit is the payload length in bytes up to which a frame is copied
	// into a view of its size; above it the payload stays in the receive
	// buffer, which is lent to the connection.
	rxCopyLimit = 2048

	// rxSweep is how many lent buffers are looked at per turn.
	rxSweep = 64
)

// rxBuffer is a receive buffer in the form in which gVisor can share it. The
// shard writes to it only while nobody else holds the view's chunk.
type rxBuffer struct {
	view  *buffer.View
	bytes []byte // all of view
}

// rxBuffers are the receive buffers of a shard. A free one that was used last
// is used next, so that bulk traffic stays in few hot buffers; the ones whose
// payload a connection holds are lent, and come back when it has been read: who
// drops the last reference counts it down, on any thread, and sweep sees that.
//
// All have the size of the largest frame, also where frames are no longer than
// the MTU: those of the usual one are copied, so that one buffer serves, and with
// MTU 9000 smaller buffers were not faster.
//
// Owned by the shard's thread.
type rxBuffers struct {
	arena *numaalloc.Arena // keeps the buffers on the shard's node
	limit int
	made  int
	free  []*rxBuffer // last in, first out
	lent  []*rxBuffer // oldest first
	spare *rxBuffer   // receives when the limit is reached: its payload is always copied
}

func newRxBuffers(limit int, arena *numaalloc.Arena) rxBuffers {
	r := rxBuffers{limit: limit, arena: arena}
	r.spare = r.newBuffer()
	return r
}

func (r *rxBuffers) newBuffer() *rxBuffer {
	v := buffer.NewViewSize(rxBufferLen)
	b := &rxBuffer{view: v, bytes: v.AsSlice()}
	_ = r.arena.Adopt(b.bytes) // what cannot be bound is counted there, and works
	return b
}

// take returns a buffer to read into: a free one, a new one, or the spare.
func (r *rxBuffers) take() *rxBuffer {
	if n := len(r.free); n > 0 {
		b := r.free[n-1]
		r.free = r.free[:n-1]
		return b
	}
	if r.made < r.limit {
		r.made++
		return r.newBuffer()
	}
	return r.spare
}

// give takes a buffer back after its frame was delivered.
func (r *rxBuffers) give(b *rxBuffer) {
	switch {
	case b == r.spare:
	case viewSharesChunk(b.view):
		r.lent = append(r.lent, b)
	default:
		r.free = append(r.free, b)
	}
}

// sweep looks whether the oldest lent buffers came back. Those that did not go
// to the end of the line, so that one connection nobody reads does not hide
// the others.
func (r *rxBuffers) sweep() {
	n := min(len(r.lent), rxSweep)
	if n == 0 {
		return
	}
	kept := 0
	for _, b := range r.lent[:n] {
		if viewSharesChunk(b.view) {
			r.lent[kept] = b
			kept++
		} else {
			r.free = append(r.free, b)
		}
	}
	if kept == n {
		if n < len(r.lent) {
			r.rotate(n)
		}
		return
	}
	// Close the gap; the kept ones stay in front and are rotated next time.
	m := kept + copy(r.lent[kept:], r.lent[n:])
	clear(r.lent[m:])
	r.lent = r.lent[:m]
}

// rotate moves the first n lent buffers behind the others.
func (r *rxBuffers) rotate(n int) {
	reverse(r.lent[:n])
	reverse(r.lent[n:])
	reverse(r.lent)
}

func reverse(b []*rxBuffer) {
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
}
