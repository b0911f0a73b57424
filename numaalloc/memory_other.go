//go:build !linux

package numaalloc

import "errors"

// kernelMemory refuses: memory is bound on Linux only.
var kernelMemory = memoryCalls{
	mbind:        func([]byte, int, bool) error { return errors.ErrUnsupported },
	pageNodes:    func([]byte, []int32) error { return errors.ErrUnsupported },
	setMempolicy: func(int) error { return errors.ErrUnsupported },
	memsAllowed:  func() ([]int, error) { return nil, errors.ErrUnsupported },
	mmap:         func(n int) ([]byte, error) { return make([]byte, n), nil },
	munmap:       func([]byte) error { return nil },
	hugePages:    func([]byte) error { return errors.ErrUnsupported },
	discard:      func([]byte) error { return errors.ErrUnsupported },
}
