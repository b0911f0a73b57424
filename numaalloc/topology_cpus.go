package numaalloc

import (
	"errors"
	"fmt"
	"io/fs"
)

// OnlineCPUs returns the CPUs that run, ascending. The process may be kept
// from some of them: see AllowedCPUs.
func OnlineCPUs() ([]int, error) { return machine().onlineCPUs() }

// NodeOf returns the NUMA node of a CPU. On a kernel without NUMA every CPU is
// on node 0.
func NodeOf(cpu int) (int, error) { return machine().nodeOf(cpu) }

func (s source) onlineCPUs() ([]int, error) {
	cpus, err := s.list(cpuDir + "/online")
	if err != nil {
		return nil, fmt.Errorf("online cpus: %w", err)
	}
	if len(cpus) == 0 {
		return nil, errors.New("online cpus: the kernel's list is empty; want at least one CPU")
	}
	return cpus, nil
}

func (s source) nodeOf(cpu int) (int, error) {
	if _, err := fs.Stat(s.root, fmt.Sprintf("%s/cpu%d", cpuDir, cpu)); err != nil {
		return 0, fmt.Errorf("node of cpu %d: no such CPU; online are %s", cpu, s.describeOnline())
	}
	node, err := s.nodeLink(cpu)
	if err != nil {
		return 0, fmt.Errorf("node of cpu %d: %w", cpu, err)
	}
	if node >= 0 {
		return node, nil
	}
	if _, err := fs.Stat(s.root, nodeDir); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return 0, fmt.Errorf("node of cpu %d: the CPU is offline; online are %s", cpu, s.describeOnline())
}

// describeOnline is for error texts only.
func (s source) describeOnline() string {
	cpus, err := s.onlineCPUs()
	if err != nil {
		return "unknown"
	}
	return FormatCPUList(cpus)
}
