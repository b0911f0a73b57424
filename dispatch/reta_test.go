package dispatch

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestNewRETA(t *testing.T) {
	for _, c := range []struct {
		groups, shards int
		ok             bool
	}{
		{1, 1, true},
		{32, 4, true},
		{128, 128, true},
		{100, 3, true},
		{32, 0, false},
		{32, -1, false},
		{3, 4, false},
		{0, 0, false},
		{129, 4, false},
		{129, 129, false},
	} {
		t.Run(fmt.Sprintf("groups=%d/shards=%d", c.groups, c.shards), func(t *testing.T) {
			r, err := NewRETA(c.groups, c.shards)
			if (err == nil) != c.ok {
				t.Fatalf("error %v, want success %t", err, c.ok)
			}
			if err != nil {
				return
			}
			if r.Groups() != c.groups || r.Shards() != c.shards {
				t.Errorf("%d groups, %d shards, want %d, %d", r.Groups(), r.Shards(), c.groups, c.shards)
			}
			queues, table := r.Queues(), r.Snapshot()
			for hash := range uint32(3 * Buckets) {
				bucket := int(hash) % Buckets
				group := bucket % c.groups
				owner := group % c.shards
				if r.Bucket(hash) != bucket || r.GroupOf(hash) != group || r.Owner(group) != owner || queues[bucket] != uint32(owner) {
					t.Fatalf("hash %d: bucket %d, group %d, owner %d, queue %d, want %d, %d, %d, %d", hash,
						r.Bucket(hash), r.GroupOf(hash), r.Owner(group), queues[bucket], bucket, group, owner, owner)
				}
				b, g, o := r.Lookup(hash)
				if b != bucket || g != group || o != owner || table[bucket] != owner {
					t.Fatalf("hash %d: looked up as %d, %d, %d, in the snapshot %d, want %d, %d, %d", hash, b, g, o, table[bucket], bucket, group, owner)
				}
			}
		})
	}
}

func TestBucketUsesLowBits(t *testing.T) {
	r, err := NewRETA(32, 4)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Bucket(0xffffff85); got != 5 {
		t.Errorf("bucket of ffffff85: %d, want 5", got)
	}
	if got := r.GroupOf(0xffffffff); got != 31 {
		t.Errorf("group of ffffffff: %d, want 31", got)
	}
}

func TestSetOwner(t *testing.T) {
	r, err := NewRETA(10, 3)
	if err != nil {
		t.Fatal(err)
	}
	before := r.Queues()
	r.SetOwner(4, 2)
	if r.Owner(4) != 2 {
		t.Errorf("owner %d, want 2", r.Owner(4))
	}
	for b, q := range r.Queues() {
		want := before[b]
		if b%10 == 4 {
			want = 2
		}
		if q != want {
			t.Errorf("bucket %d: queue %d, want %d", b, q, want)
		}
		if r.GroupOf(uint32(b)) != b%10 {
			t.Errorf("bucket %d changed its group to %d", b, r.GroupOf(uint32(b)))
		}
	}
}

func TestMoves(t *testing.T) {
	const groups, shards = 100, 4 // the last 72 groups have one bucket, the others two
	r, err := NewRETA(groups, shards)
	if err != nil {
		t.Fatal(err)
	}
	before := r.Snapshot()
	// with returns the present table with some entries replaced.
	with := func(entries map[int]int) []int {
		table := r.Snapshot()
		for b, shard := range entries {
			table[b] = shard
		}
		return table
	}
	for _, c := range []struct {
		name  string
		table []int
		want  []Move
		err   string
	}{
		{"as it is", with(nil), nil, ""},
		{"one bucket", with(map[int]int{50: 0}), []Move{{50, 2, 0}}, ""},
		{"both buckets of two groups", with(map[int]int{27: 1, 127: 1, 0: 3, 100: 3}), []Move{{0, 0, 3}, {27, 3, 1}}, ""},
		{"empty", nil, nil, "0 entries, want 128"},
		{"one too few", make([]int, 127), nil, "127 entries, want 128"},
		{"one too many", make([]int, 129), nil, "129 entries, want 128"},
		{"no such shard", with(map[int]int{99: 4}), nil, "bucket 99 to shard 4, want 0 to 3"},
		{"negative shard", with(map[int]int{99: -1}), nil, "bucket 99 to shard -1, want 0 to 3"},
		{"half a group", with(map[int]int{5: 3}), nil, "bucket 105 to shard 1, want 3 as for bucket 5: both belong to flow group 5"},
		{"other half", with(map[int]int{105: 3}), nil, "bucket 105 to shard 3, want 1 as for bucket 5"},
	} {
		got, err := r.Moves(c.table)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		if !slices.Equal(r.Snapshot(), before) {
			t.Fatalf("%s: the table changed", c.name)
		}
		want := slices.Clone(c.table)
		for _, m := range got {
			r.SetOwner(m.Group, m.To)
		}
		if c.err == "" && !slices.Equal(r.Snapshot(), want) {
			t.Errorf("%s: after the moves %v, want %v", c.name, r.Snapshot(), want)
		}
		for _, m := range got {
			r.SetOwner(m.Group, m.From)
		}
	}
}

func TestRETAPanics(t *testing.T) {
	r, err := NewRETA(10, 3)
	if err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func(){
		"owner of group -1":  func() { r.Owner(-1) },
		"owner of group 10":  func() { r.Owner(10) },
		"group 10 to shard":  func() { r.SetOwner(10, 0) },
		"group to shard 3":   func() { r.SetOwner(0, 3) },
		"group to shard -1":  func() { r.SetOwner(0, -1) },
		"group -1 to shard ": func() { r.SetOwner(-1, 0) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			call()
		}()
	}
}

// BenchmarkSteer is what steering costs a frame: parse, hash, look up. The flows
// differ, as they do in a burst, so the hash tables are not read at one place.
func BenchmarkSteer(b *testing.B) {
	const flows = 64
	r, err := NewRETA(32, 4)
	if err != nil {
		b.Fatal(err)
	}
	toeplitz := NewToeplitz(VerificationKey)
	rng := rand.New(rand.NewPCG(1, 1))
	for _, bench := range []struct {
		name    string
		v       vector
		at, len int // of the tuple in the frame
	}{{"ip=4", vectors[0], 26, 12}, {"ip=6", vectors[5], 22, 36}} {
		b.Run(bench.name, func(b *testing.B) {
			var frames [flows][]byte
			for i := range frames {
				frames[i] = bench.v.frame(b, true)
				for j := range bench.len {
					frames[i][bench.at+j] = byte(rng.Uint32())
				}
			}
			var p Parsed
			var n, owners int
			b.ReportAllocs()
			for b.Loop() {
				n++
				toeplitz.Parse(frames[n%flows], &p)
				owners += r.Owner(r.GroupOf(p.Hash))
			}
			if p.Payload == 0 || owners == 0 {
				b.Errorf("not parsed as TCP, or all to shard 0: %+v", p)
			}
		})
	}
}
