package shard

import (
	"testing"

	"numastack/numaalloc"
)

func TestRxBuffers(t *testing.T) {
	r := newRxBuffers(3, noArena(t))
	first := r.take()
	r.give(first)
	if again := r.take(); again != first {
		t.Error("a buffer that was just used is not used again")
	}
	// Lend three: the limit.
	lent := []*rxBuffer{first, r.take(), r.take()}
	for _, b := range lent {
		loan := b.view.Clone()
		defer func() {
			if loan != nil {
				loan.Release()
			}
		}()
		r.give(b)
		if b == lent[1] {
			loan.Release() // comes back before the next sweep
			loan = nil
		}
	}
	if r.made != 3 || len(r.lent) != 3 {
		t.Fatalf("made %d, lent %d, want 3, 3", r.made, len(r.lent))
	}
	if b := r.take(); b != r.spare {
		t.Error("beyond the limit take returned another buffer than the spare")
	} else {
		r.give(b)
	}
	r.sweep()
	if len(r.lent) != 2 || len(r.free) != 1 || r.free[0] != lent[1] {
		t.Fatalf("after a sweep lent %d, free %d; want 2, 1: the one that came back", len(r.lent), len(r.free))
	}
	for range 3 {
		r.sweep() // nothing changes
	}
	if len(r.lent) != 2 || len(r.free) != 1 {
		t.Fatalf("a sweep that finds nothing left lent %d, free %d", len(r.lent), len(r.free))
	}
}

// A connection that nobody reads must not hide the buffers lent after its own.
func TestRxSweepPassesStuckBuffers(t *testing.T) {
	const stuck = 2 * rxSweep
	r := newRxBuffers(stuck+1, noArena(t))
	all := make([]*rxBuffer, stuck+1)
	for i := range all {
		all[i] = r.take()
	}
	for _, b := range all[:stuck] {
		loan := b.view.Clone()
		defer loan.Release()
		r.give(b)
	}
	loan := all[stuck].view.Clone()
	r.give(all[stuck])
	loan.Release()
	for range stuck/rxSweep + 2 {
		r.sweep()
	}
	if len(r.free) != 1 || r.free[0] != all[stuck] {
		t.Fatalf("%d buffers free after the sweeps, want the one that came back", len(r.free))
	}
}

func noArena(t testing.TB) *numaalloc.Arena {
	t.Helper()
	a, err := numaalloc.NewArena(numaalloc.ArenaConfig{Node: -1})
	if err != nil {
		t.Fatal(err)
	}
	return a
}
