package integration

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"numastack/stack"
)

// TestMulticastSnooping puts a bridge between the kernel and the TAP that sends
// multicast only where somebody asked for it (RFC 4541). The stack has to say
// that it is a member, to say so again when it is asked, and to take its leave.
func TestMulticastSnooping(t *testing.T) {
	needNetwork(t)
	for _, tool := range []string{"ip", "bridge"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs iproute2: %v", err)
		}
	}
	command := func(t *testing.T, name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	r := open(t, variant{2, stack.SteeringAuto, stack.OffloadAuto}.config())
	bridge := "br-" + r.device
	// It asks every second, and forgets who has not answered for two. Times are
	// in hundredths of a second.
	command(t, "ip", "link", "add", bridge, "up", "type", "bridge", "mcast_snooping", "1", "mcast_querier", "1",
		"mcast_startup_query_interval", "50", "mcast_query_interval", "100", "mcast_query_response_interval", "50",
		"mcast_membership_interval", "200", "mcast_last_member_interval", "10")
	t.Cleanup(func() { command(t, "ip", "link", "delete", bridge) })
	command(t, "ip", "link", "set", r.device, "master", bridge)
	for _, p := range r.cfg.HostAddrs {
		command(t, "ip", "address", "delete", p.String(), "dev", r.device)
		command(t, "ip", "address", "add", p.String(), "dev", bridge, "nodad")
	}
	p, err := r.ListenPacket("udp", fmt.Sprint(":", multicastPort))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	member := p.(*stack.PacketConn)
	listed := func(t *testing.T, group netip.Addr, want bool) {
		t.Helper()
		entry := fmt.Sprintf("port %s grp %v ", r.device, group)
		eventually(t, func() error {
			if out := command(t, "bridge", "mdb", "show", "dev", bridge); strings.Contains(out, entry) != want {
				return fmt.Errorf("the bridge lists\n%s, want %q among them: %v", out, entry, want)
			}
			return nil
		})
	}
	r.forFamilies(t, func(t *testing.T, f family) {
		if err := member.JoinGroup(f.group()); err != nil {
			t.Fatal(err)
		}
		listed(t, f.group(), true)
		setPacketDeadline(t, p)
		kernel := kernelPorts(t, f, bridge, 1)[0]
		buf := make([]byte, 10)
		for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if _, err := kernel.WriteToUDPAddrPort([]byte("datagram"), netip.AddrPortFrom(f.group(), multicastPort)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := member.ReadFromAddrPort(buf); err != nil {
				t.Fatal(err)
			}
		}
		if err := member.LeaveGroup(f.group()); err != nil {
			t.Fatal(err)
		}
		listed(t, f.group(), false)
	})
}
