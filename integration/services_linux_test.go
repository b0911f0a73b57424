package integration

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"

	"numastack/stack"
)

// Ports of the services that tests run on the shards.
const (
	echoPort    = 7
	discardPort = 9
	chargenPort = 19
)

// serveEcho answers TCP and UDP on the echo port. If opened is not nil it gets
// every connection.
func (r *rig) serveEcho(t *testing.T, opened func(*stack.Conn)) {
	t.Helper()
	r.handleTCP(t, echoPort, echo{opened})
	if _, err := r.HandleUDP("udp", ":"+strconv.Itoa(echoPort), func(s *stack.Socket, b []byte, from netip.AddrPort) {
		_, _ = s.WriteTo(b, from) // a test that misses the answer fails
	}); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) handleTCP(t *testing.T, port int, h stack.Handler) {
	t.Helper()
	if _, err := r.HandleTCP("tcp", ":"+strconv.Itoa(port), h); err != nil {
		t.Fatal(err)
	}
}

// echo sends back what it receives.
type echo struct{ opened func(*stack.Conn) }

func (e echo) Open(c *stack.Conn) {
	if e.opened != nil {
		e.opened(c)
	}
}

func (echo) Data(c *stack.Conn, b []byte) int {
	n, err := c.Write(b)
	if err != nil {
		c.Close()
		return len(b)
	}
	return n
}

func (echo) Writable(*stack.Conn)     {}
func (echo) Close(*stack.Conn, error) {}

// discard counts what it receives and reports the sum of each connection when
// that ends. ended must have room.
type discard struct{ ended chan discarded }

type discarded struct {
	bytes int
	err   error
}

func (discard) Open(c *stack.Conn) { c.SetContext(new(int)) }

func (discard) Data(c *stack.Conn, b []byte) int {
	*c.Context().(*int) += len(b)
	return len(b)
}

func (discard) Writable(*stack.Conn) {}

func (d discard) Close(c *stack.Conn, err error) {
	d.ended <- discarded{*c.Context().(*int), err}
}

// chargen sends the stream that chargenStream checks until the peer is gone.
type chargen struct{}

// chargenPeriod is a prime, so that a piece that is lost or comes twice does not
// fit by chance.
const chargenPeriod = 65521

var chargenBytes = payload(chargenPeriod, chargenPeriod)

func (g chargen) Open(c *stack.Conn) {
	c.SetContext(new(int))
	g.Writable(c)
}

func (chargen) Data(_ *stack.Conn, b []byte) int { return len(b) }

func (chargen) Writable(c *stack.Conn) {
	sent := c.Context().(*int)
	for {
		piece := chargenBytes[*sent%chargenPeriod:]
		n, err := c.Write(piece)
		*sent += n
		if err != nil || n < len(piece) {
			return
		}
	}
}

func (chargen) Close(*stack.Conn, error) {}

// EOF implements stack.HalfCloser: the peer has nothing to say, but listens.
func (chargen) EOF(*stack.Conn) {}

// chargenStream reads n bytes of a chargen connection and checks them.
func chargenStream(c io.Reader, n int) error {
	buf := make([]byte, chargenPeriod)
	for at := 0; at < n; at += chargenPeriod {
		if _, err := io.ReadFull(c, buf); err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		if err := same(buf, chargenBytes); err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
	}
	return nil
}

// payload returns n bytes that look random and depend on seed.
func payload(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}).Read(b) // never fails
	return b
}

// same says where got differs from want.
func same(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for at < len(got) && at < len(want) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("got %d bytes, want %d; they differ from byte %d on", len(got), len(want), at)
}

// halfCloser is what both kernel and stack give for a TCP connection.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// exchange sends b to an echo service, closes its side and reads until the peer
// has closed the other: it returns nil if b came back and then an orderly end.
func exchange(c halfCloser, b []byte) error {
	var (
		sending sync.WaitGroup
		sendErr error
	)
	sending.Go(func() {
		if _, sendErr = c.Write(b); sendErr == nil {
			sendErr = c.CloseWrite()
		}
	})
	got, err := io.ReadAll(c)
	if err != nil {
		_ = c.Close() // ends the writer
		sending.Wait()
		return fmt.Errorf("read after %d bytes: %w", len(got), err)
	}
	if sending.Wait(); sendErr != nil {
		return fmt.Errorf("send %d bytes: %w", len(b), sendErr)
	}
	return same(got, b)
}

// roundTrip sends b over an echo connection, which stays open, and reads it
// back.
func roundTrip(c net.Conn, b []byte) error {
	if _, err := c.Write(b); err != nil {
		return err
	}
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	return same(got, b)
}

// ignoreDatagrams is a service that has nothing to do.
func ignoreDatagrams(*stack.Socket, []byte, netip.AddrPort) {}
