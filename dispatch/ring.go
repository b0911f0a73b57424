package dispatch

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"golang.org/x/sys/cpu"
)

// Ring is a bounded first-in first-out ring from one producer to one consumer,
// the way by which a shard hands frames to another. It neither blocks nor
// allocates: what a full ring means is for the caller to decide and to count.
//
// Positions count up for ever and are masked on access, so empty (tail == head)
// and full (tail - head == capacity) differ without a wasted slot. Storing tail
// publishes a slot to the consumer, storing head gives it back; Go's atomics
// order the slot's own accesses around them.
type Ring[T any] struct {
	slots []T // immutable after NewRing; its length is a power of two

	// The producer's line. The padding keeps its writes off the line the
	// consumer writes, and both off the slice header that they read.
	_        cpu.CacheLinePad
	tail     atomic.Uint64 // next slot to fill; producer writes, consumer reads
	headSeen uint64        // owned by the producer: head when last looked at

	// The consumer's line.
	_        cpu.CacheLinePad
	head     atomic.Uint64 // next slot to empty; consumer writes, producer reads
	tailSeen uint64        // owned by the consumer: tail when last looked at
	_        cpu.CacheLinePad
}

// maxRing bounds a ring's capacity: beyond this many frames a ring hides an
// overload instead of absorbing a burst.
const maxRing = 1 << 20

// NewRing returns an empty ring of the given capacity in items, a power of two
// up to 2^20.
func NewRing[T any](capacity int) (*Ring[T], error) {
	if capacity < 1 || capacity > maxRing || bits.OnesCount(uint(capacity)) != 1 {
		return nil, fmt.Errorf("ring of %d items, want a power of two from 1 to %d", capacity, maxRing)
	}
	return &Ring[T]{slots: make([]T, capacity)}, nil
}

// Push appends v, or reports false if the ring is full. Only the producer calls
// it.
func (r *Ring[T]) Push(v T) bool {
	tail := r.tail.Load()
	if tail-r.headSeen == uint64(len(r.slots)) {
		// Looking at head costs the consumer's cache line, so look only when
		// the last view of it says full.
		r.headSeen = r.head.Load()
		if tail-r.headSeen == uint64(len(r.slots)) {
			return false
		}
	}
	r.slots[tail&uint64(len(r.slots)-1)] = v
	r.tail.Store(tail + 1)
	return true
}

// Pop removes the oldest item, or reports false if the ring is empty. The slot
// is zeroed, so the ring keeps nothing alive that was taken from it. Only the
// consumer calls it.
func (r *Ring[T]) Pop() (v T, ok bool) {
	head := r.head.Load()
	if head == r.tailSeen {
		r.tailSeen = r.tail.Load()
		if head == r.tailSeen {
			return v, false
		}
	}
	slot := &r.slots[head&uint64(len(r.slots)-1)]
	var zero T
	v, *slot = *slot, zero
	r.head.Store(head + 1)
	return v, true
}

// Len returns the number of items. It is exact for the producer if the consumer
// rests and the other way round; for everybody else it is a snapshot between 0
// and the capacity.
func (r *Ring[T]) Len() int {
	// Head first: it never passes tail, so the difference cannot be negative.
	// It may exceed the capacity if both moved on between the two loads.
	head := r.head.Load()
	tail := r.tail.Load()
	return int(min(tail-head, uint64(len(r.slots))))
}

// Cap returns the capacity in items.
func (r *Ring[T]) Cap() int { return len(r.slots) }
