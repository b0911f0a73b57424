package dispatch

import (
	"fmt"
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
			if r.Groups() != c.groups {
				t.Errorf("%d groups, want %d", r.Groups(), c.groups)
			}
			queues := r.Queues()
			for hash := range uint32(3 * Buckets) {
				bucket := int(hash) % Buckets
				group := bucket % c.groups
				owner := group % c.shards
				if r.Bucket(hash) != bucket || r.GroupOf(hash) != group || r.Owner(group) != owner || queues[bucket] != uint32(owner) {
					t.Fatalf("hash %d: bucket %d, group %d, owner %d, queue %d, want %d, %d, %d, %d", hash,
						r.Bucket(hash), r.GroupOf(hash), r.Owner(group), queues[bucket], bucket, group, owner, owner)
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
