package main

import (
	"container/list"
	"sync"
	"time"
)

const (
	// maxCached is the largest file that is kept in memory, in bytes.
	maxCached = 256 << 10
	// entryCost is what an entry takes beside its body, in bytes: the order of
	// a key, a header and a few maps' and lists' cells.
	entryCost = 1 << 10
	// freshFor is how long an entry is used before the file is looked at again.
	freshFor = time.Second
)

// cacheKey is what an answer to a plain GET depends on.
type cacheKey struct {
	path     string // as it came, without the query
	accepted encodingSet
}

// entry is a file in memory. It is immutable but for checked.
type entry struct {
	header   []field
	etag     string
	modified time.Time
	body     []byte

	checked time.Time // guarded by the cache's mu
}

// field is a line of a header.
type field struct{ key, value []byte }

// cache keeps the files that were asked for last, up to a number of bytes.
// There is one per shard, so its lock is hardly ever waited for.
type cache struct {
	limit int64 // bytes, 0: keeps nothing

	mu      sync.Mutex
	used    int64                      // guarded by mu
	entries map[cacheKey]*list.Element // guarded by mu
	recent  list.List                  // of cached, the last used first; guarded by mu
}

type cached struct {
	key   cacheKey
	entry *entry
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, entries: make(map[cacheKey]*list.Element)}
}

// get returns the entry of a path, nil if there is none, and whether it may be
// used as it is. Of those who find an entry too old one is told, to look at the
// file; it is fresh for the others.
func (c *cache) get(path []byte, accepted encodingSet, now time.Time) (e *entry, fresh bool) {
	if c.limit == 0 {
		return nil, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	element := c.entries[cacheKey{string(path), accepted}]
	if element == nil {
		return nil, false
	}
	c.recent.MoveToFront(element)
	e = element.Value.(cached).entry
	if now.Sub(e.checked) < freshFor {
		return e, true
	}
	e.checked = now
	return e, false
}

// put keeps e, which was read at the time now, in place of what was there.
func (c *cache) put(key cacheKey, e *entry, now time.Time) {
	if e.cost() > c.limit {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e.checked = now
	c.remove(c.entries[key])
	c.entries[key] = c.recent.PushFront(cached{key, e})
	c.used += e.cost()
	for c.used > c.limit {
		c.remove(c.recent.Back())
	}
}

// drop forgets the entry of a file that is no longer there.
func (c *cache) drop(key cacheKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(c.entries[key])
}

func (c *cache) remove(element *list.Element) {
	if element == nil {
		return
	}
	old := c.recent.Remove(element).(cached)
	delete(c.entries, old.key)
	c.used -= old.entry.cost()
}

func (e *entry) cost() int64 { return int64(len(e.body)) + entryCost }
