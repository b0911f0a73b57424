package stack

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

// insideVar is set in the process that runs in the namespace.
const insideVar = "NUMASTACK_STACK_INSIDE"

// TestMain runs the tests in a network namespace of their own, for the examples
// open a TAP device. On a machine that gives none, the others run nevertheless.
func TestMain(m *testing.M) {
	var err error
	if os.Getenv(insideVar) == "" {
		var status int
		if status, err = runInside(); err == nil {
			os.Exit(status)
		}
	} else {
		var f *os.File
		if f, err = os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err == nil {
			f.Close()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "the examples are skipped, they need a network namespace with a TAP device:", err)
		flag.Parse()
		skip := "^Example"
		if given := flag.Lookup("test.skip").Value.String(); given != "" {
			skip += "|" + given
		}
		if err := flag.Set("test.skip", skip); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	runtime.GOMAXPROCS(max(4, runtime.NumCPU())) // more than shards
	slog.SetLogLoggerLevel(slog.LevelError)
	os.Exit(m.Run())
}

// runInside runs the test binary again in a new network namespace, without root
// in a new user namespace as well, and returns its exit status. The error says
// that it did not start.
func runInside() (status int, err error) {
	// The kernel kills the child when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), insideVar+"=1")
	again.Stdout, again.Stderr = os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if uid := os.Geteuid(); uid != 0 {
		again.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		again.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		again.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	if err := again.Start(); err != nil {
		return 0, err
	}
	if err := again.Wait(); err != nil {
		return max(again.ProcessState.ExitCode(), 1), nil // it has said what
	}
	return 0, nil
}
