package main

import (
	"errors"
	"flag"
	"io"
	"log/slog"
)

// openStack registers the options of the userspace stack and returns what starts it.
func openStack(*flag.FlagSet) func(*slog.Logger) (network, io.Closer, error) {
	return func(*slog.Logger) (network, io.Closer, error) {
		return nil, nil, errors.New("the userspace stack is not linked into this program: use -host-sockets")
	}
}

// printStackFlags describes the options of the userspace stack.
func printStackFlags(io.Writer) {}
