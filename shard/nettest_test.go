package shard

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// TestConformance runs the tests that every net.Conn has to pass.
func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name string
		host netip.Addr
		own  bool // dial an address of the stack itself
	}{{"IPv4", addrB, false}, {"IPv6", addr6[1], false}, {"own address", addrB, true}} {
		t.Run(test.name, func(t *testing.T) {
			a, b := startPair(t, nil)
			if test.own {
				a = b
			}
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				l, err := b.ListenNet([]netip.Addr{test.host}, 0, 1)
				if err != nil {
					return nil, nil, nil, err
				}
				defer l.Close()
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				c1, err = a.DialNet(ctx, netip.AddrPort{}, l.l.addr)
				if err != nil {
					return nil, nil, nil, err
				}
				c2, err = l.Accept()
				return c1, c2, func() { _ = c1.Close(); _ = c2.Close() }, err
			})
		})
	}
}
