package shard

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"

	"numastack/dispatch"
)

// streamTo returns a connection from a to b, after its handshake, and what b has
// received on it and how it has ended.
func streamTo(t testing.TB, a, b *Shard, h *testHandler) (client *Conn, got *bytes.Buffer) {
	t.Helper()
	got = new(bytes.Buffer)
	listenStepped(t, b, 7, &testHandler{data: func(_ *Conn, p []byte) int { got.Write(p); return len(p) }})
	client = dialStepped(t, a, netip.AddrPortFrom(addrB, 7), h)
	settle(t, a, b)
	return client, got
}

func noise(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(b)
	return b
}

// TestSegmentsOfWrites: what is written in one turn leaves in segments that are as
// large as they may be, however it was cut into writes.
func TestSegmentsOfWrites(t *testing.T) {
	const full = 46 * 1420 // gVisor leaves room for all options in an MTU of 1500
	repeat := func(n, size int) (sizes []int) {
		for range n {
			sizes = append(sizes, size)
		}
		return sizes
	}
	for _, test := range []struct {
		name   string
		writes []int
		want   []int
	}{
		{"one", []int{100}, []int{100}},
		{"many small ones", repeat(500, 10), []int{5000}},
		{"one byte at a time", repeat(3000, 1), []int{3000}},
		{"headers and a body", []int{200, 8000}, []int{8200}},
		{"powers of two", repeat(2, 64<<10), []int{full, full, 2*(64<<10) - 2*full}},
		{"buffers of io.Copy", repeat(4, 32<<10), []int{full, full, 4*(32<<10) - 2*full}},
		{"one large one", []int{200_000}, []int{full, full, full, 200_000 - 3*full}},
		{"small ones behind a large one", append([]int{70_000}, repeat(10, 7)...), []int{full, 70_070 - full}},
	} {
		for _, blocks := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/blocks=%t", test.name, blocks), func(t *testing.T) {
				a, b := steppedPair(t)
				later := delayed(a, b)
				client, got := streamTo(t, a, b, &testHandler{})
				for range 30 { // opens the congestion window, and in a few periods the receiver's
					*later += time.Duration(bulkPeriod)
					if _, err := client.Write(make([]byte, 100_000)); err != nil {
						t.Fatal(err)
					}
					settle(t, a, b)
				}
				got.Reset()
				total := 0
				for _, size := range test.writes {
					total += size
				}
				content := noise(total)
				rest := content
				for _, size := range test.writes {
					var n int
					var err error
					if blocks {
						n, err = client.WriteBlock(NewBlock(rest[:size]), 0)
					} else {
						n, err = client.Write(rest[:size])
					}
					if n != size || err != nil {
						t.Fatalf("write of %d bytes = %d, %v", size, n, err)
					}
					rest = rest[size:]
				}
				a.turn()
				frames := wire(t, a)
				var sizes []int
				for _, f := range frames {
					h := &handover{frame: f[dispatch.VnetHeaderLen:]}
					a.set.toeplitz.Parse(h.frame, &h.parsed)
					sizes = append(sizes, h.parsed.Length-int(h.parsed.Payload))
				}
				if !slices.Equal(sizes, test.want) {
					t.Errorf("segments of %v bytes, want %v", sizes, test.want)
				}
				for _, f := range frames {
					write(t, b, f)
				}
				settle(t, a, b)
				if !bytes.Equal(got.Bytes(), content) {
					t.Errorf("%d bytes arrived, or others than the %d that were written", got.Len(), total)
				}
			})
		}
	}
}

// TestSegmentsOfLargestMTU: a stream has no small segments when one for the wire is
// larger than gVisor's sender takes at once.
func TestSegmentsOfLargestMTU(t *testing.T) {
	for _, gso := range []bool{true, false} {
		a, b := steppedPair(t)
		for _, s := range []*Shard{a, b} {
			for _, g := range s.groups {
				g.link.mtu, g.link.gso = 65521, gso
			}
		}
		client, got := streamTo(t, a, b, &testHandler{})
		const size, writes = 64 << 10, 50
		before := a.counters.TxFrames
		for range writes {
			if n, err := client.Write(make([]byte, size)); n != size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			if _, err := client.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			settle(t, a, b)
		}
		if got.Len() != 2*size*writes {
			t.Fatalf("%d bytes arrived, want %d", got.Len(), 2*size*writes)
		}
		if frames := a.counters.TxFrames - before; frames > 3*writes+10 {
			t.Errorf("offload %t: %d frames for %d bytes, want 3 for each %d", gso, frames, got.Len(), 2*size)
		}
	}
}

// TestBlockIsShared: many connections send the same block, at their own speeds and
// from different offsets, and each peer gets it as it is.
func TestBlockIsShared(t *testing.T) {
	for _, size := range []int{1, 1000, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			a, b := steppedPair(t)
			content := noise(size)
			block := NewBlock(content)
			if block.Len() != size {
				t.Fatalf("Len = %d, want %d", block.Len(), size)
			}
			const conns = 8
			var got [conns]bytes.Buffer
			wrote := make([]int, conns) // how far each has come
			for i := range conns {
				listenStepped(t, b, uint16(100+i), &testHandler{data: func(_ *Conn, p []byte) int { got[i].Write(p); return len(p) }})
				offset := i * size / conns
				wrote[i] = offset
				more := func(c *Conn) {
					for wrote[i] < size {
						n, err := c.WriteBlock(block, wrote[i])
						if err != nil {
							t.Error(err)
						}
						if wrote[i] += n; n == 0 {
							return
						}
					}
				}
				dialStepped(t, a, netip.AddrPortFrom(addrB, uint16(100+i)), &testHandler{open: more, writable: more})
			}
			settle(t, a, b)
			for i := range conns {
				if want := content[i*size/conns:]; !bytes.Equal(got[i].Bytes(), want) {
					t.Errorf("connection %d: %d bytes arrived, or others than the %d that were sent", i, got[i].Len(), len(want))
				}
			}
			if !bytes.Equal(block.view.AsSlice(), content) {
				t.Error("the block has changed")
			}
			for range 2 * int(ackDelay/(10*time.Microsecond)) { // what is acknowledged with a delay
				a.turn()
				b.turn()
			}
			if viewSharesChunk(block.view) {
				t.Error("the block is still in use, although everything has arrived")
			}
		})
	}
}

// TestWriteThenEnd: what was written in the turn in which a connection ends leaves
// before its FIN, and not behind a reset.
func TestWriteThenEnd(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(c *Conn)
		want string
	}{
		"CloseWrite": {func(c *Conn) { _ = c.CloseWrite() }, "last words"},
		"Close":      {(*Conn).Close, "last words"},
		"Abort":      {(*Conn).Abort, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := steppedPair(t)
			ended := false
			got := ""
			listenStepped(t, b, 7, &testHandler{
				data:  func(_ *Conn, p []byte) int { got += string(p); return len(p) },
				close: func(*Conn, error) { ended = true },
			})
			client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
			settle(t, a, b)
			if _, err := client.Write([]byte("last words")); err != nil {
				t.Fatal(err)
			}
			test.end(client)
			settle(t, a, b)
			if !ended || test.want != "" && got != test.want {
				t.Errorf("the peer got %q and knows of the end: %t; want %q, true", got, ended, test.want)
			}
			if n, err := client.Write([]byte("too late")); n != 0 || err == nil {
				t.Errorf("Write after %s = %d, %v", name, n, err)
			}
			if n, err := client.WriteBlock(NewBlock([]byte("too late")), 0); n != 0 || err == nil {
				t.Errorf("WriteBlock after %s = %d, %v", name, n, err)
			}
		})
	}
}

// TestResetBetweenWriteAndPush: a connection may end in the turn in which something
// was written to it.
func TestResetBetweenWriteAndPush(t *testing.T) {
	a, b := steppedPair(t)
	var server *Conn
	listenStepped(t, b, 7, &testHandler{open: func(c *Conn) { server = c }})
	var closed error
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{close: func(_ *Conn, err error) { closed = err }})
	settle(t, a, b)
	server.Abort()
	b.turn() // the RST is on its way
	if _, err := client.Write([]byte("nobody reads this")); err != nil {
		t.Fatal(err)
	}
	settle(t, a, b)
	if closed == nil {
		t.Error("the reset did not end the connection")
	}
}

// TestSendShare: the send buffers of many connections whose peers do not read become
// smaller, those of few do not, and writing goes on when a peer does.
func TestSendShare(t *testing.T) {
	a, b := steppedPair(t)
	const conns = 2 * sendMemory / (768 << 10)
	reading := false
	var paused []*Conn
	received := make(map[*Conn]int)
	listenStepped(t, b, 7, &testHandler{data: func(c *Conn, p []byte) int {
		if !reading {
			paused = append(paused, c)
			return 0
		}
		received[c] += len(p)
		return len(p)
	}})
	chunk := make([]byte, 32<<10)
	const size = 4 << 20 // more than all buffers of a connection
	wrote := make(map[*Conn]int)
	more := func(c *Conn) {
		for wrote[c] < size {
			n, err := c.Write(chunk[:min(len(chunk), size-wrote[c])])
			if err != nil {
				t.Fatal(err)
			}
			if wrote[c] += n; n == 0 {
				return
			}
		}
	}
	var clients []*Conn
	for range conns {
		clients = append(clients, dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{open: more, writable: more}))
		settle(t, a, b)
	}
	if a.fullBuffers != conns {
		t.Fatalf("%d connections wait, want all %d", a.fullBuffers, conns)
	}
	if n, want := sendBufferOf(clients[0]), a.set.cfg.SendBuffer; n != want {
		t.Errorf("the first connection has a send buffer of %d bytes, want %d", n, want)
	}
	if n := sendBufferOf(clients[conns-1]); n > sendMemory/(conns-1) || n < minSendShare {
		t.Errorf("the last of %d connections has a send buffer of %d bytes, want %d to %d", conns, n, minSendShare, sendMemory/(conns-1))
	}
	reading = true
	for _, c := range paused {
		c.Resume()
	}
	settle(t, a, b)
	total := 0
	for _, n := range received {
		total += n
	}
	if total != conns*size || a.fullBuffers != 0 {
		t.Errorf("%d bytes of %d arrived, and %d connections still wait", total, conns*size, a.fullBuffers)
	}
	// Alone again, a connection takes what it wants.
	reading = false
	last := clients[conns-1]
	wrote[last] = 0
	more(last)
	settle(t, a, b)
	if n, want := sendBufferOf(last), a.set.cfg.SendBuffer; n != want || a.fullBuffers != 1 {
		t.Errorf("with %d connections that wait, one has a send buffer of %d bytes, want 1 and %d", a.fullBuffers, n, want)
	}
	last.Abort()
	settle(t, a, b)
	if a.fullBuffers != 0 {
		t.Errorf("%d connections wait after the last one has ended", a.fullBuffers)
	}
}

// TestFullBuffersAreCounted: a connection counts while its send buffer is full, whatever
// its door.
func TestFullBuffersAreCounted(t *testing.T) {
	const size = 8 << 20
	a, b := startPair(t, nil)
	full := func() (n int) {
		b.shards[0].do(func(s *Shard) { n = s.fullBuffers })
		return n
	}
	wrote := make(chan error, 1)
	dial := serve(t, a, b, func(c net.Conn) {
		_, err := c.Write(make([]byte, size))
		wrote <- err
		_, _ = c.Read(make([]byte, 1)) // until the test has looked
	})
	c := dial()
	eventually(t, "full buffer of Serve", func() bool { return full() == 1 })
	if _, err := io.ReadFull(c, make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if n := full(); n != 0 {
		t.Errorf("%d full buffers when everything was read, want 0", n)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	dial = serve(t, a, b, func(c net.Conn) {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // by then all buffers are full
		_, err := c.Write(make([]byte, size))
		wrote <- err
		_, _ = c.Read(make([]byte, 1))
	})
	c = dial()
	eventually(t, "full buffer of a write with a deadline", func() bool { return full() == 1 })
	if err := <-wrote; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the write ended with %v, want its deadline", err)
	}
	inBackground(t, func() { _, _ = io.Copy(io.Discard, c) }, c.(*NetConn))
	eventually(t, "room for what was written", func() bool { return full() == 0 })

	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = c.Write(make([]byte, size))
		}
		wrote <- err
	}()
	d, err := a.DialNet(t.Context(), netip.AddrPort{}, l.l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "full buffer of Listen", func() bool { return full() == 1 })
	if err := d.Close(); err != nil { // resets, as nothing was read
		t.Fatal(err)
	}
	if err := <-wrote; err == nil {
		t.Error("a write to a connection that was reset came to an end without an error")
	}
	eventually(t, "end of the connection", func() bool { return full() == 0 })
}

func sendBufferOf(c *Conn) int { return int(c.ep.SocketOptions().GetSendBufferSize()) }

// TestNewView names what breaks when gVisor's buffers are made in another way.
func TestNewView(t *testing.T) {
	for _, size := range []int{0, 1, 64, 65, 1500, 2048, 65_535, 65_536, 65_537, 200_000} {
		content := noise(size)
		for name, v := range map[string]*buffer.View{"viewOf": viewOf(content), "fullViewOf": fullViewOf(content)} {
			if !bytes.Equal(v.AsSlice(), content) || v.Size() != size {
				t.Errorf("%s of %d bytes has %d, or others", name, size, v.Size())
			}
			if want := buffer.NewViewSize(size).Capacity(); v.Capacity() != want {
				t.Errorf("%s of %d bytes has room for %d, want %d as gVisor's own", name, size, v.Capacity(), want)
			}
			if name == "fullViewOf" && !v.Full() {
				t.Errorf("%s of %d bytes is not full", name, size)
			}
			if viewSharesChunk(v) {
				t.Errorf("%s of %d bytes is shared from the start", name, size)
			}
			clone := v.Clone()
			if !viewSharesChunk(v) || !bytes.Equal(clone.AsSlice(), content) {
				t.Errorf("a clone of a %s of %d bytes does not share it", name, size)
			}
			v.Release()
			if viewSharesChunk(clone) {
				t.Errorf("%s of %d bytes is shared after one of two was released", name, size)
			}
			clone.Release()
		}
	}
}

// BenchmarkWrite writes, sends, receives and acknowledges.
func BenchmarkWrite(b *testing.B) {
	for _, size := range []int{64, 1 << 10, 16 << 10, 64 << 10} {
		for _, kind := range []string{"copy", "block"} {
			b.Run(fmt.Sprintf("%s/size=%d", kind, size), func(b *testing.B) {
				x, y := steppedPair(b)
				listenStepped(b, y, 7, &testHandler{})
				client := dialStepped(b, x, netip.AddrPortFrom(addrB, 7), &testHandler{})
				settle(b, x, y)
				content := noise(size)
				block := NewBlock(content)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if kind == "copy" {
						_, _ = client.Write(content)
					} else {
						_, _ = client.WriteBlock(block, 0)
					}
					x.turn()
					y.turn()
					x.turn()
				}
			})
		}
	}
}
