package integration

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// command prepares a program that ends with ctx. In a role it gets a mount
// namespace of its own, and becomes the program once it has played the role.
func command(ctx context.Context, t *testing.T, role, path string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(ctx, path, args...)
	if role != "" {
		if os.Geteuid() != 0 {
			t.Skip("needs root")
		}
		cmd = exec.CommandContext(ctx, "/proc/self/exe", append([]string{path}, args...)...)
		cmd.Env = append(os.Environ(), roleVar+"="+role)
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	}
	cmd.WaitDelay = time.Second
	return cmd
}

// process is a running application.
type process struct {
	cmd    *exec.Cmd
	out    *output
	cancel context.CancelFunc
	exited chan struct{} // closed when err is set
	err    error
}

// output collects what a process writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
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

// start runs an application and returns when it has written ready. It is killed
// when the test ends, if it did not end before.
func start(t *testing.T, role, ready, name string, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{out: new(output), cancel: cancel, exited: make(chan struct{})}
	p.cmd = command(ctx, t, role, app(t, name), args...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if err := p.cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		cancel()
		<-p.exited
		if t.Failed() {
			t.Logf("output of %s %s:\n%s", name, strings.Join(args, " "), p.out)
		}
	})
	for end := time.Now().Add(patience); !strings.Contains(p.out.String(), ready); time.Sleep(5 * time.Millisecond) {
		select {
		case <-p.exited:
			t.Fatalf("%s ended before it wrote %q: %v\n%s", name, ready, p.err, p.out)
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("%s did not write %q within %v:\n%s", name, ready, patience, p.out)
		}
	}
	return p
}

// terminate asks the process to end, as an init system does, and waits.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	select {
	case <-p.exited:
		if p.err != nil {
			t.Errorf("after SIGTERM: %v", p.err)
		}
	case <-time.After(patience):
		t.Errorf("still there %v after SIGTERM", patience)
	}
}

// run runs an application that should end by itself, and returns its standard
// error and exit status.
func run(t *testing.T, role, name string, args ...string) (stderr string, status int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := command(ctx, t, role, app(t, name), args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s %s did not end within %v:\n%s", name, strings.Join(args, " "), patience, &errs)
	case err != nil && !errors.As(err, &exit):
		t.Fatal(err)
	}
	if status = cmd.ProcessState.ExitCode(); status == roleFailed {
		t.Skipf("needs more privileges: %s", &errs)
	}
	return errs.String(), status
}
