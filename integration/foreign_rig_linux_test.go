package integration

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"numastack/stack"
)

// transferTime is how long a large transfer or a load may take.
const transferTime = 60 * time.Second

// amount returns how many bytes, or calls, a test moves.
func amount(normal, soak int64) int64 {
	if os.Getenv(soakVar) != "" {
		return soak / raceFactor
	}
	return normal / raceFactor
}

// forForeign runs f on stacks that other people's code will use: with one shard
// and with many, steered by the kernel and by the shards. When a stack is closed,
// no goroutine may be left.
func forForeign(t *testing.T, many int, f func(t *testing.T, r *rig)) {
	t.Helper()
	needNetwork(t)
	counts := []int{1, many}
	if testing.Short() {
		counts = []int{2}
	}
	for _, shards := range counts {
		for _, steering := range []stack.Steering{stack.SteeringKernel, stack.SteeringUser} {
			v := variant{shards, steering, stack.OffloadAuto}
			before := runtime.NumGoroutine()
			t.Run(v.String(), func(t *testing.T) { f(t, open(t, v.config())) })
			if err := goroutinesAtMost(before); err != nil {
				t.Errorf("after %v: %v", v, err)
			}
		}
	}
}

// direction says which end of a connection is the stack's. listen takes any
// port of the address that dial can reach.
type direction struct {
	name         string
	listen       func(t *testing.T) net.Listener
	listenPacket func(t *testing.T) net.PacketConn
	dial         func(ctx context.Context, network, address string) (net.Conn, error)
	dialPacket   func(t *testing.T) net.PacketConn // a port to talk from
}

// forDirections runs f with the stack as the server and as the client. One of
// them uses IPv4, the other IPv6; which, depends on the steering, so that all
// four combinations have run at the end of forForeign.
func (r *rig) forDirections(t *testing.T, f func(t *testing.T, d direction)) {
	t.Helper()
	families := r.families()
	if r.cfg.Steering == stack.SteeringUser {
		families[0], families[1] = families[1], families[0]
	}
	for i, d := range []direction{
		{
			name:         "stack listens",
			listen:       func(t *testing.T) net.Listener { return listenOn(t, r.Listen, families[0].self) },
			listenPacket: func(t *testing.T) net.PacketConn { return listenPacketOn(t, r.ListenPacket, families[0].self) },
			dial:         new(net.Dialer).DialContext,
			dialPacket:   func(t *testing.T) net.PacketConn { return listenPacketOn(t, net.ListenPacket, families[0].host) },
		},
		{
			name:         "stack dials",
			listen:       func(t *testing.T) net.Listener { return listenOn(t, net.Listen, families[1].host) },
			listenPacket: func(t *testing.T) net.PacketConn { return listenPacketOn(t, net.ListenPacket, families[1].host) },
			dial:         r.DialContext,
			dialPacket:   func(t *testing.T) net.PacketConn { return listenPacketOn(t, r.ListenPacket, families[1].self) },
		},
	} {
		t.Run(d.name+"/"+families[i].name, func(t *testing.T) { f(t, d) })
	}
}

// oneFamily is for tests that take long: IPv4 with one shard, IPv6 with many.
func (r *rig) oneFamily() family { return r.families()[min(r.cfg.Shards, 2)-1] }

// listenOn listens on any port of addr until the test ends.
func listenOn(t *testing.T, listen func(network, address string) (net.Listener, error), addr netip.Addr) net.Listener {
	t.Helper()
	l, err := listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // most servers have closed it
	return l
}

// listenPacketOn opens any port of addr until the test ends.
func listenPacketOn(t *testing.T, listen func(network, address string) (net.PacketConn, error), addr netip.Addr) net.PacketConn {
	t.Helper()
	p, err := listen("udp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// connect dials l, with time for a large transfer.
func (d direction) connect(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	return dialLong(t, d.dial, l.Addr().String())
}

// dialLong connects with time for a large transfer.
func dialLong(t *testing.T, dial func(ctx context.Context, network, address string) (net.Conn, error), address string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := dial(ctx, "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(transferTime)); err != nil {
		t.Fatal(err)
	}
	return c
}

// each runs h in a goroutine for every connection of l. It returns what to call
// when the clients have gone: that closes l and waits for the last h.
func each(l net.Listener, h func(net.Conn)) (wait func()) {
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				h(c)
			})
		}
	})
	return func() {
		_ = l.Close() // a second time, in some tests
		running.Wait()
	}
}

// pattern is the start of chargen's stream, with its length in bytes: a
// transfer of any size, of which any part can be checked without holding it.
type pattern int64

// ReadAt implements io.ReaderAt.
func (p pattern) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) && off < int64(p) {
		piece := chargenBytes[off%chargenPeriod:]
		piece = piece[:min(int64(len(piece)), int64(p)-off)]
		took := copy(b[n:], piece)
		n += took
		off += int64(took)
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

func (p pattern) reader() *io.SectionReader { return io.NewSectionReader(p, 0, int64(p)) }

// send writes the pattern.
func (p pattern) send(w io.Writer) error {
	for at := int64(0); at < int64(p); at += chargenPeriod {
		if _, err := w.Write(chargenBytes[:min(chargenPeriod, int64(p)-at)]); err != nil {
			return fmt.Errorf("write from byte %d of %d on: %w", at, p, err)
		}
	}
	return nil
}

// receive reads the pattern, and no byte more.
func (p pattern) receive(r io.Reader) error {
	buf := make([]byte, min(chargenPeriod, int64(p)))
	for at := int64(0); at < int64(p); at += chargenPeriod {
		piece := buf[:min(chargenPeriod, int64(p)-at)]
		if n, err := io.ReadFull(r, piece); err != nil {
			return fmt.Errorf("read after %d of %d bytes: %w", at+int64(n), p, err)
		}
		if err := same(piece, chargenBytes[:len(piece)]); err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", at, p, err)
		}
	}
	return nil
}

// receiveAll is receive for what ends with the pattern.
func (p pattern) receiveAll(r io.Reader) error {
	if err := p.receive(r); err != nil {
		return err
	}
	switch n, err := r.Read(make([]byte, 1)); {
	case n != 0 || err == nil:
		return fmt.Errorf("after all %d bytes: read %d more, want EOF", p, n)
	case err != io.EOF:
		return fmt.Errorf("after all %d bytes: %w, want EOF", p, err)
	}
	return nil
}

// serverName is in the certificate of all servers.
const serverName = "stack.test"

// certificate returns a key with a certificate for serverName, signed by itself.
var certificate = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: serverName},
		DNSNames:     []string{serverName},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
})

// tlsConfigs returns what a server and a client that trusts it need.
func tlsConfigs(t *testing.T, protocols ...string) (server, client *tls.Config) {
	t.Helper()
	cert, err := certificate()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: protocols},
		&tls.Config{RootCAs: roots, ServerName: serverName, NextProtos: protocols}
}

// serveHTTP runs s on l, with TLS if it has a configuration for that, until the
// test ends. It returns the URL without a path.
func serveHTTP(t *testing.T, l net.Listener, s *http.Server) (url string) {
	t.Helper()
	serve, scheme := s.Serve, "http"
	if s.TLSConfig != nil {
		scheme = "https"
		serve = func(l net.Listener) error { return s.ServeTLS(l, "", "") }
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(l) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("the server ended with %v", err)
		}
	})
	return scheme + "://" + l.Addr().String()
}

// tool runs a program of the system to its end and returns what it wrote. The
// test is skipped when the program, which is in Debian's package, is missing.
func tool(t *testing.T, debian, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s (Debian: %s)", name, debian)
	}
	ctx, cancel := context.WithTimeout(t.Context(), transferTime)
	defer cancel()
	out, err := command(ctx, t, "", path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
