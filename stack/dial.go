package stack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"numastack/shard"
)

const (
	// fallbackDelay is how long the first address family has before the other
	// one is tried too: the Connection Attempt Delay of RFC 8305 section 5.
	fallbackDelay = 250 * time.Millisecond

	// minAttempt is the least time that one of several addresses gets before
	// the next one is tried.
	minAttempt = 2 * time.Second
)

// DialContext connects like net.Dialer's: network is tcp, tcp4, tcp6, udp, udp4
// or udp6, address is host:port. Names are looked up by Resolver. Of several
// addresses, those of the first one's family are tried one after the other, and
// for TCP those of the other family in parallel when that takes longer than 250
// ms (Happy Eyeballs, RFC 8305). It may be called from any goroutine but a
// shard's.
//
// The connection is opened by the shard with the fewest; the local port is
// chosen so that the peer's answers arrive there.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	d := dialer{
		lookup: s.Resolver().LookupNetIP,
		dial: func(ctx context.Context, kind string, remote netip.AddrPort) (net.Conn, error) {
			if kind == "udp" {
				c, err := s.set.DialNetPacket(remote)
				if err != nil {
					return nil, err
				}
				return c, nil
			}
			c, err := s.set.DialNet(ctx, netip.AddrPort{}, remote)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
	}
	return d.dialContext(ctx, network, address)
}

// Resolver returns a resolver that asks the name servers of /etc/resolv.conf
// through the stack, after /etc/hosts. A name server on the kernel's loopback
// address is out of the stack's reach. Package net sorts the addresses of a name
// by the kernel's routes (RFC 6724 section 6), not the stack's. Copy it to set
// its other fields.
func (s *Stack) Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: s.DialContext}
}

// dialer turns an address into a connection, by way of lookup and dial.
type dialer struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	dial   func(ctx context.Context, kind string, remote netip.AddrPort) (net.Conn, error)
}

func (d *dialer) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	kind, remotes, err := d.resolve(ctx, network, address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: shard.ContextError(err)}
	}
	primaries, fallbacks := remotes, []netip.AddrPort(nil)
	if kind == "tcp" {
		primaries, fallbacks = splitFamilies(remotes)
	}
	c, err := d.race(ctx, kind, primaries, fallbacks)
	if op, ok := errors.AsType[*net.OpError](err); ok {
		op.Net = network
	}
	return c, err
}

// resolve returns the addresses that address stands for in network, at least
// one, in the order in which to try them.
func (d *dialer) resolve(ctx context.Context, network, address string) (kind string, remotes []netip.AddrPort, err error) {
	if err := ctx.Err(); err != nil {
		return "", nil, err
	}
	kind, family, err := parseNetwork(network)
	if err != nil {
		return "", nil, err
	}
	host, port, err := splitAddress(kind, address)
	if err != nil {
		return "", nil, err
	}
	if host == "" {
		return "", nil, &net.AddrError{Err: "missing host", Addr: address}
	}
	var addrs []netip.Addr
	if addr, notIP := netip.ParseAddr(host); notIP == nil {
		addrs = []netip.Addr{addr}
	} else if addrs, err = d.lookup(ctx, "ip"+network[len(kind):], host); err != nil {
		return "", nil, err
	}
	for _, a := range addrs {
		a = a.Unmap().WithZone("")
		if family(a) && !a.IsUnspecified() {
			remotes = append(remotes, netip.AddrPortFrom(a, port))
		}
	}
	if remotes == nil {
		return "", nil, &net.AddrError{Err: "no suitable address for " + network, Addr: address}
	}
	return kind, remotes, nil
}

// splitFamilies separates the addresses of the first one's family from the
// others.
func splitFamilies(remotes []netip.AddrPort) (primaries, fallbacks []netip.AddrPort) {
	for _, r := range remotes {
		if r.Addr().Is4() == remotes[0].Addr().Is4() {
			primaries = append(primaries, r)
		} else {
			fallbacks = append(fallbacks, r)
		}
	}
	return primaries, fallbacks
}

// race dials primaries, and fallbacks too when that takes long or has failed.
// The first connection wins; without one, the primaries' error does.
func (d *dialer) race(ctx context.Context, kind string, primaries, fallbacks []netip.AddrPort) (net.Conn, error) {
	if len(fallbacks) == 0 {
		return d.serial(ctx, kind, primaries)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the one that lost
	type result struct {
		net.Conn
		err     error
		primary bool
	}
	results := make(chan result) // one that comes too late is closed by its sender
	over := make(chan struct{})
	defer close(over)
	start := func(remotes []netip.AddrPort, primary bool) {
		go func() {
			c, err := d.serial(ctx, kind, remotes)
			select {
			case results <- result{c, err, primary}:
			case <-over:
				if c != nil {
					_ = c.Close()
				}
			}
		}()
	}
	start(primaries, true)
	running := 1
	delay := time.NewTimer(fallbackDelay)
	defer delay.Stop()
	var first error
	for {
		select {
		case <-delay.C:
			start(fallbacks, false)
			running++
		case r := <-results:
			running--
			if r.err == nil {
				return r.Conn, nil
			}
			if r.primary || first == nil {
				first = r.err
			}
			if r.primary && delay.Stop() { // no reason to wait
				start(fallbacks, false)
				running++
			}
			if running == 0 {
				return nil, first
			}
		}
	}
}

// serial dials one address after the other. Each gets its part of the time
// that ctx leaves. The error is the first one's.
func (d *dialer) serial(ctx context.Context, kind string, remotes []netip.AddrPort) (net.Conn, error) {
	var first error
	for i, r := range remotes {
		c, err := d.attempt(ctx, kind, r, len(remotes)-i)
		if err == nil {
			return c, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

// attempt dials the next of n addresses.
func (d *dialer) attempt(ctx context.Context, kind string, remote netip.AddrPort, n int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && n > 1 {
		part := max(time.Until(deadline)/time.Duration(n), minAttempt)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, part)
		defer cancel()
	}
	return d.dial(ctx, kind, remote)
}
