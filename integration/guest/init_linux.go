package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// beInit is the guest's first process: it runs the tests, says how they ended,
// and ends the guest.
func beInit() {
	out, err := setup()
	if err == nil {
		fmt.Fprintln(out, helloLine)
		var status int
		if status, err = work(out); err == nil {
			fmt.Fprintf(out, "%s%d\n", statusLine, status)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest's first process:", err) // to the console
	}
	if out != nil {
		_ = unix.IoctlSetInt(int(out.Fd()), unix.TCSBRK, 1) // tcdrain(3)
	}
	// QEMU ends instead. Without the right to, the kernel panics when we return,
	// with the same effect.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// setup mounts what every process expects and opens the way out.
func setup() (*os.File, error) {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return nil, err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	out, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	mode, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", out.Name(), err)
	}
	mode.Oflag &^= unix.OPOST // a line ends with a newline
	if err := unix.IoctlSetTermios(int(out.Fd()), unix.TCSETS, mode); err != nil {
		return nil, fmt.Errorf("%s: %w", out.Name(), err)
	}
	return out, nil
}

// work does the job and returns the exit status: that of the last test binary
// that failed.
func work(out *os.File) (status int, err error) {
	b, err := os.ReadFile(jobFile)
	if err != nil {
		return 0, err
	}
	var todo job
	if err := json.Unmarshal(b, &todo); err != nil {
		return 0, fmt.Errorf("%s: %w", jobFile, err)
	}
	for _, m := range todo.Modules {
		if err := loadModule(m); err != nil {
			return 0, fmt.Errorf("load %s: %w", m, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), todo.Limit)
	defer cancel()
	for _, argv := range todo.Tests {
		begin := time.Now()
		verdict := "ok  "
		if err := runTest(ctx, out, argv); err != nil {
			status, verdict = 1, "FAIL"
			fmt.Fprintln(out, err)
		}
		fmt.Fprintf(out, "%s %s %.1f s\n", verdict, filepath.Base(argv[0]), time.Since(begin).Seconds())
	}
	return status, nil
}

// runTest runs a test binary. Its goroutines are dumped when ctx is over.
func runTest(ctx context.Context, out *os.File, argv []string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Dir = "/tmp"
	cmd.Env = []string{"NUMASTACK_GUEST=1", "NUMASTACK_PROGRAMS=/bin", "PATH=/bin", "HOME=/tmp"}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("%s: the time is over: %w", argv[0], err)
	}
	return err
}

// loadModule loads a module of the kernel, which decompresses it if need be.
func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(name, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}
