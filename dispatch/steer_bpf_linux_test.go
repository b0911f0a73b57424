package dispatch

import (
	"encoding/binary"
	"errors"
	"iter"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// newTestProgram returns a program, or skips the test where the kernel does not
// let us load one.
func newTestProgram(t testing.TB, toeplitz *Toeplitz) *Program {
	t.Helper()
	p, err := NewProgram(toeplitz)
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

// The kernel and user space have to say the same of every frame. What both say
// is checked against the model in TestParseMatchesModel; here it names the rules.
func TestProgramAgreesWithParse(t *testing.T) {
	rules := map[string]int{}
	cuts := cutFrames(t)
	forAllTypes(t, func(k Key, types HashTypes, frames iter.Seq[[]byte]) {
		toeplitz := NewToeplitzTypes(k, types)
		program, err := NewProgram(toeplitz)
		if errors.Is(err, os.ErrPermission) {
			t.Skipf("loading eBPF programs is not permitted here: %v", err)
		}
		if err != nil {
			t.Fatalf("types %s: %+v", types, err)
		}
		defer func() {
			if err := program.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}()
		if err := program.SetQueues(oneToOne()); err != nil {
			t.Fatal(err)
		}
		check := func(frame []byte) {
			t.Helper()
			want, rule := steeringModel{k, types}.parse(frame)
			rules[rule]++
			var p Parsed
			toeplitz.Parse(frame, &p)
			if got := steer(t, program, frame); got != p.Hash%Buckets || p != want {
				t.Fatalf("the kernel says bucket %d, Parse %d, the model %d by rule %q: types %s, key %x, %+v\n%x",
					got, p.Hash%Buckets, want.Hash%Buckets, rule, types, k, p, frame)
			}
		}
		for frame := range frames {
			check(frame)
		}
		if types == HashAll || types == 0 {
			for _, frame := range cuts {
				check(frame)
			}
		}
	})
	checkRules(t, rules)
}

func TestProgramQueues(t *testing.T) {
	program := newTestProgram(t, NewToeplitz(VerificationKey))
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

	mark := binary.BigEndian.AppendUint16(ethernet(etherTypeMarker, nil), 77)
	if got := steer(t, program, mark); got != 77 {
		t.Errorf("mark for queue 77: queue %d", got)
	}
	if got := steer(t, program, mark[:len(mark)-1]); got != 0 {
		t.Errorf("truncated mark: queue %d, want the one of bucket 0", got)
	}

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
	program := newTestProgram(t, NewToeplitz(VerificationKey))
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
	newTestProgram(t, NewToeplitz(VerificationKey)) // skips if this process may not anyway
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
		p, err := NewProgram(NewToeplitz(VerificationKey))
		if err == nil {
			err = p.Close()
		}
		got <- err
	}()
	if err := <-got; !errors.Is(err, os.ErrPermission) {
		t.Errorf("without capabilities: error %v, want os.ErrPermission", err)
	}
}

func TestLoadError(t *testing.T) {
	refused := &ebpf.VerifierError{Cause: unix.EACCES, Log: []string{"misaligned stack access"}}
	if err := loadError(refused); errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), refused.Log[0]) {
		t.Errorf("refused by the verifier: error %v, want its words and not os.ErrPermission", err)
	}
	if err := loadError(&ebpf.VerifierError{Cause: unix.EPERM}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("not permitted: error %v, want os.ErrPermission", err)
	}
}

func BenchmarkProgram(b *testing.B) {
	program := newTestProgram(b, NewToeplitz(VerificationKey))
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
