package shard

import "time"

// moderation decides how long a shard without work looks for more before it blocks.
// To block and wake up again costs both ends of a connection some 20 µs here; to look
// costs the CPU for as long as nothing comes. So the shard looks for longer when the
// work that ended its last waits would have been found that way, and for less when it
// would not, as Linux does for the idle CPUs of virtual machines (governors/haltpoll.c).
//
// Owned by the shard's thread.
type moderation struct {
	limit int64 // nanoseconds; 0: never looks
	now   int64 // the same, for the next time
}

const (
	// leastSpin is below which to look is not worth the while, in nanoseconds.
	leastSpin = int64(5 * time.Microsecond)

	// wakeTime is how long it may take, in nanoseconds, from the work that ends a
	// wait to the end of the wait: in virtual machines, 25 µs are usual.
	wakeTime = int64(30 * time.Microsecond)
)

func newModeration(limit time.Duration) moderation {
	return moderation{limit: int64(limit), now: int64(limit)}
}

// waited learns from a wait, which ended idle nanoseconds after the last work.
func (m *moderation) waited(idle int64) {
	switch {
	case m.now < m.limit && idle <= m.limit+wakeTime: // one that has looked for the whole time knows better
		m.now = min(m.limit, max(2*m.now, leastSpin))
	case m.now > leastSpin:
		m.now /= 2
	default:
		m.now = 0
	}
}
