package integration

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"numastack/numaalloc"
	"numastack/stack"
)

// steered returns how often the kernel woke cpu up to take frames over from another one:
// received_rps of softnet_seq_show in net/core/net-procfs.c.
func steered(t *testing.T, cpu int) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		t.Fatal(err)
	}
	const receivedRPS, index = 9, 12
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) <= index {
			t.Skip("this kernel does not tell which CPU a line of /proc/net/softnet_stat is of")
		}
		if id, err := strconv.ParseUint(fields[index], 16, 32); err == nil && int(id) == cpu {
			n, err := strconv.ParseUint(fields[receivedRPS], 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("CPU %d is not in /proc/net/softnet_stat", cpu)
	return 0
}

// TestHostCPUs: the kernel goes on with what two shards send on another CPU,
// where the same bytes arrive in the same order.
func TestHostCPUs(t *testing.T) {
	needNetwork(t)
	topology, err := numaalloc.ReadTopology()
	if err != nil {
		t.Fatal(err)
	}
	cpus := topology.AllowedCPUs
	if len(cpus) < 2 {
		t.Skip("it takes two CPUs: one for the shards, one for the kernel")
	}
	shards, host := cpus[0], cpus[1]
	r := open(t, stack.Config{Shards: 2, CPUs: []int{shards}, HostCPUs: []int{host}})
	r.serveEcho(t, nil)
	before := steered(t, host)
	const conns, size = 16, 1 << 20
	for i := range conns {
		for _, f := range r.families() {
			if err := exchange(dialTCP(t, f.self, echoPort), payload(uint64(i), size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Nothing else on the machine makes the kernel do that.
	if steered(t, host) == before {
		t.Errorf("the kernel took no frame over on CPU %d", host)
	}
}
