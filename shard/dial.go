package shard

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
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

// Dial opens a TCP connection to remote and returns when the SYN is on its
// way: h gets Open when the peer has answered, or Close without Open when it
// did not. context is the connection's Context from the start. local's port may be 0, and local may be the zero value: then the
// stack chooses an address. It may be called from any goroutine but a shard's.
//
// The flow group is chosen first and the local port after it, so that what the
// peer answers hashes into the group that dialled.
func (set *Set) Dial(local, remote netip.AddrPort, h Handler, context any) (*Conn, error) {
	if !local.Addr().IsValid() || local.Addr().IsUnspecified() {
		addr, ok := set.source(remote.Addr())
		if !ok {
			return nil, syscall.ENETUNREACH
		}
		local = netip.AddrPortFrom(addr, local.Port())
	}
	first, tries := int(set.dials.Add(1)), len(set.groups)
	if local.Port() != 0 {
		first, tries = set.groupOf(local, remote), 1
	}
	for i := range tries {
		var c *Conn
		err := set.doGroup((first+i)%len(set.groups), func(g *Group) (err error) {
			c, err = g.dial(local, remote, h, context)
			return err
		})
		if i == tries-1 || !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return c, err
		}
	}
	panic("unreachable: there is a last try")
}

// groupOf returns the flow group of the frames that remote sends to local.
func (set *Set) groupOf(local, remote netip.AddrPort) int {
	return set.reta.GroupOf(set.toeplitz.HashTuple(dispatch.Tuple{
		Src: remote.Addr(), SrcPort: remote.Port(),
		Dst: local.Addr(), DstPort: local.Port(),
	}))
}

// source returns the stack's address for packets to remote: the one in the
// same subnet, else the first of the family when there is a gateway for it.
func (set *Set) source(remote netip.Addr) (netip.Addr, bool) {
	var first netip.Addr
	for _, p := range set.cfg.Addrs {
		if p.Contains(remote) {
			return p.Addr(), true
		}
		if !first.IsValid() && p.Addr().Is4() == remote.Is4() {
			first = p.Addr()
		}
	}
	for _, gw := range set.cfg.Gateways {
		if gw.Is4() == remote.Is4() {
			return first, first.IsValid()
		}
	}
	return netip.Addr{}, false
}

func (g *Group) dial(local, remote netip.AddrPort, h Handler, context any) (*Conn, error) {
	s := g.shard
	if s.over() {
		return nil, ErrClosed
	}
	if s.counters.ConnsOpen >= uint64(s.set.cfg.MaxConns) {
		s.counters.ConnsRefused++
		return nil, syscall.ENOBUFS
	}
	wq := new(waiter.Queue)
	ep, terr := g.stack.NewEndpoint(tcp.ProtocolNumber, networkProtocol(remote.Addr()), wq)
	if terr != nil {
		return nil, errno(terr)
	}
	if err := g.bind(ep, local, remote); err != nil {
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

// bind binds ep to local, or to a free ephemeral port whose flow belongs to the
// group. One port in len(groups) does.
func (g *Group) bind(ep tcpip.Endpoint, local, remote netip.AddrPort) error {
	if local.Port() != 0 {
		return errno(ep.Bind(fullAddress(local)))
	}
	start := rand.IntN(ephemeral)
	for i := range ephemeral {
		port := uint16(firstEphemeral + (start+i)%ephemeral)
		local = netip.AddrPortFrom(local.Addr(), port)
		if g.shard.set.groupOf(local, remote) != g.id {
			continue
		}
		err := ep.Bind(fullAddress(local))
		if _, taken := err.(*tcpip.ErrPortInUse); !taken {
			return errno(err)
		}
	}
	return syscall.EADDRNOTAVAIL
}
