package main

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Sizes and limits of the control protocol, as iperf 3.12 uses them.
const (
	cookieLen = 37 // 36 characters and a NUL

	maxParamsLen  = 64 << 10 // bytes of JSON; real ones have about 200
	maxResultsLen = 16 << 20 // bytes of JSON; may carry the server's whole output

	maxStreams  = 128     // each way
	maxBlockLen = 1 << 20 // bytes, TCP
	maxDatagram = 65507   // bytes: 65,535 less IPv4 and UDP headers
	maxSeconds  = 86400
	maxOmit     = 600 // seconds
)

// state is the one-byte message that moves a test from one step to the next.
type state int8

const (
	stateTestStart       state = 1
	stateTestRunning     state = 2
	stateTestEnd         state = 4
	stateParamExchange   state = 9
	stateCreateStreams   state = 10
	stateServerTerminate state = 11
	stateClientTerminate state = 12
	stateExchangeResults state = 13
	stateDisplayResults  state = 14
	stateStart           state = 15
	stateDone            state = 16
	stateAccessDenied    state = -1
	stateServerError     state = -2
)

func (s state) String() string {
	switch s {
	case stateTestStart:
		return "TEST_START"
	case stateTestRunning:
		return "TEST_RUNNING"
	case stateTestEnd:
		return "TEST_END"
	case stateParamExchange:
		return "PARAM_EXCHANGE"
	case stateCreateStreams:
		return "CREATE_STREAMS"
	case stateServerTerminate:
		return "SERVER_TERMINATE"
	case stateClientTerminate:
		return "CLIENT_TERMINATE"
	case stateExchangeResults:
		return "EXCHANGE_RESULTS"
	case stateDisplayResults:
		return "DISPLAY_RESULTS"
	case stateStart:
		return "IPERF_START"
	case stateDone:
		return "IPERF_DONE"
	case stateAccessDenied:
		return "ACCESS_DENIED"
	case stateServerError:
		return "SERVER_ERROR"
	default:
		return "state " + strconv.Itoa(int(s))
	}
}

// Error numbers a server sends behind SERVER_ERROR. The client prints its own text for them.
const (
	codeStreams       = 6   // number of parallel streams out of range
	codeBlockLen      = 7   // block size out of range
	codeUnimplemented = 13  // option not implemented
	codeParams        = 114 // parameters could not be received
	codeStreamFailed  = 206 // a data stream could not be read
)

// The ways a peer ends a test on purpose.
var (
	errBusy             = errors.New("the server is busy running a test; try again later")
	errClientTerminated = errors.New("the client has terminated the test")
	errServerTerminated = errors.New("the server has terminated")
)

// cookie names one test: its control connection and its TCP streams all start with it.
type cookie [cookieLen]byte

func newCookie() cookie {
	var random [23]byte // 184 bits, 37 characters in base 32
	_, _ = rand.Read(random[:])
	var c cookie
	copy(c[:cookieLen-1], strings.ToLower(base32.StdEncoding.EncodeToString(random[:])))
	return c
}

func (c cookie) String() string { return strings.TrimRight(string(c[:]), "\x00") }

// number is a JSON number of any notation: the original writes large values as 1e+16 and -1 as 18446744073709551615.
type number int64

// UnmarshalJSON accepts numbers and booleans, which different versions of iperf3 use for the same switch.
func (n *number) UnmarshalJSON(text []byte) error {
	switch s := string(text); s {
	case "null", "false":
		*n = 0
	case "true":
		*n = 1
	case strconv.FormatUint(math.MaxUint64, 10):
		*n = -1
	default:
		if v, err := strconv.ParseInt(s, 10, 64); err == nil {
			*n = number(v)
			return nil
		}
		v, err := strconv.ParseFloat(s, 64)
		if err != nil || v >= math.MaxInt64 || v <= math.MinInt64 {
			return fmt.Errorf("JSON value %.40s: want a number below 2^63", s)
		}
		*n = number(v)
	}
	return nil
}

// params is what the client asks for. Names and meaning are the protocol's.
type params struct {
	TCP             bool   `json:"tcp,omitempty"`
	UDP             bool   `json:"udp,omitempty"`
	SCTP            bool   `json:"sctp,omitempty"`
	Omit            number `json:"omit"`       // seconds
	Time            number `json:"time"`       // seconds, 0: Num or BlockCount decides
	Num             number `json:"num"`        // bytes, all streams together
	BlockCount      number `json:"blockcount"` // blocks, all streams together
	MSS             number `json:"MSS,omitempty"`
	NoDelay         bool   `json:"nodelay,omitempty"`
	ZeroCopy        number `json:"zerocopy,omitempty"` // 1: whoever sends over TCP does not copy
	Parallel        number `json:"parallel"`
	Reverse         bool   `json:"reverse,omitempty"`
	Bidirectional   bool   `json:"bidirectional,omitempty"`
	Window          number `json:"window,omitempty"`    // bytes
	Len             number `json:"len"`                 // bytes per block or datagram
	Bandwidth       number `json:"bandwidth,omitempty"` // bits per second and stream, 0: as fast as possible
	PacingTimer     number `json:"pacing_timer"`        // microseconds
	Burst           number `json:"burst,omitempty"`     // blocks
	GetServerOutput number `json:"get_server_output,omitempty"`
	Counters64      number `json:"udp_counters_64bit,omitempty"`
	AuthToken       string `json:"authtoken,omitempty"`
	ClientVersion   string `json:"client_version"`
}

// invalid is a parameter the server refuses; code is what the protocol calls it.
type invalid struct {
	code int32
	text string
}

func (e *invalid) Error() string { return "test parameters: " + e.text }

// validate reports the first parameter that is out of range as an *invalid.
func (p *params) validate() error {
	minLen, maxLen := number(1), number(maxBlockLen)
	if p.UDP {
		minLen, maxLen = number(headerLen(p.Counters64 != 0)), maxDatagram
	}
	refuse := func(code int32, format string, args ...any) error {
		return &invalid{code, fmt.Sprintf(format, args...)}
	}
	switch {
	case p.SCTP || p.TCP == p.UDP:
		return refuse(codeUnimplemented, "protocol tcp=%t udp=%t sctp=%t: want either tcp or udp", p.TCP, p.UDP, p.SCTP)
	case p.Parallel < 1 || p.Parallel > maxStreams:
		return refuse(codeStreams, "parallel %d: want 1..%d streams", p.Parallel, maxStreams)
	case p.Len < minLen || p.Len > maxLen:
		return refuse(codeBlockLen, "len %d: want %d..%d bytes", p.Len, minLen, maxLen)
	case p.Time < 0 || p.Time > maxSeconds:
		return refuse(codeParams, "time %d: want 0..%d seconds", p.Time, maxSeconds)
	case p.Omit < 0 || p.Omit > maxOmit:
		return refuse(codeParams, "omit %d: want 0..%d seconds", p.Omit, maxOmit)
	case p.Num < 0 || p.BlockCount < 0 || p.Bandwidth < 0 || p.Burst < 0:
		return refuse(codeParams, "num %d, blockcount %d, bandwidth %d, burst %d: want none below 0", p.Num, p.BlockCount, p.Bandwidth, p.Burst)
	case p.BlockCount > math.MaxInt64/maxBlockLen:
		return refuse(codeParams, "blockcount %d: want at most %d", p.BlockCount, math.MaxInt64/maxBlockLen)
	case p.Window < 0 || p.Window > 512<<20:
		return refuse(codeParams, "window %d: want 0..%d bytes", p.Window, 512<<20)
	}
	return nil
}

// amount is what ends the test, in bytes over all streams of a direction; 0: the clock ends it.
func (p *params) amount() int64 {
	if p.Num > 0 {
		return int64(p.Num)
	}
	return int64(p.BlockCount * p.Len)
}

// directions says which way the streams go seen from the client, in the order in which they are created.
func (p *params) directions() []bool {
	n := int(p.Parallel)
	sends := make([]bool, 0, 2*n)
	for range n {
		sends = append(sends, p.Bidirectional || !p.Reverse)
	}
	if p.Bidirectional {
		for range n {
			sends = append(sends, false)
		}
	}
	return sends
}

// results is one side's view of a finished test.
type results struct {
	CPUTotal             float64         `json:"cpu_util_total"` // percent of one CPU
	CPUUser              float64         `json:"cpu_util_user"`
	CPUSystem            float64         `json:"cpu_util_system"`
	SenderHasRetransmits number          `json:"sender_has_retransmits"` // 1: known, 0: not, -1: does not send
	ServerOutputText     string          `json:"server_output_text,omitempty"`
	ServerOutputJSON     json.RawMessage `json:"server_output_json,omitempty"`
	Streams              []streamResult  `json:"streams"`
}

// streamResult is one stream in results. Packets and Errors count from the very first datagram, omitted ones included:
// the peer subtracts what was omitted (3.12 its own count, later versions the two Omitted fields).
type streamResult struct {
	ID             int     `json:"id"`
	Bytes          number  `json:"bytes"`
	Retransmits    number  `json:"retransmits"` // -1: unknown
	Jitter         float64 `json:"jitter"`      // seconds
	Errors         number  `json:"errors"`      // datagrams lost
	OmittedErrors  *number `json:"omitted_errors,omitempty"`
	Packets        number  `json:"packets"`
	OmittedPackets *number `json:"omitted_packets,omitempty"`
	StartTime      float64 `json:"start_time"` // seconds
	EndTime        float64 `json:"end_time"`
}

// streamID returns the number both sides give to stream index (0, 1, …). The original skips 2.
func streamID(index int) int {
	if index == 0 {
		return 1
	}
	return index + 2
}

// control is one end of the control connection. Every call has timeout to finish; 0 means no limit.
// One goroutine may read while another writes.
type control struct {
	net.Conn
	timeout time.Duration

	mu          sync.Mutex // orders setting deadlines
	interrupted bool       // every call fails from now on; guarded by mu
}

// interrupt ends the call under way and all later ones. Any goroutine may call it.
func (c *control) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupted = true
	_ = c.SetDeadline(time.Now()) // fails only on a closed connection
}

// extend gives the next call its time.
func (c *control) extend(set func(time.Time) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.interrupted:
		return os.ErrDeadlineExceeded
	case c.timeout == 0:
		return set(time.Time{})
	default:
		return set(time.Now().Add(c.timeout))
	}
}

// leave says s as the last word, also when interrupted. A peer that does not listen any more does not matter.
func (c *control) leave(s state) {
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = c.Write([]byte{byte(s)})
}

func (c *control) write(what string, b []byte) error {
	if err := c.extend(c.SetWriteDeadline); err != nil {
		return fmt.Errorf("send %s: %w", what, err)
	}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("send %s: %w", what, err)
	}
	return nil
}

func (c *control) read(what string, b []byte) error {
	if err := c.extend(c.SetReadDeadline); err != nil {
		return fmt.Errorf("receive %s: %w", what, err)
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("receive %s: %w", what, err)
	}
	return nil
}

func (c *control) writeState(s state) error { return c.write(s.String(), []byte{byte(s)}) }

// writeError tells the client why the server ends the test: SERVER_ERROR, the protocol's error number, an errno of 0.
func (c *control) writeError(code int32) error {
	b := make([]byte, 9)
	failed := stateServerError // a constant -2 does not convert to a byte
	b[0] = byte(failed)
	binary.BigEndian.PutUint32(b[1:], uint32(code))
	return c.write(stateServerError.String(), b)
}

func (c *control) readState() (state, error) {
	var b [1]byte
	if err := c.read("next state", b[:]); err != nil {
		return 0, err
	}
	return state(b[0]), nil
}

// readError reads what follows SERVER_ERROR.
func (c *control) readError() error {
	var b [8]byte
	if err := c.read("server's error", b[:]); err != nil {
		return err
	}
	return fmt.Errorf("the server reports error %d (errno %d)",
		int32(binary.BigEndian.Uint32(b[:])), int32(binary.BigEndian.Uint32(b[4:])))
}

// writeJSON sends v behind its length, in one write.
func (c *control) writeJSON(what string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", what, err)
	}
	return c.write(what, append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
}

// readJSON receives into v; a text longer than limit bytes is an error and is not read.
func (c *control) readJSON(what string, v any, limit uint32) error {
	var head [4]byte
	if err := c.read("length of "+what, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size == 0 || size > limit {
		return fmt.Errorf("length of %s %d: want 1..%d bytes", what, size, limit)
	}
	text := make([]byte, size)
	if err := c.read(what, text); err != nil {
		return err
	}
	// The original counts a terminating NUL in some versions.
	if err := json.Unmarshal([]byte(strings.TrimRight(string(text), "\x00")), v); err != nil {
		return fmt.Errorf("decode %s: %w", what, err)
	}
	return nil
}
