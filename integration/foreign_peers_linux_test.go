package integration

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"numastack/stack"
)

// blockingDoor is one of the ways in which blocking code gets a connection.
// open runs h on the stack's end of a new connection, and returns the kernel's.
type blockingDoor struct {
	name string
	open func(t *testing.T) *net.TCPConn
}

// blockingDoors opens all doors for h, which must not block other than on its
// connection. A connection is closed when h returns.
func (r *rig) blockingDoors(t *testing.T, h func(halfCloser)) []blockingDoor {
	t.Helper()
	families := r.families()
	addrs := r.serve(t, func(c net.Conn) { h(c.(halfCloser)) })
	accepting := listenOn(t, r.Listen, families[1].self)
	t.Cleanup(each(accepting, func(c net.Conn) { h(c.(halfCloser)) }))
	target := listenKernel(t, families[0])
	var dialled sync.WaitGroup
	t.Cleanup(dialled.Wait)
	return []blockingDoor{
		{"Serve", func(t *testing.T) *net.TCPConn { return dialKernel(t, addrs[0]).(*net.TCPConn) }},
		{"Listen", func(t *testing.T) *net.TCPConn { return dialKernel(t, accepting.Addr().String()).(*net.TCPConn) }},
		{"DialContext", func(t *testing.T) *net.TCPConn {
			c, err := r.DialContext(t.Context(), "tcp", target.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			dialled.Go(func() {
				defer c.Close()
				h(c.(halfCloser))
			})
			return accept(t, target).(*net.TCPConn)
		}},
	}
}

// TestPeerHalfCloses lets either end close its side first, and send a lot in
// the other direction afterwards.
func TestPeerHalfCloses(t *testing.T) {
	const size = pattern(4 << 20)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		for _, test := range []struct {
			name       string
			ours, peer func(c halfCloser) error
		}{
			{
				"the peer first",
				func(c halfCloser) error { return errors.Join(pattern(0).receiveAll(c), size.send(c), c.CloseWrite()) },
				func(c halfCloser) error { return errors.Join(c.CloseWrite(), size.receiveAll(c)) },
			},
			{
				"the stack first",
				func(c halfCloser) error { return errors.Join(c.CloseWrite(), size.receiveAll(c)) },
				func(c halfCloser) error {
					return errors.Join(pattern(0).receiveAll(c), size.send(c), c.CloseWrite())
				},
			},
			{
				"write after CloseWrite",
				func(c halfCloser) error {
					if err := c.CloseWrite(); err != nil {
						return err
					}
					if _, err := c.Write([]byte("too late")); !errors.Is(err, syscall.EPIPE) {
						return fmt.Errorf("write after CloseWrite: %w, want EPIPE", err)
					}
					return pattern(0).receiveAll(c)
				},
				func(c halfCloser) error { return errors.Join(pattern(0).receiveAll(c), c.CloseWrite()) },
			},
		} {
			t.Run(test.name, func(t *testing.T) {
				served := make(chan error, 1)
				for _, door := range r.blockingDoors(t, func(c halfCloser) { served <- test.ours(c) }) {
					if err := test.peer(door.open(t)); err != nil {
						t.Errorf("%s: the peer: %v", door.name, err)
					}
					if err := <-served; err != nil {
						t.Errorf("%s: the stack: %v", door.name, err)
					}
				}
			})
		}
	})
}

// TestPeerResets resets connections while the stack reads, while it writes and
// after an orderly end of the peer's side.
func TestPeerResets(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		for _, test := range []struct {
			name string
			ours func(c halfCloser) error
			peer func(c *net.TCPConn) error // before the reset
			want error                      // of ours, as the kernel has it (tcp_reset)
		}{
			{
				"read",
				func(c halfCloser) error { return pattern(1).receive(c) },
				func(*net.TCPConn) error { return nil },
				syscall.ECONNRESET,
			},
			{
				"write",
				func(c halfCloser) error { return pattern(1 << 40).send(c) },
				func(c *net.TCPConn) error { return pattern(1).receive(c) },
				syscall.ECONNRESET,
			},
			{
				"write after EOF",
				func(c halfCloser) error { return errors.Join(pattern(0).receiveAll(c), pattern(1<<40).send(c)) },
				func(c *net.TCPConn) error { return errors.Join(c.CloseWrite(), pattern(1).receive(c)) },
				syscall.EPIPE,
			},
		} {
			t.Run(test.name, func(t *testing.T) {
				served := make(chan error, 1)
				for _, door := range r.blockingDoors(t, func(c halfCloser) { served <- test.ours(c) }) {
					c := door.open(t)
					if err := test.peer(c); err != nil {
						t.Errorf("%s: %v", door.name, err)
					}
					time.Sleep(10 * time.Millisecond) // the stack waits
					if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
						t.Errorf("%s: %v", door.name, err)
					}
					select {
					case err := <-served:
						wantOpError(t, err, test.want)
					case <-time.After(patience):
						t.Fatalf("%s: the stack did not notice a reset", door.name)
					}
				}
			})
		}
	})
}

// TestPeerStopsReading closes the window for a second, in either direction. The
// transfer goes on as soon as somebody reads again.
func TestPeerStopsReading(t *testing.T) {
	const (
		size  = pattern(16 << 20) // more than all buffers on the way
		pause = time.Second
		// A lost window update costs the sender a probe: the kernel's first ones
		// come after 0.2, 0.6, 1.4 and 3 s (TCP_RTO_MIN, doubled each time).
		resume = 1500 * time.Millisecond * raceFactor
	)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		for _, test := range []struct {
			name       string
			ours, peer func(c halfCloser) error
		}{
			{
				"the peer",
				func(c halfCloser) error { return errors.Join(size.send(c), c.CloseWrite()) },
				func(c halfCloser) error {
					time.Sleep(pause)
					return size.receiveAll(c)
				},
			},
			{
				"the stack",
				func(c halfCloser) error {
					return errors.Join(stack.Sleep(c, pause), size.receiveAll(c))
				},
				func(c halfCloser) error { return errors.Join(size.send(c), c.CloseWrite()) },
			},
		} {
			t.Run(test.name, func(t *testing.T) {
				served := make(chan error, 3)
				doors := r.blockingDoors(t, func(c halfCloser) { served <- test.ours(c) })
				var peers sync.WaitGroup
				begin := time.Now()
				for _, door := range doors {
					c := door.open(t)
					peers.Go(func() {
						if err := test.peer(c); err != nil {
							t.Errorf("%s: the peer: %v", door.name, err)
						}
						_ = c.CloseWrite() // it has done so, in one of the cases
					})
				}
				for range doors {
					if err := <-served; err != nil {
						t.Errorf("the stack: %v", err)
					}
				}
				peers.Wait()
				if took := time.Since(begin); took < pause || took > pause+resume {
					t.Errorf("it took %v, want %v and no more than %v until it goes on", took, pause, resume)
				}
			})
		}
	})
}

// TestPeersCloseAtOnce closes both ends while neither knows that the other does:
// the FINs cross (RFC 9293, section 3.6, case 3).
func TestPeersCloseAtOnce(t *testing.T) {
	const rounds, hold = 10, 4 * time.Millisecond
	forForeign(t, 4, func(t *testing.T, r *rig) {
		frames := captureDevice(t, r.device)
		served := make(chan error, 1)
		addrs := r.serve(t, func(c net.Conn) {
			// The peer's FIN waits in the queue while this holds the shard.
			err := pattern(1).receive(c)
			time.Sleep(hold)
			served <- errors.Join(err, c.(halfCloser).CloseWrite(), pattern(0).receiveAll(c))
		})
		for i := range rounds {
			c := dialKernel(t, addrs[i%len(addrs)]).(*net.TCPConn)
			if err := pattern(1).send(c); err != nil {
				t.Fatal(err)
			}
			time.Sleep(hold / 4) // the handler has the byte
			if err := errors.Join(c.CloseWrite(), pattern(0).receiveAll(c)); err != nil {
				t.Errorf("the peer: %v", err)
			}
			if err := <-served; err != nil {
				t.Errorf("the stack: %v", err)
			}
			_ = c.Close()
		}
		r.settle(t)
		// A busy machine may keep one end from being in time, not always.
		if n := crossed(frames.end(t)); n == 0 {
			t.Errorf("in %d rounds no FIN has crossed another", rounds)
		}
	})
}

// crossed counts the connections in which no FIN acknowledges the other.
func crossed(frames []captured) (n int) {
	type fin struct{ number, ack uint32 } // its sequence number, and what it acknowledges
	ours, peers := make(map[layers.TCPPort]fin), make(map[layers.TCPPort]fin)
	for _, f := range frames {
		p := gopacket.NewPacket(f.bytes, layers.LayerTypeEthernet, gopacket.NoCopy)
		tcp, ok := p.TransportLayer().(*layers.TCP)
		if !ok || !tcp.FIN {
			continue
		}
		side, port := peers, tcp.SrcPort // the peer's port tells the connections apart
		if f.ours {
			side, port = ours, tcp.DstPort
		}
		if _, again := side[port]; !again {
			side[port] = fin{tcp.Seq + uint32(len(tcp.Payload)), tcp.Ack}
		}
	}
	for port, a := range ours {
		if b, ok := peers[port]; ok && a.ack == b.number && b.ack == a.number {
			n++
		}
	}
	return n
}

// TestTenThousandConnections opens that many, echoes once over each, and closes
// them: the counters, the receive buffers and the goroutines are as before.
func TestTenThousandConnections(t *testing.T) {
	const conns, clients = 10_000 / raceFactor, 16
	forForeign(t, 4, func(t *testing.T, r *rig) {
		addrs := r.serve(t, echoAll)
		for _, f := range r.families() {
			l := listenOn(t, r.Listen, f.self)
			t.Cleanup(each(l, echoAll))
			addrs = append(addrs, l.Addr().String())
		}
		goroutines := runtime.NumGoroutine()
		message := payload(1, 100)
		errs := make(chan error, conns)
		var running sync.WaitGroup
		for client := range clients {
			running.Go(func() {
				for i := client; i < conns; i += clients {
					errs <- connectOnce(addrs[i%len(addrs)], message)
				}
			})
		}
		running.Wait()
		close(errs)
		failed := 0
		for err := range errs {
			if err != nil {
				if failed++; failed == 1 {
					t.Errorf("the first failure: %v", err)
				}
			}
		}
		if failed > 0 {
			t.Errorf("%d of %d connections failed", failed, conns)
		}
		r.settle(t)
		if sum := r.sum(); sum.ConnsAccepted != conns || sum.ConnsRefused != 0 {
			t.Errorf("%d connections accepted and %d refused, want %d and 0", sum.ConnsAccepted, sum.ConnsRefused, conns)
		}
		eventually(t, func() error {
			if n := r.endpoints(); n != 0 {
				return fmt.Errorf("%d TCP endpoints are left", n)
			}
			return nil
		})
		if err := goroutinesAtMost(goroutines); err != nil {
			t.Error(err)
		}
	})
}

// connectOnce echoes once and closes; the client closes first, and so the wait
// for late segments is the kernel's.
func connectOnce(address string, message []byte) error {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := roundTrip(c, message); err != nil {
		return err
	}
	return c.Close()
}

// endpoints is how many TCP connections gVisor knows, with those that wait for
// their peer.
func (r *rig) endpoints() (n uint64) {
	for _, s := range r.Stats().Shards {
		for _, g := range s.Groups {
			n += g.Connected
		}
	}
	return n
}

// TestPeersThatMisbehave connects many peers that do not do their part. They
// cost no more memory than their buffers, and nothing when they have gone.
func TestPeersThatMisbehave(t *testing.T) {
	const (
		peers  = 100
		buffer = 64 << 10
		// Small segments take several times the room of their payload, and an
		// endpoint may go over its limit by one frame. A goroutine's connection
		// has two rings of its own for 512 KiB each, and the first and the last
		// of a ring's blocks of 64 KiB may hold a byte of them.
		each = 8*buffer + 2*(512+2*64)<<10
		// Receive buffers and pools stay with the stack.
		rest = 24 << 20
	)
	for name, misbehave := range map[string]struct {
		ours func(c halfCloser)
		peer func(c *net.TCPConn) error
	}{
		"silent": {
			func(c halfCloser) { _ = pattern(1).receive(c) },
			func(*net.TCPConn) error { return nil },
		},
		"not reading": {
			func(c halfCloser) { _ = pattern(1 << 40).send(c) },
			func(*net.TCPConn) error { return nil },
		},
		"flooding who does not read": {
			func(c halfCloser) {
				_ = pattern(1).receive(c)
				_ = c.SetWriteDeadline(time.Time{})
				_ = pattern(1 << 40).send(c)
			},
			func(c *net.TCPConn) error {
				// It ends when nothing has fitted for a while.
				err := c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				if timeout, ok := errors.AsType[net.Error](pattern(64 << 20).send(c)); !ok || !timeout.Timeout() {
					return errors.New("64 MiB were taken that nobody reads")
				}
				return err
			},
		},
		"a byte at a time": {
			func(c halfCloser) { echoAll(c) },
			func(c *net.TCPConn) error {
				for range 50 {
					if err := pattern(1).send(c); err != nil {
						return err
					}
				}
				return nil
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			needNetwork(t)
			r := open(t, stack.Config{Shards: 2, SendBuffer: buffer, ReceiveBuffer: buffer, RxBuffers: 64})
			for _, door := range r.blockingDoors(t, misbehave.ours) {
				before := heap()
				var conns []*net.TCPConn
				var busy sync.WaitGroup
				for range peers {
					c := door.open(t)
					conns = append(conns, c)
					busy.Go(func() {
						if err := misbehave.peer(c); err != nil {
							t.Errorf("%s: %v", door.name, err)
						}
					})
				}
				busy.Wait()
				time.Sleep(100 * time.Millisecond) // all that fits is on its way
				if got, want := heap()-before, int64(peers*each+rest); got > want {
					t.Errorf("%s: %d peers cost %d KiB, want at most %d", door.name, peers, got>>10, want>>10)
				} else {
					t.Logf("%s: %d peers cost %d KiB", door.name, peers, got>>10)
				}
				for _, c := range conns {
					_ = c.SetLinger(0)
					_ = c.Close()
				}
				r.settle(t)
				eventually(t, func() error {
					if got := heap() - before; got > rest {
						return fmt.Errorf("%s: %d KiB are still there when the peers have gone, want at most %d", door.name, got>>10, rest>>10)
					}
					return nil
				})
			}
		})
	}
}

// heap is what the process holds, in bytes.
func heap() int64 {
	// Twice: what a pool gives up in the first is free after the second.
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
