package numaalloc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// Folders of the kernel's view of the machine, below the root of sysfs
// (Documentation/ABI/stable/sysfs-devices-system-cpu and -node).
const (
	cpuDir  = "devices/system/cpu"
	nodeDir = "devices/system/node"
)

// OnlineCPUs returns the CPUs that run, ascending. The process may be kept
// from some of them: see AllowedCPUs.
func OnlineCPUs() ([]int, error) {
	return onlineCPUs(os.DirFS("/sys"))
}

// NodeOf returns the NUMA node of an online CPU. On a kernel without NUMA
// every CPU is on node 0.
func NodeOf(cpu int) (int, error) {
	return nodeOf(os.DirFS("/sys"), cpu)
}

// Spread returns the default CPU of each of n threads: the allowed CPUs in
// ascending order, starting over when there are more threads than CPUs.
func Spread(n int) ([]int, error) {
	allowed, err := AllowedCPUs()
	if err != nil {
		return nil, err
	}
	return spread(allowed, n)
}

func onlineCPUs(sysfs fs.FS) ([]int, error) {
	list, err := fs.ReadFile(sysfs, cpuDir+"/online")
	if err != nil {
		return nil, fmt.Errorf("online cpus: %w", err)
	}
	cpus, err := ParseCPUList(string(list))
	if err != nil {
		return nil, fmt.Errorf("online cpus: %w", err)
	}
	if len(cpus) == 0 {
		return nil, errors.New("online cpus: the kernel's list is empty; want at least one CPU")
	}
	return cpus, nil
}

func nodeOf(sysfs fs.FS, cpu int) (int, error) {
	entries, err := fs.ReadDir(sysfs, fmt.Sprintf("%s/cpu%d", cpuDir, cpu))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("node of cpu %d: no such CPU; online are %s", cpu, describeOnline(sysfs))
	}
	if err != nil {
		return 0, fmt.Errorf("node of cpu %d: %w", cpu, err)
	}

	// The kernel keeps a link cpuN/nodeM as long as the CPU is online.
	for _, entry := range entries {
		number, isNode := strings.CutPrefix(entry.Name(), "node")
		if !isNode {
			continue
		}
		node, err := strconv.Atoi(number)
		if err != nil {
			continue
		}
		return node, nil
	}

	if _, err := fs.Stat(sysfs, nodeDir); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return 0, fmt.Errorf("node of cpu %d: the CPU is offline; online are %s", cpu, describeOnline(sysfs))
}

// describeOnline is for error texts only.
func describeOnline(sysfs fs.FS) string {
	cpus, err := onlineCPUs(sysfs)
	if err != nil {
		return "unknown"
	}
	return FormatCPUList(cpus)
}

func spread(allowed []int, n int) ([]int, error) {
	if n < 1 {
		return nil, fmt.Errorf("spread over cpus: %d threads; want 1 or more", n)
	}
	if len(allowed) == 0 {
		return nil, errors.New("spread over cpus: no CPU is allowed; want at least one")
	}
	cpus := make([]int, n)
	for i := range cpus {
		cpus[i] = allowed[i%len(allowed)]
	}
	return cpus, nil
}
