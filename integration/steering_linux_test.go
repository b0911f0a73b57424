package integration

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"numastack/dispatch"
	"numastack/stack"
)

// TestSteering looks at who had to forward frames. With the steering program the
// kernel never picks a wrong queue; without it, some of many flows begin on one.
func TestSteering(t *testing.T) {
	const flows = 64
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		before := r.sum().Missteered // what the kernel said while the device came up
		r.forFamilies(t, func(t *testing.T, f family) {
			for i := range flows {
				c := dialTCP(t, f.self, echoPort)
				if err := roundTrip(c, payload(uint64(i), 3000)); err != nil {
					t.Fatal(err)
				}
				_ = c.Close()
			}
			echoDatagrams(t, f, 1, 1000, 5000, 40_000)
		})
		missteered := r.sum().Missteered - before
		switch want := r.Steering() == stack.SteeringUser && r.cfg.Shards > 1; {
		case want && missteered == 0:
			t.Errorf("no frame was forwarded, although nobody steers %d flows over %d shards", 2*flows, r.cfg.Shards)
		case !want && missteered != 0:
			t.Errorf("%d frames arrived on a wrong queue with %v steering and %d shards, want 0", missteered, r.Steering(), r.cfg.Shards)
		}
		if full := r.sum().RingFull; full != 0 {
			t.Errorf("%d frames lost because a ring was full, want 0", full)
		}
	})
}

// TestEveryBucketGetsFlows connects from 1,024 consecutive ports to a stack whose
// groups are the buckets: each gets the same number of connections, on the shard
// that owns it.
func TestEveryBucketGetsFlows(t *testing.T) {
	const (
		flows     = 1024
		firstPort = 20 * 1024 // a multiple of the number of buckets, below the ephemeral ports
	)
	for _, v := range variants() {
		if v.offload == stack.OffloadOff && !testing.Short() {
			continue // it changes nothing here
		}
		t.Run(v.String(), func(t *testing.T) {
			cfg := v.config()
			cfg.Groups = dispatch.Buckets
			r := open(t, cfg)
			var (
				mu    sync.Mutex
				homes = make(map[netip.AddrPort]int) // shard by client; guarded by mu
			)
			r.serveEcho(t, func(c *stack.Conn) {
				mu.Lock()
				homes[c.RemoteAddr()] = c.Shard()
				mu.Unlock()
			})
			r.forFamilies(t, func(t *testing.T, f family) {
				before, _ := r.groupFrames()
				for i := range flows {
					local := netip.AddrPortFrom(f.host, uint16(firstPort+i))
					dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(local), Timeout: patience}
					c, err := dialer.Dial("tcp", netip.AddrPortFrom(f.self, echoPort).String())
					if err != nil {
						t.Fatal(err)
					}
					setDeadline(t, c)
					if err := roundTrip(c, []byte("bucket")); err != nil {
						t.Errorf("port %d: %v", local.Port(), err)
					}
					_ = c.Close()
				}
				after, _ := r.groupFrames()
				if len(after) != dispatch.Buckets {
					t.Fatalf("the shards own %d groups, want %d", len(after), dispatch.Buckets)
				}
				// SYN, ACK, data and FIN are at least three frames.
				const least = 3 * flows / dispatch.Buckets
				for group, n := range after {
					if n-before[group] < least {
						t.Errorf("group %d got %d frames, want at least %d", group, n-before[group], least)
					}
				}
			})
			mu.Lock()
			defer mu.Unlock()
			perShard := make([]int, v.shards)
			for _, shard := range homes {
				perShard[shard]++
			}
			for shard, n := range perShard {
				if want := len(r.families()) * flows / v.shards; n != want {
					t.Errorf("shard %d got %d connections, want %d", shard, n, want)
				}
			}
		})
	}
}

// TestFlowStaysInItsGroup exchanges messages on one connection: all frames go
// to one group, which the shard owns that the connection names.
func TestFlowStaysInItsGroup(t *testing.T) {
	const messages = 100
	forVariants(t, func(t *testing.T, r *rig) {
		opened := make(chan int, 1)
		r.serveEcho(t, func(c *stack.Conn) { opened <- c.Shard() })
		r.forFamilies(t, func(t *testing.T, f family) {
			c := dialTCP(t, f.self, echoPort)
			if err := roundTrip(c, []byte("warm up")); err != nil { // neighbors are known now
				t.Fatal(err)
			}
			home := <-opened
			before, _ := r.groupFrames()
			for i := range messages {
				if err := roundTrip(c, payload(uint64(i), 100+i*50)); err != nil {
					t.Fatal(err)
				}
			}
			after, owner := r.groupFrames()
			if err := oneGroup(before, after, owner, home, messages); err != nil {
				t.Error(err)
			}
		})
	})
}

// linkChatter is how many frames a group may get in passing: neighbor discovery,
// which all get, and what the kernel tells multicast groups.
const linkChatter = 4

// oneGroup checks that one group of the shard home got at least least frames,
// and the others nothing but chatter.
func oneGroup(before, after map[int]uint64, owner map[int]int, home int, least uint64) error {
	grown := make(map[int]uint64) // frames by group
	for group := range after {
		if n := after[group] - before[group]; n > linkChatter {
			grown[group] = n
		}
	}
	if len(grown) != 1 {
		return fmt.Errorf("frames by group: %v; want all in one", grown)
	}
	for group, n := range grown {
		if n < least || owner[group] != home {
			return fmt.Errorf("%d frames went to group %d of shard %d, want at least %d, and shard %d as the connection says",
				n, group, owner[group], least, home)
		}
	}
	return nil
}

// TestWhereAgrees asks the connections of the door for any goroutine where they
// live, for both directions of opening one.
func TestWhereAgrees(t *testing.T) {
	const flows = 40
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			kernel, err := net.Listen("tcp", netip.AddrPortFrom(f.host, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer kernel.Close()
			go serveEchoOn(kernel)
			ours, err := r.Listen("tcp", netip.AddrPortFrom(f.self, 4000).String())
			if err != nil {
				t.Fatal(err)
			}
			defer ours.Close()

			seen := make(map[int]bool)
			for i := range flows {
				accepted, dialed := acceptOne(t, ours, f), r.dial(t, "tcp", kernel.Addr().String())
				for _, c := range []net.Conn{accepted, dialed} {
					where, ok := c.(stack.Where)
					if !ok {
						t.Fatalf("%T does not tell where it lives", c)
					}
					if where.Shard() < 0 || where.Shard() >= r.cfg.Shards {
						t.Fatalf("shard %d, want 0 to %d", where.Shard(), r.cfg.Shards-1)
					}
					seen[where.Shard()] = true
				}
				if err := roundTrip(dialed, []byte(strconv.Itoa(i))); err != nil {
					t.Fatal(err)
				}
				_ = accepted.Close()
				_ = dialed.Close()
			}
			if len(seen) != r.cfg.Shards {
				t.Errorf("%d connections live on %d of %d shards", 2*flows, len(seen), r.cfg.Shards)
			}
		})
	})
}

// acceptOne connects to l from the kernel and returns the stack's end.
func acceptOne(t *testing.T, l net.Listener, f family) net.Conn {
	t.Helper()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	client := dialTCP(t, f.self, number)
	c := accept(t, l)
	if got, want := c.RemoteAddr().String(), client.LocalAddr().String(); got != want {
		t.Errorf("accepted a connection of %s, want %s", got, want)
	}
	t.Cleanup(func() { _ = client.Close() })
	return c
}

// accept returns the next connection of l; it ends with the test.
func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		got <- result{c, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			t.Fatal(r.err)
		}
		t.Cleanup(func() { _ = r.c.Close() })
		setDeadline(t, r.c)
		return r.c
	case <-time.After(patience):
		t.Fatalf("nothing to accept on %v after %v", l.Addr(), patience)
		return nil
	}
}
