package shard

import (
	"math/bits"
	"time"
)

// This file bounds what near peers have on the way to a shard. Nothing is gained by
// more than keeps the shard busy while the peer runs, and what waits in the device's
// queue leaves the caches: one stream comes in fastest with a window of 1 MiB, and
// 8 and more with 128 KiB each.

const (
	// bulkBytes is how many bytes a connection receives in a period that make it a
	// stream. bulkPeriod gives 128 streams the time to come by.
	bulkBytes  = 64 << 10
	bulkPeriod = int64(20 * time.Millisecond)

	// firstReceiveBuffer is the receive buffer that connections begin with. The window
	// is half of it.
	firstReceiveBuffer = 256 << 10
)

// bulkCount counts the streams that a shard receives. Owned by the shard.
type bulkCount struct {
	period    uint32 // its number
	ends      int64
	now, last int // streams in this period and in the one before
}

// received adapts the window of a connection whose application has read n bytes: to
// the distance of a far peer, to the number of streams from near ones.
func (c *Conn) received(n int) {
	if !c.near {
		c.ep.ModerateRecvBuf(n)
		return
	}
	s := c.g.shard
	b := &s.bulk
	if s.now >= b.ends {
		b.last = b.now
		if s.now >= b.ends+bulkPeriod {
			b.last = 0 // long ago
		}
		b.now = 0
		b.ends = s.now + bulkPeriod
		b.period++
	}
	if c.bulkPeriod != b.period {
		c.bulkPeriod, c.bulkBytes = b.period, 0
	}
	before := c.bulkBytes
	c.bulkBytes += n
	if c.bulkBytes < bulkBytes {
		return
	}
	if before < bulkBytes {
		b.now++
	}
	if b.last > 0 && !c.ownWindow {
		c.growWindow(max(b.last, b.now))
	}
}

// growWindow lets the receive buffer grow to one of so many equal parts of what a single
// stream has. It does not shrink: gVisor drops what exceeds the buffer, also what the
// peer was promised a place for.
func (c *Conn) growWindow(streams int) {
	// In steps, so that it seldom changes; and the window has room for four segments.
	whole := c.g.set.cfg.ReceiveBuffer
	share := int64(min(whole, max(whole>>bits.Len(uint(streams-1)), 8*sending(c.ep).MaxPayloadSize)))
	options := c.ep.SocketOptions()
	if share <= options.GetReceiveBufferSize() {
		return
	}
	options.SetReceiveBufferSize(share, false)
	if c.unacknowledged() == 0 {
		c.ack() // nothing else would tell the peer
	}
}
