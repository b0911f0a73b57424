package shard

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestModeration: a shard looks for work for as long as it may when work comes that
// soon, and not at all when it does not.
func TestModeration(t *testing.T) {
	const limit = 50 * time.Microsecond
	for _, test := range []struct {
		name     string
		limit    time.Duration
		gap      func(rng *rand.Rand) time.Duration // without work, before the next
		min, max float64                            // part of the idle time that it looks for work
	}{
		{"far apart", limit, func(*rand.Rand) time.Duration { return time.Millisecond }, 0, 0.001},
		{"just too far", limit, func(*rand.Rand) time.Duration { return limit + time.Duration(wakeTime) + 1 }, 0, 0.001},
		{"near", limit, func(*rand.Rand) time.Duration { return limit - time.Microsecond }, 0.99, 1},
		{"never", 0, func(*rand.Rand) time.Duration { return time.Microsecond }, 0, 0},
		{"at random, rarely", limit, func(rng *rand.Rand) time.Duration { return time.Duration(rng.ExpFloat64() * float64(10*limit)) }, 0, 0.03},
		{"at random, often", limit, func(rng *rand.Rand) time.Duration { return time.Duration(rng.ExpFloat64() * float64(limit/10)) }, 0.9, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 2))
			m := newModeration(test.limit)
			var idle, spun time.Duration
			for i := range 20_000 {
				gap := test.gap(rng)
				look := min(gap, time.Duration(m.now))
				if int64(gap) > m.now { // it waits
					m.waited(int64(gap))
				}
				if i >= 10 { // it has learnt
					idle += gap
					spun += look
				}
				if m.now < 0 || m.now > int64(test.limit) {
					t.Fatalf("looks for %d ns, want at most %v", m.now, test.limit)
				}
			}
			if part := float64(spun) / float64(idle); part < test.min || part > test.max {
				t.Errorf("looks for work in %.3f of its idle time, want %.3f to %.3f", part, test.min, test.max)
			}
		})
	}
}
