package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// clientSpec tells a client process what to do. It travels as JSON on its command line.
type clientSpec struct {
	Load      load          `json:"load"`
	Door      door          `json:"door"` // chooses the server's HTTP library
	Conns     int           `json:"conns"`
	Size      int           `json:"size"` // of a request or datagram in bytes; 0: messageBytes
	GSO       bool          `json:"gso"`  // many datagrams in a frame
	Rate      float64       `json:"rate"` // of loadLatency, in requests/s
	Server    netip.Addr    `json:"server"`
	ServerPID int           `json:"server_pid"` // whose CPU time to note
	Warmup    time.Duration `json:"warmup_ns"`
	Duration  time.Duration `json:"duration_ns"`
	Wrk       string        `json:"wrk"` // file of the HTTP client wrk; empty: use our own
	// Link, when set, is the TAP whose frames tell what the server received.
	Link string `json:"link"`
	// Ports is for tests, which cannot always have the well-known ones.
	Ports ports `json:"ports"`
}

type ports struct{ Echo, Discard, Chargen, FastHTTP, NetHTTP, Memory, Count uint16 }

var wellKnownPorts = ports{
	Echo: portEcho, Discard: portDiscard, Chargen: portChargen,
	FastHTTP: portFastHTTP, NetHTTP: portNetHTTP, Memory: portMemory, Count: portCount,
}

// http returns the port of the library that stands for d.
func (p ports) http(d door) uint16 {
	if d == doorNet {
		return p.NetHTTP
	}
	return p.FastHTTP
}

// stallTimeout is how long the client waits without any progress before it gives up. It is
// longer than TCP's first retransmissions, so a lost SYN slows a sample down and no more.
const stallTimeout = 3 * time.Second

// maxLatency bounds the histogram. Nothing can take longer than stallTimeout on every
// connection, but one of many may.
const maxLatency = time.Minute

var errStalled = fmt.Errorf("no progress for %v", stallTimeout)

// deadline bounds a client's life.
func (s clientSpec) deadline() time.Duration {
	d := s.Warmup + s.Duration + 2*stallTimeout
	switch s.Load {
	case loadHTTP:
		d += time.Second // wrk measures whole seconds
	case loadIdle:
		d += idleSettle + time.Duration(s.Conns)*idleOpenLimit
	case loadLatency:
		d += latencyDrain
	case loadUDPIn:
		d += 2 * stallTimeout // two drains
	default:
	}
	return d
}

func (s clientSpec) run() (sample, error) {
	var (
		out sample
		err error
	)
	switch {
	case s.Load == loadBulkIn || s.Load == loadBulkOut:
		out, err = s.bulk()
	case s.Load == loadPingPong && s.Conns == 1:
		out, err = s.pingPongOne()
	case s.Load == loadPingPong:
		out, err = s.exchangeMany(s.Ports.Echo, func() exchange { return newRequest(s.messageSize()) })
	case s.Load == loadLatency:
		out, err = s.latency()
	case s.Load == loadUDPIn:
		out, err = s.udpIn()
	case s.Load == loadUDPOut:
		out, err = s.udpOut()
	case s.Load == loadShort:
		out, err = s.short()
	case s.Load == loadHTTP:
		out, err = s.http()
	case s.Load == loadIdle:
		out, err = s.idle()
	default:
		err = errors.New("unknown load")
	}
	if err != nil {
		return sample{}, fmt.Errorf("%s, %d connections to %s: %w", s.Load, s.Conns, s.Server, err)
	}
	return out, nil
}

func (s clientSpec) messageSize() int {
	if s.Size == 0 {
		return messageBytes
	}
	return s.Size
}

// meter turns operations into a sample. It ignores what happens before the window opens.
type meter struct {
	spec      clientSpec
	open, end time.Time // the window, as planned
	running   bool

	began    time.Time // the window, as it came out
	beganCPU time.Duration
	ops      int64
	latency  *hdrhistogram.Histogram // ns
}

func newMeter(s clientSpec) *meter {
	open := time.Now().Add(s.Warmup)
	return &meter{
		spec: s, open: open, end: open.Add(s.Duration),
		latency: hdrhistogram.New(1, maxLatency.Nanoseconds(), 3),
	}
}

// tick opens the window when its time has come, and reports when it is over.
func (m *meter) tick(now time.Time) (over bool, err error) {
	if !m.running && !now.Before(m.open) {
		m.running = true
		m.began = now
		if m.beganCPU, err = processCPU(m.spec.ServerPID); err != nil {
			return true, err
		}
	}
	return !now.Before(m.end), nil
}

// record counts one operation that took d.
func (m *meter) record(d time.Duration) {
	if !m.running {
		return
	}
	m.ops++
	// Only a value above maxLatency is refused; it still counts as an operation.
	_ = m.latency.RecordValue(min(d, maxLatency).Nanoseconds())
}

func (m *meter) sample() (sample, error) {
	now := time.Now()
	cpu, err := processCPU(m.spec.ServerPID)
	if err != nil {
		return sample{}, err
	}
	if m.ops == 0 {
		return sample{}, fmt.Errorf("nothing was answered in the window of %v", m.spec.Duration)
	}
	return sample{
		Elapsed: now.Sub(m.began),
		CPU:     cpu - m.beganCPU,
		Ops:     m.ops,
		P50:     time.Duration(m.latency.ValueAtQuantile(50)),
		P99:     time.Duration(m.latency.ValueAtQuantile(99)),
		Max:     time.Duration(m.latency.Max()),
	}, nil
}

// processCPU returns the user and system time of a process with all its threads, from
// the clock that clock_getcpuclockid(3) names: linux/posix-timers_types.h, CPUCLOCK_SCHED.
func processCPU(pid int) (time.Duration, error) {
	const cpuClockSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuClockSched), &ts); err != nil {
		return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// connectStart begins a connection and returns its non-blocking socket, which becomes
// writable when the connection stands.
func connectStart(addr netip.Addr, port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: addr.As4(), Port: int(port)})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("connect to %s port %d: %w", addr, port, err)
	}
	return fd, nil
}

// connectFinish returns the outcome of connectStart once the socket is writable.
func connectFinish(fd int) error {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return fmt.Errorf("read SO_ERROR: %w", err)
	}
	if code != 0 {
		return fmt.Errorf("connect: %w", unix.Errno(code))
	}
	return nil
}

// dial connects and returns the socket, still non-blocking.
func dial(addr netip.Addr, port uint16) (int, error) {
	fd, err := connectStart(addr, port)
	if err != nil {
		return -1, err
	}
	pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(pfd, int(stallTimeout.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = unix.ETIMEDOUT
		}
		if err == nil {
			err = connectFinish(fd)
		}
		if err != nil {
			_ = unix.Close(fd)
			return -1, fmt.Errorf("connect to %s port %d: %w", addr, port, err)
		}
		return fd, nil
	}
}

// setBlocking makes reads wait, for at most stallTimeout.
func setBlocking(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return fmt.Errorf("make the socket blocking: %w", err)
	}
	limit := unix.NsecToTimeval(stallTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return fmt.Errorf("set SO_RCVTIMEO: %w", err)
	}
	return nil
}

// reset closes a connection with a RST, which leaves no TIME_WAIT on either side
// (SO_LINGER with zero seconds, tcp(7) and socket(7)).
func reset(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(fd)
}

// request is the one outstanding request of a connection. Its bytes differ from request to
// request, so an answer that is late, lost or another's is noticed.
type request struct {
	want, got []byte
	n         int // bytes of got that have arrived
	sent      time.Time
}

// newRequest makes requests of size bytes.
func newRequest(size int) *request {
	r := &request{want: make([]byte, size), got: make([]byte, size)}
	copy(r.want, chargenBytes)
	return r
}

// send writes the next request. It always fits: nothing else is in the socket, and the
// socket's buffer is larger (net.ipv4.tcp_wmem, as grown by tcp_init_buffer_space).
func (r *request) send(fd int, id, seq uint64, now time.Time) error {
	var mark [16]byte
	binary.LittleEndian.PutUint64(mark[:], seq)
	binary.LittleEndian.PutUint64(mark[8:], id)
	copy(r.want, mark[:])
	r.n, r.sent = 0, now
	n, err := unix.Write(fd, r.want)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if n != len(r.want) {
		return fmt.Errorf("write took %d of %d bytes", n, len(r.want))
	}
	return nil
}

// receive reads once and reports whether the answer is complete and right.
func (r *request) receive(fd int) (complete bool, err error) {
	n, err := unix.Read(fd, r.got[r.n:])
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read: %w", err)
	case n == 0:
		return false, fmt.Errorf("read: the server closed the connection after %d of %d bytes", r.n, len(r.want))
	}
	if r.n += n; r.n < len(r.want) {
		return false, nil
	}
	if !bytes.Equal(r.got, r.want) {
		first := min(len(r.want), 16)
		return false, fmt.Errorf("the answer is not the request: sent % x, got % x", r.want[:first], r.got[:first])
	}
	return true, nil
}

// await receives the whole answer on a blocking socket.
func (r *request) await(fd int) error {
	for {
		complete, err := r.receive(fd)
		if err != nil || complete {
			return err
		}
		if time.Since(r.sent) > stallTimeout {
			return errStalled
		}
	}
}
