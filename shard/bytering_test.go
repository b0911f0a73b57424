package shard

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"testing"
)

func TestByteRingModel(t *testing.T) {
	r := &byteRing{size: 64}
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
	r := &byteRing{size: 128}
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
