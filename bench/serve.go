package main

import (
	"context"
	"fmt"
	"net"
)

// The ports every peer's server listens on, and what it does there (RFC 862, 863, 864).
const (
	portEcho    = 7
	portDiscard = 9
	portChargen = 19
)

// serveBuffer is the size of a connection's buffer in bytes: large enough that the number
// of Read and Write calls does not decide the bulk rows.
const serveBuffer = 128 << 10

// serve accepts connections on the three ports, one goroutine each, until ctx is done.
// It calls ready once all ports listen.
func serve(ctx context.Context, listen func(port uint16) (net.Listener, error), ready func()) error {
	failed := make(chan error, 3)
	for port, handle := range map[uint16]func(net.Conn){
		portEcho: echo, portDiscard: discard, portChargen: chargen,
	} {
		l, err := listen(port)
		if err != nil {
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
		defer func() { _ = l.Close() }()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- fmt.Errorf("accept on port %d: %w", port, err)
					return
				}
				go func() {
					defer func() { _ = c.Close() }()
					handle(c)
				}()
			}
		}()
	}
	ready()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
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
