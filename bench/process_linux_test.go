package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// startShell starts a shell as a server.
func startShell(t *testing.T, script string) (*process, error) {
	t.Helper()
	// The thread that starts a child has to outlive it.
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	return start(t.Context(), command{path: "/bin/sh", args: []string{"-c", script}, cpu: anyCPU, deadline: 20 * time.Second})
}

func TestProcessStop(t *testing.T) {
	tests := []struct {
		name, script, err string
	}{
		{"ends on SIGTERM", `trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done`, ""},
		{"fails on SIGTERM", `trap 'echo broken; exit 3' TERM; echo ready; while :; do sleep 0.05; done`, "exit status 3"},
		{"ignores SIGTERM", `trap '' TERM; echo ready; while :; do sleep 0.05; done`, "did not end within 2s"},
		{"gone before", `echo ready; exit 4`, "exit status 4"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, err := startShell(t, tt.script)
			if err != nil {
				t.Fatal(err)
			}
			if tt.name == "gone before" {
				<-p.exited
			}
			err = p.stop()
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error is %v, want one with %q", err, tt.err)
			}
			if err := unix.Kill(p.pid(), 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("process %d is still there: %v", p.pid(), err)
			}
		})
	}
}

func TestProcessNotReady(t *testing.T) {
	_, err := startShell(t, `echo no such device >&2; exit 5`)
	for _, want := range []string{"exit status 5", "before it was ready", "no such device"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
}

func TestProcessDeadline(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, err := runCommand(t.Context(), command{
		path: "/bin/sh", args: []string{"-c", "exec sleep 60"}, cpu: anyCPU, deadline: 50 * time.Millisecond,
	})
	if err == nil || !strings.Contains(err.Error(), "deadline exceeded") {
		t.Errorf("error is %v, want the deadline", err)
	}
}

func TestPinnedChild(t *testing.T) {
	var before, after unix.CPUSet
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	last := 0
	for cpu := range len(before) * 64 {
		if before.IsSet(cpu) {
			last = cpu
		}
	}
	out, err := runCommand(t.Context(), command{
		path: "/bin/sh", args: []string{"-c", "grep Cpus_allowed_list /proc/self/status"}, cpu: last, deadline: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(out), fmt.Sprintf("Cpus_allowed_list:\t%d\n", last); got != want {
		t.Errorf("the child has %q, want %q", got, want)
	}
	if err := unix.SchedGetaffinity(0, &after); err != nil {
		t.Fatal(err)
	}
	if after != before {
		t.Errorf("the parent's affinity is %v, was %v", after, before)
	}
}

func TestOutputReady(t *testing.T) {
	o := newOutput()
	isReady := func() bool {
		select {
		case <-o.ready:
			return true
		default:
			return false
		}
	}
	steps := []struct {
		write string
		ready bool
	}{
		{"starting\n", false},
		{"address already in use\n", false},
		{"echo: rea", false},
		{"dy on 10.99.0.2", false}, // the line is not complete
		{":7\n", true},
		{strings.Repeat("noise\n", 2*outputTail), true},
		{"ready\n", true},
	}
	for _, s := range steps {
		if _, err := o.Write([]byte(s.write)); err != nil {
			t.Fatal(err)
		}
		if isReady() != s.ready {
			t.Fatalf("after %.20q: ready is %t, want %t", s.write, isReady(), s.ready)
		}
	}
	if n := len(o.tail); n > outputTail {
		t.Errorf("%d bytes kept, want at most %d", n, outputTail)
	}
}

// Short samples of what this program serves itself, of each peer several: what the first
// leaves behind would be in the second's way.
func TestPeers(t *testing.T) {
	needSandbox(t)
	if err := prepareSandbox(); err != nil {
		t.Skip(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b := &bench{options: options{duration: 400 * time.Millisecond, idleConns: 10, cpus: [2]int{-1, -1}}, rates: map[string]float64{}}
	if err := b.chooseCPUs(); err != nil {
		t.Fatal(err)
	}
	t.Setenv(countersVar, filepath.Join(t.TempDir(), "counters.json"))
	tests := []struct {
		peer string
		rows string
	}{
		{peerGVisor, "pingpong_64"},
		{peerKernel, "pingpong_64"},
		{peerGVisor, "http"},
		{peerKernel, "http"},
		{peerKernel, "idle_net"},
		{peerGVisorGSO, "bulk_in_1,bulk_out_1,pingpong_64,udp_out"},
		{peerLimit, "bulk_in_1,bulk_out_1,bulk_out_1_mtu9000,bulk_out_1_mtu65521,udp_in_64"},
		{peerGVisor, "udp"},
		{peerKernel, "udp"},
		{peerNumastack, "udp"},
		{peerNumastack, "net"},
		{peerNumastack, "idle"},
	}
	for _, tt := range tests {
		rows, err := selectRows(tt.rows, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			var s sample
			for range 3 { // a window is short for a busy machine
				if s, err = b.sample(t.Context(), tt.peer, r); err == nil {
					break
				}
			}
			if err != nil {
				t.Errorf("%s, %s: %v", tt.peer, r.name, err)
				continue
			}
			switch {
			case r.load == loadIdle && (s.Ops != 10 || s.Memory.Heap <= 0),
				r.load != loadIdle && (s.Ops+s.Bytes == 0 || s.CPU == 0 || s.Ops < 0 || s.Bytes < 0):
				t.Errorf("%s, %s: sample is %+v", tt.peer, r.name, s)
			}
			if counted := tt.peer == peerNumastack && r.load != loadIdle; counted != (s.Traffic != nil) {
				t.Errorf("%s, %s: traffic is %+v", tt.peer, r.name, s.Traffic)
			} else if counted && (s.Traffic.RxFrames == 0 || s.Traffic.TxBytes == 0) {
				t.Errorf("%s, %s: traffic is %+v", tt.peer, r.name, *s.Traffic)
			}
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		switch name := l.Attrs().Name; name {
		case gvisorTAP, kernelClientLink, kernelServerLink, gvisorGSOClientLink, gvisorGSOServerLink, limitTAP, numastackTAP:
			t.Errorf("link %q is left behind", name)
		}
	}
}

func TestParseCPUInfo(t *testing.T) {
	model, tscHz := parseCPUInfo([]byte("processor\t: 0\nmodel name\t: Test CPU @ 3 GHz\ncpu MHz\t\t: 1200.000\nbogomips\t: 5000.00\n\n" +
		"processor\t: 1\nmodel name\t: Other\nbogomips\t: 1.00\n"))
	if model != "Test CPU @ 3 GHz" || tscHz != 2.5e9 {
		t.Errorf("got %q at %v Hz, want the first CPU at 2.5e9", model, tscHz)
	}
	if _, tscHz := parseCPUInfo([]byte("processor\t: 0\nBogoMIPS\t: 100.00\n")); tscHz != 0 {
		t.Errorf("took %v Hz from a BogoMIPS that is not the TSC's", tscHz)
	}
}
