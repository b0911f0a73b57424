package shard

import (
	"testing"
	"time"

	"github.com/google/gopacket/layers"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// TestBlackHole: full segments vanish without a word from any router, so they
// become smaller, twice for IPv4. A connection that waits for less than a full
// segment has another problem.
func TestBlackHole(t *testing.T) {
	for _, test := range []struct {
		name   string
		size   int // of what is written
		limits []int
	}{
		{"full segments", 5000, []int{blackHoleMTU - 40, blackHoleMTU4 - 40}},
		{"a small one", 500, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, b := steppedPair(t)
			for _, g := range b.groups {
				g.link.gso = false // one frame per segment
			}
			r := newRawPeer(t, b)
			if n, err := r.conn.Write(make([]byte, test.size)); n != test.size || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
			r.conn.Close() // what is left to send counts
			largest := largestPayload(r.receive())
			if want := min(test.size, 1460); largest != want {
				t.Fatalf("segments of up to %d bytes, want %d", largest, want)
			}
			var limits []int
			for range 200 { // 20 seconds
				r.later(100 * time.Millisecond)
				segments := r.receive()
				if n := largestPayload(segments); n > 0 && n < largest {
					largest = n
					limits = append(limits, n)
				}
			}
			if len(limits) != len(test.limits) || b.count().BlackHoles != uint64(len(test.limits)) {
				t.Fatalf("segments shrank to %v, counted %d times; want %v", limits, b.count().BlackHoles, test.limits)
			}
			for i, n := range limits {
				if n > test.limits[i] || n < test.limits[i]-40 { // TCP options
					t.Errorf("segments shrank to %v, want %v", limits, test.limits)
				}
			}
		})
	}
}

// TestBlackHoleTimeouts: two timeouts in a row are a connection's own, and for
// the same bytes, a full segment of them.
func TestBlackHoleTimeouts(t *testing.T) {
	_, b := steppedPair(t)
	r := newRawPeer(t, b)
	g := r.conn.g
	timeouts := func() uint64 { return r.conn.ep.Stats().(*tcp.Stats).SendErrors.Timeouts.Value() }
	write := func(size int) {
		t.Helper()
		if n, err := r.conn.Write(make([]byte, size)); n != size || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		r.receive()
	}
	timeOut := func(what string, want uint64) {
		t.Helper()
		for before := timeouts(); timeouts() == before; r.receive() {
			r.later(100 * time.Millisecond)
		}
		if n := b.count().BlackHoles; n != want {
			t.Fatalf("%d black holes after %s, want %d", n, what, want)
		}
	}
	arrived := func(size uint32) {
		t.Helper()
		r.ack += size
		r.send(&layers.TCP{ACK: true}, 0, "")
		r.receive()
	}
	write(1460)
	timeOut("a timeout", 0)
	arrived(1460)
	write(1460)
	g.tcp.stats.Timeouts.Increment() // another connection's
	g.lookForBlackHoles()
	timeOut("a timeout for other bytes", 0)
	arrived(1460)
	write(100)
	timeOut("a timeout for a small segment", 0)
	timeOut("another one", 0)
	arrived(100)
	write(1460)
	timeOut("a first timeout", 0)
	for range 5 {
		g.tcp.stats.Timeouts.Increment()
		g.lookForBlackHoles()
	}
	if n := b.count().BlackHoles; n != 0 {
		t.Fatalf("%d black holes after a timeout and others' timeouts", n)
	}
	timeOut("a second timeout in a row", 1)
	timeOut("the first one of smaller segments", 1)
	timeOut("the second one", 2)
}

// TestWindowTakenBack: a segment is lost, and before it is sent again the peer
// has taken back a part of its window: what fits the rest is sent.
func TestWindowTakenBack(t *testing.T) {
	for _, window := range []uint16{1000, 100} {
		_, b := steppedPair(t)
		r := newRawPeer(t, b)
		if n, err := r.conn.Write(make([]byte, 1460)); n != 1460 || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		r.receive() // and lost
		want := r.ack + 1460
		r.send(&layers.TCP{ACK: true, Window: window}, 0, "")
		for range 20 { // 2 seconds
			r.later(100 * time.Millisecond)
			for _, s := range r.receive() {
				if n := len(s.Payload); s.Seq == r.ack && n > 0 {
					if n > int(window) {
						t.Fatalf("a segment of %d bytes for a window of %d", n, window)
					}
					r.ack += uint32(n)
					window = 1000
				}
			}
			r.send(&layers.TCP{ACK: true, Window: window}, 0, "")
			if window == 100 {
				window = 600 // opens a little
			}
		}
		if r.ack != want {
			t.Errorf("%d bytes have not come", want-r.ack)
		}
		if b.count().WindowsShrunk == 0 {
			t.Error("a window that was taken back is not counted")
		}
	}
}

func largestPayload(segments []*layers.TCP) (n int) {
	for _, s := range segments {
		n = max(n, len(s.Payload))
	}
	return n
}
