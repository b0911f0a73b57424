// Guest runs tests of this module in throw-away virtual machines with several
// NUMA nodes, so that placement can be tested where there is something to
// choose: on any machine, by QEMU's software emulation. Speed cannot be.
//
//	go run ./integration/guest -kernel DIR [flags] package[=regexp]...
//
// It builds the test binary of each package, and those applications that
// -programs names, packs them with itself as the first process into an
// initramfs, and boots one guest after the other, one per topology. Each runs
// all of the binaries, with the regexp for -test.run, and ends.
//
//	host                                     guest
//	go test -c, go build ──► initramfs ────► /init: this program as PID 1
//	standard output      ◄── second serial ◄── the tests' output, exit status
//	shown on failure     ◄── first serial  ◄── the kernel's console
//
// The tests see NUMASTACK_GUEST=1: they may take CPUs offline, and change what
// else belongs to a whole machine.
//
// The exit status is 0 if all tests of all guests passed, else 1. DIR holds a
// Debian kernel package for amd64, unpacked; make numa fetches one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are what the command line says.
type options struct {
	kernel   string // folder of the unpacked package
	names    string // of topologies
	programs string // packages to build and install
	limit    time.Duration
	verbose  bool
	packages []string // package[=regexp]
}

func main() {
	if os.Getpid() == 1 {
		beInit()
	}
	var o options
	flag.StringVar(&o.kernel, "kernel", "", "`folder` of an unpacked Debian kernel package: boot/vmlinuz-*, lib/modules")
	flag.StringVar(&o.names, "topology", "2,ring4,odd", "`names` of topologies, of: "+topologyNames())
	flag.StringVar(&o.programs, "programs", "", "`packages` of programs that the tests run, separated by commas")
	flag.DurationVar(&o.limit, "limit", 2*time.Minute, "`time` that the tests of one guest may take; goroutines are dumped then")
	flag.BoolVar(&o.verbose, "v", false, "run tests with -test.v and show the kernel's console")
	flag.Parse()
	o.packages = flag.Args()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return fmt.Errorf("this is %s/%s; the guest's first process is this program, and its kernel wants linux/amd64", runtime.GOOS, runtime.GOARCH)
	}
	var chosen []topology
	for name := range strings.SplitSeq(o.names, ",") {
		i := slices.IndexFunc(topologies, func(t topology) bool { return t.name == name })
		if i < 0 {
			return fmt.Errorf("topology %q: want some of %s", name, topologyNames())
		}
		chosen = append(chosen, topologies[i])
	}
	if len(o.packages) == 0 {
		return errors.New("no package given, want at least one such as ./numaalloc or ./integration=TestNodes")
	}
	dir, err := os.MkdirTemp("", "numastack-guest-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // in the folder for what is temporary

	vmlinuz, initramfs, err := prepare(ctx, o, dir)
	if err != nil {
		return err
	}
	var failed []string
	for _, t := range chosen {
		fmt.Printf("== topology %s: %s\n", t.name, t.about)
		begin := time.Now()
		g := guest{topology: t, vmlinuz: vmlinuz, initramfs: initramfs, dir: dir, limit: o.limit, verbose: o.verbose}
		err := g.boot(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			failed = append(failed, t.name)
			fmt.Printf("== topology %s: %v\n", t.name, err)
		}
		fmt.Printf("== topology %s: %d s\n", t.name, int(time.Since(begin).Seconds()))
	}
	if len(failed) > 0 {
		return fmt.Errorf("tests failed in %d of %d topologies: %s", len(failed), len(chosen), strings.Join(failed, ", "))
	}
	return nil
}

// prepare builds everything that all guests boot from. It returns the paths of
// the kernel and of the initramfs.
func prepare(ctx context.Context, o options, dir string) (vmlinuz, initramfs string, err error) {
	if vmlinuz, err = one(o.kernel, "boot/vmlinuz-*"); err != nil {
		return "", "", fmt.Errorf("-kernel: %w", err)
	}
	module, err := one(o.kernel, "lib/modules/*/kernel/drivers/net/tun.ko*", "usr/lib/modules/*/kernel/drivers/net/tun.ko*")
	if err != nil {
		return "", "", fmt.Errorf("-kernel: %w", err)
	}
	work := job{Modules: []string{"/lib/modules/" + filepath.Base(module)}, Limit: o.limit}
	files := map[string]string{work.Modules[0]: module, "/init": "/proc/self/exe"}

	build := func(pkg string, args ...string) (path string, err error) {
		name := filepath.Base(pkg)
		if args[0] == "test" {
			name += ".test"
		}
		path = filepath.Join(dir, name)
		// Static, for there is nothing else in the guest; for the emulated CPU;
		// and without symbols, which tracebacks do not need: it boots faster.
		cmd := exec.CommandContext(ctx, "go", append(args, "-ldflags=-s -w", "-o", path, pkg)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOAMD64=v1")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%v: %w\n%s", cmd, err, out)
		}
		files["/bin/"+name] = path
		return "/bin/" + name, nil
	}
	for _, p := range o.packages {
		pkg, pattern, _ := strings.Cut(p, "=")
		binary, err := build(pkg, "test", "-c")
		if err != nil {
			return "", "", err
		}
		argv := []string{binary, "-test.run=" + pattern}
		if o.verbose {
			argv = append(argv, "-test.v")
		}
		work.Tests = append(work.Tests, argv)
	}
	for pkg := range strings.SplitSeq(o.programs, ",") {
		if pkg == "" {
			continue
		}
		if _, err := build(pkg, "build", "-buildvcs=false"); err != nil {
			return "", "", err
		}
	}
	initramfs = filepath.Join(dir, "initramfs")
	return vmlinuz, initramfs, writeInitramfs(initramfs, work, files)
}

// one returns the only file that the patterns match below dir.
func one(dir string, patterns ...string) (string, error) {
	var found []string
	for _, p := range patterns {
		matches, err := filepath.Glob(filepath.Join(dir, p))
		if err != nil {
			return "", err
		}
		found = append(found, matches...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d files in %q match %s, want one", len(found), dir, strings.Join(patterns, " or "))
	}
	return found[0], nil
}
