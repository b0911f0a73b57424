package shard

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
)

// Sizes in bytes of the blocks of a byteRing. A small one holds a request or
// its answer; a stream moves in large ones.
const (
	smallBlock = 4 << 10
	largeBlock = 64 << 10
)

// byteRing carries bytes between a shard's thread and a goroutine, one of them
// writing and the other reading. Its memory is a chain of blocks: the writer
// appends them, the reader lets go of them, and an empty ring whose reader has
// called release holds none. Blocks are gVisor's views, so the netstack may keep
// what it has got out of a ring.
//
// Either side touches the other's fields only when the ring is empty, which
// stays so until the writer ends a write: then the writer may start over at the
// front of its block, if nobody else holds it, so that a connection with little on
// the way keeps to a few cache lines.
type byteRing struct {
	limit atomic.Int64 // bytes that may wait

	// Reader's; the writer's while it writes into an empty ring.
	first *block // nil: the chain begins at fresh
	at    int    // bytes of first that were read

	head atomic.Uint64 // bytes read: reader writes, writer reads
	_    [56]byte      // keeps the two sides on separate cache lines

	// Writer's.
	last  *block
	fresh *block // where a new chain begins; the reader reads it after tail

	tail atomic.Uint64 // bytes written << tailShift, and flags
	_    [56]byte
}

// Flags in the lowest bits of byteRing.tail.
const (
	tailWriting  = 1 << iota // a write is going on
	tailReleased             // the reader has given the blocks back
	tailShift    = iota
)

// block is a piece of a byteRing.
type block struct {
	view *buffer.View
	b    []byte // the same
	end  int    // bytes written; final once next is set, and for the reader only then
	next atomic.Pointer[block]

	given bool // was appended: says nothing about the sizes of writes
}

// Small blocks, which are never handed over, keep their memory in the pool.
var (
	smallBlocks = sync.Pool{New: func() any { return &block{view: newView(smallBlock)} }}
	emptyBlocks = sync.Pool{New: func() any { return new(block) }}
)

// newBlock returns an empty block for size bytes, or as many as a block may have.
func newBlock(size int) *block {
	if size <= smallBlock {
		b := smallBlocks.Get().(*block)
		b.b = b.view.AsSlice()
		return b
	}
	v := newView(min(size, largeBlock))
	v.Grow(v.AvailableSize())
	b := blockOf(v)
	b.end = 0
	return b
}

// blockOf returns a full block of the bytes of v, which it takes over.
func blockOf(v *buffer.View) *block {
	b := emptyBlocks.Get().(*block)
	b.view, b.b = v, v.AsSlice()
	b.end = len(b.b)
	return b
}

func (b *block) free() {
	b.end = 0
	b.given = false
	b.next.Store(nil)
	if len(b.b) == smallBlock && !viewSharesChunk(b.view) {
		smallBlocks.Put(b)
		return
	}
	b.view.Release()
	b.view, b.b = nil, nil
	emptyBlocks.Put(b)
}

// len returns how many bytes wait. Either side may call it.
func (r *byteRing) len() int { return int(r.tail.Load()>>tailShift - r.head.Load()) }

// free returns how many bytes fit: none or less when the limit was lowered.
// Either side may call it.
func (r *byteRing) free() int { return int(r.limit.Load()) - r.len() }

// write takes what fits of b and returns how much that was. Writer only.
func (r *byteRing) write(b []byte) int {
	n := min(len(b), r.free())
	if n <= 0 {
		return 0
	}
	b = b[:n]
	r.begin(n)
	for len(b) > 0 {
		if r.last == nil || r.last.end == len(r.last.b) {
			size := largeBlock
			if r.last == nil || r.last.given {
				size = len(b)
			}
			r.link(newBlock(size))
		}
		m := copy(r.last.b[r.last.end:], b)
		r.last.end += m
		b = b[m:]
	}
	r.commit(n)
	return n
}

// append takes block b, which the caller has filled up to b.end, whether it
// fits or not. Writer only.
func (r *byteRing) append(b *block) {
	n := b.end
	b.given = true
	r.begin(largeBlock)
	r.link(b)
	r.commit(n)
}

// begin keeps the reader from releasing the blocks until commit. In an empty
// ring it starts over, with a block that suits a write of n bytes.
func (r *byteRing) begin(n int) {
	tail := r.tail.Or(tailWriting)
	if tail&tailReleased != 0 {
		r.last = nil
	}
	if r.last == nil || tail>>tailShift != r.head.Load() {
		return
	}
	for r.first != r.last { // read to their ends
		b := r.first
		r.first = b.next.Load()
		b.free()
	}
	if viewSharesChunk(r.last.view) {
		r.at = r.last.end // the netstack still has what was read: go on behind it
		return
	}
	r.at = 0
	r.last.end = 0
	if n > len(r.last.b) && len(r.last.b) < largeBlock {
		r.last.free()
		r.first, r.last = nil, nil
	}
}

func (r *byteRing) link(b *block) {
	if r.last == nil {
		r.fresh = b
	} else {
		r.last.next.Store(b)
	}
	r.last = b
}

// commit lets the reader see n more bytes.
func (r *byteRing) commit(n int) {
	r.tail.Store((r.tail.Load()>>tailShift + uint64(n)) << tailShift)
}

// announce says that a write is about to begin, and cancel that it is not. Writer only.
func (r *byteRing) announce() { r.tail.Or(tailWriting) }
func (r *byteRing) cancel()   { r.tail.And(^uint64(tailWriting)) }

// writing reports whether a write is going on, whose bytes do not count yet. Either side
// may call it.
func (r *byteRing) writing() bool { return r.tail.Load()&tailWriting != 0 }

// read fills b with what waits and returns how much that was. Reader only.
func (r *byteRing) read(b []byte) int {
	n := 0
	for n < len(b) {
		view := r.peek()
		if len(view) == 0 {
			break
		}
		m := copy(b[n:], view)
		r.skip(m)
		n += m
	}
	return n
}

// peek returns the next bytes that lie in one piece. Reader only.
func (r *byteRing) peek() []byte {
	n := r.len()
	if n == 0 {
		return nil
	}
	if r.first == nil {
		r.first, r.at = r.fresh, 0
	}
	for {
		b := r.first
		next := b.next.Load() // after tail: without a next one, all n bytes are in b
		if next == nil {
			return b.b[r.at : r.at+n]
		}
		if r.at < b.end {
			return b.b[r.at:min(b.end, r.at+n)]
		}
		r.first, r.at = next, 0
		b.free()
	}
}

// lend returns the first n bytes that peek returns, without a copy: they stay as
// they are until the view is released. They are to be skipped. Reader only.
func (r *byteRing) lend(n int) *buffer.View {
	r.peek()
	v := r.first.view.Clone()
	v.TrimFront(r.at)
	v.CapLength(n)
	return v
}

// skip drops n bytes that peek returned. Reader only.
func (r *byteRing) skip(n int) {
	if n == 0 {
		return // the ring may be empty, and at the writer's
	}
	r.at += n
	r.head.Store(r.head.Load() + uint64(n))
}

// release gives the memory of an empty ring back; it does nothing to another,
// or during a write. Reader only.
func (r *byteRing) release() {
	empty := r.head.Load() << tailShift
	if !r.tail.CompareAndSwap(empty, empty|tailReleased) {
		return
	}
	for r.first != nil {
		b := r.first
		r.first = b.next.Load()
		b.free()
	}
}
