package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
)

// serveKernel serves with package net in the namespace that this process was started in.
// It waits for a byte on stdin, which says that the namespace's link is there.
func serveKernel(ctx context.Context, ready func()) error {
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("wait for link %q: %w", kernelServerLink, err)
	}
	if err := addressLink(kernelServerLink, kernelServer+"/24"); err != nil {
		return err
	}
	var lc net.ListenConfig
	return serve(ctx, allServices, func(port uint16) (net.Listener, error) {
		return lc.Listen(ctx, "tcp4", net.JoinHostPort(kernelServer, strconv.Itoa(int(port))))
	}, ready)
}
