package shard

import "sync/atomic"

// hint wakes the goroutine that waits for something to change. It says only
// that it is worth looking again; what has changed is told by other fields,
// which are written before the hint is given.
//
// One goroutine waits at a time: it calls expect, looks once more, and then
// either wait or cancel. Anyone may give.
type hint struct {
	expected atomic.Bool
	ch       chan struct{} // capacity 1
}

func newHint() hint { return hint{ch: make(chan struct{}, 1)} }

func (h *hint) expect() { h.expected.Store(true) }
func (h *hint) cancel() { h.expected.Store(false) }

func (h *hint) wait() {
	<-h.ch
	h.expected.Store(false)
}

// give never blocks, and costs one load while nobody waits.
func (h *hint) give() {
	if h.expected.Load() {
		select {
		case h.ch <- struct{}{}:
		default: // one is on its way
		}
	}
}
