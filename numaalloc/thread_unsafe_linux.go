package numaalloc

// Why unsafe: prctl(2) takes the name as a pointer among plain integers, and
// golang.org/x/sys/unix has no typed wrapper for PR_SET_NAME. One that takes a
// string would end the need.
//
// Invariant: the pointer is converted in the argument list of the system call
// itself, which keeps the array alive and in place until the call returns.

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setThreadName names the calling thread. name has to fit; the rest of the
// array is the closing zero.
func setThreadName(name string) syscall.Errno {
	var comm [maxThreadName + 1]byte
	copy(comm[:maxThreadName], name)
	_, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&comm)), 0)
	return errno
}
