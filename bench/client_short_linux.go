package main

import (
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// short opens connections, has one request answered on each, and resets them: always
// Conns of them at a time. A latency runs from connect to the whole answer.
func (s clientSpec) short() (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := newPoller()
	if err != nil {
		return sample{}, err
	}
	defer ep.close()

	// A slot holds one connection after the other.
	type slot struct {
		*request
		fd    int
		began time.Time
		asked bool
	}
	slots := make([]slot, s.Conns)
	for i := range slots {
		slots[i].request = newRequest(messageBytes)
	}
	defer func() {
		for i := range slots {
			if slots[i].fd > 0 {
				reset(slots[i].fd)
			}
		}
	}()
	connect := func(i int) error {
		fd, err := connectStart(s.Server, s.Ports.Echo)
		if err != nil {
			slots[i].fd = -1
			return err
		}
		slots[i].fd, slots[i].began, slots[i].asked = fd, time.Now(), false
		// Edge-triggered: one registration tells of the connection and of the answer.
		return ep.add(fd, i, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET)
	}
	for i := range slots {
		if err := connect(i); err != nil {
			return sample{}, err
		}
	}

	m := newMeter(s)
	for seq := uint64(0); ; {
		ready, err := ep.wait()
		if err != nil {
			return sample{}, err
		}
		if over, err := m.tick(time.Now()); err != nil {
			return sample{}, err
		} else if over {
			return m.sample()
		}
		for _, event := range ready {
			i := int(event.Fd)
			c := &slots[i]
			if !c.asked {
				if err := connectFinish(c.fd); err != nil {
					return sample{}, fmt.Errorf("connection number %d: %w", seq, err)
				}
				seq++
				c.asked = true
				if err := c.send(c.fd, uint64(i), seq, c.began); err != nil {
					return sample{}, fmt.Errorf("connection number %d: %w", seq, err)
				}
				continue
			}
			complete, err := c.receive(c.fd)
			if err != nil {
				return sample{}, fmt.Errorf("connection number %d: %w", seq, err)
			}
			if !complete {
				continue // the next edge brings the rest
			}
			m.record(time.Since(c.began))
			reset(c.fd)
			if err := connect(i); err != nil {
				return sample{}, err
			}
		}
	}
}
