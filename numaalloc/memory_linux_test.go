package numaalloc

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// memoryNodes returns the nodes whose memory this process may use. Without them
// the test is skipped: so it is where memory policies are refused.
func memoryNodes(t *testing.T) []int {
	t.Helper()
	if err := Unbind(mapPages(t, 1)); errors.Is(err, ErrNotPermitted) {
		t.Skip(err)
	}
	nodes := sysNodes(t, "has_memory")
	allowed, err := kernelMemory.memsAllowed()
	if err != nil {
		t.Fatal(err)
	}
	nodes = slices.DeleteFunc(nodes, func(node int) bool { return !slices.Contains(allowed, node) })
	if len(nodes) == 0 {
		t.Fatalf("no node with memory is allowed: %v", allowed)
	}
	return nodes
}

// twoMemoryNodes returns two of them, or skips the test.
func twoMemoryNodes(t *testing.T) (first, second int) {
	t.Helper()
	nodes := memoryNodes(t)
	if len(nodes) < 2 {
		t.Skipf("needs 2 nodes with memory, this machine has %d", len(nodes))
	}
	return nodes[0], nodes[len(nodes)-1]
}

// sysNodes reads a list of nodes: online, has_cpu or has_memory.
func sysNodes(t *testing.T, name string) []int {
	t.Helper()
	list, err := os.ReadFile("/sys/devices/system/node/" + name)
	if err != nil {
		t.Skip(err) // a kernel without NUMA
	}
	nodes, err := ParseCPUList(string(list))
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

// mapPages returns n pages that do not exist yet.
func mapPages(t *testing.T, n int) []byte {
	t.Helper()
	b, err := kernelMemory.mmap(n * os.Getpagesize())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kernelMemory.munmap(b) })
	return b
}

// policyOf returns the memory policy at the first byte of b, as "default" or
// the nodes it prefers.
func policyOf(t *testing.T, b []byte) string {
	t.Helper()
	mode, mask, err := getMempolicy(b, unix.MPOL_F_ADDR)
	return policyText(t, mode, mask, err)
}

// threadPolicy returns that of the calling thread.
func threadPolicy(t *testing.T) string {
	t.Helper()
	mode, mask, err := getMempolicy(nil, 0)
	return policyText(t, mode, mask, err)
}

func policyText(t *testing.T, mode int, mask nodeMask, err error) string {
	t.Helper()
	switch {
	case err != nil:
		t.Error(err)
		return err.Error()
	case mode == unix.MPOL_DEFAULT:
		return "default"
	case mode == unix.MPOL_PREFERRED|unix.MPOL_F_STATIC_NODES:
		return "prefer " + FormatCPUList(mask.nodes())
	default:
		return fmt.Sprintf("mode %#x", mode)
	}
}

func prefer(node int) string { return fmt.Sprintf("prefer %d", node) }

// wantWhere checks where the pages of b are.
func wantWhere(t *testing.T, b []byte, absent int, onNode map[int]int) {
	t.Helper()
	got, err := Where(b)
	if err != nil {
		t.Error(err)
		return
	}
	if got.Absent != absent || !maps.Equal(got.OnNode, onNode) {
		t.Errorf("pages are %v, %d absent; want %v, %d absent", got.OnNode, got.Absent, onNode, absent)
	}
}

func TestWholePages(t *testing.T) {
	page := os.Getpagesize()
	b := mapPages(t, 4)
	tests := []struct {
		from, to           int
		wantFrom, wantPage int
	}{
		{0, 4 * page, 0, 4},
		{1, 4 * page, page, 3},
		{0, 4*page - 1, 0, 3},
		{1, 4*page - 1, page, 2},
		{page - 1, 2 * page, page, 1},
		{page, 2*page + 1, page, 1},
		{1, 2*page - 1, 0, 0},
		{0, page - 1, 0, 0},
		{page + 1, page + 1, 0, 0},
		{3*page + 1, 4 * page, 0, 0},
	}
	for _, test := range tests {
		got := WholePages(b[test.from:test.to])
		if len(got) != test.wantPage*page {
			t.Errorf("[%d:%d] has %d bytes of whole pages, want %d pages", test.from, test.to, len(got), test.wantPage)
			continue
		}
		if len(got) > 0 && &got[0] != &b[test.wantFrom] {
			t.Errorf("[%d:%d]: the whole pages do not begin at %d", test.from, test.to, test.wantFrom)
		}
		if cap(got) != len(got) {
			t.Errorf("[%d:%d]: append would write behind the whole pages", test.from, test.to)
		}
	}
	if got := WholePages(nil); len(got) != 0 {
		t.Errorf("nil has %d bytes of whole pages", len(got))
	}
}

func TestBindDecidesWhereNewPagesAre(t *testing.T) {
	for _, node := range memoryNodes(t) {
		b := mapPages(t, 8)
		if err := Bind(b, node); err != nil {
			t.Fatal(err)
		}
		wantWhere(t, b, 8, nil)
		touchPages(b)
		wantWhere(t, b, 0, map[int]int{node: 8})
		if got := policyOf(t, b); got != prefer(node) {
			t.Errorf("policy is %q, want %q", got, prefer(node))
		}
	}
}

func TestBindMovesPages(t *testing.T) {
	first, second := twoMemoryNodes(t)
	b := mapPages(t, 8)
	for i := range b {
		b[i] = byte(i / 7)
	}
	for _, node := range []int{first, second, first} {
		if err := Bind(b, node); err != nil {
			t.Fatal(err)
		}
		wantWhere(t, b, 0, map[int]int{node: 8})
	}
	if err := Unbind(b); err != nil {
		t.Fatal(err)
	}
	wantWhere(t, b, 0, map[int]int{first: 8})
	for i := range b {
		if b[i] != byte(i/7) {
			t.Fatalf("byte %d changed to %d", i, b[i])
		}
	}
}

// TestBindMovesOnlyWhenNeeded, because moving is ten times as dear even when
// there is nothing to move.
func TestBindMovesOnlyWhenNeeded(t *testing.T) {
	tests := []struct {
		name  string
		found int32 // by pageNodes
		err   error
		want  string
	}{
		{"there", 3, nil, "3"},
		{"absent", -int32(unix.ENOENT), nil, "3"},
		{"page of zeros", -int32(unix.EFAULT), nil, "3"},
		{"elsewhere", 2, nil, "3 move"},
		{"not told", 0, unix.EPERM, "3 move"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var last string
			calls := kernelMemory
			calls.mbind = func(_ []byte, node int, move bool) error {
				last = fmt.Sprint(node)
				if move {
					last += " move"
				}
				return nil
			}
			calls.pageNodes = func(_ []byte, status []int32) error {
				for i := range status {
					status[i] = 3
				}
				status[len(status)-1] = test.found
				return test.err
			}
			if err := calls.bind(mapPages(t, 3), 3); err != nil {
				t.Fatal(err)
			}
			if last != test.want {
				t.Errorf("the last mbind was %q, want %q", last, test.want)
			}
		})
	}
}

func TestBindLeavesPartsOfPagesOut(t *testing.T) {
	node := memoryNodes(t)[0]
	page := os.Getpagesize()
	b := mapPages(t, 4)
	if err := Bind(b[1:4*page-1], node); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"default", prefer(node), prefer(node), "default"} {
		if got := policyOf(t, b[i*page:]); got != want {
			t.Errorf("page %d: policy is %q, want %q", i, got, want)
		}
	}
}

// TestUnbindOnGoHeap: what stays bound there would decide about later objects.
func TestUnbindOnGoHeap(t *testing.T) {
	page := os.Getpagesize()
	for _, node := range memoryNodes(t) {
		b := make([]byte, 128<<10)
		pages := WholePages(b)
		if len(pages) < len(b)-page {
			t.Fatalf("%d of %d bytes are whole pages", len(pages), len(b))
		}
		b[0], b[len(b)-1] = 1, 2
		if err := kernelMemory.replace(b, node); err != nil { // Linux 6.1 does not always move
			t.Fatal(err)
		}
		touchPages(pages)
		wantWhere(t, pages, 0, map[int]int{node: len(pages) / page})
		for i := 0; i < len(pages); i += page {
			if got := policyOf(t, pages[i:]); got != prefer(node) {
				t.Fatalf("page %d: policy is %q, want %q", i/page, got, prefer(node))
			}
		}
		if err := Unbind(b); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(pages); i += page {
			if got := policyOf(t, pages[i:]); got != "default" {
				t.Fatalf("page %d: policy is %q after Unbind", i/page, got)
			}
		}
		if b[0] != 1 || b[len(b)-1] != 2 {
			t.Error("the contents changed")
		}
	}
}

func TestBindErrors(t *testing.T) {
	nodes := memoryNodes(t)
	bad := []int{-2, -1, maxNodes - 1, maxNodes}
	for _, node := range sysNodes(t, "online") {
		if !slices.Contains(nodes, node) {
			bad = append(bad, node) // one with CPUs only
		}
	}
	b := mapPages(t, 2)
	for _, node := range bad {
		if err := Bind(b, nodes[0]); err != nil {
			t.Fatal(err)
		}
		err := Bind(b, node)
		want := fmt.Sprintf("bind %d bytes to node %d: invalid argument: the node has no memory", len(b), node)
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrNotPermitted) {
			t.Errorf("error = %v, want %q", err, want)
		}
		if err != nil && !strings.HasSuffix(err.Error(), ": "+FormatCPUList(nodes)) {
			t.Errorf("error = %v, want it to end in the nodes %v", err, nodes)
		}
		if got := policyOf(t, b); got != "default" {
			t.Errorf("policy is %q after the error", got)
		}
	}
	for _, small := range [][]byte{nil, b[:1], b[1 : len(b)-1]} {
		err := Bind(small, nodes[0])
		if err == nil || !strings.Contains(err.Error(), "no whole page among them; want ") {
			t.Errorf("Bind of %d bytes: %v", len(small), err)
		}
		if err := Unbind(small); err != nil {
			t.Errorf("Unbind of %d bytes: %v", len(small), err)
		}
	}
}

func TestWhere(t *testing.T) {
	node := memoryNodes(t)[0]
	page := os.Getpagesize()
	const pages = pagesPerCall + 88
	b := mapPages(t, pages)
	if err := Bind(b, node); err != nil {
		t.Fatal(err)
	}
	wantWhere(t, b, pages, nil)
	sum := byte(0)
	for i := range 3 {
		sum += b[i*page] // the kernel's page of zeros
	}
	b[3*page] = sum + 1
	wantWhere(t, b, pages-1, map[int]int{node: 1})
	touchPages(b)
	wantWhere(t, b, 0, map[int]int{node: pages})

	// Parts of pages count, over the border between two system calls too.
	border := pagesPerCall * page
	wantWhere(t, b[border-1:border+1], 0, map[int]int{node: 2})
	wantWhere(t, b[page-1:border+page], 0, map[int]int{node: pagesPerCall + 1})
	wantWhere(t, b[1:2], 0, map[int]int{node: 1})
	wantWhere(t, nil, 0, nil)
}

// TestRefused: callers go on without memory policies after ErrNotPermitted,
// and must not after anything else.
func TestRefused(t *testing.T) {
	b := mapPages(t, 2)
	for _, test := range []struct {
		errno   error
		refused bool
	}{
		{unix.EPERM, true},
		{unix.EACCES, true},
		{unix.ENOSYS, true},
		{errors.ErrUnsupported, true},
		{unix.ENOMEM, false},
		{unix.EIO, false},
	} {
		reset := false
		calls := kernelMemory
		calls.mbind = func(_ []byte, node int, _ bool) error {
			reset = reset || node == noNode
			return test.errno
		}
		calls.pageNodes = func([]byte, []int32) error { return test.errno }
		calls.setMempolicy = func(int) error { return test.errno }

		_, whereErr := calls.where(b)
		for what, err := range map[string]error{
			"bind":       calls.bind(b, 0),
			"unbind":     calls.unbind(b),
			"where":      whereErr,
			"bindThread": calls.bindThread(0),
		} {
			if !errors.Is(err, test.errno) || errors.Is(err, ErrNotPermitted) != test.refused {
				t.Errorf("%s after %v: %v; want ErrNotPermitted: %t", what, test.errno, err, test.refused)
			}
		}
		if !reset {
			t.Errorf("a bind that failed with %v leaves the policy of a part", test.errno)
		}
	}

	calls := kernelMemory
	calls.pageNodes = func(_ []byte, status []int32) error {
		status[0], status[1] = 0, -int32(unix.EIO)
		return nil
	}
	if _, err := calls.where(b); !errors.Is(err, syscall.EIO) {
		t.Errorf("where with a status of EIO: %v", err)
	}
}

func TestBindThread(t *testing.T) {
	for _, node := range memoryNodes(t) {
		b := mapPages(t, 4)
		onOwnThread(func() {
			if err := BindThread(node); err != nil {
				t.Error(err)
				return
			}
			if got := threadPolicy(t); got != prefer(node) {
				t.Errorf("policy of the thread is %q, want %q", got, prefer(node))
			}
			touchPages(b)
			wantWhere(t, b, 0, map[int]int{node: 4})
			if err := BindThread(maxNodes); !errors.Is(err, unix.EINVAL) {
				t.Errorf("BindThread(%d): %v", maxNodes, err)
			}
			if err := BindThread(maxNodes - 1); !errors.Is(err, unix.EINVAL) {
				t.Errorf("BindThread(%d): %v", maxNodes-1, err)
			}
			if err := UnbindThread(); err != nil {
				t.Error(err)
			}
			if got := threadPolicy(t); got != "default" {
				t.Errorf("policy of the thread is %q after UnbindThread", got)
			}
		})
	}
}

// TestBindGoesBeforeBindThread: a buffer's node does not depend on who touches
// it.
func TestBindGoesBeforeBindThread(t *testing.T) {
	first, second := twoMemoryNodes(t)
	b := mapPages(t, 4)
	if err := Bind(b, second); err != nil {
		t.Fatal(err)
	}
	onOwnThread(func() {
		if err := BindThread(first); err != nil {
			t.Error(err)
		}
		touchPages(b)
	})
	wantWhere(t, b, 0, map[int]int{second: 4})
}

// TestBindToFullNode: memory comes from elsewhere then, and nobody dies. It
// fills a node, so it runs on small ones only: those of a test guest.
func TestBindToFullNode(t *testing.T) {
	other, node := twoMemoryNodes(t)
	const spill, most = 64 << 20, 1 << 30
	free, reserve := freeBytes(t, node), freeBytes(t, other)
	if free > most || reserve < 3*spill {
		t.Skipf("needs a node with less than %d bytes free, node %d has %d, and one with more than %d, node %d has %d",
			most, node, free, 3*spill, other, reserve)
	}
	page := os.Getpagesize()
	b := mapPages(t, (free+spill)/page)
	if err := Bind(b, node); err != nil {
		t.Fatal(err)
	}
	touchPages(b)
	found, err := Where(b)
	if err != nil {
		t.Fatal(err)
	}
	if found.Absent > 0 || found.OnNode[other] < spill/2/page || found.OnNode[node] < free/2/page {
		t.Errorf("pages are %v, %d absent; want most on node %d and %d or more on node %d",
			found.OnNode, found.Absent, node, spill/2/page, other)
	}
}

// freeBytes returns how much memory of a node nobody uses.
func freeBytes(t *testing.T, node int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/sys/devices/system/node/node%d/meminfo", node))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kB int
		if _, err := fmt.Sscanf(line, fmt.Sprintf("Node %d MemFree: %%d kB", node), &kB); err == nil {
			return kB << 10
		}
	}
	t.Fatalf("no MemFree in %q", text)
	return 0
}
