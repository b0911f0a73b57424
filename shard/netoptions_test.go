package shard

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// inspect runs f on the connection's shard.
func (n *NetConn) inspect(f func(c *Conn)) { n.sh.Load().do(func(*Shard) { f(n.c) }) }

func TestNetConnOptions(t *testing.T) {
	a, b := startPair(t, nil)
	client, _ := netPair(t, a, b)
	intOption := func(c *Conn, o tcpip.SockOptInt) int {
		v, _ := c.ep.GetSockOptInt(o)
		return v
	}
	idle := func(c *Conn) any {
		var o tcpip.KeepaliveIdleOption
		_ = c.ep.GetSockOpt(&o)
		return time.Duration(o)
	}
	interval := func(c *Conn) any {
		var o tcpip.KeepaliveIntervalOption
		_ = c.ep.GetSockOpt(&o)
		return time.Duration(o)
	}
	count := func(c *Conn) any { return intOption(c, tcpip.KeepaliveCountOption) }
	delay := func(c *Conn) any { return c.ep.SocketOptions().GetDelayOption() }
	keepAlive := func(c *Conn) any { return c.ep.SocketOptions().GetKeepAlive() }
	receive := func(c *Conn) any { return c.ep.SocketOptions().GetReceiveBufferSize() }
	send := func(c *Conn) any { return c.ep.SocketOptions().GetSendBufferSize() }
	for _, test := range []struct {
		name string
		set  func() error
		get  func(c *Conn) any
		want any
	}{
		{"small segments leave at once", nil, delay, false},
		{"SetNoDelay(false)", func() error { return client.SetNoDelay(false) }, delay, true},
		{"SetNoDelay(true)", func() error { return client.SetNoDelay(true) }, delay, false},
		{"keep-alive is on", nil, keepAlive, true},
		{"keep-alive idle", nil, idle, 15 * time.Second},
		{"SetKeepAlive(false)", func() error { return client.SetKeepAlive(false) }, keepAlive, false},
		{"SetKeepAlivePeriod", func() error { return client.SetKeepAlivePeriod(1500 * time.Millisecond) }, idle, 2 * time.Second},
		{"period leaves interval", nil, interval, 15 * time.Second},
		{"config", func() error {
			return client.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: -1, Interval: 7 * time.Second, Count: 3})
		}, interval, 7 * time.Second},
		{"config leaves idle", nil, idle, 2 * time.Second},
		{"config sets count", nil, count, 3},
		{"config enables", nil, keepAlive, true},
		{"config default", func() error { return client.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true}) }, count, keepAliveCount},
		{"SetReadBuffer", func() error { return client.SetReadBuffer(100_000) }, receive, int64(100_000)},
		{"read ring follows", nil, func(*Conn) any { return client.in.limit.Load() }, int64(100_000)},
		{"SetReadBuffer, too large", func() error { return client.SetReadBuffer(1 << 30) }, receive, int64(maxAutoBuffer)},
		{"read ring has its limit", nil, func(*Conn) any { return client.in.limit.Load() }, int64(netRing)},
		{"SetWriteBuffer, small", func() error { return client.SetWriteBuffer(1) }, send, int64(4096)},
		{"write ring follows", nil, func(*Conn) any { return client.out.limit.Load() }, int64(smallBlock)},
	} {
		if test.set != nil {
			if err := test.set(); err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		var got any
		client.inspect(func(c *Conn) { got = test.get(c) })
		if got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
	for name, err := range map[string]error{
		"SetReadBuffer(0)":      client.SetReadBuffer(0),
		"SetWriteBuffer(-1)":    client.SetWriteBuffer(-1),
		"SetKeepAlivePeriod(0)": client.SetKeepAlivePeriod(0),
	} {
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v, want EINVAL", name, err)
		}
	}
}

// Errors have the shape that package net gives them.
func TestNetConnErrorShapes(t *testing.T) {
	a, b := startPair(t, nil)
	buf := make([]byte, 1)
	for _, test := range []struct {
		name   string
		do     func(c *NetConn) error
		op     string
		source bool
		addr   string // local or remote
		want   error
	}{
		{"read deadline", func(c *NetConn) error {
			_ = c.SetReadDeadline(time.Unix(1, 0))
			_, err := c.Read(buf)
			return err
		}, "read", true, "remote", os.ErrDeadlineExceeded},
		{"write deadline", func(c *NetConn) error {
			_ = c.SetWriteDeadline(time.Unix(1, 0))
			_, err := c.Write(buf)
			return err
		}, "write", true, "remote", os.ErrDeadlineExceeded},
		{"write after CloseWrite", func(c *NetConn) error { _ = c.CloseWrite(); _, err := c.Write(buf); return err }, "write", true, "remote", syscall.EPIPE},
		{"read", func(c *NetConn) error { _ = c.Close(); _, err := c.Read(buf); return err }, "read", true, "remote", net.ErrClosed},
		{"empty read", func(c *NetConn) error { _ = c.Close(); _, err := c.Read(nil); return err }, "read", true, "remote", net.ErrClosed},
		{"write", func(c *NetConn) error { _ = c.Close(); _, err := c.Write(buf); return err }, "write", true, "remote", net.ErrClosed},
		{"empty write", func(c *NetConn) error { _ = c.Close(); _, err := c.Write(nil); return err }, "write", true, "remote", net.ErrClosed},
		{"close", func(c *NetConn) error { _ = c.Close(); return c.Close() }, "close", true, "remote", net.ErrClosed},
		{"CloseRead", func(c *NetConn) error { _ = c.Close(); return c.CloseRead() }, "close", true, "remote", net.ErrClosed},
		{"CloseWrite", func(c *NetConn) error { _ = c.Close(); return c.CloseWrite() }, "close", true, "remote", net.ErrClosed},
		{"CloseWrite after a reset", func(c *NetConn) error {
			c.inspect((*Conn).Abort)
			_, _ = c.Read(buf) // until it has ended
			return c.CloseWrite()
		}, "close", true, "remote", syscall.ENOTCONN},
		{"CloseRead after a reset", func(c *NetConn) error {
			c.inspect((*Conn).Abort)
			_, _ = c.Read(buf)
			return c.CloseRead()
		}, "close", true, "remote", syscall.ENOTCONN},
		{"deadline", func(c *NetConn) error { _ = c.Close(); return c.SetReadDeadline(time.Time{}) }, "set", false, "local", net.ErrClosed},
		{"no delay", func(c *NetConn) error { _ = c.Close(); return c.SetNoDelay(true) }, "set", false, "local", net.ErrClosed},
		{"linger", func(c *NetConn) error { _ = c.Close(); return c.SetLinger(0) }, "set", false, "local", net.ErrClosed},
		{"read buffer", func(c *NetConn) error { _ = c.Close(); return c.SetReadBuffer(1 << 16) }, "set", false, "local", net.ErrClosed},
		{"no delay after the end", func(c *NetConn) error {
			c.inspect((*Conn).Abort)
			_, _ = c.Read(buf) // until it has ended
			return c.SetNoDelay(true)
		}, "set", false, "local", net.ErrClosed},
		{"ReadFrom", func(c *NetConn) error {
			_ = c.Close()
			_, err := c.ReadFrom(bytes.NewReader(buf))
			return err
		}, "readfrom", true, "remote", net.ErrClosed},
		{"WriteTo", func(c *NetConn) error { _ = c.Close(); _, err := c.WriteTo(io.Discard); return err }, "writeto", true, "remote", net.ErrClosed},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, _ := netPair(t, a, b)
			err := test.do(client)
			op, ok := errors.AsType[*net.OpError](err)
			if !ok || !errors.Is(err, test.want) {
				t.Fatalf("error %v, want a *net.OpError with %v", err, test.want)
			}
			addr := map[string]net.Addr{"local": client.LocalAddr(), "remote": client.RemoteAddr()}[test.addr]
			if op.Op != test.op || op.Net != "tcp" || (op.Source != nil) != test.source || op.Addr.String() != addr.String() {
				t.Errorf("Op %q, Net %q, Source %v, Addr %v; want %q, tcp, %v, %v", op.Op, op.Net, op.Source, op.Addr, test.op, test.source, addr)
			}
		})
	}
}

// Linger 0 throws away what was written and resets the connection.
func TestLingerZero(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	if err := client.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer's Read: %v, want ECONNRESET", err)
	}
	if _, err := server.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer's Write: %v, want ECONNRESET", err)
	}
}

// A peer that takes nothing does not keep a closed connection, although bytes
// wait in its ring.
func TestLingerBounds(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) { cfg.SendBuffer, cfg.ReceiveBuffer = 16<<10, 16<<10 })
	client, server := netPair(t, a, b)
	if err := client.SetLinger(1); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write(make([]byte, 2*netRing)); err != nil { // one ring here, one there, and little between
		t.Fatal(err)
	}
	eventually(t, "the peer's ring is full", server.starved.Load)
	_ = client.Close()
	eventually(t, "the connection is given up", func() bool { return a.Stats()[0].ConnsOpen == 0 })
}

func TestCloseRead(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	if _, err := server.Write([]byte("early")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the bytes have arrived", func() bool { return client.in.len() == 5 })
	if err := client.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(client); string(got) != "early" || err != nil {
		t.Errorf("read %q, %v; want what had arrived, and EOF", got, err)
	}
	// More than all buffers hold: it has to go somewhere.
	if _, err := server.Write(make([]byte, 8<<20)); err != nil {
		t.Errorf("the peer's Write: %v", err)
	}
	if _, err := client.Write([]byte("still")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(server, got); string(got) != "still" || err != nil {
		t.Errorf("the peer read %q, %v; want what was written after CloseRead", got, err)
	}
}

// A Read that waits ends when another goroutine calls CloseRead.
func TestCloseReadWakes(t *testing.T) {
	a, b := startPair(t, nil)
	client, _ := netPair(t, a, b)
	ended := make(chan error)
	go func() { _, err := client.Read(make([]byte, 1)); ended <- err }()
	eventually(t, "Read waits", client.readable.expected.Load)
	if err := client.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != io.EOF {
		t.Errorf("Read: %v, want EOF", err)
	}
}

// What arrived before a reset is delivered before the error, also what did not
// fit into the ring.
func TestResetAfterData(t *testing.T) {
	const size = netRing + 100_000
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	sent := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(sent) //nolint:errcheck // never fails
	if _, err := server.Write(sent); err != nil {
		t.Fatal(err)
	}
	eventually(t, "everything has arrived", func() (all bool) {
		client.inspect(func(c *Conn) {
			waiting, _ := c.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
			all = client.in.len()+waiting == size
		})
		return all
	})
	server.inspect((*Conn).Abort)
	eventually(t, "Write fails", func() bool { _, err := client.Write([]byte("x")); return errors.Is(err, syscall.ECONNRESET) })
	var got bytes.Buffer
	if _, err := got.ReadFrom(client); !errors.Is(err, syscall.ECONNRESET) || !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("read %d bytes, %v; want all %d, then ECONNRESET", got.Len(), err, size)
	}
	_ = client.Close()
	eventually(t, "the connection is gone", func() bool { return a.Stats()[0].ConnsOpen == 0 })
}

// A failed connection with unread bytes lasts until Close, and no longer.
func TestResetUnread(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	if _, err := server.Write(make([]byte, 2*netRing)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ring is full", client.starved.Load)
	server.inspect((*Conn).Abort)
	_ = client.Close()
	eventually(t, "the connection is gone", func() bool { return a.Stats()[0].ConnsOpen == 0 })
}

// sizedReader gives pieces of changing sizes.
type sizedReader struct {
	r     io.Reader
	sizes []int
	n     int
}

func (r *sizedReader) Read(b []byte) (int, error) {
	size := r.sizes[r.n%len(r.sizes)]
	r.n++
	return r.r.Read(b[:min(size, len(b))])
}

func TestReadFromWriteTo(t *testing.T) {
	sent := make([]byte, 4<<20+123)
	rand.NewChaCha8([32]byte{1}).Read(sent) //nolint:errcheck // never fails
	for _, test := range []struct {
		name  string
		limit int // of the write buffer; 0: as it is
		sizes []int
	}{
		{"large pieces", 0, []int{largeBlock}},
		{"small pieces", 0, []int{1000}},
		{"mixed", 0, []int{1, largeBlock, largeBlock / 2, largeBlock/2 - 1, 0, 40_000}},
		{"ring smaller than a piece", 8 << 10, []int{largeBlock, 5000}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := startPair(t, nil)
			client, server := netPair(t, a, b)
			if test.limit > 0 {
				if err := client.SetWriteBuffer(test.limit); err != nil {
					t.Fatal(err)
				}
			}
			go func() {
				n, err := io.Copy(client, &sizedReader{r: bytes.NewReader(sent), sizes: test.sizes})
				if n != int64(len(sent)) || err != nil {
					t.Errorf("ReadFrom = %d, %v; want %d", n, err, len(sent))
				}
				_ = client.Close()
			}()
			h := sha256.New()
			if n, err := io.Copy(h, server); n != int64(len(sent)) || err != nil || [32]byte(h.Sum(nil)) != sha256.Sum256(sent) {
				t.Errorf("WriteTo = %d, %v; want %d and the same content", n, err, len(sent))
			}
		})
	}
}

func TestCopyErrors(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	broken := errors.New("broken")
	if n, err := client.ReadFrom(io.MultiReader(bytes.NewReader([]byte("abc")), iotest.ErrReader(broken))); n != 3 || !errors.Is(err, broken) {
		t.Errorf("ReadFrom = %d, %v; want 3 and the reader's error", n, err)
	}
	// What the writer did not take is still there.
	if n, err := server.WriteTo(&shortWriter{2}); n != 2 || !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("WriteTo = %d, %v; want 2 and a short write", n, err)
	}
	got := make([]byte, 1)
	if _, err := io.ReadFull(server, got); string(got) != "c" || err != nil {
		t.Errorf("the next Read gave %q, %v; want the byte that was left", got, err)
	}
	client.inspect((*Conn).Abort)
	if _, err := server.WriteTo(io.Discard); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("WriteTo after a reset: %v, want ECONNRESET", err)
	}
}

type shortWriter struct{ n int }

func (w *shortWriter) Write(b []byte) (int, error) { return min(w.n, len(b)), nil }

// A connection that waits for its peer holds no ring memory.
func TestIdleHoldsNoBlocks(t *testing.T) {
	a, b := startPair(t, nil)
	client, server := netPair(t, a, b)
	echoed := make(chan error)
	go func() { _, err := io.Copy(server, server); echoed <- err }()
	for _, size := range []int{10, 200_000} {
		go func() { _, _ = client.Write(make([]byte, size)) }()
		if _, err := io.ReadFull(client, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
	}
	released := func(r *byteRing) func() bool {
		return func() bool { return r.tail.Load()&tailReleased != 0 }
	}
	eventually(t, "the server's rings are empty", released(&server.in))
	eventually(t, "the server's rings are empty", released(&server.out))
	eventually(t, "the client's ring to the shard is empty", released(&client.out))
	_ = client.Close()
	if err := <-echoed; err != nil {
		t.Error(err)
	}
}

// TestCongestionControl: both ends of a connection have the configured one, and
// it carries data.
func TestCongestionControl(t *testing.T) {
	for configured, want := range map[string]tcpip.CongestionControlOption{"": "reno", "reno": "reno", "cubic": "cubic"} {
		a, b := startPair(t, func(cfg *Config) { cfg.Congestion = configured })
		client, server := netPair(t, a, b)
		data := make([]byte, 1<<20)
		go func() { _, _ = client.Write(data) }()
		if _, err := io.ReadFull(server, data); err != nil {
			t.Errorf("%q: %v", configured, err)
		}
		for _, end := range []*NetConn{client, server} {
			end.inspect(func(c *Conn) {
				var got tcpip.CongestionControlOption
				if err := c.ep.GetSockOpt(&got); err != nil || got != want {
					t.Errorf("%q: congestion control %q, %v, want %q", configured, got, err, want)
				}
			})
		}
	}
}
