package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"
)

const (
	demoShards   = 2 // or fewer, on a machine with fewer CPUs
	demoSeconds  = 3 // of each load
	demoUDPRate  = "500M"
	demoDeadline = 55 * time.Second // the whole demo ends within a minute
)

// iperfTest is one run of an iperf3 client.
type iperfTest struct {
	name string
	args []string
	udp  bool
}

var iperfTests = []iperfTest{
	{name: "TCP in, 1 stream"},
	{name: "TCP in, 8 streams", args: []string{"-P", "8"}},
	{name: "TCP out, 1 stream", args: []string{"-R"}},
	{name: "TCP out, 8 streams", args: []string{"-R", "-P", "8"}},
	{name: "UDP in, 500 Mbit/s asked", args: []string{"-u", "-b", demoUDPRate}, udp: true},
}

// runDemo shows both applications at work, one after the other on the same TAP name.
func (b *bench) runDemo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, demoDeadline)
	defer cancel()
	dir, err := os.MkdirTemp("", "numastack-demo-")
	if err != nil {
		return fmt.Errorf("make a folder for the counters: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()

	b.serverCPU, b.clientCPU = anyCPU, anyCPU
	rep := demoReport{env: b.environment(), shards: min(demoShards, runtime.NumCPU())}

	rep.client = "iperf3"
	client := []string{"iperf3"}
	if _, err := exec.LookPath("iperf3"); err != nil {
		client = []string{filepath.Join(b.apps, "iperf3"), "-host-sockets"}
		rep.client = "apps/iperf3 on kernel sockets, as iperf3 is not installed"
	}
	// A load that fails ends its application's part; the table shows what there is.
	iperfErr := b.withApp(ctx, "iperf3", dir, &rep, func(pid int) error {
		for _, test := range iperfTests {
			line, err := b.runIperf(ctx, client, test, pid, rep.env.TSCHz)
			if err != nil {
				return fmt.Errorf("%s: %w", test.name, err)
			}
			rep.add(line)
		}
		return nil
	})
	echoErr := b.withApp(ctx, "echo", dir, &rep, func(pid int) error {
		line, err := b.runEcho(ctx, pid, rep.env.TSCHz)
		if err != nil {
			return err
		}
		rep.add(line)
		return nil
	})
	if err := rep.write(os.Stdout); err != nil {
		return err
	}
	return demoError(ctx, errors.Join(iperfErr, echoErr))
}

// demoError names the limit when it, and not the load, ended the demo.
func demoError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("demo: not done within %v: %w", demoDeadline, err)
	}
	return fmt.Errorf("demo: %w", err)
}

// withApp serves with an application while drive runs, then reads what its shards counted.
func (b *bench) withApp(ctx context.Context, app, dir string, rep *demoReport, drive func(pid int) error) error {
	stats := filepath.Join(dir, app+".json")
	p, err := start(ctx, command{
		path: filepath.Join(b.apps, app),
		args: []string{
			"-tap", numastackTAP, "-addr", numastackServer + "/24", "-host", "10.99.0.1/24",
			"-mtu", strconv.Itoa(standardMTU), "-shards", strconv.Itoa(rep.shards), "-stats-json", stats,
		},
		cpu: anyCPU, deadline: demoDeadline,
	})
	if err != nil {
		return fmt.Errorf("apps/%s: %w", app, err)
	}
	fmt.Printf("apps/%s serves on %s, %d shards\n", app, numastackServer, rep.shards)
	if err := errors.Join(drive(p.pid()), p.stop()); err != nil {
		return fmt.Errorf("apps/%s: %w", app, err)
	}

	counted, err := readCounters(stats)
	if err != nil {
		return fmt.Errorf("apps/%s: %w", app, err)
	}
	counted.app = app
	rep.apps = append(rep.apps, counted)
	return nil
}

// runIperf runs one iperf3 client and reads its JSON.
func (b *bench) runIperf(ctx context.Context, client []string, test iperfTest, pid int, tscHz float64) (demoLine, error) {
	args := append(client[1:len(client):len(client)], "-c", numastackServer, "-t", strconv.Itoa(demoSeconds), "-J")
	before, err := processCPU(pid)
	if err != nil {
		return demoLine{}, err
	}
	out, err := runCommand(ctx, command{
		path: client[0], args: append(args, test.args...), cpu: anyCPU,
		deadline: demoSeconds*time.Second + 2*stallTimeout,
	})
	result, parseErr := parseIperf(out, test.udp)
	if parseErr != nil {
		// A client that failed says why in its JSON, or printed none.
		return demoLine{}, errors.Join(parseErr, err)
	}
	if err != nil {
		return demoLine{}, err
	}
	after, err := processCPU(pid)
	if err != nil {
		return demoLine{}, err
	}
	line := demoLine{name: test.name, gbit: result.gbit, lossPercent: result.lossPercent, udp: test.udp}
	line.setCPU(after-before, result.bytes, tscHz)
	return line, nil
}

// runEcho loads apps/echo with the client of the benchmark.
func (b *bench) runEcho(ctx context.Context, pid int, tscHz float64) (demoLine, error) {
	const conns = 64
	s, err := b.load(ctx, clientSpec{
		Load: loadPingPong, Conns: conns, Server: netip.MustParseAddr(numastackServer), ServerPID: pid,
		Warmup: warmup, Duration: demoSeconds * time.Second, Ports: wellKnownPorts,
	}, anyCPU)
	if err != nil {
		return demoLine{}, err
	}
	line := demoLine{
		name: fmt.Sprintf("echo of %d bytes, %d connections", messageBytes, conns), requests: perSecond(s),
		p50: micros(s.P50), p99: micros(s.P99),
	}
	bytes := s.Ops * 2 * messageBytes // in and out
	line.gbit = float64(bytes) * 8 / float64(s.Elapsed)
	line.setCPU(s.CPU, bytes, tscHz)
	return line, nil
}
