package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"numastack/stack"
)

// TestOpenClose opens and closes a stack 20 times and looks at what is left:
// devices, descriptors, goroutines, threads.
func TestOpenClose(t *testing.T) {
	needNetwork(t)
	const rounds, shards = 20, 2
	round := func() {
		n := newSubnet()
		s, err := stack.New(n.configure(t, stack.Config{Shards: shards}))
		if err != nil {
			t.Fatal(err)
		}
		r := &rig{Stack: s, subnet: n}
		r.serveEcho(t, nil)
		c := dialTCP(t, r.self4, echoPort)
		if err := exchange(c, payload(1, 100_000)); err != nil {
			t.Error(err)
		}
		_ = c.Close()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("a second Close: %v", err)
		}
		if _, err := net.InterfaceByName(r.device); err == nil {
			t.Errorf("the device %s outlives its stack", r.device)
		}
	}
	round() // the runtime's own threads and descriptors are there after it
	before := resources(t)
	for range rounds {
		round()
	}
	eventually(t, func() error {
		now := resources(t)
		switch {
		case now.descriptors > before.descriptors:
			return fmt.Errorf("%d descriptors, %d before", now.descriptors, before.descriptors)
		case now.goroutines > before.goroutines:
			return fmt.Errorf("%d goroutines, %d before", now.goroutines, before.goroutines)
		case now.shardThreads > 0:
			return fmt.Errorf("%d threads of shards are left", now.shardThreads)
		// The runtime keeps a thread now and then; a leak would be one per shard.
		case now.threads > before.threads+rounds*shards/4:
			return fmt.Errorf("%d threads, %d before", now.threads, before.threads)
		}
		return nil
	})
}

type held struct{ descriptors, goroutines, threads, shardThreads int }

// resources counts what this process holds.
func resources(t *testing.T) (h held) {
	t.Helper()
	runtime.GC() // finalizers close what nobody holds, and should have nothing to do
	descriptors, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob("/proc/self/task/*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has just ended
		}
		h.threads++
		if strings.HasPrefix(string(b), "numastack/") {
			h.shardThreads++
		}
	}
	h.descriptors, h.goroutines = len(descriptors), runtime.NumGoroutine()
	return h
}

// TestThreadNames makes sure that the test above would see a thread. The main
// thread must not be one of them: it outlives its goroutine, and its name is the
// process's.
func TestThreadNames(t *testing.T) {
	open(t, stack.Config{Shards: 2})
	if n := resources(t).shardThreads; n != 2 {
		t.Errorf("%d threads have the name of a shard, want 2", n)
	}
	if name, err := os.ReadFile("/proc/self/comm"); err != nil || strings.HasPrefix(string(name), "numastack/") {
		t.Errorf("the process is now called %q, %v", name, err)
	}
}

// TestCloseWithConnections closes a stack whose connections are open: every peer
// gets what was written and an orderly end.
func TestCloseWithConnections(t *testing.T) {
	const conns = 50
	for _, v := range variants() {
		t.Run(v.String(), func(t *testing.T) {
			cfg := v.config()
			cfg.Drain = patience
			r := open(t, cfg)
			r.serveEcho(t, nil)
			l, err := r.Listen("tcp", ":8080")
			if err != nil {
				t.Fatal(err)
			}
			families := r.families()
			var peers, ours []net.Conn
			for i := range conns {
				f := families[i%len(families)]
				c := dialTCP(t, f.self, echoPort)
				if err := roundTrip(c, payload(uint64(i), 1000)); err != nil {
					t.Fatal(err)
				}
				peers = append(peers, c)
			}
			// Connections of the other door, with more on its way than fits into
			// the peer's window.
			farewell := payload(7, 1<<20)
			heard := make(chan error, len(families))
			for _, f := range families {
				peer := dialTCP(t, f.self, 8080)
				go func() {
					got, err := io.ReadAll(peer)
					if err == nil {
						err = same(got, farewell)
					}
					heard <- err
				}()
				c := accept(t, l)
				if _, err := c.Write(farewell); err != nil {
					t.Fatal(err)
				}
				ours = append(ours, c)
			}
			begin := time.Now()
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took > stack.DefaultDrain+patience/4 {
				t.Errorf("Close took %v, although every peer reads", took)
			}
			for i, c := range peers {
				if _, err := io.ReadAll(c); err != nil {
					t.Errorf("peer %d of %d: %v, want an orderly end", i, len(peers), err)
				}
			}
			for _, c := range ours {
				if err := <-heard; err != nil {
					t.Errorf("a peer that was sent %d bytes just before Close: %v", len(farewell), err)
				}
				_, err := c.Read(make([]byte, 1))
				wantOpError(t, err, net.ErrClosed)
			}
			select {
			case <-r.Done():
			default:
				t.Error("Done is open after Close")
			}
			if err := r.Err(); err != nil {
				t.Errorf("Err is %v after Close, want nil", err)
			}
			_, err = r.Listen("tcp", ":8081")
			wantOpError(t, err, net.ErrClosed)
			_, err = r.DialContext(t.Context(), "tcp", netip.AddrPortFrom(r.host4, 80).String())
			wantOpError(t, err, net.ErrClosed)
		})
	}
}

// TestDeviceDeleted deletes the device of a running stack: everybody is told,
// and no thread spins on the dead descriptor.
func TestDeviceDeleted(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		l, err := r.Listen("tcp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		packets, err := r.ListenPacket("udp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		dialTCP(t, r.self4, 8080)
		c := accept(t, l)
		failed := make(chan error, 3)
		go func() {
			_, err := c.Read(make([]byte, 1))
			failed <- err
		}()
		go func() {
			_, _, err := packets.ReadFrom(make([]byte, 1))
			failed <- err
		}()
		go func() {
			_, err := l.Accept()
			failed <- err
		}()
		time.Sleep(20 * time.Millisecond) // all three wait

		link, err := netlink.LinkByName(r.device)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(link); err != nil {
			t.Fatal(err)
		}
		select {
		case <-r.Done():
		case <-time.After(patience):
			t.Fatalf("Done is open %v after the device was deleted", patience)
		}
		if err := r.Err(); err == nil || !strings.Contains(err.Error(), r.device) {
			t.Errorf("Err is %v, want the name of the device in it", err)
		}
		for range cap(failed) {
			select {
			case err := <-failed:
				if _, ok := errors.AsType[*net.OpError](err); !ok {
					t.Errorf("a call that waited returned %v, want a *net.OpError", err)
				}
			case <-time.After(patience):
				t.Fatalf("a call still waits %v after the device was deleted", patience)
			}
		}
		eventually(t, func() error {
			if _, err := c.Write(make([]byte, 1)); err == nil {
				return errors.New("a write to a dead connection works")
			}
			return nil
		})

		const watch = 300 * time.Millisecond
		if used := cpuTimeIn(t, watch); used > watch/3 {
			t.Errorf("the process used %v of CPU time in %v after it lost its device", used, watch)
		}
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// cpuTimeIn is what this process uses while the test waits.
func cpuTimeIn(t *testing.T, d time.Duration) time.Duration {
	t.Helper()
	runtime.GC() // not meanwhile
	before := cpuTime(t)
	time.Sleep(d)
	return cpuTime(t) - before
}

// cpuTime is what this process has used so far.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// TestIdleIsCheap leaves a stack with an open connection alone: its threads
// sleep.
func TestIdleIsCheap(t *testing.T) {
	r := open(t, stack.Config{Shards: 4})
	r.serveEcho(t, nil)
	c := dialTCP(t, r.self4, echoPort)
	if err := roundTrip(c, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // delayed acknowledgements and the like
	const watch = 300 * time.Millisecond
	if used := cpuTimeIn(t, watch); used > watch/3 {
		t.Errorf("an idle stack used %v of CPU time in %v", used, watch)
	}
	_ = c.Close()
}

// TestLinkDownAndUp takes the interface down under traffic and up again: the
// connection goes on.
func TestLinkDownAndUp(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.serveEcho(t, nil)
		c := dialTCP(t, r.self4, echoPort)
		if err := roundTrip(c, payload(1, 10_000)); err != nil {
			t.Fatal(err)
		}
		link, err := netlink.LinkByName(r.device)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetDown(link); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("while it is down")); err != nil && !errors.Is(err, syscall.ENETDOWN) {
			t.Fatal(err)
		}
		if used := cpuTimeIn(t, 100*time.Millisecond); used > 50*time.Millisecond {
			t.Errorf("the process used %v of CPU time in 100ms while the link was down", used)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len("while it is down"))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "while it is down" {
			t.Errorf("read %q and %v", got, err)
		}
		if err := exchange(dialTCP(t, r.self4, echoPort), payload(2, 100_000)); err != nil {
			t.Errorf("a new connection: %v", err)
		}
		select {
		case <-r.Done():
			t.Errorf("the stack has ended: %v", r.Err())
		default:
		}
		_ = c.Close()
	})
}
