package shard

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// TestMemoryOnItsNode: all pages of the receive buffers are on the shard's node
// while large frames pass through them. With one node that is no surprise, but
// the kernel is asked, and the buffers are bound, as with several.
func TestMemoryOnItsNode(t *testing.T) {
	a, b := startPair(t, func(cfg *Config) {
		cpu, _ := cfg.Topology.CPU(cfg.CPUs[0])
		cfg.MemoryNodes = []int{cfg.Topology.MemoryNode(cpu.Node)}
	})
	if err := errors.Join(a.FirstTouch(), b.FirstTouch()); err != nil {
		t.Skip(err)
	}
	client, server := netPair(t, a, b)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
	inBackground(t, func() {
		_, _ = client.Write(sent)
		_ = client.Close()
	}, client)
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("received %d of %d bytes, %v", len(got), len(sent), err)
	}
	pages, err := b.VerifyMemory()
	if err != nil {
		t.Fatal(err)
	}
	c := b.Stats()[0]
	if p := pages[0]; p.Node != c.MemoryNode || p.Elsewhere != 0 || p.Absent != 0 || uint64(p.OnNode)*pageSize != c.BytesBound {
		t.Errorf("pages %+v with %d bytes bound to node %d: want all of them there", p, c.BytesBound, c.MemoryNode)
	}
	if want := (c.Buffers + 1) * rxBufferLen; c.BytesBound != want || c.BindFallbacks != 0 { // and the spare
		t.Errorf("%d bytes bound, %d fallbacks with %d buffers; want %d, 0", c.BytesBound, c.BindFallbacks, c.Buffers, want)
	}
	b.Close()
	if stats := b.shards[0].arena.Stats(); stats.BoundBytes != 0 {
		t.Errorf("%d bytes still bound after Close: their policy would outlive them", stats.BoundBytes)
	}
}
