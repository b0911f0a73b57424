package main

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"numastack/stack"
)

// network is the part of a TCP/IP stack a server needs: a *stack.Stack, or
// host.
type network interface {
	Listen(network, address string) (net.Listener, error)
	// Serve calls h for every connection that arrives. On a numastack h runs
	// on the shard's thread: there, only conn's own methods may block.
	Serve(network, address string, h func(conn net.Conn)) (net.Listener, error)
}

var (
	_ network = (*stack.Stack)(nil)
	_ network = host{}
)

// host is the kernel's own stack, reached through package net.
type host struct{ logger *slog.Logger }

// Listen implements network.
func (host) Listen(network, address string) (net.Listener, error) {
	return net.Listen(network, address)
}

// Serve implements network, with a goroutine per connection. It ends with the
// listener.
func (n host) Serve(network, address string, h func(net.Conn)) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				// Most likely too many open files: some will be closed soon.
				n.logger.Error("cannot accept", "error", err)
				time.Sleep(100 * time.Millisecond)
				continue
			}
			go n.handle(c, h)
		}
	}()
	return l, nil
}

func (n host) handle(c net.Conn, h func(net.Conn)) {
	defer func() {
		if r := recover(); r != nil {
			n.logger.Error("handler panicked, its connection is closed",
				"peer", c.RemoteAddr().String(), "panic", r, "stack", string(debug.Stack()))
		}
		_ = c.Close()
	}()
	h(c)
}

// below returns the network's own connection below the layers of this
// program.
func below(c net.Conn) net.Conn {
	if p := peerOf(c); p != nil {
		return p.Conn
	}
	return c
}

// peerOf returns the peer below TLS, nil if there is none.
func peerOf(c net.Conn) *peer {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	p, _ := c.(*peer)
	return p
}
