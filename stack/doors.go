package stack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"numastack/shard"
)

// The on-shard door.
type (
	// Handler is the application on the shard.
	Handler = shard.Handler
	// HalfCloser is a Handler that goes on after the peer has closed its side.
	HalfCloser = shard.HalfCloser
	// Mover is a Handler that is told when a connection has come to another shard.
	Mover = shard.Mover
	// Conn is a TCP connection as a Handler sees it.
	Conn = shard.Conn
	// Block is bytes that connections send as they are, without a copy.
	Block = shard.Block
	// Datagrams is called on the shard's thread for each UDP datagram.
	Datagrams = shard.DatagramHandler
	// Socket is a UDP port as a Datagrams function sees it.
	Socket = shard.Socket
)

// HandleTCP gives every connection that arrives at address to h, on its
// shard's thread. network is tcp, tcp4 or tcp6; address is as in Listen. The
// returned listener's Accept reports net.ErrClosed: h gets the connections.
func (s *Stack) HandleTCP(network, address string, h Handler) (net.Listener, error) {
	addrs, port, err := s.local("tcp", network, address)
	if err == nil && h == nil {
		err = errors.New("handler is nil")
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	l, err := s.set.Listen(addrs, port, s.cfg.Backlog, h)
	if err != nil {
		return nil, err
	}
	return handled{l}, nil
}

// NewBlock returns a Block with a copy of b. [Conn.WriteBlock] and
// [ServedConn.WriteBlock] send it, and WriteBlock(*Block) (int, error), which the
// connections of Listen and Dial have.
func NewBlock(b []byte) *Block { return shard.NewBlock(b) }

// Serve runs h for every connection that arrives at address: blocking code as
// a coroutine on the shard's thread. The net.Conn that h gets is a
// *[ServedConn], whose documentation says what h may do. network and address
// are as in Listen. The returned listener's Accept reports net.ErrClosed.
func (s *Stack) Serve(network, address string, h func(net.Conn)) (net.Listener, error) {
	addrs, port, err := s.local("tcp", network, address)
	if err == nil && h == nil {
		err = errors.New("handler is nil")
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	l, err := s.set.Serve(addrs, port, s.cfg.Backlog, h)
	if err != nil {
		return nil, err
	}
	return handled{l}, nil
}

// ServedConn is the connection of a handler that Serve runs.
type ServedConn = shard.ServedConn

// Offload runs f in the NodePool of the shard's NUMA node when conn belongs to a
// handler of Serve, also below a *tls.Conn or the like, and returns when f has
// ended; the shard goes on meanwhile. With any other conn it just calls f.
func Offload(conn net.Conn, f func()) {
	if served := servedConn(conn); served != nil {
		served.Offload(f)
	} else {
		f()
	}
}

// Sleep pauses a handler of Serve while its shard goes on; with any other conn
// it is time.Sleep.
func Sleep(conn net.Conn, d time.Duration) error {
	if served := servedConn(conn); served != nil {
		return served.Sleep(d)
	}
	time.Sleep(d)
	return nil
}

func servedConn(conn net.Conn) *ServedConn {
	for {
		switch c := conn.(type) {
		case *ServedConn:
			return c
		case interface{ NetConn() net.Conn }: // *tls.Conn
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

// handled is the net.Listener of connections that a Handler gets.
type handled struct{ l *shard.Listener }

func (h handled) Accept() (net.Conn, error) {
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: h.Addr(), Err: net.ErrClosed}
}
func (h handled) Close() error   { h.l.Close(); return nil }
func (h handled) Addr() net.Addr { return net.TCPAddrFromAddrPort(h.l.Addr()) }

// HandleUDP calls h on the shard's thread for every datagram that arrives at
// address. network is udp, udp4 or udp6; address is as in Listen. Close on the
// returned value releases the port.
func (s *Stack) HandleUDP(network, address string, h Datagrams) (UDPPort, error) {
	addrs, port, err := s.local("udp", network, address)
	if err == nil && h == nil {
		err = errors.New("handler is nil")
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	l, err := s.set.ListenUDP(addrs, port, h)
	if err != nil {
		return nil, err
	}
	return udpPort{l}, nil
}

// UDPPort is a port whose datagrams a function gets.
type UDPPort interface {
	Close() error
	Addr() net.Addr
	Multicaster
}

// Multicaster is what a UDP port can do with multicast groups. The stack has one
// device, so none is named. The methods of [PacketConn] say more.
type Multicaster interface {
	JoinGroup(group netip.Addr) error
	LeaveGroup(group netip.Addr) error
	SetMulticastTTL(ttl int) error
	SetMulticastLoopback(on bool) error
}

type udpPort struct{ *shard.UDPListener }

func (p udpPort) Close() error   { p.UDPListener.Close(); return nil }
func (p udpPort) Addr() net.Addr { return net.UDPAddrFromAddrPort(p.UDPListener.Addr()) }

// Listen listens for TCP connections like net.Listen: network is tcp, tcp4 or
// tcp6; address is host:port with an address of the stack, or without a host
// for all of them; port 0 chooses one. Up to Config.Backlog connections wait
// for Accept.
func (s *Stack) Listen(network, address string) (net.Listener, error) {
	addrs, port, err := s.local("tcp", network, address)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	l, err := s.set.ListenNet(addrs, port, s.cfg.Backlog)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// PacketConn is the net.PacketConn of ListenPacket.
type PacketConn = shard.NetPacketConn

var (
	_ Multicaster = (*PacketConn)(nil)
	_ Multicaster = (*shard.NetPacketDialed)(nil) // to send to a group
)

// ListenPacket opens a UDP port like net.ListenPacket: network is udp, udp4 or
// udp6, address is as in Listen. It returns a *[PacketConn], which may join
// multicast groups.
func (s *Stack) ListenPacket(network, address string) (net.PacketConn, error) {
	addrs, port, err := s.local("udp", network, address)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	p, err := s.set.ListenNetPacket(addrs, port)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// ListenMulticastUDP opens a UDP port that is in a multicast group, like
// net.ListenMulticastUDP: network is udp, udp4 or udp6; the port is open at all
// addresses of the group's family; it gets what any source sends to the group,
// but not what it sends there itself. Several may be open with one port.
func (s *Stack) ListenMulticastUDP(network string, group *net.UDPAddr) (*PacketConn, error) {
	addrs, to, err := s.multicast(network, group)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	return s.set.ListenNetMulticast(addrs, to)
}

// multicast finds out the addresses to open a multicast group's port at.
func (s *Stack) multicast(network string, group *net.UDPAddr) ([]netip.Addr, netip.AddrPort, error) {
	if group == nil {
		return nil, netip.AddrPort{}, &net.AddrError{Err: "missing address"}
	}
	to := netip.AddrPortFrom(group.AddrPort().Addr().Unmap().WithZone(""), group.AddrPort().Port())
	kind, family, err := parseNetwork(network)
	switch {
	case err != nil:
		return nil, to, err
	case kind != "udp":
		return nil, to, net.UnknownNetworkError(network)
	case !to.Addr().IsMulticast() || !family(to.Addr()):
		return nil, to, &net.AddrError{Err: "not a multicast address of " + network, Addr: group.String()}
	case group.Port != int(to.Port()):
		return nil, to, &net.AddrError{Err: "invalid port, want 0 to 65535", Addr: group.String()}
	}
	if network = "udp4"; to.Addr().Is6() {
		network = "udp6"
	}
	addrs, _, err := s.local("udp", network, ":0")
	return addrs, to, err
}

// local finds out which of the stack's addresses a listening address means.
// Without a host these are all that network allows: for TCP a wildcard per
// address family, for UDP each address.
func (s *Stack) local(want, network, address string) ([]netip.Addr, uint16, error) {
	kind, family, err := parseNetwork(network)
	if err != nil {
		return nil, 0, err
	}
	if kind != want {
		return nil, 0, net.UnknownNetworkError(network)
	}
	a, err := parseAddress(kind, address)
	if err != nil {
		return nil, 0, err
	}
	wildcard := !a.Addr().IsValid() || a.Addr().IsUnspecified()
	if a.Addr() == netip.IPv4Unspecified() {
		family = netip.Addr.Is4
	}
	var addrs []netip.Addr
	for _, p := range s.cfg.Addrs {
		addr := p.Addr()
		switch {
		case !family(addr), !wildcard && addr != a.Addr():
			continue
		case wildcard && kind == "tcp" && addr.Is4():
			addr = netip.IPv4Unspecified()
		case wildcard && kind == "tcp":
			addr = netip.IPv6Unspecified()
		}
		if !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	switch {
	case addrs != nil:
		return addrs, a.Port(), nil
	case wildcard || !family(a.Addr()):
		return nil, 0, &net.AddrError{Err: fmt.Sprintf("no such %s address in the stack, which has %v", network, s.cfg.Addrs), Addr: address}
	default:
		return nil, 0, fmt.Errorf("address %s: %w: the stack has %v", address, os.NewSyscallError("bind", syscall.EADDRNOTAVAIL), s.cfg.Addrs)
	}
}

// parseNetwork splits a network into tcp or udp and the addresses it accepts.
func parseNetwork(network string) (kind string, family func(netip.Addr) bool, err error) {
	kind = strings.TrimRight(network, "46")
	if kind != "tcp" && kind != "udp" {
		return "", nil, net.UnknownNetworkError(network)
	}
	switch network[len(kind):] {
	case "":
		return kind, netip.Addr.IsValid, nil
	case "4":
		return kind, netip.Addr.Is4, nil
	case "6":
		return kind, netip.Addr.Is6, nil
	default:
		return "", nil, net.UnknownNetworkError(network)
	}
}

// parseAddress reads host:port. The host is an IP address or empty, the port a
// number or the name of a service.
func parseAddress(kind, address string) (netip.AddrPort, error) {
	host, port, err := splitAddress(kind, address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var addr netip.Addr
	if host != "" {
		if addr, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, &net.AddrError{Err: "not an IP address", Addr: address}
		}
		addr = addr.Unmap().WithZone("")
	}
	return netip.AddrPortFrom(addr, port), nil
}

// splitAddress reads host:port with any host.
func splitAddress(kind, address string) (host string, port uint16, err error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, err
	}
	number, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		if errors.Is(err, strconv.ErrRange) {
			return "", 0, &net.AddrError{Err: "invalid port, want 0 to 65535", Addr: address}
		}
		named, err := net.LookupPort(kind, service)
		if err != nil {
			return "", 0, err
		}
		number = uint64(named)
	}
	return host, uint16(number), nil
}
