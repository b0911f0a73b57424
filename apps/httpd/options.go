package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"numastack/apps/internal/cli"
)

// The engines.
const (
	engineShard   = "shard"
	engineNetHTTP = "nethttp"
)

// options are the values of httpd's own flags.
type options struct {
	listen      string // host:port
	root        string // a directory; empty: no files
	list        bool
	engine      string
	hostSockets bool
	accessLog   bool

	tlsCert, tlsKey string
	tlsSelfSigned   bool

	// What a client may take. All are positive.
	headerTimeout time.Duration // from the first chance to send a header to its end
	readTimeout   time.Duration // for a whole request
	writeTimeout  time.Duration // for the client to take the next piece of an answer
	idleTimeout   time.Duration // between two requests
	maxHeader     int           // bytes
	maxBody       int           // bytes
	maxConns      int

	cacheMB int // of small files in memory, with engine shard
	drain   time.Duration
}

// newFlags registers httpd's flags and those that all applications share.
func newFlags(o *options, w io.Writer) (*flag.FlagSet, *cli.Options) {
	fs := flag.NewFlagSet("httpd", flag.ContinueOnError)
	fs.SetOutput(w)
	fs.Usage = func() {
		fmt.Fprint(w, "Usage: httpd [flags]\n\nServes static files over HTTP on a numastack, or with -host-sockets on the host's\n"+
			"sockets. Without the latter it needs CAP_NET_ADMIN, or a TAP device made for this\nuser; the flags of the stack are then in use too.\n\n")
		fs.PrintDefaults()
	}
	userspace := cli.Flags(fs)
	fs.StringVar(&o.listen, "listen", "", "`port` or host:port to listen on (default 80, with TLS 443)")
	fs.StringVar(&o.root, "root", "", "`directory` of the files to serve; without it / is a short text")
	fs.BoolVar(&o.list, "list", false, "list directories that have no index.html")
	fs.StringVar(&o.engine, "engine", engineShard, "`who` serves: shard (coroutines on the shards' threads) or nethttp (net/http)")
	fs.BoolVar(&o.hostSockets, "host-sockets", false, "use the host's sockets instead of a numastack")
	fs.BoolVar(&o.accessLog, "access-log", false, "log every request to standard output")
	fs.StringVar(&o.tlsCert, "tls-cert", "", "PEM `file` of the certificate chain; turns TLS on")
	fs.StringVar(&o.tlsKey, "tls-key", "", "PEM `file` of the certificate's private key")
	fs.BoolVar(&o.tlsSelfSigned, "tls-self-signed", false, "TLS with a certificate made at start")
	fs.DurationVar(&o.headerTimeout, "header-timeout", 5*time.Second, "longest `time` for a request's header to arrive")
	fs.DurationVar(&o.readTimeout, "read-timeout", 10*time.Second, "longest `time` for a whole request to arrive")
	fs.DurationVar(&o.writeTimeout, "write-timeout", 30*time.Second, "longest `time` for a client to take the next piece (up to 1 MiB) of an answer")
	fs.DurationVar(&o.idleTimeout, "idle-timeout", time.Minute, "longest `time` between two requests on a connection")
	fs.IntVar(&o.maxHeader, "max-header", 8<<10, "largest header of a request in `bytes`, 4096 to 1048576; engine shard keeps a buffer of this size per connection")
	fs.IntVar(&o.maxBody, "max-body", 64<<10, "largest body of a request in `bytes`; no request needs one")
	fs.IntVar(&o.maxConns, "max-conns", 10000, "`number` of connections served at a time")
	fs.IntVar(&o.cacheMB, "cache", 64, "`MiB` of memory for small files, with engine shard; 0: none")
	fs.DurationVar(&o.drain, "drain", 5*time.Second, "`time` that running requests have after SIGTERM")
	return fs, userspace
}

// validate completes the options. The error names the flag and what it takes.
func (o *options) validate() error {
	if o.listen == "" {
		o.listen = ":80"
		if o.tlsSelfSigned || o.tlsCert != "" {
			o.listen = ":443"
		}
	}
	if !strings.Contains(o.listen, ":") {
		o.listen = ":" + o.listen
	}
	if _, port, err := net.SplitHostPort(o.listen); err != nil || !isPort(port) {
		return fmt.Errorf("-listen is %q, want a port or host:port", o.listen)
	}
	if o.engine != engineShard && o.engine != engineNetHTTP {
		return fmt.Errorf("-engine is %q, want %s or %s", o.engine, engineShard, engineNetHTTP)
	}
	switch {
	case o.list && o.root == "":
		return errors.New("-list needs -root")
	case (o.tlsCert == "") != (o.tlsKey == ""):
		return errors.New("-tls-cert and -tls-key need each other")
	case o.tlsCert != "" && o.tlsSelfSigned:
		return errors.New("-tls-self-signed makes a certificate, -tls-cert names one; want one of them")
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{
		{"-header-timeout", o.headerTimeout},
		{"-read-timeout", o.readTimeout},
		{"-write-timeout", o.writeTimeout},
		{"-idle-timeout", o.idleTimeout},
		{"-drain", o.drain},
	} {
		if d.value <= 0 {
			return fmt.Errorf("%s is %v, want more than 0", d.flag, d.value)
		}
	}
	if o.readTimeout < o.headerTimeout {
		return fmt.Errorf("-read-timeout is %v, want at least -header-timeout, %v", o.readTimeout, o.headerTimeout)
	}
	for _, n := range []struct {
		flag            string
		value, min, max int
	}{
		{"-max-header", o.maxHeader, 4096, 1 << 20},
		{"-max-body", o.maxBody, 1, 1 << 30},
		{"-max-conns", o.maxConns, 1, 1 << 24},
		{"-cache", o.cacheMB, 0, 1 << 20},
	} {
		if n.value < n.min || n.value > n.max {
			return fmt.Errorf("%s is %d, want %d to %d", n.flag, n.value, n.min, n.max)
		}
	}
	return nil
}

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}
