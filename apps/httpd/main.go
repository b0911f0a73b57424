// Httpd serves static files and its own state over HTTP, on a numastack or, to
// compare and to test, on the host's sockets. Two engines give the same answers:
//
//	shard    blocking handlers that run as coroutines of the shard's thread;
//	         small hot files come from memory and never leave it, everything
//	         that touches a disk runs on another thread of the node
//	nethttp  package net/http, a goroutine per connection, HTTP/2 with TLS
//
// GET and HEAD are answered, nothing else: files below -root with ranges,
// conditions, precompressed variants and directory indexes, /healthz, and
// /whereami, which tells the shard, the CPU and the NUMA node of the
// connection. Without -root, / is a short text. Files whose name begins with a
// dot, and symbolic links that leave the root, do not exist.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
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

// command runs the server until ctx ends and returns the exit status: 0, 1
// for a failure, 2 for wrong usage.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o options
	fs, userspace := newFlags(&o, stderr)
	err := cli.Parse(fs, args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err == nil {
		err = o.validate()
	}
	if err != nil {
		fmt.Fprintln(stderr, "httpd:", err)
		return 2
	}
	if err := run(ctx, &o, userspace, stdout, stderr); err != nil {
		fmt.Fprintln(stderr, "httpd:", err)
		return 1
	}
	return 0
}

// run brings up the network below the server, and takes it down after it.
func run(ctx context.Context, o *options, userspace *cli.Options, stdout, stderr io.Writer) error {
	logger := userspace.Logger(stderr)
	if o.hostSockets {
		return serve(ctx, o, host{logger}, 1, logger, stdout)
	}
	s, err := userspace.Open(logger)
	if err != nil {
		return err
	}
	ctx, lost := context.WithCancelCause(ctx)
	defer lost(nil)
	go func() {
		select {
		case <-s.Done():
			lost(s.Err())
		case <-ctx.Done():
		}
	}()
	err = serve(ctx, o, s, len(s.Stats().Shards), logger, stdout)
	return errors.Join(err, s.Err(), userspace.Finish(s, stdout))
}

// serve runs the server on n until ctx ends, then drains it.
func serve(ctx context.Context, o *options, n network, shards int, logger *slog.Logger, stdout io.Writer) (err error) {
	a := &app{options: o, peers: newPeers(o.maxConns, o.writeTimeout)}
	if o.root != "" {
		if a.site, err = openSite(o.root, o.list, logger); err != nil {
			return err
		}
		defer a.site.close()
	}
	if a.tls, err = o.tlsConfig(); err != nil {
		return err
	}
	if o.accessLog {
		a.log = newAccessLog(slog.NewTextHandler(stdout, nil))
		defer a.log.close()
	}
	var e engine
	switch o.engine {
	case engineShard:
		e = newShardEngine(a, shards)
	case engineNetHTTP:
		e = newNetEngine(a, logger)
	}
	addr, err := e.start(n)
	if err != nil {
		return err
	}
	scheme := "http"
	if a.tls != nil {
		scheme = "https"
	}
	fmt.Fprintf(stdout, "ready: %s://%s, engine %s\n", scheme, addr, o.engine)
	<-ctx.Done()

	// The stack's or the host's connections end after this, whatever their
	// requests want.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.drain)
	defer cancel()
	if err := e.drain(ctx); errors.Is(err, context.DeadlineExceeded) {
		logger.Warn("requests were cut off at the end of the drain time", "drain", o.drain)
	} else if err != nil {
		return err
	}
	return nil
}

// app is what both engines serve. It is immutable.
type app struct {
	*options
	peers *peers
	site  *site       // nil without -root
	tls   *tls.Config // nil without TLS
	log   *accessLog  // nil without -access-log
}

// engine is a server of HTTP over some network.
type engine interface {
	// start listens and serves, and returns the address it listens on.
	start(n network) (net.Addr, error)
	// drain stops accepting, waits until all running requests are answered or
	// ctx ends, and then closes what connections it can. The error is ctx's if
	// requests were left.
	drain(ctx context.Context) error
}
