package main

import (
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var quickPeers = []string{"numastack", "gvisor", "kernel", "limit"}

func TestParseOptions(t *testing.T) {
	tests := []struct {
		args     string
		rows     []string // nil: all
		peers    []string // nil: all
		rounds   int
		duration time.Duration
		err      string // part of the error
	}{
		{args: "", rounds: 10, duration: time.Second},
		{args: "-quick", peers: quickPeers, rounds: 5, duration: time.Second},
		{args: "-quick -rounds 2 -duration 200ms", peers: quickPeers, rounds: 2, duration: 200 * time.Millisecond},
		{args: "-rows pingpong_1,short", rows: []string{"pingpong_1", "short"}, rounds: 10, duration: time.Second},
		{args: "-rows latency,shards_2", rows: []string{"latency_1", "latency_64", "shards_2"}, rounds: 10, duration: time.Second},
		{args: "-quick -rows udp_in", rows: []string{"udp_in_64", "udp_in_gso"}, peers: quickPeers, rounds: 5, duration: time.Second},
		{args: "-peers kernel,numastack", peers: []string{"numastack", "kernel"}, rounds: 10, duration: time.Second},
		{args: "-quick -peers gvisor_gso", peers: []string{"gvisor_gso"}, rounds: 5, duration: time.Second},
		{args: "-rows http,idle_net", rows: []string{"http_shard", "http_net", "idle_net"}, rounds: 10, duration: time.Second},
		{args: "-idle-conns 25001", err: "-idle-conns 25001: must be 1 to 25000"},
		{args: "-rows bulk_sideways", err: `"bulk_sideways": accepted are bulk_in_1`},
		{args: "-rows short,", err: `-rows ""`},
		{args: "-peers lwip", err: `"lwip": accepted are numastack, gvisor, gvisor_gso, kernel, limit`},
		{args: "-rounds 101", err: "-rounds 101: must be 1 to 100"},
		{args: "-rounds -1", err: "-rounds -1"},
		{args: "-duration 1ms", err: "-duration 1ms: must be 100ms to 1m0s"},
		{args: "-cpus 1", err: `-cpus "1": must be two CPU numbers`},
		{args: "-cpus 0,-1", err: `-cpus "0,-1"`},
		{args: "quick", err: `unexpected argument "quick"`},
		{args: "-check none.json", err: `-check: result file "none.json"`},
		{args: "-compare old.json", err: "take one result file after the flags: got 0 arguments"},
		{args: "-compare old.json new.json third.json", err: "got 2 arguments (new.json third.json)"},
		{args: "-plot dir", err: "take one result file after the flags"},
		{args: "-capacity r.json -markdown r.json", err: "accepted is one of them"},
		{args: "-capacity r.json more.json", err: `unexpected argument "more.json"`},
		{args: "-mix 64:1", err: "-mix: accepted only with -capacity"},
		{args: "-capacity r.json -mix 64:2", err: `-mix "64:2": share "2"`},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			o, err := parseOptions(strings.Fields(tt.args), io.Discard)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if o.rounds != tt.rounds || o.duration != tt.duration {
				t.Errorf("%d rounds of %v, want %d of %v", o.rounds, o.duration, tt.rounds, tt.duration)
			}
			var names []string
			for _, r := range o.rows {
				names = append(names, r.name)
			}
			all := len(allRows)
			if o.quick {
				all = len(quickRows())
			}
			if want := tt.rows; want == nil && len(names) != all || want != nil && !slices.Equal(names, want) {
				t.Errorf("rows are %v, want %v", names, want)
			}
			want := tt.peers
			if want == nil {
				want = peerOrder
			}
			if !slices.Equal(o.peers, want) {
				t.Errorf("peers are %v, want %v", o.peers, want)
			}
		})
	}
}

func TestReportingArguments(t *testing.T) {
	tests := []struct {
		args string
		want reporting
	}{
		{"-compare old.json new.json", reporting{compare: "old.json", file: "new.json"}},
		{"-plot dir r.json", reporting{plot: "dir", file: "r.json"}},
		{"-markdown r.json", reporting{markdown: "r.json"}},
		{"-capacity r.json -mix 64:1", reporting{capacity: "r.json", mix: frameMix{{64, 1}}}},
	}
	for _, tt := range tests {
		o, err := parseOptions(strings.Fields(tt.args), io.Discard)
		if err != nil || !o.reports() || !reflect.DeepEqual(o.reporting, tt.want) {
			t.Errorf("%q: %+v, error %v, want %+v", tt.args, o.reporting, err, tt.want)
		}
	}
	if o, err := parseOptions([]string{"-quick", "-out", "r.json"}, io.Discard); err != nil || o.reports() || o.out != "r.json" {
		t.Errorf("-out: %+v, error %v, want a measurement", o.reporting, err)
	}
}

func TestNeededApps(t *testing.T) {
	tests := []struct {
		args string
		want []string
	}{
		{"", []string{"echo", "httpd"}},
		{"-rows bulk,short", []string{"echo"}},
		{"-rows http", []string{"httpd"}},
		{"-rows net,idle", nil},
		{"-peers gvisor,kernel", nil},
		{"-demo", []string{"echo", "iperf3"}},
	}
	for _, tt := range tests {
		o, err := parseOptions(strings.Fields(tt.args), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if got := o.neededApps(); !slices.Equal(got, tt.want) {
			t.Errorf("%q: %v, want %v", tt.args, got, tt.want)
		}
	}
}
