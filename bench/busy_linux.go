package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuUse is what was taken of some CPUs until a moment.
type cpuUse struct {
	at  time.Time
	all time.Duration // by anybody, what a hypervisor took away included
	own time.Duration // by this process and the children it has waited for
}

// maxForeign is the part of its CPUs that others may take of a run that is to be judged.
// Interrupts and a shell stay far below it.
const maxForeign = 0.2

// readCPUUse reads what was taken of the given CPUs.
func readCPUUse(cpus ...int) (cpuUse, error) {
	const path = "/proc/stat"
	use := cpuUse{at: time.Now()}
	content, err := os.ReadFile(path)
	if err != nil {
		return cpuUse{}, fmt.Errorf("read the use of CPUs: %w", err)
	}
	if use.all, err = parseCPUUse(content, cpus); err != nil {
		return cpuUse{}, fmt.Errorf("%s: %w", path, err)
	}
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		if err := unix.Getrusage(who, &r); err != nil {
			return cpuUse{}, fmt.Errorf("read this program's CPU time: %w", err)
		}
		use.own += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return use, nil
}

// parseCPUUse sums user, nice, system and steal of the CPUs (proc(5)). Interrupts are left
// out: on some kernels they are in the processes' time too, on others not.
func parseCPUUse(stat []byte, cpus []int) (time.Duration, error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux since 2.6
	var (
		sum   time.Duration
		found int
	)
	scanner := bufio.NewScanner(bytes.NewReader(stat))
	scanner.Buffer(nil, len(stat)+1)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) < 9 || !slices.ContainsFunc(cpus, func(cpu int) bool { return fields[0] == "cpu"+strconv.Itoa(cpu) }) {
			continue
		}
		found++
		for _, i := range []int{1, 2, 3, 8} {
			ticks, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("line %q: %w", scanner.Text(), err)
			}
			sum += time.Duration(ticks) * tick
		}
	}
	if found != len(cpus) {
		return 0, fmt.Errorf("has %d of the CPUs %v", found, cpus)
	}
	return sum, nil
}

// foreign returns the part, 0 to 1, that others took of cpus CPUs since before.
func (use cpuUse) foreign(before cpuUse, cpus int) float64 {
	others := (use.all - before.all) - (use.own - before.own)
	return max(0, others.Seconds()/(use.at.Sub(before.at).Seconds()*float64(cpus)))
}
