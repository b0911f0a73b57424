package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func (b *bench) environment() environment {
	env := environment{
		Time:      time.Now().UTC().Format(time.RFC3339),
		Commit:    commit(),
		Go:        runtime.Version(),
		Kernel:    kernelRelease(),
		CPUs:      runtime.NumCPU(),
		ServerCPU: b.serverCPU,
		ClientCPU: b.clientCPU,
		Rounds:    b.rounds,
		SampleSec: b.duration.Seconds(),
		MTU:       mtu,
	}
	// Where the file is missing, CPU costs are in ns instead of cycles.
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	env.CPU, env.TSCHz = parseCPUInfo(cpuinfo)
	return env
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
