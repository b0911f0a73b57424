package shard

import (
	"testing"
	"time"

	"github.com/google/gopacket/layers"
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

func largestPayload(segments []*layers.TCP) (n int) {
	for _, s := range segments {
		n = max(n, len(s.Payload))
	}
	return n
}
