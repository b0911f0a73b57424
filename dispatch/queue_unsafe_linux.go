package dispatch

// Why unsafe: read(2), write(2) and writev(2) through golang.org/x/sys/unix
// enter the scheduler (Syscall, not RawSyscall), which costs more than the
// call itself and lets another thread take the P. Raw variants in that package
// that take slices would end the need.
//
// Invariants: pointers are converted in the argument list of the system call
// itself, which keeps their memory alive and in place until it returns. The
// descriptor is non-blocking, or a raw call would hold up the collector.

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read takes the next frame, vnet header first, into b and returns its length.
// b should have room for VnetHeaderLen + MaxFrameLen bytes: of a longer frame
// the rest is lost. No frame: EAGAIN. Call it on the queue's thread only.
func (q *Queue) Read(b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(q.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// Write hands over one frame, vnet header first, whole or not at all. The
// kernel copies it and runs the receive path of its own stack before Write
// returns. Call it on the queue's thread only.
func (q *Queue) Write(b []byte) syscall.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(q.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return errno
}

// Writev is Write for a frame in pieces, at most 1024 of them (IOV_MAX): the
// pieces together are one frame. It returns the bytes written, all of them or
// none. The caller keeps alive what the pieces point to; unix.Iovec holds real
// pointers, so memory that iov itself is reachable from is enough.
func (q *Queue) Writev(iov []unix.Iovec) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(q.fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
