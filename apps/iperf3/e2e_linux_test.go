package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestMain runs the tests in a network namespace of their own that has nothing but a loopback device, and checks that no
// goroutine is left.
func TestMain(m *testing.M) {
	const inside = "IPERF3_TEST_IN_NETNS"
	if os.Getenv(inside) == "" {
		again := exec.Command("/proc/self/exe", os.Args[1:]...)
		again.Env = append(os.Environ(), inside+"=1")
		again.Stdout, again.Stderr = os.Stdout, os.Stderr
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := again.Run()
		var exit *exec.ExitError
		switch {
		case err == nil:
			os.Exit(0)
		case errors.As(err, &exit):
			os.Exit(1)
		}
		fmt.Fprintf(os.Stderr, "no network namespace (%v): only tests without a network run\n", err)
		errNoNetwork = err
	} else if err := loopbackUp(); err != nil {
		fmt.Fprintln(os.Stderr, "loopback device:", err)
		os.Exit(1)
	}
	before := runtime.NumGoroutine()
	code := m.Run()
	for end := time.Now().Add(2 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > before && code == 0 {
		stacks := make([]byte, 1<<20)
		fmt.Fprintf(os.Stderr, "%d goroutines before the tests, %d after:\n%s", before, n, stacks[:runtime.Stack(stacks, true)])
		code = 1
	}
	os.Exit(code)
}

// errNoNetwork is why tests that send packets cannot run.
var errNoNetwork error

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// quick are limits for peers that misbehave on purpose.
var quick = limits{handshake: 300 * time.Millisecond, grace: 300 * time.Millisecond, stall: 300 * time.Millisecond}

// running is our server under test.
type running struct {
	port   int
	cancel context.CancelFunc
	done   chan error // what serve returned
	out    *locked    // reports and errors
}

// locked is a buffer for several goroutines.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// awaitOutput waits until out has what is looked for.
func awaitOutput(t *testing.T, out *locked, text string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !strings.Contains(out.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("the output has no %q: %q", text, out.String())
			return
		}
	}
}

// serve starts our server on a free port; it ends with the test.
func serve(t *testing.T, l limits) *running {
	t.Helper()
	if errNoNetwork != nil {
		t.Skipf("needs a network namespace: %v", errNoNetwork)
	}
	listener, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	_, port := splitAddr(listener.Addr())
	packets, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{port: port, cancel: cancel, done: make(chan error, 1), out: &locked{}}
	s := newServer(host{}, &options{port: port, interval: time.Second}, r.out, r.out)
	s.limits = l
	go func() { r.done <- s.serveOn(ctx, listener, packets) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-r.done:
			if err != nil {
				t.Errorf("server: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the server did not end within 5 s")
		}
		if t.Failed() {
			t.Logf("server's output:\n%s", r.out)
		}
	})
	return r
}

// ours runs our client and returns its JSON.
func ours(t *testing.T, port int, args string) (report, error) {
	t.Helper()
	var out, errs bytes.Buffer
	line := strings.Fields(fmt.Sprintf("-host-sockets -J -c 127.0.0.1 -p %d %s", port, args))
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	code := command(ctx, line, &out, &errs)
	if code != 0 {
		return report{}, fmt.Errorf("exit status %d: %s", code, strings.TrimSpace(errs.String()))
	}
	return parse(t, out.Bytes()), nil
}

// original runs the installed iperf3 as client and returns its JSON.
func original(t *testing.T, port int, args string) report {
	t.Helper()
	line := strings.Fields(fmt.Sprintf("-J -c 127.0.0.1 -p %d %s", port, args))
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "iperf3", line...).Output()
	if ctx.Err() != nil {
		t.Fatalf("iperf3 %s: not done after 15 s", args)
	}
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	return parse(t, out)
}

func needOriginal(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Skipf("needs the original iperf3: %v", err)
	}
}

// report is what we check of iperf3's JSON.
type report struct {
	Error string
	Start struct {
		Connected []struct{ Socket int }
	}
	Intervals []struct {
		Streams []struct{ Omitted bool }
	}
	End struct {
		Streams         []map[string]figures
		Sent            figures            `json:"sum_sent"`
		Received        figures            `json:"sum_received"`
		UDP             figures            `json:"sum"`
		ReverseSent     figures            `json:"sum_sent_bidir_reverse"`
		ReverseReceived figures            `json:"sum_received_bidir_reverse"`
		UDPReverse      figures            `json:"sum_bidir_reverse"`
		CPU             map[string]float64 `json:"cpu_utilization_percent"`
	}
	ServerOutput string `json:"server_output_text"`
}

type figures struct {
	Bytes         float64
	BitsPerSecond float64 `json:"bits_per_second"`
	Retransmits   float64
	JitterMS      float64 `json:"jitter_ms"`
	Lost          float64 `json:"lost_packets"`
	Packets       float64
	LostPercent   float64 `json:"lost_percent"`
}

func parse(t *testing.T, text []byte) report {
	t.Helper()
	var r report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatalf("client's JSON: %v\n%s", err, text)
	}
	return r
}

// modes are the tests every pair of client and server has to pass. bytes is the least each direction must have moved.
var modes = []struct {
	args    string
	streams int
	bytes   float64
}{
	{"-t 1", 1, 1 << 20},
	{"-n 300K", 1, 300 << 10},
	{"-k 20 -l 10K", 1, 200 << 10},
	{"-n 2M -P 4", 4, 2 << 20},
	{"-P 32 -n 4M", 32, 4 << 20},
	{"-R -t 1", 1, 1 << 20},
	{"-R -n 3M -P 2", 2, 3 << 20},
	{"-R -k 20 -l 10K", 1, 200 << 10},
	{"--bidir -t 1 -P 2 -b 20M", 4, 1 << 20},
	{"--bidir -t 1", 2, 1 << 20},
	{"-t 1 -O 1 -b 8M", 1, 800_000},
	{"-R -t 1 -O 1 -b 8M", 1, 800_000},
	{"-n 1M -w 64K -M 1000 -N", 1, 1 << 20},
	{"-t 1 -b 8M/10 -l 1000 -i 0.2", 1, 900_000},
	{"-n 100K --get-server-output", 1, 100 << 10},
	{"-6 -c ::1 -n 100K", 1, 100 << 10},
	{"-u -t 1 -l 1000 -b 4M", 1, 400_000},
	{"-u -t 1", 1, 90_000},
	{"-u -n 100K -l 1400 -b 10M", 1, 100 << 10},
	{"-u -k 50 -l 1000 -b 10M -P 3", 3, 50_000},
	{"-u -R -t 1 -l 1000 -b 4M", 1, 400_000},
	{"-u -R -n 100K -l 1000 -b 10M -P 3", 3, 100_000},
	{"-u --bidir -t 1 -l 1000 -b 4M -P 2", 4, 800_000},
	{"-u -t 1 -O 1 -l 1000 -b 4M", 1, 400_000},
	{"-u -R -t 1 -O 1 -l 1000 -b 4M --udp-counters-64bit", 1, 400_000},
	{"-u -6 -c ::1 -n 50K -l 1000 -b 10M", 1, 50_000},
}

// check judges a client's report.
func check(t *testing.T, r report, args string, streams int, least float64) {
	t.Helper()
	if r.Error != "" {
		t.Fatalf("error: %s", r.Error)
	}
	if len(r.Start.Connected) != streams || len(r.End.Streams) != streams {
		t.Errorf("%d streams connected, %d at the end: want %d", len(r.Start.Connected), len(r.End.Streams), streams)
	}
	udp, bidir := strings.Contains(args, "-u "), strings.Contains(args, "--bidir")
	way := func(name string, sent, received, sum figures) {
		if sent.Bytes < least || received.Bytes < least*0.9 || received.Bytes > sent.Bytes*1.1+1<<20 {
			t.Errorf("%s: %v bytes sent, %v received: want at least %v, and about the same", name, sent.Bytes, received.Bytes, least)
		}
		if sent.BitsPerSecond <= 0 || received.BitsPerSecond <= 0 || sent.BitsPerSecond > 1e12 {
			t.Errorf("%s: %v bit/s sent, %v received", name, sent.BitsPerSecond, received.BitsPerSecond)
		}
		if sent.Retransmits < 0 || sent.Retransmits > 1e6 {
			t.Errorf("%s: %v retransmits", name, sent.Retransmits)
		}
		if !udp {
			return
		}
		if sum.Packets < 1 || sum.Lost < 0 || sum.LostPercent < 0 || sum.LostPercent > 10 || sum.JitterMS < 0 || sum.JitterMS > 100 {
			t.Errorf("%s: %v of %v datagrams lost (%v %%), jitter %v ms", name, sum.Lost, sum.Packets, sum.LostPercent, sum.JitterMS)
		}
	}
	way("sum", r.End.Sent, r.End.Received, r.End.UDP)
	if bidir {
		if !udp && r.End.ReverseSent.Bytes < least || udp && r.End.UDPReverse.Bytes < least {
			t.Errorf("reverse: %v bytes sent, %v received: want at least %v", r.End.ReverseSent.Bytes, r.End.ReverseReceived.Bytes, least)
		}
	}
	for _, name := range []string{"host_total", "remote_total"} {
		if v, ok := r.End.CPU[name]; !ok || v < 0 || v > 6400 {
			t.Errorf("CPU %s: got %v, %t: want a percentage", name, v, ok)
		}
	}
	if strings.Contains(args, "-O ") && (len(r.Intervals) < 2 || !r.Intervals[0].Streams[0].Omitted || r.Intervals[len(r.Intervals)-1].Streams[0].Omitted) {
		t.Errorf("%d intervals: want the first one omitted and the last one not", len(r.Intervals))
	}
	if strings.Contains(args, "get-server-output") && !strings.Contains(r.ServerOutput, "receiver") {
		t.Errorf("server's output %q: want its summary", r.ServerOutput)
	}
}

// short leaves out what takes a second or more.
func short(t *testing.T, args string) {
	t.Helper()
	if testing.Short() && strings.Contains(args, "-t ") {
		t.Skip("takes a second or more; run without -short")
	}
}

func TestOriginalClient(t *testing.T) {
	needOriginal(t)
	s := serve(t, defaultLimits)
	for _, mode := range modes {
		t.Run(mode.args, func(t *testing.T) {
			short(t, mode.args)
			check(t, original(t, s.port, mode.args), mode.args, mode.streams, mode.bytes)
		})
	}
}

func TestOwnClient(t *testing.T) {
	s := serve(t, defaultLimits)
	for _, mode := range modes {
		t.Run(mode.args, func(t *testing.T) {
			short(t, mode.args)
			r, err := ours(t, s.port, mode.args)
			if err != nil {
				t.Fatal(err)
			}
			check(t, r, mode.args, mode.streams, mode.bytes)
		})
	}
}

func TestOriginalServer(t *testing.T) {
	needOriginal(t)
	if errNoNetwork != nil {
		t.Skipf("needs a network namespace: %v", errNoNetwork)
	}
	const port = 5301
	server := exec.Command("iperf3", "-s", "-p", fmt.Sprint(port), "--forceflush")
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	listening := make(chan struct{}, 100)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.Contains(lines.Text(), "Server listening") {
				listening <- struct{}{}
			}
		}
	}()
	t.Cleanup(func() {
		_ = server.Process.Kill()
		<-drained
		_ = server.Wait()
	})
	for _, mode := range modes {
		t.Run(mode.args, func(t *testing.T) {
			short(t, mode.args)
			select {
			case <-listening:
			case <-time.After(5 * time.Second):
				t.Fatal("the original server is not listening")
			}
			r, err := ours(t, port, mode.args)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(mode.args, "-t ") && r.End.Received.Bytes < r.End.Sent.Bytes {
				// It stops counting at TEST_END, however much is still queued on its sockets: that is its affair.
				t.Logf("the original server counted %v of %v bytes", r.End.Received.Bytes, r.End.Sent.Bytes)
				r.End.Received = r.End.Sent
			}
			check(t, r, mode.args, mode.streams, mode.bytes)
		})
	}
}

// begin opens a control connection, shows a cookie and waits for PARAM_EXCHANGE.
func begin(t *testing.T, port int, id cookie) *control {
	t.Helper()
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &control{Conn: conn, timeout: 3 * time.Second}
	if err := c.write("cookie", id[:]); err != nil {
		t.Fatal(err)
	}
	expect(t, c, stateParamExchange)
	return c
}

func expect(t *testing.T, c *control, want state) {
	t.Helper()
	if got, err := c.readState(); err != nil || got != want {
		t.Fatalf("got %v, %v: want %v", got, err, want)
	}
}

// advance takes a test to TEST_RUNNING with one TCP stream.
func advance(t *testing.T, port int, p *params) (c *control, stream net.Conn) {
	t.Helper()
	id := newCookie()
	c = begin(t, port, id)
	if err := c.writeJSON("parameters", p); err != nil {
		t.Fatal(err)
	}
	expect(t, c, stateCreateStreams)
	stream, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stream.Close() })
	if _, err := stream.Write(id[:]); err != nil {
		t.Fatal(err)
	}
	expect(t, c, stateTestStart)
	expect(t, c, stateTestRunning)
	return c, stream
}

func TestBusy(t *testing.T) {
	s := serve(t, defaultLimits)
	first := begin(t, s.port, newCookie())
	if _, err := ours(t, s.port, "-t 1"); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("our client: got %v: want busy", err)
	}
	if _, err := exec.LookPath("iperf3"); err == nil {
		if r := original(t, s.port, "-t 1"); !strings.Contains(r.Error, "busy") {
			t.Errorf("the original client: got %q: want busy", r.Error)
		}
	}
	first.Close()
	recovers(t, s)
}

// recovers checks that a complete test works soon.
func recovers(t *testing.T, s *running) {
	t.Helper()
	var err error
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err = ours(t, s.port, "-n 100K"); err == nil {
			return
		}
		if !strings.Contains(err.Error(), "busy") {
			break
		}
	}
	t.Fatalf("the next test: %v", err)
}

// TestBadClients lets clients die, hang or talk nonsense at every step; each time the server must be free again soon.
func TestBadClients(t *testing.T) {
	tcp := &params{TCP: true, Len: 1000, Parallel: 1, Time: 1}
	amount := &params{TCP: true, Len: 1000, Parallel: 1, Num: 1 << 30}
	reverse := &params{TCP: true, Len: 1000, Parallel: 1, Num: 1 << 30, Reverse: true}
	raw := func(text string) func(*testing.T, *running) io.Closer {
		return func(t *testing.T, s *running) io.Closer {
			conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.port))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write([]byte(text))
			return conn
		}
	}
	sendJSON := func(text string) func(*testing.T, *running) io.Closer {
		return func(t *testing.T, s *running) io.Closer {
			c := begin(t, s.port, newCookie())
			_ = c.write("JSON", append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
			return c
		}
	}
	for _, test := range []struct {
		name string
		step func(*testing.T, *running) io.Closer
		log  string // what the server says about it, "": not said, or not before the next test
	}{
		{"silent", raw(""), ""},
		{"half a cookie", raw("abc"), ""},
		{"HTTP", raw("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: x\r\n\r\n"), ""},
		{"no parameters", func(t *testing.T, s *running) io.Closer { return begin(t, s.port, newCookie()) }, "parameters"},
		{"half the parameters", func(t *testing.T, s *running) io.Closer {
			c := begin(t, s.port, newCookie())
			_ = c.write("half", []byte("\x00\x00\x00\x80{\"tcp\":tr"))
			return c
		}, "parameters"},
		{"endless parameters", func(t *testing.T, s *running) io.Closer {
			c := begin(t, s.port, newCookie())
			_ = c.write("length", []byte("\x7f\xff\xff\xff"))
			return c
		}, "want 1..65536 bytes"},
		{"parameters that are no JSON", sendJSON("garbage"), "decode parameters"},
		{"no streams wanted", sendJSON(`{"tcp":true,"parallel":0,"len":1000}`), "want 1..128 streams"},
		{"TCP streams never opened", func(t *testing.T, s *running) io.Closer {
			c := begin(t, s.port, newCookie())
			_ = c.writeJSON("parameters", tcp)
			expect(t, c, stateCreateStreams)
			return c
		}, "streams"},
		{"UDP streams never opened", func(t *testing.T, s *running) io.Closer {
			c := begin(t, s.port, newCookie())
			_ = c.writeJSON("parameters", &params{UDP: true, Len: 1000, Parallel: 2, Time: 1})
			expect(t, c, stateCreateStreams)
			return c
		}, "streams"},
		{"a time that never ends", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, tcp)
			return c
		}, ""},
		{"an amount that never comes", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, amount)
			return c
		}, ""},
		{"a receiver that does not read", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, reverse)
			return c
		}, ""},
		{"a state out of turn", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, tcp)
			_ = c.writeState(stateDisplayResults)
			return c
		}, "got DISPLAY_RESULTS"},
		{"a reset stream", func(t *testing.T, s *running) io.Closer {
			c, stream := advance(t, s.port, tcp)
			_ = stream.(*net.TCPConn).SetLinger(0)
			stream.Close()
			return c
		}, "reset"},
		{"terminated", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, tcp)
			_ = c.writeState(stateClientTerminate)
			return c
		}, errClientTerminated.Error()},
		{"no results", func(t *testing.T, s *running) io.Closer {
			c, _ := advance(t, s.port, tcp)
			_ = c.writeState(stateTestEnd)
			expect(t, c, stateExchangeResults)
			return c
		}, "results"},
	} {
		for _, hang := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/hang=%t", test.name, hang), func(t *testing.T) {
				t.Parallel()
				l := defaultLimits // a client that is gone is noticed without
				if hang {
					l = quick
				}
				s := serve(t, l)
				conn := test.step(t, s)
				if !hang {
					conn.Close()
				}
				recovers(t, s)
				conn.Close()
				want := test.log
				if !hang && want != "" {
					want = "iperf3: error" // closing the control connection may be noticed first
				}
				if !strings.Contains(s.out.String(), want) {
					t.Errorf("the server does not mention %q", want)
				}
			})
		}
	}
}

func TestSilentConnectionsAreBounded(t *testing.T) {
	s := serve(t, defaultLimits)
	for range maxUndecided {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.port))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	time.Sleep(50 * time.Millisecond) // for the server to accept them all
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one connection too many: got %v: want it closed at once", err)
	}
}

func TestForeignDatagrams(t *testing.T) {
	s := serve(t, defaultLimits)
	conn, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", s.port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, datagram := range []string{"9876", "x", strings.Repeat("y", 2000)} {
		if _, err := conn.Write([]byte(datagram)); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 100)); err == nil {
		t.Errorf("got an answer of %d bytes without a test", n)
	}
	if r, err := ours(t, s.port, "-u -n 20K -l 1000 -b 10M"); err != nil {
		t.Error(err)
	} else if r.End.Received.Bytes < 20_000 {
		t.Errorf("%v bytes received: want 20480", r.End.Received.Bytes)
	}
}

func TestServerTerminates(t *testing.T) {
	s := serve(t, defaultLimits)
	failed := make(chan error, 1)
	go func() {
		_, err := ours(t, s.port, "-t 10 -b 1M -l 1000")
		failed <- err
	}()
	awaitOutput(t, s.out, "connected to")
	s.cancel()
	select {
	case err := <-failed:
		if err == nil || !strings.Contains(err.Error(), errServerTerminated.Error()) {
			t.Errorf("client: got %v: want %v", err, errServerTerminated)
		}
	case <-time.After(3 * time.Second):
		t.Fatal("the client did not notice")
	}
}

func TestClientTerminates(t *testing.T) {
	s := serve(t, defaultLimits)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, errs := &locked{}, &locked{}
	line := strings.Fields(fmt.Sprintf("-host-sockets -c 127.0.0.1 -p %d -t 10 -i 0.1 -b 1M -l 1000", s.port))
	done := make(chan int, 1)
	go func() { done <- command(ctx, line, out, errs) }()
	awaitOutput(t, out, "bits/sec") // the first interval
	cancel()
	if code := <-done; code != 1 || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("got exit status %d, %q: want 1 and interrupted", code, errs.String())
	}
	if !strings.Contains(out.String(), "sender") {
		t.Errorf("output %q: want a summary", out.String())
	}
	recovers(t, s)
	if !strings.Contains(s.out.String(), errClientTerminated.Error()) {
		t.Errorf("the server does not mention %q", errClientTerminated)
	}
}

func TestOneOff(t *testing.T) {
	if errNoNetwork != nil {
		t.Skipf("needs a network namespace: %v", errNoNetwork)
	}
	const port = 5302
	done := make(chan int, 1)
	out := &locked{}
	go func() {
		done <- command(t.Context(), []string{"-host-sockets", "-s", "--one-off", "-p", fmt.Sprint(port)}, out, out)
	}()
	var err error
	for range 50 {
		if _, err = ours(t, port, "-n 10K"); err == nil || !strings.Contains(err.Error(), "refused") {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	select {
	case code := <-done:
		if code != 0 {
			t.Errorf("got exit status %d: want 0\n%s", code, out)
		}
	case <-time.After(3 * time.Second):
		t.Fatal("the server runs on")
	}
}

func TestClientErrors(t *testing.T) {
	if errNoNetwork != nil {
		t.Skipf("needs a network namespace: %v", errNoNetwork)
	}
	for _, test := range []struct{ name, says, want string }{
		{"denies access", "\xff", "busy"},
		{"reports an error", "\xfe\x00\x00\x00\x07\x00\x00\x00\x00", "error 7"},
		{"terminates", "\x0b", "terminated"},
		{"talks nonsense", "\x55", "state 85"},
		{"starts without streams", "\x09\x02", "before its streams"},
		{"asks for results at once", "\x09\x0d", "before the test"},
		{"says nothing", "", "in time"},
	} {
		t.Run(test.name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				_, _ = conn.Write([]byte(test.says))
				_, _ = io.Copy(io.Discard, conn)
			}()
			_, port := splitAddr(listener.Addr())
			if _, err := ours(t, port, "-connect-timeout 300 -t 1"); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v: want an error with %q", err, test.want)
			}
		})
	}
	if _, err := ours(t, 1, "-t 1"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("no server: got %v: want refused", err)
	}
}

// TestStrangers tries to join somebody else's test while it waits for its streams.
func TestStrangers(t *testing.T) {
	s := serve(t, defaultLimits)
	id := newCookie()
	c := begin(t, s.port, id)
	if err := c.writeJSON("parameters", &params{UDP: true, Len: 1000, Parallel: 1, Time: 1}); err != nil {
		t.Fatal(err)
	}
	expect(t, c, stateCreateStreams)
	join := func(from string) error {
		dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
		conn, err := dialer.Dial("udp4", fmt.Sprintf("127.0.0.1:%d", s.port))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = conn.Write(connectMessage[:])
		_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, err = conn.Read(make([]byte, 10))
		return err
	}
	if err := join("127.0.0.2"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stranger's stream: got %v: want no answer", err)
	}
	if err := join("127.0.0.1"); err != nil {
		t.Errorf("the client's stream: %v", err)
	}
	c.Close()

	s = serve(t, defaultLimits)
	c = begin(t, s.port, id)
	if err := c.writeJSON("parameters", &params{TCP: true, Len: 1000, Parallel: 1, Time: 1}); err != nil {
		t.Fatal(err)
	}
	expect(t, c, stateCreateStreams)
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stranger := &control{Conn: conn, timeout: time.Second}
	other := newCookie()
	if err := stranger.write("cookie", other[:]); err != nil {
		t.Fatal(err)
	}
	expect(t, stranger, stateAccessDenied)
}
