package main

import (
	"strings"
	"testing"
)

func rowNamed(t *testing.T, name string) row {
	t.Helper()
	rows, err := selectRows(name)
	if err != nil {
		t.Fatal(err)
	}
	return rows[0]
}

func TestRowRounds(t *testing.T) {
	tests := []struct {
		row    string
		quick  bool
		rounds int
		want   int
	}{
		{"bulk_in_1", false, 10, 10},
		{"bulk_in_1", true, 5, 5},
		{"http_net", false, 10, 10},
		{"http_net", true, 5, 3},
		{"http_net", true, 2, 2},
		{"idle_net", false, 10, 3},
		{"idle_net", false, 2, 2},
		{"idle_net", true, 5, 1},
	}
	for _, tt := range tests {
		o := options{quick: tt.quick, rounds: tt.rounds}
		if got := rowNamed(t, tt.row).rounds(o); got != tt.want {
			t.Errorf("%s, quick %t, %d rounds: %d samples, want %d", tt.row, tt.quick, tt.rounds, got, tt.want)
		}
	}
}

// Rows share a peer's sample when the peer does the same in both; numastack never does.
func TestRowKey(t *testing.T) {
	tests := []struct {
		a, b  string
		share bool // of gVisor and of the kernel
	}{
		{"bulk_in_1", "net_in_1", true},
		{"bulk_out_1", "net_out_1", true},
		{"pingpong_64", "net_pingpong_64", true},
		{"idle_events", "idle_net", true},
		{"bulk_in_1", "bulk_in_8", false},
		{"bulk_in_1", "bulk_out_1", false},
		{"pingpong_1", "pingpong_64", false},
		{"http_shard", "http_net", false}, // another library
	}
	for _, tt := range tests {
		a, b := rowNamed(t, tt.a), rowNamed(t, tt.b)
		for _, peer := range peerOrder {
			want := tt.share && peer != peerNumastack
			if got := a.key(peer) == b.key(peer); got != want {
				t.Errorf("%s and %s share the samples of %s: %t, want %t", tt.a, tt.b, peer, got, want)
			}
		}
	}
}

func TestParseRSS(t *testing.T) {
	const rollup = "00400000-7ffd ---p 00000000 00:00 0 [rollup]\nRss:    8860 kB\nPss:    8000 kB\nSwapPss:  3 kB\n"
	if got, err := parseRSS([]byte(rollup)); err != nil || got != 8860<<10 {
		t.Errorf("got %d bytes and error %v, want %d", got, err, 8860<<10)
	}
	without := strings.Replace(rollup, "Rss:", "Sss:", 1)
	if got, err := parseRSS([]byte(without)); err == nil {
		t.Errorf("took %d bytes from a file without Rss", got)
	}
}
