package shard

import (
	"net/netip"
	"testing"
	"time"
)

// TestReceiveShare: a stream alone comes to the whole receive buffer, several to their
// share, who sends requests has a small one, and what the application has chosen stays.
func TestReceiveShare(t *testing.T) {
	a, b := steppedPair(t)
	later := delayed(a, b)
	b.set.cfg.ReceiveBuffer = 2 << 20
	var servers []*Conn
	received := 0
	listenStepped(t, b, 7, &testHandler{
		open: func(c *Conn) { servers = append(servers, c) },
		data: func(_ *Conn, p []byte) int { received += len(p); return len(p) },
	})
	const conns = 8
	var clients []*Conn
	for range conns {
		clients = append(clients, dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{}))
		settle(t, a, b)
	}
	sent := 0
	stream := func(size int, clients ...*Conn) { // for some periods
		t.Helper()
		for range 5 {
			for _, c := range clients {
				n, err := c.Write(make([]byte, size))
				if n != size || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
				sent += size
				settle(t, a, b)
			}
			*later += time.Duration(bulkPeriod)
		}
	}
	whole := b.set.cfg.ReceiveBuffer
	want := func(what string, c *Conn, size int) {
		t.Helper()
		if got := int(c.ep.SocketOptions().GetReceiveBufferSize()); got != size {
			t.Errorf("%s: receive buffer of %d bytes, want %d", what, got, size)
		}
	}
	const frames = 200_000
	want("nothing received", servers[0], firstReceiveBuffer)
	stream(1000, clients...)
	want("requests", servers[0], firstReceiveBuffer)
	servers[1].ownWindow = true
	sending(servers[2].ep).MaxPayloadSize = 60_000
	stream(frames, clients...)
	want("eight streams", servers[0], firstReceiveBuffer)
	want("eight streams, large segments", servers[2], 8*60_000)
	stream(frames, clients[3:6]...)
	want("three streams", servers[3], whole/4)
	stream(frames, clients[4:6]...)
	want("two streams", servers[4], whole/2)
	stream(frames, clients[5])
	want("one stream", servers[5], whole)
	stream(frames, clients[1])
	want("one stream, chosen by the application", servers[1], firstReceiveBuffer)
	// Its peer may have on the way what it was promised.
	stream(frames, clients...)
	want("eight streams again", servers[5], whole)
	want("eight streams again", servers[6], firstReceiveBuffer)
	if received != sent {
		t.Errorf("%d of %d bytes arrived", received, sent)
	}
}
