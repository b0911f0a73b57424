package shard

import "gvisor.dev/gvisor/pkg/buffer"

// viewOf returns a view of a copy of b. There may be room behind it, which what is
// appended to its buffer fills up first.
func viewOf(b []byte) *buffer.View {
	v := newView(len(b))
	copy(v.AsSlice(), b)
	return v
}

// fullViewOf is viewOf without such room, for what is followed by a view that must
// not be copied.
func fullViewOf(b []byte) *buffer.View {
	v := newView(len(b))
	room := v.AvailableSize()
	v.Grow(room)
	v.TrimFront(room)
	copy(v.AsSlice(), b)
	return v
}
