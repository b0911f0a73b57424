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
	// bulkFrame is the payload in bytes from which on a frame is of a stream, rather
	// than a request or its answer.
	bulkFrame = 16 << 10

	// bulkPeriod is for how long streams are counted. 128 of them send a frame each in
	// a few milliseconds.
	bulkPeriod = int64(20 * time.Millisecond)

	// minReceiveShare is the smallest receive buffer that a stream comes to. The window
	// is half of it.
	minReceiveShare = 256 << 10
)

// bulkCount counts the connections of a shard that receive streams. Owned by the
// shard.
type bulkCount struct {
	period    uint32 // its number
	ends      int64
	now, last int // connections in this period and in the one before
}

// receivedBulk notes that a connection got a frame of a stream.
func (s *Shard) receivedBulk(c *Conn) {
	b := &s.bulk
	if s.now >= b.ends {
		b.period++
		b.ends = s.now + bulkPeriod
		b.last, b.now = b.now, 0
	}
	if c.flow.bulkPeriod != b.period {
		c.flow.bulkPeriod = b.period
		b.now++
	}
	c.flow.bulk = true
}

// shareWindow sets the receive buffer of a connection with a near peer to its share
// of what a single stream has.
func (c *Conn) shareWindow() {
	c.flow.bulk = false
	if !c.near || c.ownWindow {
		return
	}
	b, whole := &c.g.shard.bulk, c.g.set.cfg.ReceiveBuffer
	streams := uint(max(b.last, b.now, 1))
	// In steps, so that it seldom changes; and the window has room for four segments.
	share := min(whole, max(whole>>bits.Len(streams-1), minReceiveShare, 8*sending(c.ep).MaxPayloadSize))
	if share != c.receiveBuffer {
		c.setReceiveBuffer(share)
	}
}

// setReceiveBuffer leaves it to the next acknowledgement to tell the peer.
func (c *Conn) setReceiveBuffer(size int) {
	c.receiveBuffer = size
	c.ep.SocketOptions().SetReceiveBufferSize(int64(size), false)
}
