package shard

import (
	"cmp"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// netRing is how many bytes wait in each of a NetConn's two rings at most.
const netRing = 512 << 10

// lendLimit is the size in bytes from which on the pieces of a ring are handed over
// without a copy. A small one is copied: its memory is in the cache, and is used
// again at once.
const lendLimit = 8 << 10

// NetConn is a TCP connection for any goroutine, with the behavior of a
// *net.TCPConn. Its endpoint is touched by its shard alone: bytes pass through
// two rings, and a goroutine that put something into one, or made room in the
// other, posts the connection to the shard, once until the shard has looked.
//
// All methods may be called by any goroutine but a shard's, several at a time.
type NetConn struct {
	c  *Conn                 // owned by the shard
	sh atomic.Pointer[Shard] // the shard that owns c; written by it

	local, remote netip.AddrPort // immutable after Open

	in  byteRing // shard writes, goroutines read, holding readMu
	out byteRing // goroutines write, holding writeMu, shard reads

	readMu, writeMu             sync.Mutex
	readDeadline, writeDeadline deadline
	readable, writable          hint

	posted      atomic.Bool  // in the shard's mailbox
	starved     atomic.Bool  // the shard waits for room in in
	closed      atomic.Bool  // Close was called
	closedRead  atomic.Bool  // CloseRead was called
	closedWrite atomic.Bool  // CloseWrite was called
	linger      atomic.Int64 // seconds; see SetLinger
	finSent     bool         // owned by the shard
	farewell    bool         // owned by the shard: it knows of Close
	established chan error   // how a dial ended; nil for an accepted connection
	moveHook

	// Written by the shard, once; the flags say that the errors may be read.
	readErr, writeErr     error
	readEnded, writeEnded atomic.Bool // in gets, out takes nothing more
}

var (
	_ net.Conn      = (*NetConn)(nil)
	_ io.ReaderFrom = (*NetConn)(nil)
	_ io.WriterTo   = (*NetConn)(nil)
	_ Handler       = (*netHandler)(nil)
	_ HalfCloser    = (*netHandler)(nil)
)

func newNetConn() *NetConn {
	n := &NetConn{readable: newHint(), writable: newHint()}
	n.readDeadline.hint, n.writeDeadline.hint = &n.readable, &n.writable
	n.in.limit.Store(netRing)
	n.out.limit.Store(netRing)
	n.linger.Store(-1)
	return n
}

// Read implements net.Conn.
func (n *NetConn) Read(b []byte) (int, error) {
	n.readMu.Lock()
	defer n.readMu.Unlock()
	if len(b) == 0 {
		return 0, n.opError("read", n.notReadable())
	}
	if _, err := n.next(); err != nil {
		return 0, n.opError("read", err)
	}
	got := n.in.read(b)
	n.madeRoom()
	return got, nil
}

// WriteTo implements io.WriterTo: w gets what has arrived as it lies in the
// ring, without a copy in between. Read waits while w writes.
func (n *NetConn) WriteTo(w io.Writer) (int64, error) {
	n.readMu.Lock()
	defer n.readMu.Unlock()
	total := int64(0)
	for {
		view, err := n.next()
		if err == io.EOF { // next returns it bare
			return total, nil
		}
		if err != nil {
			return total, n.opError("writeto", err)
		}
		wrote, err := w.Write(view)
		if wrote < 0 || wrote > len(view) {
			return total, n.opError("writeto", errors.New("invalid write result"))
		}
		n.in.skip(wrote)
		n.madeRoom()
		total += int64(wrote)
		if err == nil && wrote < len(view) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return total, n.opError("writeto", err)
		}
	}
}

// next waits for received bytes and returns those that lie in one piece, or
// why there are none. The caller holds readMu.
func (n *NetConn) next() ([]byte, error) {
	for {
		// Bytes that are there win over the end, but not over Close and the
		// deadline, as in package net.
		if err := n.notReadable(); err != nil {
			return nil, err
		}
		ended := n.readEnded.Load() // before the look: nothing comes after it
		if view := n.in.peek(); len(view) > 0 {
			return view, nil
		}
		switch {
		case n.closedRead.Load():
			return nil, io.EOF
		case ended:
			return nil, n.readErr
		}
		n.in.release()
		n.readable.expect()
		if n.in.len() > 0 || n.readEnded.Load() || n.closedRead.Load() || n.notReadable() != nil {
			n.readable.cancel()
			continue
		}
		n.readable.wait()
	}
}

// notReadable returns why reading may not even begin, or nil.
func (n *NetConn) notReadable() error {
	switch {
	case n.closed.Load():
		return net.ErrClosed
	case n.readDeadline.passed():
		return os.ErrDeadlineExceeded
	default:
		return nil
	}
}

// madeRoom tells a shard that waits for it.
func (n *NetConn) madeRoom() {
	if n.starved.Load() && n.in.len() <= int(n.in.limit.Load())/2 {
		n.starved.Store(false)
		n.kick()
	}
}

// Write implements net.Conn. It returns when everything is in the ring to the
// shard.
func (n *NetConn) Write(b []byte) (int, error) {
	n.writeMu.Lock()
	defer n.writeMu.Unlock()
	done := 0
	for {
		if err := n.beginWrite(); err != nil {
			return done, n.opError("write", err)
		}
		if took := n.out.write(b[done:]); took > 0 {
			done += took
			n.kick()
		} else {
			n.cancelWrite()
		}
		if done == len(b) {
			return done, nil
		}
		n.awaitRoom(1)
	}
}

// ReadFrom implements io.ReaderFrom: r reads into memory that becomes part of
// the ring when it is at least half full. Nothing is locked while r reads.
func (n *NetConn) ReadFrom(r io.Reader) (int64, error) {
	if err := n.notWritable(); err != nil {
		return 0, n.opError("readfrom", err)
	}
	total := int64(0)
	piece := newBlock(largeBlock)
	for {
		got, err := r.Read(piece.b)
		switch {
		case got >= largeBlock/2:
			piece.end = got
			if err := n.writeBlock(piece); err != nil {
				return total, n.opError("readfrom", err)
			}
			total += int64(got)
			piece = newBlock(largeBlock)
		case got > 0:
			wrote, err := n.Write(piece.b[:got])
			total += int64(wrote)
			if err != nil {
				return total, err
			}
		}
		if err != nil {
			piece.free()
			if err == io.EOF { // as io.Copy sees it
				return total, nil
			}
			return total, n.opError("readfrom", err)
		}
	}
}

// WriteBlock is Write of all bytes of a block, without a copy of larger ones.
func (n *NetConn) WriteBlock(b *Block) (int, error) {
	n.writeMu.Lock()
	defer n.writeMu.Unlock()
	for done := 0; ; {
		if err := n.beginWrite(); err != nil {
			return done, n.opError("write", err)
		}
		room := min(n.out.free(), b.Len()-done)
		if room < lendLimit { // the shard would copy it anyway, and a piece has its overhead
			room = n.out.write(b.view.AsSlice()[done : done+max(room, 0)])
		} else {
			v := b.view.Clone()
			v.TrimFront(done)
			v.CapLength(room)
			n.out.append(blockOf(v))
		}
		if room > 0 {
			done += room
			n.kick()
		} else {
			n.cancelWrite()
		}
		if done == b.Len() {
			return done, nil
		}
		n.awaitRoom(1)
	}
}

// writeBlock waits until the ring has room for b and gives it away.
func (n *NetConn) writeBlock(b *block) error {
	n.writeMu.Lock()
	defer n.writeMu.Unlock()
	for {
		if err := n.beginWrite(); err != nil {
			return err
		}
		// In a ring that was made smaller than the block it takes all of it.
		room := min(b.end, int(n.out.limit.Load()))
		if n.out.free() >= room {
			n.out.append(b)
			n.kick()
			return nil
		}
		n.cancelWrite()
		n.awaitRoom(room)
	}
}

// beginWrite lets Close and CloseWrite wait for a write, up to its commit or
// cancelWrite, or returns why there is none. The caller holds writeMu.
func (n *NetConn) beginWrite() error {
	n.out.announce() // first: drain looks in the other order
	err := n.notWritable()
	if err != nil {
		n.cancelWrite()
	}
	return err
}

// cancelWrite ends a write that has put nothing into the ring.
func (n *NetConn) cancelWrite() {
	n.out.cancel()
	if n.closed.Load() || n.closedWrite.Load() {
		n.kick() // the shard may have waited
	}
}

// awaitRoom waits until room bytes fit, or something else is new. The caller
// holds writeMu.
func (n *NetConn) awaitRoom(room int) {
	n.writable.expect()
	if n.out.free() >= room || n.notWritable() != nil {
		n.writable.cancel()
		return
	}
	n.writable.wait()
}

// notWritable returns why nothing can be written, or nil.
func (n *NetConn) notWritable() error {
	switch {
	case n.closed.Load():
		return net.ErrClosed
	case n.writeDeadline.passed():
		return os.ErrDeadlineExceeded
	case n.writeEnded.Load():
		return n.writeErr
	case n.closedWrite.Load():
		return syscall.EPIPE
	default:
		return nil
	}
}

// Close implements net.Conn. It returns at once; what was written is still
// sent, as SetLinger says, unless the peer takes nothing for a minute.
func (n *NetConn) Close() error {
	if !n.closed.CompareAndSwap(false, true) {
		return n.opError("close", net.ErrClosed)
	}
	n.readable.give()
	n.writable.give()
	n.readDeadline.stop()
	n.writeDeadline.stop()
	n.kick()
	return nil
}

// CloseRead ends reading: what has arrived can be read, then comes io.EOF. What
// the peer sends later is acknowledged and thrown away.
func (n *NetConn) CloseRead() error {
	switch {
	case n.closed.Load():
		return n.opError("close", net.ErrClosed)
	case n.readEnded.Load() && n.readErr != io.EOF:
		return n.opError("close", syscall.ENOTCONN)
	}
	n.closedRead.Store(true)
	n.readable.give()
	n.kick()
	return nil
}

// CloseWrite sends what was written and then a FIN; reading goes on.
func (n *NetConn) CloseWrite() error {
	switch {
	case n.closed.Load():
		return n.opError("close", net.ErrClosed)
	case n.writeEnded.Load():
		return n.opError("close", syscall.ENOTCONN)
	}
	n.closedWrite.Store(true)
	n.writable.give()
	n.kick()
	return nil
}

// kick makes the shard look at the connection.
func (n *NetConn) kick() {
	if n.posted.CompareAndSwap(false, true) {
		n.sh.Load().post(n)
	}
}

// LocalAddr implements net.Conn.
func (n *NetConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(n.local) }

// RemoteAddr implements net.Conn.
func (n *NetConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(n.remote) }

// Shard returns the shard that processes the connection's segments.
func (n *NetConn) Shard() int { return n.sh.Load().id }

// CPU returns the CPU that the shard's thread is pinned to.
func (n *NetConn) CPU() int { return n.sh.Load().cpu }

// NUMANode returns the NUMA node of that CPU.
func (n *NetConn) NUMANode() int { return n.sh.Load().node }

func (n *NetConn) opError(op string, err error) error {
	return opError(op, "tcp", n.local, n.remote, err)
}

// netHandler is the on-shard half of all NetConns. Its accept gives a new one
// to the listener and returns false when that has no room.
type netHandler struct {
	accept func(*NetConn) bool
}

// Open implements Handler.
func (h *netHandler) Open(c *Conn) {
	n, _ := c.Context().(*NetConn)
	if n == nil {
		n = newNetConn()
		c.SetContext(n)
	}
	n.c = c
	n.local, n.remote = c.LocalAddr(), c.RemoteAddr()
	n.sh.Store(c.g.shard)
	c.patient = true
	c.keepAlive()
	if n.established != nil {
		n.established <- nil
	} else if !h.accept(n) {
		c.g.shard.counters.ConnsRefused++
		c.Abort()
	}
}

// Move implements Mover.
func (h *netHandler) Move(c *Conn) {
	n := c.Context().(*NetConn)
	n.sh.Store(c.g.shard)
	n.movedTo(c.g.shard)
}

// Data implements Handler.
func (h *netHandler) Data(c *Conn, b []byte) int {
	n := c.Context().(*NetConn)
	if n.closed.Load() || n.closedRead.Load() {
		return len(b) // nobody reads it any more
	}
	took := n.in.write(b)
	if took < len(b) {
		// Tell the reader that we wait, then look again: it may have made
		// room just before.
		n.starved.Store(true)
		took += n.in.write(b[took:])
	}
	n.readable.give()
	return took
}

// Writable implements Handler.
func (h *netHandler) Writable(c *Conn) { c.Context().(*NetConn).drain() }

// EOF implements HalfCloser.
func (h *netHandler) EOF(c *Conn) { c.Context().(*NetConn).endReading(io.EOF) }

// Close implements Handler.
func (h *netHandler) Close(c *Conn, err error) {
	n, _ := c.Context().(*NetConn)
	if n == nil {
		return
	}
	if n.established != nil && n.c == nil { // the dial failed
		n.established <- err
		return
	}
	if n.out.len() > 0 {
		c.abort = true // a FIN would tell the peer that this was all
	}
	// In this order: who has read the error must not be able to write.
	n.endWriting(cmp.Or(err, error(syscall.EPIPE)))
	n.endReading(cmp.Or(err, io.EOF))
}

func (n *NetConn) endReading(err error) {
	if !n.readEnded.Load() {
		n.readErr = err
		n.readEnded.Store(true)
		n.readable.give()
	}
}

func (n *NetConn) endWriting(err error) {
	if !n.writeEnded.Load() {
		n.writeErr = err
		n.writeEnded.Store(true)
		n.writable.give()
	}
}

// leave implements leaver.
func (h *netHandler) leave(c *Conn) {
	n, _ := c.Context().(*NetConn)
	if n == nil || n.c == nil { // not accepted yet, or still dialling
		c.end(net.ErrClosed)
		return
	}
	n.closed.Store(true)
	n.goodbye()
	n.drain()
	n.readable.give()
	n.writable.give()
}

// run implements task: the shard looks at what goroutines did.
func (n *NetConn) run(s *Shard) {
	c := n.c
	if !s.owns[c.g.id] {
		s.passOn(c.g, n)
		return
	}
	n.posted.Store(false)
	if c.done {
		return
	}
	if n.closed.Load() {
		if n.linger.Load() == 0 {
			c.Abort()
			return
		}
		n.goodbye()
	}
	n.drain()
	if c.done || c.closing {
		return
	}
	if !n.starved.Load() || n.closed.Load() || n.closedRead.Load() { // closed: there is nobody to wait for
		c.Resume()
	}
}

// goodbye bounds how long a connection lasts that nobody looks at any more,
// also while bytes wait in the ring.
func (n *NetConn) goodbye() {
	if n.farewell {
		return
	}
	n.farewell = true
	c := n.c
	if seconds := n.linger.Load(); seconds > 0 {
		c.orphanFor = time.Duration(seconds) * time.Second
	}
	c.orphan()
}

// drain moves bytes from the ring into the endpoint's send buffer, and says
// goodbye when the last one was moved. Called by the shard.
func (n *NetConn) drain() {
	c := n.c
	// Loaded before the look into the ring: what was written before Close and
	// CloseWrite is then seen by it.
	closed, closedWrite := n.closed.Load(), n.closedWrite.Load()
	moved := 0
	for {
		b := n.out.peek()
		if len(b) == 0 {
			break
		}
		var took int
		var err error
		if len(b) < lendLimit { // a small block too: it is not worth its overhead
			took, err = c.Write(b)
		} else if took, err = c.room(); took > 0 {
			took = c.lend(n.out.lend(len(b)), took)
		}
		if err != nil {
			n.endWriting(err)
			for len(b) > 0 { // nobody wants it any more
				n.out.skip(len(b))
				b = n.out.peek()
			}
			break
		}
		n.out.skip(took)
		moved += took
		if took < len(b) {
			break
		}
	}
	if moved > 0 {
		n.writable.give()
	}
	if n.out.writing() || n.out.len() > 0 { // a write that began before Close tells when it is over
		return
	}
	n.out.release()
	switch {
	case closed:
		c.Close()
	case closedWrite && !n.finSent:
		n.finSent = true
		_ = c.CloseWrite() // fails when the connection is over, and then needs none
	}
}

// Keep-alive as package net sets it for every connection (net.KeepAliveConfig).
const (
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 15 * time.Second
	keepAliveCount    = 9
)

// keepAlive makes a peer that has vanished known.
func (c *Conn) keepAlive() {
	idle, interval := tcpip.KeepaliveIdleOption(keepAliveIdle), tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// None of them can fail on a TCP endpoint.
	_ = c.ep.SetSockOpt(&idle)
	_ = c.ep.SetSockOpt(&interval)
	_ = c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	c.ep.SocketOptions().SetKeepAlive(true)
}
