package main

import (
	"bytes"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"
)

func TestHeaderRoundTrip(t *testing.T) {
	for _, wide := range []bool{false, true} {
		b := make([]byte, headerLen(wide))
		sent := 3*time.Second + 250*time.Microsecond
		putHeader(b, sent, 77, wide)
		if at, sequence, ok := parseHeader(b, wide); at != sent || sequence != 77 || !ok {
			t.Errorf("wide=%t: got %v, %d, %t: want %v, 77, true", wide, at, sequence, ok, sent)
		}
		if _, _, ok := parseHeader(b[:len(b)-1], wide); ok {
			t.Errorf("wide=%t: a short datagram passed", wide)
		}
	}
	// Bytes as the original sends them: 664 s, 317469 µs, number 1.
	b := []byte{0, 0, 2, 0x98, 0, 4, 0xd8, 0x1d, 0, 0, 0, 1}
	at, sequence, ok := parseHeader(b, false)
	if want := 664*time.Second + 317469*time.Microsecond; at != want || sequence != 1 || !ok {
		t.Errorf("got %v, %d, %t: want %v, 1, true", at, sequence, ok, want)
	}
	if _, _, ok := parseHeader(make([]byte, 12), false); ok {
		t.Error("number 0 passed: numbers start at 1")
	}
}

func TestConnectMessages(t *testing.T) {
	for _, test := range []struct{ message, reply string }{
		{"9876", "6789"},
		{"6789", "9876"},
		{"\x15\xcd\x5b\x07", "\xb1\x68\xde\x3a"},
		{"\x07\x5b\xcd\x15", "\x3a\xde\x68\xb1"},
	} {
		got, ok := connectReply([]byte(test.message))
		if !ok || string(got[:]) != test.reply || !isConnectReply(got[:]) {
			t.Errorf("%q: got %q, %t: want %q", test.message, got, ok, test.reply)
		}
	}
	for _, message := range []string{"", "987", "98765", "1234"} {
		if _, ok := connectReply([]byte(message)); ok || isConnectReply([]byte(message)) {
			t.Errorf("%q passed as a connect message", message)
		}
	}
}

func TestArrivals(t *testing.T) {
	for _, test := range []struct {
		name                      string
		sequences                 []int64
		packets, lost, outOfOrder int64
	}{
		{"in order", []int64{1, 2, 3}, 3, 0, 0},
		{"gap", []int64{1, 4, 5}, 5, 2, 0},
		{"first ones missing", []int64{3}, 3, 2, 0},
		{"late one fills its gap", []int64{1, 3, 2, 4}, 4, 0, 1},
		{"duplicate", []int64{1, 2, 2}, 2, 0, 1},
	} {
		var a arrivals
		for _, n := range test.sequences {
			a.add(0, 0, n)
		}
		if a.packets != test.packets || a.lost != test.lost || a.outOfOrder != test.outOfOrder {
			t.Errorf("%s: got %d packets, %d lost, %d out of order: want %d, %d, %d",
				test.name, a.packets, a.lost, a.outOfOrder, test.packets, test.lost, test.outOfOrder)
		}
	}
}

func TestJitter(t *testing.T) {
	// Transit times 100, 116, 100 ms, whatever the offset of the clocks: J = 16/16 = 1, then 1 + (16-1)/16.
	for _, offset := range []time.Duration{0, -time.Hour, 24 * time.Hour} {
		var a arrivals
		for i, transit := range []time.Duration{100, 116, 100} {
			sent := time.Duration(i) * time.Second
			a.add(sent, sent+offset+transit*time.Millisecond, int64(i+1))
		}
		if got, want := a.jitter*1000, 1+15.0/16; math.Abs(got-want) > 1e-6 {
			t.Errorf("offset %v: got %v ms: want %v", offset, got, want)
		}
	}
}

func TestPacer(t *testing.T) {
	start := time.Unix(0, 0)
	p := pacer{bitsPerSecond: 8000, start: start} // 1000 bytes per second
	if d := p.wait(start); d != 0 {
		t.Errorf("first block: got %v: want 0", d)
	}
	p.sent(500)
	if d := p.wait(start.Add(100 * time.Millisecond)); d != 400*time.Millisecond {
		t.Errorf("early: got %v: want 400ms", d)
	}
	if d := p.wait(start.Add(time.Second)); d != 0 {
		t.Errorf("late: got %v: want 0", d)
	}
	p = pacer{bitsPerSecond: 8000, burst: 2, start: start}
	p.sent(500)
	if d := p.wait(start); d != 0 {
		t.Errorf("inside a burst: got %v: want 0", d)
	}
	p.sent(500)
	if d := p.wait(start); d != time.Second {
		t.Errorf("after a burst: got %v: want 1s", d)
	}
	if d := (&pacer{}).wait(start); d != 0 {
		t.Errorf("no rate: got %v: want 0", d)
	}
}

func TestQuota(t *testing.T) {
	q := newQuota()
	if !q.take(1 << 40) {
		t.Error("no limit: a block was refused")
	}
	q.limit(300)
	blocks := 0
	for q.take(128) {
		blocks++
	}
	if blocks != 3 {
		t.Errorf("300 bytes in blocks of 128: got %d: want 3", blocks)
	}
	select {
	case <-q.spent:
	default:
		t.Error("spent is not closed")
	}
}

// sink is a wire that takes everything.
type sink struct{ io.Writer }

func (sink) SetWriteDeadline(time.Time) error { return nil }
func (sink) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (sink) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (sink) Close() error                     { return nil }

func TestBlocksAllocateNothing(t *testing.T) {
	const blocks = 2000
	for _, p := range []params{{TCP: true, Len: 1000}, {UDP: true, Len: 1000}, {UDP: true, Len: 1000, Bandwidth: 1e12}} {
		sends := testing.AllocsPerRun(3, func() {
			q := newQuota()
			q.limit(blocks * 1000)
			s := newStream(&p, 0, true, sink{io.Discard})
			if err := s.send(nil, q, pacer{bitsPerSecond: float64(p.Bandwidth)}); err != nil || s.read().bytes != blocks*1000 {
				t.Errorf("sent %d bytes, %v: want %d", s.read().bytes, err, blocks*1000)
			}
		})
		if sends > 50 {
			t.Errorf("udp=%t: %v allocations for %d blocks sent: want those of the start only", p.UDP, sends, blocks)
		}
	}
	p := params{TCP: true, Len: 1000}
	receives := testing.AllocsPerRun(3, func() {
		s := newStream(&p, 0, false, sink{})
		if err := s.receive(io.LimitReader(zeros{}, blocks*1000), nil, newQuota()); err != nil || s.read().bytes != blocks*1000 {
			t.Errorf("received %d bytes, %v: want %d", s.read().bytes, err, blocks*1000)
		}
	})
	if receives > 50 {
		t.Errorf("%v allocations for %d blocks received: want those of the start only", receives, blocks)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

func TestScaledNumbers(t *testing.T) {
	for _, test := range []struct {
		text string
		step float64
		want int64
	}{
		{"300", 1024, 300}, {"1.5K", 1024, 1536}, {"2m", 1024, 2 << 20}, {"10M", 1000, 10_000_000}, {"1G", 1000, 1e9}, {"0", 1000, 0},
	} {
		if got, err := parseScaled(test.text, test.step); err != nil || got != test.want {
			t.Errorf("%s by %v: got %d, %v: want %d", test.text, test.step, got, err, test.want)
		}
	}
	for _, text := range []string{"", "K", "-1", "1KB", "nan", "1e30", "M1"} {
		if got, err := parseScaled(text, 1024); err == nil {
			t.Errorf("%q: got %d: want an error", text, got)
		}
	}
}

func TestPrintedNumbers(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0.00 Bytes", 393216: " 384 KBytes", 131072: " 128 KBytes", 32768: "32.0 KBytes", 1174405: "1.12 MBytes", 3 << 40: "3.00 TBytes",
	} {
		if got := size(bytes); got != want {
			t.Errorf("%d bytes: got %q: want %q", bytes, got, want)
		}
	}
	for v, want := range map[float64]string{1048576: "1.05 Mbits", 17.5e9: "17.5 Gbits", 999e3: " 999 Kbits"} {
		if got := rate(v); got != want {
			t.Errorf("%v bit/s: got %q: want %q", v, got, want)
		}
	}
}

func TestCommandLineErrors(t *testing.T) {
	for _, test := range []struct {
		args string
		want string
		code int
	}{
		{"-c h -s", "want one of them", 2},
		{"-c h -P 129", "want 1..128 streams", 2},
		{"-c h -R --bidir", "-R and -bidir", 2},
		{"-c h -4 -6", "-4 and -6", 2},
		{"-c h -n 1 -k 1", "-n 1 and -k 1", 2},
		{"-c h -u -l 70000", "want 12..65507 bytes", 2},
		{"-c h -b fast", "want a number", 2},
		{"-p 70000", "want a port", 2},
		{"-M 1000", "only with -host-sockets", 2},
		{"extra", `argument "extra"`, 2},
		{"--nonsense", "flag provided but not defined", 2},
		{"--help", "Usage: iperf3", 0},
	} {
		var out, errs bytes.Buffer
		if code := command(t.Context(), strings.Fields(test.args), &out, &errs); code != test.code || !strings.Contains(errs.String(), test.want) {
			t.Errorf("%s: got %d, %q: want %d and %q", test.args, code, errs.String(), test.code, test.want)
		}
	}
}
