package shard

import (
	"sync"
	"time"
)

// deadline is a point in time that goroutines can wait for and that may be
// moved while they do.
type deadline struct {
	mu      sync.Mutex
	timer   *time.Timer
	expired chan struct{} // closed when the time has come
}

func newDeadline() deadline { return deadline{expired: make(chan struct{})} }

// set moves the deadline to t; the zero time means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.expired // its function has begun: let it end
	}
	d.timer = nil

	isExpired := false
	select {
	case <-d.expired:
		isExpired = true
	default:
	}
	if t.IsZero() {
		if isExpired {
			d.expired = make(chan struct{})
		}
		return
	}
	if wait := time.Until(t); wait > 0 { //nolint:forbidigo // the application's time, not the turn's
		if isExpired {
			d.expired = make(chan struct{})
		}
		expired := d.expired
		d.timer = time.AfterFunc(wait, func() { close(expired) })
		return
	}
	if !isExpired {
		close(d.expired)
	}
}

// wait returns a channel that is closed when the deadline has passed.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.expired
}

// passed reports whether the deadline has passed.
func (d *deadline) passed() bool {
	select {
	case <-d.wait():
		return true
	default:
		return false
	}
}
