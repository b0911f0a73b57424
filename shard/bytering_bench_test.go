package shard

import (
	"fmt"
	"testing"
)

// BenchmarkByteRing moves a message through a ring that is empty before and
// after, as a connection does that answers requests.
func BenchmarkByteRing(b *testing.B) {
	for _, size := range []int{64, 16 << 10, 64 << 10} {
		for _, release := range []bool{false, true} {
			b.Run(fmt.Sprintf("size=%d/release=%v", size, release), func(b *testing.B) {
				r := new(byteRing)
				r.limit.Store(netRing)
				buf := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					r.write(buf)
					r.read(buf)
					if release {
						r.release()
					}
				}
			})
		}
	}
}
