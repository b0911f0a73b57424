package dispatch

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is a TAP device with all its queues open. Its methods may be called
// from any goroutine; its queues belong to their shards' threads.
type Device struct {
	// Immutable after OpenDevice.
	name       string
	index      int // of the network interface
	mtu        int
	txQueueLen int
	hostMAC    net.HardwareAddr
	offloads   Offloads
	created    bool
	queues     []*Queue

	mu      sync.Mutex      // guards what follows, and the queues' descriptors against Close
	netlink *netlink.Handle // of the device's network namespace; nil once closed
}

// OpenDevice opens the TAP device cfg.Name in the network namespace of the
// calling thread, creating it if there is no such interface, and brings it up.
//
// Creating and configuring takes CAP_NET_ADMIN. Without it, an administrator
// can make the device once for a user, and OpenDevice attaches to it:
//
//	ip tuntap add dev NAME mode tap multi_queue user UID
//
// What is already as cfg wants it is not touched, so such a device may be
// configured beforehand, too; where something is missing the error names the
// command to run. A device whose queues another process holds is refused
// (EBUSY): queue numbers would not be ours to steer by. After an error
// everything is as it was before. Errors wrap the kernel's errno.
func OpenDevice(cfg DeviceConfig) (*Device, error) {
	d, err := openDevice(cfg)
	if err != nil {
		return nil, fmt.Errorf("open tap %q: %w", cfg.Name, err)
	}
	return d, nil
}

// Name returns the name of the network interface.
func (d *Device) Name() string { return d.name }

// MTU returns the largest packet of the link in bytes, as it was when the
// device was opened. Frames with GSO are longer.
func (d *Device) MTU() int { return d.mtu }

// HostMAC returns the Ethernet address of the kernel's side. The caller must
// not change it.
func (d *Device) HostMAC() net.HardwareAddr { return d.hostMAC }

// TxQueueLen returns how many frames the kernel holds per queue for us at most,
// as it was when the device was opened.
func (d *Device) TxQueueLen() int { return d.txQueueLen }

// Offloads returns what the kernel may leave to us.
func (d *Device) Offloads() Offloads { return d.offloads }

// Created reports whether OpenDevice made the device, rather than attach to
// one that was there.
func (d *Device) Created() bool { return d.created }

// Queues returns the number of queues.
func (d *Device) Queues() int { return len(d.queues) }

// Queue returns queue i, 0 to Queues()-1. The number is the one that a
// steering program returns to choose it.
func (d *Device) Queue(i int) *Queue { return d.queues[i] }

// AttachSteering makes the kernel choose the queue of each frame with an eBPF
// program of type SOCKET_FILTER: its result, modulo the number of queues. It
// replaces an earlier program. The kernel keeps its own reference, so the
// caller may close progFD.
func (d *Device) AttachSteering(progFD int) error {
	if err := d.setSteering(progFD); err != nil {
		return fmt.Errorf("tap %q: attach steering program fd %d: %w; want an eBPF program of type SOCKET_FILTER", d.name, progFD, err)
	}
	return nil
}

// Discard throws away the frames that wait in the queues: what the kernel put
// there before it steered is on the wrong queue as often as not. To be called
// before the shards read.
func (d *Device) Discard() {
	var b [VnetHeaderLen + ethernetLen]byte // the rest of a frame goes with it
	for _, q := range d.queues {
		for range maxTxQueueLen {
			if _, errno := q.Read(b[:]); errno != 0 {
				break
			}
		}
	}
}

// DetachSteering goes back to the kernel's own choice of queues: the one that
// last sent a frame of the same flow, else a hash.
func (d *Device) DetachSteering() error {
	if err := d.setSteering(-1); err != nil {
		return fmt.Errorf("tap %q: detach steering program: %w", d.name, err)
	}
	return nil
}

// Dropped returns how many frames the kernel dropped on their way to us since
// the device exists (tx_dropped of the link), nearly always because a queue
// was full. It makes a system call and allocates: not for every turn.
func (d *Device) Dropped() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()

	if d.netlink == nil {
		return 0, fmt.Errorf("tap %q: dropped frames: %w", d.name, os.ErrClosed)
	}
	link, err := d.netlink.LinkByIndex(d.index)
	if err != nil {
		return 0, fmt.Errorf("tap %q: dropped frames: %w", d.name, err)
	}
	return link.Attrs().Statistics.TxDropped, nil
}

// Close closes all queues; a device that OpenDevice created without Persist is
// gone when it returns. The shards' threads must have stopped using their
// queues. Calling it again does nothing.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()

	if d.netlink == nil {
		return nil
	}
	d.netlink.Close()
	d.netlink = nil

	var errs []error
	// From the last one down, so that no queue is renumbered on the way.
	for _, q := range slices.Backward(d.queues) {
		errs = append(errs, q.close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close tap %q: %w", d.name, err)
	}
	return nil
}

func (d *Device) setSteering(progFD int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.netlink == nil {
		return os.ErrClosed
	}
	return os.NewSyscallError("TUNSETSTEERINGEBPF",
		unix.IoctlSetPointerInt(d.queues[0].fd, unix.TUNSETSTEERINGEBPF, progFD))
}

// openDevice is OpenDevice without the prefix of its errors.
func openDevice(cfg DeviceConfig) (_ *Device, err error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	d := &Device{name: cfg.Name}
	if d.netlink, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	defer func() {
		if err != nil {
			_ = d.Close() // the error that matters is the first one
		}
	}()

	// Opened before anything is created: this is where most set-ups fail.
	for range cfg.Queues {
		q, err := openQueue()
		if err != nil {
			return nil, err
		}
		d.queues = append(d.queues, q)
	}

	link, err := d.netlink.LinkByName(cfg.Name)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		if err := createPersistent(cfg.Name); err != nil {
			return nil, err
		}
		d.created = true
	case err != nil:
		return nil, fmt.Errorf("look up link: %w", err)
	default:
		if err := checkExisting(link); err != nil {
			return nil, err
		}
	}
	if err := d.attach(&cfg); err != nil {
		return nil, err
	}
	if err := d.configure(&cfg); err != nil {
		return nil, err
	}
	return d, nil
}

// createPersistent creates the device, without a queue. It has to outlive the
// descriptor that makes it, because the first queue that attaches decides the
// feature bits, and water cannot ask for the vnet header.
func createPersistent(name string) error {
	const hint = "it needs CAP_NET_ADMIN, or a device made by an administrator: ip tuntap add dev %s mode tap multi_queue user %d"

	// water keeps its descriptor open when the kernel refuses, so ask only
	// when there is a chance.
	if !hasNetAdmin() {
		return fmt.Errorf("create: %w; "+hint, unix.EPERM, name, os.Geteuid())
	}
	device, err := water.New(water.Config{
		DeviceType: water.TAP,
		PlatformSpecificParams: water.PlatformSpecificParams{
			Name:       name,
			Persist:    true,
			MultiQueue: true,
			// The owner is set later: water can only set both user and group.
		},
	})
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("create: %w; "+hint, err, name, os.Geteuid())
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := device.Close(); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	return nil
}

// hasNetAdmin reports whether the calling thread has CAP_NET_ADMIN in its
// user namespace (capabilities(7)).
func hasNetAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData // capabilities 0..31, then 32..63
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return false
	}
	return sets[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}

// checkExisting says whether queues can be attached to link, before the
// kernel says no more than EINVAL.
func checkExisting(link netlink.Link) error {
	tap, isTun := link.(*netlink.Tuntap)
	if !isTun {
		return fmt.Errorf("the interface exists and is of type %s; want a TAP device, or a free name", link.Type())
	}
	if tap.Mode != unix.IFF_TAP {
		return errors.New("the interface exists and is a TUN device (layer 3); want a TAP device, or a free name")
	}
	if tap.Flags&netlink.TUNTAP_MULTI_QUEUE == 0 {
		return fmt.Errorf("the device was made for a single queue; make it again: ip tuntap add dev %s mode tap multi_queue", tap.Name)
	}
	if held := tap.Queues + tap.DisabledQueues; held > 0 {
		return fmt.Errorf("another process holds %d of the device's queues: %w; want all of them free", held, unix.EBUSY)
	}
	return nil
}

// attach attaches all queues, from number 0, and sets what is the device's
// but takes a queue to set: persistence, owner, offloads.
func (d *Device) attach(cfg *DeviceConfig) error {
	for i, q := range d.queues {
		if err := q.attach(d.name); err != nil {
			if d.created && i == 0 {
				d.deleteUnused()
			}
			return explainAttach(i, err)
		}
		if d.created && i == 0 {
			// From here on it goes with its last queue, whatever happens.
			if err := unix.IoctlSetInt(q.fd, unix.TUNSETPERSIST, 0); err != nil {
				return os.NewSyscallError("TUNSETPERSIST", err)
			}
		}
	}

	// Somebody may have attached since the first look.
	tap, err := d.link()
	if err != nil {
		return err
	}
	if tap.Queues != len(d.queues) {
		return fmt.Errorf("the device has %d queues after attaching %d, so another process holds some: %w",
			tap.Queues, len(d.queues), unix.EBUSY)
	}
	d.index = tap.Index

	first := d.queues[0]
	if d.created {
		for _, id := range []struct {
			field   string
			value   *int
			request uint
		}{{"UID", cfg.UID, unix.TUNSETOWNER}, {"GID", cfg.GID, unix.TUNSETGROUP}} {
			if id.value == nil {
				continue
			}
			if err := unix.IoctlSetInt(first.fd, id.request, *id.value); err != nil {
				return fmt.Errorf("%s %d: %w; want one of this user namespace", id.field, *id.value, err)
			}
		}
	}
	d.offloads, err = first.setOffloads(cfg.Offload)
	return err
}

// explainAttach adds to the kernel's answer what it usually means
// (tun_set_iff and tun_attach of drivers/net/tun.c).
func explainAttach(queue int, err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EPERM):
		hint = fmt.Sprintf("; the device belongs to another user or group than uid %d, and CAP_NET_ADMIN is missing", os.Geteuid())
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.EBUSY):
		hint = "; all queues are in use"
	case errors.Is(err, unix.EINVAL):
		hint = "; want a TAP device made with multi_queue"
	}
	return fmt.Errorf("queue %d: %w%s", queue, err, hint)
}

// deleteUnused removes a created device that never got a queue.
func (d *Device) deleteUnused() {
	tap, err := d.link()
	if err == nil && tap.Queues == 0 {
		_ = d.netlink.LinkDel(tap) // nothing is left to try
	}
}
