package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"

	"numastack/stack"
)

// doors are what package net and a stack have in common.
type doors interface {
	Listen(network, address string) (net.Listener, error)
	ListenPacket(network, address string) (net.PacketConn, error)
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// kernelDoors are those of package net.
type kernelDoors struct{ net.Dialer }

func (kernelDoors) Listen(network, address string) (net.Listener, error) {
	return net.Listen(network, address)
}

func (kernelDoors) ListenPacket(network, address string) (net.PacketConn, error) {
	return net.ListenPacket(network, address)
}

// attempt is a call through doors that are at self, with a peer on the other
// side of the device. What it opens ends with the test.
type attempt struct {
	*testing.T
	doors
	self, peer netip.Addr
	ctx        context.Context
}

func (a *attempt) listen(network, address string) error {
	l, err := a.Listen(network, address)
	if err == nil {
		a.Cleanup(func() { _ = l.Close() })
	}
	return err
}

func (a *attempt) listenPacket(network, address string) error {
	p, err := a.ListenPacket(network, address)
	if err == nil {
		a.Cleanup(func() { _ = p.Close() })
	}
	return err
}

func (a *attempt) dial(network, address string) error {
	c, err := a.DialContext(a.ctx, network, address)
	if err == nil {
		a.Cleanup(func() { _ = c.Close() })
	}
	return err
}

// conn is a connection to an echo server of the peer's side.
func (a *attempt) conn(network string) net.Conn {
	a.Helper()
	c, err := a.DialContext(a.ctx, network, netip.AddrPortFrom(a.peer, echoPort).String())
	if err != nil {
		a.Fatal(err)
	}
	a.Cleanup(func() { _ = c.Close() })
	return c
}

// both listens at two addresses after the other.
func both(listen func(network, address string) error, network, first, second string) error {
	if err := listen(network, first); err != nil {
		return fmt.Errorf("the first one: %w", err)
	}
	return listen(network, second)
}

// is and as say which errors match.
func is(want error) func(error) bool {
	return func(err error) bool { return errors.Is(err, want) }
}

func as[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// TestErrors makes mistakes, at the doors of the stack and at those of package
// net. Programs that branch on errors find the same ones.
func TestErrors(t *testing.T) {
	r := open(t, variants()[0].config())
	r.serveEcho(t, nil)
	kernel, err := net.Listen("tcp", fmt.Sprint(":", echoPort))
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	go serveEchoOn(kernel)
	kernelPackets, err := net.ListenPacket("udp", fmt.Sprint(":", echoPort))
	if err != nil {
		t.Fatal(err)
	}
	defer kernelPackets.Close()
	go echoPackets(kernelPackets)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()

	const port = ":5000"
	tests := []struct {
		name    string
		op      string // and the network, of the *net.OpError
		network string
		want    func(error) bool // nil: no error
		attempt func(a *attempt) error
	}{
		{"bad network", "listen", "tcp5", as[net.UnknownNetworkError], func(a *attempt) error { return a.listen("tcp5", port) }},
		{"bad network", "listen", "udp7", as[net.UnknownNetworkError], func(a *attempt) error { return a.listenPacket("udp7", port) }},
		{"bad network", "dial", "tcp5", as[net.UnknownNetworkError], func(a *attempt) error { return a.dial("tcp5", a.peer.String()+port) }},
		{"no network", "listen", "", as[net.UnknownNetworkError], func(a *attempt) error { return a.listen("", port) }},
		{"no port", "listen", "tcp", as[*net.AddrError], func(a *attempt) error { return a.listen("tcp", a.self.String()) }},
		{"no port", "listen", "udp", as[*net.AddrError], func(a *attempt) error { return a.listenPacket("udp", a.self.String()) }},
		{"no port", "dial", "udp", as[*net.AddrError], func(a *attempt) error { return a.dial("udp", a.peer.String()) }},
		{"port too large", "listen", "tcp", as[*net.AddrError], func(a *attempt) error { return a.listen("tcp", ":65536") }},
		{"negative port", "dial", "tcp", as[*net.AddrError], func(a *attempt) error { return a.dial("tcp", a.peer.String()+":-1") }},
		{"unknown service", "listen", "udp", as[*net.DNSError], func(a *attempt) error { return a.listenPacket("udp", ":nonesuch") }},
		{"unknown service", "dial", "tcp", as[*net.DNSError], func(a *attempt) error { return a.dial("tcp", a.peer.String()+":nonesuch") }},
		{"too many colons", "dial", "tcp", as[*net.AddrError], func(a *attempt) error { return a.dial("tcp", "fd00::1:80") }},
		{"unreachable name server", "dial", "tcp", as[*net.DNSError], func(a *attempt) error { return a.dial("tcp", "host.example.:80") }},
		{"the other family", "dial", "tcp6", as[*net.AddrError], func(a *attempt) error { return a.dial("tcp6", a.peer.String()+port) }},
		{"the other family", "dial", "udp6", as[*net.AddrError], func(a *attempt) error { return a.dial("udp6", a.peer.String()+port) }},
		{"the other family", "listen", "tcp6", as[*net.AddrError], func(a *attempt) error { return a.listen("tcp6", a.self.String()+port) }},
		{"foreign address", "listen", "tcp", is(syscall.EADDRNOTAVAIL), func(a *attempt) error { return a.listen("tcp", "192.0.2.1:5000") }},
		{"foreign address", "listen", "udp", is(syscall.EADDRNOTAVAIL), func(a *attempt) error { return a.listenPacket("udp", "192.0.2.1:5000") }},

		{"everywhere twice", "listen", "tcp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listen, "tcp", port, port) }},
		{"everywhere, then at an address", "listen", "tcp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listen, "tcp", port, a.self.String()+port) }},
		{"at an address, then everywhere", "listen", "tcp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listen, "tcp", a.self.String()+port, port) }},
		{"everywhere twice", "listen", "udp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listenPacket, "udp", port, port) }},
		{"everywhere, then at an address", "listen", "udp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listenPacket, "udp", port, a.self.String()+port) }},
		{"at an address, then everywhere", "listen", "udp", is(syscall.EADDRINUSE), func(a *attempt) error { return both(a.listenPacket, "udp", a.self.String()+port, port) }},
		{"one for each family", "", "", nil, func(a *attempt) error {
			return errors.Join(a.listen("tcp4", port), a.listen("tcp6", port), a.listenPacket("udp4", port), a.listenPacket("udp6", port))
		}},

		{"no route", "dial", "tcp", is(syscall.ENETUNREACH), func(a *attempt) error { return a.dial("tcp", "192.0.2.1:80") }},
		{"no route", "dial", "udp", is(syscall.ENETUNREACH), func(a *attempt) error { return a.dial("udp", "192.0.2.1:80") }},
		{"a stream to a multicast group", "dial", "tcp", is(syscall.ENETUNREACH), func(a *attempt) error { return a.dial("tcp", "239.1.2.3:80") }},
		{"nobody listens", "dial", "tcp", is(syscall.ECONNREFUSED), func(a *attempt) error { return a.dial("tcp", a.peer.String()+":1") }},
		{"canceled", "dial", "tcp", is(context.Canceled), func(a *attempt) error {
			_, err := a.DialContext(canceled, "tcp", a.peer.String()+port)
			return err
		}},
		{"no route to write to", "write", "udp", is(syscall.ENETUNREACH), func(a *attempt) error {
			p, err := a.ListenPacket("udp", a.self.String()+":0")
			if err != nil {
				a.Fatal(err)
			}
			defer p.Close()
			_, err = p.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80})
			return err
		}},

		{"write after CloseWrite", "write", "tcp", is(syscall.EPIPE), func(a *attempt) error {
			c := a.conn("tcp").(halfCloser)
			if err := c.CloseWrite(); err != nil {
				return err
			}
			_, err := c.Write([]byte("x"))
			return err
		}},
		{"read after CloseRead", "", "", is(io.EOF), func(a *attempt) error {
			c := a.conn("tcp")
			if err := c.(interface{ CloseRead() error }).CloseRead(); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1))
			return err
		}},
		{"write after Close", "write", "udp", is(net.ErrClosed), func(a *attempt) error {
			c := a.conn("udp")
			_ = c.Close()
			_, err := c.Write([]byte("x"))
			return err
		}},
		{"large datagram", "write", "udp", is(syscall.EMSGSIZE), func(a *attempt) error {
			_, err := a.conn("udp").Write(make([]byte, 65_508))
			return err
		}},
		{"address for a dialled port", "write", "udp", is(net.ErrWriteToConnected), func(a *attempt) error {
			c := a.conn("udp")
			_, err := c.(net.PacketConn).WriteTo([]byte("x"), c.RemoteAddr())
			return err
		}},
	}
	for side, a := range map[string]attempt{
		"stack":  {doors: r, self: r.self4, peer: r.host4},
		"kernel": {doors: &kernelDoors{}, self: r.host4, peer: r.self4},
	} {
		for _, test := range tests {
			t.Run(fmt.Sprint(side, "/", test.op, " ", test.network, ": ", test.name), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				a.T, a.ctx = t, ctx
				err := test.attempt(&a)
				if test.want == nil {
					if err != nil {
						t.Errorf("error %v, want none", err)
					}
					return
				}
				op, _ := errors.AsType[*net.OpError](err)
				if !test.want(err) || (op != nil) != (test.op != "") || op != nil && (op.Op != test.op || op.Net != test.network) {
					t.Errorf("error %v (%+v)", err, op)
				}
			})
		}
	}
}

// TestNoHandler gives nobody what arrives, and streams to doors for datagrams.
func TestNoHandler(t *testing.T) {
	r := open(t, variants()[0].config())
	group := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("239.1.2.3:5000"))
	for name, err := range map[string]error{
		"HandleTCP":                       second(r.HandleTCP("tcp", ":5000", nil)),
		"HandleUDP":                       second(r.HandleUDP("udp", ":5000", nil)),
		"Serve":                           second(r.Serve("tcp", ":5000", nil)),
		"HandleTCP of datagrams":          second(r.HandleTCP("udp", ":5000", echo{})),
		"Serve of datagrams":              second(r.Serve("udp", ":5000", func(net.Conn) {})),
		"HandleUDP of streams":            second(r.HandleUDP("tcp", ":5000", ignoreDatagrams)),
		"Listen of datagrams":             second(r.Listen("udp", ":5000")),
		"ListenPacket of streams":         second(r.ListenPacket("tcp", ":5000")),
		"ListenMulticastUDP of streams":   second(r.ListenMulticastUDP("tcp", group)),
		"ListenMulticastUDP of nobody":    second(r.ListenMulticastUDP("udp", nil)),
		"ListenMulticastUDP of one":       second(r.ListenMulticastUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.self4, 5000)))),
		"ListenMulticastUDP of no family": second(r.ListenMulticastUDP("udp6", group)),
	} {
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "listen" {
			t.Errorf("%s: %v, want a *net.OpError of listen", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestTooManyConnections opens more than MaxConns, from both sides.
func TestTooManyConnections(t *testing.T) {
	const limit = 3
	r := open(t, stack.Config{Shards: 1, MaxConns: limit})
	r.serveEcho(t, nil)
	kernel := listenKernel(t, family{"IPv4", r.host4, r.self4})
	var conns []net.Conn
	for range limit {
		conns = append(conns, r.dial(t, "tcp", kernel.Addr().String()))
	}
	_, err := r.DialContext(t.Context(), "tcp", kernel.Addr().String())
	wantOpError(t, err, syscall.ENOBUFS)
	// The reset may come while the client still connects.
	c, err := dialEcho(r.self4)
	if err == nil {
		err = roundTrip(c, []byte("x"))
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a client beyond the limit: %v, want ECONNRESET", err)
	}
	if n := r.sum().ConnsRefused; n != 2 {
		t.Errorf("%d connections counted as refused, want 2", n)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	eventually(t, func() error {
		c, err := dialEcho(r.self4)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		return roundTrip(c, []byte("there is room again"))
	})
}

// TestUseAfterStackClose uses everything that a stack gave after it was closed.
func TestUseAfterStackClose(t *testing.T) {
	r := open(t, variants()[0].config())
	r.serveEcho(t, nil)
	kernel := listenKernel(t, family{"IPv4", r.host4, r.self4})
	stream, datagrams := r.dial(t, "tcp", kernel.Addr().String()), r.dial(t, "udp", kernel.Addr().String())
	l, err := r.Listen("tcp", ":5000")
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.ListenPacket("udp", ":5000")
	if err != nil {
		t.Fatal(err)
	}
	group := netip.MustParseAddrPort("239.1.2.3:5001")
	m, err := r.ListenMulticastUDP("udp", net.UDPAddrFromAddrPort(group))
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	waiting := func(name string, f func() error) {
		wait.Go(func() {
			if err := f(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s while the stack is closed: %v, want net.ErrClosed", name, err)
			}
		})
	}
	waiting("Accept", func() error { return second(l.Accept()) })
	waiting("ReadFrom", func() error { _, _, err := p.ReadFrom(make([]byte, 1)); return err })
	waiting("Read of datagrams", func() error { return second(datagrams.Read(make([]byte, 1))) })
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	wait.Wait()
	for name, err := range map[string]error{
		"Listen":              second(r.Listen("tcp", ":0")),
		"ListenPacket":        second(r.ListenPacket("udp", ":0")),
		"ListenMulticastUDP":  second(r.ListenMulticastUDP("udp", net.UDPAddrFromAddrPort(group))),
		"HandleTCP":           second(r.HandleTCP("tcp", ":0", echo{})),
		"HandleUDP":           second(r.HandleUDP("udp", ":0", ignoreDatagrams)),
		"Serve":               second(r.Serve("tcp", ":0", func(net.Conn) {})),
		"Dial":                second(r.DialContext(t.Context(), "tcp", kernel.Addr().String())),
		"Dial of datagrams":   second(r.DialContext(t.Context(), "udp", kernel.Addr().String())),
		"Accept":              second(l.Accept()),
		"Read":                second(stream.Read(make([]byte, 1))),
		"Write":               second(stream.Write(make([]byte, 1))),
		"Read of datagrams":   second(datagrams.Read(make([]byte, 1))),
		"Write of datagrams":  second(datagrams.Write(make([]byte, 1))),
		"WriteTo":             second(p.WriteTo(make([]byte, 1), kernelUDPAddr(kernel))),
		"ReadFromUDPAddrPort": func() error { _, _, err := m.ReadFromAddrPort(make([]byte, 1)); return err }(),
		"JoinGroup":           p.(stack.Multicaster).JoinGroup(group.Addr()),
		"SetMulticastTTL":     m.SetMulticastTTL(2),
	} {
		t.Run(name, func(t *testing.T) { wantOpError(t, err, net.ErrClosed) })
	}
	if err := r.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

// kernelUDPAddr is the address of a listener for datagrams.
func kernelUDPAddr(l net.Listener) *net.UDPAddr {
	return net.UDPAddrFromAddrPort(netip.MustParseAddrPort(l.Addr().String()))
}
