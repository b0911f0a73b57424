package shard

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"numastack/dispatch"
)

// Ephemeral ports, as on Linux (net.ipv4.ip_local_port_range).
const (
	firstEphemeral = 32768
	lastEphemeral  = 60999
	ephemeral      = lastEphemeral - firstEphemeral + 1
)

// dialPorts is how many local ports a shard looks at in one go, so that a
// destination that has few left does not hold up its connections. The first
// look is at fewer: nearly always the first port is free.
const (
	dialPortsFirst = 2
	dialPorts      = 128
)

// Dial opens a TCP connection to remote and returns when the SYN is on its
// way: h gets Open when the peer has answered, or Close without Open when it
// did not. context is the connection's Context from the start. local's port may
// be 0, and local may be the zero value: then the stack chooses an address. It
// may be called from any goroutine but a shard's.
//
// The flow group is chosen first, the one with the fewest connections on the
// shard with the fewest, and the local port after it, so that what the peer
// answers hashes into the group that dialled. Connections to different
// destinations share a port; one that has been closed gives its port to the
// next dial to the same destination when no other is left. When all groups have
// used theirs up, the error is EADDRNOTAVAIL.
func (set *Set) Dial(local, remote netip.AddrPort, h Handler, context any) (*Conn, error) {
	if !local.Addr().IsValid() || local.Addr().IsUnspecified() {
		addr, ok := set.source(remote.Addr())
		if !ok {
			return nil, syscall.ENETUNREACH
		}
		local = netip.AddrPortFrom(addr, local.Port())
	}
	switch {
	case onLink(remote.Addr()):
		return nil, syscall.ENETUNREACH
	case local.Addr().Is4() != remote.Addr().Is4():
		return nil, syscall.EINVAL
	case !set.isOurs(local.Addr()):
		return nil, syscall.EADDRNOTAVAIL
	case local.Port() != 0:
		id := set.groupOf(protoTCP, local, remote)
		return set.dialOn(id, local.Addr(), []uint16{local.Port()}, true, remote, h, context)
	}
	tried := make([]bool, len(set.groups))
	for range set.groups {
		id := set.leastLoaded(tried)
		tried[id] = true
		c, err := set.dialGroup(id, local.Addr(), remote, h, context)
		if !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return c, err
		}
	}
	return nil, syscall.EADDRNOTAVAIL
}

// leastLoaded returns the group with the fewest connections of the shard with
// the fewest that still has a group that was not tried. Equals take turns.
func (set *Set) leastLoaded(tried []bool) int {
	loads := make([]int32, len(set.shards))
	for id, g := range set.groups {
		loads[set.reta.Owner(id)] += g.load.Load()
	}
	best, n := -1, len(set.groups)
	turn := int(set.dials.Add(1))
	for i := range n {
		id := (turn + i) % n
		if tried[id] {
			continue
		}
		if best < 0 || cmp.Or(
			cmp.Compare(loads[set.reta.Owner(id)], loads[set.reta.Owner(best)]),
			cmp.Compare(set.groups[id].load.Load(), set.groups[best].load.Load()),
		) < 0 {
			best = id
		}
	}
	return best
}

// dialGroup dials from one group, from a port whose answers hash into it. It
// looks for such ports here, away from the shard.
func (set *Set) dialGroup(id int, local netip.Addr, remote netip.AddrPort, h Handler, context any) (*Conn, error) {
	for _, reuse := range []bool{false, true} {
		ports := make([]uint16, 0, dialPortsFirst)
		for port := range ephemeralPorts {
			from := netip.AddrPortFrom(local, port)
			if set.groupOf(protoTCP, from, remote) != id || from == remote {
				continue
			}
			if ports = append(ports, port); len(ports) < cap(ports) {
				continue
			}
			c, err := set.dialOn(id, local, ports, reuse, remote, h, context)
			if !errors.Is(err, syscall.EADDRNOTAVAIL) {
				return c, err
			}
			ports = slices.Grow(ports[:0], dialPorts)
		}
		if len(ports) > 0 {
			c, err := set.dialOn(id, local, ports, reuse, remote, h, context)
			if !errors.Is(err, syscall.EADDRNOTAVAIL) {
				return c, err
			}
		}
	}
	return nil, syscall.EADDRNOTAVAIL
}

// ephemeralPorts yields all of them, from a random one on (RFC 6056 section
// 3.3.1).
func ephemeralPorts(yield func(uint16) bool) {
	start := rand.IntN(ephemeral)
	for i := range ephemeral {
		if !yield(uint16(firstEphemeral + (start+i)%ephemeral)) {
			return
		}
	}
}

// dialOn dials on the group's thread, from the first port that is free.
func (set *Set) dialOn(id int, local netip.Addr, ports []uint16, reuse bool, remote netip.AddrPort, h Handler, context any) (c *Conn, err error) {
	// Counted from here on, so that many dials at once spread.
	load := &set.groups[id].load
	load.Add(1)
	defer load.Add(-1)
	err = set.groups[id].do(func(g *Group) error {
		c, err = g.dial(local, ports, reuse, remote, h, context)
		return err
	})
	return c, err
}

// IP protocols, as a dispatch.Tuple has them.
const (
	protoTCP = uint8(header.TCPProtocolNumber)
	protoUDP = uint8(header.UDPProtocolNumber)
)

// groupOf returns the flow group of the frames that remote sends to local.
func (set *Set) groupOf(proto uint8, local, remote netip.AddrPort) int {
	return set.reta.GroupOf(set.toeplitz.HashTuple(dispatch.Tuple{
		Proto: proto,
		Src:   remote.Addr(), SrcPort: remote.Port(),
		Dst: local.Addr(), DstPort: local.Port(),
	}))
}

// source returns the stack's address for packets to remote: remote if it is
// one of them, else the one in the same subnet, else the first of the family
// when there is a gateway for it.
func (set *Set) source(remote netip.Addr) (netip.Addr, bool) {
	var near, first netip.Addr
	for _, p := range set.cfg.Addrs {
		switch {
		case p.Addr() == remote:
			return remote, true
		case !near.IsValid() && p.Contains(remote):
			near = p.Addr()
		case !first.IsValid() && p.Addr().Is4() == remote.Is4():
			first = p.Addr()
		}
	}
	if near.IsValid() {
		return near, true
	}
	for _, gw := range set.cfg.Gateways {
		if gw.Is4() == remote.Is4() {
			return first, first.IsValid()
		}
	}
	return netip.Addr{}, false
}

// onLink reports whether packets to remote need no gateway.
func (set *Set) onLink(remote netip.Addr) bool {
	return slices.ContainsFunc(set.cfg.Addrs, func(p netip.Prefix) bool { return p.Contains(remote) })
}

// dial sends a SYN from the first of ports that has no connection to remote.
// The others that have one keep it; with reuse, one that is only remembered
// (TIME_WAIT) is forgotten.
func (g *Group) dial(local netip.Addr, ports []uint16, reuse bool, remote netip.AddrPort, h Handler, context any) (*Conn, error) {
	s := g.shard
	if s.over() {
		return nil, ErrClosed
	}
	if s.full() {
		s.counters.ConnsRefused++
		return nil, syscall.ENOBUFS
	}
	wq := new(waiter.Queue)
	ep, terr := g.stack.NewEndpoint(tcp.ProtocolNumber, networkProtocol(remote.Addr()), wq)
	if terr != nil {
		return nil, errno(terr)
	}
	// For a port, this option means one connection per pair of addresses and
	// ports, instead of one in all.
	ep.SocketOptions().SetReuseAddress(true)
	if err := g.bind(ep, local, ports, reuse, remote); err != nil {
		ep.Close()
		return nil, err
	}
	c := g.newConn(ep, wq, h)
	c.dialing = true
	c.ctx = context
	c.remote = remote
	s.counters.ConnsDialed++
	switch terr := ep.Connect(fullAddress(remote)).(type) {
	case nil, *tcpip.ErrConnectStarted:
		return c, nil
	default:
		c.dialing = false // no Close event for a connection the caller never got
		c.closing = true
		c.finish(nil)
		return nil, errno(terr)
	}
}

// bind binds ep to the first of ports that has no connection to remote.
func (g *Group) bind(ep tcpip.Endpoint, local netip.Addr, ports []uint16, reuse bool, remote netip.AddrPort) error {
	for _, port := range ports {
		from := netip.AddrPortFrom(local, port)
		if !g.vacate(from, remote, reuse) {
			continue
		}
		err := ep.Bind(fullAddress(from))
		if _, taken := err.(*tcpip.ErrPortInUse); !taken { // by a listener
			return errno(err)
		}
	}
	return syscall.EADDRNOTAVAIL
}

// vacate reports whether there is no connection between local and remote, after
// it has ended one in TIME_WAIT if reuse allows it.
//
// TIME_WAIT keeps late segments of a connection from its successor. A dialled
// successor may do without it: its sequence numbers begin above the old ones
// (RFC 6528), so it takes none of those segments for its own. Linux allows the
// same (net.ipv4.tcp_tw_reuse).
func (g *Group) vacate(local, remote netip.AddrPort, reuse bool) bool {
	id := stack.TransportEndpointID{
		LocalAddress: tcpipAddress(local.Addr()), LocalPort: local.Port(),
		RemoteAddress: tcpipAddress(remote.Addr()), RemotePort: remote.Port(),
	}
	found, _ := g.stack.FindTransportEndpoint(networkProtocol(remote.Addr()), tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
	if found == nil {
		return true
	}
	if info, _ := found.Info().(*stack.TransportEndpointInfo); info == nil || info.ID != id {
		return true // a listener
	}
	if !reuse || tcp.EndpointState(found.State()) != tcp.StateTimeWait {
		return false
	}
	found.Abort() // the peer, which has forgotten the connection, ignores the RST
	return true
}

// DialNet opens a TCP connection for any goroutine and waits until the peer
// has answered or ctx is done. The errors are those of net.Dialer.
func (set *Set) DialNet(ctx context.Context, local, remote netip.AddrPort) (*NetConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, opError("dial", "tcp", local, remote, ContextError(err))
	}
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
		_ = c.g.do(func(*Group) error { // a set that has ended has none
			c.Abort()
			return nil
		})
		return nil, opError("dial", "tcp", local, remote, ContextError(ctx.Err()))
	}
}
