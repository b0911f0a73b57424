package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// countingListener counts what the server side sees.
type countingListener struct {
	net.Listener
	conns, read, written *atomic.Int64
}

type countingConn struct {
	net.Conn
	read, written *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.conns.Add(1)
	return countingConn{c, l.read, l.written}, nil
}

func (c countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

func (c countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(int64(n))
	return n, err
}

// serveLoopback runs the servers of the peers in this process until the test ends. It returns
// their TCP ports, and those that the UDP loads use.
func serveLoopback(t *testing.T) (p, udp ports, counts *countingListener) {
	t.Helper()
	counts = &countingListener{conns: new(atomic.Int64), read: new(atomic.Int64), written: new(atomic.Int64)}
	listen := func(port uint16) (net.Listener, error) {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		got := uint16(l.Addr().(*net.TCPAddr).Port)
		switch port {
		case portEcho:
			p.Echo = got
		case portDiscard:
			p.Discard = got
		case portChargen:
			p.Chargen = got
		case portFastHTTP:
			p.FastHTTP = got
		case portNetHTTP:
			p.NetHTTP = got
		case portMemory:
			p.Memory = got
		case portCount:
			p.Count = got
		}
		return countingListener{l, counts.conns, counts.read, counts.written}, nil
	}
	datagrams := func(port uint16) (net.PacketConn, error) {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		got := uint16(c.LocalAddr().(*net.UDPAddr).Port)
		switch port {
		case portDiscard:
			udp.Discard = got
		case portChargen:
			udp.Chargen = got
		}
		return newSegmentConn(c.(*net.UDPConn))
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- serve(ctx, allServices, opener{listen, datagrams}, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	udp.Count = p.Count
	return p, udp, counts
}

func testSpec(l load, conns int, p ports) clientSpec {
	return clientSpec{
		Load: l, Conns: conns, Server: netip.MustParseAddr("127.0.0.1"), ServerPID: os.Getpid(),
		Duration: 200 * time.Millisecond, Ports: p,
	}
}

// What the client counts, the server has seen. Without a warm-up both count from the start,
// and differ at most by what was under way at the end.
func TestClientCounts(t *testing.T) {
	needSandbox(t)
	tests := []struct {
		load  load
		conns int
		size  int
	}{
		{loadBulkIn, 1, 0},
		{loadBulkIn, 8, 0},
		{loadBulkOut, 1, 0},
		{loadBulkOut, 8, 0},
		{loadPingPong, 1, 0},
		{loadPingPong, 64, 0},
		{loadPingPong, 1, 1},
		{loadPingPong, 8, 16 << 10},
		{loadLatency, 1, 0},
		{loadLatency, 8, 0},
		{loadShort, 8, 0},
		{loadHTTP, 64, 0},
		{loadIdle, 800, 0},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s/%d", tt.load, tt.size), func(t *testing.T) {
			p, _, counts := serveLoopback(t)
			spec := testSpec(tt.load, tt.conns, p)
			spec.Size, spec.Rate = tt.size, 2000
			s, err := spec.run()
			if err != nil {
				t.Fatal(err)
			}
			if s.Elapsed <= 0 || s.CPU <= 0 && tt.load != loadIdle {
				t.Errorf("elapsed %v, CPU %v: want both above zero", s.Elapsed, s.CPU)
			}
			if tt.load != loadBulkIn && tt.load != loadBulkOut && tt.load != loadIdle {
				if s.P50 <= 0 || s.P50 > s.P99 || s.P99 > s.Max {
					t.Errorf("percentiles are out of order: p50 %v, p99 %v, max %v", s.P50, s.P99, s.Max)
				}
			}
			// Of every connection, one operation may have been under way.
			slack := int64(tt.conns)
			switch tt.load {
			case loadBulkIn:
				if got := counts.read.Load(); s.Bytes <= 0 || s.Bytes > got+bulkInFlight*slack {
					t.Errorf("client counted %d bytes, server read %d", s.Bytes, got)
				}
			case loadBulkOut:
				if got := counts.written.Load(); s.Bytes <= 0 || s.Bytes > got+serveBuffer*slack {
					t.Errorf("client counted %d bytes, server wrote %d", s.Bytes, got)
				}
			case loadPingPong:
				if got := counts.read.Load() / int64(spec.messageSize()); got < s.Ops || got > s.Ops+slack {
					t.Errorf("client counted %d requests, server %d", s.Ops, got)
				}
			case loadLatency:
				// What is answered after the window is in the latencies only.
				if got := counts.read.Load() / messageBytes; s.Ops == 0 || got < s.Ops {
					t.Errorf("client counted %d requests, server %d", s.Ops, got)
				}
				if !slices.IsSorted(s.Curve[:]) || s.Curve[len(s.Curve)-1] != s.Max {
					t.Errorf("curve is %v, want rising latencies up to %v", s.Curve, s.Max)
				}
			case loadHTTP:
				// The two libraries' requests are the same, so bytes count them.
				size := int64(len("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
				if got := counts.read.Load() / size; got < s.Ops || got > s.Ops+slack {
					t.Errorf("client counted %d requests, server %d", s.Ops, got)
				}
			case loadIdle:
				// Two more connections asked for the memory.
				if got := counts.conns.Load(); s.Ops != slack || got != slack+2 {
					t.Errorf("client counted %d connections, server %d, want %d and 2 more", s.Ops, got, slack)
				}
				// Of every handler's buffer. The server runs in this process,
				// which frees memory of its own meanwhile, up to half a megabyte
				// in what was seen, and stacks above all.
				if buffers := slack * 4 << 10; s.Memory.Heap < buffers/2 || s.Memory.Heap > 8*buffers {
					t.Errorf("the heap grew by %d bytes, want %d give or take", s.Memory.Heap, buffers)
				}
			case loadShort:
				if got := counts.conns.Load(); got < s.Ops || got > s.Ops+slack {
					t.Errorf("client counted %d connections, server %d", s.Ops, got)
				}
			}
		})
	}
}

// What a client of datagrams counts, the server has counted too, and some of it was lost at
// most: it has no acknowledgements to wait for.
func TestDatagramCounts(t *testing.T) {
	needSandbox(t)
	tests := []struct {
		load load
		size int
		gso  bool
	}{
		{loadUDPIn, 64, false},
		{loadUDPIn, 1472, true},
		{loadUDPOut, 64, false},
		{loadUDPOut, 1472, true},
		{loadUDPOut, 65493, true}, // one in a frame
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s/%d", tt.load, tt.size), func(t *testing.T) {
			_, p, _ := serveLoopback(t)
			spec := testSpec(tt.load, 1, p)
			spec.Size, spec.GSO = tt.size, tt.gso
			before := counts{received.bytes.Load(), received.datagrams.Load()}
			s, err := spec.run()
			if err != nil {
				t.Fatal(err)
			}
			if s.Ops == 0 || s.Bytes != s.Ops*int64(tt.size) || s.CPU <= 0 {
				t.Errorf("sample is %+v, want datagrams of %d bytes", s, tt.size)
			}
			got := received.datagrams.Load() - before.Datagrams
			if tt.load == loadUDPIn && got != s.Ops || tt.load == loadUDPOut && got != 0 {
				t.Errorf("client counted %d datagrams, server received %d", s.Ops, got)
			}
		})
	}
}

// A server that stops for a while delays what was due meanwhile, and that is in the
// latencies: a client that waited for its answers would have one slow request.
func TestLatencyOfStall(t *testing.T) {
	needSandbox(t)
	const stall = 100 * time.Millisecond
	spec := testSpec(loadLatency, 1, serveOne(t, func(_ int, c net.Conn) {
		buf := make([]byte, 4<<10)
		for began := time.Now(); ; {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			if time.Since(began) > stall {
				time.Sleep(stall)
				began = time.Now()
			}
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
	}))
	spec.Rate = 1000
	s, err := spec.run()
	if err != nil {
		t.Fatal(err)
	}
	// At half of the time a request is due into a stall, of which it waits half on average.
	p75 := s.Curve[slices.Index(curvePoints[:], 75)]
	if p75 < stall/5 {
		t.Errorf("75%% of the requests took less than %v, while the server slept half of the time", p75)
	}
}

// bulkInFlight is what the server's kernel may have acknowledged before the server reads
// it, in bytes: the most that tcp_rmem lets a receive buffer become.
const bulkInFlight = 64 << 20

// A warm-up is left out of the count.
func TestClientWarmup(t *testing.T) {
	needSandbox(t)
	p, _, counts := serveLoopback(t)
	spec := testSpec(loadPingPong, 1, p)
	spec.Warmup = 100 * time.Millisecond
	s, err := spec.run()
	if err != nil {
		t.Fatal(err)
	}
	if got := counts.read.Load() / messageBytes; got <= s.Ops {
		t.Errorf("client counted %d requests, server %d: want fewer in the window than in all", s.Ops, got)
	}
}

// serveOne serves every connection with handle, which owns it. index counts connections.
func serveOne(t *testing.T, handle func(index int, c net.Conn)) ports {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for i := 0; ; i++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer func() { _ = c.Close() }()
				handle(i, c)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		running.Wait()
	})
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	return ports{Echo: port, Discard: port, Chargen: port, FastHTTP: port, NetHTTP: port, Memory: port, Count: port}
}

func TestClientErrors(t *testing.T) {
	needSandbox(t)
	wrong := func(_ int, c net.Conn) {
		buf := make([]byte, messageBytes)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			buf[0]++
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	closing := func(_ int, c net.Conn) { _, _ = c.Read(make([]byte, messageBytes)) }
	firstOnly := func(i int, c net.Conn) {
		if i == 0 {
			echo(c)
			return
		}
		discard(c)
	}
	answering := func(answer string) func(int, net.Conn) {
		return func(_ int, c net.Conn) {
			buf := make([]byte, 1<<10)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				if _, err := c.Write([]byte(answer)); err != nil {
					return
				}
			}
		}
	}
	// The first connection asks for the memory, the second is an idle one.
	leaving := func(i int, c net.Conn) {
		if i == 1 {
			_, _ = io.CopyN(c, c, messageBytes)
			return
		}
		tellMemory(c)
	}
	tests := []struct {
		name   string
		load   load
		conns  int
		handle func(int, net.Conn)
		want   string
	}{
		{"another answer", loadPingPong, 1, wrong, "the answer is not the request"},
		{"another answer", loadPingPong, 2, wrong, "the answer is not the request"},
		{"another answer", loadShort, 2, wrong, "the answer is not the request"},
		{"closed early", loadPingPong, 1, closing, "closed the connection after 0 of 64 bytes"},
		{"closed early", loadPingPong, 2, closing, "closed the connection after 0 of 64 bytes"},
		{"closed early", loadShort, 2, closing, "closed the connection after 0 of 64 bytes"},
		{"one starves", loadPingPong, 2, firstOnly, "connection 1 got no answer"},
		{"nothing sent", loadBulkOut, 1, func(_ int, c net.Conn) { discard(c) }, "not a byte moved"},
		{"closed early", loadHTTP, 2, closing, "closed the connection after 0 bytes of an answer"},
		{"refuses", loadHTTP, 2, answering("HTTP/1.1 503 Busy\r\nContent-Length: 1\r\n\r\nx"), `the answer is "HTTP/1.1 503 Busy"`},
		{"talks too much", loadHTTP, 2, answering("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxyz"), "2 more than its header says"},
		{"never ends", loadHTTP, 2, answering(strings.Repeat("x", 2*maxAnswer)), "more than 4096 bytes"},
		{"tells no memory", loadIdle, 1, func(_ int, c net.Conn) { _, _ = c.Write([]byte("none\n")) }, "read the server's memory"},
		{"does not stay", loadIdle, 1, leaving, "1 of 1 connections did not stay open"},
		{"another answer", loadLatency, 2, wrong, "the answer is not the request"},
		{"closed early", loadLatency, 2, closing, "read: "}, // or reset, with another request on its way,
		{"stalled", loadLatency, 2, func(_ int, c net.Conn) { discard(c) }, "nothing was answered"},
		{"tells no count", loadUDPIn, 1, func(_ int, c net.Conn) { _, _ = c.Write([]byte("none\n")) }, "ask for what was received"},
		{"stalled", loadPingPong, 1, func(_ int, c net.Conn) { discard(c) }, errStalled.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name+"/"+string(tt.load), func(t *testing.T) {
			t.Parallel()
			spec := testSpec(tt.load, tt.conns, serveOne(t, tt.handle))
			spec.Rate = 1000
			_, err := spec.run()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestClientRefused(t *testing.T) {
	needSandbox(t)
	for _, l := range []load{loadBulkIn, loadPingPong, loadLatency, loadUDPIn, loadUDPOut, loadShort, loadHTTP, loadIdle} {
		// Nothing listens on port 1 of this namespace.
		spec := testSpec(l, 1, ports{Echo: 1, Discard: 1, Chargen: 1, FastHTTP: 1, NetHTTP: 1, Memory: 1, Count: 1})
		spec.Rate = 1000
		_, err := spec.run()
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: error is %v, want ECONNREFUSED", l, err)
		}
	}
}

func TestProcessCPU(t *testing.T) {
	before, err := processCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// Work until our own clock, read another way, has moved by 20 ms.
	var start, now unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &start); err != nil {
		t.Fatal(err)
	}
	for now = start; cpuOf(now)-cpuOf(start) < 20*time.Millisecond; {
		if err := unix.Getrusage(unix.RUSAGE_SELF, &now); err != nil {
			t.Fatal(err)
		}
	}
	after, err := processCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if after-before < 10*time.Millisecond {
		t.Errorf("the clock moved by %v while the process worked for 20ms", after-before)
	}
	if _, err := processCPU(1 << 22); err == nil { // above the largest pid_max
		t.Error("no error for a process that cannot exist")
	}
}

func cpuOf(r unix.Rusage) time.Duration {
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
