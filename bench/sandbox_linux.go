package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Variables by which the command finds, in the namespace, what was prepared outside.
const (
	sandboxVar = "NUMASTACK_BENCH_SANDBOX" // "1" inside
	appsVar    = "NUMASTACK_BENCH_APPS"    // folder of the built applications

	congestionVar = "NUMASTACK_BENCH_CONGESTION" // the value of -congestion, for servers in other namespaces
)

func inSandbox() bool { return os.Getenv(sandboxVar) == "1" }

// enterSandbox runs this program again in a network namespace of its own, which has no
// device but an idle loopback, and returns when it has ended. Without root it takes a user
// namespace as well, where the system allows one. ctx ends the inner program politely.
func enterSandbox(ctx context.Context, args []string, apps string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's file: %w", err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), sandboxVar+"=1", appsVar+"="+apps)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * stopTimeout
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true,
	}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("this system does not let user %d make a network namespace; run as root: %w", os.Geteuid(), err)
		}
		return fmt.Errorf("start in a network namespace: %w", err)
	}
	err = cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return statusError(exit.ExitCode())
	}
	return err
}

// prepareSandbox checks what the namespace has to allow.
func prepareSandbox() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w: a TAP needs the tun module, and read and write access to this file", err)
	}
	_ = unix.Close(fd)
	return linkUp("lo")
}

const congestionFile = "/proc/sys/net/ipv4/tcp_congestion_control" // of the namespace that opens it

// setTCP gives the sockets of this network namespace the run's congestion control, and has
// the kernel forget a peer after each connection: a loss in one sample would else make the
// windows of all later ones small (tcp_metrics(8)).
func setTCP() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_no_metrics_save", []byte("1"), 0); err != nil {
		return fmt.Errorf("keep TCP's metrics out of later samples: %w", err)
	}
	name := os.Getenv(congestionVar)
	if name == "" {
		return nil
	}
	if err := os.WriteFile(congestionFile, []byte(name), 0); err != nil {
		accepted, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
		return fmt.Errorf("set congestion control %q: %w: accepted are %s", name, err, strings.Join(strings.Fields(string(accepted)), ", "))
	}
	return nil
}

// congestion returns the congestion control of this network namespace.
func congestion() string {
	b, _ := os.ReadFile(congestionFile)
	return strings.TrimSpace(string(b))
}

// buildApps compiles the applications into a new folder, outside the namespace because
// the go command may have to fetch modules. The caller removes the folder.
func buildApps(ctx context.Context, names ...string) (string, error) {
	dir, err := os.MkdirTemp("", "numastack-bench-")
	if err != nil {
		return "", fmt.Errorf("make a folder for the applications: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	args := []string{"build", "-o", dir + "/"}
	for _, name := range names {
		args = append(args, "numastack/apps/"+name)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		_ = os.RemoveAll(dir)
		return "", fmt.Errorf("go build the applications (run inside the module, or give -apps): %w\n%s", err, out)
	}
	return dir, nil
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %q: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %q up: %w", name, err)
	}
	return nil
}

// addressLink gives a link its address and MTU and sets it up.
func addressLink(name, prefix string, mtu int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %q: %w", name, err)
	}
	addr, err := netlink.ParseAddr(prefix)
	if err != nil {
		return fmt.Errorf("parse address %q: %w", prefix, err)
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU %d on link %q: %w", mtu, name, err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to link %q: %w", prefix, name, err)
	}
	return linkUp(name)
}
