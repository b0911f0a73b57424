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
	portCount    = 8082 // tells what UDP's discard received, see serve_udp.go
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
	portCount:    perConn(tellReceived),
}

// datagramServices are what serve does with each port's datagrams, until it fails.
var datagramServices = map[uint16]func(net.PacketConn) error{
	portDiscard: discardDatagrams,
	portChargen: chargenDatagrams,
}

// opener opens the ports of a peer's stack.
type opener struct {
	stream    func(port uint16) (net.Listener, error)
	datagrams func(port uint16) (net.PacketConn, error) // nil: something else serves them
}

// serve serves on every port until ctx is done. It calls ready once all ports listen.
func serve(ctx context.Context, what services, open opener, ready func()) error {
	failed := make(chan error, len(what)+len(datagramServices))
	if open.datagrams != nil {
		for port, handle := range datagramServices {
			c, err := open.datagrams(port)
			if err != nil {
				return fmt.Errorf("open UDP port %d: %w", port, err)
			}
			defer func() { _ = c.Close() }()
			go func() { failed <- fmt.Errorf("serve on UDP port %d: %w", port, handle(c)) }()
		}
	}
	for port, accept := range what {
		l, err := open.stream(port)
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
	// Most requests are messageBytes long, and a short connection should not pay for more.
	// One that fills the buffer shows that the next ones may be larger.
	buf := make([]byte, 4<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
		if n == len(buf) && n < serveBuffer {
			buf = make([]byte, serveBuffer)
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
	for {
		if _, err := c.Write(chargenBytes); err != nil {
			return
		}
	}
}

// chargenBytes is what chargen sends: the printable characters, over and over.
var chargenBytes = func() []byte {
	b := make([]byte, serveBuffer)
	for i := range b {
		b[i] = ' ' + byte(i%95)
	}
	return b
}()
