package numaalloc

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
)

const (
	// DefaultAllocLimit is how many bytes an arena maps at most, unless its
	// configuration says otherwise.
	DefaultAllocLimit = 64 << 20

	// hugePage is the size in bytes from which huge pages are asked for, and
	// in which they come on x86-64 and on arm64 with 4 KiB pages.
	hugePage = 2 << 20
)

// ArenaConfig says what an arena is for.
type ArenaConfig struct {
	// Node is the memory node. A negative one is for a machine where there
	// is nothing to choose: Adopt, Release and Verify then do nothing, at
	// the price of a comparison, and Alloc binds nothing.
	Node int
	// AllocLimit is how many bytes Alloc gives out at most. 0 is
	// DefaultAllocLimit.
	AllocLimit int
	// HugePages asks for huge pages behind what Alloc maps, in pieces of
	// 2 MiB and more. The machine's administrator can refuse
	// (/sys/kernel/mm/transparent_hugepage/enabled), which is no error.
	HugePages bool
}

// Arena keeps the node-bound memory of one thread: buffers that somebody else
// made and gave it by Adopt, and scratch memory from Alloc. It holds on to both
// until Release or Close, so that no bound range goes back to Go's heap.
//
// Only the owner's thread calls its methods, except Stats, Node and FirstTouch,
// which any goroutine may call.
type Arena struct {
	// Immutable after NewArena.
	node       int
	calls      *memoryCalls
	allocLimit int64
	hugePages  bool
	firstTouch error // why nothing is bound although there is a node

	// Owned by the thread.
	ranges map[*byte]arenaRange // by first byte
	closed bool

	// Atomic: the thread writes, anybody reads.
	rangeCount, boundBytes, leftOutBytes, allocBytes, fallbacks, refused atomic.Int64
}

type arenaRange struct {
	pages   []byte // bound; empty when that failed
	mapping []byte // made by Alloc; else nil
}

// ArenaStats are the counters of an arena.
type ArenaStats struct {
	Ranges         int64 // kept now
	BoundBytes     int64 // of them, bound to the node
	LeftOutBytes   int64 // outside the whole pages of ranges given to Adopt, ever
	AllocatedBytes int64 // mapped by Alloc, now
	Fallbacks      int64 // ranges that could not be bound, ever: first touch decided
	Refused        int64 // calls of Alloc beyond the limit, ever
}

// NewArena makes an arena and tries its node with one page. A node without
// memory is an error. A system that refuses memory policies is none: the arena
// then only touches what it is given, FirstTouch says why, and the caller may
// want to tell its user once.
func NewArena(cfg ArenaConfig) (*Arena, error) {
	return newArena(cfg, &kernelMemory)
}

func newArena(cfg ArenaConfig, calls *memoryCalls) (*Arena, error) {
	if cfg.AllocLimit < 0 {
		return nil, fmt.Errorf("arena: AllocLimit is %d bytes; want 1 or more, or 0 for %d", cfg.AllocLimit, DefaultAllocLimit)
	}
	if cfg.AllocLimit == 0 {
		cfg.AllocLimit = DefaultAllocLimit
	}
	a := &Arena{
		node: max(cfg.Node, noNode), calls: calls, allocLimit: int64(cfg.AllocLimit), hugePages: cfg.HugePages,
		ranges: make(map[*byte]arenaRange),
	}
	if a.node == noNode {
		return a, nil
	}

	page, err := calls.mmap(os.Getpagesize())
	if err != nil {
		return nil, fmt.Errorf("arena of node %d: map a page: %w", a.node, err)
	}
	defer func() { _ = calls.munmap(page) }()
	err = calls.bind(page, a.node)
	if errors.Is(err, ErrNotPermitted) {
		a.firstTouch = err
		return a, nil
	}
	if err != nil {
		return nil, fmt.Errorf("arena: %w", err)
	}
	return a, nil
}

// Node returns the arena's memory node, negative when it has none.
func (a *Arena) Node() int { return a.node }

// FirstTouch returns why the arena binds nothing although it has a node, an
// error that wraps ErrNotPermitted, or nil.
func (a *Arena) FirstTouch() error { return a.firstTouch }

// Adopt binds the whole pages of b to the node and puts new ones there in place
// of those that exist, with the same contents; nobody else may use b meanwhile. It
// writes to each page without changing it, so that all of them exist. The
// arena keeps b until Release. A range without a whole page is counted as left
// out and otherwise ignored, and so is one that was adopted before.
//
// b can be used all the same when Adopt fails, which is counted in Fallbacks:
// its pages are then where they happen to be. Under FirstTouch no call fails.
func (a *Arena) Adopt(b []byte) error {
	if a.node == noNode || len(b) == 0 {
		return nil
	}
	if a.closed {
		return fmt.Errorf("adopt %d bytes: arena of node %d: %w", len(b), a.node, os.ErrClosed)
	}
	if _, known := a.ranges[&b[0]]; known {
		return nil
	}
	return a.keep(b, nil)
}

// Alloc maps n bytes of zeros, bound to the node and touched, that are no part
// of Go's heap: the collector neither scans nor frees them, so they may hold no
// pointers, and Release or Close unmaps them. The size is rounded up to whole
// pages, and to huge ones if the arena uses them and n is at least one. Memory
// that could not be bound is given out all the same and counted in Fallbacks.
func (a *Arena) Alloc(n int) ([]byte, error) {
	if n < 1 {
		return nil, fmt.Errorf("allocate %d bytes in arena of node %d: want 1 or more", n, a.node)
	}
	if a.closed {
		return nil, fmt.Errorf("allocate %d bytes in arena of node %d: %w", n, a.node, os.ErrClosed)
	}
	unit := os.Getpagesize()
	huge := a.hugePages && n >= hugePage
	if huge {
		unit = hugePage
	}
	used := a.allocBytes.Load()
	// The first comparison keeps the rounding from overflowing.
	if int64(n) > a.allocLimit || used+int64(roundUp(n, unit)) > a.allocLimit {
		a.refused.Add(1)
		return nil, fmt.Errorf("allocate %d bytes in arena of node %d: %d of at most %d are in use", n, a.node, used, a.allocLimit)
	}

	b, err := a.calls.mmap(roundUp(n, unit))
	if err != nil {
		return nil, fmt.Errorf("allocate %d bytes in arena of node %d: %w", n, a.node, err)
	}
	if huge {
		_ = a.calls.hugePages(b) // small pages do as well
	}
	_ = a.keep(b, b) // counted
	return b[:n], nil
}

func roundUp(n, unit int) int {
	return (n + unit - 1) / unit * unit
}

// keep binds, touches and remembers b.
func (a *Arena) keep(b, mapping []byte) error {
	r := arenaRange{mapping: mapping}
	var err error
	if pages := WholePages(b); len(pages) > 0 && a.node != noNode {
		if a.firstTouch == nil {
			err = a.calls.replace(pages, a.node)
		}
		if err != nil || a.firstTouch != nil {
			a.fallbacks.Add(1)
		} else {
			r.pages = pages
		}
		touchPages(pages)
	}
	a.leftOutBytes.Add(int64(len(b) - len(WholePages(b))))
	if r.pages == nil && r.mapping == nil {
		return err // nothing that Release would have to undo
	}
	a.ranges[&b[0]] = r
	a.rangeCount.Add(1)
	a.boundBytes.Add(int64(len(r.pages)))
	a.allocBytes.Add(int64(len(r.mapping)))
	return err
}

// Verify asks the kernel where the bound pages are, those of every range the
// arena keeps. All of them on the node is what Adopt and Alloc aim at; a full
// node leaves some elsewhere, and swapped out ones are absent. It asks for 512
// pages per system call, so it is nothing for every turn. Under FirstTouch it
// returns that error.
func (a *Arena) Verify() (onNode, elsewhere, absent int, err error) {
	if a.firstTouch != nil {
		return 0, 0, 0, a.firstTouch
	}
	for _, r := range a.ranges {
		on, off, none, err := a.calls.count(r.pages, a.node)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("verify arena of node %d: %w", a.node, err)
		}
		onNode, elsewhere, absent = onNode+on, elsewhere+off, absent+none
	}
	return onNode, elsewhere, absent, nil
}

// Release takes the policy off the pages of b and forgets it. Memory from Alloc
// is unmapped and must not be used any more. b begins where the slice given to
// Adopt or returned by Alloc did; any other is ignored.
func (a *Arena) Release(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return a.release(&b[0])
}

func (a *Arena) release(first *byte) error {
	r, known := a.ranges[first]
	if !known {
		return nil
	}
	delete(a.ranges, first)
	a.rangeCount.Add(-1)
	a.boundBytes.Add(-int64(len(r.pages)))
	a.allocBytes.Add(-int64(len(r.mapping)))

	if r.mapping != nil {
		if err := a.calls.munmap(r.mapping); err != nil { // with its policy
			return fmt.Errorf("release %d bytes of arena of node %d: %w", len(r.mapping), a.node, err)
		}
		return nil
	}
	return a.calls.unbind(r.pages)
}

// Close releases everything. It returns the first error and goes on behind it.
func (a *Arena) Close() error {
	a.closed = true
	var first error
	for b := range a.ranges {
		if err := a.release(b); first == nil {
			first = err
		}
	}
	return first
}

// Stats returns the counters.
func (a *Arena) Stats() ArenaStats {
	return ArenaStats{
		Ranges:         a.rangeCount.Load(),
		BoundBytes:     a.boundBytes.Load(),
		LeftOutBytes:   a.leftOutBytes.Load(),
		AllocatedBytes: a.allocBytes.Load(),
		Fallbacks:      a.fallbacks.Load(),
		Refused:        a.refused.Load(),
	}
}
