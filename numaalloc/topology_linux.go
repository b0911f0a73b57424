package numaalloc

import (
	"os"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// allowedNow returns the CPUs that the process may use now, ascending: those of
// its cpuset and online, without those that the mask it was started with leaves
// out. Affinity masks tell neither: threads have been pinned since.
func allowedNow() ([]int, error) {
	if errAtStart != nil {
		return allowedAtStart()
	}
	cpuset, err := readCPUSet()
	if err != nil {
		return allowedAtStart() // a sandbox that forbids it: nobody widens its cpuset
	}
	if maskAtStart() {
		cpuset = slices.DeleteFunc(cpuset, func(cpu int) bool { return !slices.Contains(cpusAtStart, cpu) })
	}
	return cpuset, nil
}

// maskAtStart reports whether the process was started with an affinity mask
// narrower than its cpuset, as by taskset(1). Without one, it may use the CPUs
// that its cpuset gains.
var maskAtStart = sync.OnceValue(func() bool {
	cpuset, err := readCPUSet()
	return err != nil || slices.ContainsFunc(cpuset, func(cpu int) bool { return !slices.Contains(cpusAtStart, cpu) })
})

// readCPUSet returns the online CPUs of the process's cpuset, wherever cgroups
// are mounted: a thread that asks for all CPUs gets those (sched_setaffinity(2)).
func readCPUSet() (cpus []int, err error) {
	read := make(chan struct{})
	go onNewThread(func() {
		defer close(read)
		all := unix.NewCPUSet(maxCPUs)
		all.Fill()
		if err = os.NewSyscallError("sched_setaffinity", unix.SchedSetaffinityDynamic(0, all)); err == nil {
			cpus, err = affinity(0)
		}
	})
	<-read
	return cpus, err
}

// onNewThread runs f locked to a thread that ends with it. The process's first
// thread cannot end: if the runtime has chosen that one, a second goroutine gets
// another while this one keeps it busy.
func onNewThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		f()
		return
	}
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(locked)
		f()
	}()
	<-locked
	runtime.UnlockOSThread()
}
