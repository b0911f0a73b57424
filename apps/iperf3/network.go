package main

import (
	"context"
	"net"
	"syscall"
)

// network is the part of a TCP/IP stack a test needs. A *stack.Stack has these methods, and so has host.
type network interface {
	Listen(network, address string) (net.Listener, error)
	ListenPacket(network, address string) (net.PacketConn, error)
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// host is the kernel's own stack, reached through package net.
type host struct {
	mss int // TCP maximum segment size of dialed connections in bytes, 0: the kernel's choice
}

var _ network = host{}

func (host) Listen(network, address string) (net.Listener, error) {
	return net.Listen(network, address)
}

func (host) ListenPacket(network, address string) (net.PacketConn, error) {
	return net.ListenPacket(network, address)
}

func (h host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var dialer net.Dialer
	if h.mss > 0 {
		// The segment size is announced in the SYN, so it has to be set before the connection exists.
		dialer.Control = func(network, _ string, raw syscall.RawConn) error {
			if network != "tcp4" && network != "tcp6" {
				return nil
			}
			return setMSS(raw, h.mss)
		}
	}
	return dialer.DialContext(ctx, network, address)
}

// buffered is what connections with adjustable socket buffers have. Not every stack has it; -w is then a wish.
type buffered interface {
	SetReadBuffer(bytes int) error
	SetWriteBuffer(bytes int) error
}

// setNoDelay turns Nagle's algorithm off or on, where conn has it. Package net turns it off for every connection, but a
// test with small blocks measures something else then.
func setNoDelay(conn net.Conn, noDelay bool) error {
	if nagle, ok := conn.(interface{ SetNoDelay(noDelay bool) error }); ok {
		return nagle.SetNoDelay(noDelay)
	}
	return nil
}

// setWindow sizes both socket buffers of conn, if it has any to size. 0 leaves them alone.
func setWindow(conn any, bytes int) error {
	b, ok := conn.(buffered)
	if !ok || bytes <= 0 {
		return nil
	}
	if err := b.SetReadBuffer(bytes); err != nil {
		return err
	}
	return b.SetWriteBuffer(bytes)
}
