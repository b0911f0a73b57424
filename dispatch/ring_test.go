package dispatch

import (
	"math/rand/v2"
	"reflect"
	"runtime"
	"testing"
)

func TestNewRing(t *testing.T) {
	for capacity, ok := range map[int]bool{
		-8: false, 0: false, 1: true, 2: true, 3: false, 1000: false, 1024: true, maxRing: true, 2 * maxRing: false,
	} {
		r, err := NewRing[byte](capacity)
		if (err == nil) != ok {
			t.Errorf("capacity %d: error %v, want success %t", capacity, err, ok)
		}
		if err == nil && (r.Cap() != capacity || r.Len() != 0) {
			t.Errorf("capacity %d: Cap %d, Len %d", capacity, r.Cap(), r.Len())
		}
	}
}

// A slice is the model: the ring has to agree with it after every step.
func TestRingModel(t *testing.T) {
	for _, capacity := range []int{1, 2, 8} {
		r, err := NewRing[int](capacity)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(1, uint64(capacity)))
		var model []int
		var full, empty int
		for i := range 20_000 {
			// Push and pop in runs, so that both ends are met often.
			if rng.IntN(8*capacity) < 4*capacity+i/1000%5-2 {
				ok := r.Push(i)
				if want := len(model) < capacity; ok != want {
					t.Fatalf("capacity %d, step %d: Push %t, want %t", capacity, i, ok, want)
				}
				if ok {
					model = append(model, i)
				} else {
					full++
				}
			} else {
				v, ok := r.Pop()
				if want := len(model) > 0; ok != want {
					t.Fatalf("capacity %d, step %d: Pop %t, want %t", capacity, i, ok, want)
				}
				if ok {
					if v != model[0] {
						t.Fatalf("capacity %d, step %d: popped %d, want %d", capacity, i, v, model[0])
					}
					model = model[1:]
				} else {
					empty++
				}
			}
			if r.Len() != len(model) {
				t.Fatalf("capacity %d, step %d: Len %d, want %d", capacity, i, r.Len(), len(model))
			}
		}
		if full == 0 || empty == 0 {
			t.Errorf("capacity %d: %d times full, %d times empty: the walk did not reach both ends", capacity, full, empty)
		}
	}
}

func TestRingKeepsNothing(t *testing.T) {
	r, err := NewRing[*int](4)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r.Push(new(int))
	}
	r.Pop()
	r.Pop()
	var kept int
	for _, p := range r.slots {
		if p != nil {
			kept++
		}
	}
	if kept != 1 {
		t.Errorf("%d pointers in the slots, want 1: the one not popped", kept)
	}
}

func TestRingOrderBetweenGoroutines(t *testing.T) {
	const items = 100_000
	type item struct {
		n    uint64
		body *[4]uint64
	}
	r, err := NewRing[item](64)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for n := range uint64(items) {
			// Plain writes before Push have to be visible after Pop; the race
			// detector watches.
			v := item{n, &[4]uint64{n, n, n, n}}
			for !r.Push(v) {
				runtime.Gosched()
			}
		}
	}()
	for n := uint64(0); n < items; {
		v, ok := r.Pop()
		if !ok {
			runtime.Gosched()
			continue
		}
		if v.n != n || *v.body != [4]uint64{n, n, n, n} {
			t.Fatalf("popped %d with %v, want %d", v.n, *v.body, n)
		}
		if l := r.Len(); l < 0 || l > r.Cap() {
			t.Fatalf("Len %d of %d", l, r.Cap())
		}
		n++
	}
	if v, ok := r.Pop(); ok {
		t.Errorf("popped %d after the last item", v.n)
	}
}

func TestRingAllocs(t *testing.T) {
	r, err := NewRing[[]byte](8)
	if err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 64)
	n := testing.AllocsPerRun(100, func() {
		for r.Push(frame) {
		}
		for {
			if _, ok := r.Pop(); !ok {
				return
			}
		}
	})
	if n != 0 {
		t.Errorf("%v allocations per run, want 0", n)
	}
}

func TestRingLayout(t *testing.T) {
	const line = 64 // bytes
	ring := reflect.TypeFor[Ring[[]byte]]()
	offset := func(name string) uintptr {
		f, ok := ring.FieldByName(name)
		if !ok {
			t.Fatalf("no field %s", name)
		}
		return f.Offset
	}
	tail, head := offset("tail"), offset("head")
	if tail-offset("slots") < line || head-offset("headSeen") < line || ring.Size()-offset("tailSeen") < line {
		t.Errorf("tail at %d, head at %d, size %d: they share a cache line", tail, head, ring.Size())
	}
}

func BenchmarkRing(b *testing.B) {
	r, err := NewRing[[]byte](64)
	if err != nil {
		b.Fatal(err)
	}
	frame := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		r.Push(frame)
		r.Pop()
	}
}
