//go:build !linux

package dispatch

import (
	"errors"
	"fmt"
)

// Program stands for the steering program where the kernel has none.
type Program struct{}

// NewProgram fails with [errors.ErrUnsupported]: steering needs Linux.
func NewProgram(*Toeplitz) (*Program, error) {
	return nil, fmt.Errorf("load steering program: %w", errors.ErrUnsupported)
}

// FD returns -1.
func (p *Program) FD() int { return -1 }

// SetQueues fails with [errors.ErrUnsupported].
func (p *Program) SetQueues([Buckets]uint32) error { return errors.ErrUnsupported }

// SetQueue fails with [errors.ErrUnsupported].
func (p *Program) SetQueue(int, uint32) error { return errors.ErrUnsupported }

// Close does nothing.
func (p *Program) Close() error { return nil }
