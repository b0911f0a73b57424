package numaalloc

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// onOwnThread runs f on an OS thread that ends with it, so that a pin or a
// name does not leak into other tests.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

func TestPin(t *testing.T) {
	allowed, err := allowedAtStart()
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range allowed {
		onOwnThread(func() {
			if err := Pin(cpu); err != nil {
				t.Error(err)
				return
			}
			mask, err := affinity(0)
			if err != nil || !slices.Equal(mask, []int{cpu}) {
				t.Errorf("mask after Pin(%d) = %v (%v)", cpu, mask, err)
			}
			if current, err := currentCPU(); err != nil || current != cpu {
				t.Errorf("thread pinned to %d runs on %d (%v)", cpu, current, err)
			}
			if current := CurrentCPU(); current != cpu {
				t.Errorf("CurrentCPU = %d on a thread pinned to %d", current, cpu)
			}
			// What Pin did to this thread is not what the process may do.
			if again, err := allowedAtStart(); err != nil || !slices.Equal(again, allowed) {
				t.Errorf("allowedAtStart after Pin = %v (%v), want %v", again, err, allowed)
			}
		})
	}
}

func TestPinErrors(t *testing.T) {
	allowed, err := allowedAtStart()
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range []int{-1, maxCPUs - 1, maxCPUs} {
		onOwnThread(func() {
			err := Pin(cpu)
			if err == nil {
				t.Errorf("Pin(%d) succeeded", cpu)
				return
			}
			if want := "allowed are " + FormatCPUList(allowed); !strings.Contains(err.Error(), want) {
				t.Errorf("Pin(%d): %q lacks %q", cpu, err, want)
			}
			if cpu == maxCPUs-1 && !errors.Is(err, unix.EINVAL) {
				t.Errorf("Pin(%d): %v, want EINVAL", cpu, err)
			}
		})
	}
}

// The CPUs allowed at start are those that the topology allows, on nodes that it
// has.
func TestAllowedCPUsHaveANode(t *testing.T) {
	topology, err := ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	allowed, err := allowedAtStart()
	if err != nil || !slices.Equal(allowed, topology.AllowedCPUs) {
		t.Fatalf("allowed at start are %v (%v), by the topology %v", allowed, err, topology.AllowedCPUs)
	}
	for _, id := range allowed {
		cpu, _ := topology.CPU(id)
		if node, exists := topology.Node(cpu.Node); !exists || !slices.Contains(node.CPUs, id) {
			t.Errorf("CPU %d is %+v, and its node %+v", id, cpu, node)
		}
	}
	plan, err := Placement{Shards: len(allowed) + 1}.Plan(topology)
	if err != nil {
		t.Fatal(err)
	}
	if cpus := plan.CPUs(); cpus[len(allowed)] != cpus[0] {
		t.Errorf("%d shards are on CPUs %v, want the last one to start over at %d", len(allowed)+1, cpus, cpus[0])
	}
}

func TestNameThread(t *testing.T) {
	tests := []struct {
		name string
		err  string
	}{
		{"shard 0", ""},
		{"123456789012345", ""},
		{"", "0 bytes; want 1..15"},
		{"1234567890123456", "16 bytes; want 1..15"},
	}
	for _, test := range tests {
		onOwnThread(func() {
			err := NameThread(test.name)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("NameThread(%q) error = %v, want %q", test.name, err, test.err)
				}
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			comm, err := os.ReadFile("/proc/thread-self/comm")
			if err != nil || string(comm) != test.name+"\n" {
				t.Errorf("thread is named %q (%v), want %q", comm, err, test.name)
			}
		})
	}
}

// currentCPU reads where this thread runs: field 39 of proc_pid_stat(5).
func currentCPU() (int, error) {
	stat, err := os.ReadFile("/proc/thread-self/stat")
	if err != nil {
		return 0, err
	}
	// Field 2, the name, may hold blanks; count from the bracket behind it.
	_, rest, _ := strings.Cut(string(stat), ") ")
	cpus, err := ParseCPUList(strings.Fields(rest)[39-3])
	if err != nil {
		return 0, err
	}
	return cpus[0], nil
}
