package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"numastack/stack"
)

// TestDatagramSizes echoes datagrams up to the largest; what exceeds the MTU
// travels as IP fragments both ways.
func TestDatagramSizes(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		r.forFamilies(t, func(t *testing.T, f family) {
			largest := 65_507 // with IPv4's header
			if f.self.Is6() {
				largest = 65_487
			}
			echoDatagrams(t, f, 0, 1, 100, 1452, 1453, 1472, 1473, 4000, 9000, 30_000, largest)
		})
	})
}

// echoDatagrams sends a datagram of each size and waits for it to come back.
func echoDatagrams(t *testing.T, f family, sizes ...int) {
	t.Helper()
	c := dialUDP(t, f.self, echoPort)
	buf := make([]byte, 65_536)
	for i, size := range sizes {
		want := payload(uint64(i), size)
		if _, err := c.Write(want); err != nil {
			t.Errorf("send %d bytes: %v", size, err)
			continue
		}
		// A datagram that is lost should not take all of patience.
		if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(buf)
		if err != nil {
			t.Errorf("no echo of %d bytes: %v", size, err)
			continue
		}
		if err := same(buf[:n], want); err != nil {
			t.Errorf("echo of %d bytes: %v", size, err)
		}
	}
}

// TestSegmentedDatagrams hands the kernel 30,000 bytes at once, to be cut into
// datagrams (UDP_SEGMENT, udp(7)). With offload they reach the stack in one
// frame, and it has to do the cutting.
func TestSegmentedDatagrams(t *testing.T) {
	const total = 30_000
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		r.forFamilies(t, func(t *testing.T, f family) {
			for _, size := range []int{1000, 1452, 517} {
				c := dialUDP(t, f.self, echoPort)
				raw, err := c.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				var option error
				if err := raw.Control(func(fd uintptr) {
					option = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size)
				}); err != nil {
					t.Fatal(err)
				}
				if errors.Is(option, unix.ENOPROTOOPT) {
					t.Skip("needs a kernel with UDP_SEGMENT")
				} else if option != nil {
					t.Fatal(option)
				}
				before := r.sum()
				want := payload(uint64(size), total)
				if _, err := c.Write(want); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 0, total)
				buf := make([]byte, 65_536)
				for len(got) < total {
					n, err := c.Read(buf)
					if err != nil {
						t.Fatalf("segments of %d: after %d bytes: %v", size, len(got), err)
					}
					if want := min(size, total-len(got)); n != want {
						t.Fatalf("a datagram of %d bytes, want %d", n, want)
					}
					got = append(got, buf[:n]...)
				}
				if err := same(got, want); err != nil {
					t.Errorf("segments of %d: %v", size, err)
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				// Otherwise the cutting was not tested.
				frames, datagrams := r.sum().RxFrames-before.RxFrames, (total+size-1)/size
				if r.offloadsSegments() != (frames < uint64(datagrams)) {
					t.Errorf("segments of %d: %d datagrams came in %d frames, offloads are %s", size, datagrams, frames, r.Offloads())
				}
			}
		})
	})
}

// TestDatagramsInParallel keeps 64 sockets busy; nothing may be lost, since
// none has more than one datagram on its way.
func TestDatagramsInParallel(t *testing.T) {
	const sockets, rounds = 64, 20
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		families := r.families()
		failures := make(chan error, sockets)
		for i := range sockets {
			c := dialUDP(t, families[i%len(families)].self, echoPort)
			go func() {
				buf := make([]byte, 2048)
				for round := range rounds {
					want := payload(uint64(i<<8|round), 1+i*round)
					if _, err := c.Write(want); err != nil {
						failures <- err
						return
					}
					n, err := c.Read(buf)
					if err == nil {
						err = same(buf[:n], want)
					}
					if err != nil {
						failures <- fmt.Errorf("socket %d, round %d: %w", i, round, err)
						return
					}
				}
				failures <- nil
			}()
		}
		for range sockets {
			if err := <-failures; err != nil {
				t.Error(err)
			}
		}
	})
}

// TestDatagramsToKernel has the stack send many datagrams at once to several sockets
// of the kernel, interleaved, of sizes that share frames and of others. Each arrives as
// it was sent, in order, and with an offload most frames carry several.
func TestDatagramsToKernel(t *testing.T) {
	const peers, each = 4, 100
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			rng := rand.New(rand.NewPCG(1, 2))
			var sizes [peers][]int
			for i := range peers {
				size := 1 + rng.IntN(1400)
				for range each {
					if rng.IntN(20) == 0 {
						size = 1 + rng.IntN(1400)
					}
					sizes[i] = append(sizes[i], size)
				}
			}
			want := func(peer, n int) []byte {
				return bytes.Repeat([]byte{byte(peer<<6 | n&0x3f)}, sizes[peer][n])
			}
			var conns [peers]*net.UDPConn
			var addrs [peers]netip.AddrPort
			for i := range conns {
				conns[i] = listenKernelUDP(t, f.host)
				addrs[i] = conns[i].LocalAddr().(*net.UDPAddr).AddrPort()
			}
			// A datagram starts it, on the thread of whoever gets it.
			port, err := r.HandleUDP("udp", ":0", func(s *stack.Socket, _ []byte, _ netip.AddrPort) {
				for n := range each {
					for i, to := range addrs {
						if _, err := s.WriteTo(want(i, n), to); err != nil {
							t.Errorf("WriteTo: %v", err)
						}
					}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = port.Close() }()
			to := netip.AddrPortFrom(f.self, netip.MustParseAddrPort(port.Addr().String()).Port())
			for _, c := range conns { // the kernel and the stack learn their neighbors
				if _, err := c.WriteToUDPAddrPort([]byte("start"), to); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond)
				drainUDP(t, conns[:])
			}
			before := r.txFrames()
			if _, err := conns[0].WriteToUDPAddrPort([]byte("start"), to); err != nil {
				t.Fatal(err)
			}
			for i, c := range conns {
				buf := make([]byte, 2000)
				for n := range each {
					setDeadline(t, c)
					got, _, err := c.ReadFromUDPAddrPort(buf)
					if err != nil {
						t.Fatalf("peer %d, datagram %d: %v", i, n, err)
					}
					if !bytes.Equal(buf[:got], want(i, n)) {
						t.Fatalf("peer %d, datagram %d: %d bytes of %d, want %d of %d", i, n, got, buf[0], sizes[i][n], want(i, n)[0])
					}
				}
			}
			frames := r.txFrames() - before
			if r.offloadsSegments() && frames > peers*each/2 {
				t.Errorf("%d frames for %d datagrams, want several in most", frames, peers*each)
			}
			if !r.offloadsSegments() && frames < peers*each {
				t.Errorf("%d frames for %d datagrams that nobody can cut", frames, peers*each)
			}
		})
	})
}

// listenKernelUDP opens a socket of the kernel that holds what a burst brings.
func listenKernelUDP(t *testing.T, addr netip.Addr) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	})
	setDeadline(t, c)
	return c
}

// drainUDP reads what waits.
func drainUDP(t *testing.T, conns []*net.UDPConn) {
	t.Helper()
	buf := make([]byte, 2000)
	for _, c := range conns {
		for {
			if err := c.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(buf); err != nil {
				break
			}
		}
	}
}

func (r *rig) txFrames() (n uint64) {
	for _, s := range r.Stats().Shards {
		n += s.TxFrames
	}
	return n
}
