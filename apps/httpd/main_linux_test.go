package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestMain runs the tests in a network namespace of their own, which has
// nothing but a loopback device, and checks that no goroutine is left.
func TestMain(m *testing.M) {
	const inside = "HTTPD_TEST_IN_NETNS"
	if os.Getenv(inside) == "" {
		again := exec.Command("/proc/self/exe", os.Args[1:]...)
		again.Env = append(os.Environ(), inside+"=1")
		again.Stdout, again.Stderr = os.Stdout, os.Stderr
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := again.Run()
		var exit *exec.ExitError
		switch {
		case err == nil:
			os.Exit(0)
		case errors.As(err, &exit):
			os.Exit(1)
		}
		fmt.Fprintf(os.Stderr, "no network namespace (%v): only tests without a network run\n", err)
		errNoNetwork = err
	} else if err := loopbackUp(); err != nil {
		fmt.Fprintln(os.Stderr, "loopback device:", err)
		os.Exit(1)
	}
	before := runtime.NumGoroutine() + 1 // fasthttp's clock for the Date header stays
	code := m.Run()
	for end := time.Now().Add(3 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > before && code == 0 {
		stacks := make([]byte, 1<<20)
		fmt.Fprintf(os.Stderr, "%d goroutines allowed after the tests, %d are left:\n%s", before, n, stacks[:runtime.Stack(stacks, true)])
		code = 1
	}
	os.Exit(code)
}

// errNoNetwork is why tests that send packets cannot run.
var errNoNetwork error

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// bothEngines runs a test per engine.
func bothEngines(t *testing.T, test func(t *testing.T, engine string)) {
	for _, engine := range []string{engineShard, engineNetHTTP} {
		t.Run(engine, func(t *testing.T) { test(t, engine) })
	}
}

// server is a running httpd.
type server struct {
	addr   string
	stop   context.CancelFunc // as SIGTERM does
	done   chan int           // its exit status
	stdout *output
	stderr *output
}

// start runs httpd on the loopback device until the test ends.
func start(t *testing.T, args ...string) *server {
	t.Helper()
	return startOn(t, append([]string{"-host-sockets", "-listen", "127.0.0.1:0"}, args...)...)
}

func startOn(t *testing.T, args ...string) *server {
	t.Helper()
	if errNoNetwork != nil {
		t.Skipf("needs a network namespace: %v", errNoNetwork)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &server{stop: cancel, done: make(chan int, 1), stdout: &output{}, stderr: &output{}}
	go func() { s.done <- command(ctx, args, s.stdout, s.stderr) }()
	t.Cleanup(func() {
		cancel()
		select {
		case code := <-s.done:
			if code != 0 {
				t.Errorf("exit status %d: %s", code, s.stderr)
			}
		case <-time.After(10 * time.Second):
			t.Error("the server did not end within 10 s")
		}
		if t.Failed() {
			t.Logf("standard output:\n%s\nstandard error:\n%s", s.stdout, s.stderr)
		}
	})
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, after, ok := strings.Cut(s.stdout.String(), "://"); ok {
			s.addr, _, _ = strings.Cut(after, ",")
			return s
		}
		if len(s.done) > 0 {
			break
		}
	}
	t.Fatalf("not ready: %s", s.stderr)
	return nil
}

// ended waits for the server's end and returns how long that took.
func (s *server) ended(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	select {
	case code := <-s.done:
		s.done <- code // for the cleanup
	case <-time.After(10 * time.Second):
		t.Fatal("the server did not end within 10 s")
	}
	return time.Since(began)
}

// output is a buffer for several goroutines.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// dial connects to the server; no test waits for longer than 5 s.
func (s *server) dial(t *testing.T) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c, bufio.NewReader(c)
}

// write writes to a connection.
func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

// curl runs the real client and returns what it prints.
func curl(t *testing.T, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("needs curl")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, path, append([]string{"-sS", "--noproxy", "*"}, args...)...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		t.Fatalf("curl %q: %v: %s", args, err, errs.String())
	}
	return out.String()
}
