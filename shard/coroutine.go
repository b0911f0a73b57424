package shard

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// ServedConn is the connection of blocking code that runs on the shard: a
// coroutine of the shard's thread. Its methods are called by that code only,
// not by another goroutine. Where a kernel's socket would put the thread to
// sleep, they let the shard go on and come back when there is something to do.
//
// Anything else that blocks, blocks every connection of the shard: locks that
// are held for long, channels, time.Sleep, files. Offload runs such work
// elsewhere; Sleep is a pause that yields. The code must not call
// runtime.Goexit: it would end the shard's thread.
type ServedConn struct {
	c    *Conn
	next func() (struct{}, bool) // runs the handler until it waits; false: it has ended
	stop func()                  // makes every wait fail from now on
	rest func(struct{}) bool     // gives the thread back to the shard

	waits   waitFor
	running bool
	closed  bool  // by the handler, or the connection has failed
	err     error // why the connection has failed

	// Points in the shard's time, 0: none.
	readDeadline, writeDeadline, wakeAt int64
	timer                               tcpip.Timer
	timerAt                             int64 // 0: not armed

	task func() // of an Offload
}

var _ net.Conn = (*ServedConn)(nil)

// waitFor is what a handler that gave the thread back waits for.
type waitFor uint8

const (
	waitNothing waitFor = iota
	waitRead
	waitWrite
	waitSleep
	waitOffload
)

// Serve runs h as a coroutine for every connection that arrives at port of one
// of addrs, as in Listen. When h returns, its connection is closed; when it
// panics, that is logged with its stack, and nothing else suffers.
func (set *Set) Serve(addrs []netip.Addr, port uint16, backlog int, h func(net.Conn)) (*Listener, error) {
	return set.Listen(addrs, port, backlog, servedHandler{h})
}

// servedHandler is the Handler below all ServedConns of a listener.
type servedHandler struct{ h func(net.Conn) }

// Open implements Handler: the coroutine is made here and runs from serve.
func (h servedHandler) Open(c *Conn) {
	co := &ServedConn{c: c}
	s := c.g.shard
	co.next, co.stop = iter.Pull(func(yield func(struct{}) bool) {
		co.rest = yield
		defer func() {
			if r := recover(); r != nil {
				s.set.cfg.Logger.Error("handler panicked, its connection is closed",
					"shard", s.id, "peer", c.remote.String(), "panic", r, "stack", string(debug.Stack()))
				s.counters.HandlerPanics++
				c.abort = true
			}
		}()
		h.h(co)
	})
	c.served = co
	s.served[co] = struct{}{}
	c.g.served++
}

// Data and Writable implement Handler. They are not called: a ServedConn reads
// and writes by itself.
func (servedHandler) Data(*Conn, []byte) int { return 0 }
func (servedHandler) Writable(*Conn)         {}

// Close implements Handler: what waits for the connection learns that it is
// over.
func (servedHandler) Close(c *Conn, err error) {
	co := c.served
	co.closed = true
	co.err = err
	if !co.running && (co.waits == waitRead || co.waits == waitWrite) {
		co.resume()
	}
}

// serve continues the handler if one of the events is what it waits for.
func (co *ServedConn) serve(events waiter.EventMask) {
	switch {
	case co.c.closing && !co.c.done:
		co.c.finish(net.ErrClosed)
	case co.waits == waitNothing, // not begun
		co.waits == waitRead && (events&(waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp) != 0 || co.due(co.readDeadline)),
		co.waits == waitWrite && (events&(waiter.WritableEvents|waiter.EventErr|waiter.EventHUp) != 0 || co.due(co.writeDeadline)),
		co.waits == waitSleep && co.due(co.wakeAt):
		co.resume()
	default:
		co.arm()
	}
}

// resume runs the handler until it waits again, or to its end.
func (co *ServedConn) resume() {
	co.running = true
	_, waiting := co.next()
	co.running = false
	if waiting {
		return
	}
	s := co.c.g.shard
	delete(s.served, co)
	co.c.g.served--
	if co.timer != nil {
		co.timer.Stop()
	}
	if !co.c.done {
		co.c.closing = true
		co.c.finish(net.ErrClosed)
	}
}

// wait gives the thread back until the shard resumes the handler. It returns
// false when the stack has ended.
func (co *ServedConn) wait(w waitFor) bool {
	co.waits = w
	co.arm()
	ok := co.rest(struct{}{})
	co.waits = waitNothing
	return ok
}

// arm sets the timer for what the handler waits for. It is moved only when it
// would fire too late: a server moves its deadlines with every request.
func (co *ServedConn) arm() {
	var at int64
	switch co.waits {
	case waitRead:
		at = co.readDeadline
	case waitWrite:
		at = co.writeDeadline
	case waitSleep:
		at = co.wakeAt
	case waitNothing, waitOffload:
	}
	if at == 0 || (co.timerAt != 0 && co.timerAt <= at) {
		return
	}
	d := time.Duration(at - co.c.g.shard.now)
	co.timerAt = at
	if co.timer == nil {
		co.timer = co.c.g.clock.AfterFunc(d, co.tick)
	} else {
		co.timer.Reset(d)
	}
}

// tick is the timer's function: serve finds out what is due.
func (co *ServedConn) tick() {
	co.timerAt = 0
	s := co.c.g.shard
	s.ready = append(s.ready, (*servedTick)(co))
}

// servedTick is a ServedConn whose timer has fired. The connection itself may
// be over, or on the ready list already.
type servedTick ServedConn

func (t *servedTick) group() *Group { return t.c.g }

func (t *servedTick) serve(*Shard) {
	co := (*ServedConn)(t)
	if co.waits != waitNothing {
		co.serve(0)
	}
}

func (co *ServedConn) due(at int64) bool { return at != 0 && co.c.g.shard.now >= at }

// deadline translates the application's time into the shard's. A time that was
// reckoned from time.Now has the monotonic clock's reading, so it needs no other.
func (co *ServedConn) deadline(t time.Time) int64 {
	switch s := co.c.g.shard; {
	case t.IsZero():
		return 0
	case t == t.Round(0): //nolint:staticcheck // Equal would not tell whether t has that reading
		// The wall clock may have been set since the start.
		return max(s.now+int64(time.Until(t)), 1) //nolint:forbidigo // the application's time, not the turn's
	default:
		return max(int64(t.Sub(s.set.start)), 1)
	}
}

// Read implements net.Conn.
func (co *ServedConn) Read(b []byte) (int, error) {
	s := co.c.g.shard
	for {
		switch {
		case co.closed:
			return 0, co.opError("read", co.why())
		case co.due(co.readDeadline):
			return 0, co.opError("read", os.ErrDeadlineExceeded)
		case len(b) == 0:
			return 0, nil
		}
		fill := &s.scratch.fill
		fill.b = b
		r, err := co.c.ep.Read(fill, tcpip.ReadOptions{})
		fill.b = nil
		if err == nil {
			co.c.received(r.Count)
			return r.Count, nil
		}
		switch err.(type) {
		case *tcpip.ErrWouldBlock:
			if !co.wait(waitRead) {
				co.closed = true
			}
		case *tcpip.ErrClosedForReceive:
			if tcp.EndpointState(co.c.ep.State()) == tcp.StateError {
				return 0, co.opError("read", co.c.cause())
			}
			return 0, io.EOF
		default:
			return 0, co.opError("read", errno(err))
		}
	}
}

// Write implements net.Conn.
func (co *ServedConn) Write(b []byte) (int, error) {
	return co.write(len(b), func(done int) (int, error) { return co.c.Write(b[done:]) })
}

// WriteBlock is Write of all bytes of a block, without a copy.
func (co *ServedConn) WriteBlock(b *Block) (int, error) {
	return co.write(b.Len(), func(done int) (int, error) { return co.c.WriteBlock(b, done) })
}

// write calls some, which writes what fits of all after the first done bytes, until
// everything is written.
func (co *ServedConn) write(all int, some func(done int) (int, error)) (int, error) {
	done := 0
	for {
		switch {
		case co.closed:
			return done, co.opError("write", co.why())
		case co.due(co.writeDeadline):
			return done, co.opError("write", os.ErrDeadlineExceeded)
		}
		n, err := some(done)
		done += n
		if err != nil {
			return done, co.opError("write", err)
		}
		if done == all {
			return done, nil
		}
		if !co.wait(waitWrite) {
			co.closed = true
		}
	}
}

// why is the error of an operation on a connection that is over.
func (co *ServedConn) why() error {
	if co.err != nil {
		return co.err
	}
	return net.ErrClosed
}

// Close implements net.Conn. What was written is still sent.
func (co *ServedConn) Close() error {
	if co.closed {
		return co.opError("close", net.ErrClosed)
	}
	co.closed = true
	co.c.closing = true
	co.c.finish(net.ErrClosed)
	return nil
}

// CloseWrite sends what was written and then a FIN; reading goes on.
func (co *ServedConn) CloseWrite() error {
	if co.closed {
		return co.opError("close", net.ErrClosed)
	}
	return co.opError("close", co.c.CloseWrite())
}

// Sleep pauses the handler for d while the shard goes on. It returns early,
// with net.ErrClosed, when the stack ends.
func (co *ServedConn) Sleep(d time.Duration) error {
	co.wakeAt = max(co.c.g.shard.now+int64(d), 1)
	for !co.due(co.wakeAt) {
		if !co.wait(waitSleep) {
			return net.ErrClosed
		}
	}
	return nil
}

// Offload runs f in the pool of the shard's NUMA node (numaalloc.NodePools) and
// returns when it has ended. A panic in f is one in the handler.
func (co *ServedConn) Offload(f func()) {
	var panicked any
	co.task = func() {
		defer func() {
			if panicked = recover(); panicked != nil {
				panicked = offloadPanicError{panicked, debug.Stack()}
			}
		}()
		f()
	}
	co.c.g.shard.offload(co)
	for co.task != nil {
		co.wait(waitOffload) // until f has ended, whatever else has
	}
	if panicked != nil {
		panic(panicked)
	}
}

// offloadPanicError is a panic of offloaded work, with the stack it happened on.
type offloadPanicError struct {
	value any
	stack []byte
}

func (p offloadPanicError) Error() string {
	return fmt.Sprintf("offloaded work panicked: %v\n%s", p.value, p.stack)
}

// LocalAddr implements net.Conn.
func (co *ServedConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(co.c.local) }

// RemoteAddr implements net.Conn.
func (co *ServedConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(co.c.remote) }

// SetDeadline implements net.Conn.
func (co *ServedConn) SetDeadline(t time.Time) error {
	return errors.Join(co.SetReadDeadline(t), co.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (co *ServedConn) SetReadDeadline(t time.Time) error {
	if co.closed {
		return co.opError("set", co.why())
	}
	co.readDeadline = co.deadline(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (co *ServedConn) SetWriteDeadline(t time.Time) error {
	if co.closed {
		return co.opError("set", co.why())
	}
	co.writeDeadline = co.deadline(t)
	return nil
}

// Shard returns the shard that the handler runs on.
func (co *ServedConn) Shard() int { return co.c.g.shard.id }

// CPU returns the CPU that the shard's thread is pinned to.
func (co *ServedConn) CPU() int { return co.c.g.shard.cpu }

// NUMANode returns the NUMA node of that CPU.
func (co *ServedConn) NUMANode() int { return co.c.g.shard.node }

func (co *ServedConn) opError(op string, err error) error {
	return opError(op, "tcp", co.c.local, co.c.remote, err)
}

// filler reads into a slice.
type filler struct{ b []byte }

func (f *filler) Write(b []byte) (int, error) {
	n := copy(f.b, b)
	f.b = f.b[n:]
	if n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}
