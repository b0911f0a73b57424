package main

import "time"

// pacer holds a stream to a bit rate, on average since its start: a sender that was held up catches up.
// Owned by the stream's sending goroutine.
type pacer struct {
	bitsPerSecond float64 // 0: no pacing
	burst         int64   // blocks that go together, at least 1

	start  time.Time
	blocks int64
	bytes  int64
}

// wait returns how long to wait before the next block, 0 when it is due.
func (p *pacer) wait(now time.Time) time.Duration {
	if p.bitsPerSecond == 0 || p.blocks%max(p.burst, 1) != 0 {
		return 0
	}
	due := p.start.Add(time.Duration(float64(p.bytes) * 8 / p.bitsPerSecond * float64(time.Second)))
	return max(due.Sub(now), 0)
}

// sent notes one block of n bytes.
func (p *pacer) sent(n int) {
	p.blocks++
	p.bytes += int64(n)
}
