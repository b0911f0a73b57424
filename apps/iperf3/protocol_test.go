package main

import (
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
)

func TestNumberNotations(t *testing.T) {
	for text, want := range map[string]number{
		"0": 0, "131072": 131072, "-1": -1, "1e+16": 1e16, "2.9": 2, "true": 1, "false": 0, "null": 0,
		"18446744073709551615": -1, "9007199254740993": 9007199254740993,
	} {
		var got number
		if err := json.Unmarshal([]byte(text), &got); err != nil || got != want {
			t.Errorf("number %s: got %d, %v: want %d", text, got, err, want)
		}
	}
	for _, text := range []string{`"12"`, "1e30", "{}", "[1]"} {
		var got number
		if err := json.Unmarshal([]byte(text), &got); err == nil {
			t.Errorf("number %s: got %d: want an error", text, got)
		}
	}
}

func TestParamsFromOriginal(t *testing.T) {
	const text = `{"udp":true,"omit":1,"time":2,"num":0,"blockcount":0,"parallel":3,"bidirectional":true,"len":1000,` +
		`"bandwidth":1048576,"pacing_timer":1000,"burst":4,"get_server_output":1,"udp_counters_64bit":1,"client_version":"3.12"}`
	var p params
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	if err := p.validate(); err != nil {
		t.Fatal(err)
	}
	want := params{
		UDP: true, Omit: 1, Time: 2, Parallel: 3, Bidirectional: true, Len: 1000, Bandwidth: 1 << 20, PacingTimer: 1000,
		Burst: 4, GetServerOutput: 1, Counters64: 1, ClientVersion: "3.12",
	}
	if p != want {
		t.Errorf("got %+v: want %+v", p, want)
	}
	if got := p.directions(); len(got) != 6 || !got[0] || !got[2] || got[3] || got[5] {
		t.Errorf("directions %v: want three that send, then three that receive", got)
	}
}

func TestParamsRefused(t *testing.T) {
	good := params{TCP: true, Parallel: 1, Len: 1000, Time: 1}
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		spoil func(*params)
		code  int32
	}{
		{"no protocol", func(p *params) { p.TCP = false }, codeUnimplemented},
		{"both protocols", func(p *params) { p.UDP = true }, codeUnimplemented},
		{"sctp", func(p *params) { p.TCP, p.SCTP = false, true }, codeUnimplemented},
		{"no stream", func(p *params) { p.Parallel = 0 }, codeStreams},
		{"too many streams", func(p *params) { p.Parallel = 129 }, codeStreams},
		{"empty block", func(p *params) { p.Len = 0 }, codeBlockLen},
		{"huge block", func(p *params) { p.Len = 1<<20 + 1 }, codeBlockLen},
		{"datagram below its header", func(p *params) { p.TCP, p.UDP, p.Len = false, true, 11 }, codeBlockLen},
		{"datagram below its wide header", func(p *params) { p.TCP, p.UDP, p.Counters64, p.Len = false, true, 1, 15 }, codeBlockLen},
		{"datagram above IPv4", func(p *params) { p.TCP, p.UDP, p.Len = false, true, 65508 }, codeBlockLen},
		{"negative time", func(p *params) { p.Time = -1 }, codeParams},
		{"endless omit", func(p *params) { p.Omit = 601 }, codeParams},
		{"negative amount", func(p *params) { p.Num = -5 }, codeParams},
		{"amount that overflows", func(p *params) { p.BlockCount = 1 << 60 }, codeParams},
		{"huge window", func(p *params) { p.Window = 1 << 40 }, codeParams},
	} {
		p := good
		test.spoil(&p)
		var refused *invalid
		if err := p.validate(); !errors.As(err, &refused) || refused.code != test.code {
			t.Errorf("%s: got %v: want code %d", test.name, err, test.code)
		}
	}
}

func TestStreamIDs(t *testing.T) {
	for index, want := range []int{1, 3, 4, 5} {
		if got := streamID(index); got != want {
			t.Errorf("stream %d: got id %d: want %d", index, got, want)
		}
	}
}

func TestCookie(t *testing.T) {
	a, b := newCookie(), newCookie()
	if a == b {
		t.Error("two cookies are the same")
	}
	if len(a.String()) != cookieLen-1 || a[cookieLen-1] != 0 {
		t.Errorf("cookie %q: want 36 characters and a NUL", a[:])
	}
}

func TestControlJSON(t *testing.T) {
	left, right := pipe(t)
	sent := results{CPUTotal: 1.5, SenderHasRetransmits: -1, Streams: []streamResult{{ID: 1, Bytes: 1 << 40, Retransmits: -1}}}
	failed := make(chan error, 1)
	go func() { failed <- left.writeJSON("results", &sent) }()
	var got results
	if err := right.readJSON("results", &got, maxResultsLen); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	if got.CPUTotal != 1.5 || got.SenderHasRetransmits != -1 || len(got.Streams) != 1 || got.Streams[0].Bytes != 1<<40 {
		t.Errorf("got %+v: want %+v", got, sent)
	}
}

func TestControlRefusesBadJSON(t *testing.T) {
	for _, test := range []struct{ name, wire, want string }{
		{"too long", "\xff\xff\xff\xff", "want 1..100 bytes"},
		{"empty", "\x00\x00\x00\x00", "want 1..100 bytes"},
		{"no JSON", "\x00\x00\x00\x03abc", "decode"},
		{"never complete", "\x00\x00\x00\x09{}", "timeout"},
	} {
		left, right := pipe(t)
		right.timeout = 50 * time.Millisecond
		go func() { _, _ = left.Write([]byte(test.wire)) }()
		var p params
		if err := right.readJSON("parameters", &p, 100); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v: want an error with %q", test.name, err, test.want)
		}
	}
}

func TestControlInterrupt(t *testing.T) {
	_, right := pipe(t)
	right.timeout = time.Minute
	time.AfterFunc(20*time.Millisecond, right.interrupt)
	if _, err := right.readState(); err == nil {
		t.Error("read under way: want an error")
	}
	if _, err := right.readState(); err == nil {
		t.Error("later read: want an error")
	}
}

func TestStateBytes(t *testing.T) {
	left, right := pipe(t)
	for _, s := range []state{stateTestStart, stateDone, stateAccessDenied, stateServerError} {
		go func() { _ = left.writeState(s) }()
		if got, err := right.readState(); err != nil || got != s {
			t.Errorf("%v: got %v, %v", s, got, err)
		}
	}
	go func() { _ = left.writeError(codeBlockLen) }()
	if s, err := right.readState(); s != stateServerError || err != nil {
		t.Fatalf("got %v, %v: want %v", s, err, stateServerError)
	}
	if err := right.readError(); err == nil || !strings.Contains(err.Error(), "error 7 ") {
		t.Errorf("got %v: want error 7", err)
	}
}

// pipe returns two connected ends that close with the test.
func pipe(t *testing.T) (left, right *control) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return &control{Conn: a, timeout: 5 * time.Second}, &control{Conn: b, timeout: 5 * time.Second}
}
