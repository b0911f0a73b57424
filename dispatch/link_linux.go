package dispatch

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link reads the device's present state.
func (d *Device) link() (*netlink.Tuntap, error) {
	link, err := d.netlink.LinkByName(d.name)
	if err != nil {
		return nil, fmt.Errorf("look up link: %w", err)
	}
	tap, isTun := link.(*netlink.Tuntap)
	if !isTun {
		return nil, fmt.Errorf("the interface has become one of type %s; want a TAP device", link.Type())
	}
	return tap, nil
}

// change is one difference between the link as it is and as it should be.
type change struct {
	command  string // what an administrator would type
	optional bool   // no error if we are not permitted
	do, undo func() error
}

// configure brings the link to the state cfg wants, or leaves it as it was.
func (d *Device) configure(cfg *DeviceConfig) (err error) {
	tap, err := d.link()
	if err != nil {
		return err
	}
	changes, err := d.differences(cfg, tap)
	if err != nil {
		return err
	}
	if len(cfg.HostCPUs) > 0 {
		sys, err := openSysfs(tap)
		if err != nil {
			return fmt.Errorf("HostCPUs: %w", err)
		}
		defer func() { _ = sys.Close() }()
		steering, err := d.hostCPUChanges(sys, cfg.HostCPUs)
		if err != nil {
			return fmt.Errorf("HostCPUs: %w", err)
		}
		changes = append(steering, changes...)
	}

	if d.created {
		// Otherwise the link-local address is unusable for the second that
		// duplicate address detection takes (RFC 4862, section 5.4). On a read-only
		// /proc/sys it stays so; the addresses in cfg do not depend on it.
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+d.name+"/accept_dad", []byte("0"), 0)
	}
	for i, c := range changes {
		if err := c.do(); err != nil {
			if c.optional && errors.Is(err, unix.EPERM) {
				continue
			}
			for _, done := range slices.Backward(changes[:i]) {
				_ = done.undo() // the error that matters is the first one
			}
			return c.explain(err)
		}
	}

	if tap, err = d.link(); err != nil {
		return err
	}
	d.mtu = tap.MTU
	d.txQueueLen = tap.TxQLen
	d.hostMAC = tap.HardwareAddr
	if d.created && cfg.Persist {
		// Last, so that every error before lets the device go.
		return os.NewSyscallError("TUNSETPERSIST", unix.IoctlSetInt(d.queues[0].fd, unix.TUNSETPERSIST, 1))
	}
	return nil
}

// differences lists what has to change, in the order to do it: addresses last,
// since an IPv6 address wants its link up with its final MTU.
func (d *Device) differences(cfg *DeviceConfig, tap *netlink.Tuntap) ([]change, error) {
	var changes []change

	if cfg.MTU != 0 && tap.MTU != cfg.MTU {
		changes = append(changes, change{
			command: fmt.Sprintf("ip link set dev %s mtu %d", d.name, cfg.MTU),
			do:      func() error { return d.netlink.LinkSetMTU(tap, cfg.MTU) },
			undo:    func() error { return d.netlink.LinkSetMTU(tap, tap.MTU) },
		})
	}

	queueLen, byDefault := cfg.TxQueueLen, cfg.TxQueueLen == 0
	if byDefault {
		queueLen = max(tap.TxQLen, defaultTxQueueLen)
	}
	if tap.TxQLen != queueLen {
		changes = append(changes, change{
			command:  fmt.Sprintf("ip link set dev %s txqueuelen %d", d.name, queueLen),
			optional: byDefault,
			do:       func() error { return d.netlink.LinkSetTxQLen(tap, queueLen) },
			undo:     func() error { return d.netlink.LinkSetTxQLen(tap, tap.TxQLen) },
		})
	}

	if tap.Attrs().Flags&net.FlagUp == 0 {
		changes = append(changes, change{
			command: fmt.Sprintf("ip link set dev %s up", d.name),
			do:      func() error { return d.netlink.LinkSetUp(tap) },
			undo:    func() error { return d.netlink.LinkSetDown(tap) },
		})
	}

	present, err := d.hostAddrs(tap)
	if err != nil {
		return nil, err
	}
	for _, prefix := range cfg.HostAddrs {
		if slices.Contains(present, prefix) {
			continue
		}
		present = append(present, prefix) // named twice, added once
		command := fmt.Sprintf("ip addr add %v dev %s", prefix, d.name)
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP:   prefix.Addr().AsSlice(),
			Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}}
		if prefix.Addr().Is6() {
			// Usable at once: nobody else is on this link to have it.
			addr.Flags = unix.IFA_F_NODAD
			command += " nodad"
		}
		changes = append(changes, change{
			command: command,
			do:      func() error { return d.netlink.AddrAdd(tap, addr) },
			undo:    func() error { return d.netlink.AddrDel(tap, addr) },
		})
	}
	return changes, nil
}

// hostAddrs returns the addresses the link has.
func (d *Device) hostAddrs(tap *netlink.Tuntap) ([]netip.Prefix, error) {
	addrs, err := d.netlink.AddrList(tap, netlink.FAMILY_ALL)
	// Interrupted: somebody changed addresses meanwhile; the list may lack some.
	for tries := 0; errors.Is(err, netlink.ErrDumpInterrupted) && tries < 10; tries++ {
		addrs, err = d.netlink.AddrList(tap, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}

	prefixes := make([]netip.Prefix, 0, len(addrs))
	for _, addr := range addrs {
		ip, ok := netip.AddrFromSlice(addr.IP)
		if !ok {
			continue
		}
		bits, _ := addr.Mask.Size()
		prefixes = append(prefixes, netip.PrefixFrom(ip.Unmap(), bits))
	}
	return prefixes, nil
}

func (c *change) explain(err error) error {
	switch {
	case errors.Is(err, unix.EACCES) && strings.HasSuffix(c.command, "nodad"):
		// inet6_addr_add of net/ipv6/addrconf.c.
		return fmt.Errorf("%s: %w; IPv6 is switched off on the device (sysctl net.ipv6.conf.*.disable_ipv6)", c.command, err)
	case errors.Is(err, os.ErrPermission): // EPERM of netlink, EACCES of a file
		return fmt.Errorf("%w; an administrator has to run: %s", err, c.command)
	default:
		return fmt.Errorf("%s: %w", c.command, err)
	}
}
