package shard

import (
	"math"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// clock is the time of one flow group and the timers its netstack has armed.
// The shard reads the kernel's clock once per turn; within the turn time only
// moves by a nanosecond per question. It must not stand still: gVisor's RACK
// takes the segments that were sent in the same instant as an acknowledged one
// for lost, and sends them again (tcp/rack.go, detectLoss; RFC 8985 section 6.2
// breaks the tie by sequence number).
//
// Owned by the thread that owns the group.
type clock struct {
	start    time.Time // wall clock at now == 0
	now      *int64    // the owning shard's time, nanoseconds since start
	earliest *int64    // the owning shard's next deadline; lowered here
	timers   []*timer  // binary heap, earliest first
	atOnce   []*timer  // of those, armed without a delay since the last step
}

var _ tcpip.Clock = (*clock)(nil)

// Now implements tcpip.Clock.
func (c *clock) Now() time.Time { return c.start.Add(time.Duration(*c.now)) }

// NowMonotonic implements tcpip.Clock.
func (c *clock) NowMonotonic() tcpip.MonotonicTime {
	*c.now++
	return tcpip.MonotonicTime{}.Add(time.Duration(*c.now))
}

// AfterFunc implements tcpip.Clock. f runs on the owning thread, in the timer
// step of a turn.
func (c *clock) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	t := &timer{c: c, f: f, index: -1}
	t.Reset(d)
	if d <= 0 {
		c.atOnce = append(c.atOnce, t)
	}
	return t
}

// fireAtOnce runs the functions that were to be called without a delay. gVisor has
// no other word for work that it leaves to another goroutine, such as sending what
// waited for a neighbor that has just answered.
func (c *clock) fireAtOnce() {
	for i, t := range c.atOnce {
		c.atOnce[i] = nil
		if t.Stop() {
			t.f()
		}
	}
	c.atOnce = c.atOnce[:0]
}

// never is a deadline that does not come.
const never = math.MaxInt64

// next returns the deadline of the earliest timer.
func (c *clock) next() int64 {
	if len(c.timers) == 0 {
		return never
	}
	return c.timers[0].when
}

// fire runs the timers that are due and returns how many there were. A timer
// armed by one of them is due in a later turn at the earliest, so the number
// is bounded by what was armed before.
func (c *clock) fire() (fired int) {
	clear(c.atOnce)
	c.atOnce = c.atOnce[:0]
	// now moves when it is asked for.
	for now := *c.now; len(c.timers) > 0 && c.timers[0].when <= now; {
		t := c.timers[0]
		c.remove(0)
		t.f()
		fired++
	}
	return fired
}

// timer implements tcpip.Timer.
type timer struct {
	c     *clock
	f     func()
	when  int64 // nanoseconds, in the clock's time
	index int   // position in the heap, -1 when not armed
}

// Stop implements tcpip.Timer.
func (t *timer) Stop() bool {
	if t.index < 0 {
		return false
	}
	t.c.remove(t.index)
	return true
}

// Reset implements tcpip.Timer.
func (t *timer) Reset(d time.Duration) {
	// At least one nanosecond: a timer never fires in the step that arms it.
	t.when = *t.c.now + max(int64(d), 1)
	if t.index < 0 {
		t.index = len(t.c.timers)
		t.c.timers = append(t.c.timers, t)
	}
	t.c.fix(t.index)
	*t.c.earliest = min(*t.c.earliest, t.when)
}

func (c *clock) remove(i int) {
	last := len(c.timers) - 1
	c.timers[i].index = -1
	if i != last {
		c.timers[i] = c.timers[last]
		c.timers[i].index = i
	}
	c.timers[last] = nil
	c.timers = c.timers[:last]
	if i != last {
		c.fix(i)
	}
}

// fix restores the heap order around position i. It is container/heap's
// algorithm without the interface calls: a busy group re-arms timers for
// every segment.
func (c *clock) fix(i int) {
	h := c.timers
	for i > 0 {
		parent := (i - 1) / 2
		if h[parent].when <= h[i].when {
			break
		}
		c.swap(i, parent)
		i = parent
	}
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if child+1 < len(h) && h[child+1].when < h[child].when {
			child++
		}
		if h[i].when <= h[child].when {
			return
		}
		c.swap(i, child)
		i = child
	}
}

func (c *clock) swap(i, j int) {
	c.timers[i], c.timers[j] = c.timers[j], c.timers[i]
	c.timers[i].index, c.timers[j].index = i, j
}
