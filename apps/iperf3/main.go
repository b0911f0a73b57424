package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"numastack/apps/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command runs one command line and returns the exit status: 0, 1 for a failed test, 2 for wrong usage.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) (code int) {
	var o options
	fs := newFlags(&o, stderr)
	stack := newUserspace(fs)
	switch err := cli.Parse(fs, args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "iperf3: %v\n", err)
		return 2
	}
	if err := o.validate(fs.Args()); err != nil {
		fmt.Fprintf(stderr, "iperf3: %v\n", err)
		return 2
	}
	var net network = host{mss: o.mss}
	if !o.hostSockets {
		n, closeStack, err := stack.open(stderr)
		if err != nil {
			fmt.Fprintf(stderr, "iperf3: error - %v\n", err)
			return 1
		}
		defer func() {
			if err := closeStack(); err != nil {
				fmt.Fprintf(stderr, "iperf3: error - close the stack: %v\n", err)
				code = max(code, 1)
			}
		}()
		net = n
	}
	if err := start(ctx, net, &o, stdout, stderr); err != nil {
		fmt.Fprintf(stderr, "iperf3: error - %v\n", err)
		return 1
	}
	return 0
}

// start runs the server or the client over n.
func start(ctx context.Context, n network, o *options, stdout, stderr io.Writer) error {
	if o.host == "" {
		return newServer(n, o, stdout, stderr).serve(ctx)
	}
	var report reporter = &text{w: stdout, client: true}
	if o.json {
		report = &document{w: stdout}
	}
	l := defaultLimits
	l.handshake = o.connectTimeout
	return (&client{net: n, options: o, limits: l, report: report}).run(ctx)
}
