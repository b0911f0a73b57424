package stack

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
)

func TestLocal(t *testing.T) {
	both := &Stack{cfg: Config{Addrs: prefixes("10.0.0.2/24", "fd00::2/64", "10.0.1.2/24")}}
	four := &Stack{cfg: Config{Addrs: prefixes("10.0.0.2/24")}}
	for _, test := range []struct {
		stack            *Stack
		network, address string
		want             []string
		port             uint16
	}{
		{both, "tcp", ":80", []string{"0.0.0.0", "::"}, 80},
		{both, "tcp", "[::]:80", []string{"0.0.0.0", "::"}, 80},
		{both, "tcp", "0.0.0.0:80", []string{"0.0.0.0"}, 80},
		{both, "tcp4", ":0", []string{"0.0.0.0"}, 0},
		{both, "tcp6", ":0", []string{"::"}, 0},
		{both, "tcp", "10.0.1.2:http", []string{"10.0.1.2"}, 80},
		{both, "tcp", "[::ffff:10.0.0.2]:1", []string{"10.0.0.2"}, 1},
		{both, "udp", ":53", []string{"10.0.0.2", "fd00::2", "10.0.1.2"}, 53},
		{both, "udp6", "[fd00::2]:53", []string{"fd00::2"}, 53},
		{four, "tcp", ":80", []string{"0.0.0.0"}, 80},
		{four, "tcp", "[::]:80", []string{"0.0.0.0"}, 80},
	} {
		addrs, port, err := test.stack.local(test.network[:3], test.network, test.address)
		var got []string
		for _, a := range addrs {
			got = append(got, a.String())
		}
		if err != nil || port != test.port || !slices.Equal(got, test.want) {
			t.Errorf("%s %s: %v port %d, %v; want %v port %d", test.network, test.address, got, port, err, test.want, test.port)
		}
	}
}

func TestLocalErrors(t *testing.T) {
	s := &Stack{cfg: Config{Addrs: prefixes("10.0.0.2/24")}}
	for _, test := range [][2]string{
		{"tcp", "10.0.0.3:80"},
		{"tcp6", ":80"},
		{"tcp", "80"},
		{"tcp", ":70000"},
		{"tcp", ":-1"},
		{"tcp", ":nonesuch"},
		{"tcp", "example.com:80"},
		{"udp", ":80"},
		{"tcp5", ":80"},
		{"unix", "/tmp/x"},
		{"", ":80"},
	} {
		if addrs, _, err := s.local("tcp", test[0], test[1]); err == nil {
			t.Errorf("%s %s: accepted as %v", test[0], test[1], addrs)
		}
		// Nothing of this reaches the shards, which this stack does not have.
		var opErr *net.OpError
		if _, err := s.Listen(test[0], test[1]); !errors.As(err, &opErr) || opErr.Op != "listen" {
			t.Errorf("Listen(%s, %s): %v, want a *net.OpError of listen", test[0], test[1], err)
		}
	}
	if _, err := s.HandleTCP("tcp", ":80", nil); err == nil {
		t.Error("HandleTCP took a nil handler")
	}
	if _, err := s.HandleUDP("udp", ":80", nil); err == nil {
		t.Error("HandleUDP took a nil handler")
	}
	for _, group := range []*net.UDPAddr{
		nil,
		{},
		{Port: 5000},
		{IP: net.IPv4(10, 0, 0, 2), Port: 5000},
		{IP: net.IPv4(239, 1, 2, 3), Port: -1},
		{IP: net.IPv4(239, 1, 2, 3), Port: 70_000},
		{IP: net.ParseIP("ff02::1"), Port: 5000}, // without an address of IPv6
	} {
		var opErr *net.OpError
		if p, err := s.ListenMulticastUDP("udp", group); p != nil || !errors.As(err, &opErr) || opErr.Op != "listen" {
			t.Errorf("ListenMulticastUDP(%v): %v, want a *net.OpError of listen", group, err)
		}
	}
	for _, test := range [][2]string{{"tcp", ":80"}, {"tcp", "0.0.0.0:80"}, {"tcp4", "[fd00::1]:80"}, {"ip", "10.0.0.1:1"}} {
		var opErr *net.OpError
		if _, err := s.DialContext(t.Context(), test[0], test[1]); !errors.As(err, &opErr) || opErr.Op != "dial" {
			t.Errorf("DialContext(%s, %s): %v, want a *net.OpError of dial", test[0], test[1], err)
		}
	}
}

func TestBroadcast(t *testing.T) {
	for prefix, want := range map[string]string{"10.0.0.2/24": "10.0.0.255", "10.0.0.2/30": "10.0.0.3", "10.1.2.3/13": "10.7.255.255"} {
		if got := broadcast(netip.MustParsePrefix(prefix)); got.String() != want {
			t.Errorf("broadcast address of %s is %v, want %s", prefix, got, want)
		}
	}
}
