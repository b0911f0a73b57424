package dispatch

import (
	"strings"
	"testing"
)

func TestHashTypes(t *testing.T) {
	for _, c := range []struct {
		in   string
		want HashTypes
		out  string
	}{
		{"TCP_IPV4,IPV4", HashTCPIPv4 | HashIPv4, "IPV4,TCP_IPV4"},
		{"UDP_IPV4", HashUDPIPv4, "UDP_IPV4"},
		{" udp_ipv6 , Ipv6,IPV6", HashUDPIPv6 | HashIPv6, "IPV6,UDP_IPV6"},
		{"TCP_IPV6", HashTCPIPv6, "TCP_IPV6"},
		{"all", HashAll, "IPV4,TCP_IPV4,UDP_IPV4,IPV6,TCP_IPV6,UDP_IPV6"},
		{"NONE", 0, "NONE"},
	} {
		got, err := ParseHashTypes(c.in)
		if err != nil || got != c.want {
			t.Errorf("ParseHashTypes(%q) = %s, %v, want %s", c.in, got, err, c.want)
		}
		if c.want.String() != c.out {
			t.Errorf("String() = %q, want %q", c.want, c.out)
		}
	}
	for types := range HashAll + 1 {
		if got, err := ParseHashTypes(types.String()); err != nil || got != types {
			t.Errorf("%q is parsed as %s, %v", types.String(), got, err)
		}
	}
	for _, in := range []string{"", ",", "TCP", "IPV4,", "IPV4,ALL", "NDIS_HASH_IPV4", "TCP_IPV4 IPV4"} {
		_, err := ParseHashTypes(in)
		if err == nil || !strings.Contains(err.Error(), "want ALL, NONE, or a list of IPV4,TCP_IPV4") {
			t.Errorf("ParseHashTypes(%q): error %v, want one that lists the names", in, err)
		}
	}
	if got := (HashIPv4 | 0x80).String(); got != "IPV4,0x80" {
		t.Errorf("with an unknown bit: %q", got)
	}
}
