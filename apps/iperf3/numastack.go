package main

import (
	"flag"
	"io"

	"numastack/apps/internal/cli"
)

// userspace starts and stops the stack that the common flags describe.
type userspace struct{ flags *cli.Options }

// newUserspace registers the flags of the stack.
func newUserspace(fs *flag.FlagSet) userspace { return userspace{cli.Flags(fs)} }

// open starts the stack. What it logs, and its counters when closed, go to w: the report alone is on standard output.
// Closing it twice is not allowed.
func (u userspace) open(w io.Writer) (n network, closeStack func() error, err error) {
	s, err := u.flags.Open(u.flags.Logger(w))
	if err != nil {
		return nil, nil, err
	}
	return s, func() error { return u.flags.Finish(s, w) }, nil
}

// printStackFlags describes the flags of the stack.
func printStackFlags(w io.Writer) {
	fs := flag.NewFlagSet("stack", flag.ContinueOnError)
	fs.SetOutput(w)
	cli.Flags(fs)
	_, _ = io.WriteString(w, "\nThe stack (without -host-sockets):\n")
	fs.PrintDefaults()
}
