package shard

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"numastack/dispatch"
)

func TestDrainAndResume(t *testing.T) {
	a, b := startWide(t, 3, 12)
	client, server := netPair(t, a, b)
	home := server.Shard()

	if err := b.Drain(home); err != nil {
		t.Fatal(err)
	}
	if counts := b.groupCounts(); counts[home] != 0 || slices.Max(counts) != 6 {
		t.Errorf("groups by shard after draining shard %d: %v, want 6, 6 and none", home, counts)
	}
	if server.Shard() == home {
		t.Error("the connection is still there")
	}
	if err := b.Move(server.c.g.id, home); !errors.Is(err, ErrDraining) {
		t.Errorf("Move to a draining shard: %v, want ErrDraining", err)
	}
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("Read on the moved connection = %d, %v", n, err)
	}

	other := (home + 1) % 3
	if err := b.Drain(other); err != nil {
		t.Fatal(err)
	}
	last := (home + 2) % 3
	if err := b.Drain(last); err == nil || !strings.Contains(err.Error(), "no other shard") {
		t.Errorf("Drain of the last shard: %v, want an error", err)
	}
	if want, got := []bool{true, true, true}, b.Draining(); !got[home] || !got[other] || got[last] {
		t.Errorf("draining %v, want %v but for shard %d", got, want, last)
	}
	if err := errors.Join(b.Resume(home), b.Resume(other)); err != nil {
		t.Fatal(err)
	}
	if counts := b.groupCounts(); !slices.Equal(counts, []int{4, 4, 4}) {
		t.Errorf("groups by shard at the end: %v, want 4 each", counts)
	}
	for _, err := range []error{b.Drain(3), b.Drain(-1), b.Resume(3)} {
		if err == nil || !strings.Contains(err.Error(), "want 0 to 2") {
			t.Errorf("no such shard: %v", err)
		}
	}
}

// TestDrainKeepsTheLimit: the connections that a stack may have move with the
// groups.
func TestDrainKeepsTheLimit(t *testing.T) {
	a, b := startWide(t, 2, 4)
	for _, s := range b.shards {
		s.do(func(s *Shard) { s.set.cfg.MaxConns = 5 }) // per shard, so ten
	}
	if err := b.Drain(1); err != nil {
		t.Fatal(err)
	}
	l, err := b.ListenNet([]netip.Addr{addrB}, 0, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := l.Addr().(*net.TCPAddr).AddrPort()
	for range 10 {
		c, err := a.DialNet(t.Context(), netip.AddrPort{}, remote)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, "ten connections", func() bool { c, _ := sum(b); return c.ConnsOpen == 10 })
	if refused := b.Stats()[0].ConnsRefused; refused != 0 {
		t.Errorf("%d connections refused below the limit", refused)
	}
	c, err := a.DialNet(t.Context(), netip.AddrPort{}, remote)
	if err == nil {
		defer c.Close()
	}
	eventually(t, "refusal beyond the limit", func() bool { return b.Stats()[0].ConnsRefused == 1 })
}

// TestDrainLeavesHandlers: what cannot leave stays and is named.
func TestDrainLeavesHandlers(t *testing.T) {
	a, b := startWide(t, 2, 4)
	end := make(chan struct{})
	l, err := b.Serve([]netip.Addr{addrB}, 0, 16, func(c net.Conn) {
		c.(*ServedConn).Offload(func() { <-end })
	})
	if err != nil {
		t.Fatal(err)
	}
	client, err := a.DialNet(t.Context(), netip.AddrPort{}, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	group := b.groupOf(protoTCP, l.Addr(), client.LocalAddr().(*net.TCPAddr).AddrPort())
	eventually(t, "handler", func() bool {
		served := 0
		_ = b.groups[group].do(func(g *Group) error { served = g.served; return nil })
		return served == 1
	})
	home := b.reta.Owner(group)
	if err := b.Drain(home); !errors.Is(err, ErrServing) || !strings.Contains(err.Error(), "1 handlers") {
		t.Errorf("Drain = %v, want ErrServing and their number", err)
	}
	if counts := b.groupCounts(); counts[home] != 1 || b.reta.Owner(group) != home {
		t.Errorf("groups by shard: %v, want only group %d left on shard %d", counts, group, home)
	}
	close(end)
	_ = client.Close()
	eventually(t, "drain", func() bool { return b.Drain(home) == nil })
}

func TestSetRETA(t *testing.T) {
	_, b := startWide(t, 2, 4)
	table := make([]int, dispatch.Buckets)
	for bucket := range table {
		table[bucket] = 1
	}
	if err := b.SetRETA(table); err != nil {
		t.Fatal(err)
	}
	if got := b.RETA(); !slices.Equal(got, table) {
		t.Errorf("RETA is %v, want %v", got, table)
	}
	flow := dispatch.Tuple{Src: addrA, SrcPort: 1000, Dst: addrB, DstPort: 80}
	l := b.Lookup(flow)
	if hash := b.toeplitz.HashTuple(flow); l.Hash != hash || l.Bucket != int(hash%dispatch.Buckets) || l.Group != l.Bucket%4 || l.Shard != 1 || l.CPU != b.shards[1].cpu {
		t.Errorf("Lookup of %v = %+v", flow, l)
	}
	table[5] = 0
	if err := b.SetRETA(table); err == nil || !slices.Contains(b.RETA(), 1) || slices.Contains(b.RETA(), 0) {
		t.Errorf("a group in two parts: %v, table %v", err, b.RETA())
	}
	if err := b.SetRETA(table[:7]); err == nil {
		t.Error("a table of 7 entries was taken")
	}
}
