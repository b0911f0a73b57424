package stack

import (
	"context"
	"net"

	"numastack/shard"
)

// Where is implemented by all connections: it tells where they live, so that an
// application can keep what belongs to a connection on the same CPU or node.
//
// Kernels tell it per socket: Windows by SIO_QUERY_RSS_PROCESSOR_INFO
// (mstcpip.h), Linux by SO_INCOMING_CPU (socket(7)). M. Friedman, "Mainstream
// NUMA and the TCP/IP stack", complains that applications cannot learn on which
// node their packets are processed. Those answers hold for the last packet;
// this one for as long as the connection's flow group stays where it is.
type Where interface {
	Shard() int    // processes the connection's segments
	CPU() int      // its thread is pinned to
	NUMANode() int // of that CPU
}

var (
	_ Where = (*shard.Conn)(nil)
	_ Where = (*shard.Socket)(nil)
	_ Where = (*shard.NetConn)(nil)
	_ Where = (*shard.NetPacketDialed)(nil)
	_ Where = (*shard.ServedConn)(nil)
)

// OnMove has f called whenever conn has come to another shard, with its number
// and its CPU and NUMA node: for a connection of Listen or DialContext, TCP or
// UDP, also below a *tls.Conn or the like. It returns false, and f is never
// called, for any other: one of Serve stays on its shard, and a Handler has a
// method Move for that ([Mover]). A nil f ends the calls.
//
// f is called by the thread of the new shard, before that processes anything of
// the connection, one call after the other. It must return soon and not block:
// conn's own methods may wait for that very thread, except Shard, CPU and
// NUMANode. Have it store where the connection is, or tell a goroutine by a
// buffered channel. To miss no move, call OnMove first and then look where conn
// is.
func OnMove(conn net.Conn, f func(shard, cpu, node int)) bool {
	for {
		switch c := conn.(type) {
		case interface {
			OnMove(f func(shard, cpu, node int))
		}:
			c.OnMove(f)
			return true
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return false
		}
	}
}

type whereKey struct{}

// ConnContext is for the field of that name of an http.Server: request contexts
// then tell where their connection lives, through WhereFrom.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	if w, ok := whereOf(conn); ok {
		return context.WithValue(ctx, whereKey{}, w)
	}
	return ctx
}

// WhereFrom returns where the connection of a request lives. It returns false
// when the context did not pass through ConnContext, or the connection is not
// one of a numastack.
func WhereFrom(ctx context.Context) (Where, bool) {
	w, ok := ctx.Value(whereKey{}).(Where)
	return w, ok
}

// whereOf looks also below a *tls.Conn and the like.
func whereOf(conn net.Conn) (Where, bool) {
	for {
		switch c := conn.(type) {
		case Where:
			return c, true
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil, false
		}
	}
}
