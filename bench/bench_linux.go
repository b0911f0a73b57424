package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// warmup is how long a load runs before its window opens: TCP's windows and buffers have
// their size by then, and the server's heap its shape.
const warmup = 250 * time.Millisecond

// streamWarmup is what each of many streams adds: its window grows once per round trip, and
// that takes longer the more streams share the link.
const streamWarmup = 8 * time.Millisecond

// warmup returns how long r's load runs before its window opens.
func (r row) warmup() time.Duration {
	if r.load != loadBulkIn && r.load != loadBulkOut {
		return warmup
	}
	return max(warmup, time.Duration(r.conns)*streamWarmup)
}

// bench is a run inside the namespace.
type bench struct {
	options
	apps                 string // folder of the built applications
	serverCPU, clientCPU int
	wrk                  string // file of the HTTP client; empty: this program
	// rates of the rows with loadLatency, in requests/s, once they are known.
	rates map[string]float64
}

// run builds what is needed outside of the namespace, and measures inside. Every child is
// started by its goroutine, see process.
func run(ctx context.Context, o options, args []string) error {
	runtime.LockOSThread()
	if !inSandbox() {
		apps := o.apps
		if names := o.neededApps(); apps == "" && len(names) > 0 {
			fmt.Fprintf(os.Stderr, "building %s\n", strings.Join(names, ", "))
			dir, err := buildApps(ctx, names...)
			if err != nil {
				return err
			}
			defer func() { _ = os.RemoveAll(dir) }()
			apps = dir
		}
		return enterSandbox(ctx, args, apps)
	}

	if err := prepareSandbox(); err != nil {
		return err
	}
	if err := os.Setenv(congestionVar, o.congestion); err != nil {
		return fmt.Errorf("name the congestion control: %w", err)
	}
	if err := setTCP(); err != nil {
		return err
	}
	b := bench{options: o, apps: os.Getenv(appsVar), rates: map[string]float64{}}
	if o.demo {
		return b.runDemo(ctx)
	}
	if err := b.chooseCPUs(); err != nil {
		return err
	}
	if err := b.allowIdleConns(); err != nil {
		return err
	}
	b.wrk, _ = exec.LookPath("wrk") // else our own client
	temp, err := os.MkdirTemp("", "numastack-bench-")
	if err != nil {
		return fmt.Errorf("make a folder for counters: %w", err)
	}
	defer func() { _ = os.RemoveAll(temp) }()
	if err := os.Setenv(countersVar, filepath.Join(temp, "counters.json")); err != nil {
		return fmt.Errorf("name the file for counters: %w", err)
	}
	var out *resultFile
	if o.out != "" {
		if out, err = createResult(o.out); err != nil {
			return err
		}
		defer out.discard()
	}

	if o.profiles != "" {
		if err := os.MkdirAll(o.profiles, 0o777); err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
	}

	samples, failures := b.measure(ctx)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	rep := newReport(b.environment(), o.rows, samples, failures)
	var short error
	if o.check != nil {
		short = b.checkAgain(ctx, rep)
	}
	if out != nil {
		if err := out.write(rep); err != nil {
			return err
		}
	}
	write := rep.writeTable
	if o.jsonOut {
		write = rep.writeJSON
	}
	if err := write(os.Stdout); err != nil {
		return err
	}
	if len(failures) > 0 {
		return errors.Join(fmt.Errorf("%d samples failed", len(failures)), short)
	}
	return short
}

// checkAgain holds a run to the result file of -check. Rows that fall short are measured once
// more and judged by the second time: a neighbour may have had the CPU. When one has it the
// second time too, nothing can be said, and nothing fails.
func (b *bench) checkAgain(ctx context.Context, rep *report) error {
	rows, why, err := rep.shortfalls(b.check)
	if err != nil || len(rows) == 0 {
		return err
	}
	fmt.Fprintf(os.Stderr, "measured again:\n  %s\n", strings.Join(why, "\n  "))
	again := *b
	again.rows = slices.DeleteFunc(slices.Clone(b.rows), func(r row) bool { return !slices.Contains(rows, r.name) })
	cpus := slices.Compact([]int{b.serverCPU, b.clientCPU})
	before, err := readCPUUse(cpus...)
	if err != nil {
		return err
	}
	samples, failures := again.measure(ctx)
	after, err := readCPUUse(cpus...)
	if err != nil {
		return err
	}
	_, why, err = newReport(rep.Environment, again.rows, samples, failures).shortfalls(b.check)
	if err != nil {
		return errors.Join(err, errors.New(strings.Join(failures, "; ")))
	}
	if foreign := after.foreign(before, len(cpus)); len(why) > 0 && foreign > maxForeign {
		fmt.Fprintf(os.Stderr, "-check: not judged, other programs had %.0f %% of CPUs %v:\n  %s\n", 100*foreign, cpus, strings.Join(why, "\n  "))
		return nil
	}
	if len(why) > 0 {
		return fmt.Errorf("-check:\n  %s", strings.Join(why, "\n  "))
	}
	return nil
}

// chooseCPUs takes the first two CPUs this process may use, unless the command line names
// others. With a single one, server and client share it.
func (b *bench) chooseCPUs() error {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return fmt.Errorf("read the CPU affinity: %w", err)
	}
	var usable []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			usable = append(usable, cpu)
		}
	}
	b.serverCPU, b.clientCPU = b.cpus[0], b.cpus[1]
	if b.serverCPU < 0 {
		b.serverCPU, b.clientCPU = usable[0], usable[min(1, len(usable)-1)]
	}
	for _, cpu := range []int{b.serverCPU, b.clientCPU} {
		if !slices.Contains(usable, cpu) {
			return fmt.Errorf("-cpus: CPU %d is not one of those this process may use: %v", cpu, usable)
		}
	}
	if b.serverCPU == b.clientCPU {
		fmt.Fprintf(os.Stderr, "server and client share CPU %d: the figures mean little\n", b.serverCPU)
	}
	return nil
}

// measure takes one sample per round, row and peer; rows with the same key share it. A
// sample that fails is reported and left out; the others go on.
func (b *bench) measure(ctx context.Context) (map[string]map[string][]sample, []string) {
	samples := map[string]map[string][]sample{}
	var failures []string
	for round := range b.rounds {
		taken := map[sampleKey]sample{}
		for _, r := range b.rows {
			if round >= r.rounds(b.options) {
				continue
			}
			if samples[r.name] == nil {
				samples[r.name] = map[string][]sample{}
			}
			var line strings.Builder
			fmt.Fprintf(&line, "round %d/%d  %-20s", round+1, b.rounds, r.name)
			for i := range b.peers {
				peer := b.peers[(i+round)%len(b.peers)]
				if !r.measures(peer) || round >= r.peerRounds(peer, b.options) {
					continue
				}
				s, shared := taken[r.key(peer)]
				var err error
				if !shared {
					s, err = b.sample(ctx, peer, r)
				}
				if ctx.Err() != nil {
					return samples, failures
				}
				if err != nil {
					failures = append(failures, fmt.Sprintf("round %d, %s, %s: %v", round+1, r.name, peer, err))
					fmt.Fprintf(&line, "  %s failed", peer)
					continue
				}
				taken[r.key(peer)] = s
				samples[r.name][peer] = append(samples[r.name][peer], s)
				fmt.Fprintf(&line, "  %s %s", peer, figure(new(r.value(s))))
			}
			fmt.Fprintf(os.Stderr, "%s  %s\n", line.String(), r.unit)
		}
	}
	return samples, failures
}

// sample starts a peer, loads it once and stops it.
func (b *bench) sample(ctx context.Context, peer string, r row) (sample, error) {
	rate, err := b.rate(ctx, r)
	if err != nil {
		return sample{}, err
	}
	s, err := startPeer(ctx, peer, r, b)
	if err != nil {
		return sample{}, err
	}
	spec := clientSpec{
		Load: r.load, Door: r.door, Conns: b.conns(r), Server: netip.MustParseAddr(s.addr), ServerPID: s.pid(),
		Size: r.messageSize(), GSO: r.size == udpGSO, Rate: rate,
		Warmup: r.warmup(), Duration: b.duration, Wrk: b.wrk, Ports: wellKnownPorts,
	}
	if peer == peerLimit {
		spec = spec.limit(r.linkMTU())
	}
	out, err := b.load(ctx, spec, b.clientCPU)
	// A server that did not survive its load explains the client's error.
	if err := errors.Join(err, s.stop()); err != nil {
		return sample{}, err
	}
	// wrk and the idle client have windows of their own, whose part is not known.
	if path := os.Getenv(countersVar); path != "" && peer == peerNumastack && r.load != loadHTTP && r.load != loadIdle {
		counted, err := readCounters(path)
		if err != nil {
			return sample{}, err
		}
		out.Traffic = newTraffic(out, spec.Warmup, counted)
	}
	return out, nil
}

// countersVar names the file where numastack's server leaves its counters at its end.
const countersVar = "NUMASTACK_BENCH_COUNTERS"

// limit returns the client for the peer limit, which has no TCP: streams become datagrams of
// the MTU's size, as many in a frame as fit.
func (s clientSpec) limit(mtu int) clientSpec {
	switch s.Load {
	case loadBulkIn:
		s.Load, s.Size, s.GSO = loadUDPIn, mtu-udpHeaders, true
	case loadBulkOut:
		s.Load, s.Size, s.GSO = loadUDPOut, mtu-udpHeaders, true
	default:
	}
	s.Link = limitTAP
	return s
}

// latencyLoad is the part of numastack's throughput at which latencies are measured.
const latencyLoad = 0.5

// rate returns how many requests/s r's client sends, 0 for as many as are answered. The first
// call measures what numastack does when the client waits for answers; all peers get the
// same part of that.
func (b *bench) rate(ctx context.Context, r row) (float64, error) {
	if r.load != loadLatency || b.rates[r.name] != 0 {
		return b.rates[r.name], nil
	}
	closed := r
	closed.load = loadPingPong
	s, err := b.sample(ctx, peerNumastack, closed)
	if err != nil {
		return 0, fmt.Errorf("throughput that the rate is a part of: %w", err)
	}
	b.rates[r.name] = latencyLoad * perSecond(s)
	return b.rates[r.name], nil
}

// load runs one client process.
func (b *bench) load(ctx context.Context, spec clientSpec, cpu int) (sample, error) {
	self, err := os.Executable()
	if err != nil {
		return sample{}, fmt.Errorf("find this program's file: %w", err)
	}
	arg, err := json.Marshal(spec)
	if err != nil {
		return sample{}, fmt.Errorf("client specification: %w", err)
	}
	out, err := runCommand(ctx, command{
		path: self, args: []string{roleClient, string(arg)}, cpu: cpu,
		deadline: spec.deadline(),
	})
	if err != nil {
		return sample{}, err
	}
	var s sample
	if err := json.Unmarshal(out, &s); err != nil {
		return sample{}, fmt.Errorf("the client printed %q instead of a sample: %w", out, err)
	}
	return s, nil
}

// serverDeadline bounds a server's life.
func (b *bench) serverDeadline(r row) time.Duration {
	spec := clientSpec{Load: r.load, Conns: b.conns(r), Warmup: r.warmup(), Duration: b.duration}
	return readyTimeout + spec.deadline() + stopTimeout
}
