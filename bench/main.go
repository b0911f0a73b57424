package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// options is the command line after validation.
type options struct {
	quick      bool
	jsonOut    bool
	demo       bool
	rows       []row
	peers      []string
	rounds     int
	duration   time.Duration // of one sample's window, warm-up not included
	idleConns  int           // of the idle rows
	cpus       [2]int        // server, client; -1: the first two this process may use
	congestion string        // control of the kernel's TCP; empty: the system's default
	rps        bool          // the kernel goes on with numastack's frames on the client's CPU
	apps       string        // folder with built applications; empty: build them
	profiles   string        // folder for the servers' CPU profiles; empty: none
	reporting
}

// Bounds that keep a typing error from occupying a machine for hours.
const (
	maxRounds   = 100
	maxDuration = time.Minute
	// maxIdleConns leaves room among the 28,232 local ports that a kernel chooses from
	// (net.ipv4.ip_local_port_range); all connections come from one address.
	maxIdleConns = 25_000
)

func main() {
	os.Exit(mainStatus(os.Args[1:]))
}

// mainStatus returns the exit status: 0 measured (whether or not targets were met), 1 at
// least one sample failed, -check did or a file could not be reported, 2 the command line
// was wrong.
func mainStatus(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// The hidden roles are child processes of a run, see process_linux.go.
	if len(args) == 2 && (args[0] == roleServe || args[0] == roleClient) {
		if err := runRole(ctx, args[0], args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}

	o, err := parseOptions(args, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	if o.reports() {
		if err := o.report(os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}
	if err := run(ctx, o, args); err != nil {
		if status, ok := errors.AsType[statusError](err); ok {
			return int(status)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// statusError is the exit status of the run inside the namespace, which has already reported
// its errors.
type statusError int

func (s statusError) Error() string { return "exit status " + strconv.Itoa(int(s)) }

func parseOptions(args []string, usage io.Writer) (options, error) {
	var (
		o         options
		rowNames  string
		peerNames string
		cpuList   string
		checkFile string
		mix       string
	)
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(usage)
	fs.BoolVar(&o.quick, "quick", false, "fewer rows, rounds and peers, under 4 minutes (default: everything, under 40 minutes)")
	fs.BoolVar(&o.jsonOut, "json", false, "print JSON instead of a table")
	fs.BoolVar(&o.demo, "demo", false, "show apps/echo and apps/iperf3 at work instead of measuring")
	fs.StringVar(&rowNames, "rows", "", "comma-separated `rows` to measure, or prefixes of their names such as bulk (default: all; with -quick those of the smaller run)")
	fs.StringVar(&peerNames, "peers", "", "comma-separated `peers` to measure: "+strings.Join(peerOrder, ", ")+" (default: all, with -quick not gvisor_gso)")
	fs.IntVar(&o.rounds, "rounds", 0, "rounds, each with one sample per row and peer; of many rows fewer are taken (default: 10, with -quick 5)")
	fs.DurationVar(&o.duration, "duration", time.Second, "length of one sample")
	fs.IntVar(&o.idleConns, "idle-conns", 0, "`connections` of the idle rows (default: 20000, with -quick 5000)")
	fs.StringVar(&cpuList, "cpus", "", "`server,client` CPUs (default: the first two this process may use)")
	fs.StringVar(&o.congestion, "congestion", "reno", "congestion control of all the kernel's sockets, client and server; empty: the system's `name`.\n"+
		"One that paces, such as bbr, may cost a client more for its timers than for its bytes: then the rows measure the client")
	fs.BoolVar(&o.rps, "rps", false, "have the kernel go on with numastack's frames on the client's CPU, by receive packet steering")
	fs.StringVar(&o.apps, "apps", "", "`folder` with the built applications echo, httpd and iperf3 (default: build them with go build)")
	fs.StringVar(&o.profiles, "cpuprofile", "", "also write a CPU profile of every server into `folder`, as ROW-PEER.pprof; of many rounds the last one's")
	fs.StringVar(&o.out, "out", "", "also write the result as JSON to `file`")
	fs.StringVar(&checkFile, "check", "", "fail when a ratio to gvisor is under half of that in the result `file`, a quarter if it is of another CPU or has other page lists")
	fs.StringVar(&o.compare, "compare", "", "instead of measuring, compare the result `file` with the newer one named after the flags")
	fs.StringVar(&o.plot, "plot", "", "instead of measuring, draw the result file named after the flags into `folder`, as SVG and PNG")
	fs.StringVar(&o.markdown, "markdown", "", "instead of measuring, print the tables of the result `file` as Markdown")
	fs.StringVar(&o.capacity, "capacity", "", "instead of measuring, print what a core carries by the costs in the result `file`")
	fs.StringVar(&mix, "mix", "", "frame sizes and their shares for -capacity, such as 1514:0.5,64:0.5 (default: 64, 1514, 9014 and 65549 bytes, each alone)")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return o, err
		}
		return o, fmt.Errorf("command line: %w", err)
	}
	var err error
	if mix != "" {
		if o.mix, err = parseMix(mix); err != nil {
			return o, err
		}
	}
	if err := o.arguments(fs.Args()); err != nil {
		return o, err
	}
	if checkFile != "" {
		if o.check, err = readResult(checkFile); err != nil {
			return o, fmt.Errorf("-check: %w", err)
		}
	}

	if o.rounds == 0 {
		o.rounds = 10
		if o.quick {
			o.rounds = 5
		}
	}
	if o.idleConns == 0 {
		o.idleConns = 20_000
		if o.quick {
			o.idleConns = 5_000
		}
	}
	if o.rounds < 1 || o.rounds > maxRounds {
		return o, fmt.Errorf("-rounds %d: must be 1 to %d", o.rounds, maxRounds)
	}
	if o.duration < 100*time.Millisecond || o.duration > maxDuration {
		return o, fmt.Errorf("-duration %v: must be 100ms to %v", o.duration, maxDuration)
	}

	if o.idleConns < 1 || o.idleConns > maxIdleConns {
		return o, fmt.Errorf("-idle-conns %d: must be 1 to %d", o.idleConns, maxIdleConns)
	}

	if o.rows, err = selectRows(rowNames, o.quick); err != nil {
		return o, err
	}
	if o.peers, err = selectPeers(peerNames, o.quick); err != nil {
		return o, err
	}
	o.cpus, err = parseCPUs(cpuList)
	return o, err
}

// neededApps names the applications that the run starts.
func (o options) neededApps() []string {
	if o.demo {
		return []string{"echo", "iperf3"}
	}
	var names []string
	if slices.Contains(o.peers, peerNumastack) {
		for _, r := range o.rows {
			if app := r.app(); app != "" && !slices.Contains(names, app) {
				names = append(names, app)
			}
		}
	}
	return names
}

// conns returns how many connections a row has.
func (o options) conns(r row) int {
	if r.load == loadIdle {
		return o.idleConns
	}
	return r.conns
}

// selectPeers keeps the order of peerOrder, whatever order the list has.
// A -quick run leaves out gVisor at its best, unless the list has it.
func selectPeers(list string, quick bool) ([]string, error) {
	switch {
	case list == "" && quick:
		return slices.DeleteFunc(slices.Clone(peerOrder), func(p string) bool { return p == peerGVisorGSO }), nil
	case list == "":
		return peerOrder, nil
	}
	asked := strings.Split(list, ",")
	for _, name := range asked {
		if !slices.Contains(peerOrder, name) {
			return nil, fmt.Errorf("-peers %q: accepted are %s", name, strings.Join(peerOrder, ", "))
		}
	}
	var peers []string
	for _, name := range peerOrder {
		if slices.Contains(asked, name) {
			peers = append(peers, name)
		}
	}
	return peers, nil
}

func parseCPUs(list string) ([2]int, error) {
	if list == "" {
		return [2]int{-1, -1}, nil
	}
	bad := fmt.Errorf("-cpus %q: must be two CPU numbers such as 0,1", list)
	server, client, ok := strings.Cut(list, ",")
	if !ok {
		return [2]int{}, bad
	}
	var cpus [2]int
	for i, s := range []string{server, client} {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return [2]int{}, bad
		}
		cpus[i] = n
	}
	return cpus, nil
}
