package integration

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
