package shard

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/ports"
)

// ICMP says that nobody has the port: the next call is told, once.
func TestPacketRefused(t *testing.T) {
	for name, remote := range map[string]netip.Addr{"IPv4": addrB, "IPv6": addr6[1]} {
		t.Run(name, func(t *testing.T) {
			a, b := startPair(t, nil)
			client, err := a.DialNetPacket(netip.AddrPortFrom(remote, 9))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			_, err = client.Read(make([]byte, 1))
			op, ok := errors.AsType[*net.OpError](err)
			if !errors.Is(err, syscall.ECONNREFUSED) || !ok || op.Op != "read" || op.Net != "udp" ||
				op.Source.String() != client.LocalAddr().String() || op.Addr.String() != client.RemoteAddr().String() {
				t.Errorf("Read after a datagram to a closed port: %#v, want ECONNREFUSED", err)
			}
			// It is over with that: a server that has come back is talked to.
			server, err := b.ListenNetPacket([]netip.Addr{remote}, 9)
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			if _, err := client.Write([]byte("y")); err != nil {
				t.Errorf("Write after the error was told: %v", err)
			}
			buf := make([]byte, 1)
			if _, _, err := server.ReadFrom(buf); err != nil || buf[0] != 'y' {
				t.Errorf("the server got %q, %v", buf, err)
			}
			_ = server.Close()
			eventually(t, "Write fails", func() bool { _, err := client.Write([]byte("z")); return errors.Is(err, syscall.ECONNREFUSED) })
		})
	}
}

// A dialled port gets nothing from others, and sends to nobody else.
func TestPacketDialedFilters(t *testing.T) {
	a, b := startPair(t, nil)
	listen := func() *NetPacketConn {
		p, err := b.ListenNetPacket([]netip.Addr{addrB}, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		return p
	}
	server, stranger := listen(), listen()
	client, err := a.DialNetPacket(server.l.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, from := range []*NetPacketConn{stranger, server} {
		if _, err := from.WriteTo([]byte(from.LocalAddr().String()), client.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	if n, err := client.Read(buf); err != nil || string(buf[:n]) != server.LocalAddr().String() {
		t.Errorf("read %q, %v; want what the peer sent", buf[:n], err)
	}
	for name, write := range map[string]func() (int, error){
		"WriteTo":         func() (int, error) { return client.WriteTo(buf, stranger.LocalAddr()) },
		"WriteToUDP":      func() (int, error) { return client.WriteToUDP(buf, stranger.LocalAddr().(*net.UDPAddr)) },
		"WriteToAddrPort": func() (int, error) { return client.WriteToAddrPort(buf, stranger.l.addr) },
	} {
		if _, err := write(); !errors.Is(err, net.ErrWriteToConnected) {
			t.Errorf("%s on a dialled port: %v, want net.ErrWriteToConnected", name, err)
		}
	}
}

// A dialled port is open in the groups that can hear its peer, not in all.
func TestPacketDialedIsSmall(t *testing.T) {
	a, b := startPair(t, withGroups(t, 32))
	server, err := b.ListenNetPacket([]netip.Addr{addrB}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := a.DialNetPacket(server.l.addr)
	if err != nil {
		t.Fatal(err)
	}
	open := 0
	for id := range a.groups {
		_ = a.groups[id].do(func(g *Group) error { open += len(g.sockets); return nil })
	}
	if open < 1 || open > 2 {
		t.Errorf("open in %d groups, want 1 or 2", open)
	}
	if _, err := a.ListenNetPacket([]netip.Addr{addrA}, client.l.addr.Port()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listening on a dialled port: %v, want EADDRINUSE", err)
	}
	if client.Shard() != 0 || client.CPU() != a.shards[0].cpu || client.NUMANode() != a.shards[0].node {
		t.Errorf("lives on shard %d, CPU %d, node %d", client.Shard(), client.CPU(), client.NUMANode())
	}
	_ = client.Close()
	again, err := a.ListenNetPacket([]netip.Addr{addrA}, client.l.addr.Port())
	if err != nil {
		t.Fatalf("listening on a port that was closed: %v", err)
	}
	_ = again.Close()
}

func TestDialPacketErrors(t *testing.T) {
	a, _ := startPair(t, nil)
	for remote, want := range map[string]error{
		"192.0.2.1:1": syscall.ENETUNREACH,
		"10.1.0.2:0":  syscall.EINVAL,
	} {
		c, err := a.DialNetPacket(netip.MustParseAddrPort(remote))
		if op, ok := errors.AsType[*net.OpError](err); c != nil || !ok || op.Op != "dial" || !errors.Is(err, want) {
			t.Errorf("dial %s: %v, %v; want %v", remote, c, err, want)
		}
	}
}

// Without a free port the error is that of connect(2).
func TestDialPacketWithoutPorts(t *testing.T) {
	a, _ := startPair(t, nil)
	for id := range a.groups {
		_ = a.groups[id].do(func(g *Group) error {
			// Reserved, for that many endpoints would take 100 MB.
			for port := firstEphemeral; port <= lastEphemeral; port++ {
				r := ports.Reservation{
					Networks:  []tcpip.NetworkProtocolNumber{header.IPv4ProtocolNumber},
					Transport: header.UDPProtocolNumber, Addr: tcpipAddress(addrA), Port: uint16(port),
				}
				if _, err := g.stack.ReservePort(g.stack.SecureRNG(), r, nil); err != nil {
					t.Fatal(err)
				}
			}
			return nil
		})
	}
	c, err := a.DialNetPacket(netip.AddrPortFrom(addrB, 9))
	if op, ok := errors.AsType[*net.OpError](err); c != nil || !ok || op.Op != "dial" || !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("%v, %v; want EADDRNOTAVAIL", c, err)
	}
}

// What SetReadBuffer has no room for is dropped and counted.
func TestPacketReadBuffer(t *testing.T) {
	a, b := startPair(t, nil)
	server, err := b.ListenNetPacket([]netip.Addr{addrB}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := server.SetReadBuffer(5000); err != nil {
		t.Fatal(err)
	}
	client, err := a.DialNetPacket(server.l.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range 10 {
		if _, err := client.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "5 are dropped", func() bool { return b.Stats()[0].DatagramsDropped == 5 })
	buf := make([]byte, 2000)
	for range 5 {
		if n, _, err := server.ReadFromUDP(buf); n != 1000 || err != nil {
			t.Fatalf("read %d bytes, %v", n, err)
		}
	}
	if _, err := client.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if n, _, err := server.ReadFromUDP(buf); n != 1000 || err != nil {
		t.Errorf("after room was made: read %d bytes, %v", n, err)
	}
	if err := server.SetReadBuffer(0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("SetReadBuffer(0): %v, want EINVAL", err)
	}
	_ = server.Close()
	for name, err := range map[string]error{
		"SetReadBuffer":  server.SetReadBuffer(5000),
		"SetWriteBuffer": server.SetWriteBuffer(5000),
		"SetDeadline":    server.SetDeadline(time.Time{}),
	} {
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "set" || !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v, want net.ErrClosed", name, err)
		}
	}
}

// A net.Resolver that dials through the stack resolves names.
func TestResolver(t *testing.T) {
	a, b := startPair(t, nil)
	server, err := b.ListenNetPacket([]netip.Addr{addrB}, 53)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			q := m.Questions[0]
			header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1}
			switch q.Type {
			case dnsmessage.TypeA:
				m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: [4]byte{10, 1, 0, 7}}}}
			case dnsmessage.TypeAAAA:
				m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: [16]byte{0: 0xfd, 15: 7}}}}
			}
			answer, err := m.Pack()
			if err != nil {
				t.Error(err)
			}
			_, _ = server.WriteTo(answer, from)
		}
	}()
	r := net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return a.DialNetPacket(netip.AddrPortFrom(addrB, 53))
	}}
	addrs, err := r.LookupNetIP(t.Context(), "ip", "host.example.")
	slices.SortFunc(addrs, netip.Addr.Compare)
	want := []netip.Addr{netip.MustParseAddr("10.1.0.7"), netip.MustParseAddr("fd00::7")}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	if err != nil || !slices.Equal(addrs, want) {
		t.Errorf("resolved to %v, %v; want %v", addrs, err, want)
	}
}
