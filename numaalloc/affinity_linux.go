package numaalloc

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// maxThreadName is what fits a thread name: TASK_COMM_LEN of
// linux/sched.h without the closing zero, in bytes.
const maxThreadName = 15

// The affinity mask the process came with. It is read before any thread can be
// pinned: the kernel keeps masks per thread, and a mask read later may be one
// that Pin has set. Immutable.
var cpusAtStart, errAtStart = affinity(os.Getpid())

// allowedAtStart returns the CPUs the process was allowed to use when it
// started, ascending: what taskset(1) or its cpuset left it, not what Pin did
// to single threads since. The caller may change the result.
func allowedAtStart() ([]int, error) {
	if errAtStart != nil {
		return nil, fmt.Errorf("allowed cpus: %w", errAtStart)
	}
	return slices.Clone(cpusAtStart), nil
}

// Pin moves the calling OS thread to cpu and keeps it there. The goroutine
// must hold the thread (runtime.LockOSThread), or the pin hits whichever
// goroutine runs on that thread next. A thread that is unlocked later keeps
// its pin: let the goroutine end locked, so that the thread ends with it.
func Pin(cpu int) error {
	if cpu < 0 || cpu >= maxCPUs {
		return fmt.Errorf("pin thread to cpu %d: no such number; allowed are %s", cpu, describeAllowed())
	}
	mask := unix.NewCPUSet(cpu + 1)
	mask.Set(cpu)
	if err := unix.SchedSetaffinityDynamic(0, mask); err != nil {
		return fmt.Errorf("pin thread to cpu %d: %w; allowed are %s", cpu, err, describeAllowed())
	}
	return nil
}

// PinAny keeps the calling OS thread on the given CPUs, under the conditions of
// Pin.
func PinAny(cpus []int) error {
	mask := unix.NewCPUSet(maxCPUs)
	for _, cpu := range cpus {
		if cpu < 0 || cpu >= maxCPUs {
			return fmt.Errorf("pin thread to cpus %s: no cpu %d; allowed are %s", FormatCPUList(cpus), cpu, describeAllowed())
		}
		mask.Set(cpu)
	}
	if err := unix.SchedSetaffinityDynamic(0, mask); err != nil {
		return fmt.Errorf("pin thread to cpus %s: %w; allowed are %s", FormatCPUList(cpus), err, describeAllowed())
	}
	return nil
}

// lockThread keeps the calling goroutine on its OS thread, which ends with it,
// and names that, unless it is the process's first one: that one's name is the
// process's.
func lockThread(name string) {
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		_ = NameThread(name) // cosmetic
	}
}

// NameThread names the calling OS thread, as ps -L, top -H and perf show it:
// 1 to 15 bytes. The goroutine must hold the thread, as for Pin. On the
// process's first thread it renames the process.
func NameThread(name string) error {
	if name == "" || len(name) > maxThreadName {
		return fmt.Errorf("name thread %q: %d bytes; want 1..%d", name, len(name), maxThreadName)
	}
	if errno := setThreadName(name); errno != 0 {
		return fmt.Errorf("name thread %q: %w", name, errno)
	}
	return nil
}

// affinity returns the CPUs in the mask of the thread tid, ascending.
func affinity(tid int) ([]int, error) {
	// The kernel answers EINVAL while the mask given is smaller than its
	// own (sched_getaffinity(2)), so try growing ones.
	for size := 1024; size <= maxCPUs; size *= 2 {
		mask := unix.NewCPUSet(size)
		err := unix.SchedGetaffinityDynamic(tid, mask)
		if errors.Is(err, unix.EINVAL) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("sched_getaffinity", err)
		}
		cpus := make([]int, 0, mask.Count())
		for cpu := range size {
			if mask.IsSet(cpu) {
				cpus = append(cpus, cpu)
			}
		}
		return cpus, nil
	}
	return nil, fmt.Errorf("sched_getaffinity: the kernel has more than %d CPUs", maxCPUs)
}

// describeAllowed is for error texts only.
func describeAllowed() string {
	if errAtStart != nil {
		return "unknown"
	}
	return FormatCPUList(cpusAtStart)
}
