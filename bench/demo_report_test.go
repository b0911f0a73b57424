package main

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"
)

func TestParseIperf(t *testing.T) {
	tests := []struct {
		name string
		out  string
		udp  bool
		want iperfResult
		err  string
	}{
		{
			name: "tcp",
			out:  `{"end":{"sum_sent":{"bytes":2000,"bits_per_second":16e9},"sum_received":{"bytes":1000,"bits_per_second":8e9}}}`,
			want: iperfResult{bytes: 1000, gbit: 8},
		},
		{
			name: "udp counts what arrived",
			out:  `{"end":{"sum":{"bytes":1000,"bits_per_second":4e9,"lost_percent":25,"packets":4}}}`,
			udp:  true,
			want: iperfResult{bytes: 750, gbit: 3, lossPercent: 25},
		},
		{name: "its own error", out: `{"end":{},"error":"unable to connect to server"}`, err: "unable to connect"},
		{name: "nothing arrived", out: `{"end":{}}`, err: "0 bytes"},
		{name: "no JSON", out: "iperf3: usage", err: "13 bytes that are no JSON"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseIperf([]byte(tt.out), tt.udp)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.bytes != tt.want.bytes || math.Abs(got.gbit-tt.want.gbit) > 1e-9 || got.lossPercent != tt.want.lossPercent {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestDemoReportGolden(t *testing.T) {
	stream := demoLine{name: "TCP in, 1 stream", gbit: 18.25}
	stream.setCPU(2*time.Second, 1e9, 2.5e9)
	udp := demoLine{name: "UDP in, 500 Mbit/s asked", gbit: 0.5, udp: true, lossPercent: 0.125}
	udp.setCPU(time.Second, 1e8, 2.5e9)
	echo := demoLine{name: "echo of 64 bytes, 64 connections", gbit: 0.1, requests: 98765, p50: 612, p99: 1830}
	echo.setCPU(time.Second, 1e7, 2.5e9)
	rep := demoReport{
		env:    environment{CPU: "Test CPU", CPUs: 2, Kernel: "6.18.0", Go: "go1.26", MTU: 1500},
		client: "iperf3", shards: 2,
		lines: []demoLine{stream, udp, echo},
		apps: []appStats{{app: "echo", Shards: []shardStats{
			{Shard: 0, CPU: 0, RxFrames: 1200, TxFrames: 900, Missteer: 1, Forwarded: 1, Wakes: 500},
			{Shard: 1, CPU: 1, RxFrames: 300, TxFrames: 200, Dropped: 2},
		}}},
	}
	var b bytes.Buffer
	if err := rep.write(&b); err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "demo.txt", b.Bytes())
}
