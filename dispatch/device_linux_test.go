package dispatch

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const nobody = 65534

// tapNetns moves the test to a network namespace of its own, without any
// route, and to a mount namespace with a /dev/net of its own, both bound to
// the test's thread. The thread ends with the test, since nobody unlocks it.
// A subtest is a goroutine and needs its own call.
func tapNetns(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(tunPath); err != nil {
		t.Skipf("TAP devices need %s: %v", tunPath, err)
	}
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	if errors.Is(err, unix.EPERM) {
		t.Skip("network and mount namespaces need CAP_SYS_ADMIN")
	}
	if err != nil {
		t.Fatalf("unshare: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
}

// ownDevNet replaces /dev/net for the test's thread: with mode 0, by an empty
// folder, else by one with a tun node of that mode.
func ownDevNet(t *testing.T, mode fs.FileMode) {
	t.Helper()
	if err := unix.Mount("tmpfs", filepath.Dir(tunPath), "tmpfs", 0, "mode=755"); err != nil {
		t.Fatalf("mount over /dev/net: %v", err)
	}
	if mode == 0 {
		return
	}
	if err := unix.Mknod(tunPath, unix.S_IFCHR, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatalf("make %s: %v", tunPath, err)
	}
	if err := os.Chmod(tunPath, mode); err != nil {
		t.Fatal(err)
	}
}

// becomeNobody gives up all rights of the test's thread. The system call is
// raw because the one of package syscall acts on all threads.
func becomeNobody(t *testing.T) {
	t.Helper()
	for _, trap := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
		if _, _, errno := unix.RawSyscall(trap, nobody, nobody, nobody); errno != 0 {
			t.Fatalf("become uid %d: %v", nobody, errno)
		}
	}
}

// asAdmin makes a persistent device the way an administrator would.
func asAdmin(t *testing.T, name string, device water.DeviceType, multiQueue bool, owner uint) {
	t.Helper()
	tap, err := water.New(water.Config{
		DeviceType: device,
		PlatformSpecificParams: water.PlatformSpecificParams{
			Name: name, Persist: true, MultiQueue: multiQueue,
			Permissions: &water.DevicePermissions{Owner: owner, Group: owner},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
}

func openForTest(t testing.TB, cfg DeviceConfig) *Device {
	t.Helper()
	d, err := OpenDevice(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func readLink(t *testing.T, name string) *netlink.Tuntap {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	tap, isTun := link.(*netlink.Tuntap)
	if !isTun {
		t.Fatalf("%q is a %s", name, link.Type())
	}
	return tap
}

// linkNames lists every interface of the namespace except lo.
func linkNames(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, link := range links {
		if name := link.Attrs().Name; name != "lo" {
			names = append(names, name)
		}
	}
	return names
}

func addresses(t *testing.T, name string) map[netip.Prefix]netlink.Addr {
	t.Helper()
	addrs, err := netlink.AddrList(readLink(t, name), netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	byPrefix := make(map[netip.Prefix]netlink.Addr)
	for _, addr := range addrs {
		ip, _ := netip.AddrFromSlice(addr.IP)
		bits, _ := addr.Mask.Size()
		byPrefix[netip.PrefixFrom(ip.Unmap(), bits)] = addr
	}
	return byPrefix
}

func tentative(t *testing.T, name string) bool {
	t.Helper()
	for _, addr := range addresses(t, name) {
		if addr.Flags&unix.IFA_F_TENTATIVE != 0 {
			return true
		}
	}
	return false
}

func TestDeviceIsConfigured(t *testing.T) {
	tapNetns(t)
	before := linkNames(t)
	want := []netip.Prefix{
		netip.MustParsePrefix("192.0.2.1/24"),
		netip.MustParsePrefix("2001:db8::1/64"),
	}
	d, err := OpenDevice(DeviceConfig{
		Name: "ns-test", UID: new(1000), HostAddrs: append(want, want[0]),
		MTU: 9000, TxQueueLen: 2000, Queues: 4, Offload: true,
	})
	if err != nil {
		t.Fatal(err)
	}

	tap := readLink(t, "ns-test")
	if tap.MTU != 9000 || d.MTU() != 9000 {
		t.Errorf("MTU of the link is %d, of the device %d, want 9000", tap.MTU, d.MTU())
	}
	if tap.TxQLen != 2000 {
		t.Errorf("txqueuelen = %d, want 2000", tap.TxQLen)
	}
	if tap.Attrs().RawFlags&unix.IFF_UP == 0 {
		t.Error("the link is down")
	}
	if tap.Queues != 4 || d.Queues() != 4 {
		t.Errorf("the link has %d queues, the device %d, want 4", tap.Queues, d.Queues())
	}
	if flags := netlink.TUNTAP_MULTI_QUEUE_DEFAULTS | netlink.TUNTAP_VNET_HDR; tap.Flags&flags != flags {
		t.Errorf("tun flags = %#x, want %#x in them", tap.Flags, flags)
	}
	if !tap.NonPersist {
		t.Error("the device is persistent, want it to go with its queues")
	}
	if tap.Owner != 1000 {
		t.Errorf("owner = %d, want 1000", tap.Owner)
	}
	if d.Name() != "ns-test" || d.HostMAC().String() != tap.HardwareAddr.String() || !d.Created() {
		t.Errorf("Name, HostMAC, Created = %q, %v, %v; want ns-test, %v, true", d.Name(), d.HostMAC(), d.Created(), tap.HardwareAddr)
	}
	if d.Offloads()&OffloadTSO4 == 0 {
		t.Errorf("offloads = %v, want at least tso4", d.Offloads())
	}

	present := addresses(t, "ns-test")
	for _, prefix := range want {
		addr, ok := present[prefix]
		if !ok {
			t.Errorf("address %v is missing", prefix)
		}
		if addr.Flags&unix.IFA_F_TENTATIVE != 0 {
			t.Errorf("address %v is tentative: it cannot be used yet", prefix)
		}
		if prefix.Addr().Is6() && addr.Flags&unix.IFA_F_NODAD == 0 {
			t.Errorf("address %v has flags %#x, want nodad", prefix, addr.Flags)
		}
	}
	// The kernel finishes the link-local address in the background; with
	// duplicate address detection that takes a second at least.
	for tries := 0; tentative(t, "ns-test"); tries++ {
		if tries == 90 {
			t.Error("an address is tentative after 0.9 s")
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if dad, err := os.ReadFile("/proc/sys/net/ipv6/conf/ns-test/accept_dad"); err == nil && string(dad) != "0\n" {
		t.Errorf("accept_dad = %q, want 0", dad)
	}

	for range 2 {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if left := linkNames(t); !slices.Equal(left, before) {
		t.Errorf("links after Close: %v, want %v as before", left, before)
	}
	if _, err := d.Dropped(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Dropped after Close: %v, want %v", err, os.ErrClosed)
	}
	if fd := d.Queue(3).FD(); fd != -1 {
		t.Errorf("FD after Close = %d, want -1", fd)
	}
}

func TestDeviceDefaults(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{Name: "ns-test"})
	if tap := readLink(t, "ns-test"); tap.TxQLen != defaultTxQueueLen {
		t.Errorf("txqueuelen = %d, want %d", tap.TxQLen, defaultTxQueueLen)
	}
	if d.MTU() != 1500 || d.Queues() != 1 || d.Offloads() != 0 {
		t.Errorf("MTU, Queues, Offloads = %d, %d, %v; want 1500, 1, none", d.MTU(), d.Queues(), d.Offloads())
	}
}

func TestDevicePersists(t *testing.T) {
	tapNetns(t)
	cfg := DeviceConfig{Name: "ns-test", Persist: true, MTU: 4000, TxQueueLen: 9000, Queues: 3, Offload: true}
	d, err := OpenDevice(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	before := readLink(t, "ns-test")
	if before.NonPersist || before.Queues != 0 {
		t.Errorf("after Close: persistent %v, queues %d; want true, 0", !before.NonPersist, before.Queues)
	}

	// Others may want less of it, and a longer queue is not cut to the default.
	d, err = OpenDevice(DeviceConfig{Name: "ns-test", Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	after := readLink(t, "ns-test")
	if d.Created() || after.Index != before.Index {
		t.Errorf("created %v, index %d; want the one with index %d", d.Created(), after.Index, before.Index)
	}
	if d.MTU() != 4000 || after.TxQLen != 9000 {
		t.Errorf("MTU, txqueuelen = %d, %d; want 4000, 9000", d.MTU(), after.TxQLen)
	}
	if d.Offloads() != 0 {
		t.Errorf("offloads = %v, want none: an earlier owner's must not stay", d.Offloads())
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if left := linkNames(t); !slices.Contains(left, "ns-test") {
		t.Errorf("left after Close: %v, want the device that was there before", left)
	}
}

// TestDeviceWithoutRights opens devices as a user without any capability.
func TestDeviceWithoutRights(t *testing.T) {
	addr := netip.MustParsePrefix("192.0.2.1/24")
	tests := []struct {
		name    string
		prepare func(t *testing.T) // as root
		cfg     DeviceConfig
		err     string // part of the error text; empty means no error
	}{
		{
			name:    "made for us",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, nobody); setUp(t, "ns-test", addr) },
			cfg:     DeviceConfig{Name: "ns-test", Queues: 2, MTU: 1500, HostAddrs: []netip.Prefix{addr}, Offload: true},
		},
		{
			name:    "made for us with other MTU",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, nobody); setUp(t, "ns-test", addr) },
			cfg:     DeviceConfig{Name: "ns-test", MTU: 9000},
			err:     "an administrator has to run: ip link set dev ns-test mtu 9000",
		},
		{
			name:    "made for us with shorter queue",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, nobody); setUp(t, "ns-test", addr) },
			cfg:     DeviceConfig{Name: "ns-test", TxQueueLen: 5000},
			err:     "an administrator has to run: ip link set dev ns-test txqueuelen 5000",
		},
		{
			name:    "made for us without address",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, nobody); setUp(t, "ns-test", addr) },
			cfg:     DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64")}},
			err:     "an administrator has to run: ip addr add 2001:db8::1/64 dev ns-test nodad",
		},
		{
			name:    "made for us but down",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, nobody) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "an administrator has to run: ip link set dev ns-test up",
		},
		{
			name:    "made for somebody else",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, true, 1000) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "queue 0: TUNSETIFF: operation not permitted; the device belongs to another user or group than uid 65534",
		},
		{
			name: "not there",
			cfg:  DeviceConfig{Name: "ns-test"},
			err:  "CAP_NET_ADMIN, or a device made by an administrator: ip tuntap add dev ns-test mode tap multi_queue user 65534",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tapNetns(t)
			ownDevNet(t, 0o666)
			if test.prepare != nil {
				test.prepare(t)
			}
			before := openFiles(t)
			becomeNobody(t)

			d, err := OpenDevice(test.cfg)
			if test.err == "" {
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = d.Close() }()
				if d.Created() || d.Queues() != test.cfg.Queues || d.Offloads() == 0 {
					t.Errorf("Created, Queues, Offloads = %v, %d, %v", d.Created(), d.Queues(), d.Offloads())
				}
				return
			}
			if err == nil {
				_ = d.Close()
				t.Fatalf("no error, want %q", test.err)
			}
			if !strings.Contains(err.Error(), test.err) || !errors.Is(err, unix.EPERM) {
				t.Errorf("error %q (EPERM %v), want %q", err, errors.Is(err, unix.EPERM), test.err)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files open after the error, %d before", after, before)
			}
		})
	}
}

// setUp does what OpenDevice would need rights for.
func setUp(t *testing.T, name string, addr netip.Prefix) {
	t.Helper()
	tap := readLink(t, name)
	if err := netlink.LinkSetUp(tap); err != nil {
		t.Fatal(err)
	}
	parsed, err := netlink.ParseAddr(addr.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(tap, parsed); err != nil {
		t.Fatal(err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	// Of the whole process: descriptors belong to all its threads.
	files, err := os.ReadDir("/proc/thread-self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestDeviceErrors(t *testing.T) {
	tests := []struct {
		name    string
		prepare func(t *testing.T)
		cfg     DeviceConfig
		err     string // part of the error text
		is      error  // nil: no particular errno
	}{
		{
			name: "no tun device",
			prepare: func(t *testing.T) {
				ownDevNet(t, 0)
			},
			cfg: DeviceConfig{Name: "ns-test"},
			err: `open tap "ns-test": /dev/net/tun: no such file or directory; load the tun module`,
			is:  unix.ENOENT,
		},
		{
			name:    "no access to the tun device",
			prepare: func(t *testing.T) { ownDevNet(t, 0o600); becomeNobody(t) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "/dev/net/tun: permission denied; uid 65534 needs read and write access",
			is:      unix.EACCES,
		},
		{
			name: "not a TAP device",
			prepare: func(t *testing.T) {
				veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ns-test"}, PeerName: "ns-peer"}
				if err := netlink.LinkAdd(veth); err != nil {
					t.Fatal(err)
				}
			},
			cfg: DeviceConfig{Name: "ns-test"},
			err: "exists and is of type veth",
		},
		{
			name:    "TUN device",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TUN, true, 0) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "is a TUN device",
		},
		{
			name:    "single queue",
			prepare: func(t *testing.T) { asAdmin(t, "ns-test", water.TAP, false, 0) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "ip tuntap add dev ns-test mode tap multi_queue",
		},
		{
			name:    "busy",
			prepare: func(t *testing.T) { openForTest(t, DeviceConfig{Name: "ns-test", Queues: 2}) },
			cfg:     DeviceConfig{Name: "ns-test"},
			err:     "another process holds 2 of the device's queues",
			is:      unix.EBUSY,
		},
		{
			name: "IPv6 switched off",
			prepare: func(t *testing.T) {
				if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil {
					t.Skipf("the kernel has no IPv6 to switch off: %v", err)
				}
			},
			cfg: DeviceConfig{Name: "ns-test", Persist: true, HostAddrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64")}},
			err: "IPv6 is switched off on the device",
			is:  unix.EACCES,
		},
		{name: "no name", cfg: DeviceConfig{}, err: "bad Name: 0 bytes; want 1..15"},
		{name: "long name", cfg: DeviceConfig{Name: "1234567890123456"}, err: "bad Name: 16 bytes; want 1..15"},
		{name: "name template", cfg: DeviceConfig{Name: "tap%d"}, err: "bad Name: want an interface name"},
		{name: "name with slash", cfg: DeviceConfig{Name: "../x"}, err: "bad Name: want an interface name"},
		{name: "name of a sysctl group", cfg: DeviceConfig{Name: "all"}, err: "bad Name: want an interface name"},
		{name: "low MTU", cfg: DeviceConfig{Name: "ns-test", MTU: 575}, err: "bad MTU 575 bytes; want 576..65521"},
		{name: "high MTU", cfg: DeviceConfig{Name: "ns-test", MTU: 65522}, err: "bad MTU 65522 bytes; want 576..65521"},
		{
			name: "low MTU for IPv6",
			cfg:  DeviceConfig{Name: "ns-test", MTU: 1279, HostAddrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64")}},
			err:  "bad MTU 1279 bytes; want 1280..65521",
		},
		{name: "negative queues", cfg: DeviceConfig{Name: "ns-test", Queues: -1}, err: "bad Queues -1; want 1..128"},
		{name: "many queues", cfg: DeviceConfig{Name: "ns-test", Queues: 129}, err: "bad Queues 129; want 1..128"},
		{name: "txqueuelen", cfg: DeviceConfig{Name: "ns-test", TxQueueLen: 65537}, err: "bad TxQueueLen 65537 frames; want 1..65536"},
		{name: "negative CPU", cfg: DeviceConfig{Name: "ns-test", HostCPUs: []int{-1}}, err: "bad HostCPUs entry -1; want CPUs, 0..8191"},
		{name: "many CPUs", cfg: DeviceConfig{Name: "ns-test", HostCPUs: []int{0, maxCPU + 1}}, err: "bad HostCPUs entry 8192; want CPUs, 0..8191"},
		{name: "no such CPU", cfg: DeviceConfig{Name: "ns-test", Queues: 2, HostCPUs: []int{0, maxCPU}}, err: "want CPUs that are online"},
		{name: "uid", cfg: DeviceConfig{Name: "ns-test", UID: new(-1)}, err: "bad UID -1; want 0..4294967294"},
		{
			name: "zero prefix",
			cfg:  DeviceConfig{Name: "ns-test", HostAddrs: make([]netip.Prefix, 1)},
			err:  "bad HostAddrs entry invalid Prefix",
		},
		{
			name: "multicast address",
			cfg:  DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{netip.MustParsePrefix("224.0.0.1/4")}},
			err:  "bad HostAddrs entry 224.0.0.1/4; want a unicast address",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tapNetns(t)
			if test.prepare != nil {
				test.prepare(t)
			}
			before, files := linkNames(t), openFiles(t)

			d, err := OpenDevice(test.cfg)
			if err == nil {
				_ = d.Close()
				t.Fatalf("no error, want %q", test.err)
			}
			if !strings.Contains(err.Error(), test.err) {
				t.Errorf("error %q, want %q", err, test.err)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %q does not wrap %v", err, test.is)
			}
			if after := linkNames(t); !slices.Equal(after, before) {
				t.Errorf("links after the error: %v, before: %v", after, before)
			}
			if after := openFiles(t); after != files {
				t.Errorf("%d files open after the error, %d before", after, files)
			}
		})
	}
}

// TestDeviceUndo lets the last step fail on a device that was there before.
func TestDeviceUndo(t *testing.T) {
	tapNetns(t)
	asAdmin(t, "ns-test", water.TAP, true, 0)
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/ns-test/disable_ipv6", []byte("1"), 0); err != nil {
		t.Skipf("the kernel has no IPv6 to switch off: %v", err)
	}
	before := readLink(t, "ns-test")

	d, err := OpenDevice(DeviceConfig{
		Name: "ns-test", MTU: 9000, TxQueueLen: 77,
		HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
	})
	if err == nil {
		_ = d.Close()
		t.Fatal("no error, although IPv6 is off")
	}
	after := readLink(t, "ns-test")
	if after.MTU != before.MTU || after.TxQLen != before.TxQLen {
		t.Errorf("MTU, txqueuelen = %d, %d; want %d, %d as before", after.MTU, after.TxQLen, before.MTU, before.TxQLen)
	}
	if after.Attrs().RawFlags&unix.IFF_UP != 0 {
		t.Error("the link is up, before it was down")
	}
	if left := addresses(t, "ns-test"); len(left) != 0 {
		t.Errorf("addresses left: %v", left)
	}
}

func TestDeviceSteering(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{
		Name: "ns-test", Queues: 4, HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")},
	})
	const chosen = 2
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SocketFilter,
		License:      "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, chosen), asm.Return()},
	})
	if err != nil {
		t.Skipf("the kernel refuses eBPF programs: %v", err)
	}
	if err := d.AttachSteering(program.FD()); err != nil {
		t.Fatal(err)
	}
	if err := program.Close(); err != nil {
		t.Fatal(err)
	}

	// Flows that the kernel itself would spread.
	for range 8 {
		sendUDP(t, d, 0, []byte("to one queue"))
	}
	for range 8 {
		if queue, _, _ := nextUDP(t, d); queue != chosen {
			t.Fatalf("frame on queue %d, want %d", queue, chosen)
		}
	}

	if err := d.DetachSteering(); err != nil {
		t.Fatal(err)
	}
	queues := make(map[int]bool)
	for range 32 {
		sendUDP(t, d, 0, []byte("to any queue"))
		queue, _, _ := nextUDP(t, d)
		queues[queue] = true
	}
	if len(queues) < 2 {
		t.Errorf("32 flows without steering all went to %v, want several queues", queues)
	}

	err = d.AttachSteering(d.Queue(0).FD())
	if err == nil || !strings.Contains(err.Error(), "want an eBPF program of type SOCKET_FILTER") {
		t.Errorf("AttachSteering with a TAP descriptor: %v", err)
	}
}

// TestMarker: a mark comes out of the queue it names, behind what was there.
func TestMarker(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{
		Name: "ns-test", Queues: 3, HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")},
	})
	program := newTestProgram(t, NewToeplitz(VerificationKey))
	if err := d.AttachSteering(program.FD()); err != nil {
		t.Fatal(err)
	}
	d.Discard()
	m, err := d.OpenMarker()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	other, err := d.OpenMarker()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	var queues [Buckets]uint32
	for b := range queues {
		queues[b] = 2
	}
	if err := program.SetQueues(queues); err != nil {
		t.Fatal(err)
	}

	const number = 1 << 40
	sendUDP(t, d, 0, []byte("before"))
	if err := errors.Join(m.Send(2, number), other.Send(2, 5), m.Send(1, 6)); err != nil {
		t.Fatal(err)
	}
	sendUDP(t, d, 0, []byte("behind"))
	order := func(queue int) (seen []string) {
		b := make([]byte, VnetHeaderLen+MaxFrameLen)
		for {
			n, errno := d.Queue(queue).Read(b)
			if errno != 0 {
				return seen
			}
			frame := b[VnetHeaderLen:n]
			if number, ok := m.Number(frame); ok {
				seen = append(seen, fmt.Sprint("mark ", number))
			} else if at := bytes.Index(frame, []byte("be")); at >= 0 {
				seen = append(seen, string(frame[at:]))
			}
		}
	}
	if got, want := order(2), []string{"before", fmt.Sprint("mark ", number), "behind"}; !slices.Equal(got, want) {
		t.Errorf("queue 2 has %q, want %q and nothing of the other marker", got, want)
	}
	if got, want := order(1), []string{"mark 6"}; !slices.Equal(got, want) {
		t.Errorf("queue 1 has %q, want %q", got, want)
	}
	for _, frame := range [][]byte{nil, make([]byte, markerLen), ethernet(etherTypeMarker, make([]byte, markerLen))} {
		if _, ok := m.Number(frame); ok {
			t.Errorf("a mark was seen in %x", frame)
		}
	}
}

func TestDeviceDropped(t *testing.T) {
	tapNetns(t)
	const queueLen, sent = 8, 50
	d := openForTest(t, DeviceConfig{
		Name: "ns-test", TxQueueLen: queueLen, HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")},
	})
	before, err := d.Dropped()
	if err != nil {
		t.Fatal(err)
	}
	for range sent {
		sendUDP(t, d, 0, []byte("too many"))
	}
	after, err := d.Dropped()
	if err != nil {
		t.Fatal(err)
	}
	if dropped := after - before; dropped < sent-queueLen {
		t.Errorf("dropped %d of %d frames, want at least %d with a queue of %d", dropped, sent, sent-queueLen, queueLen)
	}
}
