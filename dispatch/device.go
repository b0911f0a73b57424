package dispatch

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Limits of DeviceConfig.
const (
	maxDeviceName = 15   // bytes (IFNAMSIZ of linux/if.h, less the final 0)
	minMTU        = 576  // bytes; what every IPv4 host takes (RFC 791, section 3.1)
	minMTUIPv6    = 1280 // bytes; below it the kernel takes IPv6 off the link (RFC 8200, section 5)
	maxMTU        = 65535 - ethernetLen
	maxTapQueues  = 128
	maxTxQueueLen = 1 << 16
	maxCPU        = 1<<13 - 1 // as many as Linux knows (NR_CPUS_RANGE_END of arch/x86/Kconfig)
	maxID         = 1<<32 - 2 // of users and groups; the next one means none

	// defaultTxQueueLen holds the burst that arrives while a shard is away for a
	// millisecond: 4 million 64-byte frames per second. The kernel's own 1000
	// was seen to overflow.
	defaultTxQueueLen = 4096
)

// DeviceConfig describes the TAP device to open. A zero field means its
// documented default; only Name is required.
type DeviceConfig struct {
	// Name of the network interface: 1 to 15 bytes.
	Name string
	// Persist keeps a device that OpenDevice creates when it is closed. A
	// device that was there before stays in any case.
	Persist bool
	// UID and GID may open a device that OpenDevice creates, besides
	// CAP_NET_ADMIN; with both set, both have to match. Default: nobody is
	// asked who they are, as long as they may open /dev/net/tun.
	UID, GID *int
	// HostAddrs are the addresses of the host's side, each with the length of
	// its subnet; missing ones are added. Default: leave as is.
	HostAddrs []netip.Prefix
	// HostCPUs are where the kernel goes on with the frames that we send, up to
	// 8191 (receive packet steering). It takes CAP_NET_ADMIN, and Linux 5.2 if
	// /sys is of another network namespace. Default: leave as is, which is the
	// sending thread's CPU on a new device.
	HostCPUs []int
	// MTU in bytes: 576 to 65521, with IPv6 addresses from 1280. Default:
	// leave as is, which is 1500 on a new device.
	MTU int
	// TxQueueLen is how many frames (of up to 64 KiB) the kernel keeps per
	// queue for us before it drops: 1 to 65536. Default: at least 4096; an
	// existing device keeps a shorter one if we may not raise it.
	TxQueueLen int
	// Queues to attach: 1 to 128. Default 1.
	Queues int
	// Offload lets the kernel leave checksums and segmentation to us, so that
	// frames arrive up to MaxFrameLen long. See Offloads for what it granted.
	Offload bool
}

// validate fills in the defaults that do not depend on the device.
func (cfg *DeviceConfig) validate() error {
	switch {
	case cfg.Name == "" || len(cfg.Name) > maxDeviceName:
		return fmt.Errorf("bad Name: %d bytes; want 1..%d", len(cfg.Name), maxDeviceName)
	case strings.ContainsAny(cfg.Name, "/:% \t\n\v\f\r") || slices.Contains([]string{".", "..", "all", "default"}, cfg.Name):
		// Beyond the kernel's rules (dev_valid_name): % makes it choose a name,
		// all and default are not devices to sysctl.
		return errors.New(`bad Name: want an interface name without blanks, '/', ':' and '%', other than "all" and "default"`)
	}
	for _, id := range []struct {
		field string
		value *int
	}{{"UID", cfg.UID}, {"GID", cfg.GID}} {
		if id.value != nil && (*id.value < 0 || int64(*id.value) > maxID) {
			return fmt.Errorf("bad %s %d; want 0..%d, or nil for none", id.field, *id.value, int64(maxID))
		}
	}

	lowestMTU := minMTU
	for _, prefix := range cfg.HostAddrs {
		addr := prefix.Addr()
		if !prefix.IsValid() || addr.Is4In6() || addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "" {
			return fmt.Errorf("bad HostAddrs entry %v; want a unicast address and its prefix length, such as 192.0.2.1/24 or 2001:db8::1/64", prefix)
		}
		if addr.Is6() {
			lowestMTU = minMTUIPv6
		}
	}
	for _, cpu := range cfg.HostCPUs {
		if cpu < 0 || cpu > maxCPU {
			return fmt.Errorf("bad HostCPUs entry %d; want CPUs, 0..%d", cpu, maxCPU)
		}
	}
	if cfg.MTU != 0 && (cfg.MTU < lowestMTU || cfg.MTU > maxMTU) {
		return fmt.Errorf("bad MTU %d bytes; want %d..%d, or 0 to leave it", cfg.MTU, lowestMTU, maxMTU)
	}
	if cfg.TxQueueLen < 0 || cfg.TxQueueLen > maxTxQueueLen {
		return fmt.Errorf("bad TxQueueLen %d frames; want 1..%d, or 0 for at least %d", cfg.TxQueueLen, maxTxQueueLen, defaultTxQueueLen)
	}
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.Queues < 1 || cfg.Queues > maxTapQueues {
		return fmt.Errorf("bad Queues %d; want 1..%d, or 0 for 1", cfg.Queues, maxTapQueues)
	}
	return nil
}
