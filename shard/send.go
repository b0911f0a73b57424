package shard

import (
	"cmp"
	"net"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// This file is the way of what an application sends, up to gVisor's sender. Bytes
// are queued as they are written and leave together at the end of the turn, so that
// many small writes make one segment, and a stream segments that are as large as
// they may be.

// Block is bytes that connections send as they are, without a copy: a file that is
// served again and again, an answer that many get. Its content never changes.
// Blocks may be used by any goroutine, on all connections of a process.
type Block struct {
	view *buffer.View
}

// NewBlock returns a Block with a copy of b.
func NewBlock(b []byte) *Block { return &Block{view: fullViewOf(b)} }

// Len returns the number of bytes in the block.
func (b *Block) Len() int { return b.view.Size() }

// joinLimit is the size in bytes up to which a write leaves room behind it for the
// next one. Behind larger ones that room would be large, and to copy some of what
// follows into it costs more than another piece does when the frame is written.
const joinLimit = 2048

// Write copies from b what fits into the send buffer and returns how much that
// was. When it is less than len(b) the error is nil and a Writable event
// follows. The frames leave at the end of the turn.
func (c *Conn) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		room, err := c.room()
		if room == 0 || err != nil {
			return done, err
		}
		n := min(room, len(b)-done, buffer.MaxChunkSize)
		if part := b[done : done+n]; n <= joinLimit {
			c.queue(viewOf(part))
		} else {
			c.queue(fullViewOf(part))
		}
		done += n
	}
	if len(b) == 0 && (c.closing || c.done) {
		return 0, net.ErrClosed
	}
	return done, nil
}

// WriteBlock is Write of the bytes of a block from an offset on, without a copy. An
// offset beyond the block is a panic, as with slices.
func (c *Conn) WriteBlock(b *Block, offset int) (int, error) {
	if offset == b.Len() && !c.closing && !c.done {
		return 0, nil
	}
	room, err := c.room()
	if room == 0 || err != nil {
		return 0, err
	}
	v := b.view.Clone()
	v.TrimFront(offset)
	return c.lend(v, room), nil
}

// lend queues as much of v as there is room for, and returns how much that is.
func (c *Conn) lend(v *buffer.View, room int) int {
	if room < v.Size() {
		v.CapLength(room)
		c.awaitRoom()
	}
	n := v.Size()
	c.queue(v)
	return n
}

// room returns how many bytes fit into the send buffer. If there are none, and that
// is no error, a Writable event follows.
func (c *Conn) room() (int, error) {
	if c.closing || c.done {
		return 0, net.ErrClosed
	}
	room, err := sendRoom(c.ep)
	if _, full := err.(*tcpip.ErrWouldBlock); full && c.takeShare() {
		room, err = sendRoom(c.ep)
	}
	switch err.(type) {
	case nil:
		c.setFull(false)
		return room, nil
	case *tcpip.ErrWouldBlock:
		c.awaitRoom()
		return 0, nil
	case *tcpip.ErrClosedForSend: // by CloseWrite: no failure
		return 0, errno(err)
	default:
		c.failure = cmp.Or(c.failure, errno(err)) // gVisor tells it once
		return 0, errno(err)
	}
}

// sendMemory is how many bytes the send buffers of all connections of a shard with
// near peers hold, as long as that is minSendShare for each. What is on its way to
// such peers is little, and more than the caches hold is slow: 128 streams out ran
// at 20 Gbit/s with 768 KiB each and at 30 with 256.
const (
	sendMemory   = 32 << 20
	minSendShare = 128 << 10
)

// takeShare sets the send buffer of a connection with a near peer to its share of
// sendMemory among those that have theirs full, and returns whether that is more
// than it had.
func (c *Conn) takeShare() bool {
	if !c.near {
		return false
	}
	options := c.ep.SocketOptions()
	before := options.GetSendBufferSize()
	share := int64(min(c.sendBuffer, max(sendMemory/max(c.g.shard.fullBuffers, 1), minSendShare)))
	if share != before {
		options.SetSendBufferSize(share, false)
	}
	return share > before
}

// awaitRoom notes that the send buffer is full and more is to be written: a Writable
// event follows.
func (c *Conn) awaitRoom() {
	c.setFull(true)
	c.wantWrite = true
}

// setFull notes whether the send buffer had no room for what was written last.
func (c *Conn) setFull(full bool) {
	if c.full == full {
		return
	}
	if c.full = full; full {
		c.g.shard.fullBuffers++
	} else {
		c.g.shard.fullBuffers--
	}
}

// queue appends v to what the connection sends.
func (c *Conn) queue(v *buffer.View) {
	queueSend(c.ep, &c.g.clock, v, c.segmentLimit())
	if !c.unsent {
		c.unsent = true
		s := c.g.shard
		s.unsent = append(s.unsent, c)
	}
}

// segmentLimit is how many bytes a segment is made of at most: of whole ones for the
// wire, as many as gVisor's sender takes at once. It would cut longer ones in two.
func (c *Conn) segmentLimit() int {
	size := sending(c.ep).MaxPayloadSize
	if size >= maxSegment {
		return maxSegment
	}
	return maxSegment / size * size
}

// maxSegment is how many bytes gVisor's sender takes at once: it leaves so much for
// headers, and one more (snd.go, sendData).
const maxSegment = gsoMaxSize - header.TCPTotalHeaderMaximumSize - 1

// push sends what was queued in this turn. It comes after the application's step.
func (s *Shard) push() {
	for i, c := range s.unsent {
		s.unsent[i] = nil
		c.push()
	}
	s.unsent = s.unsent[:0]
}

func (c *Conn) push() {
	if !c.unsent {
		return
	}
	c.unsent = false
	c.ep.LockUser()
	switch c.ep.EndpointState() {
	case tcp.StateEstablished, tcp.StateCloseWait:
		sendQueued(c.ep)
	default: // it was reset, or has sent its FIN
	}
	c.ep.UnlockUser()
}
