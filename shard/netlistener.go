package shard

import (
	"cmp"
	"net"
	"net/netip"
	"sync"
)

// NetListener is a net.Listener over all flow groups. Connections are accepted
// in the order in which they arrived, whatever their shard.
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
	return nil, opError("accept", "tcp", netip.AddrPort{}, l.l.addr, cmp.Or(l.l.set.Err(), net.ErrClosed))
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
				_ = c.SetLinger(0)
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
