package main

import (
	"context"
	"fmt"
	"net"
)

// The ports every peer's server listens on, and what it does there (RFC 862, 863, 864).
const (
	portEcho     = 7
	portDiscard  = 9
	portChargen  = 19
	portFastHTTP = 80
	portNetHTTP  = 8080
	portMemory   = 8081 // tells the server's own memory, see memory.go
)

// serveBuffer is the size of a connection's buffer in bytes: large enough that the number
// of Read and Write calls does not decide the bulk rows.
const serveBuffer = 128 << 10

// services are what serve does with each port's listener, until it fails.
type services map[uint16]func(net.Listener) error

// allServices have a goroutine per connection.
var allServices = services{
	portEcho:     perConn(echo),
	portDiscard:  perConn(discard),
	portChargen:  perConn(chargen),
	portFastHTTP: serveFastHTTP,
	portNetHTTP:  serveNetHTTP,
	portMemory:   perConn(tellMemory),
}

// serve serves on every port until ctx is done. It calls ready once all ports listen.
func serve(ctx context.Context, what services, listen func(port uint16) (net.Listener, error), ready func()) error {
	failed := make(chan error, len(what))
	for port, accept := range what {
		l, err := listen(port)
		if err != nil {
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
		defer func() { _ = l.Close() }()
		go func() { failed <- fmt.Errorf("serve on port %d: %w", port, accept(l)) }()
	}
	ready()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// perConn runs handle in a goroutine for every connection, and closes it after that.
func perConn(handle func(net.Conn)) func(net.Listener) error {
	return func(l net.Listener) error {
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer func() { _ = c.Close() }()
				handle(c)
			}()
		}
	}
}

// The handlers end at the first error: the client has closed or reset the connection.

func echo(c net.Conn) {
	// A request is messageBytes long, and a short connection should not pay for more.
	buf := make([]byte, 4<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func discard(c net.Conn) {
	buf := make([]byte, serveBuffer)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}

func chargen(c net.Conn) {
	buf := make([]byte, serveBuffer)
	for i := range buf {
		buf[i] = ' ' + byte(i%95) // the printable characters
	}
	for {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}
