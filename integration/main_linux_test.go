package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// insideVar is set in the process that runs in the namespace.
const insideVar = "NUMASTACK_INTEGRATION_INSIDE"

// procs is GOMAXPROCS of the tests: more than the shards of any stack here, or
// the clients would wait behind the shards' threads.
const procs = 8

// missing is why no test can run, or nil.
var missing error

// TestMain runs the tests in a network namespace of their own. All threads of
// the process are in it, so it does not matter which of them opens a socket.
func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" {
		fmt.Fprintln(os.Stderr, "play role:", playRole(role, os.Args[1:]))
		os.Exit(roleFailed)
	}
	if os.Getenv(insideVar) == "" {
		status, err := runInside()
		if err == nil {
			os.Exit(status)
		}
		missing = fmt.Errorf("a network namespace: %w", err)
	} else if missing = prepare(); missing == nil {
		names.missing = useNameServer()
	}
	runtime.GOMAXPROCS(max(procs, runtime.NumCPU()))
	before := runtime.NumGoroutine()
	status := m.Run()
	if err := errors.Join(goroutinesAtMost(before), removeApps()); err != nil {
		fmt.Fprintln(os.Stderr, "after all tests:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

// runInside runs the test binary again in a new network and a new mount
// namespace, without root in a new user namespace as well, and returns its exit
// status. The error says that it did not start.
func runInside() (status int, err error) {
	// The kernel kills the child when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), insideVar+"=1")
	again.Stdout, again.Stderr = os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWNET,
		Unshareflags: unix.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	if uid := os.Geteuid(); uid != 0 {
		again.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
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

// prepare brings the loopback device up and looks for the TAP driver.
func prepare() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("the loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("the loopback device: %w", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	return unix.Close(fd)
}

// needNetwork skips a test that cannot have a namespace with a TAP device.
func needNetwork(t *testing.T) {
	t.Helper()
	if missing != nil {
		t.Skipf("needs %v", missing)
	}
}

// goroutinesAtMost waits until no more than limit goroutines are left.
func goroutinesAtMost(limit int) error {
	for end := time.Now().Add(3 * time.Second); runtime.NumGoroutine() > limit; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			return fmt.Errorf("%d goroutines, want at most %d:\n%s",
				runtime.NumGoroutine(), limit, stacks[:runtime.Stack(stacks, true)])
		}
	}
	return nil
}

// apps are the applications, built by the first test that needs one.
var apps struct {
	once sync.Once
	dir  string
	err  error
}

// programsVar names the folder of the applications where there is no Go to build
// them: in a guest.
const programsVar = "NUMASTACK_PROGRAMS"

// app returns the path of the built application.
func app(t *testing.T, name string) string {
	t.Helper()
	if dir := os.Getenv(programsVar); dir != "" {
		return dir + "/" + name
	}
	apps.once.Do(func() {
		apps.dir, apps.err = os.MkdirTemp("", "numastack-integration-") //nolint:usetesting // outlives the test
		if apps.err != nil {
			return
		}
		// Some are run by another user.
		if apps.err = os.Chmod(apps.dir, 0o755); apps.err != nil {
			return
		}
		// Every module was there to build this package, so none is fetched.
		out, err := exec.Command("go", "build", "-buildvcs=false", "-o", apps.dir+"/", "numastack/apps/echo", "numastack/apps/iperf3").CombinedOutput()
		if err != nil {
			apps.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if apps.err != nil {
		t.Fatalf("build the applications: %v", apps.err)
	}
	return apps.dir + "/" + name
}

func removeApps() error {
	if apps.dir == "" {
		return nil
	}
	return os.RemoveAll(apps.dir)
}
