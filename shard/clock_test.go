package shard

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestClockFiresInOrder(t *testing.T) {
	now, earliest := int64(0), int64(never)
	c := &clock{now: &now, earliest: &earliest}
	type due struct {
		id   int
		when int64
	}
	var fired, want []due
	rng := rand.New(rand.NewPCG(1, 2))
	for id := range 500 {
		when := int64(rng.IntN(1000) + 1)
		timer := c.AfterFunc(time.Duration(when), func() { fired = append(fired, due{id, when}) })
		switch rng.IntN(4) {
		case 0: // stopped: never fires
			if !timer.Stop() {
				t.Fatal("Stop of an armed timer returned false")
			}
			if timer.Stop() {
				t.Fatal("second Stop returned true")
			}
		case 1: // moved
			when = int64(rng.IntN(1000) + 1)
			timer.Reset(time.Duration(when))
			want = append(want, due{id, when})
		default:
			want = append(want, due{id, when})
		}
	}
	slices.SortStableFunc(want, func(a, b due) int { return int(a.when - b.when) })
	for now = 0; now <= 1010; now += 7 {
		if next := c.next(); earliest > next {
			t.Fatalf("at %d the shard would sleep until %d although a timer is due at %d", now, earliest, next)
		}
		c.fire()
		for _, f := range fired {
			if f.when > now {
				t.Fatalf("timer for %d fired at %d", f.when, now)
			}
		}
		if next := c.next(); next <= now {
			t.Fatalf("timer for %d did not fire at %d", next, now)
		}
	}
	slices.SortStableFunc(fired, func(a, b due) int { return a.id - b.id })
	slices.SortStableFunc(want, func(a, b due) int { return a.id - b.id })
	if !slices.Equal(fired, want) {
		t.Fatalf("fired %d timers, want %d, or others", len(fired), len(want))
	}
}

// A timer that re-arms itself must not keep the turn busy.
func TestClockRearmEndsTheStep(t *testing.T) {
	now, earliest := int64(10), int64(never)
	c := &clock{now: &now, earliest: &earliest}
	n := 0
	var rearm func()
	rearm = func() { n++; c.AfterFunc(-time.Second, rearm) }
	c.AfterFunc(0, rearm)
	now++
	if c.fire(); n != 1 {
		t.Fatalf("fired %d times in one step, want 1", n)
	}
}

// Segments that are sent in one turn have to differ in time; see clock.
func TestTimeMovesWithinATurn(t *testing.T) {
	now, earliest := int64(10), int64(never)
	c := &clock{now: &now, earliest: &earliest}
	first, second := c.NowMonotonic(), c.NowMonotonic()
	if !first.Before(second) {
		t.Errorf("two questions for the time were answered with %v and %v, want a later one", first, second)
	}
}
