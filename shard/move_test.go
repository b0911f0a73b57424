package shard

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"numastack/dispatch"
)

// startWide returns two running stacks of n shards each, connected queue by
// queue. The shards steer by themselves: what a shard of one side sends, the
// shard with the same number reads on the other.
func startWide(t testing.TB, n, groups int, tune ...func(*Config)) (a, b *Set) {
	t.Helper()
	var fds [2][]int
	for range n {
		fdA, fdB := socketPair(t)
		fds[0], fds[1] = append(fds[0], fdA), append(fds[1], fdB)
	}
	start := func(side int) *Set {
		cfg := testConfig(t, side, fds[side][0])
		for _, fd := range fds[side][1:] {
			cfg.Queues = append(cfg.Queues, dispatch.NewQueue(fd))
			cfg.CPUs = append(cfg.CPUs, cfg.CPUs[0])
		}
		var err error
		if cfg.RETA, err = dispatch.NewRETA(groups, n); err != nil {
			t.Fatal(err)
		}
		for _, f := range tune {
			f(&cfg)
		}
		set, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(set.Close)
		return set
	}
	return start(0), start(1)
}

// sum adds up the counters of a side.
func sum(set *Set) (total Counters, outOfOrder uint64) {
	for _, c := range set.Stats() {
		total.ConnsOpen += c.ConnsOpen
		total.GroupsAdopted += c.GroupsAdopted
		total.GroupsReleased += c.GroupsReleased
		total.FramesKept += c.FramesKept
		total.RingFull += c.RingFull
		total.Dropped += c.Dropped
		for _, g := range c.Groups {
			outOfOrder += g.OutOfOrder
		}
	}
	return total, outOfOrder
}

// TestMoveUnderFire moves groups of both sides at random while streams and
// requests pass, and looks at every byte.
func TestMoveUnderFire(t *testing.T) {
	const shards, groups = 3, 12
	a, b := startWide(t, shards, groups)
	l, err := b.ListenNet([]netip.Addr{netip.IPv4Unspecified()}, 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	remote := netip.AddrPortFrom(addrB, uint16(l.Addr().(*net.TCPAddr).Port))
	var wg sync.WaitGroup
	var stop atomic.Bool
	exchange := func(size int) {
		c, err := a.DialNet(t.Context(), netip.AddrPort{}, remote)
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		sent, got := make([]byte, size), make([]byte, size)
		rounds := 0
		for source := rand.NewChaCha8([32]byte{byte(size)}); !stop.Load(); rounds++ {
			_, _ = source.Read(sent) // never fails
			written := make(chan error, 1)
			go func() { _, err := c.Write(sent); written <- err }()
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(sent, got) {
				t.Errorf("round %d of %d bytes came back different, or not at all: %v", rounds, size, err)
				return
			}
			if err := <-written; err != nil {
				t.Error(err)
				return
			}
		}
		if rounds == 0 {
			t.Errorf("no round of %d bytes", size)
		}
	}
	for range 4 {
		wg.Go(func() { exchange(400_000) })
	}
	for i := range 12 {
		wg.Go(func() { exchange(64 + i) })
	}
	moves := 200
	if testing.Short() {
		moves = 50
	}
	done := [2]int{}
	for range moves {
		side := rand.IntN(2)
		set := []*Set{a, b}[side]
		group, to := rand.IntN(groups), rand.IntN(shards)
		if set.reta.Owner(group) != to {
			done[side]++
		}
		if err := set.Move(group, to); err != nil {
			t.Fatal(err)
		}
		if owner := set.reta.Owner(group); owner != to {
			t.Fatalf("group %d moved to shard %d is on %d", group, to, owner)
		}
		time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
	}
	stop.Store(true)
	wg.Wait()
	kept := uint64(0)
	for side, set := range []*Set{a, b} {
		eventually(t, "end of all connections", func() bool { c, _ := sum(set); return c.ConnsOpen == 0 })
		c, outOfOrder := sum(set)
		if n := uint64(done[side]); c.GroupsAdopted != n || c.GroupsReleased != n {
			t.Errorf("%d groups adopted and %d released in %d moves", c.GroupsAdopted, c.GroupsReleased, n)
		}
		// Retransmissions are not counted: on a machine with fewer CPUs than
		// shards, one that waits for its turn looks like loss to the peer.
		if outOfOrder != 0 || c.Dropped != 0 || c.RingFull != 0 {
			t.Errorf("%d segments out of order, %d frames dropped, %d at full rings; want none", outOfOrder, c.Dropped, c.RingFull)
		}
		kept += c.FramesKept
		for _, s := range set.shards {
			s.do(func(s *Shard) {
				for i, k := range s.awaited {
					if k != nil {
						t.Errorf("shard %d still waits for group %d", s.id, i)
					}
				}
				for _, g := range s.groups {
					if g.shard != s || !s.owns[g.id] {
						t.Errorf("group %d is not at home on shard %d", g.id, s.id)
					}
				}
			})
		}
	}
	t.Logf("%d moves, %d frames kept for groups on their way", done[0]+done[1], kept)
}

// moveHandler records what door 1 is told.
type moveHandler struct {
	testHandler
	moved chan int
}

func (h *moveHandler) Move(c *Conn) { h.moved <- c.Shard() }

// TestMoveTellsTheApplication: doors 1 and 3 say where the connection lives, and
// a function for the connection runs there.
func TestMoveTellsTheApplication(t *testing.T) {
	a, b := startWide(t, 2, 4)
	h := &moveHandler{moved: make(chan int, 1)}
	conns := make(chan *Conn, 1)
	h.open = func(c *Conn) { conns <- c }
	l, err := b.Listen([]netip.Addr{addrB}, 0, 16, h)
	if err != nil {
		t.Fatal(err)
	}
	client, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server := <-conns

	from := 0
	if !server.Do(func() { from = server.Shard() }) {
		t.Fatal("Do did not run")
	}
	if err := b.Move(server.g.id, 1-from); err != nil {
		t.Fatal(err)
	}
	if to := <-h.moved; to != 1-from {
		t.Errorf("Move event on shard %d, want %d", to, 1-from)
	}
	thread := 0
	b.shards[1-from].do(func(*Shard) { thread = gettid() })
	if !server.Do(func() {
		if server.Shard() != 1-from || gettid() != thread {
			t.Errorf("function ran on thread %d, shard %d; want thread %d, shard %d", gettid(), server.Shard(), thread, 1-from)
		}
	}) {
		t.Error("Do did not run after the move")
	}

	from = client.Shard()
	if err := a.Move(client.c.g.id, 1-from); err != nil {
		t.Fatal(err)
	}
	if client.Shard() != 1-from {
		t.Errorf("NetConn is on shard %d after its group moved to %d", client.Shard(), 1-from)
	}
	if err := client.SetNoDelay(true); err != nil {
		t.Error(err)
	}
}

// TestMoveRefused: what cannot be moved, and what nobody has.
func TestMoveRefused(t *testing.T) {
	a, b := startWide(t, 2, 4)
	release := make(chan struct{})
	l, err := b.Serve([]netip.Addr{addrB}, 0, 16, func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	client, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	close(release)
	local := client.LocalAddr().(*net.TCPAddr).AddrPort()
	group := b.groupOf(protoTCP, l.Addr(), local)
	eventually(t, "handler", func() bool {
		served := 0
		_ = b.groups[group].do(func(g *Group) error { served = g.served; return nil })
		return served == 1
	})
	from := b.reta.Owner(group)
	if err := b.Move(group, 1-from); !errors.Is(err, ErrServing) {
		t.Errorf("group with a handler of Serve: %v, want ErrServing", err)
	}
	if owner := b.reta.Owner(group); owner != from {
		t.Errorf("refused, and yet on shard %d", owner)
	}
	_ = client.Close()
	eventually(t, "move after the handler has ended", func() bool { return b.Move(group, 1-from) == nil })

	for _, test := range []struct {
		group, to int
		want      string
	}{
		{-1, 0, "want 0 to 3"}, {4, 0, "want 0 to 3"}, {0, -1, "want 0 to 1"}, {0, 2, "want 0 to 1"},
	} {
		if err := b.Move(test.group, test.to); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Move(%d, %d): %v, want an error with %q", test.group, test.to, err, test.want)
		}
	}
	b.Close()
	if err := b.Move(group, from); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Move after Close: %v, want net.ErrClosed", err)
	}
}

// TestMoveKeepsOrder moves a group by hand and lets frames for it arrive at
// every place where one may be.
func TestMoveKeepsOrder(t *testing.T) {
	a, b := startWide(t, 3, 6)
	_ = a
	group := 0
	from, to, third := b.shards[0], b.shards[1], b.shards[2]
	if owner := b.reta.Owner(group); owner != from.id {
		t.Fatalf("group %d on shard %d", group, owner)
	}
	// Frames to a UDP port carry their number; the hash is given, not computed.
	var order []byte
	u, err := b.ListenUDP([]netip.Addr{addrB}, 9, func(_ *Socket, p []byte, _ netip.AddrPort) { order = append(order, p[0]) })
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	frame := func(n byte) *handover {
		f := udpFrame(t, b, n)
		h := &handover{frame: f}
		b.toeplitz.Parse(f, &h.parsed)
		h.parsed.Hash = uint32(group)
		return h
	}
	arrive := func(s *Shard, n byte) { s.do(func(s *Shard) { s.route(frame(n), true) }) }

	arrive(third, 1) // on its way through a ring to the old owner when the move begins
	m := &move{g: b.groups[group], from: from, to: to, done: make(chan struct{})}
	var began error
	from.do(func(s *Shard) {
		began = s.begin(m)
		if began == nil {
			m.busy.Add(1) // holds the move in its middle
			s.route(frame(2), true)
		}
	})
	if began != nil {
		t.Fatal(began)
	}
	arrive(to, 6)    // the new owner's queue
	arrive(third, 4) // forwarded by the new table
	call := make(chan error, 1)
	go func() { call <- b.groups[group].do(func(g *Group) error { order = append(order, 7); return nil }) }()
	arrive(from, 3)
	eventually(t, "frame at the new owner", func() bool {
		n := 0
		to.do(func(s *Shard) {
			if k := s.awaited[group]; k != nil {
				n = len(k.forwarded) + len(k.own) + len(k.tasks)
			}
		})
		return n == 3
	})
	m.busy.Add(-1)
	<-m.done
	if err := <-call; err != nil {
		t.Fatal(err)
	}
	arrive(from, 8) // late, by the ring
	eventually(t, "last frame", func() bool {
		n := 0
		_ = b.groups[group].do(func(*Group) error { n = len(order); return nil })
		return n == 7
	})
	want := []byte{1, 2, 3, 4, 6, 7, 8} // what was asked of the group comes after the frames
	if !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	c, _ := sum(b)
	if c.FramesKept != 2 || c.Dropped != 0 {
		t.Errorf("%d frames kept, %d dropped; want 2, 0", c.FramesKept, c.Dropped)
	}
}

// TestMoveBounds: what is kept for a group on its way has a limit and a counter,
// and goes back when the group does not come.
func TestMoveBounds(t *testing.T) {
	_, b := startWide(t, 2, 4)
	group := 0
	to := b.shards[1]
	b.reta.SetOwner(group, to.id) // announced, and never sent
	to.do(func(s *Shard) {
		for range maxAwaited + 5 {
			h := &handover{frame: udpFrame(t, b, 1)}
			b.toeplitz.Parse(h.frame, &h.parsed)
			h.parsed.Hash = uint32(group)
			s.route(h, true)
		}
	})
	c := b.Stats()[to.id]
	if c.FramesKept != maxAwaited || c.DroppedByCause["moving"] < 5 { // and the peer's reports
		t.Errorf("%d frames kept, dropped %v; want %d and at least 5 for moving", c.FramesKept, c.DroppedByCause, maxAwaited)
	}
	to.do(func(s *Shard) {
		from := &Socket{g: b.groups[group], closed: true}
		for range maxAwaited + 3 {
			d := newDatagram([]byte("x"), netip.AddrPort{})
			d.from = from
			d.run(s)
		}
		if n := len(s.awaited[group].tasks); n != maxAwaited || s.counters.DatagramsDropped != 3 {
			t.Errorf("%d datagrams kept, %d dropped; want %d, 3", n, s.counters.DatagramsDropped, maxAwaited)
		}
	})
	b.reta.SetOwner(group, 0) // it does not come, as when the kernel refuses
	to.do(func(s *Shard) { s.play(b.groups[group]) })
	eventually(t, "return of the frames", func() bool {
		frames := uint64(0)
		_ = b.groups[group].do(func(g *Group) error { frames = g.frames; return nil })
		return frames >= maxAwaited
	})
}

// TestCloseDuringMoves: nothing hangs, nobody is forgotten.
func TestCloseDuringMoves(t *testing.T) {
	for range 20 {
		a, b := startWide(t, 2, 4)
		_, server := netPair(t, a, b)
		ended := make(chan error, 1)
		go func() {
			for i := 0; ; i++ {
				if err := b.Move(i%4, rand.IntN(2)); err != nil {
					ended <- err
					return
				}
			}
		}()
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
		b.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("moves ended with %v, want net.ErrClosed", err)
		}
		if _, err := server.Read(make([]byte, 1)); err == nil {
			t.Fatal("the connection is still open")
		}
		a.Close()
		for _, c := range b.final {
			if c.ConnsOpen != 0 {
				t.Fatalf("%d connections open on shard %d after Close", c.ConnsOpen, c.Shard)
			}
		}
	}
}

// udpFrame is a datagram of one byte to port 9.
func udpFrame(t *testing.T, set *Set, n byte) []byte {
	t.Helper()
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: rawPeerAddr.AsSlice(), DstIP: addrB.AsSlice()}
	udp := &layers.UDP{SrcPort: rawPort, DstPort: 9}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		ethernetTo(set.shards[0]), ip, udp, gopacket.Payload([]byte{n})); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
