//go:build !linux

package numaalloc

import (
	"errors"
	"fmt"
	"runtime"
)

// allowedNow returns every CPU the Go runtime sees.
func allowedNow() ([]int, error) {
	cpus := make([]int, runtime.NumCPU())
	for i := range cpus {
		cpus[i] = i
	}
	return cpus, nil
}

// Pin is refused: threads are pinned on Linux only.
func Pin(cpu int) error {
	return fmt.Errorf("pin thread to cpu %d: %w on %s", cpu, errors.ErrUnsupported, runtime.GOOS)
}

// PinAny is refused, like Pin.
func PinAny(cpus []int) error {
	return fmt.Errorf("pin thread to cpus %s: %w on %s", FormatCPUList(cpus), errors.ErrUnsupported, runtime.GOOS)
}

// NameThread is refused: threads are named on Linux only.
func NameThread(name string) error {
	return fmt.Errorf("name thread %q: %w on %s", name, errors.ErrUnsupported, runtime.GOOS)
}

func lockThread(string) { runtime.LockOSThread() }

// CurrentCPU returns -1: it is known on Linux only.
func CurrentCPU() int { return -1 }
