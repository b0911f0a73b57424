package shard

import (
	"sync"
	"sync/atomic"
	"time"
)

// deadline is a point in time that may be moved while goroutines wait for it.
// When it comes, and when it is moved into the past, its hint is given. Any
// goroutine may call its methods.
//
// A server moves its deadlines with every request, always further away. The timer
// stays where it is then, and looks when it fires how far that is.
type deadline struct {
	hint  *hint
	isOut atomic.Bool // the time has come

	mu    sync.Mutex
	at    time.Time   // guarded by mu; zero: never
	armed time.Time   // guarded by mu; when the timer fires; zero: it does not
	timer *time.Timer // guarded by mu; made when first needed
}

// set moves the deadline to t; the zero time means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = t
	if t.IsZero() {
		d.isOut.Store(false)
		return
	}
	wait := time.Until(t) //nolint:forbidigo // the application's time, not the turn's
	if wait <= 0 {
		d.pass()
		return
	}
	d.isOut.Store(false)
	if d.armed.IsZero() || t.Before(d.armed) {
		d.arm(wait)
	}
}

// arm makes the timer fire after wait, when the deadline comes.
func (d *deadline) arm(wait time.Duration) {
	d.armed = d.at
	if d.timer == nil {
		d.timer = time.AfterFunc(wait, d.fire)
	} else {
		d.timer.Reset(wait)
	}
}

// fire is the timer's function. The deadline may have been moved since it was
// armed, so it looks at the clock.
func (d *deadline) fire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.armed = time.Time{}
	if d.at.IsZero() {
		return
	}
	if wait := time.Until(d.at); wait > 0 { //nolint:forbidigo // as in set
		d.arm(wait)
	} else {
		d.pass()
	}
}

func (d *deadline) pass() {
	d.isOut.Store(true)
	d.hint.give()
}

// stop ends the timer. The deadline is not used any more.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at, d.armed = time.Time{}, time.Time{}
	if d.timer != nil {
		d.timer.Stop()
	}
}

// passed reports whether the time has come.
func (d *deadline) passed() bool { return d.isOut.Load() }
