package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestNumastackCommand(t *testing.T) {
	tests := []struct{ row, app, flags string }{
		{"bulk_in_1", "echo", "-mtu 1500 -shards 1 -cpus 3"},
		{"bulk_in_1_mtu9000", "echo", "-mtu 9000 -shards 1 -cpus 3"},
		{"pingpong_1", "echo", "-mtu 1500 -shards 1 -cpus 3 -spin 1s"},
		{"pingpong_1_sleep", "echo", "-mtu 1500 -shards 1 -cpus 3 -spin 0s"},
		{"shards_4", "echo", "-mtu 1500 -shards 4 -cpus 3 -spin 0s"},
		{"http_net", "httpd", "-mtu 1500 -shards 1 -cpus 3 -engine nethttp -listen :8080"},
	}
	b := &bench{apps: "/apps", serverCPU: 3}
	for _, tt := range tests {
		path, args := b.numastackCommand(rowNamed(t, tt.row))
		first := slices.Index(args, "-mtu")
		if got := strings.Join(args[max(first, 0):], " "); path != "/apps/"+tt.app || got != tt.flags {
			t.Errorf("%s: %s %s, want %s %s", tt.row, path, got, tt.app, tt.flags)
		}
	}
}

// The limit's client sends and asks for frames like those of the row.
func TestLimitSpec(t *testing.T) {
	tests := []struct {
		load, want load
		mtu, size  int
		gso        bool
	}{
		{loadBulkIn, loadUDPIn, 1500, 1472, true},
		{loadBulkOut, loadUDPOut, 9000, 8972, true},
		{loadUDPIn, loadUDPIn, 1500, 64, false},
	}
	for _, tt := range tests {
		got := clientSpec{Load: tt.load, Size: 64}.limit(tt.mtu)
		if got.Load != tt.want || got.Size != tt.size || got.GSO != tt.gso || got.Link != limitTAP {
			t.Errorf("%s at MTU %d became %+v, want %+v", tt.load, tt.mtu, got, tt)
		}
	}
}

// Few streams are warm after the time that everything has.
func TestWarmup(t *testing.T) {
	for name, want := range map[string]time.Duration{
		"bulk_in_1": warmup, "bulk_out_8": warmup, "bulk_out_128": 1024 * time.Millisecond, "pingpong_512": warmup,
	} {
		if got := rowNamed(t, name).warmup(); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

// A row's rate is found once and is the same for all peers; other rows have none.
func TestRate(t *testing.T) {
	b := &bench{rates: map[string]float64{"latency_64": 1234}}
	for name, want := range map[string]float64{"latency_64": 1234, "pingpong_64": 0} {
		if got, err := b.rate(t.Context(), rowNamed(t, name)); err != nil || got != want {
			t.Errorf("%s: rate %v and error %v, want %v", name, got, err, want)
		}
	}
}
