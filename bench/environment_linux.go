package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func (b *bench) environment() environment {
	env := environment{
		Time:       time.Now().UTC().Format(time.RFC3339),
		Commit:     commit(),
		Go:         runtime.Version(),
		GVisor:     moduleVersion("gvisor.dev/gvisor"),
		Kernel:     kernelRelease(),
		CPUs:       runtime.NumCPU(),
		ServerCPU:  b.serverCPU,
		ClientCPU:  b.clientCPU,
		Rounds:     b.rounds,
		SampleSec:  b.duration.Seconds(),
		MTU:        standardMTU,
		Congestion: congestion(),
		PageLists:  pageLists(),
		RPS:        b.rps,
	}
	for _, r := range b.rows {
		switch r.load {
		case loadHTTP:
			env.HTTPClient = "bench"
			if b.wrk != "" {
				env.HTTPClient = "wrk"
			}
		case loadIdle:
			env.IdleConns = b.idleConns
		default:
		}
	}
	// Where the file is missing, CPU costs are in ns instead of cycles.
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	env.CPU, env.TSCHz = parseCPUInfo(cpuinfo)
	return env
}

// pageLists returns what bounds each CPU's list of free pages; 0: they grow with the load,
// and frames that are written then come to lie in cold memory.
func pageLists() int {
	b, _ := os.ReadFile("/proc/sys/vm/percpu_pagelist_high_fraction")
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

// parseCPUInfo returns the first CPU's model and, on x86, the TSC's rate: there BogoMIPS is
// twice its MHz, because the delay loop is calibrated by it (linux/arch/x86/kernel/tsc.c,
// lpj_fine). "cpu MHz" would be the clock of the moment instead.
func parseCPUInfo(cpuinfo []byte) (model string, tscHz float64) {
	model = runtime.GOARCH
	scanner := bufio.NewScanner(bytes.NewReader(cpuinfo))
	for scanner.Scan() {
		key, value, ok := strings.Cut(scanner.Text(), ":")
		if !ok {
			if len(key) == 0 {
				break // the second CPU begins
			}
			continue
		}
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "model name":
			model = value
		case "bogomips": // other architectures spell it BogoMIPS and mean something else
			if mips, err := strconv.ParseFloat(value, 64); err == nil {
				tscHz = mips / 2 * 1e6
			}
		}
	}
	return model, tscHz
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// commit names the commit in the working directory, with a mark when files differ from it.
// Outside of a repository it is empty.
func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty", "--exclude=*").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// moduleVersion returns the version of a module that this program was built with, or nothing.
func moduleVersion(path string) string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, m := range build.Deps {
		if m.Path == path {
			return m.Version
		}
	}
	return ""
}

// spareFiles is how many files a process of ours has open beside its connections, and more.
const spareFiles = 64

// allowIdleConns raises the limit on open files, which children inherit, as far as the
// idle rows need it, and lowers their number of connections to what the system grants.
func (b *bench) allowIdleConns() error {
	if !slices.ContainsFunc(b.rows, func(r row) bool { return r.load == loadIdle }) {
		return nil
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit on open files: %w", err)
	}
	want := limit
	want.Cur = max(limit.Cur, uint64(b.idleConns+spareFiles))
	want.Max = max(limit.Max, want.Cur) // takes CAP_SYS_RESOURCE
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
		want = syscall.Rlimit{Cur: limit.Max, Max: limit.Max}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
			return fmt.Errorf("raise the limit on open files to %d: %w", want.Cur, err)
		}
	}
	if most := int(want.Cur) - spareFiles; most < b.idleConns {
		if most < 1 {
			return fmt.Errorf("the limit on open files is %d: the idle rows need at least %d", want.Cur, spareFiles+1)
		}
		fmt.Fprintf(os.Stderr, "the limit on open files is %d: the idle rows have %d connections instead of %d\n", want.Cur, most, b.idleConns)
		b.idleConns = most
	}
	return nil
}
