package shard

import (
	"context"
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

// netRing is the size in bytes of each of a NetConn's two buffers.
const netRing = 256 << 10

// NetConn is a TCP connection for any goroutine. Its endpoint is touched by
// its shard alone: bytes pass through two rings, and a goroutine that put
// something into one, or made room in the other, posts the connection to the
// shard, once until the shard has looked.
type NetConn struct {
	c  *Conn                 // owned by the shard
	sh atomic.Pointer[Shard] // the shard that owns c; written by it

	local, remote netip.AddrPort // immutable after Open

	in  byteRing // shard writes, goroutines read, holding readMu
	out byteRing // goroutines write, holding writeMu, shard reads

	readMu, writeMu             sync.Mutex
	readDeadline, writeDeadline deadline
	readable, writable          chan struct{} // capacity 1: a hint to look again
	readWaits, writeWaits       atomic.Bool   // somebody waits for the hint

	posted      atomic.Bool   // in the shard's mailbox
	starved     atomic.Bool   // the shard waits for room in in
	closed      atomic.Bool   // Close was called
	closeWrite  atomic.Bool   // CloseWrite was called
	aborting    atomic.Bool   // reset instead of a goodbye
	finSent     bool          // owned by the shard
	established chan error    // how a dial ended; nil for an accepted connection
	readEnd     chan struct{} // closed when in gets nothing more, for readErr
	ended       chan struct{} // closed when out takes nothing more, for writeErr
	readErr     error         // set by the shard before it closes readEnd
	writeErr    error         // set by the shard before it closes ended
}

var (
	_ net.Conn   = (*NetConn)(nil)
	_ Handler    = (*netHandler)(nil)
	_ HalfCloser = (*netHandler)(nil)
)

func newNetConn() *NetConn {
	return &NetConn{
		in: byteRing{size: netRing}, out: byteRing{size: netRing},
		readDeadline: newDeadline(), writeDeadline: newDeadline(),
		readable: make(chan struct{}, 1), writable: make(chan struct{}, 1),
		readEnd: make(chan struct{}), ended: make(chan struct{}),
	}
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
	c.keepAlive()
	if n.established != nil {
		n.established <- nil
	} else if !h.accept(n) {
		c.g.shard.counters.ConnsRefused++
		c.Abort()
	}
}

// Data implements Handler.
func (h *netHandler) Data(c *Conn, b []byte) int {
	n := c.Context().(*NetConn)
	if n.closed.Load() {
		return len(b) // nobody reads it any more
	}
	took := n.in.write(b)
	if took < len(b) {
		// Tell the reader that we wait, then look again: it may have made
		// room just before.
		n.starved.Store(true)
		if n.in.free() > 0 {
			took += n.in.write(b[took:])
		}
	}
	n.hint(&n.readWaits, n.readable)
	return took
}

// Writable implements Handler.
func (h *netHandler) Writable(c *Conn) { c.Context().(*NetConn).drain() }

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
	if n.readErr == nil {
		n.readErr = err
		if err == nil {
			n.readErr = io.EOF
		}
		close(n.readEnd)
	}
	if n.out.len() > 0 {
		c.abort = true // a FIN would tell the peer that this was all
	}
	n.writeErr = err
	if err == nil {
		n.writeErr = syscall.EPIPE
	}
	close(n.ended)
}

// EOF implements HalfCloser.
func (h *netHandler) EOF(c *Conn) {
	n := c.Context().(*NetConn)
	n.readErr = io.EOF
	close(n.readEnd)
}

// leave implements leaver.
func (h *netHandler) leave(c *Conn) {
	n, _ := c.Context().(*NetConn)
	if n == nil || n.c == nil { // not accepted yet, or still dialling
		c.end(net.ErrClosed)
		return
	}
	n.closed.Store(true)
	n.drain()
	n.hint(&n.readWaits, n.readable)
	n.hint(&n.writeWaits, n.writable)
}

// hint wakes a goroutine that waits.
func (n *NetConn) hint(waits *atomic.Bool, ch chan struct{}) {
	if waits.Load() {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// run implements task: the shard looks at what goroutines did.
func (n *NetConn) run(*Shard) {
	n.posted.Store(false)
	c := n.c
	if c.done {
		return
	}
	if n.aborting.Load() {
		c.Abort()
		return
	}
	n.drain()
	if c.done || c.closing {
		return
	}
	if !n.starved.Load() || n.closed.Load() { // closed: there is nobody to wait for
		c.Resume()
	}
}

// drain moves bytes from the ring into the endpoint's send buffer, and says
// goodbye when the last one was moved. Called by the shard.
func (n *NetConn) drain() {
	c := n.c
	moved := 0
	for {
		b := n.out.peek()
		if len(b) == 0 {
			break
		}
		took, err := c.Write(b)
		if err != nil {
			n.out.skip(n.out.len()) // nobody wants it any more
			break
		}
		n.out.skip(took)
		moved += took
		if took < len(b) {
			break
		}
	}
	if moved > 0 {
		n.hint(&n.writeWaits, n.writable)
	}
	if n.out.len() > 0 {
		return
	}
	switch {
	case n.closed.Load():
		c.Close()
	case n.closeWrite.Load() && !n.finSent:
		n.finSent = true
		_ = c.CloseWrite() // fails when the connection is over, and then needs none
	}
}

// kick makes the shard look at the connection.
func (n *NetConn) kick() {
	if n.posted.CompareAndSwap(false, true) {
		n.sh.Load().post(n)
	}
}

// Read implements net.Conn.
func (n *NetConn) Read(b []byte) (int, error) {
	n.readMu.Lock()
	defer n.readMu.Unlock()
	for {
		if n.closed.Load() {
			return 0, n.opError("read", net.ErrClosed)
		}
		if n.readDeadline.passed() {
			return 0, n.opError("read", os.ErrDeadlineExceeded)
		}
		if len(b) == 0 {
			return 0, nil
		}
		if got := n.in.read(b); got > 0 {
			if n.starved.Load() && n.in.len() <= netRing/2 {
				n.starved.Store(false)
				n.kick()
			}
			return got, nil
		}
		n.readWaits.Store(true)
		if n.in.len() > 0 {
			continue
		}
		select {
		case <-n.readEnd:
			if n.in.len() > 0 {
				continue
			}
			if n.closed.Load() {
				return 0, n.opError("read", net.ErrClosed)
			}
			return 0, n.opError("read", n.readErr)
		default:
		}
		select {
		case <-n.readable:
		case <-n.readEnd:
		case <-n.readDeadline.wait():
		}
		n.readWaits.Store(false)
	}
}

// Write implements net.Conn.
func (n *NetConn) Write(b []byte) (int, error) {
	n.writeMu.Lock()
	defer n.writeMu.Unlock()
	done := 0
	for {
		switch {
		case n.closed.Load():
			return done, n.opError("write", net.ErrClosed)
		case n.closeWrite.Load():
			return done, n.opError("write", syscall.EPIPE)
		case n.writeDeadline.passed():
			return done, n.opError("write", os.ErrDeadlineExceeded)
		}
		select {
		case <-n.ended:
			return done, n.opError("write", n.writeErr)
		default:
		}
		if took := n.out.write(b[done:]); took > 0 {
			done += took
			n.kick()
		}
		if done == len(b) {
			return done, nil
		}
		n.writeWaits.Store(true)
		if n.out.free() > 0 {
			continue
		}
		select {
		case <-n.writable:
		case <-n.ended:
		case <-n.writeDeadline.wait():
		}
		n.writeWaits.Store(false)
	}
}

// Close implements net.Conn. What was written is still sent.
func (n *NetConn) Close() error {
	if !n.closed.CompareAndSwap(false, true) {
		return n.opError("close", net.ErrClosed)
	}
	n.readDeadline.set(past)
	n.writeDeadline.set(past)
	n.kick()
	return nil
}

// past is a deadline that has passed: it ends what waits.
var past = time.Unix(1, 0)

// CloseWrite sends what was written and then a FIN; reading goes on.
func (n *NetConn) CloseWrite() error {
	if n.closed.Load() {
		return n.opError("close", net.ErrClosed)
	}
	n.closeWrite.Store(true)
	n.kick()
	return nil
}

// LocalAddr implements net.Conn.
func (n *NetConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(n.local) }

// RemoteAddr implements net.Conn.
func (n *NetConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(n.remote) }

// SetDeadline implements net.Conn.
func (n *NetConn) SetDeadline(t time.Time) error {
	return errors.Join(n.SetReadDeadline(t), n.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (n *NetConn) SetReadDeadline(t time.Time) error {
	if n.closed.Load() {
		return n.opError("set", net.ErrClosed)
	}
	n.readDeadline.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (n *NetConn) SetWriteDeadline(t time.Time) error {
	if n.closed.Load() {
		return n.opError("set", net.ErrClosed)
	}
	n.writeDeadline.set(t)
	return nil
}

// Shard returns the shard that processes the connection's segments.
func (n *NetConn) Shard() int { return n.sh.Load().id }

// CPU returns the CPU that the shard's thread is pinned to.
func (n *NetConn) CPU() int { return n.sh.Load().cpu }

// NUMANode returns the NUMA node of that CPU.
func (n *NetConn) NUMANode() int { return n.sh.Load().node }

func (n *NetConn) opError(op string, err error) error {
	return opError(op, "tcp", n.local, n.remote, err)
}

// DialNet opens a TCP connection for any goroutine and waits until the peer
// has answered or ctx is done.
func (set *Set) DialNet(ctx context.Context, local, remote netip.AddrPort) (*NetConn, error) {
	n := newNetConn()
	n.established = make(chan error, 1)
	c, err := set.Dial(local, remote, &netHandler{}, n)
	if err != nil {
		return nil, opError("dial", "tcp", local, remote, err)
	}
	select {
	case err := <-n.established:
		if err != nil {
			return nil, opError("dial", "tcp", local, remote, err)
		}
		return n, nil
	case <-ctx.Done():
		c.g.shard.do(func(*Shard) { c.Abort() })
		err := ctx.Err()
		if errors.Is(err, context.DeadlineExceeded) {
			err = os.ErrDeadlineExceeded
		}
		return nil, opError("dial", "tcp", local, remote, err)
	}
}

// Keep-alive as package net sets it for every connection (net.KeepAliveConfig).
var (
	keepAliveIdle     = tcpip.KeepaliveIdleOption(15 * time.Second)
	keepAliveInterval = tcpip.KeepaliveIntervalOption(15 * time.Second)
)

const keepAliveCount = 9

// keepAlive makes a peer that has vanished known.
func (c *Conn) keepAlive() {
	// Neither option can fail on a TCP endpoint.
	_ = c.ep.SetSockOpt(&keepAliveIdle)
	_ = c.ep.SetSockOpt(&keepAliveInterval)
	_ = c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	c.ep.SocketOptions().SetKeepAlive(true)
}

// NetListener is a net.Listener over all flow groups.
type NetListener struct {
	l       *Listener
	backlog chan *NetConn
	ended   chan struct{}
	once    sync.Once
}

var _ net.Listener = (*NetListener)(nil)

// ListenNet is Listen for any goroutine. Up to backlog connections wait for
// Accept; the next ones are reset and counted.
func (set *Set) ListenNet(addrs []netip.Addr, port uint16, backlog int) (*NetListener, error) {
	n := &NetListener{backlog: make(chan *NetConn, backlog), ended: make(chan struct{})}
	l, err := set.Listen(addrs, port, backlog, &netHandler{accept: func(c *NetConn) bool {
		select {
		case n.backlog <- c:
			return true
		default:
			return false
		}
	}})
	if err != nil {
		return nil, err
	}
	n.l = l
	return n, nil
}

// Accept implements net.Listener.
func (l *NetListener) Accept() (net.Conn, error) {
	select {
	case <-l.ended:
	case <-l.l.set.done:
	default:
		select {
		case c := <-l.backlog:
			return c, nil
		case <-l.ended:
		case <-l.l.set.done:
		}
	}
	err := l.l.set.Err()
	if err == nil {
		err = net.ErrClosed
	}
	return nil, opError("accept", "tcp", netip.AddrPort{}, l.l.addr, err)
}

// Close implements net.Listener: connections that nobody has accepted are
// reset.
func (l *NetListener) Close() error {
	err := opError("close", "tcp", netip.AddrPort{}, l.l.addr, net.ErrClosed)
	l.once.Do(func() {
		err = nil
		close(l.ended)
		l.l.Close()
		for {
			select {
			case c := <-l.backlog:
				c.aborting.Store(true)
				_ = c.Close()
			default:
				return
			}
		}
	})
	return err
}

// Addr implements net.Listener.
func (l *NetListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.l.addr) }
