package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// limits are the times a test may take where the peer decides how long. Both ends use them.
type limits struct {
	handshake time.Duration // one step of the control protocol
	grace     time.Duration // the client's TEST_END, after the test's own length
	stall     time.Duration // a test of a given amount without any progress
}

var defaultLimits = limits{handshake: 10 * time.Second, grace: 10 * time.Second, stall: time.Minute}

// How long a server waits for what is still on its way when a test of a given amount ends: until something came and then
// nothing for settleNaps of a millisecond, at most settleMost. They are counted, as the time by the clock may be one in
// which nothing ran on this machine. A test of a given time does not wait: what arrives late does not count, as with the original.
const (
	settleNaps = 50
	settleMost = time.Second
)

// run is the part of a test in which blocks move. One goroutine, the test's, calls its methods.
type run struct {
	p        *params
	client   bool
	streams  []*stream
	interval time.Duration // between reports, 0: none
	limits   limits
	report   reporter

	sent, received *quota
	stop           chan struct{} // closed by halt
	halting        sync.Once
	senders        sync.WaitGroup
	receivers      sync.WaitGroup
	failed         chan error // room for every stream

	start    time.Time // of the test, omitted seconds included
	begin    time.Time // of the part that counts
	mark     time.Time // of the current interval
	omitting bool
	closed   bool
	printed  bool          // an interval of the part that counts was reported
	end      time.Duration // length of the part that counts, set at its end
	final    []counters    // of each stream over the part that counts, set with end

	user, system time.Duration // CPU time of the process at start; then used until end
}

// watched is what ended the moving of blocks.
type watched struct {
	state state // from the control connection
	err   error
}

// newRun prepares the streams' counters. Streams are started with go.
func newRun(p *params, client bool, interval time.Duration, l limits, report reporter) *run {
	return &run{
		p: p, client: client, interval: interval, limits: l, report: report,
		sent: newQuota(), received: newQuota(), stop: make(chan struct{}),
		failed: make(chan error, 2*maxStreams),
	}
}

// begins starts the clock and every stream's goroutine.
func (r *run) begins() {
	r.start = time.Now()
	r.begin, r.mark = r.start, r.start
	r.omitting = r.p.Omit > 0
	r.user, r.system = cpuTimes()
	if !r.omitting {
		r.limitAmount()
	}
	for _, s := range r.streams {
		s.restart()
		if s.sends {
			pace := pacer{bitsPerSecond: float64(r.p.Bandwidth), burst: int64(r.p.Burst)}
			r.senders.Go(func() { r.ended(s.send(r.stop, r.sent, pace)) })
		} else if reader, ok := s.wire.(io.Reader); ok {
			r.receivers.Go(func() { r.ended(s.receive(reader, r.stop, r.received)) })
		}
	}
}

func (r *run) ended(err error) {
	if err != nil {
		r.failed <- err
	}
}

// limitAmount makes the amount count from now on. Only the client ends a test, so the server has no limit.
func (r *run) limitAmount() {
	if r.client {
		r.sent.limit(r.p.amount())
		r.received.limit(r.p.amount())
	}
}

// watch reports intervals until the test's time or amount is over (client: a watched without error), the control
// connection says something, or something fails.
func (r *run) watch(ctx context.Context, control <-chan watched) watched {
	var tick, omitEnd, timeUp <-chan time.Time
	var ticker *time.Ticker
	if r.interval > 0 {
		ticker = time.NewTicker(r.interval)
		defer ticker.Stop()
		tick = ticker.C
	}
	omit := time.Duration(r.p.Omit) * time.Second
	if r.omitting {
		omitEnd = time.After(omit)
	}
	if r.p.amount() == 0 && r.p.Time > 0 {
		length := omit + time.Duration(r.p.Time)*time.Second
		if !r.client {
			length += r.limits.grace
		}
		timeUp = time.After(length)
	}
	stall := time.NewTicker(r.limits.stall)
	defer stall.Stop()
	moved := int64(-1)

	for {
		select {
		case <-ctx.Done():
			return watched{err: context.Cause(ctx)}
		case w := <-control:
			return w
		case err := <-r.failed:
			return r.explain(err, control)
		case <-tick:
			r.reportInterval(time.Now())
		case <-omitEnd:
			r.restart()
			if ticker != nil {
				ticker.Reset(r.interval)
			}
		case <-timeUp:
			if r.client {
				return watched{}
			}
			return watched{err: fmt.Errorf("the client did not end the test within %v after its %d s", r.limits.grace, r.p.Time+r.p.Omit)}
		case <-r.received.spent:
			return watched{}
		case <-r.sent.spent:
			return r.finish(ctx, control)
		case <-stall.C:
			now := r.total()
			if now == moved {
				return watched{err: fmt.Errorf("nothing moved on any stream for %v", r.limits.stall)}
			}
			moved = now
		}
	}
}

// finish waits until the blocks that used up the amount are written.
func (r *run) finish(ctx context.Context, control <-chan watched) watched {
	written := make(chan struct{})
	go func() {
		r.senders.Wait()
		close(written)
	}()
	select {
	case <-written:
		return watched{}
	case <-ctx.Done():
		return watched{err: context.Cause(ctx)}
	case w := <-control:
		return w
	case err := <-r.failed:
		return r.explain(err, control)
	case <-time.After(r.limits.stall):
		return watched{err: fmt.Errorf("last blocks not taken by the peer within %v", r.limits.stall)}
	}
}

// explain prefers the control connection's word over a stream's error: a peer that ends a test may close its streams
// before its last message has arrived.
func (r *run) explain(err error, control <-chan watched) watched {
	select {
	case w := <-control:
		if w.err == nil {
			return w
		}
	case <-time.After(min(r.limits.grace, 500*time.Millisecond)):
	}
	return watched{err: err}
}

// restart ends the omitted seconds.
func (r *run) restart() {
	now := time.Now()
	r.reportRest(now)
	for _, s := range r.streams {
		s.restart()
	}
	r.begin, r.mark, r.omitting, r.printed = now, now, false, false
	r.limitAmount()
}

func (r *run) total() int64 {
	sum := int64(0)
	for _, s := range r.streams {
		sum += s.bytes.Load()
	}
	return sum
}

// reportInterval reports what happened since the last one.
func (r *run) reportInterval(now time.Time) {
	samples := make([]sample, len(r.streams))
	for i, s := range r.streams {
		c := s.read()
		samples[i] = sample{
			stream: s, from: r.mark.Sub(r.begin), to: now.Sub(r.begin),
			counters: c.since(s.last), omitted: r.omitting,
		}
		s.last = c
	}
	r.mark, r.printed = now, true
	r.report.interval(samples)
}

// reportRest reports the last, shorter interval, unless it is too short to say anything.
func (r *run) reportRest(now time.Time) {
	if r.interval > 0 && (!r.printed || now.Sub(r.mark) >= r.interval/10) {
		r.reportInterval(now)
	}
}

// halt ends the test for our streams: senders stop, a blocked Write included, and received blocks no longer count.
func (r *run) halt() {
	r.halting.Do(func() {
		now := time.Now()
		close(r.stop)
		if r.start.IsZero() {
			return // the test ended before blocks moved
		}
		for _, s := range r.streams {
			if s.sends {
				// A socket without deadlines would be closed soon after anyway.
				_ = s.wire.SetWriteDeadline(now)
			}
		}
		r.senders.Wait()
		if !r.client && r.p.amount() > 0 {
			now = r.settle(now)
		}
		for _, s := range r.streams {
			s.counting.Store(false)
		}
		if r.omitting { // over before anything counted: then everything does
			r.omitting = false
		}
		r.reportRest(now)
		r.end = now.Sub(r.begin)
		for _, s := range r.streams {
			r.final = append(r.final, s.read().since(s.begin))
		}
		user, system := cpuTimes()
		r.user, r.system = user-r.user, system-r.system
	})
}

// settle waits for what is on its way and returns when the last of it came.
func (r *run) settle(now time.Time) time.Time {
	last, most := now, now.Add(settleMost)
	moved := r.total()
	for naps := 0; (moved == 0 || naps < settleNaps) && time.Now().Before(most); naps++ {
		time.Sleep(time.Millisecond)
		if total := r.total(); total != moved {
			moved, last, naps = total, time.Now(), 0
		}
	}
	return last
}

// close halts, closes the streams and waits for their goroutines. Closing again does nothing.
func (r *run) close() {
	r.halt()
	if r.closed {
		return
	}
	r.closed = true
	for _, s := range r.streams {
		if conn, ok := s.wire.(net.Conn); ok {
			_ = conn.SetReadDeadline(time.Now())
		}
		_ = s.wire.Close()
	}
	r.receivers.Wait()
}

// results is our view of the finished test, for the peer. Only after halt.
func (r *run) results() *results {
	res := &results{SenderHasRetransmits: -1}
	res.CPUTotal, res.CPUUser, res.CPUSystem = r.cpu()
	for i, s := range r.streams {
		c := r.final[i]
		if s.sends && res.SenderHasRetransmits < 1 {
			res.SenderHasRetransmits = 0
			if c.retransmits >= 0 {
				res.SenderHasRetransmits = 1
			}
		}
		omittedLost, omittedPackets := number(s.begin.lost), number(s.begin.packets)
		res.Streams = append(res.Streams, streamResult{
			ID: s.id, Bytes: number(c.bytes), Retransmits: number(c.retransmits), Jitter: c.jitter,
			Errors: number(c.lost) + omittedLost, OmittedErrors: &omittedLost,
			Packets: number(c.packets) + omittedPackets, OmittedPackets: &omittedPackets,
			EndTime: r.end.Seconds(),
		})
	}
	return res
}

// cpu returns the process's CPU time in percent of one CPU, over the whole run.
func (r *run) cpu() (total, user, system float64) {
	elapsed := r.begin.Sub(r.start) + r.end
	if elapsed <= 0 {
		return 0, 0, 0
	}
	user = 100 * float64(r.user) / float64(elapsed)
	system = 100 * float64(r.system) / float64(elapsed)
	return user + system, user, system
}

// summary joins our figures with the peer's. theirs may be nil: then only our side is known.
func (r *run) summary(theirs *results) (*summary, error) {
	sum := &summary{p: r.p, theirs: theirs}
	sum.cpu[0], sum.cpu[1], sum.cpu[2] = r.cpu()
	for i, s := range r.streams {
		t := total{stream: s, local: sample{stream: s, to: r.end, counters: r.final[i]}}
		if theirs != nil {
			remote, err := t.remote(theirs)
			if err != nil {
				return nil, err
			}
			t.peer = &remote
		}
		sum.totals = append(sum.totals, t)
	}
	return sum, nil
}

// remote finds the peer's figures of the same stream.
func (t *total) remote(theirs *results) (sample, error) {
	for _, s := range theirs.Streams {
		if s.ID != t.stream.id {
			continue
		}
		// A peer that does not say what it omitted counts from the first datagram; what we omitted is the best guess.
		omittedLost, omittedPackets := int64(0), t.stream.begin.packets
		if s.OmittedErrors != nil && s.OmittedPackets != nil {
			omittedLost, omittedPackets = int64(*s.OmittedErrors), int64(*s.OmittedPackets)
		}
		return sample{
			stream: t.stream, from: seconds(s.StartTime), to: seconds(s.EndTime),
			counters: counters{
				bytes: int64(s.Bytes), packets: int64(s.Packets) - omittedPackets, lost: int64(s.Errors) - omittedLost,
				jitter: s.Jitter, retransmits: int64(s.Retransmits),
			},
		}, nil
	}
	return sample{}, fmt.Errorf("the peer's results have no stream %d", t.stream.id)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// awaitState reads one state in the background while blocks move; the channel has room, so nothing leaks when nobody
// listens. The goroutine ends with the control connection at the latest.
func awaitState(c *control) <-chan watched {
	heard := make(chan watched, 1)
	patient := &control{Conn: c.Conn}
	go func() {
		s, err := patient.readState()
		if errors.Is(err, io.EOF) {
			err = errors.New("the control connection was closed by the peer")
		}
		heard <- watched{state: s, err: err}
	}()
	return heard
}
