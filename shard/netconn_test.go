package shard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// netPair returns both ends of a connection between two running stacks.
func netPair(t testing.TB, a, b *Set) (client, server *NetConn) {
	t.Helper()
	l, err := b.ListenNet([]netip.Addr{netip.IPv4Unspecified()}, 0, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	client, err = a.DialNet(ctx, netip.AddrPort{}, netip.AddrPortFrom(addrB, uint16(port)))
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	server = accepted.(*NetConn)
	t.Cleanup(func() { _ = client.Close(); _ = server.Close() })
	return client, server
}

func TestNetConnCarriesBytes(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	sent := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(sent) //nolint:errcheck // never fails
	var wg sync.WaitGroup
	send := func(c *NetConn) {
		if n, err := c.Write(sent); n != len(sent) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	receive := func(c net.Conn) {
		h := sha256.New()
		n, err := io.Copy(h, c)
		if err != nil || n != int64(len(sent)) || [32]byte(h.Sum(nil)) != sha256.Sum256(sent) {
			t.Errorf("received %d bytes, %v; want %d, nil and the same content", n, err, len(sent))
		}
	}
	for _, c := range []*NetConn{client, server} { // both directions at once
		wg.Go(func() { send(c) })
		wg.Go(func() { receive(c) })
	}
	wg.Wait()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("Read after the end: %v, want EOF", err)
	}
	if _, err := client.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write after CloseWrite: %v, want EPIPE", err)
	}
}

// Close returns at once, but what was written before still arrives.
func TestNetConnCloseFlushes(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) { cfg.SendBuffer = 16 << 10 }) // much is left when Close is called
	client, server := netPair(t, a, b)
	sent := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() {
		_, _ = client.Write(sent)
		_ = client.Close()
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("received %d bytes, %v; want %d", len(got), err, len(sent))
	}
}

func TestNetConnErrors(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	buf := make([]byte, 10)

	if err := server.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, err := server.Read(buf)
	var timeout net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("Read after its deadline: %v, want a timeout", err)
	}
	if err := server.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}

	// A writer that nobody reads from fills the buffers and waits.
	endless := make([]byte, 64<<20)
	if err := client.SetWriteDeadline(time.Now().Add(250 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := client.Write(endless)
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == len(endless) {
		t.Errorf("Write to a peer that does not read = %d, %v; want part of it and a timeout", n, err)
	}

	waiting := make(chan error)
	go func() {
		_, err := client.Read(buf)
		waiting <- err
	}()
	time.Sleep(10 * time.Millisecond) // the reader waits most of the time; either way it must end
	_ = client.Close()
	if err := <-waiting; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read while Close: %v, want net.ErrClosed", err)
	}
	if err := client.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v, want net.ErrClosed", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err = a.DialNet(ctx, netip.AddrPort{}, netip.AddrPortFrom(addrB, 1))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial to a closed port: %v, want ECONNREFUSED", err)
	}
	_, err = a.DialNet(ctx, netip.AddrPort{}, netip.MustParseAddrPort("192.0.2.1:1"))
	if !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dial without a route: %v, want ENETUNREACH", err)
	}
	short, cancelShort := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelShort()
	_, err = a.DialNet(short, netip.AddrPort{}, netip.AddrPortFrom(netip.MustParseAddr("10.1.0.77"), 1))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("dial to nobody: %v, want a timeout", err)
	}
}

func TestNetConnReset(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	server.sh.Load().do(func(*Shard) { server.c.Abort() })
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after the peer's reset: %v, want ECONNRESET", err)
	}
}

// Closing a stack ends its connections in an orderly way, and what waits on it.
func TestCloseSaysGoodbye(t *testing.T) {
	before := runtime.NumGoroutine()
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	accepting := make(chan error)
	go func() {
		_, err := l.Accept()
		accepting <- err
	}()
	if _, err := server.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	b.Close()
	got, err := io.ReadAll(client)
	if string(got) != "last words" || err != nil {
		t.Errorf("peer of a closed stack read %q, %v; want the last words and EOF", got, err)
	}
	if err := <-accepting; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept on a closed stack: %v", err)
	}
	if _, err := server.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write on a closed stack: %v, want net.ErrClosed", err)
	}
	if _, err := b.ListenNet([]netip.Addr{addrB}, 0, 1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("ListenNet on a closed stack: %v, want net.ErrClosed", err)
	}
	for _, c := range b.Stats() {
		if c.ConnsOpen != 0 {
			t.Errorf("%d connections open after Close", c.ConnsOpen)
		}
	}
	_ = client.Close()
	a.Close()
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("%d goroutines after Close, %d before New", runtime.NumGoroutine(), before)
}

// Closing a stack still sends what the peer has no room for yet.
func TestCloseDrains(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) { cfg.SendBuffer, cfg.ReceiveBuffer, cfg.Drain = 64<<10, 64<<10, 5*time.Second })
	client, server := netPair(t, a, b)
	sent := bytes.Repeat([]byte("0123456789"), 40_000) // more than both buffers and one ring, less than with both
	if n, err := server.Write(sent); n != len(sent) || err != nil {
		t.Fatalf("Write = %d, %v", n, err)
	}
	received := make(chan []byte)
	go func() {
		var got []byte
		buf := make([]byte, 8<<10)
		for {
			n, err := client.Read(buf)
			got = append(got, buf[:n]...)
			if err != nil {
				break
			}
			time.Sleep(time.Millisecond) // a slow reader: there is always something left to wait for
		}
		received <- got
	}()
	b.Close()
	if got := <-received; !bytes.Equal(got, sent) {
		t.Errorf("peer received %d bytes, want %d", len(got), len(sent))
	}
}

func TestDialLimit(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) {
		if cfg.Addrs[0].Addr() == addrA {
			cfg.MaxConns = 3
		}
	})
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := netip.AddrPortFrom(addrB, uint16(l.Addr().(*net.TCPAddr).Port))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for range 3 {
		if _, err := a.DialNet(ctx, netip.AddrPort{}, remote); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.DialNet(ctx, netip.AddrPort{}, remote); !errors.Is(err, syscall.ENOBUFS) {
		t.Errorf("dial beyond MaxConns: %v, want ENOBUFS", err)
	}
	if got := a.Stats()[0].ConnsRefused; got != 1 {
		t.Errorf("counted %d refused connections, want 1", got)
	}
}

// What arrives beyond MaxConns is reset, and leaves no trace.
func TestAcceptLimit(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) {
		if cfg.Addrs[0].Addr() == addrB {
			cfg.MaxConns = 2
		}
	})
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := netip.AddrPortFrom(addrB, uint16(l.Addr().(*net.TCPAddr).Port))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	reset := 0
	for range 5 {
		c, err := a.DialNet(ctx, netip.AddrPort{}, remote)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNRESET) {
			reset++
		}
	}
	if c := b.Stats()[0]; reset != 3 || c.ConnsRefused != 3 || c.ConnsOpen != 2 {
		t.Errorf("%d of 5 reset, %d counted, %d open; want 3, 3, 2", reset, c.ConnsRefused, c.ConnsOpen)
	}
}

// A listener that nobody accepts from resets what its backlog has no room for.
func TestBacklog(t *testing.T) {
	a, b := startPair(t, nil)
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := netip.AddrPortFrom(addrB, uint16(l.Addr().(*net.TCPAddr).Port))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	reset := 0
	for range 6 {
		c, err := a.DialNet(ctx, netip.AddrPort{}, remote)
		if err != nil {
			reset++
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNRESET) {
			reset++
		}
	}
	if refused := b.Stats()[0].ConnsRefused; reset != 4 || refused != 4 {
		t.Errorf("%d of 6 connections were reset, %d counted; want 4 with a backlog of 2", reset, refused)
	}
}

func TestNetPacketConn(t *testing.T) {
	a, b := startPair(t, nil)
	for _, side := range []struct {
		name   string
		server netip.Addr
	}{{"IPv4", addrB}, {"IPv6", addr6[1]}} {
		t.Run(side.name, func(t *testing.T) {
			server, err := b.ListenNetPacket([]netip.Addr{side.server}, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			client, err := a.DialNetPacket(netip.AddrPortFrom(side.server, server.l.addr.Port()))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			for _, size := range []int{0, 1, 1472, 1473, 9000, 60_000} { // from 1473 on in fragments
				sent := bytes.Repeat([]byte{byte(size)}, size)
				if _, err := client.Write(sent); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 65535)
				deadline := time.Now().Add(2 * time.Second)
				_ = server.SetReadDeadline(deadline)
				n, from, err := server.ReadFrom(buf)
				if err != nil || n != size {
					t.Fatalf("%d bytes arrived as %d, %v", size, n, err)
				}
				if _, err := server.WriteTo(buf[:n], from); err != nil {
					t.Fatal(err)
				}
				_ = client.SetReadDeadline(deadline)
				if n, err = client.Read(buf); err != nil || !bytes.Equal(buf[:n], sent) {
					t.Fatalf("%d bytes came back as %d, %v", size, n, err)
				}
			}
			if _, err := client.Write(make([]byte, 65_508)); !errors.Is(err, syscall.EMSGSIZE) {
				t.Errorf("datagram above the limit: %v, want EMSGSIZE", err)
			}
			server.Close()
			if _, _, err := server.ReadFrom(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("ReadFrom after Close: %v, want net.ErrClosed", err)
			}
		})
	}
}

func TestPortInUse(t *testing.T) {
	_, b := startPair(t, nil)
	l, err := b.ListenNet([]netip.Addr{addrB}, 8080, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.ListenNet([]netip.Addr{netip.IPv4Unspecified()}, 8080, 1); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second listener on a port: %v, want EADDRINUSE", err)
	}
	l.Close()
	l, err = b.ListenNet([]netip.Addr{addrB}, 8080, 1)
	if err != nil {
		t.Errorf("listener on a port that was closed: %v", err)
	} else {
		l.Close()
	}
}

// A goroutine that writes and then ends its side while the shard drains the
// ring: the FIN never goes before the bytes, wherever the shard is just then.
func TestNetConnFINFollowsTheLastWrite(t *testing.T) {
	a, b := startPair(t, nil)
	n, _ := netPair(t, a, b)
	_ = n.SetLinger(0)
	_ = n.Close()
	a.Close() // so that the shard is no other than this goroutine, and writes fail at once
	n.closed.Store(false)
	var turn atomic.Int64 // the round that the writer may begin
	go func() {
		for round := int64(1); ; round++ {
			for turn.Load() < round {
			}
			if turn.Load() == math.MaxInt64 {
				return
			}
			n.out.write([]byte{1})
			n.closedWrite.Store(true)
		}
	}()
	defer turn.Store(math.MaxInt64)
	for round := range int64(200_000) {
		n.finSent = false
		n.closedWrite.Store(false)
		turn.Store(round + 1)
		for !n.finSent {
			n.drain()
		}
		if left := n.out.len(); left > 0 {
			t.Fatalf("round %d: FIN with %d bytes still in the ring", round, left)
		}
	}
}

// TestNetConnLends: large pieces go from a net.Conn to the netstack without a copy, and
// their memory comes back.
func TestNetConnLends(t *testing.T) {
	a, b := steppedPair(t)
	var server, client *NetConn
	listenStepped(t, b, 7, &netHandler{accept: func(c *NetConn) bool { server = c; return true }})
	client = newNetConn()
	client.established = make(chan error, 1)
	local, _ := a.set.source(addrB)
	remote := netip.AddrPortFrom(addrB, 7)
	if _, err := a.groups[1].dial(local, portsInto(a.groups[1], local, remote, 1), false, remote, &netHandler{}, client); err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	for range 10 { // opens the congestion window
		if _, err := client.Write(make([]byte, 60_000)); err != nil {
			t.Fatal(err)
		}
		settle(t, a, b)
		if _, err := io.ReadFull(server, make([]byte, 60_000)); err != nil {
			t.Fatal(err)
		}
	}
	content := noise(60_000)
	if n, err := client.Write(content); n != len(content) || err != nil {
		t.Fatalf("Write = %d, %v", n, err)
	}
	written := client.out.lend(len(client.out.peek()))
	defer written.Release()
	a.turn()
	if client.out.first != nil || !viewSharesChunk(written) {
		t.Error("the netstack has a copy of what was written")
	}
	settle(t, a, b)
	got := make([]byte, len(content))
	if n, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, content) {
		t.Errorf("read %d bytes (%v), or others than were written", n, err)
	}
	for range 2 * int(ackDelay/(10*time.Microsecond)) { // the acknowledgement is delayed
		a.turn()
		b.turn()
	}
	if viewSharesChunk(written) {
		t.Error("the netstack still has what was acknowledged")
	}
}

// TestSmallBlocksAndWrites: small blocks take no more memory than writes of the same
// bytes, also between such writes to a peer that does not read.
func TestSmallBlocksAndWrites(t *testing.T) {
	a, b := startPair(t, smallBuffers)
	client, server := netPair(t, a, b)
	piece := NewBlock(noise(20))
	want := append(noise(20), noise(20)...)
	wrote, memory, waiting := 0, 0, 0
	for waiting < netRing/2 { // what the peer takes unread has an end
		for client.out.free() >= len(want) {
			if _, err := client.WriteBlock(piece); err != nil {
				t.Fatal(err)
			}
			if _, err := client.Write(want[len(want)/2:]); err != nil {
				t.Fatal(err)
			}
			wrote += len(want)
		}
		a.shards[0].do(func(*Shard) { memory, waiting = client.out.memory(), client.out.len() })
	}
	if memory > 2*netRing {
		t.Errorf("%d bytes wait in %d bytes of blocks, want at most %d", waiting, memory, 2*netRing)
	}
	got := make([]byte, len(want))
	for read := 0; read+len(got) <= wrote; read += len(got) {
		if _, err := io.ReadFull(server, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("bytes from %d on are not what was written", read)
		}
	}
}

// TestCloseWaitsForWrite: bytes of a write that has begun before Close or CloseWrite
// are not lost behind the FIN.
func TestCloseWaitsForWrite(t *testing.T) {
	for _, test := range []struct {
		name   string
		end    func(*NetConn) error
		cancel bool // the write has nothing to write
	}{
		{"Close", (*NetConn).Close, false},
		{"CloseWrite", (*NetConn).CloseWrite, false},
		{"Close, no bytes", (*NetConn).Close, true},
		{"CloseWrite, no bytes", (*NetConn).CloseWrite, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			end, cancel := test.end, test.cancel
			a, b := startPair(t, nil)
			client, server := netPair(t, a, b)
			last := "the last words"
			if err := client.beginWrite(); err != nil { // the write is under way
				t.Fatal(err)
			}
			if err := end(client); err != nil {
				t.Fatal(err)
			}
			for range 3 { // turns in which the shard looks
				client.kick()
				a.shards[0].do(func(*Shard) {})
			}
			if cancel {
				last = ""
				client.cancelWrite()
			} else {
				client.out.write([]byte(last))
				client.kick()
			}
			if got, err := io.ReadAll(server); string(got) != last || err != nil {
				t.Errorf("the peer reads %q, %v; want %q and the end", got, err, last)
			}
		})
	}
}
