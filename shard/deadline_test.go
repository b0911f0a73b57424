package shard

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestDeadline(t *testing.T) {
	type move struct{ after, to time.Duration } // to: from then on; never: no deadline
	const never = -time.Hour
	for _, test := range []struct {
		name   string
		moves  []move
		at     time.Duration // when to look
		passed bool
	}{
		{"none", nil, time.Hour, false},
		{"future, early", []move{{0, time.Second}}, 999 * time.Millisecond, false},
		{"future, late", []move{{0, time.Second}}, 1001 * time.Millisecond, true},
		{"past", []move{{0, -time.Second}}, 0, true},
		{"now", []move{{0, 0}}, 0, true},
		{"moved away", []move{{0, time.Second}, {500 * time.Millisecond, time.Second}}, 1400 * time.Millisecond, false},
		{"moved away, late", []move{{0, time.Second}, {500 * time.Millisecond, time.Second}}, 1501 * time.Millisecond, true},
		{"moved away many times", []move{{0, time.Second}, {500 * time.Millisecond, time.Second}, {700 * time.Millisecond, time.Second}}, 2201 * time.Millisecond, true},
		{"removed and set again", []move{{0, time.Second}, {500 * time.Millisecond, never}, {100 * time.Millisecond, time.Second}}, 1599 * time.Millisecond, false},
		{"removed and set again, late", []move{{0, time.Second}, {500 * time.Millisecond, never}, {100 * time.Millisecond, time.Second}}, 1601 * time.Millisecond, true},
		{"moved nearer", []move{{0, time.Hour}, {time.Second, time.Second}}, 3 * time.Second, true},
		{"removed", []move{{0, time.Second}, {500 * time.Millisecond, never}}, time.Hour, false},
		{"removed when it had passed", []move{{0, -time.Second}, {0, never}}, time.Second, false},
		{"set again when it had passed", []move{{0, time.Second}, {2 * time.Second, time.Second}}, 2500 * time.Millisecond, false},
		{"passed twice", []move{{0, time.Second}, {2 * time.Second, time.Second}}, 4 * time.Second, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHint()
				d := deadline{hint: &h}
				start := time.Now()
				for _, m := range test.moves {
					time.Sleep(m.after)
					if m.to == never {
						d.set(time.Time{})
					} else {
						d.set(time.Now().Add(m.to))
					}
				}
				time.Sleep(test.at - time.Since(start))
				synctest.Wait()
				if d.passed() != test.passed {
					t.Errorf("after %v, passed is %v", test.at, d.passed())
				}
				d.stop()
			})
		})
	}
}

// A timer that fires although its deadline was moved changes nothing.
func TestDeadlineStale(t *testing.T) {
	h := newHint()
	d := deadline{hint: &h}
	for _, to := range []time.Time{{}, time.Now().Add(time.Hour)} {
		d.set(to)
		d.fire()
		if d.passed() {
			t.Errorf("a stale timer passed the deadline %v", to)
		}
	}
	d.stop()
}

// A goroutine that waits is told when the deadline comes, and when it is moved
// into the past.
func TestDeadlineWakes(t *testing.T) {
	for name, move := range map[string]func(d *deadline){
		"comes": func(d *deadline) { d.set(time.Now().Add(time.Minute)) },
		"moved": func(d *deadline) { d.set(time.Now().Add(time.Hour)); d.set(time.Unix(1, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHint()
				d := deadline{hint: &h}
				woken := make(chan bool)
				go func() {
					h.expect()
					for !d.passed() {
						h.wait()
						h.expect()
					}
					woken <- true
				}()
				synctest.Wait()
				move(&d)
				<-woken // the bubble deadlocks, and fails, if nobody wakes it
			})
		})
	}
}
