package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// nameServer is the one of /etc/resolv.conf in these tests (RFC 5737). The stack
// reaches it through a gateway.
var nameServer = netip.MustParseAddr("198.51.100.53")

// names is what there is to look names up.
var names struct {
	missing error // why nothing can be looked up, or nil
}

// useNameServer mounts a file over /etc/resolv.conf. It has to be done before
// the first look-up: Go remembers for 5 s what the file said.
func useNameServer() error {
	f, err := os.CreateTemp("", "resolv.conf")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // the mount keeps it
	if _, err := fmt.Fprintln(f, "nameserver", nameServer); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount over /etc/resolv.conf: %w", err)
	}
	return nil
}

// dnsServer is a name server of the kernel's side.
type dnsServer struct {
	client netip.Addr              // who may ask
	names  map[string][]netip.Addr // by name with a dot at the end

	mu      sync.Mutex
	queries map[dnsQuery]int // guarded by mu
}

// dnsQuery is a name that was asked for over a network; both are empty for what
// somebody else than the client asked.
type dnsQuery struct{ network, name string }

// serveDNS answers for names on the name server's address until the test ends.
func serveDNS(t *testing.T, client netip.Addr, names map[string][]netip.Addr) *dnsServer {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	addr := &netlink.Addr{IPNet: netlink.NewIPNet(nameServer.AsSlice())}
	if err := netlink.AddrAdd(lo, addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.AddrDel(lo, addr); err != nil {
			t.Error(err)
		}
	})
	d := &dnsServer{client: client, names: names, queries: make(map[dnsQuery]int)}
	at := netip.AddrPortFrom(nameServer, 53).String()
	datagrams, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = datagrams.Close() })
	streams, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = streams.Close() })
	go d.serveUDP(datagrams)
	go d.serveTCP(streams)
	return d
}

func (d *dnsServer) serveUDP(c net.PacketConn) {
	buf := make([]byte, 512)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(d.answer("udp", from, buf[:n]), from) // who asked will judge
	}
}

func (d *dnsServer) serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 512)
			for {
				if _, err := io.ReadFull(c, buf[:2]); err != nil { // a length, RFC 1035 section 4.2.2
					return
				}
				question := buf[:min(int(binary.BigEndian.Uint16(buf)), len(buf))]
				if _, err := io.ReadFull(c, question); err != nil {
					return
				}
				answer := d.answer("tcp", c.RemoteAddr(), question)
				if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
					return
				}
			}
		}()
	}
}

// answer answers a question. What is too long for a datagram is truncated, which
// leads the resolver to TCP (RFC 1035 section 4.2.1).
func (d *dnsServer) answer(network string, from net.Addr, question []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(question); err != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	query := dnsQuery{network, q.Name.String()}
	if netip.MustParseAddrPort(from.String()).Addr() != d.client {
		query = dnsQuery{}
	}
	d.mu.Lock()
	d.queries[query]++
	d.mu.Unlock()
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	addrs, known := d.names[q.Name.String()]
	if !known {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, r)
	}
	b, err := m.Pack()
	if network == "udp" && len(b) > 512 {
		m.Truncated, m.Answers = true, nil
		b, err = m.Pack()
	}
	if err != nil {
		return nil
	}
	return b
}

func (d *dnsServer) asked(network, name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queries[dnsQuery{network, name}]
}

// TestResolver looks names up through the stack, and dials them: one of both
// families, one whose IPv6 address swallows everything, one whose answer takes
// TCP, and one that does not exist.
func TestResolver(t *testing.T) {
	if needNetwork(t); names.missing != nil {
		t.Skipf("needs a name server: %v", names.missing)
	}
	n := newSubnet()
	cfg := n.configure(t, variants()[0].config())
	// The kernel forwards nothing, so what is beyond our subnet and inside of its
	// own gets no answer. Global addresses, for Go prefers IPv4 to local ones of
	// IPv6 (RFC 6724 section 2.1).
	host := netip.MustParseAddr("2001:db8::1")
	hole := netip.MustParseAddr("2001:db8::dead")
	cfg.HostAddrs = append(cfg.HostAddrs, netip.PrefixFrom(host, 64))
	cfg.Addrs = append(cfg.Addrs, netip.PrefixFrom(host.Next(), 126))
	cfg.Gateways = []netip.Addr{n.host4, host}
	r := n.open(t, cfg)

	many := make([]netip.Addr, 100)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
	}
	server := serveDNS(t, n.self4, map[string][]netip.Addr{
		"both.example.": {n.host4, host},
		"four.example.": {n.host4},
		"hole.example.": {n.host4, hole},
		"many.example.": many,
	})
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()

	for _, test := range []struct {
		network, name string
		want          []netip.Addr // nil: there is no such host
		tcp           bool
	}{
		{"ip", "both.example", []netip.Addr{n.host4, host}, false},
		{"ip4", "both.example.", []netip.Addr{n.host4}, false},
		{"ip6", "both.example.", []netip.Addr{host}, false},
		{"ip", "four.example.", []netip.Addr{n.host4}, false},
		{"ip6", "four.example.", nil, false},
		{"ip", "many.example.", many, true},
		{"ip", "absent.example.", nil, false},
	} {
		addrs, err := r.Resolver().LookupNetIP(ctx, test.network, test.name)
		for i, a := range addrs {
			addrs[i] = a.Unmap()
		}
		slices.SortFunc(addrs, netip.Addr.Compare)
		var dns *net.DNSError
		if notFound := errors.As(err, &dns) && dns.IsNotFound; !slices.Equal(addrs, test.want) || notFound != (test.want == nil) {
			t.Errorf("%s %s: %v, %v; want %v", test.network, test.name, addrs, err, test.want)
		}
		name := strings.TrimSuffix(test.name, ".") + "."
		if udp, tcp := server.asked("udp", name), server.asked("tcp", name); udp == 0 || test.tcp != (tcp != 0) {
			t.Errorf("%s %s: asked %d times by UDP and %d by TCP, want the latter: %v", test.network, test.name, udp, tcp, test.tcp)
		}
	}

	port := kernelEcho(t, n.host4, host)
	for _, test := range []struct {
		network, name string
		want          netip.Addr
		dials         uint64 // TCP connections begun
	}{
		{"tcp", "both.example", host, 1},
		{"tcp4", "both.example", n.host4, 1},
		{"tcp", "four.example", n.host4, 1},
		{"tcp", "hole.example", n.host4, 2}, // to the other address first
		{"udp", "both.example", host, 0},
		{"udp4", "hole.example", n.host4, 0},
	} {
		before := r.sum().ConnsDialed
		c, err := r.DialContext(ctx, test.network, net.JoinHostPort(test.name, port))
		if err != nil {
			t.Errorf("%s %s: %v", test.network, test.name, err)
			continue
		}
		setDeadline(t, c)
		if err := roundTrip(c, []byte(test.name)); err != nil {
			t.Errorf("%s %s: %v", test.network, test.name, err)
		}
		if got := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr(); got != test.want {
			t.Errorf("%s %s: connected to %v, want %v", test.network, test.name, got, test.want)
		}
		if dials := r.sum().ConnsDialed - before; dials != test.dials {
			t.Errorf("%s %s: %d TCP connections were begun, want %d", test.network, test.name, dials, test.dials)
		}
		_ = c.Close()
	}
	for _, address := range []string{"absent.example:80", "four.example:80"} {
		c, err := r.DialContext(ctx, "tcp6", address)
		var op *net.OpError
		var dns *net.DNSError
		if c != nil || !errors.As(err, &op) || op.Op != "dial" || op.Net != "tcp6" || !errors.As(err, &dns) || !dns.IsNotFound {
			t.Errorf("tcp6 %s: %v, %v; want a *net.OpError with a *net.DNSError that says it does not exist", address, c, err)
		}
	}
	if n := server.asked("", ""); n != 0 {
		t.Errorf("the name server was asked %d times from addresses that are not the stack's", n)
	}
}

// kernelEcho echoes TCP and UDP on one port of several of the kernel's addresses
// and returns its number.
func kernelEcho(t *testing.T, addrs ...netip.Addr) string {
	t.Helper()
	const port = 7777
	for _, a := range addrs {
		at := netip.AddrPortFrom(a, port).String()
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go serveEchoOn(l)
		p, err := net.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		go echoPackets(p)
	}
	return itoa(port)
}
