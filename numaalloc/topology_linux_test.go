package numaalloc

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestReadTopologyHere(t *testing.T) {
	topology, err := ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s\n%s", topology, topology.Key())
	allowed, err := allowedAtStart()
	if err != nil || !slices.Equal(topology.AllowedCPUs, allowed) {
		t.Errorf("allowed are %v, want %v (%v)", topology.AllowedCPUs, allowed, err)
	}
	for _, id := range allowed {
		cpu, ok := topology.CPU(id)
		if _, err := os.Stat(fmt.Sprintf("/sys/devices/system/cpu/cpu%d/node%d", id, cpu.Node)); !ok || err != nil && len(topology.Nodes) > 1 {
			t.Errorf("CPU %d is %+v, not on that node by %v", id, cpu, err)
		}
		if !slices.Contains(cpu.Siblings, id) {
			t.Errorf("CPU %d is not among its siblings %v", id, cpu.Siblings)
		}
	}
	if len(topology.MemoryNodes()) == 0 {
		t.Errorf("no memory in %s", topology)
	}
	for profile := range Profile(len(profileNames)) {
		plan, err := Placement{Profile: profile, Shards: len(allowed)}.Plan(topology)
		if err != nil {
			t.Fatal(err)
		}
		if got := sortedUnique(plan.CPUs()); !slices.Equal(got, allowed) {
			t.Errorf("%v places %d shards on %v, want %v", profile, len(allowed), got, allowed)
		}
		t.Logf("dry run:\n%s", plan)
	}
}

// testChild is set for a process that tells what it may use.
const testChild = "NUMAALLOC_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(testChild) == "" {
		os.Exit(m.Run())
	}
	// Here a new goroutine mostly begins on the first thread.
	var cpuset []int
	var err error
	for range 100 {
		if cpuset, err = readCPUSet(); err != nil {
			break
		}
	}
	first, _ := affinity(os.Getpid())
	fmt.Printf("cpuset %v %v, first thread %v\n", cpuset, err, first)
	topology, err := ReadTopology()
	if err == nil {
		fmt.Printf("allowed %v\n", topology.AllowedCPUs)
	}
}

// A mask that the process was started with counts, a pinned thread does not.
func TestAllowedCPUsOfTopology(t *testing.T) {
	allowed, err := allowedAtStart()
	if err != nil {
		t.Fatal(err)
	}
	cpuset, err := readCPUSet()
	if err != nil {
		t.Fatal(err)
	}
	cpu := allowed[len(allowed)-1]
	defer pinFirstThread(t, allowed, cpu)()
	onOwnThread(func() {
		if err := Pin(cpu); err != nil {
			t.Error(err)
			return
		}
		topology, err := ReadTopology()
		if err != nil || !slices.Equal(topology.AllowedCPUs, allowed) {
			t.Errorf("from a pinned thread, allowed are %v (%v); want %v", topology.AllowedCPUs, err, allowed)
		}
		// The child inherits the mask of the thread that starts it.
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), testChild+"=1")
		out, err := cmd.CombinedOutput()
		want := fmt.Sprintf("cpuset %v <nil>, first thread [%d]\nallowed [%d]\n", cpuset, cpu, cpu)
		if err != nil || string(out) != want {
			t.Errorf("a process started on CPU %d says %q (%v), want %q", cpu, out, err, want)
		}
	})
}

// Changes CPUs and the cpuset of the machine, so it runs where that is all there
// is: in a guest made for it.
func TestWatchHere(t *testing.T) {
	if os.Getenv("NUMASTACK_GUEST") == "" {
		t.Skip("takes CPUs offline: runs with NUMASTACK_GUEST=1, in a throw-away guest only")
	}
	w := new(Watch)
	start, _, err := w.Look()
	if err != nil {
		t.Fatal(err)
	}
	all := start.AllowedCPUs
	last := all[len(all)-1]
	defer pinFirstThread(t, all, last)()
	write := func(file, content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0); err != nil {
			t.Fatal(err)
		}
	}
	look := func(what string, want []int) {
		t.Helper()
		// The kernel applies some of it later, from a kworker.
		var topology *Topology
		changed := false
		for deadline := time.Now().Add(10 * time.Second); !changed && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if topology, changed, err = w.Look(); err != nil {
				t.Fatal(err)
			}
		}
		if !changed || !slices.Equal(topology.AllowedCPUs, want) {
			t.Errorf("%s: changed %t, allowed are %v; want %v", what, changed, topology.AllowedCPUs, want)
		}
		if _, changed, err := w.Look(); changed || err != nil {
			t.Errorf("%s: changed again, or %v", what, err)
		}
	}
	online := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", last)
	write(online, "0")
	look("CPU offline", all[:len(all)-1])
	if cpu, ok := w.last.CPU(last); !ok || cpu.Online || cpu.Node < 0 {
		t.Errorf("the offline CPU is %+v, %t; want it with its node", cpu, ok)
	}
	write(online, "1")
	look("CPU online", all)

	root := cgroup2(t)
	group := root + "/numaalloc"
	write(root+"/cgroup.subtree_control", "+cpuset")
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	write(group+"/cpuset.cpus", FormatCPUList(all[1:]))
	write(group+"/cgroup.procs", fmt.Sprint(os.Getpid()))
	look("cpuset", all[1:])
	memory := start.MemoryNodes()[0]
	write(group+"/cpuset.mems", fmt.Sprint(memory))
	if len(start.MemoryNodes()) > 1 {
		look("memory of the cpuset", all[1:])
		if !slices.Equal(w.last.AllowedMemory, []int{memory}) {
			t.Errorf("allowed memory is %v, want that of node %d", w.last.AllowedMemory, memory)
		}
	}
	write(group+"/cpuset.cpus", FormatCPUList(all))
	look("wider cpuset", all)
}

// pinFirstThread pins the process's first thread, whose mask is what /proc/self
// shows. The function that it returns makes up for that.
func pinFirstThread(t *testing.T, allowed []int, cpu int) func() {
	t.Helper()
	set := func(cpus ...int) {
		mask := unix.NewCPUSet(maxCPUs)
		for _, cpu := range cpus {
			mask.Set(cpu)
		}
		if err := unix.SchedSetaffinityDynamic(os.Getpid(), mask); err != nil {
			t.Fatal(err)
		}
	}
	set(cpu)
	return func() { set(allowed...) }
}

// cgroup2 mounts the unified hierarchy.
func cgroup2(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) }) // the guest ends soon
	return root
}

func BenchmarkReadTopology(b *testing.B) {
	for b.Loop() {
		if _, err := ReadTopology(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLook(b *testing.B) {
	w := new(Watch)
	for b.Loop() {
		if _, _, err := w.Look(); err != nil {
			b.Fatal(err)
		}
	}
}
