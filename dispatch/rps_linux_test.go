package dispatch

import (
	"math/big"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

func TestFormatMask(t *testing.T) {
	for cpu, want := range map[uint]string{
		0: "1", 31: "80000000", 32: "1,00000000", 70: "40,00000000,00000000",
	} {
		if got := formatMask(new(big.Int).Lsh(big.NewInt(1), cpu)); got != want {
			t.Errorf("CPU %d is %s, want %s", cpu, got, want)
		}
	}
}

func TestHostCPUs(t *testing.T) {
	tapNetns(t)
	asAdmin(t, "ns-test", water.TAP, true, 0)
	for _, test := range []struct {
		cpus []int
		want int64
	}{{nil, 0}, {[]int{0}, 1}, {[]int{0, 0}, 1}} {
		d := openForTest(t, DeviceConfig{Name: "ns-test", Queues: 2, HostCPUs: test.cpus})
		for i := range d.Queues() {
			if got := hostMask(t, i); got != test.want {
				t.Errorf("HostCPUs %v: the mask of queue %d is %#x, want %#x", test.cpus, i, got, test.want)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// hostMask returns what the kernel has for a queue of ns-test.
func hostMask(t *testing.T, queue int) int64 {
	t.Helper()
	sys, err := openSysfs(readLink(t, "ns-test"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sys.Close() }()
	mask, err := readMask(sys, maskFile("ns-test", queue))
	if err != nil {
		t.Fatal(err)
	}
	return mask.Int64()
}

// TestHostCPUsUndo lets a later step fail.
func TestHostCPUsUndo(t *testing.T) {
	tapNetns(t)
	asAdmin(t, "ns-test", water.TAP, true, 0)
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/ns-test/disable_ipv6", []byte("1"), 0); err != nil {
		t.Skipf("the kernel has no IPv6 to switch off: %v", err)
	}
	d, err := OpenDevice(DeviceConfig{
		Name: "ns-test", HostCPUs: []int{0}, HostAddrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64")},
	})
	if err == nil {
		_ = d.Close()
		t.Fatal("no error, although IPv6 is off")
	}
	if got := hostMask(t, 0); got != 0 {
		t.Errorf("the mask is %#x, want 0 as before", got)
	}
}

// TestHostCPUsWithoutRights sets what only an administrator may.
func TestHostCPUsWithoutRights(t *testing.T) {
	for _, test := range []struct {
		name, want string
		prepare    func() error
	}{
		{"sysfs of the namespace", "an administrator has to run: echo 1 > /sys/class/net/ns-test/queues/rx-0/rps_cpus", func() error {
			return unix.Mount("sysfs", "/sys", "sysfs", 0, "")
		}},
		{"sysfs of another namespace", "want a sysfs of the device's network namespace at /sys, or CAP_SYS_ADMIN", func() error { return nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			tapNetns(t)
			ownDevNet(t, 0o666)
			asAdmin(t, "ns-test", water.TAP, true, nobody)
			setUp(t, "ns-test", netip.MustParsePrefix("192.0.2.1/24"))
			if err := test.prepare(); err != nil {
				t.Fatal(err)
			}
			becomeNobody(t)
			d, err := OpenDevice(DeviceConfig{Name: "ns-test", HostCPUs: []int{0}})
			if err == nil {
				_ = d.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %q, want %q", err, test.want)
			}
		})
	}
}
