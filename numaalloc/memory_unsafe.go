package numaalloc

// Why unsafe: pages are a matter of addresses, and Go has no other way to learn
// a slice's address as a number, or to write to a page without changing it.
//
// Invariant: numbers made from pointers are only compared and masked here,
// never turned back into pointers.

import (
	"os"
	"sync/atomic"
	"unsafe"
)

// WholePages returns the part of b that Bind binds: from the first page
// boundary in b to the last, empty when there is no whole page between.
func WholePages(b []byte) []byte {
	size := os.Getpagesize()
	skip := -offsetInPage(b) & (size - 1)
	if len(b)-skip < size {
		return nil
	}
	n := (len(b) - skip) &^ (size - 1)
	return b[skip : skip+n : skip+n]
}

// pagesOf returns how many pages hold part of b.
func pagesOf(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	size := os.Getpagesize()
	return (offsetInPage(b) + len(b) + size - 1) / size
}

// bytesOfPages returns how many bytes from the start of b lie in its first n
// pages.
func bytesOfPages(b []byte, n int) int {
	return n*os.Getpagesize() - offsetInPage(b)
}

func offsetInPage(b []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) & uintptr(os.Getpagesize()-1))
}

// touchPages makes the pages exist and leaves what they hold as it is: adding 0
// is a write to the kernel, reading alone would map its shared page of zeros.
// pages are whole ones.
func touchPages(pages []byte) {
	for i := 0; i < len(pages); i += os.Getpagesize() {
		atomic.AddUint32((*uint32)(unsafe.Pointer(&pages[i])), 0)
	}
}
