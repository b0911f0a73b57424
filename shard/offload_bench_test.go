package shard

import (
	"net"
	"net/netip"
	"testing"
)

// BenchmarkOffload is a function's way from a handler to a pool and back.
func BenchmarkOffload(b *testing.B) {
	client, server := startPair(b, nil)
	l, err := server.Serve([]netip.Addr{addrB}, 0, 1, func(c net.Conn) {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return
		}
		for range b.N {
			c.(*ServedConn).Offload(func() {})
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	c, err := client.DialNet(b.Context(), netip.AddrPort{}, l.Addr())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.ResetTimer() // one connection runs all, so no b.Loop
	if _, err := c.Write([]byte{1}); err != nil {
		b.Fatal(err)
	}
	_, _ = c.Read(make([]byte, 1)) // until the handler has ended
}
