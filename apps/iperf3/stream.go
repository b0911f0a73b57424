package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"numastack/stack"
)

// epoch is where the time stamps in our datagrams count from.
var epoch = time.Now()

// wire is what a stream sends its blocks on: a connection, or one peer of a shared datagram socket.
type wire interface {
	io.Writer
	SetWriteDeadline(time.Time) error
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	Close() error
}

// blockWriter is a wire that sends without a copy.
type blockWriter interface {
	WriteBlock(*stack.Block) (int, error)
}

// stream is one flow of blocks in one direction.
type stream struct {
	// Immutable after newStream.
	id     int // in the exchanged results
	tag    int // in printed lines; the original prints its socket number there
	sends  bool
	udp    bool
	zero   bool // send without a copy, if the wire can
	wide   bool // 64-bit packet numbers
	length int  // bytes per block
	wire   wire

	bytes    atomic.Int64 // counted while the test runs; the stream's goroutine writes, the test's reads
	counting atomic.Bool  // false: received blocks are read and forgotten; the test's goroutine writes

	mu       sync.Mutex // guards arrivals: one writer per datagram, read once per interval
	arrivals arrivals
	packets  atomic.Int64 // datagrams sent, numbered from 1

	// Owned by the test's goroutine.
	begin counters // when the part that counts began: 0, or the end of the omitted seconds
	last  counters // at the end of the last interval
}

// newStream prepares stream index of a test; its goroutine is not started yet.
func newStream(p *params, index int, sends bool, w wire) *stream {
	s := &stream{
		id: streamID(index), tag: 5 + 2*index, sends: sends, udp: p.UDP, zero: p.ZeroCopy == 1,
		wide: p.Counters64 != 0, length: int(p.Len), wire: w,
	}
	s.counting.Store(true)
	return s
}

// counters is the state of a stream at one moment.
type counters struct {
	bytes       int64
	packets     int64 // datagrams sent, or the highest number received
	lost        int64
	outOfOrder  int64
	jitter      float64 // seconds
	retransmits int64   // -1: unknown
	window      int64   // congestion window in bytes, 0: unknown
}

// read takes a snapshot. Only the test's goroutine calls it.
func (s *stream) read() counters {
	c := counters{bytes: s.bytes.Load(), retransmits: -1}
	switch {
	case s.udp && s.sends:
		c.packets = s.packets.Load()
	case s.udp:
		s.mu.Lock()
		a := s.arrivals
		s.mu.Unlock()
		c.packets, c.lost, c.outOfOrder, c.jitter = a.packets, a.lost, a.outOfOrder, a.jitter
	case s.sends:
		if retransmits, window, ok := senderState(s.wire); ok {
			c.retransmits, c.window = retransmits, window
		}
	}
	return c
}

// since returns what happened after earlier; levels (jitter, window) are c's.
func (c counters) since(earlier counters) counters {
	c.bytes -= earlier.bytes
	c.packets -= earlier.packets
	c.lost -= earlier.lost
	c.outOfOrder -= earlier.outOfOrder
	if c.retransmits >= 0 && earlier.retransmits > 0 {
		c.retransmits -= earlier.retransmits
	}
	return c
}

// restart begins the part of the test that counts.
func (s *stream) restart() {
	s.mu.Lock()
	s.arrivals.jitter = 0
	s.mu.Unlock()
	s.begin = s.read()
	s.last = s.begin
}

// send writes blocks until the test stops or its amount is used up. It is the stream's goroutine.
func (s *stream) send(stop <-chan struct{}, amount *quota, pace pacer) error {
	block := make([]byte, s.length)
	_, _ = rand.Read(block) // random, so that nothing on the way can compress it
	write := func() (int, error) { return s.wire.Write(block) }
	if w, can := s.wire.(blockWriter); can && s.zero {
		shared := stack.NewBlock(block)
		write = func() (int, error) { return w.WriteBlock(shared) }
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	pace.start = time.Now()
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		var now time.Time
		if s.udp || pace.bitsPerSecond > 0 {
			now = time.Now()
		}
		if d := pace.wait(now); d > 0 {
			timer.Reset(d)
			select {
			case <-stop:
				return nil
			case <-timer.C:
			}
			now = time.Now()
		}
		if !amount.take(s.length) {
			return nil
		}
		if s.udp {
			putHeader(block, now.Sub(epoch), uint64(s.packets.Load()+1), s.wide)
		}
		n, err := write()
		if s.udp && errors.Is(err, syscall.ENOBUFS) {
			// The device's queue is full: the datagram is lost before it left, and the queue needs a moment.
			time.Sleep(100 * time.Microsecond)
			err = nil
		}
		s.bytes.Add(int64(n))
		pace.sent(n)
		if err != nil {
			if stopped(stop) {
				return nil
			}
			return fmt.Errorf("send on stream %d: %w", s.tag, err)
		}
		if s.udp {
			s.packets.Add(1)
		}
	}
}

// receive reads blocks until the peer closes, the test's goroutine sets a deadline in the past, or an error. It is the
// stream's goroutine.
func (s *stream) receive(r io.Reader, stop <-chan struct{}, amount *quota) error {
	block := make([]byte, s.length)
	for {
		n, err := r.Read(block)
		if s.udp && err == nil {
			s.arrived(block[:n], time.Now(), amount)
			continue
		}
		if n > 0 && s.counting.Load() {
			s.bytes.Add(int64(n))
			amount.take(n)
		}
		if err != nil {
			// EOF without TEST_END is for the control connection to explain.
			if stopped(stop) || err == io.EOF || errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			}
			return fmt.Errorf("receive on stream %d: %w", s.tag, err)
		}
	}
}

// arrived counts one received datagram. Called by one goroutine per stream: its own, or the shared socket's.
func (s *stream) arrived(datagram []byte, now time.Time, amount *quota) {
	at, sequence, ok := parseHeader(datagram, s.wide)
	if !ok || !s.counting.Load() {
		return
	}
	s.bytes.Add(int64(len(datagram)))
	s.mu.Lock()
	s.arrivals.add(at, now.Sub(epoch), int64(sequence))
	s.mu.Unlock()
	amount.take(len(datagram))
}

func stopped(stop <-chan struct{}) bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

// quota is an amount of bytes that several streams use up together. Safe for concurrent use.
type quota struct {
	limited atomic.Bool
	left    atomic.Int64
	once    sync.Once
	spent   chan struct{} // closed when nothing is left
}

// newQuota returns a quota without a limit.
func newQuota() *quota { return &quota{spent: make(chan struct{})} }

// limit sets what is left from now on; 0 bytes: there is no limit.
func (q *quota) limit(bytes int64) {
	if bytes > 0 {
		q.left.Store(bytes)
		q.limited.Store(true)
	}
}

// take asks for one block of n bytes. A block may start as long as anything is left, as with the original: a test of
// 300 KB with blocks of 128 KB moves three of them.
func (q *quota) take(n int) bool {
	if !q.limited.Load() {
		return true
	}
	left := q.left.Add(int64(-n))
	if left <= 0 {
		q.once.Do(func() { close(q.spent) })
	}
	return left+int64(n) > 0
}
