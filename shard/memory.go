package shard

import (
	"errors"
	"fmt"
)

// MemoryPages says where the pages of a shard's receive buffers are.
type MemoryPages struct {
	Shard     int `json:"shard"`
	Node      int `json:"node"` // that they belong to; -1: there is nothing to choose
	OnNode    int `json:"on_node"`
	Elsewhere int `json:"elsewhere"`
	Absent    int `json:"absent"`
}

// VerifyMemory asks the kernel where the receive buffers of each shard are
// (move_pages(2)). The shards wait meanwhile.
func (set *Set) VerifyMemory() ([]MemoryPages, error) {
	all := make([]MemoryPages, len(set.shards))
	var errs error
	for i, s := range set.shards {
		m := &all[i]
		m.Shard = i
		if !s.do(func(s *Shard) {
			var err error
			m.Node = s.arena.Node()
			if m.OnNode, m.Elsewhere, m.Absent, err = s.arena.Verify(); err != nil {
				errs = errors.Join(errs, fmt.Errorf("shard %d: %w", i, err))
			}
		}) {
			return nil, ErrClosed
		}
	}
	return all, errs
}

// FirstTouch returns why buffers are not bound although there are nodes to
// choose from: the process lacks the right. It is nil otherwise.
func (set *Set) FirstTouch() (err error) {
	for _, s := range set.shards {
		s.do(func(s *Shard) { err = errors.Join(err, s.arena.FirstTouch()) })
		if err != nil {
			return err
		}
	}
	return nil
}
