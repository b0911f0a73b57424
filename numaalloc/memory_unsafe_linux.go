package numaalloc

// Why unsafe: golang.org/x/sys/unix has the numbers of these system calls but
// no functions for mbind, move_pages and get_mempolicy. Such functions would
// end the need; its SetMemPolicy takes a mask of CPUs for one of nodes.
//
// Invariants: pointers are converted in the argument list of the system call
// itself. The kernel only looks up the addresses in movePages, it neither reads
// nor writes there; b stays alive until the call is over.

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nodeMask is the kernel's nodemask_t, one bit per node. On big-endian machines
// this holds for 64-bit ones only.
type nodeMask [maxNodes / 64]uint64

// maskBits is what the kernel is told: it takes one bit less than that
// (get_nodes in mm/mempolicy.c).
const maskBits = maxNodes + 1

// mbind is mbind(2). A nil mask has no node.
func mbind(pages []byte, mode int, mask *nodeMask, flags int) error {
	_, _, errno := unix.Syscall6(unix.SYS_MBIND,
		uintptr(unsafe.Pointer(unsafe.SliceData(pages))), uintptr(len(pages)),
		uintptr(mode), uintptr(unsafe.Pointer(mask)), maskBits, uintptr(flags))
	return errnoError(errno)
}

// movePages is move_pages(2) without targets, which moves nothing: status gets
// each page's node or negative errno, from the page on in which b begins.
func movePages(b []byte, status []int32) error {
	var addresses [pagesPerCall]uintptr
	page := uintptr(os.Getpagesize())
	first := uintptr(unsafe.Pointer(unsafe.SliceData(b))) &^ (page - 1)
	n := min(len(status), pagesPerCall)
	for i := range n {
		addresses[i] = first + uintptr(i)*page
	}
	_, _, errno := unix.Syscall6(unix.SYS_MOVE_PAGES, 0, uintptr(n),
		uintptr(unsafe.Pointer(&addresses)), 0, uintptr(unsafe.Pointer(unsafe.SliceData(status))), 0)
	runtime.KeepAlive(b)
	return errnoError(errno)
}

// getMempolicy is get_mempolicy(2): of the address of b with MPOL_F_ADDR, else
// of the calling thread.
func getMempolicy(b []byte, flags int) (mode int, mask nodeMask, err error) {
	var m int32
	_, _, errno := unix.Syscall6(unix.SYS_GET_MEMPOLICY,
		uintptr(unsafe.Pointer(&m)), uintptr(unsafe.Pointer(&mask)), maskBits,
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(flags), 0)
	return int(m), mask, errnoError(errno)
}

// setMempolicy is set_mempolicy(2), for the calling thread.
func setMempolicy(mode int, mask *nodeMask) error {
	_, _, errno := unix.Syscall(unix.SYS_SET_MEMPOLICY, uintptr(mode), uintptr(unsafe.Pointer(mask)), maskBits)
	return errnoError(errno)
}

// errnoError keeps 0 from becoming an error that is not nil.
func errnoError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// CurrentCPU returns the CPU that the calling thread runs on, or -1 if the
// kernel does not say. Without a pin it may be wrong at once (getcpu(2)).
func CurrentCPU() int {
	var cpu uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); errno != 0 {
		return -1
	}
	return int(cpu)
}
