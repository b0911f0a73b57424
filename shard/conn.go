package shard

import (
	"cmp"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Handler is the application on the shard: its methods are the events of a
// connection. They run on the shard's thread, one at a time, and must not
// block: while they run, every connection of the shard waits.
//
// One Handler serves all connections of a listener, on all shards at once;
// what belongs to one connection is kept with Conn.SetContext.
type Handler interface {
	// Open is the first event of a connection.
	Open(c *Conn)

	// Data brings received bytes and returns how many of them were consumed.
	// b is a view of the receive buffer: it is valid until Data returns and
	// must not be written to. When fewer bytes than len(b) are consumed, the
	// connection stops reading until the next Writable event or Conn.Resume,
	// and the peer is held back by its receive window.
	Data(c *Conn, b []byte) int

	// Writable says that a connection whose Write took less than it was given
	// has room again.
	Writable(c *Conn)

	// Close is the last event of a connection. err is nil when the peer has
	// closed its side and everything it sent was consumed, net.ErrClosed after
	// Conn.Close or Conn.Abort, and else what ended the connection. What was
	// written is still sent, unless the connection failed; what was received
	// and not consumed is lost then.
	Close(c *Conn, err error)
}

// HalfCloser is a Handler that goes on writing after the peer has closed its
// side: EOF takes the place of Close with a nil error, and the connection lasts
// until Conn.Close or a failure.
type HalfCloser interface {
	EOF(c *Conn)
}

// Conn is a TCP connection at home: its methods are called on the thread of its
// shard, from its Handler's events or from a function that Do runs.
type Conn struct {
	g     *Group
	ep    *tcp.Endpoint
	flow  flow
	wq    *waiter.Queue
	entry waiter.Entry
	h     Handler
	ctx   any

	served *ServedConn // the coroutine of a connection that Serve accepted

	prev, next *Conn // in the group's list

	local, remote netip.AddrPort

	events    waiter.EventMask
	queued    bool // in shard.ready
	opened    bool
	dialing   bool
	near      bool // the peer is so close that large buffers only go cold
	paused    bool // the handler left bytes unread
	patient   bool // those wait for the handler even after a failure
	eof       bool // the handler knows that nothing more comes
	wantWrite bool // a Write was short
	full      bool // there was no room for it
	unsent    bool // in shard.unsent
	serving   bool // a handler's method is running
	closing   bool // Close or Abort was called
	abort     bool
	done      bool

	sendBuffer int  // bytes, of a connection to a near peer
	ownWindow  bool // the application has chosen the receive buffer

	bulkPeriod uint32 // the last one of Shard.bulk in which it received anything
	bulkBytes  int    // and how much

	failure   error         // what a Write was told; gVisor tells it once
	orphanFor time.Duration // how long it waits for its peer once closed; 0: orphanTime
}

// connList is the ring of a group's connections, with itself as the sentinel.
type connList struct{ Conn }

func (l *connList) init() { l.prev, l.next = &l.Conn, &l.Conn }

func (l *connList) add(c *Conn) {
	c.prev, c.next = l.prev, &l.Conn
	c.prev.next, c.next.prev = c, c
}

func (l *connList) remove(c *Conn) {
	c.prev.next, c.next.prev = c.next, c.prev
	c.prev, c.next = nil, nil
}

func (l *connList) all(yield func(*Conn) bool) {
	for c := l.next; c != &l.Conn; {
		next := c.next
		if !yield(c) {
			return
		}
		c = next
	}
}

func (g *Group) newConn(ep tcpip.Endpoint, wq *waiter.Queue, h Handler) *Conn {
	c := &Conn{g: g, ep: ep.(*tcp.Endpoint), wq: wq, h: h}
	c.entry.Init(c, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventErr|waiter.EventHUp)
	wq.EventRegister(&c.entry)
	g.conns.add(c)
	g.load.Add(1)
	g.shard.counters.ConnsOpen++
	return c
}

// NotifyEvent implements waiter.EventListener. gVisor calls it with the
// endpoint locked, so it only takes a note.
func (c *Conn) NotifyEvent(mask waiter.EventMask) {
	c.events |= mask
	c.enqueue()
}

func (c *Conn) enqueue() {
	if !c.queued && !c.done {
		c.queued = true
		c.g.shard.ready = append(c.g.shard.ready, c)
	}
}

func (c *Conn) group() *Group { return c.g }

// serve runs the connection's events.
func (c *Conn) serve(s *Shard) {
	c.queued = false
	if c.done {
		return
	}
	events := c.events
	c.events = 0
	if c.dialing && !c.dialed() {
		return
	}
	c.serving = true
	if !c.opened {
		c.opened = true
		c.tune(s)
		c.followPath()
		c.g.addFlow(c)
		c.h.Open(c)
	}
	if events&waiter.WritableEvents != 0 {
		c.setFull(false) // until the next short write
	}
	if c.served != nil {
		c.serving = false
		c.served.serve(events)
		return
	}
	if events&waiter.WritableEvents != 0 && !c.closing && c.wantWrite {
		c.wantWrite = false
		c.paused = false
		c.h.Writable(c)
	}
	err := c.receive(s)
	if h, ok := c.h.(HalfCloser); ok && err == io.EOF && !c.eof { // errno returns it bare
		c.eof = true
		h.EOF(c)
		c.enqueue() // our side may be closed already: then this was all
		err = nil
	}
	c.serving = false
	switch {
	case err == io.EOF:
		c.finish(nil)
	case err != nil:
		c.finish(err)
	case c.closing:
		c.finish(net.ErrClosed)
	}
}

// dialed looks how a dial ended and returns whether the connection is open.
func (c *Conn) dialed() bool {
	switch state := tcp.EndpointState(c.ep.State()); state {
	case tcp.StateSynSent, tcp.StateSynRecv, tcp.StateConnecting:
		if c.closing {
			c.finish(net.ErrClosed)
		}
		return false
	case tcp.StateError, tcp.StateClose:
		err := errno(c.ep.LastError())
		if err == nil {
			err = syscall.ECONNRESET
		}
		c.finish(err)
		return false
	default:
		c.dialing = false
		c.setAddrs()
		return true
	}
}

// receive gives the handler what has arrived. It returns io.EOF when the peer
// has sent everything, or what ended the connection.
func (c *Conn) receive(s *Shard) error {
	for !c.closing {
		state := tcp.EndpointState(c.ep.State())
		switch {
		case state == tcp.StateError && (c.paused && !c.patient || c.eof):
			return c.cause() // unread bytes do not wait for the handler then
		case state == tcp.StateClose && c.eof:
			// Both sides have said goodbye, unless the peer reset us after its own.
			return cmp.Or(c.failure, errno(c.ep.LastError()), io.EOF)
		case c.paused || c.eof,
			state == tcp.StateEstablished && c.ep.RcvBufUsed == 0 && !c.ep.RcvClosed: // there is nothing to ask for
			return nil
		}
		// Peeked, so that the handler runs with the endpoint unlocked and the
		// buffers still in its queue.
		peek := &s.scratch.peek
		peek.views = peek.views[:0]
		if _, err := c.ep.Read(peek, tcpip.ReadOptions{Peek: true}); err != nil {
			if _, ok := err.(*tcpip.ErrWouldBlock); ok {
				return nil
			}
			if _, ok := err.(*tcpip.ErrClosedForReceive); ok && state == tcp.StateError {
				return c.cause()
			}
			return errno(err)
		}
		consumed := 0
		for _, b := range peek.views {
			n := c.h.Data(c, b)
			if n < 0 || n > len(b) {
				panic("shard: Handler.Data consumed more than it was given")
			}
			consumed += n
			if n < len(b) {
				c.paused = true
				break
			}
			if c.closing {
				break
			}
		}
		if consumed > 0 {
			s.scratch.discard.n = consumed
			_, _ = c.ep.Read(&s.scratch.discard, tcpip.ReadOptions{}) // what was peeked is there
			c.received(consumed)
		}
	}
	return nil
}

// cause returns what made the connection fail.
func (c *Conn) cause() error {
	return cmp.Or(c.failure, errno(c.ep.LastError()), error(syscall.ECONNRESET))
}

// nearRTT is the round trip time below which buffers do not grow with what is on the
// way, but are shared out. Growing them pays off when much is on the way; on the
// same machine it only moves the bytes out of the cache before the peer reads
// them: eight streams out ran at 28 Gbit/s with 4 MiB each and at 47 with 768
// KiB. gVisor never reports less than 1 ms.
const nearRTT = 2 * time.Millisecond

// tune sets the buffer sizes that a connection to a near peer begins with. Those of
// others grow with what is on the way.
func (c *Conn) tune(s *Shard) {
	info := &s.scratch.info
	if err := c.ep.GetSockOpt(info); err == nil && info.RTT > 0 && info.RTT < nearRTT {
		c.near = true
		c.sendBuffer = s.set.cfg.SendBuffer
		c.ep.SocketOptions().SetSendBufferSize(int64(c.sendBuffer), true)
	} else {
		c.ep.SocketOptions().SetReceiveBufferSize(int64(s.set.cfg.ReceiveBuffer), false)
	}
}

// finish ends the connection's events and gives its endpoint back to gVisor,
// which still sends what is queued and says goodbye to the peer.
func (c *Conn) finish(err error) {
	if c.done {
		return
	}
	c.done = true
	c.setFull(false)
	c.wq.EventUnregister(&c.entry)
	if c.opened || c.dialing {
		c.h.Close(c, err)
	}
	c.push() // gVisor would send the FIN first
	if c.abort {
		c.ep.Abort()
	} else {
		c.orphan()
		c.ep.Close()
	}
	c.g.conns.remove(c)
	c.g.removeFlow(c)
	c.g.load.Add(-1)
	c.g.shard.counters.ConnsOpen--
}

// orphanTime is how long a closed connection waits for its peer to acknowledge
// anything, as long as TIME_WAIT lasts.
const orphanTime = time.Minute

// orphan sees to it that a peer that takes nothing does not keep for ever a
// connection that nobody watches any more (RFC 5482).
func (c *Conn) orphan() {
	timeout := tcpip.TCPUserTimeoutOption(cmp.Or(c.orphanFor, orphanTime))
	c.ep.SetSockOpt(&timeout)
}

func (c *Conn) setAddrs() {
	if a, err := c.ep.GetLocalAddress(); err == nil {
		c.local = addrPort(a)
	}
	if a, err := c.ep.GetRemoteAddress(); err == nil {
		c.remote = addrPort(a)
	}
}

// CloseWrite sends what is queued and then tells the peer that nothing more
// comes (FIN). Data events go on.
func (c *Conn) CloseWrite() error {
	if c.closing || c.done {
		return net.ErrClosed
	}
	c.push() // gVisor would send the FIN first
	c.setFull(false)
	return errno(c.ep.Shutdown(tcpip.ShutdownWrite))
}

// Close ends the connection: the Close event follows with net.ErrClosed, what
// was written is still sent. If received data is unread, or more of it comes,
// the peer gets a reset, as from a kernel's socket, and may miss the rest.
func (c *Conn) Close() {
	if c.closing || c.done {
		return
	}
	c.closing = true
	if !c.serving {
		c.enqueue()
	}
}

// Abort ends the connection like Close, but resets it: the peer gets a RST and
// what is queued is thrown away.
func (c *Conn) Abort() {
	c.abort = true
	c.Close()
}

// Resume lets a connection read on whose Data event did not consume all it was
// given.
func (c *Conn) Resume() {
	if c.paused {
		c.paused = false
		if !c.serving {
			c.enqueue()
		}
	}
}

// Do runs f on the thread of the connection's shard and waits for it. It returns
// false, and f does not run, when the stack has ended. It is for all goroutines
// but a shard's.
func (c *Conn) Do(f func()) bool { return c.g.perform(f) }

// SetContext attaches a value of the application to the connection.
func (c *Conn) SetContext(v any) { c.ctx = v }

// Context returns the value that SetContext attached.
func (c *Conn) Context() any { return c.ctx }

// LocalAddr returns the stack's end of the connection.
func (c *Conn) LocalAddr() netip.AddrPort { return c.local }

// RemoteAddr returns the peer's end of the connection.
func (c *Conn) RemoteAddr() netip.AddrPort { return c.remote }

// Shard returns the shard that processes the connection's segments.
func (c *Conn) Shard() int { return c.g.shard.id }

// CPU returns the CPU that the shard's thread is pinned to.
func (c *Conn) CPU() int { return c.g.shard.cpu }

// NUMANode returns the NUMA node of that CPU.
func (c *Conn) NUMANode() int { return c.g.shard.node }

// Now returns the time of the shard's turn, measured since the stack started.
func (c *Conn) Now() time.Duration { return time.Duration(c.g.shard.now) }

// scratch is what a shard needs while it serves one connection at a time.
type scratch struct {
	peek       peeker
	discard    discarder
	payload    payloader
	fill       filler
	to         tcpip.FullAddress
	info       tcpip.TCPInfoOption
	datagram   [maxDatagram]byte // one cut from a super-frame
	datagramIn gatherer          // one on its way to a handler
}

// maxDatagram is the size in bytes of the largest frame with one datagram.
const maxDatagram = ethernetLen + 65535

// peeker collects the views that an endpoint holds.
type peeker struct{ views [][]byte }

func (p *peeker) Write(b []byte) (int, error) {
	p.views = append(p.views, b)
	return len(b), nil
}

// discarder reads n bytes and keeps none.
type discarder struct{ n int }

func (d *discarder) Write(b []byte) (int, error) {
	n := min(d.n, len(b))
	d.n -= n
	if n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// payloader is a slice as gVisor reads it.
type payloader struct{ b []byte }

func (p *payloader) Len() int { return len(p.b) }

// Read must not answer an empty read with io.EOF: View.ReadFrom asks once
// before each read, and would never end.
func (p *payloader) Read(b []byte) (int, error) {
	if len(p.b) == 0 && len(b) > 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}
