package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"numastack/stack"
)

// numastackCommand returns the application that serves numastack's side of a row.
func (b *bench) numastackCommand(r row) (path string, args []string) {
	args = []string{
		"-tap", numastackTAP, "-addr", numastackServer + "/24", "-host", numastackClient + "/24",
		"-mtu", strconv.Itoa(r.linkMTU()), "-shards", strconv.Itoa(max(r.shards, 1)), "-cpus", strconv.Itoa(b.serverCPU),
	}
	if b.rps {
		args = append(args, "-host-cpus", strconv.Itoa(b.clientCPU))
	}
	if path := os.Getenv(countersVar); path != "" {
		args = append(args, "-stats-json", path)
	}
	if path := b.profile(peerNumastack, r); path != "" {
		args = append(args, "-cpuprofile", path)
	}
	if r.spin != 0 {
		args = append(args, "-spin", max(r.spin, 0).String())
	}
	if r.load == loadHTTP {
		engine := "shard"
		if r.door == doorNet {
			engine = "nethttp"
		}
		args = append(args, "-engine", engine, "-listen", ":"+strconv.Itoa(int(wellKnownPorts.http(r.door))))
	}
	return filepath.Join(b.apps, r.app()), args
}

// serveNumastack serves through one of the doors, on one shard on this process's first CPU.
// Every door has echo; the last one has all services. The server's memory is always told
// through the last one: it takes a goroutine that may stop the world.
func serveNumastack(ctx context.Context, spec serverSpec, ready func()) error {
	// As the applications do: the collector and the goroutines would wait behind the shard.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 2))
	s, err := stack.New(stack.Config{
		Device:    numastackTAP,
		Addrs:     []netip.Prefix{netip.MustParsePrefix(numastackServer + "/24")},
		HostAddrs: []netip.Prefix{netip.MustParsePrefix(numastackClient + "/24")},
		HostCPUs:  spec.HostCPUs,
		MTU:       spec.MTU,
		Shards:    1,
		// 0 is its default.
		TxQueueLen: spec.Queue,
		Logger:     slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	ctx, lost := context.WithCancelCause(ctx)
	defer lost(nil)
	go func() {
		<-s.Done()
		lost(s.Err())
	}()
	err = serveDoor(ctx, s, spec.Door, ready)
	return errors.Join(err, s.Err(), leaveCounters(s.Stats()), s.Close())
}

// leaveCounters writes what applications write for -stats-json, when somebody asked for it.
func leaveCounters(stats stack.Stats) error {
	path := os.Getenv(countersVar)
	if path == "" {
		return nil
	}
	b, err := json.Marshal(stats)
	if err == nil {
		err = os.WriteFile(path, b, 0o644)
	}
	if err != nil {
		return fmt.Errorf("leave the counters: %w", err)
	}
	return nil
}

func serveDoor(ctx context.Context, s *stack.Stack, d door, ready func()) error {
	what := services{portMemory: allServices[portMemory], portCount: allServices[portCount]}
	address := net.JoinHostPort("", strconv.Itoa(portEcho))
	var err error
	switch d {
	case doorEvents:
		if _, err = s.HandleTCP("tcp4", address, echoEvents{}); err == nil {
			_, err = s.HandleTCP("tcp4", net.JoinHostPort("", strconv.Itoa(portChargen)), copyingChargen{})
		}
		if err == nil {
			err = handleDatagrams(s)
		}
	case doorShard:
		_, err = s.Serve("tcp4", address, echo)
	case doorNet:
		what = allServices
	default:
		err = fmt.Errorf("door %q: accepted are %s, %s and %s", d, doorEvents, doorShard, doorNet)
	}
	if err != nil {
		return err
	}
	return serve(ctx, what, opener{stream: func(port uint16) (net.Listener, error) {
		return s.Listen("tcp4", net.JoinHostPort("", strconv.Itoa(int(port))))
	}}, ready)
}

// echoEvents is what apps/echo does on its echo port. It stands here because the memory of
// a process can only be told by the process itself, after a collection.
type echoEvents struct{}

var _ stack.Handler = echoEvents{}

// Open implements stack.Handler.
func (echoEvents) Open(*stack.Conn) {}

// Data implements stack.Handler.
func (echoEvents) Data(c *stack.Conn, b []byte) int {
	n, err := c.Write(b)
	if err != nil {
		c.Close()
		return len(b)
	}
	return n
}

// Writable implements stack.Handler.
func (echoEvents) Writable(*stack.Conn) {}

// Close implements stack.Handler.
func (echoEvents) Close(*stack.Conn, error) {}

// copyingChargen sends until the peer is gone, with Write.
type copyingChargen struct{}

var _ stack.HalfCloser = copyingChargen{}

// Open implements stack.Handler.
func (h copyingChargen) Open(c *stack.Conn) { h.Writable(c) }

// Data implements stack.Handler.
func (copyingChargen) Data(_ *stack.Conn, b []byte) int { return len(b) }

// Writable implements stack.Handler.
func (copyingChargen) Writable(c *stack.Conn) {
	for {
		n, err := c.Write(chargenBytes[:64<<10])
		if err != nil || n < 64<<10 {
			return
		}
	}
}

// Close implements stack.Handler.
func (copyingChargen) Close(*stack.Conn, error) {}

// EOF implements stack.HalfCloser: the peer has nothing to say, but listens.
func (copyingChargen) EOF(*stack.Conn) {}

// handleDatagrams serves UDP's discard and chargen on the shard's thread.
func handleDatagrams(s *stack.Stack) error {
	_, err := s.HandleUDP("udp4", net.JoinHostPort("", strconv.Itoa(portDiscard)), func(_ *stack.Socket, b []byte, _ netip.AddrPort) {
		received.add(len(b), 1)
	})
	if err != nil {
		return err
	}
	_, err = s.HandleUDP("udp4", net.JoinHostPort("", strconv.Itoa(portChargen)), func(s *stack.Socket, b []byte, from netip.AddrPort) {
		ask, err := parseBurst(b)
		if err != nil {
			return
		}
		for range ask.count {
			_, _ = s.WriteTo(chargenBytes[:ask.size], from) // UDP: what cannot be sent is lost
		}
	})
	return err
}
