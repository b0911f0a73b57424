package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The hidden roles of this program: "-serve <serverSpec as JSON>" and "-client <clientSpec
// as JSON>".
const (
	roleServe  = "-serve"
	roleClient = "-client"
)

const (
	readyTimeout = 10 * time.Second
	stopTimeout  = 2 * time.Second // between SIGTERM and SIGKILL
	outputTail   = 512             // bytes of a child's output that an error quotes
)

// readyLine is what a server prints when it serves: ours the first word, iperf3 the second.
// Whole words only, because errors like "already in use" come before.
var readyLine = regexp.MustCompile(`\b(ready|listening)\b`)

// anyCPU leaves a child's affinity as it is.
const anyCPU = -1

func runRole(ctx context.Context, role, argument string) error {
	if role == roleServe {
		return serveRole(ctx, argument)
	}
	var spec clientSpec
	if err := json.Unmarshal([]byte(argument), &spec); err != nil {
		return fmt.Errorf("client specification %q: %w", argument, err)
	}
	s, err := spec.run()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

// command describes a child process.
type command struct {
	path     string
	args     []string
	cpu      int // or anyCPU
	deadline time.Duration
	// ownNetwork starts the child in a new network namespace.
	ownNetwork bool
	// beforeReady runs after the start and before the child is waited for. What it
	// writes to stdin reaches the child.
	beforeReady func(pid int, stdin io.Writer) error
}

// process is a running child. The kernel kills it when the thread that started it dies,
// so start must be called on a thread that lives as long as the program: main locks its
// goroutine to one.
type process struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	out    *output
	exited chan struct{} // closed when err is set
	err    error
}

// start runs a server and returns when it has printed a readyLine.
func start(ctx context.Context, c command) (*process, error) {
	ctx, cancel := context.WithTimeout(ctx, c.deadline)
	p := &process{cancel: cancel, out: newOutput(), exited: make(chan struct{})}
	p.cmd = childCommand(ctx, c)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start %s: %w", c.path, err)
	}
	if err := startOn(c.cpu, p.cmd); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	if c.beforeReady != nil {
		if err := c.beforeReady(p.pid(), stdin); err != nil {
			return nil, errors.Join(err, p.stop())
		}
	}

	select {
	case <-p.out.ready:
		return p, nil
	case <-p.exited:
		err = fmt.Errorf("%w before it was ready", p.exitError())
	case <-time.After(readyTimeout):
		err = fmt.Errorf("%s printed no line with the word ready within %v; it printed %q", shortName(p.cmd), readyTimeout, p.out)
	case <-ctx.Done():
		err = ctx.Err()
	}
	p.kill()
	return nil, err
}

// run starts a client, waits for it and returns what it wrote to stdout.
func runCommand(ctx context.Context, c command) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.deadline)
	defer cancel()
	cmd := childCommand(ctx, c)
	stdout, stderr := new(bytes.Buffer), newOutput()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := startOn(c.cpu, cmd); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s: stopped: %w", shortName(cmd), context.Cause(ctx))
		}
		return stdout.Bytes(), fmt.Errorf("%s: %w: %s", shortName(cmd), err, stderr)
	}
	return stdout.Bytes(), nil
}

func childCommand(ctx context.Context, c command) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.path, c.args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		// A terminal's interrupt goes to us alone; children are stopped in order.
		Setpgid: true,
	}
	if c.ownNetwork {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNET
	}
	cmd.WaitDelay = stopTimeout
	return cmd
}

// startOn starts cmd pinned to a CPU: a child inherits the affinity of the thread that
// forks it, and its runtime sizes GOMAXPROCS by it.
func startOn(cpu int, cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if cpu != anyCPU {
		var before, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &before); err != nil {
			return fmt.Errorf("read the CPU affinity: %w", err)
		}
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return fmt.Errorf("pin to CPU %d: %w", cpu, err)
		}
		defer func() { _ = unix.SchedSetaffinity(0, &before) }() // it was accepted before
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", shortName(cmd), err)
	}
	return nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop asks the child to end and kills it when it does not. It returns an error when the
// child had ended before, or did not end well.
func (p *process) stop() error {
	defer p.cancel()
	select {
	case <-p.exited:
		return fmt.Errorf("%w before it was stopped", p.exitError())
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.kill()
		return fmt.Errorf("stop %s: %w", shortName(p.cmd), err)
	}
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		p.kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM", shortName(p.cmd), stopTimeout)
	}
	if p.err != nil {
		return p.exitError()
	}
	return nil
}

// kill ends the child without asking and waits for it.
func (p *process) kill() {
	p.cancel()
	<-p.exited
}

// exitError must be called after exited is closed.
func (p *process) exitError() error {
	if p.err == nil {
		return fmt.Errorf("%s ended (it printed %q)", shortName(p.cmd), p.out)
	}
	return fmt.Errorf("%s ended with %w (it printed %q)", shortName(p.cmd), p.err, p.out)
}

// shortName is the program, and its role when the program is this one.
func shortName(cmd *exec.Cmd) string {
	name := cmd.Path[strings.LastIndexByte(cmd.Path, '/')+1:]
	if len(cmd.Args) > 1 && (cmd.Args[1] == roleServe || cmd.Args[1] == roleClient) {
		name += " " + cmd.Args[1]
	}
	return name
}

// output keeps the end of what a child prints and notices the line that says ready.
type output struct {
	ready chan struct{}

	mu   sync.Mutex
	seen bool
	tail []byte
}

var _ io.Writer = (*output)(nil)

func newOutput() *output { return &output{ready: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tail = append(o.tail, b...)
	if !o.seen {
		// Only a complete line counts.
		for line := range bytes.Lines(o.tail) {
			if bytes.HasSuffix(line, []byte("\n")) && readyLine.Match(line) {
				o.seen = true
				close(o.ready)
				break
			}
		}
	}
	if extra := len(o.tail) - outputTail; extra > 0 {
		o.tail = append(o.tail[:0], o.tail[extra:]...)
	}
	return len(b), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.TrimSpace(string(o.tail))
}
