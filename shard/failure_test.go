package shard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"numastack/dispatch"
)

// halfHandler is a testHandler that may go on writing after the peer's FIN.
type halfHandler struct {
	testHandler
	eof func(*Conn)
}

// EOF implements HalfCloser.
func (h *halfHandler) EOF(c *Conn) {
	if h.eof != nil {
		h.eof(c)
	}
}

// TestResetIsTheReason: whatever a handler is doing when the peer resets its
// connection, its last event names the reset. gVisor reports it to one call
// only, which may be a Write.
func TestResetIsTheReason(t *testing.T) {
	for _, test := range []struct {
		name string
		h    testHandler
		busy func(server *Conn) // before the reset
		late func(server *Conn) // between the reset and its event
	}{
		{name: "idle"},
		{
			name: "nothing is consumed",
			h:    testHandler{data: func(*Conn, []byte) int { return 0 }},
		},
		{
			name: "a Write that was short goes on when there is room",
			h: testHandler{writable: func(c *Conn) {
				_, _ = c.Write(make([]byte, 4<<20))
			}},
			busy: func(server *Conn) { _, _ = server.Write(make([]byte, 4<<20)) },
		},
		{
			name: "a Write in the turn of the reset",
			late: func(server *Conn) { _, _ = server.Write([]byte("x")) },
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := steppedPair(t)
			var server *Conn
			var ends []error
			h := test.h
			h.open = func(c *Conn) { server = c }
			h.close = func(_ *Conn, err error) { ends = append(ends, err) }
			listenStepped(t, b, 7, &h)
			client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{data: func(*Conn, []byte) int { return 0 }})
			settle(t, a, b)
			if _, err := client.Write([]byte("request")); err != nil {
				t.Fatal(err)
			}
			if test.busy != nil {
				test.busy(server)
			}
			settle(t, a, b)
			client.Abort()
			a.turn()
			if test.late != nil {
				b.post(taskFunc(func(*Shard) { test.late(server) }))
			}
			settle(t, a, b)
			if len(ends) != 1 || !errors.Is(ends[0], syscall.ECONNRESET) {
				t.Errorf("Close events %v, want one with ECONNRESET", ends)
			}
			if n := b.counters.ConnsOpen; n != 0 {
				t.Errorf("%d connections open after the reset", n)
			}
		})
	}
}

// TestVanishedPeerIsTheReason: a failure that a Write was told first is still
// the reason in the Close event, which would name a reset without it.
func TestVanishedPeerIsTheReason(t *testing.T) {
	a, b := steppedPair(t)
	later := delayed(a)
	listenStepped(t, b, 7, &testHandler{})
	var told, end error
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{close: func(_ *Conn, err error) { end = err }})
	settle(t, a, b)
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	for *later < time.Hour && end == nil { // TCP gives up after a quarter of an hour
		*later += time.Second
		a.post(taskFunc(func(*Shard) {
			if tcp.EndpointState(client.ep.State()) == tcp.StateError {
				_, told = client.Write([]byte("x"))
			}
		}))
		settle(t, a)
	}
	if told == nil || !errors.Is(end, told) || errors.Is(end, syscall.ECONNRESET) {
		t.Errorf("after %v Write was told %v and Close %v; want the same failure, and no reset", *later, told, end)
	}
}

// TestResetEndsWrite: a goroutine that waits in Write learns of the reset, and
// so does everything it tries next.
func TestResetEndsWrite(t *testing.T) {
	a, b := startPair(t, smallBuffers)
	client, server := netPair(t, a, b)
	result := fill(t, server)
	client.c.Do(client.c.Abort)
	select {
	case err := <-result:
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Write while the peer resets: %v, want ECONNRESET", err)
		}
	case <-time.After(patience):
		t.Fatalf("Write still waits %v after the peer's reset", patience)
	}
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after the reset: %v, want ECONNRESET", err)
	}
	for range 2 {
		if _, err := server.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Write after the reset: %v, want ECONNRESET", err)
		}
	}
	if n := b.Stats()[0].ConnsOpen; n != 0 {
		t.Errorf("%d connections open after the reset", n)
	}
}

// TestResetIsNoEnd: the bytes of a goroutine that reach the shard in the turn
// of the reset do not turn it into an orderly end for the reader.
func TestResetIsNoEnd(t *testing.T) {
	a, b := steppedPair(t)
	var server *NetConn
	listenStepped(t, b, 7, &netHandler{accept: func(c *NetConn) bool { server = c; return true }})
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
	settle(t, a, b)
	client.Abort()
	a.turn()
	if _, err := server.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	_ = server.SetReadDeadline(time.Now().Add(patience))
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after the reset: %v, want ECONNRESET", err)
	}
	if _, err := server.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Write after the reset: %v, want ECONNRESET", err)
	}
}

// TestBothSidesSayGoodbye: FIN answered by FIN is an orderly end, in whatever
// order, and what arrived before it can still be read. The side that was first
// learns of it when TIME_WAIT is over.
func TestBothSidesSayGoodbye(t *testing.T) {
	half := func(c *Conn) {
		_ = c.CloseWrite()
		if n, err := c.Write([]byte("late")); n != 0 || !errors.Is(err, syscall.EPIPE) { // and no reason for the end
			t.Errorf("Write after CloseWrite = %d, %v; want 0 and EPIPE", n, err)
		}
	}
	for _, test := range []struct {
		name     string
		answer   func(*Conn) // on the peer's FIN
		together bool        // both FINs are on the way at once
		refuse   bool        // nothing is consumed before both have left
	}{
		{name: "one answers the other", answer: half},
		{name: "at once", together: true},
		{name: "at once, unread bytes", together: true, refuse: true},
		{name: "one after the other, unread bytes", refuse: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := steppedPair(t)
			later := delayed(a, b)
			var server *Conn
			var ends []error
			received, refuse := 0, test.refuse
			atEnd := func(_ *Conn, err error) { ends = append(ends, err) }
			listenStepped(t, b, 7, &halfHandler{
				testHandler: testHandler{
					open: func(c *Conn) { server = c },
					data: func(_ *Conn, p []byte) int {
						if refuse {
							return 0
						}
						received += len(p)
						return len(p)
					},
					close: atEnd,
				},
				eof: test.answer,
			})
			client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &halfHandler{testHandler: testHandler{close: atEnd}})
			settle(t, a, b)
			const size = 100_000
			if n, err := client.Write(make([]byte, size)); n != size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			half(client)
			if test.together {
				half(server)
			}
			settle(t, a, b)
			if refuse {
				half(server)
				settle(t, a, b)
				refuse = false
				server.Resume()
				settle(t, a, b)
			}
			*later = 2 * time.Minute
			settle(t, a, b)
			if received != size {
				t.Errorf("received %d of %d bytes", received, size)
			}
			if len(ends) != 2 || ends[0] != nil || ends[1] != nil {
				t.Errorf("Close events %v, want one with nil on each side", ends)
			}
		})
	}
}

// TestCloseWithoutReading: a connection whose buffers are full in both
// directions ends all the same when it is closed: what arrives is thrown away,
// so the peer goes on reading.
func TestCloseWithoutReading(t *testing.T) {
	a, b := startPair(t, smallBuffers)
	client, server := netPair(t, a, b)
	inBackground(t, func() { _, _ = io.Copy(server, server) }, server)
	fill(t, client)
	eventually(t, "both directions are full", func() bool {
		return client.starved.Load() && client.writable.expected.Load() && server.starved.Load() && server.writable.expected.Load()
	})
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection ends", func() bool { return a.Stats()[0].ConnsOpen == 0 })
}

// TestCloseResetsWhatItCannotSend: when the drain time is over, the peer must
// not take what it got for everything.
func TestCloseResetsWhatItCannotSend(t *testing.T) {
	for _, test := range []struct {
		name       string
		sendBuffer int
	}{
		{"bytes wait for the send buffer", 16 << 10},
		{"bytes wait in the send buffer", 2 * netRing},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := startPair(t, func(cfg *Config) {
				cfg.SendBuffer, cfg.ReceiveBuffer, cfg.Drain = test.sendBuffer, 16<<10, 20*time.Millisecond
			})
			l, err := b.ListenNet([]netip.Addr{addrB}, 0, 1)
			if err != nil {
				t.Fatal(err)
			}
			received, refuse := 0, true // owned by a's shard
			ended := make(chan error, 1)
			client, err := a.Dial(netip.AddrPort{}, l.l.Addr(), &testHandler{
				data: func(_ *Conn, p []byte) int {
					if refuse {
						return 0
					}
					received += len(p)
					return len(p)
				},
				close: func(_ *Conn, err error) { ended <- err },
			}, nil)
			if err != nil {
				t.Fatal(err)
			}
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			const size = netRing // the peer has room for a small part of it
			if n, err := server.Write(make([]byte, size)); n != size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			b.Close()
			client.Do(func() { refuse = false; client.Resume() })
			select {
			case err := <-ended:
				if received >= size || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("peer received %d of %d bytes and then %v, want fewer and ECONNRESET", received, size, err)
				}
			case <-time.After(patience):
				t.Errorf("%v after Close the peer still waits", patience)
			}
		})
	}
}

// TestNoFINBehindHalf: bytes that never got into the send buffer are not passed
// over by the FIN, although the peer has room for it.
func TestNoFINBehindHalf(t *testing.T) {
	for _, closed := range []bool{false, true} { // by the application, before the stack
		t.Run(fmt.Sprintf("closed=%v", closed), func(t *testing.T) {
			a, b := steppedPair(t)
			var server *NetConn
			listenStepped(t, b, 7, &netHandler{accept: func(c *NetConn) bool { server = c; return true }})
			received := 0
			var ends []error
			dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{
				data:  func(_ *Conn, p []byte) int { received += len(p); return len(p) },
				close: func(_ *Conn, err error) { ends = append(ends, err) },
			})
			settle(t, a, b)
			server.c.sendBuffer = 8 << 10 // all of it fits into the first window
			server.c.ep.SocketOptions().SetSendBufferSize(8<<10, false)
			const size = 100_000
			if n, err := server.Write(make([]byte, size)); n != size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			if closed {
				if err := server.Close(); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, b) // the peer is silent
			b.farewell()
			settle(t, b)
			b.depart()
			settle(t, b)
			settle(t, a)
			if received >= size || len(ends) != 1 || !errors.Is(ends[0], syscall.ECONNRESET) {
				t.Errorf("peer received %d of %d bytes and then %v, want fewer and ECONNRESET", received, size, ends)
			}
		})
	}
}

// TestNothingBeginsAtTheEnd: once a stack closes or has lost its device,
// nothing new begins that nobody would end.
func TestNothingBeginsAtTheEnd(t *testing.T) {
	for _, state := range []struct {
		name string
		end  func(t *testing.T, b *Set, client, server *NetConn)
	}{
		{"closing", func(t *testing.T, b *Set, client, server *NetConn) {
			fill(t, server)
			inBackground(t, b.Close, client) // waits for the peer until the test ends
			eventually(t, "Close begins", func() (leaving bool) {
				return !b.shards[0].do(func(s *Shard) { leaving = s.leaving }) || leaving
			})
		}},
		{"device lost", func(t *testing.T, b *Set, _, server *NetConn) {
			b.fail(errors.New("gone"))
			_ = server.SetReadDeadline(time.Now().Add(patience))
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ENETDOWN) {
				t.Errorf("Read on a connection whose device is lost: %v, want ENETDOWN", err)
			}
		}},
	} {
		t.Run(state.name, func(t *testing.T) {
			a, b := startPair(t, func(cfg *Config) { smallBuffers(cfg); cfg.Drain = patience })
			client, server := netPair(t, a, b)
			l, err := a.ListenNet([]netip.Addr{addrA}, 0, 1)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			state.end(t, b, client, server)
			dial := func(remote netip.AddrPort) error {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, err := b.DialNet(ctx, netip.AddrPort{}, remote)
				return err
			}
			for _, test := range []struct {
				name  string
				begin func() error
			}{
				{"DialNet to a peer that listens", func() error { return dial(l.l.Addr()) }},
				{"DialNet to nobody", func() error { return dial(netip.MustParseAddrPort("10.1.0.77:1")) }},
				{"ListenNet", func() error {
					_, err := b.ListenNet([]netip.Addr{addrB}, 0, 1)
					return err
				}},
				{"ListenNetPacket", func() error {
					_, err := b.ListenNetPacket([]netip.Addr{addrB}, 0)
					return err
				}},
				{"DialNetPacket", func() error {
					_, err := b.DialNetPacket(netip.AddrPortFrom(addrA, 9))
					return err
				}},
			} {
				if err := test.begin(); !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s: %v, want net.ErrClosed", test.name, err)
				}
			}
		})
	}
}

// TestManySmallWrites: gVisor merges them into segments of more pieces than
// the kernel takes in one call.
func TestManySmallWrites(t *testing.T) {
	for _, test := range []struct {
		name string
		mtu  uint32
		gso  bool
	}{
		{"super-frame", 1500, true},
		{"jumbo frame", 9000, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := steppedPair(t)
			for _, s := range []*Shard{a, b} {
				for _, g := range s.groups {
					g.link.mtu, g.link.gso = test.mtu, test.gso
				}
			}
			received := 0
			listenStepped(t, b, 7, &testHandler{data: func(_ *Conn, p []byte) int { received += len(p); return len(p) }})
			client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
			settle(t, a, b)
			const writes = 6 * maxIovec
			for range writes {
				if n, err := client.Write([]byte("x")); n != 1 || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
			}
			settle(t, a, b)
			if received != writes || a.counters.TxErrors != 0 {
				t.Errorf("received %d of %d bytes with %d frames lost on the way out", received, writes, a.counters.TxErrors)
			}
		})
	}
}

// TestTCPFragments: a segment in fragments reaches its connection, in whatever
// order they come, although they are hashed without their ports.
func TestTCPFragments(t *testing.T) {
	_, b := steppedPair(t)
	r := newRawPeer(t, b)
	var want strings.Builder
	for i, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}} {
		payload := strings.Repeat(string(rune('a'+i)), 1200)
		tcp := &layers.TCP{SrcPort: rawPort, DstPort: 7, ACK: true, PSH: true, Seq: r.seq, Ack: r.ack, Window: 65535}
		if err := tcp.SetNetworkLayerForChecksum(r.ip()); err != nil {
			t.Fatal(err)
		}
		buf := gopacket.NewSerializeBuffer()
		if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, tcp, gopacket.Payload(payload)); err != nil {
			t.Fatal(err)
		}
		segment := buf.Bytes()
		for _, part := range order {
			const size = 408 // a multiple of 8 bytes (RFC 791)
			ip := r.ip()
			ip.Id = uint16(i)
			ip.FragOffset = uint16(part * size / 8)
			end := len(segment)
			if part < 2 {
				ip.Flags = layers.IPv4MoreFragments
				end = (part + 1) * size
			}
			inject(t, b, dispatch.VnetHeader{}, ethernetTo(b), ip, gopacket.Payload(segment[part*size:end]))
		}
		r.seq += uint32(len(payload))
		want.WriteString(payload)
		settle(t, b)
		if r.got != want.String() {
			t.Errorf("order %v: received %d bytes in all, want %d", order, len(r.got), len(want.String()))
		}
	}
	if c := b.count(); c.FragmentsHeld != 3 || c.Dropped != 0 {
		t.Errorf("%d fragments waited, %d dropped; want 3, 0", c.FragmentsHeld, c.Dropped)
	}
	// The first one ends before the ports, and another never comes.
	tiny, late := r.ip(), r.ip()
	tiny.Flags, late.FragOffset, late.Id = layers.IPv4MoreFragments, 10, 99
	inject(t, b, dispatch.VnetHeader{}, ethernetTo(b), tiny, gopacket.Payload(make([]byte, 2)))
	inject(t, b, dispatch.VnetHeader{}, ethernetTo(b), late, gopacket.Payload(make([]byte, 8)))
	settle(t, b)
	r.later(time.Minute)
	settle(t, b)
	if c := b.count(); c.DroppedByCause["fragment_too_small"] != 1 || c.DroppedByCause["fragment_expired"] != 1 || c.Dropped != 2 {
		t.Errorf("dropped %v, want one fragment too small and one expired", c.DroppedByCause)
	}
}

// TestDialOwnAddress: a connection of a stack to itself needs no device.
func TestDialOwnAddress(t *testing.T) {
	_, b := startPair(t, nil)
	client, server := netPair(t, b, b)
	sent := bytes.Repeat([]byte("0123456789"), 100_000)
	inBackground(t, func() {
		_, _ = client.Write(sent)
		_ = client.Close()
	}, client)
	_ = server.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("received %d of %d bytes, %v", len(got), len(sent), err)
	}
	// It says which multicast groups it is in, more than once.
	if n := b.Stats()[0].TxFrames; n > 4 {
		t.Errorf("%d frames left the stack", n)
	}
}

// TestChosenPortIsFree: port 0 is chosen at the first address of a listener,
// and must be free at the others too.
func TestChosenPortIsFree(t *testing.T) {
	_, b := startPair(t, nil)
	choose := func(first, last uint16) {
		b.shards[0].do(func(s *Shard) {
			for _, g := range s.groups {
				_ = g.stack.SetPortRange(first, last) // fails only for an empty range
			}
		})
	}
	const taken = 20_002
	l, err := b.ListenNet(addr6[1:], taken, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	both := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	choose(taken, taken)
	if _, err := b.ListenNet(both, 0, 1); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("ListenNet when no port is free: %v, want EADDRINUSE", err)
	}
	if l, err := b.ListenNet(both[:1], 0, 1); err != nil {
		t.Errorf("ListenNet when the port is free in its family: %v", err)
	} else {
		l.Close()
	}
	choose(taken-2, taken+1)
	for range 20 { // a bad choice that is not made again fails one time in four
		l, err := b.ListenNet(both, 0, 1)
		if err != nil {
			t.Fatalf("ListenNet when three of four ports are free: %v", err)
		}
		if port := l.l.addr.Port(); port == taken || port < taken-2 || port > taken+1 {
			t.Fatalf("chose port %d, want a free one from %d to %d", port, taken-2, taken+1)
		}
		l.Close()
	}
}

// patience is how long a test waits for what must happen.
const patience = 5 * time.Second

// eventually waits until f returns true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// inBackground runs f, which ends when c is closed, and waits for it when the
// test is over.
func inBackground(t *testing.T, f func(), c *NetConn) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	t.Cleanup(func() { _ = c.Close(); <-done })
}

// fill writes to a connection until its peer, which reads nothing, has no room,
// and returns how that Write ends.
func fill(t *testing.T, c *NetConn) <-chan error {
	t.Helper()
	result := make(chan error, 1)
	inBackground(t, func() {
		_, err := c.Write(make([]byte, 64<<20))
		result <- err
	}, c)
	eventually(t, "Write waits for the peer", c.writable.expected.Load)
	return result
}

// smallBuffers lets few bytes fill a connection.
func smallBuffers(cfg *Config) { cfg.SendBuffer, cfg.ReceiveBuffer = 16<<10, 16<<10 }
