package shard

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
)

func TestByteRingModel(t *testing.T) {
	r := new(byteRing)
	r.limit.Store(64)
	var model []byte
	rng := rand.New(rand.NewPCG(1, 2))
	next := byte(0)
	for range 20_000 {
		if rng.IntN(2) == 0 {
			b := make([]byte, rng.IntN(100))
			for i := range b {
				b[i] = next + byte(i)
			}
			n := r.write(b)
			if want := min(len(b), 64-len(model)); n != want {
				t.Fatalf("write took %d of %d with %d waiting, want %d", n, len(b), len(model), want)
			}
			model = append(model, b[:n]...)
			next += byte(n)
		} else {
			b := make([]byte, rng.IntN(100))
			n := r.read(b)
			if want := min(len(b), len(model)); n != want {
				t.Fatalf("read gave %d with %d waiting, want %d", n, len(model), want)
			}
			if !bytes.Equal(b[:n], model[:n]) {
				t.Fatalf("read %x, want %x", b[:n], model[:n])
			}
			model = model[n:]
		}
		if r.len() != len(model) || r.free() != 64-len(model) {
			t.Fatalf("len %d, free %d, want %d, %d", r.len(), r.free(), len(model), 64-len(model))
		}
	}
}

// TestByteRingThreads is for the race detector.
func TestByteRingThreads(t *testing.T) {
	r := new(byteRing)
	r.limit.Store(128)
	const total = 1 << 18
	go func() {
		b := make([]byte, 50)
		for sent := 0; sent < total; {
			for i := range b {
				b[i] = byte(sent + i)
			}
			n := r.write(b[:min(len(b), total-sent)])
			sent += n
			if n == 0 {
				runtime.Gosched()
			}
		}
	}()
	b := make([]byte, 70)
	for got := 0; got < total; {
		n := r.read(b)
		for i := range n {
			if b[i] != byte(got+i) {
				t.Fatalf("byte %d is %d, want %d", got+i, b[i], byte(got+i))
			}
		}
		got += n
		if n == 0 {
			runtime.Gosched()
		}
	}
}

// TestByteRingBlocks is the model test with blocks that are appended whole, a reader
// that releases whenever it feels like it, and that keeps some of what it reads.
func TestByteRingBlocks(t *testing.T) {
	type kept struct {
		view  *buffer.View
		first int // of the stream's bytes
	}
	var lent []kept
	check := func(what string, b []byte, first int) {
		t.Helper()
		for i, x := range b {
			if x != byte((first+i)%251) {
				t.Fatalf("%s: byte %d is %d, want %d", what, first+i, x, byte((first+i)%251))
			}
		}
	}
	r := new(byteRing)
	r.limit.Store(netRing)
	rng := rand.New(rand.NewPCG(3, 4))
	written, read := 0, 0
	fill := func(b []byte) {
		for i := range b {
			b[i] = byte((written + i) % 251)
		}
	}
	for range 20_000 {
		switch rng.IntN(6) {
		case 0:
			if r.free() < largeBlock {
				continue
			}
			b := newBlock(1 + rng.IntN(largeBlock))
			b.end = 1 + rng.IntN(len(b.b))
			fill(b.b[:b.end])
			written += b.end
			r.append(b)
		case 1:
			b := make([]byte, rng.IntN(20_000))
			fill(b)
			written += r.write(b)
		case 2:
			r.release()
			if released := r.tail.Load()&tailReleased != 0; released && (r.len() > 0 || r.first != nil) {
				t.Fatalf("released with %d bytes waiting", r.len())
			}
		default:
			view := r.peek()
			if (len(view) == 0) != (written == read) {
				t.Fatalf("peek gives %d of %d bytes", len(view), written-read)
			}
			n := len(view)
			if rng.IntN(3) == 0 {
				n = rng.IntN(n + 1)
			}
			check("read", view[:n], read)
			if n > 0 && rng.IntN(3) == 0 {
				lent = append(lent, kept{r.lend(n), read})
			}
			r.skip(n)
			read += n
		}
		if len(lent) > rng.IntN(10) {
			i := rng.IntN(len(lent))
			check("kept", lent[i].view.AsSlice(), lent[i].first)
			lent[i].view.Release()
			lent = slices.Delete(lent, i, i+1)
		}
		if r.len() != written-read {
			t.Fatalf("len %d, want %d", r.len(), written-read)
		}
	}
}

// TestByteRingReleaseThreads is for the race detector: the reader releases each
// time it finds nothing.
func TestByteRingReleaseThreads(t *testing.T) {
	r := new(byteRing)
	r.limit.Store(netRing)
	const total = 1 << 22
	pattern := make([]byte, 251+largeBlock)
	for i := range pattern {
		pattern[i] = byte(i % 251)
	}
	go func() {
		rng := rand.New(rand.NewPCG(5, 6))
		for sent := 0; sent < total; {
			size := 1 + rng.IntN(100)
			if rng.IntN(50) == 0 {
				size = 1 + rng.IntN(largeBlock)
			}
			size = min(size, total-sent)
			next := pattern[sent%251:][:size]
			if r.free() < size {
				runtime.Gosched()
				continue
			}
			if rng.IntN(4) == 0 {
				b := newBlock(size)
				b.end = copy(b.b, next)
				r.append(b)
			} else {
				r.write(next)
			}
			sent += size
		}
	}()
	for got := 0; got < total; {
		view := r.peek()
		if !bytes.Equal(view, pattern[got%251:][:len(view)]) {
			t.Fatalf("%d bytes from byte %d on are not what was written", len(view), got)
		}
		got += len(view)
		r.skip(len(view))
		if len(view) == 0 {
			r.release()
		}
	}
}

// memory returns the size of the blocks that wait in a ring.
func (r *byteRing) memory() (bytes int) {
	b := r.first
	if b == nil {
		b = r.fresh
	}
	for ; b != nil; b = b.next.Load() {
		bytes += len(b.b)
	}
	return bytes
}

// TestByteRingOfPieces: what is appended does not make the writes between it large.
func TestByteRingOfPieces(t *testing.T) {
	r := new(byteRing)
	r.limit.Store(netRing)
	for r.free() > lendLimit {
		r.append(blockOf(fullViewOf(noise(lendLimit))))
		r.write([]byte("x"))
	}
	if n := r.memory(); n > 2*netRing {
		t.Errorf("%d bytes wait in %d bytes of blocks, want at most %d", r.len(), n, 2*netRing)
	}
}
