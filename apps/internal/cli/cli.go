// Package cli is what the bundled applications have in common: the flags of a
// stack, its start, the wait for a signal, and the counters at the end.
package cli

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"numastack/stack"
)

// Options are the values of the common flags.
type Options struct {
	cfg        stack.Config
	statsJSON  string
	profile    string
	endProfile func() error // nil: there is none
	verbose    bool
	plan       bool
}

// Flags registers the common flags.
func Flags(fs *flag.FlagSet) *Options {
	o := &Options{cfg: stack.Config{
		Device:  stack.DefaultDevice,
		Shards:  1,
		MTU:     stack.DefaultMTU,
		Spin:    stack.DefaultSpin,
		Backlog: stack.DefaultBacklog,
	}}
	fs.StringVar(&o.cfg.Device, "tap", o.cfg.Device, "TAP `device`; created if it does not exist")
	fs.BoolVar(&o.cfg.Persist, "persist", false, "keep a created TAP device at exit")
	fs.Func("addr", "`address/length` of the stack, repeatable, IPv4 or IPv6 (default 10.99.0.2/24)", prefixes(&o.cfg.Addrs))
	fs.Func("host", "`address/length` for the host's side of the TAP, repeatable (default 10.99.0.1/24 if -addr has its default)", prefixes(&o.cfg.HostAddrs))
	fs.Func("gateway", "next hop `address` of a default route, one per address family", o.addGateway)
	fs.IntVar(&o.cfg.Shards, "shards", o.cfg.Shards, "`number` of shards (threads), 1 to 128")
	fs.IntVar(&o.cfg.Groups, "groups", 0, "`number` of flow groups, from the number of shards to 128; 0: choose")
	fs.Func("cpus", "CPU `list` for the shards, as in 0,2-3 (default the allowed ones in order)", cpus(&o.cfg.CPUs))
	fs.Func("host-cpus", "CPU `list` where the kernel goes on with what the shards send (default as the device is, the shard's own CPU on a new one)", cpus(&o.cfg.HostCPUs))
	fs.TextVar(&o.cfg.Profile, "profile", stack.ProfileClosest, "`name` of how shards spread over NUMA nodes: Closest, ClosestStatic, NUMA, NUMAStatic or Conservative")
	fs.BoolVar(&o.plan, "plan", false, "print where the shards would be, and exit")
	fs.IntVar(&o.cfg.MTU, "mtu", o.cfg.MTU, "largest IP packet in `bytes`, 576 to 65521")
	fs.TextVar(&o.cfg.Rebalance, "rebalance", stack.RebalanceAuto, "`how` flow groups move between shards: auto (even out the load), conserve (use as few shards as carry it) or off")
	fs.TextVar(&o.cfg.Steering, "steering", stack.SteeringAuto, "`who` picks the queue of a frame: auto, kernel (eBPF) or user")
	fs.Func("hash-types", "`names` of what the hash looks at, as in TCP_IPV4,IPV4 (default all: "+stack.HashAll.String()+")", func(s string) (err error) {
		o.cfg.HashTypes, err = stack.ParseHashTypes(s)
		return err
	})
	fs.Func("hash-key", "hash key as 80 `hex` digits (default random)", o.setHashKey)
	fs.BoolVar(&o.cfg.SymmetricHash, "symmetric", false, "draw a hash key by which both directions of a flow have one hash")
	fs.DurationVar(&o.cfg.Spin, "spin", o.cfg.Spin, "longest `time` an idle shard looks for work before it blocks, while work comes that soon; up to 1s; negative: none")
	fs.TextVar(&o.cfg.Offload, "offload", stack.OffloadAuto, "`whether` frames may exceed the MTU (GSO) and leave checksums to the other side: auto or off")
	fs.TextVar(&o.cfg.CongestionControl, "congestion", stack.CongestionReno, "congestion `control` of TCP: reno or cubic")
	fs.StringVar(&o.statsJSON, "stats-json", "", "write the counters as JSON to `file` at exit")
	fs.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile of the whole run to `file`, for go tool pprof and go build -pgo")
	fs.BoolVar(&o.verbose, "v", false, "log what the stack does, not only what is wrong")
	return o
}

func (o *Options) setHashKey(s string) error {
	b, err := hex.DecodeString(s)
	if err != nil {
		return err
	}
	key, err := stack.ParseHashKey(b)
	o.cfg.HashKey = &key
	return err
}

func prefixes(list *[]netip.Prefix) func(string) error {
	return func(s string) error {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return errors.New("want address/length, as in 10.99.0.2/24 or fd00::2/64")
		}
		*list = append(*list, p)
		return nil
	}
}

func (o *Options) addGateway(s string) error {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return errors.New("want an IP address, as in 10.99.0.1")
	}
	o.cfg.Gateways = append(o.cfg.Gateways, a)
	return nil
}

// cpus keeps the order of a list: with -cpus it is the order of the shards.
func cpus(list *[]int) func(string) error {
	return func(s string) error {
		parsed, err := parseCPUs(s)
		*list = parsed
		return err
	}
}

func parseCPUs(s string) (cpus []int, err error) {
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		low, err := strconv.Atoi(first)
		high := low
		if err == nil && isRange {
			high, err = strconv.Atoi(last)
		}
		if err != nil || low < 0 || high < low || high-low > 1<<12 {
			return nil, fmt.Errorf("%q is not a CPU or a range of them, as in 0,2-3", part)
		}
		for cpu := low; cpu <= high; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// Open starts the stack. Give it a logger of Logger's.
func (o *Options) Open(logger *slog.Logger) (*stack.Stack, error) {
	cfg := o.cfg
	if cfg.Shards < 1 {
		// For Config 0 means its default; on a command line it is a mistake.
		return nil, fmt.Errorf("-shards is %d, want 1 to 128", cfg.Shards)
	}
	if cfg.Addrs == nil {
		cfg.Addrs = []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24")}
		if cfg.HostAddrs == nil {
			cfg.HostAddrs = []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24")}
		}
	}
	if cfg.Spin == 0 {
		cfg.Spin = -1 // for Config 0 means its default
	}
	cfg.Logger = logger
	// The collector and the other goroutines would wait behind threads that
	// spin.
	if runtime.GOMAXPROCS(0) < cfg.Shards+1 {
		runtime.GOMAXPROCS(cfg.Shards + 1)
	}
	// The heap is a few megabytes of connections; with the default of 100 the
	// collector takes a tenth of the shards' time when connections come and go
	// fast.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if o.plan {
		plan, err := stack.Plan(cfg)
		if err == nil {
			_, err = plan.WriteTo(os.Stdout)
		}
		if err != nil {
			return nil, err
		}
		os.Exit(0)
	}
	s, err := stack.New(cfg)
	if err == nil && o.profile != "" {
		if err = o.startProfile(); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, err
}

// startProfile is undone by Finish.
func (o *Options) startProfile() error {
	f, err := os.Create(o.profile)
	if err != nil {
		return fmt.Errorf("-cpuprofile: %w", err)
	}
	o.endProfile = func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}
	return pprof.StartCPUProfile(f)
}

// Logger returns the application's logger: warnings only, or more with -v.
func (o *Options) Logger(w io.Writer) *slog.Logger {
	level := slog.LevelWarn
	if o.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// Parse parses the command line. The error is flag.ErrHelp after -help, which
// prints the usage. Any other error is for the caller to print: the usage would
// hide it.
func Parse(fs *flag.FlagSet, args []string) error {
	output := fs.Output()
	fs.SetOutput(io.Discard)
	err := fs.Parse(args)
	fs.SetOutput(output)
	if errors.Is(err, flag.ErrHelp) {
		fs.Usage()
	}
	if err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q; see -help", fs.Arg(0))
	}
	return nil
}

// Wait blocks until SIGINT or SIGTERM arrives or the stack's device is lost,
// which is the error it returns.
func Wait(s *stack.Stack) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	select {
	case <-ctx.Done():
		return nil
	case <-s.Done():
		return s.Err()
	}
}

// Finish closes the stack, prints its counters per shard to w, and writes them
// to the file of -stats-json.
func (o *Options) Finish(s *stack.Stack, w io.Writer) error {
	// Before Close: the number of open connections tells something only now,
	// and the kernel's counter is gone with the device.
	stats := s.Stats()
	err := s.Close()
	if o.endProfile != nil {
		err = errors.Join(err, o.endProfile())
	}
	err = errors.Join(err, printStats(w, stats))
	if o.statsJSON != "" {
		b, jsonErr := json.MarshalIndent(stats, "", "  ")
		if jsonErr == nil {
			jsonErr = os.WriteFile(o.statsJSON, append(b, '\n'), 0o644)
		}
		err = errors.Join(err, jsonErr)
	}
	return err
}

func printStats(w io.Writer, stats stack.Stats) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "shard\tcpu\tnode\trx frames\trx MB\ttx frames\ttx MB\tmissteered\tforwarded\tdropped\tframes/wake\tconns\taccepted\t")
	for _, c := range stats.Shards {
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%.1f\t%d\t%.1f\t%d\t%d\t%d\t%.1f\t%d\t%d\t\n",
			c.Shard, c.CPU, c.Node, c.RxFrames, float64(c.RxBytes)/1e6, c.TxFrames, float64(c.TxBytes)/1e6,
			c.Missteered, c.Forwarded, c.Dropped+c.RingFull+c.TxErrors+c.DatagramsDropped, c.FramesPerWake(), c.ConnsOpen, c.ConnsAccepted)
	}
	if stats.KernelDropped > 0 {
		fmt.Fprintf(t, "frames that the kernel dropped because a queue was full: %d\n", stats.KernelDropped)
	}
	return t.Flush()
}
