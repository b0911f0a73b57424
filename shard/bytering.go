package shard

import "sync/atomic"

// byteRing carries bytes between a shard's thread and a goroutine, one of them
// writing and the other reading. The memory is made at the first write, so an
// idle connection has none.
type byteRing struct {
	size int    // a power of two; immutable
	buf  []byte // made by the writer before it first moves tail

	head atomic.Uint64 // bytes read: reader writes, writer reads
	_    [56]byte      // keeps the two sides on separate cache lines
	tail atomic.Uint64 // bytes written: writer writes, reader reads
	_    [56]byte
}

// len returns how many bytes wait. Either side may call it.
func (r *byteRing) len() int { return int(r.tail.Load() - r.head.Load()) }

// free returns how many bytes fit. Either side may call it.
func (r *byteRing) free() int { return r.size - r.len() }

// write takes what fits of b and returns how much that was. Writer only.
func (r *byteRing) write(b []byte) int {
	if r.buf == nil && len(b) > 0 {
		r.buf = make([]byte, r.size)
	}
	tail := r.tail.Load()
	n := min(len(b), r.size-int(tail-r.head.Load()))
	at := int(tail) & (r.size - 1)
	m := copy(r.buf[at:], b[:n])
	copy(r.buf, b[m:n])
	r.tail.Store(tail + uint64(n))
	return n
}

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
	head := r.head.Load()
	n := int(r.tail.Load() - head)
	if n == 0 {
		return nil
	}
	at := int(head) & (r.size - 1)
	return r.buf[at:min(at+n, r.size)]
}

// skip drops n bytes that peek returned. Reader only.
func (r *byteRing) skip(n int) { r.head.Add(uint64(n)) }
