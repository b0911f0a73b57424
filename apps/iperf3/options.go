package main

import (
	"flag"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// options is the command line.
type options struct {
	host   string // of the server; "": we are the server
	server bool
	oneOff bool
	port   int

	udp, reverse, bidir      bool
	parallel                 int
	seconds, omit            int
	bytes, blocks            int64
	bitrate, burst           int64 // bits per second and stream, -1: the default; blocks
	length, window           int64 // bytes; length 0: the default
	mss                      int   // bytes, 0: the stack's choice
	noDelay, serverOutput    bool
	zeroCopy                 bool
	counters64, json         bool
	v4, v6                   bool
	interval, connectTimeout time.Duration

	hostSockets bool
}

const usage = `Usage: iperf3 [-s | -c host] [options]

Measures throughput, loss and jitter between two hosts with the protocol of iperf3.
Every option may be written with one dash or two.

Server or client:
  -p, -port N           port of the server (5201)
  -i, -interval S       seconds between reports, 0: none (1)
  -J, -json             print one JSON object per test
  -4, -6                use only IPv4, only IPv6
  -host-sockets         use the kernel's sockets instead of numastack

Server:
  -s, -server           be the server (the default without -c)
  -1, -one-off          exit after one test

Client:
  -c, -client HOST      be the client of this server
  -u, -udp              UDP instead of TCP
  -t, -time S           seconds to send, 0: until interrupted (10)
  -n, -bytes N[KMG]     bytes to send, instead of -t
  -k, -blockcount N[KMG] blocks to send, instead of -t
  -b, -bitrate N[KMG][/B] bits per second and stream, 0: no limit (UDP 1M, TCP 0);
                        B blocks are sent together
  -l, -length N[KMG]    bytes per block or datagram (TCP 128K, UDP the path's segment size)
  -P, -parallel N       streams (1)
  -R, -reverse          the server sends
  -bidir                both send
  -O, -omit S           seconds to run before counting starts (0)
  -w, -window N[KMG]    socket buffer size
  -M, -set-mss N        TCP maximum segment size; only with -host-sockets
  -N, -no-delay         no Nagle algorithm
  -Z, -zerocopy         who sends over TCP does not copy; numastack's sockets only
  -connect-timeout MS   milliseconds the connection and each protocol step may take (10000)
  -get-server-output    print the server's report too
  -udp-counters-64bit   64-bit packet numbers

K, M, G mean powers of 1024 for sizes and of 1000 for -b.
`

// newFlags registers every option under its short and long name.
func newFlags(o *options, output io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("iperf3", flag.ContinueOnError)
	fs.SetOutput(output)
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		printStackFlags(fs.Output())
	}
	toggle := func(p *bool, names ...string) {
		for _, name := range names {
			fs.BoolVar(p, name, *p, "")
		}
	}
	integer := func(p *int, names ...string) {
		for _, name := range names {
			fs.IntVar(p, name, *p, "")
		}
	}
	scaled := func(set func(string) error, names ...string) {
		for _, name := range names {
			fs.Func(name, "", set)
		}
	}
	for _, name := range []string{"c", "client"} {
		fs.StringVar(&o.host, name, "", "")
	}
	toggle(&o.server, "s", "server")
	toggle(&o.oneOff, "1", "one-off")
	toggle(&o.udp, "u", "udp")
	toggle(&o.reverse, "R", "reverse")
	toggle(&o.bidir, "bidir")
	toggle(&o.noDelay, "N", "no-delay")
	toggle(&o.zeroCopy, "Z", "zerocopy")
	toggle(&o.serverOutput, "get-server-output")
	toggle(&o.counters64, "udp-counters-64bit")
	toggle(&o.json, "J", "json")
	toggle(&o.v4, "4", "version4")
	toggle(&o.v6, "6", "version6")
	toggle(&o.hostSockets, "host-sockets")

	o.port, o.parallel, o.seconds, o.bitrate = 5201, 1, 10, -1
	o.interval, o.connectTimeout = time.Second, defaultLimits.handshake
	integer(&o.port, "p", "port")
	integer(&o.parallel, "P", "parallel")
	integer(&o.seconds, "t", "time")
	integer(&o.omit, "O", "omit")
	integer(&o.mss, "M", "set-mss")
	into := func(p *int64) func(string) error {
		return func(s string) (err error) {
			*p, err = parseScaled(s, 1024)
			return err
		}
	}
	scaled(into(&o.bytes), "n", "bytes")
	scaled(into(&o.blocks), "k", "blockcount")
	scaled(into(&o.length), "l", "length")
	scaled(into(&o.window), "w", "window")
	scaled(func(s string) (err error) {
		s, burst, bursts := strings.Cut(s, "/")
		if o.bitrate, err = parseScaled(s, 1000); err == nil && bursts {
			o.burst, err = parseScaled(burst, 1000)
		}
		return err
	}, "b", "bitrate", "bandwidth")
	scaled(func(s string) error {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil || v != 0 && (v < 0.1 || v > 60) {
			return fmt.Errorf("want 0 or 0.1..60 seconds")
		}
		o.interval = time.Duration(v * float64(time.Second))
		return nil
	}, "i", "interval")
	scaled(func(s string) error {
		v, err := strconv.Atoi(s)
		if err != nil || v < 1 || v > 3600_000 {
			return fmt.Errorf("want 1..3600000 milliseconds")
		}
		o.connectTimeout = time.Duration(v) * time.Millisecond
		return nil
	}, "connect-timeout")
	return fs
}

// parseScaled reads a number with an optional suffix K, M, G or T, powers of step.
func parseScaled(s string, step float64) (int64, error) {
	digits, factor := s, 1.0
	if i := strings.IndexAny(s, "kKmMgGtT"); i >= 0 && i == len(s)-1 {
		digits = s[:i]
		factor = math.Pow(step, float64(strings.IndexByte("KMGT", strings.ToUpper(s)[i])+1))
	}
	v, err := strconv.ParseFloat(digits, 64)
	if err != nil || v < 0 || math.IsNaN(v) || v*factor >= math.MaxInt64 {
		return 0, fmt.Errorf("want a number such as 300, 1.5K, 10M or 2G")
	}
	return int64(v * factor), nil
}

// validate reports what cannot be run, in one line.
func (o *options) validate(args []string) error {
	ends := 0
	for _, amount := range []int64{o.bytes, o.blocks} {
		if amount > 0 {
			ends++
		}
	}
	switch {
	case len(args) > 0:
		return fmt.Errorf("argument %q: want only options", args[0])
	case o.server && o.host != "":
		return fmt.Errorf("-s and -c %s: want one of them", o.host)
	case o.port < 0 || o.port > math.MaxUint16 || o.port == 0 && o.host != "":
		return fmt.Errorf("-p %d: want a port of 1..65535", o.port)
	case o.v4 && o.v6:
		return fmt.Errorf("-4 and -6: want at most one of them")
	case o.reverse && o.bidir:
		return fmt.Errorf("-R and -bidir: want at most one of them")
	case ends > 1:
		return fmt.Errorf("-n %d and -k %d: want at most one of them", o.bytes, o.blocks)
	case o.mss != 0 && (o.mss < 88 || o.mss > 32767):
		return fmt.Errorf("-M %d: want 88..32767 bytes", o.mss)
	case o.mss != 0 && !o.hostSockets:
		return fmt.Errorf("-M %d: only with -host-sockets; on numastack the segment size follows the MTU", o.mss)
	case o.host == "":
		return nil
	}
	p := o.params()
	if p.Len == 0 {
		p.Len = defaultDatagramLen
	}
	return p.validate()
}

// family is the suffix of network names.
func (o *options) family() string {
	switch {
	case o.v4:
		return "4"
	case o.v6:
		return "6"
	default:
		return ""
	}
}

// params is what the client asks the server for. Len is 0 when it has to be found out.
func (o *options) params() *params {
	p := &params{
		TCP: !o.udp, UDP: o.udp, Omit: number(o.omit), Time: number(o.seconds), Num: number(o.bytes),
		BlockCount: number(o.blocks), MSS: number(o.mss), NoDelay: o.noDelay, Parallel: number(o.parallel),
		Reverse: o.reverse, Bidirectional: o.bidir, Window: number(o.window), Len: number(o.length),
		Bandwidth: number(max(o.bitrate, 0)), Burst: number(o.burst), PacingTimer: 1000,
		ZeroCopy:        number(bit(o.zeroCopy)),
		GetServerOutput: number(bit(o.serverOutput)), Counters64: number(bit(o.counters64)), ClientVersion: "3.12",
	}
	if p.Num > 0 || p.BlockCount > 0 {
		p.Time = 0
	}
	if o.udp && o.bitrate < 0 {
		p.Bandwidth = 1 << 20 // the original's default
	}
	if !o.udp && p.Len == 0 {
		p.Len = defaultBlockLen
	}
	return p
}
