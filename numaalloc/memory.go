package numaalloc

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
)

const (
	// pagesPerCall is how many pages one system call asks about: few enough
	// that their addresses fit the stack.
	pagesPerCall = 512

	// renewedAtOnce is how many bytes of pages are replaced at a time: few enough
	// for the stack.
	renewedAtOnce = 16 << 10

	// noNode stands for "no memory policy".
	noNode = -1
)

// ErrNotPermitted is what Bind, Where and BindThread wrap when the system call
// is refused as such: by a container's seccomp filter (Docker's default one
// wants CAP_SYS_NICE), or by a kernel or sandbox without NUMA. Nothing is
// broken then: pages are where their first user ran, and callers go on with
// that.
var ErrNotPermitted = errors.New("memory policies are refused by the kernel or the container's system call filter")

// Bind gives the whole pages of b to node: those that exist elsewhere are
// moved, those that do not exist yet will be made there. It touches no page;
// bytes before the first and behind the last whole page are left out (see
// WholePages), and a b without a whole page is an error.
//
// The node is preferred, not forced (MPOL_PREFERRED | MPOL_F_STATIC_NODES of
// set_mempolicy(2)). When it is full, pages come from the next nearest node and
// Where tells; under MPOL_BIND the kernel would end the process instead,
// although other nodes have memory. A change of the cpuset does not redirect
// the policy to another node. Pages that the kernel cannot move, such as those
// pinned for DMA, stay, and so may parts of huge pages; an [Arena] replaces them. The
// kernel's automatic NUMA balancing leaves bound pages alone.
//
// The policy belongs to the addresses and outlives the object on Go's heap:
// Unbind b before dropping it, or later objects land on this node. Each bound
// range can split a mapping in three, of which a process has vm.max_map_count
// (65,530); past it Bind fails with ENOMEM. After any error b has no policy.
//
// Any goroutine may call it. It costs about 7 µs per 64 KiB, and 50 µs or more
// when pages have to move.
func Bind(b []byte, node int) error {
	return kernelMemory.bind(b, node)
}

// Unbind takes the policy off the whole pages of b. Pages stay where they are.
func Unbind(b []byte) error {
	return kernelMemory.unbind(b)
}

// Pages counts pages by where they are.
type Pages struct {
	OnNode map[int]int // by node number
	Absent int         // without memory behind them: never written to, or swapped out
}

// Where asks the kernel on which nodes the pages are that hold b, the first and
// last one included (move_pages(2) without target nodes). The answer can be old
// when it arrives, unless the pages are bound.
func Where(b []byte) (Pages, error) {
	return kernelMemory.where(b)
}

// BindThread has the calling OS thread's new pages come from node: whatever it
// touches first and no Bind decides about. The node is preferred as by Bind.
// A thread pinned to a CPU gets its pages from that CPU's node anyway; this is
// for a CPU whose node has no memory, or not the wanted one. The goroutine must
// hold the thread, as for Pin.
func BindThread(node int) error {
	return kernelMemory.bindThread(node)
}

// UnbindThread undoes BindThread: new pages come from the node the thread runs
// on.
func UnbindThread() error {
	if err := kernelMemory.setMempolicy(noNode); err != nil {
		return memoryError("unbind thread", err)
	}
	return nil
}

// memoryCalls is what this package asks of the kernel's memory. The functions
// return bare errno values; tests put failing ones in.
type memoryCalls struct {
	// mbind sets the policy of whole pages: node is preferred; noNode is the
	// default. move moves pages that are elsewhere.
	mbind func(pages []byte, node int, move bool) error
	// pageNodes stores for each page that holds part of b its node or a
	// negative errno, pagesPerCall at most.
	pageNodes func(b []byte, status []int32) error
	// setMempolicy sets the calling thread's policy, as mbind does for pages.
	setMempolicy func(node int) error
	// memsAllowed returns the nodes whose memory the calling thread may use.
	memsAllowed func() ([]int, error)

	mmap      func(n int) ([]byte, error)
	munmap    func(b []byte) error
	hugePages func(b []byte) error // MADV_HUGEPAGE
	discard   func(b []byte) error // MADV_DONTNEED
}

func (k *memoryCalls) bind(b []byte, node int) error {
	pages := WholePages(b)
	if len(pages) == 0 {
		return fmt.Errorf("bind %d bytes to node %d: no whole page among them; want %d aligned bytes or more",
			len(b), node, os.Getpagesize())
	}
	err := checkNode(node)
	if err == nil {
		err = k.mbind(pages, node, false)
	}
	if err == nil {
		// With MPOL_MF_MOVE mbind first drains the page lists of every
		// CPU (lru_cache_disable in mm/mempolicy.c), even when nothing
		// is left to move. Asking costs a twentieth of that.
		if _, elsewhere, _, asked := k.count(pages, node); asked != nil || elsewhere > 0 {
			err = k.mbind(pages, node, true)
		}
	}
	if err != nil {
		_ = k.mbind(pages, noNode, false) // a part may have got it
		return k.nodeError(fmt.Sprintf("bind %d bytes to node %d", len(pages), node), err)
	}
	return nil
}

// replace binds like bind, but puts new pages in place of those that exist,
// with the same contents. Nobody else may use them meanwhile.
//
// To move them is not enough. What is part of a huge page, as Go's heap often
// is, follows it when another part is moved. And Linux 6.1 moves nothing, without
// a word, once the huge page's first page was given back, as Go's scavenger does
// (migrate_page_add in mm/mempolicy.c).
func (k *memoryCalls) replace(b []byte, node int) error {
	pages := WholePages(b)
	if checkNode(node) == nil && k.mbind(pages, node, false) == nil {
		k.renew(pages)
	}
	return k.bind(b, node) // finds nothing to move, or tells what was wrong
}

func (k *memoryCalls) renew(pages []byte) {
	var old [renewedAtOnce]byte
	if there, elsewhere, _, err := k.count(pages, 0); err == nil && there+elsewhere == 0 {
		return
	}
	for part := range slices.Chunk(pages, len(old)) {
		copy(old[:], part)
		if k.discard(part) != nil {
			return // locked in memory, for one: they can still be moved
		}
		copy(part, old[:])
	}
}

func (k *memoryCalls) unbind(b []byte) error {
	pages := WholePages(b)
	if len(pages) == 0 {
		return nil
	}
	if err := k.mbind(pages, noNode, false); err != nil {
		return memoryError(fmt.Sprintf("unbind %d bytes", len(pages)), err)
	}
	return nil
}

func (k *memoryCalls) where(b []byte) (Pages, error) {
	found := Pages{OnNode: make(map[int]int)}
	err := k.eachPage(b, func(node int) {
		if node == noNode {
			found.Absent++
		} else {
			found.OnNode[node]++
		}
	})
	if err != nil {
		return Pages{}, err
	}
	return found, nil
}

// count sorts the pages of b into those on node, those elsewhere and those that
// do not exist.
func (k *memoryCalls) count(b []byte, node int) (onNode, elsewhere, absent int, err error) {
	err = k.eachPage(b, func(found int) {
		switch found {
		case node:
			onNode++
		case noNode:
			absent++
		default:
			elsewhere++
		}
	})
	return onNode, elsewhere, absent, err
}

// eachPage calls f with the node of each page of b, noNode for an absent one.
func (k *memoryCalls) eachPage(b []byte, f func(node int)) error {
	status := make([]int32, min(pagesPerCall, pagesOf(b)))
	for len(b) > 0 {
		part := b
		if n := bytesOfPages(b, pagesPerCall); n < len(b) {
			part = b[:n]
		}
		b = b[len(part):]
		asked := status[:pagesOf(part)]
		if err := k.pageNodes(part, asked); err != nil {
			return memoryError(fmt.Sprintf("ask for the nodes of %d pages", len(asked)), err)
		}
		for _, s := range asked {
			switch {
			case s >= 0:
				f(int(s))
			case syscall.Errno(-s) == syscall.ENOENT, syscall.Errno(-s) == syscall.EFAULT:
				f(noNode) // not there, or the page of zeros that all share
			default:
				return memoryError(fmt.Sprintf("ask for the nodes of %d pages", len(asked)), syscall.Errno(-s))
			}
		}
	}
	return nil
}

func (k *memoryCalls) bindThread(node int) error {
	err := checkNode(node)
	if err == nil {
		err = k.setMempolicy(node)
	}
	if err != nil {
		return k.nodeError(fmt.Sprintf("bind thread to memory of node %d", node), err)
	}
	return nil
}

// checkNode refuses what does not fit a node mask, as the kernel refuses nodes
// that it does not have.
func checkNode(node int) error {
	if node < 0 || node >= maxNodes {
		return syscall.EINVAL
	}
	return nil
}

// nodeError explains why what failed for one node.
func (k *memoryCalls) nodeError(what string, err error) error {
	if !errors.Is(err, syscall.EINVAL) {
		return memoryError(what, err)
	}
	allowed := "unknown"
	if nodes, err := k.memsAllowed(); err == nil {
		allowed = FormatCPUList(nodes)
	}
	return fmt.Errorf("%s: %w: the node has no memory for this process; nodes that have some: %s", what, err, allowed)
}

// memoryError tells a refused system call from a failed one.
func memoryError(what string, err error) error {
	for _, refused := range []error{syscall.EPERM, syscall.EACCES, syscall.ENOSYS, errors.ErrUnsupported} {
		if errors.Is(err, refused) {
			return fmt.Errorf("%s: %w (%w)", what, ErrNotPermitted, err)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}
