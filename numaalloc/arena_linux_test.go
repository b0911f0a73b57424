package numaalloc

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// bufferLen is that of a receive buffer for the largest frame: no whole number
// of pages.
const bufferLen = 65_600

func newTestArena(t *testing.T, cfg ArenaConfig, calls *memoryCalls) *Arena {
	t.Helper()
	a, err := newArena(cfg, calls)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func wantVerified(t *testing.T, a *Arena, pages int) {
	t.Helper()
	onNode, elsewhere, absent, err := a.Verify()
	if err != nil {
		t.Error(err)
	}
	if onNode != pages || elsewhere != 0 || absent != 0 {
		t.Errorf("%d pages on the node, %d elsewhere, %d absent; want %d, 0, 0", onNode, elsewhere, absent, pages)
	}
}

func wantStats(t *testing.T, a *Arena, want ArenaStats) {
	t.Helper()
	if got := a.Stats(); got != want {
		t.Errorf("counters are %+v, want %+v", got, want)
	}
}

func TestArenaAdopt(t *testing.T) {
	for _, node := range memoryNodes(t) {
		a := newTestArena(t, ArenaConfig{Node: node}, &kernelMemory)
		if a.Node() != node || a.FirstTouch() != nil {
			t.Errorf("node is %d, first touch %v; want %d, nil", a.Node(), a.FirstTouch(), node)
		}
		const buffers = 20
		var all [][]byte
		pages, leftOut := 0, 0
		for i := range buffers {
			b := make([]byte, bufferLen)
			all = append(all, b)
			if i%2 == 0 {
				for j := range b {
					b[j] = byte(j / 3)
				}
			}
			for range 2 { // the second time it is known
				if err := a.Adopt(b); err != nil {
					t.Fatal(err)
				}
			}
			for j := range b {
				if want := byte(j/3) * byte(1-i%2); b[j] != want {
					t.Fatalf("byte %d of buffer %d became %d", j, i, b[j])
				}
			}
			whole := len(WholePages(b))
			pages += whole / os.Getpagesize()
			leftOut += len(b) - whole
		}
		if pages < buffers*(bufferLen/os.Getpagesize()-1) {
			t.Fatalf("only %d pages in %d buffers", pages, buffers)
		}
		wantVerified(t, a, pages)
		wantStats(t, a, ArenaStats{
			Ranges: buffers, BoundBytes: int64(pages * os.Getpagesize()), LeftOutBytes: int64(leftOut),
		})

		// One released, the rest by Close.
		released := len(WholePages(all[0]))
		if err := a.Release(all[0][:1]); err != nil {
			t.Error(err)
		}
		pages -= released / os.Getpagesize()
		wantVerified(t, a, pages)
		wantStats(t, a, ArenaStats{
			Ranges: buffers - 1, BoundBytes: int64(pages * os.Getpagesize()), LeftOutBytes: int64(leftOut),
		})
		for i, want := range []string{"default", prefer(node)} {
			if got := policyOf(t, WholePages(all[i])); got != want {
				t.Errorf("policy of buffer %d is %q, want %q", i, got, want)
			}
		}
		for range 2 {
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		}
		for i, b := range all {
			if got := policyOf(t, WholePages(b)); got != "default" {
				t.Errorf("policy of buffer %d is %q after Close", i, got)
			}
		}
		wantStats(t, a, ArenaStats{LeftOutBytes: int64(leftOut)})
		if err := a.Adopt(all[0]); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Adopt after Close: %v", err)
		}
		if _, err := a.Alloc(1); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Alloc after Close: %v", err)
		}
	}
}

// TestArenaAdoptMoves what another node's thread has touched.
func TestArenaAdoptMoves(t *testing.T) {
	first, second := twoMemoryNodes(t)
	b := mapPages(t, 4)
	if err := Bind(b, first); err != nil {
		t.Fatal(err)
	}
	touchPages(b)
	if err := Unbind(b); err != nil {
		t.Fatal(err)
	}
	wantWhere(t, b, 0, map[int]int{first: 4})
	a := newTestArena(t, ArenaConfig{Node: second}, &kernelMemory)
	if err := a.Adopt(b); err != nil {
		t.Fatal(err)
	}
	wantVerified(t, a, 4)
	wantWhere(t, b, 0, map[int]int{second: 4})

	// What is moved behind the arena's back is seen.
	if err := Bind(b[:os.Getpagesize()], first); err != nil {
		t.Fatal(err)
	}
	onNode, elsewhere, absent, err := a.Verify()
	if onNode != 3 || elsewhere != 1 || absent != 0 || err != nil {
		t.Errorf("Verify = %d, %d, %d (%v); want 3, 1, 0", onNode, elsewhere, absent, err)
	}
}

// TestArenaAdoptReplaces pages that exist: part of a huge page would go where
// another part is moved.
func TestArenaAdoptReplaces(t *testing.T) {
	const pages = 2*renewedAtOnce/4096 + 1
	for _, test := range []struct {
		name    string
		touched bool
		err     error // of the first discard
		want    int   // bytes discarded
	}{
		{"absent", false, nil, 0},
		{"there", true, nil, pages * os.Getpagesize()},
		{"locked", true, unix.EINVAL, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := mapPages(t, pages)
			for i := range b {
				if test.touched {
					b[i] = byte(i / 3)
				}
			}
			discarded := 0
			calls := kernelMemory
			calls.discard = func(b []byte) error {
				if test.err != nil {
					return test.err
				}
				discarded += len(b)
				return kernelMemory.discard(b)
			}
			a := newTestArena(t, ArenaConfig{Node: memoryNodes(t)[0]}, &calls)
			if err := a.Adopt(b); err != nil {
				t.Fatal(err)
			}
			if discarded != test.want {
				t.Errorf("%d bytes discarded, want %d", discarded, test.want)
			}
			for i := range b {
				if test.touched && b[i] != byte(i/3) {
					t.Fatalf("byte %d has become %d", i, b[i])
				}
			}
			wantVerified(t, a, pages)
		})
	}
}

func TestArenaIgnoresWhatHasNoWholePage(t *testing.T) {
	a := newTestArena(t, ArenaConfig{Node: memoryNodes(t)[0]}, &kernelMemory)
	for _, b := range [][]byte{nil, make([]byte, 100)} {
		if err := a.Adopt(b); err != nil {
			t.Error(err)
		}
		if err := a.Release(b); err != nil {
			t.Error(err)
		}
	}
	wantStats(t, a, ArenaStats{LeftOutBytes: 100})
	wantVerified(t, a, 0)
}

// TestArenaFirstTouch: where memory policies are refused, one system call finds
// that out and the buffers are touched all the same.
func TestArenaFirstTouch(t *testing.T) {
	for _, errno := range []error{unix.EPERM, unix.ENOSYS} {
		binds := 0
		calls := kernelMemory
		calls.mbind = func(_ []byte, node int, _ bool) error {
			if node != noNode {
				binds++
			}
			return errno
		}
		a := newTestArena(t, ArenaConfig{Node: 3, AllocLimit: 1 << 20}, &calls)
		if err := a.FirstTouch(); !errors.Is(err, ErrNotPermitted) || !errors.Is(err, errno) {
			t.Errorf("FirstTouch = %v, want ErrNotPermitted and %v", err, errno)
		}
		for range 3 {
			b := mapPages(t, 2)
			if err := a.Adopt(b); err != nil {
				t.Error(err)
			}
			if found, err := Where(b); err == nil && found.Absent > 0 {
				t.Errorf("%d pages were not touched", found.Absent)
			}
			if err := a.Release(b); err != nil {
				t.Error(err)
			}
		}
		b, err := a.Alloc(100)
		if err != nil {
			t.Fatal(err)
		}
		b[99] = 1
		if binds != 1 {
			t.Errorf("%d attempts to bind, want 1", binds)
		}
		wantStats(t, a, ArenaStats{Ranges: 1, AllocatedBytes: int64(os.Getpagesize()), Fallbacks: 4})
		if _, _, _, err := a.Verify(); !errors.Is(err, ErrNotPermitted) {
			t.Errorf("Verify: %v, want ErrNotPermitted", err)
		}
	}
}

// TestArenaWithoutNode: on a machine with one node there is nothing to do per
// buffer.
func TestArenaWithoutNode(t *testing.T) {
	asked := 0
	calls := memoryCalls{
		mbind:     func([]byte, int, bool) error { asked++; return nil },
		pageNodes: func([]byte, []int32) error { asked++; return nil },
		mmap:      kernelMemory.mmap,
		munmap:    kernelMemory.munmap,
	}
	a := newTestArena(t, ArenaConfig{Node: -7}, &calls)
	b := mapPages(t, 2)[1:]
	if err := a.Adopt(b); err != nil {
		t.Error(err)
	}
	wantStats(t, a, ArenaStats{})
	if found, err := Where(b); err == nil && found.Absent != 2 {
		t.Errorf("%d of 2 pages were touched", 2-found.Absent)
	}
	if err := a.Release(b); err != nil {
		t.Error(err)
	}
	scratch, err := a.Alloc(10)
	if err != nil {
		t.Fatal(err)
	}
	scratch[9] = 1
	wantVerified(t, a, 0)
	wantStats(t, a, ArenaStats{Ranges: 1, AllocatedBytes: int64(os.Getpagesize())})
	if a.Node() >= 0 || a.FirstTouch() != nil {
		t.Errorf("node is %d, first touch %v; want a negative one, nil", a.Node(), a.FirstTouch())
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if asked != 0 {
		t.Errorf("%d system calls about nodes, want none", asked)
	}
}

// TestArenaAdoptFails: the buffer stays with its user, the arena goes on.
func TestArenaAdoptFails(t *testing.T) {
	node := memoryNodes(t)[0]
	fail := error(nil)
	calls := kernelMemory
	calls.mbind = func(b []byte, node int, move bool) error {
		if fail != nil && node != noNode {
			return fail
		}
		return kernelMemory.mbind(b, node, move)
	}
	b := mapPages(t, 2) // before the arena: it is unmapped last
	a := newTestArena(t, ArenaConfig{Node: node}, &calls)
	fail = unix.ENOMEM
	if err := a.Adopt(b); !errors.Is(err, unix.ENOMEM) || errors.Is(err, ErrNotPermitted) {
		t.Errorf("Adopt = %v, want ENOMEM", err)
	}
	wantStats(t, a, ArenaStats{Fallbacks: 1})
	if got := policyOf(t, b); got != "default" {
		t.Errorf("policy is %q after the error", got)
	}
	if _, err := a.Alloc(1); err != nil {
		t.Errorf("Alloc: %v; want memory that is not bound", err)
	}
	wantStats(t, a, ArenaStats{Ranges: 1, AllocatedBytes: int64(os.Getpagesize()), Fallbacks: 2})
	fail = nil
	if err := a.Adopt(b); err != nil {
		t.Error(err)
	}
	wantVerified(t, a, 2)
}

func TestArenaAlloc(t *testing.T) {
	page := os.Getpagesize()
	for _, node := range memoryNodes(t) {
		mapped := 0
		calls := kernelMemory
		calls.mmap = func(n int) ([]byte, error) {
			mapped += n
			return kernelMemory.mmap(n)
		}
		calls.munmap = func(b []byte) error {
			mapped -= len(b)
			return kernelMemory.munmap(b)
		}
		a := newTestArena(t, ArenaConfig{Node: node, AllocLimit: 3 * page}, &calls)

		first, err := a.Alloc(page + 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(first) != page+1 || len(WholePages(first[:cap(first)])) != 2*page {
			t.Errorf("%d bytes with room for %d; want %d and whole pages", len(first), cap(first), page+1)
		}
		for i, b := range first {
			if b != 0 {
				t.Fatalf("byte %d is %d", i, b)
			}
		}
		if got := policyOf(t, first); got != prefer(node) {
			t.Errorf("policy is %q, want %q", got, prefer(node))
		}
		wantVerified(t, a, 2)

		want := fmt.Sprintf("arena of node %d: %d of at most %d are in use", node, 2*page, 3*page)
		for _, n := range []int{page + 1, 4 * page, math.MaxInt} {
			if _, err := a.Alloc(n); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("Alloc(%d): %v, want %q", n, err, want)
			}
		}
		for _, n := range []int{0, -1} {
			if _, err := a.Alloc(n); err == nil || !strings.Contains(err.Error(), "want 1 or more") {
				t.Errorf("Alloc(%d): %v", n, err)
			}
		}
		if _, err := a.Alloc(page); err != nil {
			t.Error(err)
		}
		wantStats(t, a, ArenaStats{Ranges: 2, BoundBytes: 3 * int64(page), AllocatedBytes: 3 * int64(page), Refused: 3})
		for range 2 { // the second time it is unknown
			if err := a.Release(first); err != nil {
				t.Error(err)
			}
		}
		wantStats(t, a, ArenaStats{Ranges: 1, BoundBytes: int64(page), AllocatedBytes: int64(page), Refused: 3})
		if mapped != page {
			t.Errorf("%d bytes are mapped, want %d", mapped, page)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if mapped != 0 {
			t.Errorf("%d bytes are mapped after Close", mapped)
		}
	}
}

func TestArenaHugePages(t *testing.T) {
	node := memoryNodes(t)[0]
	for _, test := range []struct {
		enabled         bool
		bytes, want, of int
	}{
		{true, hugePage - 1, 0, hugePage},
		{true, hugePage, hugePage, hugePage},
		{true, hugePage + 1, 2 * hugePage, 2 * hugePage},
		{false, hugePage + 1, 0, hugePage + os.Getpagesize()},
	} {
		huge := 0
		calls := kernelMemory
		calls.hugePages = func(b []byte) error {
			huge += len(b)
			return unix.EINVAL // no reason to fail
		}
		a := newTestArena(t, ArenaConfig{Node: node, HugePages: test.enabled}, &calls)
		if _, err := a.Alloc(test.bytes); err != nil {
			t.Fatal(err)
		}
		if huge != test.want {
			t.Errorf("%d bytes: huge pages asked for %d, want %d", test.bytes, huge, test.want)
		}
		if got := a.Stats().AllocatedBytes; got != int64(test.of) {
			t.Errorf("%d bytes took %d, want %d", test.bytes, got, test.of)
		}
		wantVerified(t, a, test.of/os.Getpagesize())
	}
}

func TestNewArenaErrors(t *testing.T) {
	memoryNodes(t)
	noMemory := kernelMemory
	noMemory.mmap = func(int) ([]byte, error) { return nil, unix.ENOMEM }
	for _, test := range []struct {
		cfg   ArenaConfig
		calls *memoryCalls
		want  string
	}{
		{ArenaConfig{Node: maxNodes - 1}, &kernelMemory, "the node has no memory"},
		{ArenaConfig{Node: maxNodes}, &kernelMemory, "the node has no memory"},
		{ArenaConfig{AllocLimit: -1}, &kernelMemory, "AllocLimit is -1 bytes; want 1 or more"},
		{ArenaConfig{}, &noMemory, "arena of node 0: map a page: cannot allocate memory"},
	} {
		if _, err := newArena(test.cfg, test.calls); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("NewArena(%+v): %v, want %q", test.cfg, err, test.want)
		}
	}
}

// BenchmarkAdopt is what a buffer costs once in its life, if its pages are
// already where they belong.
func BenchmarkAdopt(b *testing.B) {
	a, err := NewArena(ArenaConfig{})
	if err != nil || a.FirstTouch() != nil {
		b.Skip(err, a)
	}
	buf := make([]byte, bufferLen)
	for b.Loop() {
		if err := a.Adopt(buf); err != nil {
			b.Fatal(err)
		}
		if err := a.Release(buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = a.Close()
}
