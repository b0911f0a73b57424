package integration

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"numastack/stack"
)

// TestConfigErrors opens stacks that cannot be: the error names the field.
func TestConfigErrors(t *testing.T) {
	needNetwork(t)
	n := newSubnet()
	for _, test := range []struct {
		name   string
		change func(*stack.Config)
		want   string
	}{
		{"no address", func(c *stack.Config) { c.Addrs = nil }, "Addrs"},
		{"address twice", func(c *stack.Config) { c.Addrs = append(c.Addrs, c.Addrs[0]) }, "Addrs"},
		{"address of the host", func(c *stack.Config) { c.Addrs = c.HostAddrs }, "Addrs"},
		{"broadcast address", func(c *stack.Config) { c.Addrs = []netip.Prefix{netip.MustParsePrefix("10.1.2.255/24")} }, "10.1.2.255"},
		{"multicast address", func(c *stack.Config) { c.Addrs = []netip.Prefix{netip.MustParsePrefix("224.0.0.5/24")} }, "224.0.0.5"},
		{"gateway elsewhere", func(c *stack.Config) { c.Gateways = []netip.Addr{netip.MustParseAddr("192.0.2.1")} }, "Gateways"},
		{"too many shards", func(c *stack.Config) { c.Shards = 129 }, "Shards: 129"},
		{"negative shards", func(c *stack.Config) { c.Shards = -1 }, "Shards: -1"},
		{"fewer groups than shards", func(c *stack.Config) { c.Shards, c.Groups = 4, 3 }, "Groups: 3"},
		{"too many groups", func(c *stack.Config) { c.Groups = 129 }, "Groups: 129"},
		{"no such CPU", func(c *stack.Config) { c.CPUs = []int{4095} }, "4095"},
		{"small MTU", func(c *stack.Config) { c.MTU = 100 }, "MTU: 100"},
		{"small MTU for IPv6", func(c *stack.Config) { c.MTU = 1279 }, "MTU: 1279"},
		{"large MTU", func(c *stack.Config) { c.MTU = 65_522 }, "MTU: 65522"},
		{"long name", func(c *stack.Config) { c.Device = "a-name-of-16-chr" }, "Name"},
		{"backlog", func(c *stack.Config) { c.Backlog = -1 }, "Backlog: -1"},
		{"queue length", func(c *stack.Config) { c.TxQueueLen = -1 }, "TxQueueLen"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := n.configure(t, stack.Config{Shards: 1})
			test.change(&cfg)
			before := resources(t).descriptors
			s, err := stack.New(cfg)
			if err == nil {
				_ = s.Close()
				t.Fatal("it was accepted")
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %q, want one line with %q in it", err, test.want)
			}
			if after := resources(t).descriptors; after > before {
				t.Errorf("%d descriptors, %d before", after, before)
			}
			if _, err := net.InterfaceByName(cfg.Device); err == nil {
				t.Error("a device was left behind")
			}
		})
	}
}

// TestDeviceBusy opens a second stack on the device of a first one, which does
// not notice.
func TestDeviceBusy(t *testing.T) {
	r := open(t, stack.Config{Shards: 1})
	r.serveEcho(t, nil)
	other := newSubnet()
	other.device = r.device
	s, err := stack.New(other.configure(t, stack.Config{Shards: 1}))
	if err == nil {
		_ = s.Close()
	}
	if !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), r.device) {
		t.Errorf("error is %v, want EBUSY and the name of the device", err)
	}
	if err := exchange(dialTCP(t, r.self4, echoPort), payload(1, 10_000)); err != nil {
		t.Errorf("the first stack: %v", err)
	}
}

// addDevice makes a TUN or TAP device for a user and the group of the same
// number, as an administrator would.
func addDevice(t *testing.T, name string, mode netlink.TuntapMode, flags netlink.TuntapFlag, owner uint32) *netlink.Tuntap {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	link := &netlink.Tuntap{LinkAttrs: attrs, Mode: mode, Flags: flags, Owner: owner, Group: owner}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	for _, fd := range link.Fds {
		_ = fd.Close() // the device persists
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(link); err != nil {
			t.Errorf("delete the device %s: %v", name, err)
		}
	})
	return link
}

const (
	multiQueue  = netlink.TUNTAP_NO_PI | netlink.TUNTAP_MULTI_QUEUE
	singleQueue = netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE
)

// TestWrongDevice opens stacks on interfaces that are something else.
func TestWrongDevice(t *testing.T) {
	needNetwork(t)
	for _, test := range []struct {
		name   string
		device func(t *testing.T, n subnet) string
		want   string
	}{
		{"tun", func(t *testing.T, n subnet) string {
			return addDevice(t, n.device, netlink.TUNTAP_MODE_TUN, multiQueue, 0).Name
		}, "TUN"},
		{"one queue", func(t *testing.T, n subnet) string {
			return addDevice(t, n.device, netlink.TUNTAP_MODE_TAP, singleQueue, 0).Name
		}, "single queue"},
		{"not a tap", func(*testing.T, subnet) string { return "lo" }, "want a TAP device"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := newSubnet()
			cfg := n.configure(t, stack.Config{Shards: 1})
			cfg.Device = test.device(t, n)
			s, err := stack.New(cfg)
			if err == nil {
				_ = s.Close()
				t.Fatal("it was accepted")
			}
			if !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), cfg.Device) {
				t.Errorf("error is %q, want %q and %q in it", err, cfg.Device, test.want)
			}
			if _, err := net.InterfaceByName(cfg.Device); err != nil {
				t.Errorf("the interface that was there before: %v", err)
			}
		})
	}
}

// TestExistingDevice uses a device that an administrator has made, and leaves
// it there.
func TestExistingDevice(t *testing.T) {
	needNetwork(t)
	n := newSubnet()
	addDevice(t, n.device, netlink.TUNTAP_MODE_TAP, multiQueue, 0)
	for range 2 {
		s, err := stack.New(n.configure(t, stack.Config{Shards: 2}))
		if err != nil {
			t.Fatal(err)
		}
		r := &rig{Stack: s, subnet: n}
		r.serveEcho(t, nil)
		c := dialTCP(t, n.self4, echoPort)
		if err := exchange(c, payload(1, 10_000)); err != nil {
			t.Error(err)
		}
		_ = c.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := net.InterfaceByName(n.device); err != nil {
			t.Fatalf("after Close: %v", err)
		}
	}
}

// TestCommandLineErrors starts the applications with what cannot be: one clear
// line, and an exit status.
func TestCommandLineErrors(t *testing.T) {
	needNetwork(t)
	n := newSubnet()
	self, host := netip.PrefixFrom(n.self4, 24).String(), netip.PrefixFrom(n.host4, 24).String()
	addresses := []string{"-tap", n.device, "-addr", self, "-host", host}
	with := func(more ...string) []string { return append(append([]string(nil), addresses...), more...) }
	tun := newSubnet()
	if os.Geteuid() == 0 {
		addDevice(t, tun.device, netlink.TUNTAP_MODE_TUN, multiQueue, 0)
	}
	busy := open(t, stack.Config{Shards: 1})

	for _, test := range []struct {
		name, role string
		args       []string
		want       string
	}{
		{"no tun", roleNoTun, addresses, "/dev/net/tun"},
		{"no permission", roleNobody, addresses, "CAP_NET_ADMIN"},
		{"device busy", "", with("-tap", busy.device), "busy"},
		{"tun device", "", with("-tap", tun.device), "TUN"},
		{"not a tap", "", with("-tap", "lo"), "lo"},
		{"bad address", "", []string{"-addr", "10.1.2.3"}, "10.1.2.3"},
		{"bad address length", "", []string{"-addr", "10.1.2.3/33"}, "10.1.2.3/33"},
		{"address clash", "", []string{"-tap", n.device, "-addr", host, "-host", host}, n.host4.String()},
		{"no shards", "", with("-shards", "0"), "1 to 128"},
		{"too many shards", "", with("-shards", "129"), "1 to 128"},
		{"negative shards", "", with("-shards", "-1"), "1 to 128"},
		{"shards not a number", "", with("-shards", "two"), "two"},
		{"no such CPU", "", with("-cpus", "4095"), "4095"},
		{"bad CPU list", "", with("-cpus", "0-x"), "0-x"},
		{"small MTU", "", with("-mtu", "100"), "576"},
		{"large MTU", "", with("-mtu", "65522"), "65521"},
		{"steering", "", with("-steering", "psychic"), "psychic"},
		{"offload", "", with("-offload", "some"), "some"},
		{"long spin", "", with("-spin", "2s"), "1s"},
		{"unknown flag", "", with("-frobnicate"), "frobnicate"},
		{"argument", "", with("serve"), "serve"},
	} {
		for _, name := range []string{"echo", "iperf3"} {
			t.Run(test.name+"/"+name, func(t *testing.T) {
				stderr, status := run(t, test.role, name, test.args...)
				wantOneLine(t, stderr, status, test.want)
			})
		}
	}
	t.Run("port in use", func(t *testing.T) {
		stderr, status := run(t, "", "echo", with("-ports", "7,7,0")...)
		wantOneLine(t, stderr, status, "address already in use")
	})
	t.Run("bad ports", func(t *testing.T) {
		stderr, status := run(t, "", "echo", with("-ports", "7,70000,0")...)
		wantOneLine(t, stderr, status, "70000")
	})
	if _, err := net.InterfaceByName(n.device); err == nil {
		t.Errorf("the device %s was left behind", n.device)
	}
}

// wantOneLine checks how an application that could not start has ended.
func wantOneLine(t *testing.T, stderr string, status int, want string) {
	t.Helper()
	text := strings.TrimSuffix(stderr, "\n")
	if status == 0 {
		t.Error("exit status 0")
	}
	if text == "" || strings.Contains(text, "\n") || !strings.Contains(text, want) {
		t.Errorf("standard error is\n%s\nwant one line with %q in it", stderr, want)
	}
	if strings.Contains(text, "panic") || strings.Contains(text, "goroutine") {
		t.Errorf("it has panicked:\n%s", stderr)
	}
}

// TestUnprivileged runs an application without privileges on a device that an
// administrator has made for its user: it works, except that no program can be
// loaded to steer.
func TestUnprivileged(t *testing.T) {
	needNetwork(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give it up")
	}
	n := newSubnet()
	link := addDevice(t, n.device, netlink.TUNTAP_MODE_TAP, multiQueue, nobody)
	for _, step := range []func() error{
		func() error { return netlink.LinkSetTxQLen(link, 4096) },
		func() error { return netlink.LinkSetUp(link) },
		func() error {
			return netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: n.host4.AsSlice(), Mask: net.CIDRMask(24, 32)}})
		},
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"-tap", n.device, "-addr", netip.PrefixFrom(n.self4, 24).String(), "-shards", "2"}

	t.Run("auto", func(t *testing.T) {
		p := start(t, roleNobody, "ready", "echo", append(args, "-steering", "auto")...)
		if out := p.out.String(); !strings.Contains(out, "user steering") || !strings.Contains(out, "level=WARN") {
			t.Errorf("output is\n%s\nwant user steering and a warning", out)
		}
		for i := range 20 {
			c := dialTCP(t, n.self4, echoPort)
			if err := roundTrip(c, payload(uint64(i), 1000)); err != nil {
				t.Error(err)
			}
			_ = c.Close()
		}
		p.terminate(t)
	})
	t.Run("kernel", func(t *testing.T) {
		stderr, status := run(t, roleNobody, "echo", append(args, "-steering", "kernel")...)
		wantOneLine(t, stderr, status, "CAP_BPF")
	})
}

// TestEchoApplication runs the application with both address families and all
// its services, until it is asked to end.
func TestEchoApplication(t *testing.T) {
	needNetwork(t)
	n := newSubnet()
	args := []string{"-tap", n.device, "-shards", "2", "-stats-json", t.TempDir() + "/stats.json"}
	for _, p := range n.prefixes(n.self4, n.self6, 0) {
		args = append(args, "-addr", p.String())
	}
	for _, p := range n.prefixes(n.host4, n.host6, 0) {
		args = append(args, "-host", p.String())
	}
	p := start(t, "", "ready", "echo", args...)
	for _, self := range []netip.Addr{n.self4, n.self6} {
		if err := exchange(dialTCP(t, self, echoPort), payload(1, 1<<20)); err != nil {
			t.Error(err)
		}
		echoDatagrams(t, family{self: self}, 1, 1000, 20_000)
		c := dialTCP(t, self, discardPort)
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		_ = c.Close()
		c = dialTCP(t, self, chargenPort)
		buf := make([]byte, 1<<20)
		if n, err := c.Read(buf); err != nil {
			t.Errorf("chargen: %d bytes and %v", n, err)
		}
		_ = c.Close()
	}
	p.terminate(t)
	if out := p.out.String(); !strings.Contains(out, fmt.Sprintf("echo on port %d", echoPort)) {
		t.Errorf("output is\n%s", out)
	}
	if _, err := net.InterfaceByName(n.device); err == nil {
		t.Errorf("the device %s was left behind", n.device)
	}
}
