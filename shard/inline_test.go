package shard

import (
	"bytes"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket/layers"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// TestInlineTCP names what breaks when another version of gVisor behaves
// differently below inline_unsafe.go.
func TestInlineTCP(t *testing.T) {
	before := runtime.NumGoroutine()
	a, b := steppedPair(t)
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("two stacks of %d groups own %d goroutines, want none: gVisor's TCP processors were not closed", len(a.groups), n-before)
	}
	for _, g := range a.groups {
		if len(g.tcp.strays) == 0 {
			t.Fatal("no processor queue found: an endpoint that gVisor re-queues would be lost")
		}
	}
	listenStepped(t, b, 7, echoHandler())

	var got []byte
	var closed error
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{
		data:  func(_ *Conn, p []byte) int { got = append(got, p...); return len(p) },
		close: func(_ *Conn, err error) { closed = err },
	})
	settle(t, a, b)
	if !client.opened {
		t.Fatalf("no connection after the handshake's frames; endpoint state %v", tcp.EndpointState(client.ep.State()))
	}

	sent := bytes.Repeat([]byte("0123456789abcdef"), 20<<10/16)
	if n, err := client.Write(sent); n != len(sent) || err != nil {
		t.Fatalf("Write = %d, %v", n, err)
	}
	settle(t, a, b)
	if !bytes.Equal(got, sent) {
		t.Fatalf("echo of %d bytes brought %d", len(sent), len(got))
	}
	for _, g := range slices.Concat(a.groups, b.groups) {
		for _, ep := range g.stack.RegisteredEndpoints() {
			if ep, ok := ep.(*tcp.Endpoint); ok && segmentsQueued(ep) {
				t.Errorf("endpoint in state %v still holds segments after a turn", tcp.EndpointState(ep.State()))
			}
		}
	}
	if retransmits := a.count().Groups[client.g.id].Retransmits; retransmits != 0 {
		t.Errorf("%d retransmissions on a cable that loses nothing", retransmits)
	}

	client.Close()
	settle(t, a, b)
	if closed == nil || !strings.Contains(closed.Error(), "closed") {
		t.Errorf("Close event with %v, want net.ErrClosed", closed)
	}
	if a.counters.ConnsOpen != 0 || b.counters.ConnsOpen != 0 {
		t.Errorf("%d and %d connections open after both ends closed", a.counters.ConnsOpen, b.counters.ConnsOpen)
	}
}

// TestDataWithHandshake: the ACK that ends the handshake and the first data
// arrive in one burst. gVisor's handler stops at the ACK; without a second
// pass the data would wait for the peer's retransmission.
func TestDataWithHandshake(t *testing.T) {
	a, b := steppedPair(t)
	var got string
	listenStepped(t, b, 7, &testHandler{data: func(_ *Conn, p []byte) int { got += string(p); return len(p) }})
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{open: func(c *Conn) {
		if _, err := c.Write([]byte("early")); err != nil { // in the turn that sends the ACK
			t.Error(err)
		}
	}})
	settle(t, a, b)
	if got != "early" {
		t.Fatalf("received %q, want %q", got, "early")
	}
	if n := a.count().Groups[client.g.id].Retransmits; n != 0 {
		t.Errorf("%d retransmissions", n)
	}
}

// TestTimeWaitReuse: a SYN for a tuple in TIME_WAIT is handed to the listener
// by gVisor itself, through a queue of a processor that no longer runs.
func TestTimeWaitReuse(t *testing.T) {
	a, b := steppedPair(t)
	accepted := 0
	listenStepped(t, b, 7, &testHandler{open: func(c *Conn) { accepted++; c.Close() }})
	remote := netip.AddrPortFrom(addrB, 7)
	// The server closes first, so its side stays in TIME_WAIT.
	first := dialStepped(t, a, remote, &testHandler{})
	settle(t, a, b)
	local := first.LocalAddr()
	if accepted != 1 || first.g.conns.next != &first.g.conns.Conn {
		t.Fatalf("%d accepted, first connection still there", accepted)
	}
	again, err := first.g.dial(local.Addr(), []uint16{local.Port()}, false, remote, &testHandler{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	if accepted != 2 || !again.opened {
		t.Fatalf("SYN in TIME_WAIT: %d accepted, opened %v; want 2, true", accepted, again.opened)
	}
}

func listenStepped(t testing.TB, s *Shard, port uint16, h Handler) {
	t.Helper()
	for _, g := range s.groups {
		for _, p := range s.set.cfg.Addrs {
			if _, err := g.listen(netip.AddrPortFrom(p.Addr(), port), 128, h); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func dialStepped(t testing.TB, s *Shard, remote netip.AddrPort, h Handler) *Conn {
	t.Helper()
	local, ok := s.set.source(remote.Addr())
	if !ok {
		t.Fatalf("no source address for %v", remote)
	}
	c, err := s.groups[1].dial(local, portsInto(s.groups[1], local, remote, 100), false, remote, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestTailLossProbe: a receiver on the link that delays its ACK is not probed;
// one behind a router is, long before the retransmission timer.
func TestTailLossProbe(t *testing.T) {
	for _, test := range []struct {
		name   string
		addr   netip.Addr
		probes int
	}{
		{"on the link", rawPeerAddr, 0},
		{"routed", netip.MustParseAddr("192.0.2.1"), 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			for _, g := range b.groups {
				g.link.gso = false // one frame per segment
				g.stack.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, Gateway: tcpipAddress(rawPeerAddr), NIC: nicID})
			}
			r := newRawPeerAt(t, b, test.addr, layers.TCPOption{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2})
			if n, err := r.conn.Write(make([]byte, 2000)); n != 2000 || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			if n := len(r.receive()); n != 2 {
				t.Fatalf("%d segments, want 2", n)
			}
			r.later(150 * time.Millisecond) // gVisor's RTO is 200 ms at least
			if n := len(r.receive()); n != test.probes {
				t.Errorf("%d segments sent again within 150 ms, want %d", n, test.probes)
			}
			r.later(time.Second)
			if n := len(r.receive()); n == 0 {
				t.Error("nothing sent again within a second")
			}
		})
	}
}
