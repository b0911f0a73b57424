package main

import (
	"slices"
	"strings"
	"testing"
)

func rowNamed(t *testing.T, name string) row {
	t.Helper()
	rows, err := selectRows(name, false)
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
		{"bulk_in_128", false, 10, 6},
		{"bulk_in_128", false, 2, 2},
	}
	for _, tt := range tests {
		o := options{quick: tt.quick, rounds: tt.rounds}
		if got := rowNamed(t, tt.row).rounds(o); got != tt.want {
			t.Errorf("%s, quick %t, %d rounds: %d samples, want %d", tt.row, tt.quick, tt.rounds, got, tt.want)
		}
	}
}

func TestPeerRounds(t *testing.T) {
	r := rowNamed(t, "bulk_in_1")
	tests := []struct {
		peer   string
		quick  bool
		rounds int
		want   int
	}{
		{peerLimit, false, 10, 10},
		{peerLimit, true, 5, 2},
		{peerLimit, true, 1, 1},
		{peerKernel, true, 5, 5},
	}
	for _, tt := range tests {
		if got := r.peerRounds(tt.peer, options{quick: tt.quick, rounds: tt.rounds}); got != tt.want {
			t.Errorf("%s, quick %t, %d rounds: %d samples, want %d", tt.peer, tt.quick, tt.rounds, got, tt.want)
		}
	}
}

// Rows share a peer's sample when the peer does the same in both; numastack never does.
func TestRowKey(t *testing.T) {
	tests := []struct {
		a, b  string
		share bool // of the peers that measure both
	}{
		{"bulk_in_1", "net_in_1", true},
		{"bulk_out_1", "net_out_1", true},
		{"pingpong_64", "net_pingpong_64", true},
		{"idle_events", "idle_net", true},
		{"bulk_out_1", "bulk_out_1_copy", true}, // only numastack can do without
		{"bulk_in_1", "bulk_in_8", false},
		{"bulk_in_1", "bulk_out_1", false},
		{"pingpong_1", "pingpong_64", false},
		{"http_shard", "http_net", false}, // another library
		{"bulk_in_1", "bulk_in_1_mtu9000", false},
		{"pingpong_64", "pingpong_64_1k", false},
		{"pingpong_1", "pingpong_1_sleep", true}, // only numastack spins
	}
	for _, tt := range tests {
		a, b := rowNamed(t, tt.a), rowNamed(t, tt.b)
		for _, peer := range peerOrder {
			if !a.measures(peer) || !b.measures(peer) || peer == peerLimit {
				continue
			}
			want := tt.share && peer != peerNumastack
			if got := a.key(peer) == b.key(peer); got != want {
				t.Errorf("%s and %s share the samples of %s: %t, want %t", tt.a, tt.b, peer, got, want)
			}
		}
	}
}

// The limit knows no connections: one sample serves all rows of one direction and MTU.
func TestLimitKey(t *testing.T) {
	in1, in128 := rowNamed(t, "bulk_in_1"), rowNamed(t, "bulk_in_128")
	if in1.key(peerLimit) != in128.key(peerLimit) {
		t.Error("rows with 1 and 128 streams have different samples of the limit")
	}
	for _, other := range []string{"bulk_out_1", "bulk_in_1_mtu9000"} {
		if in1.key(peerLimit) == rowNamed(t, other).key(peerLimit) {
			t.Errorf("bulk_in_1 and %s share the sample of the limit", other)
		}
	}
}

func TestRowMeasures(t *testing.T) {
	tests := []struct {
		row   string
		peers []string
	}{
		{"bulk_in_1", peerOrder},
		{"net_in_1", []string{peerNumastack, peerGVisor, peerGVisorGSO, peerKernel}},
		{"pingpong_64", []string{peerNumastack, peerGVisor, peerGVisorGSO, peerKernel}},
		{"udp_in_64", peerOrder},
		{"udp_in_gso", []string{peerNumastack, peerGVisor, peerKernel, peerLimit}},
		{"shards_2", []string{peerNumastack}},
		{"idle_net", []string{peerNumastack, peerKernel}},
	}
	for _, tt := range tests {
		var peers []string
		for _, p := range peerOrder {
			if rowNamed(t, tt.row).measures(p) {
				peers = append(peers, p)
			}
		}
		if !slices.Equal(peers, tt.peers) {
			t.Errorf("%s measures %v, want %v", tt.row, peers, tt.peers)
		}
	}
}

// What the names of the rows say.
func TestRowSizes(t *testing.T) {
	tests := []struct {
		row       string
		mtu, size int
		perByte   bool
	}{
		{"bulk_in_1", 1500, 64, true},
		{"bulk_out_8_mtu65521", 65521, 64, true},
		{"pingpong_1_16k", 1500, 16384, false},
		{"udp_in_64", 1500, 64, false},
		{"udp_in_gso", 1500, 1472, true},
	}
	for _, tt := range tests {
		r := rowNamed(t, tt.row)
		if r.linkMTU() != tt.mtu || r.messageSize() != tt.size || r.perByte() != tt.perByte {
			t.Errorf("%s: MTU %d, size %d, per byte %t, want %v", tt.row, r.linkMTU(), r.messageSize(), r.perByte(), tt)
		}
	}
	seen := map[string]bool{}
	for _, r := range allRows {
		if seen[r.name] {
			t.Errorf("two rows have the name %s", r.name)
		}
		seen[r.name] = true
	}
}

func TestQueueLen(t *testing.T) {
	tests := []struct {
		row, peer string
		want      int
	}{
		{"bulk_in_1", peerLimit, 16},
		{"bulk_in_1", peerNumastack, 0},
		{"net_in_1", peerNumastack, 0},
		{"udp_in_gso", peerNumastack, 16},
		{"udp_in_64", peerLimit, 4096},
	}
	for _, tt := range tests {
		if got := rowNamed(t, tt.row).queueLen(tt.peer); got != tt.want {
			t.Errorf("%s, %s: %d frames, want %d", tt.row, tt.peer, got, tt.want)
		}
	}
}

func TestBurst(t *testing.T) {
	want := burst{count: 176, size: 1472, gso: true}
	got, err := parseBurst(want.append(nil))
	if err != nil || got != want {
		t.Errorf("got %+v and error %v, want %+v", got, err, want)
	}
	for _, bad := range [][]byte{nil, {0, 1, 0, 64}, {0, 1, 0, 64, 0, 0}, {0xff, 0xff, 0, 64, 0}, {0, 1, 0xff, 0xff, 0}} {
		if got, err := parseBurst(bad); err == nil {
			t.Errorf("took % x as %+v", bad, got)
		}
	}
	for _, tt := range []struct{ size, want int }{{64, 64}, {1472, 44}, {8972, 7}, {65493, 1}} {
		if got := (burst{count: 1000, size: tt.size}).perFrame(); got != tt.want {
			t.Errorf("%d datagrams of %d bytes in a frame, want %d", got, tt.size, tt.want)
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
