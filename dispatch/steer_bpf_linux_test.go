package dispatch

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// newTestProgram returns a program, or skips the test where the kernel does not
// let us load one.
func newTestProgram(t testing.TB, k Key) *Program {
	t.Helper()
	p, err := NewProgram(k)
	if errors.Is(err, os.ErrPermission) {
		t.Skipf("loading eBPF programs is not permitted here: %v", err)
	}
	if err != nil {
		t.Fatalf("NewProgram: %+v", err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return p
}

// steer runs the program in the kernel on a frame of at least one byte. Test runs
// of socket filters begin behind an Ethernet header, so give them a second one.
func steer(t *testing.T, p *Program, frame []byte) uint32 {
	t.Helper()
	queue, err := p.prog.Run(&ebpf.RunOptions{Data: ethernet(0x88b5, frame)})
	if err != nil {
		t.Fatalf("run the steering program on %x: %v", frame, err)
	}
	return queue
}

// oneToOne sends every bucket to the queue of its number, so that a queue tells
// the bucket.
func oneToOne() (queues [Buckets]uint32) {
	for b := range queues {
		queues[b] = uint32(b)
	}
	return queues
}

func TestProgramAgreesWithParse(t *testing.T) {
	frames := 120_000
	if testing.Short() {
		frames = 12_000
	}
	k := randomKey(t)
	program := newTestProgram(t, k)
	if err := program.SetQueues(oneToOne()); err != nil {
		t.Fatal(err)
	}
	toeplitz := NewToeplitz(k)
	maker := newFrameMaker(42)
	var classes [NumClasses]int
	var p Parsed
	for n := range frames {
		frame := maker.frame()
		toeplitz.Parse(frame, &p)
		classes[p.Class]++
		if got, want := steer(t, program, frame), p.Hash%Buckets; got != want {
			t.Fatalf("frame %d: the kernel says bucket %d, Parse %d: %+v, key %x\n%x", n, got, want, p, k, frame)
		}
	}
	for c, n := range classes {
		t.Logf("%-18s %d frames", Class(c), n)
		if n < frames/1000 {
			t.Errorf("only %d of %d frames of class %s: the comparison says nothing about it", n, frames, Class(c))
		}
	}
}

func TestProgramQueues(t *testing.T) {
	program := newTestProgram(t, VerificationKey)
	frame := vectors[0].frame(t, true)
	bucket := int(vectors[0].withPorts % Buckets)

	check := func(when string, want uint32) {
		t.Helper()
		if got := steer(t, program, frame); got != want {
			t.Errorf("%s: queue %d, want %d", when, got, want)
		}
	}
	check("new program", 0)

	table := oneToOne()
	if err := program.SetQueues(table); err != nil {
		t.Fatal(err)
	}
	check("after SetQueues", uint32(bucket))
	for _, q := range []uint32{3, maxQueues - 1} {
		if err := program.SetQueue(bucket, q); err != nil {
			t.Fatal(err)
		}
		check("after SetQueue", q)
	}
	if err := program.SetQueue((bucket+1)%Buckets, 9); err != nil {
		t.Fatal(err)
	}
	check("after SetQueue of another bucket", maxQueues-1)

	for _, bad := range []struct {
		bucket int
		queue  uint32
	}{{-1, 0}, {Buckets, 0}, {bucket, maxQueues}} {
		if err := program.SetQueue(bad.bucket, bad.queue); err == nil {
			t.Errorf("SetQueue(%d, %d) succeeded", bad.bucket, bad.queue)
		}
	}
	table[bucket] = maxQueues
	if err := program.SetQueues(table); err == nil {
		t.Errorf("SetQueues with queue %d succeeded", maxQueues)
	}
	check("after refused changes", maxQueues-1)
}

func TestProgramClose(t *testing.T) {
	program := newTestProgram(t, VerificationKey)
	for range 2 {
		if err := program.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := program.SetQueue(0, 1); err == nil {
		t.Error("SetQueue succeeded on a closed program")
	}
}

func TestProgramNotPermitted(t *testing.T) {
	newTestProgram(t, VerificationKey) // skips if this process may not anyway
	allowed, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled")
	if err != nil || string(allowed) == "0\n" {
		t.Skipf("kernel.unprivileged_bpf_disabled is %q (%v): programs need no privilege", allowed, err)
	}
	got := make(chan error)
	go func() {
		// Capabilities belong to the thread; it ends with this goroutine, because
		// it stays locked.
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			got <- err
			return
		}
		p, err := NewProgram(VerificationKey)
		if err == nil {
			err = p.Close()
		}
		got <- err
	}()
	if err := <-got; !errors.Is(err, os.ErrPermission) {
		t.Errorf("without capabilities: error %v, want os.ErrPermission", err)
	}
}

func BenchmarkProgram(b *testing.B) {
	program := newTestProgram(b, VerificationKey)
	for _, bench := range []struct {
		name string
		v    vector
	}{{"ip=4", vectors[0]}, {"ip=6", vectors[len(vectors)-1]}} {
		b.Run(bench.name, func(b *testing.B) {
			in := ethernet(0x88b5, bench.v.frame(b, true))
			// The kernel repeats and times by itself; its time replaces ours.
			_, perRun, err := program.prog.Benchmark(in, 100_000, b.ResetTimer)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(perRun.Nanoseconds()), "ns/op")
		})
	}
}
