package integration

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// TestEchoSizes sends random bytes and half-closes: everything comes back, and
// then an orderly end.
func TestEchoSizes(t *testing.T) {
	sizes := []int{1, 2, 1459, 1460, 1461, 4095, 65_535, 65_536, 1 << 20, 8 << 20}
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		r.forFamilies(t, func(t *testing.T, f family) {
			for i, size := range sizes {
				if err := exchange(dialTCP(t, f.self, echoPort), payload(uint64(i), size)); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
		})
	})
}

// TestHalfCloseWithoutData closes a connection's sending side at once.
func TestHalfCloseWithoutData(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		r.forFamilies(t, func(t *testing.T, f family) {
			if err := exchange(dialTCP(t, f.self, echoPort), nil); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestHalfCloseIsPrompt looks for stalls in short connections: none should wait
// for a retransmission, which takes the kernel 200 ms (TCP_RTO_MIN).
func TestHalfCloseIsPrompt(t *testing.T) {
	const flows, stall = 100, 180 * time.Millisecond
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		r.forFamilies(t, func(t *testing.T, f family) {
			stalls := 0
			for i := range flows {
				c, begin := dialTCP(t, f.self, echoPort), time.Now()
				if err := exchange(c, payload(uint64(i), 3000)); err != nil {
					t.Fatal(err)
				}
				_ = c.Close()
				if time.Since(begin) > stall {
					stalls++
				}
			}
			// A busy machine may take the CPU away for that long, not often.
			if stalls > flows/20 {
				t.Errorf("%d of %d exchanges took more than %v", stalls, flows, stall)
			}
		})
	})
}

// TestManyConnections opens 500 connections before the first one sends.
func TestManyConnections(t *testing.T) {
	const conns = 500
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		families := r.families()
		var (
			opened, ended sync.WaitGroup
			failures      = make(chan error, conns)
			begin         = make(chan struct{})
		)
		opened.Add(conns)
		for i := range conns {
			ended.Go(func() {
				c, err := dialEcho(families[i%len(families)].self)
				opened.Done()
				if err != nil {
					failures <- err
					return
				}
				defer func() { _ = c.Close() }()
				<-begin
				if err := exchange(c, payload(uint64(i), 1+i*37)); err != nil {
					failures <- fmt.Errorf("connection %d: %w", i, err)
				}
			})
		}
		opened.Wait()
		eventually(t, func() error {
			if open := r.sum().ConnsOpen; open != conns {
				return fmt.Errorf("%d connections are open at once, want %d", open, conns)
			}
			return nil
		})
		close(begin)
		ended.Wait()
		close(failures)
		var errs []error
		for err := range failures {
			errs = append(errs, err)
		}
		if len(errs) > 0 {
			t.Errorf("%d of %d connections failed, the first: %v", len(errs), conns, errs[0])
		}
		if sum := r.sum(); sum.ConnsAccepted != conns || sum.ConnsRefused != 0 {
			t.Errorf("%d connections accepted and %d refused, want %d and 0", sum.ConnsAccepted, sum.ConnsRefused, conns)
		}
	})
}

// dialEcho is dialTCP for goroutines other than the test's.
func dialEcho(to netip.Addr) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, echoPort).String(), patience)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c.(*net.TCPConn), nil
}

// TestDiscard counts at the receiver what a sender sent.
func TestDiscard(t *testing.T) {
	sizes := []int{0, 1, 1460, 100_000, 3 << 20}
	forVariants(t, func(t *testing.T, r *rig) {
		ended := make(chan discarded, len(sizes))
		r.handleTCP(t, discardPort, discard{ended})
		r.forFamilies(t, func(t *testing.T, f family) {
			for _, size := range sizes {
				c := dialTCP(t, f.self, discardPort)
				if _, err := c.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				select {
				case got := <-ended:
					if got.bytes != size || got.err != nil {
						t.Errorf("the handler got %d bytes and then %v, want %d and nil", got.bytes, got.err, size)
					}
				case <-time.After(patience):
					t.Fatalf("no Close event %v after %d bytes and a FIN", patience, size)
				}
			}
		})
	})
}

// TestChargen reads from a service that sends as fast as it may, slowly at
// first, and hangs up in the middle.
func TestChargen(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.handleTCP(t, chargenPort, chargen{})
		r.forFamilies(t, func(t *testing.T, f family) {
			c := dialTCP(t, f.self, chargenPort)
			time.Sleep(20 * time.Millisecond) // both socket buffers fill up
			if err := chargenStream(c, 8<<20); err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	})
}
