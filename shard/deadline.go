package shard

import (
	"sync"
	"sync/atomic"
	"time"
)

// deadline is a point in time that may be moved while goroutines wait for it.
// When it comes, and when it is moved into the past, its hint is given. Any
// goroutine may call its methods.
type deadline struct {
	hint  *hint
	isOut atomic.Bool // the time has come

	mu    sync.Mutex
	at    time.Time   // guarded by mu; zero: never
	timer *time.Timer // guarded by mu; made when first needed
}

// set moves the deadline to t; the zero time means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = t
	if t.IsZero() {
		d.isOut.Store(false)
		if d.timer != nil {
			d.timer.Stop()
		}
		return
	}
	wait := time.Until(t) //nolint:forbidigo // the application's time, not the turn's
	switch {
	case wait <= 0:
		d.pass()
	case d.timer == nil:
		d.isOut.Store(false)
		d.timer = time.AfterFunc(wait, d.fire)
	default:
		d.isOut.Store(false)
		d.timer.Reset(wait)
	}
}

// fire is the timer's function. The deadline may have been moved after it
// began, so it looks at the clock.
func (d *deadline) fire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.at.IsZero() && time.Until(d.at) <= 0 { //nolint:forbidigo // as in set
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
	d.at = time.Time{}
	if d.timer != nil {
		d.timer.Stop()
	}
}

// passed reports whether the time has come.
func (d *deadline) passed() bool { return d.isOut.Load() }
