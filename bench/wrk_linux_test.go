package main

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestParseWrk(t *testing.T) {
	const (
		usual  = "Running 1s test @ http://10.99.0.2:80/\n  1 threads and 64 connections\nRequests/sec:  50000.00\n\n"
		figure = `{"requests":50000,"duration":1000100,"p50":900,"p99":2000,"max":9000,"errors":{"connect":0,"read":0,"write":0,"status":0,"timeout":0}}` + "\n"
	)
	want := sample{
		Elapsed: 1000100 * time.Microsecond, Ops: 50000,
		P50: 900 * time.Microsecond, P99: 2 * time.Millisecond, Max: 9 * time.Millisecond,
	}
	if got, err := parseWrk([]byte(usual + figure)); err != nil || got != want {
		t.Errorf("sample is %+v, error %v, want %+v", got, err, want)
	}

	tests := []struct{ name, replace, by, want string }{
		{"connect", `"connect":0`, `"connect":3`, "3 connect"},
		{"read", `"read":0`, `"read":4`, "4 read"},
		{"write", `"write":0`, `"write":5`, "5 write"},
		{"status", `"status":0`, `"status":6`, "6 answers other than"},
		{"timeout", `"timeout":0`, `"timeout":7`, "7 timeout"},
		{"no answer", `"requests":50000`, `"requests":0`, "no answer"},
		{"no figures", figure, "", "does not end with its figures"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseWrk([]byte(strings.Replace(usual+figure, tt.replace, tt.by, 1)))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

// The real wrk counts what the servers have seen.
func TestWrk(t *testing.T) {
	needSandbox(t)
	wrk, err := exec.LookPath("wrk")
	if err != nil {
		t.Skipf("needs the HTTP client wrk: %v", err)
	}
	for _, d := range []door{doorShard, doorNet} {
		p, _, counts := serveLoopback(t)
		spec := testSpec(loadHTTP, 8, p)
		spec.Wrk, spec.Door = wrk, d
		s, err := spec.run()
		if err != nil {
			t.Fatal(err)
		}
		// One connection of wrk's only tries whether the server is there.
		if got := counts.conns.Load(); got < 8 || got > 9 {
			t.Errorf("%s: the server has seen %d connections, want 8", d, got)
		}
		if s.Ops == 0 || s.CPU == 0 || s.Elapsed < time.Second || s.P50 <= 0 || s.P50 > s.P99 || s.P99 > s.Max {
			t.Errorf("%s: sample is %+v", d, s)
		}
	}
}

func TestWrkErrors(t *testing.T) {
	needSandbox(t)
	wrk, err := exec.LookPath("wrk")
	if err != nil {
		t.Skipf("needs the HTTP client wrk: %v", err)
	}
	p, _, _ := serveLoopback(t)
	spec := testSpec(loadHTTP, 8, p)
	spec.Wrk = wrk
	spec.Ports.FastHTTP = p.Echo // answers with the request
	if s, err := spec.run(); err == nil {
		t.Errorf("took %+v from a server that does not speak HTTP", s)
	}
	spec.Ports.FastHTTP = 1 // nothing listens
	if s, err := spec.run(); err == nil {
		t.Errorf("took %+v from a closed port", s)
	}
}

func TestAnswerLength(t *testing.T) {
	tests := []struct {
		answer string
		want   int
		err    string
	}{
		{"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n", 44, ""},
		{"HTTP/1.1 200 OK\r\ncontent-length:6\r\nServer: x\r\n\r\n", 54, ""},
		{"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r", 0, ""},
		{"", 0, ""},
		{"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n", 0, "404 Not Found"},
		{"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 0, "want a length of 1 to 65535"},
		{"HTTP/1.1 200 OK\r\nContent-Length: six\r\n\r\n", 0, "want a length"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0, "no Content-Length"},
	}
	for _, tt := range tests {
		got, err := answerLength([]byte(tt.answer))
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: length %d, error %v, want %d and %q", tt.answer, got, err, tt.want, tt.err)
		}
	}
}
