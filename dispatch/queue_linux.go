package dispatch

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// tunPath is the kernel's door to TUN and TAP devices
// (Documentation/networking/tuntap.rst).
const tunPath = "/dev/net/tun"

// queueFlags are the same for every queue of a device: the kernel takes the
// feature bits (no packet information, vnet header) from the first queue that
// attaches and lets later ones in without comparing (tun_set_iff of
// drivers/net/tun.c).
const queueFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE | unix.IFF_VNET_HDR

// Queue is one queue of a TAP device. One shard's thread reads it: frames keep
// their order only if a single thread does. Any thread may write. Its methods are in
// the order of use; Read, Write and Writev are non-blocking, allocate nothing
// and are raw system calls, so that the thread keeps its P (the Go
// scheduler's right to run) and pays no more than the call.
//
// What they return tells what happened to the device:
//
//	            Read     Write
//	EAGAIN      empty    -         wait on FD with poll
//	EIO         -        refused   the interface is down; reads just find nothing
//	EBADFD      gone     gone      the device was deleted; poll reports POLLERR
//	EINVAL      -        dropped   frame shorter than 14 bytes, or a bad vnet header
//	EBADF       closed   closed    after Device.Close
type Queue struct {
	fd int // -1 once closed
}

// FD returns the file descriptor to wait on: readable when a frame is there.
// It is -1 once the device is closed. The queue keeps owning it.
func (q *Queue) FD() int { return q.fd }

// NewQueue returns a queue over a descriptor that is non-blocking and passes
// one frame with its vnet header per read and write, like a TAP queue does and
// one end of a socket pair of type SOCK_SEQPACKET can. The caller keeps owning
// fd.
func NewQueue(fd int) *Queue { return &Queue{fd: fd} }

// openQueue opens a queue that belongs to no device yet.
func openQueue() (*Queue, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return &Queue{fd: fd}, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%s: %w; load the tun module (modprobe tun), or pass the device into the container", tunPath, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%s: %w; uid %d needs read and write access to it", tunPath, err, os.Geteuid())
	default:
		return nil, fmt.Errorf("%s: %w", tunPath, err)
	}
}

// attach makes the queue the next one of the device name. The device has to
// exist, or the kernel creates it.
func (q *Queue) attach(name string) error {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	request.SetUint16(queueFlags)
	if err := unix.IoctlIfreq(q.fd, unix.TUNSETIFF, request); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}

	// With another holder's queue in place the flags are the holder's.
	if err := unix.IoctlIfreq(q.fd, unix.TUNGETIFF, request); err != nil {
		return os.NewSyscallError("TUNGETIFF", err)
	}
	if flags := request.Uint16(); flags&queueFlags != queueFlags {
		return fmt.Errorf("device has flags %#x, want %#x: another process holds it with other ones: %w",
			flags, queueFlags, unix.EBUSY)
	}

	if err := unix.IoctlSetPointerInt(q.fd, unix.TUNSETVNETHDRSZ, VnetHeaderLen); err != nil {
		return os.NewSyscallError("TUNSETVNETHDRSZ", err)
	}
	// The default is the host's order; VnetHeader has one order everywhere.
	if err := unix.IoctlSetPointerInt(q.fd, unix.TUNSETVNETLE, 1); err != nil {
		return os.NewSyscallError("TUNSETVNETLE", err)
	}
	return nil
}

// setOffloads asks for everything, or for nothing, and returns what the
// kernel granted: an older one refuses bits it does not know with EINVAL.
// They belong to the device, so any one queue will do.
func (q *Queue) setOffloads(wanted bool) (Offloads, error) {
	const (
		checksum = unix.TUN_F_CSUM
		tso      = checksum | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
		ecn      = tso | unix.TUN_F_TSO_ECN
		uso      = ecn | unix.TUN_F_USO4 | unix.TUN_F_USO6 // Linux 6.2
	)
	tries := []struct {
		bits    int
		granted Offloads
	}{
		{uso, OffloadChecksum | OffloadTSO4 | OffloadTSO6 | OffloadECN | OffloadUSO},
		{ecn, OffloadChecksum | OffloadTSO4 | OffloadTSO6 | OffloadECN},
		{tso, OffloadChecksum | OffloadTSO4 | OffloadTSO6},
		{checksum, OffloadChecksum},
		{0, 0},
	}
	if !wanted {
		// A device that was made by somebody else may have them on.
		tries = tries[len(tries)-1:]
	}

	var err error
	for _, try := range tries {
		if err = unix.IoctlSetInt(q.fd, unix.TUNSETOFFLOAD, try.bits); err == nil {
			return try.granted, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return 0, fmt.Errorf("kernel refuses offloads: %w", os.NewSyscallError("TUNSETOFFLOAD", err))
}

// close detaches the queue. The last queue of a device takes the number of
// the one that closes.
func (q *Queue) close() error {
	if q.fd < 0 {
		return nil
	}
	err := unix.Close(q.fd)
	q.fd = -1 // a number that is used again must not be read as a queue
	return os.NewSyscallError("close", err)
}
