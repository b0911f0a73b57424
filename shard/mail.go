package shard

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// task is something that another goroutine wants done on a shard's thread.
type task interface{ run(s *Shard) }

type taskFunc func(s *Shard)

func (f taskFunc) run(s *Shard) { f(s) }

// mailbox carries tasks to a shard's thread. What grows it is bounded by its
// senders: a connection or socket posts itself once until it was run, and
// control-plane calls wait for their answer.
type mailbox struct {
	pending atomic.Bool // written under mu, read by the shard without it
	mu      sync.Mutex
	tasks   []task // guarded by mu
	closed  bool   // guarded by mu

	spare []task // owned by the shard's thread
}

// post queues t and returns false when the shard has ended.
func (s *Shard) post(t task) bool {
	m := &s.mail
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return false
	}
	m.tasks = append(m.tasks, t)
	m.pending.Store(true)
	m.mu.Unlock()
	s.wake()
	return true
}

// do runs f on the shard's thread and waits for it. It returns false, and f
// does not run, when the shard has ended.
func (s *Shard) do(f func(s *Shard)) bool {
	done := make(chan struct{})
	if !s.post(taskFunc(func(s *Shard) { f(s); close(done) })) {
		return false
	}
	<-done
	return true
}

// read runs the tasks that have arrived. Called by the shard's thread.
func (m *mailbox) read(s *Shard) (worked bool) {
	if !m.pending.Load() {
		return false
	}
	m.mu.Lock()
	tasks := m.tasks
	m.tasks = m.spare[:0]
	m.pending.Store(false)
	m.mu.Unlock()
	for _, t := range tasks {
		t.run(s)
	}
	clear(tasks)
	m.spare = tasks
	return true
}

// close refuses further tasks and runs the ones that made it.
func (m *mailbox) close(s *Shard) {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.read(s)
}

// wake ends the shard's wait. A shard that is not waiting sees the task in its
// next turn, so a busy shard costs its callers no system call.
func (s *Shard) wake() {
	if s.parked.Load() && s.parked.CompareAndSwap(true, false) {
		one := [8]byte{1}
		_, _ = unix.Write(s.eventFD, one[:]) // cannot fail: the counter is read before each wait
	}
}
