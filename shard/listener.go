package shard

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// acceptBudget is how many connections of one group's listener are accepted in
// a turn.
const acceptBudget = 64

// Listener accepts TCP connections in every flow group.
type Listener struct {
	set   *Set
	addr  netip.AddrPort // as reported
	addrs []netip.Addr   // bound
	close sync.Once
	parts [][]*listenerPart // by group; each owned by the group's thread
}

// listenerPart is the listening endpoint of one group.
type listenerPart struct {
	g      *Group
	ep     tcpip.Endpoint
	wq     waiter.Queue
	entry  waiter.Entry
	h      Handler
	queued bool
	closed bool
}

// Listen gives the connections that arrive at port of one of addrs to h. An
// unspecified address means every address of its family; port 0 chooses one.
// It may be called from any goroutine but a shard's.
func (set *Set) Listen(addrs []netip.Addr, port uint16, backlog int, h Handler) (*Listener, error) {
	// One at a time: what is found free stays free until it is used.
	set.listenMu.Lock()
	defer set.listenMu.Unlock()
	var err error
	for range listenTries {
		l := &Listener{set: set, addr: reportedAddr(addrs, port), addrs: addrs, parts: make([][]*listenerPart, len(set.groups))}
		if err = l.open(backlog, h); err == nil {
			set.listeners[l] = struct{}{}
			return l, nil
		}
		l.closeParts()
		if port != 0 || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, opError("listen", "tcp", netip.AddrPort{}, reportedAddr(addrs, port), err)
}

// listenTries is how often port 0 is chosen anew: one group chooses it, and
// another may have given it away.
const listenTries = 16

// open listens in every group. The caller holds listenMu.
func (l *Listener) open(backlog int, h Handler) error {
	for id := range l.set.groups {
		for _, a := range l.addrs {
			if l.addr.Port() != 0 && l.taken() {
				return syscall.EADDRINUSE
			}
			err := l.set.groups[id].do(func(g *Group) error {
				p, err := g.listen(netip.AddrPortFrom(a, l.addr.Port()), backlog, h)
				if err != nil {
					return err
				}
				l.parts[id] = append(l.parts[id], p)
				// The first group chooses port 0; the others follow.
				local, _ := p.ep.GetLocalAddress() // a bound endpoint has one
				l.addr = netip.AddrPortFrom(l.addr.Addr(), local.Port)
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// taken reports whether another listener has the port. gVisor does not look:
// with the option that lets a listener come back while its connections last,
// it takes any two.
func (l *Listener) taken() bool {
	for other := range l.set.listeners {
		if other.addr.Port() == l.addr.Port() && overlap(other.addrs, l.addrs) {
			return true
		}
	}
	return false
}

// overlap reports whether one address is on both lists, or a wildcard on one
// covers an address on the other.
func overlap(a, b []netip.Addr) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Is4() == y.Is4() && (x == y || x.IsUnspecified() || y.IsUnspecified()) {
				return true
			}
		}
	}
	return false
}

// reportedAddr is how a listener on several addresses calls itself.
func reportedAddr(addrs []netip.Addr, port uint16) netip.AddrPort {
	if len(addrs) == 1 {
		return netip.AddrPortFrom(addrs[0], port)
	}
	if !slices.ContainsFunc(addrs, netip.Addr.Is6) {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
}

// Addr returns the address that the listener listens on.
func (l *Listener) Addr() netip.AddrPort { return l.addr }

// Close stops accepting; connections that were accepted go on. It may be
// called from any goroutine but a shard's.
func (l *Listener) Close() {
	l.close.Do(func() {
		l.closeParts()
		l.set.listenMu.Lock()
		defer l.set.listenMu.Unlock()
		delete(l.set.listeners, l)
	})
}

func (l *Listener) closeParts() {
	for id := range l.parts {
		_ = l.set.groups[id].do(func(*Group) error { // a set that has ended has none
			for _, p := range l.parts[id] {
				p.close()
			}
			return nil
		})
	}
}

func (g *Group) listen(addr netip.AddrPort, backlog int, h Handler) (*listenerPart, error) {
	if g.shard.over() {
		return nil, ErrClosed
	}
	p := &listenerPart{g: g, h: h}
	ep, terr := g.stack.NewEndpoint(tcp.ProtocolNumber, networkProtocol(addr.Addr()), &p.wq)
	if terr != nil {
		return nil, errno(terr)
	}
	if networkProtocol(addr.Addr()) == ipv6.ProtocolNumber {
		ep.SocketOptions().SetV6Only(true)
	}
	// Like every listener of package net: a restarted server binds although
	// connections of the old one are in TIME_WAIT.
	ep.SocketOptions().SetReuseAddress(true)
	terr = ep.Bind(fullAddress(addr))
	if terr == nil {
		terr = ep.Listen(backlog)
	}
	if terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	p.ep = ep
	p.entry.Init(p, waiter.ReadableEvents)
	p.wq.EventRegister(&p.entry)
	g.listeners[p] = struct{}{}
	return p, nil
}

// NotifyEvent implements waiter.EventListener.
func (p *listenerPart) NotifyEvent(waiter.EventMask) {
	if !p.queued && !p.closed {
		p.queued = true
		p.g.shard.ready = append(p.g.shard.ready, p)
	}
}

func (p *listenerPart) group() *Group { return p.g }

// serve accepts what is waiting and runs the first events of each connection.
func (p *listenerPart) serve(s *Shard) {
	p.queued = false
	for range acceptBudget {
		if p.closed {
			return
		}
		if m := s.leavingGroup; m != nil && m.g == p.g {
			break // accepted by the new owner: a coroutine begins where it stays
		}
		ep, wq, err := p.ep.Accept(nil)
		if err != nil {
			return // nothing waits
		}
		if s.full() {
			s.counters.ConnsRefused++
			ep.Abort()
			continue
		}
		s.counters.ConnsAccepted++
		c := p.g.newConn(ep, wq, p.h)
		c.setAddrs()
		c.serve(s)
	}
	p.NotifyEvent(waiter.ReadableEvents)
}

func (p *listenerPart) close() {
	if !p.closed {
		p.closed = true
		delete(p.g.listeners, p)
		p.wq.EventUnregister(&p.entry)
		p.ep.Close()
	}
}
