package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	// bootLimit is how long a guest may take beyond its tests: it boots in 3 to
	// 6 s here.
	bootLimit = 90 * time.Second

	// boots is how often a guest is started that ends before its first process
	// has said a word. Under these settings none of 60 did; others crashed.
	boots = 2

	// consoleTail is how much of the kernel's console is shown after a failure.
	consoleTail = 4 << 10

	// What the guest's first process says, with the exit status behind the
	// second one.
	helloLine  = "guest: hello"
	statusLine = "guest: exit status "
)

// guest is one virtual machine.
type guest struct {
	topology           topology
	vmlinuz, initramfs string // paths
	dir                string // for its files
	limit              time.Duration
	verbose            bool
}

// boot runs the guest until it ends. It returns nil if all of its tests passed.
func (g *guest) boot(ctx context.Context) error {
	for n := 1; ; n++ {
		r, err := g.bootOnce(ctx)
		if err == nil && r.status == "0" {
			return nil
		}
		if g.verbose || r.status == "" {
			fmt.Printf("-- console of the guest's kernel:\n%s\n--\n", r.console)
		}
		switch {
		case r.status != "":
			return fmt.Errorf("exit status %s", r.status)
		case ctx.Err() != nil || r.hello || n == boots:
			return fmt.Errorf("the guest ended without an answer: %w", err)
		}
		fmt.Printf("== the guest did not boot (%v), trying again\n", err)
	}
}

// result is what came out of a guest.
type result struct {
	hello   bool   // its first process has run
	status  string // exit status; empty: it did not say
	console []byte // the end of it
}

func (g *guest) bootOnce(ctx context.Context) (r result, err error) {
	ctx, cancel := context.WithTimeout(ctx, g.limit+bootLimit)
	defer cancel()
	output, theirs, err := os.Pipe()
	if err != nil {
		return r, err
	}
	defer output.Close()
	console := filepath.Join(g.dir, "console")
	args := append(g.topology.args(),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35",
		// With a thread per CPU, and with cmpxchg16b, QEMU 7.2 crashed guests in
		// a third of the boots: its cmpxchg16b corrupts flags. Single-threaded,
		// a CPU that spins keeps the others from running until its turn is over.
		"-accel", "tcg,thread=single", "-cpu", "max,la57=off,-cx16",
		"-kernel", g.vmlinuz, "-initrd", g.initramfs,
		// A panic ends the guest; nobody attacks it.
		"-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=1",
		"-serial", "file:"+console,
		"-chardev", "file,id=out,path=/dev/fd/3", "-serial", "chardev:out",
	)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.ExtraFiles = []*os.File{theirs}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return r, err
	}
	for lines := bufio.NewScanner(output); lines.Scan(); {
		line := lines.Text()
		switch status, ends := strings.CutPrefix(line, statusLine); {
		case ends:
			r.status = status
		case line == helloLine:
			r.hello = true
		default:
			fmt.Println(line)
		}
	}
	_, _ = io.Copy(io.Discard, output) // what no scanner takes, a line too long
	if err = cmd.Wait(); err != nil {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w after %v", ctx.Err(), g.limit+bootLimit)
	}
	r.console, _ = os.ReadFile(console) // none is as good as an empty one
	r.console = r.console[max(0, len(r.console)-consoleTail):]
	return r, err
}
