package shard

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// SetDeadline implements net.Conn.
func (n *NetConn) SetDeadline(t time.Time) error {
	return errors.Join(n.SetReadDeadline(t), n.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (n *NetConn) SetReadDeadline(t time.Time) error {
	if n.closed.Load() {
		return n.setError(net.ErrClosed)
	}
	n.readDeadline.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (n *NetConn) SetWriteDeadline(t time.Time) error {
	if n.closed.Load() {
		return n.setError(net.ErrClosed)
	}
	n.writeDeadline.set(t)
	return nil
}

// SetLinger says what Close does with data that was not acknowledged. Negative,
// the default: it is sent in the background, as long as the peer takes some of
// it every minute. 0: it is thrown away, and the peer gets a reset. Positive:
// it is sent in the background, and given up after so many seconds without an
// acknowledgement. Close never waits.
func (n *NetConn) SetLinger(seconds int) error {
	if n.closed.Load() {
		return n.setError(net.ErrClosed)
	}
	n.linger.Store(int64(seconds))
	return nil
}

// SetNoDelay says whether small segments leave at once, which is the default,
// or wait for the acknowledgement of earlier ones (Nagle's algorithm, RFC 896).
func (n *NetConn) SetNoDelay(noDelay bool) error {
	return n.setOption(func(c *Conn) tcpip.Error {
		c.ep.SocketOptions().SetDelayOption(!noDelay)
		return nil
	})
}

// SetKeepAlive says whether an idle connection is probed. It is by default.
func (n *NetConn) SetKeepAlive(on bool) error {
	return n.setOption(func(c *Conn) tcpip.Error {
		c.ep.SocketOptions().SetKeepAlive(on)
		return nil
	})
}

// SetKeepAlivePeriod sets how long a connection is idle before it is probed,
// rounded up to a second. 15 s is the default.
func (n *NetConn) SetKeepAlivePeriod(d time.Duration) error {
	if d <= 0 {
		return n.setError(syscall.EINVAL)
	}
	return n.setOption(func(c *Conn) tcpip.Error {
		idle := tcpip.KeepaliveIdleOption(wholeSeconds(d))
		return c.ep.SetSockOpt(&idle)
	})
}

// SetKeepAliveConfig sets how an idle connection is probed, with the defaults
// that net.KeepAliveConfig documents.
func (n *NetConn) SetKeepAliveConfig(config net.KeepAliveConfig) error {
	return n.setOption(func(c *Conn) tcpip.Error {
		c.ep.SocketOptions().SetKeepAlive(config.Enable)
		if config.Idle >= 0 {
			idle := tcpip.KeepaliveIdleOption(wholeSeconds(orDefault(config.Idle, keepAliveIdle)))
			if err := c.ep.SetSockOpt(&idle); err != nil {
				return err
			}
		}
		if config.Interval >= 0 {
			interval := tcpip.KeepaliveIntervalOption(wholeSeconds(orDefault(config.Interval, keepAliveInterval)))
			if err := c.ep.SetSockOpt(&interval); err != nil {
				return err
			}
		}
		if config.Count >= 0 {
			return c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, orDefault(config.Count, keepAliveCount))
		}
		return nil
	})
}

func orDefault[T time.Duration | int](value, standard T) T {
	if value == 0 {
		return standard
	}
	return value
}

// wholeSeconds rounds up, as the kernel's options count in seconds.
func wholeSeconds(d time.Duration) time.Duration {
	return (d + time.Second - 1).Truncate(time.Second)
}

// SetReadBuffer sets how many received bytes wait for Read: so many in the
// endpoint's receive buffer, overhead included, which is also what the window
// tells the peer, and up to 512 KiB more in the ring to the reader. The
// receive buffer stays at that size then instead of growing with the distance.
// 4 KiB to 4 MiB, or to the stack's receive buffer if that is larger; other
// values are taken to the nearer end.
func (n *NetConn) SetReadBuffer(bytes int) error {
	if bytes <= 0 {
		return n.setError(syscall.EINVAL)
	}
	return n.setOption(func(c *Conn) tcpip.Error {
		n.in.limit.Store(ringLimit(bytes))
		c.ownWindow = true
		c.ep.SocketOptions().SetReceiveBufferSize(clampBuffer(bytes, c.g.shard.set.cfg.ReceiveBuffer), true)
		return nil
	})
}

// SetWriteBuffer sets how many bytes Write takes before the peer has
// acknowledged any: so many in the endpoint's send buffer, and up to 512 KiB
// more in the ring to the shard. The limits are those of SetReadBuffer.
func (n *NetConn) SetWriteBuffer(bytes int) error {
	if bytes <= 0 {
		return n.setError(syscall.EINVAL)
	}
	return n.setOption(func(c *Conn) tcpip.Error {
		n.out.limit.Store(ringLimit(bytes))
		size := clampBuffer(bytes, c.g.shard.set.cfg.SendBuffer)
		c.sendBuffer = int(size)
		c.ep.SocketOptions().SetSendBufferSize(size, true)
		n.writable.give()
		return nil
	})
}

func ringLimit(bytes int) int64 { return int64(min(max(bytes, smallBlock), netRing)) }

// clampBuffer keeps a buffer in the range that setBuffers gives the netstack.
func clampBuffer(bytes, start int) int64 {
	return int64(min(max(bytes, tcp.MinBufferSize), max(start, maxAutoBuffer)))
}

// setOption runs f on the connection's shard and waits for it. After the
// connection has ended, the error is net.ErrClosed.
func (n *NetConn) setOption(f func(c *Conn) tcpip.Error) error {
	err := net.ErrClosed
	if !n.closed.Load() {
		err = n.c.g.do(func(*Group) error {
			if n.c.done {
				return net.ErrClosed
			}
			return errno(f(n.c))
		})
	}
	return n.setError(err)
}

// setError shapes an error as package net's options do: it names the local
// address only.
func (n *NetConn) setError(err error) error {
	return opError("set", "tcp", netip.AddrPort{}, n.local, err)
}
