package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// latencyDrain is how long the client waits, after the window, for answers to what was due
// in it. An answer that has not come by then counts with the time it has taken so far.
const latencyDrain = time.Second

// flow is one connection of an open loop. Requests and answers are pieces of one stream of
// bytes, which repeats chargenBytes, so that one can be written and read in any portions.
type flow struct {
	fd       int
	due      []time.Time // when the unanswered requests were to be sent, in order
	unsent   int         // bytes of them that are not written yet
	sentTo   int         // position in the stream
	readTo   int
	complete int // answers that have been taken off due
}

// latency sends requests at the times of a Poisson process of the given rate, whether or not
// earlier ones were answered, and takes each one's latency from the time it was to be sent:
// a server that stalls delays all that was due meanwhile, which a client that waits for its
// answers would leave out (coordinated omission; the same idea as in wrk2). The client never
// sleeps, so its own timers add nothing; what else delays it is in the sample as Late.
func (s clientSpec) latency() (sample, error) {
	if s.Rate <= 0 {
		return sample{}, fmt.Errorf("rate %v: want more than 0 requests/s", s.Rate)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := newPoller()
	if err != nil {
		return sample{}, err
	}
	defer ep.close()
	flows := make([]flow, s.Conns)
	for i := range flows {
		if flows[i].fd, err = ep.dial(s.Server, s.Ports.Echo, i, unix.EPOLLIN); err != nil {
			return sample{}, err
		}
		defer reset(flows[i].fd)
	}

	var (
		size = s.messageSize()
		buf  = make([]byte, 64<<10)
		m    = newMeter(s)
		late = hdrhistogram.New(1, maxLatency.Nanoseconds(), 3)
		// The same arrivals for every peer.
		random = rand.New(rand.NewPCG(1, 2))
		next   = time.Now()
		out    sample
		open   time.Time // requests due before are not counted
	)
	record := func(due, now time.Time) {
		if !open.IsZero() && !due.Before(open) && due.Before(m.end) {
			m.record(now.Sub(due))
		}
	}
	for i := 0; ; {
		now := time.Now()
		over, err := m.tick(now)
		if err != nil {
			return sample{}, err
		}
		if m.running && open.IsZero() {
			open = now
		}
		if over && out.Elapsed == 0 {
			if out, err = m.sample(); err != nil { // its CPU time is that of the window
				return sample{}, err
			}
		}
		for ; !over && !next.After(now); i++ {
			f := &flows[i%len(flows)]
			f.due = append(f.due, next)
			_ = late.RecordValue(min(now.Sub(next), maxLatency).Nanoseconds())
			f.unsent += size
			if err := f.send(); err != nil {
				return sample{}, fmt.Errorf("connection %d: %w", i%len(flows), err)
			}
			next = next.Add(time.Duration(random.ExpFloat64() / s.Rate * float64(time.Second)))
		}
		ready, err := ep.within(0)
		if err != nil {
			return sample{}, err
		}
		for _, event := range ready {
			f := &flows[event.Fd]
			answers, err := f.receive(buf, size)
			if err == nil {
				err = f.send()
			}
			if err != nil {
				return sample{}, fmt.Errorf("connection %d: %w", event.Fd, err)
			}
			now := time.Now()
			for _, due := range f.due[:answers] {
				record(due, now)
			}
			f.due = f.due[answers:]
		}
		if over && (unanswered(flows) == 0 || now.Sub(m.end) > latencyDrain) {
			break
		}
	}
	now := time.Now()
	for i := range flows {
		for _, due := range flows[i].due {
			record(due, now)
		}
	}
	out.Rate = s.Rate
	out.Late = time.Duration(late.ValueAtQuantile(99))
	out.P50 = time.Duration(m.latency.ValueAtQuantile(50))
	out.P99 = time.Duration(m.latency.ValueAtQuantile(99))
	out.Max = time.Duration(m.latency.Max())
	for i, p := range curvePoints {
		out.Curve[i] = time.Duration(m.latency.ValueAtQuantile(p))
	}
	return out, nil
}

func unanswered(flows []flow) (n int) {
	for i := range flows {
		n += len(flows[i].due)
	}
	return n
}

// streamBytes returns bytes of the stream from a position on, as many as are in one piece.
func streamBytes(position int) []byte { return chargenBytes[position%len(chargenBytes):] }

// send writes what is due, as far as the socket takes it.
func (f *flow) send() error {
	for f.unsent > 0 {
		b := streamBytes(f.sentTo)
		n, err := unix.Write(f.fd, b[:min(len(b), f.unsent)])
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil // the next answer makes room
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
		f.unsent -= n
		f.sentTo += n
	}
	return nil
}

// receive reads once and returns how many more answers are complete.
func (f *flow) receive(buf []byte, size int) (answers int, err error) {
	n, err := unix.Read(f.fd, buf)
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("read: %w", err)
	case n == 0:
		return 0, fmt.Errorf("read: the server closed the connection with %d answers missing", len(f.due))
	case f.readTo+n > f.sentTo:
		return 0, fmt.Errorf("read %d bytes more than were sent", f.readTo+n-f.sentTo)
	}
	for got := buf[:n]; len(got) > 0; {
		want := streamBytes(f.readTo)
		k := min(len(got), len(want))
		if !bytes.Equal(got[:k], want[:k]) {
			return 0, fmt.Errorf("the answer is not the request at byte %d of the stream", f.readTo)
		}
		got = got[k:]
		f.readTo += k
	}
	answers = f.readTo/size - f.complete
	f.complete += answers
	return answers, nil
}
