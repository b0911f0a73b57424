package integration

import (
	"fmt"
	"net"
	"testing"

	"golang.org/x/net/nettest"
)

// TestForeignNettest runs the conformance tests for net.Conn between the stack
// and the kernel.
func TestForeignNettest(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			nettest.TestConn(t, func() (dialled, accepted net.Conn, stop func(), err error) {
				l := d.listen(t)
				defer l.Close()
				if dialled, err = d.dial(t.Context(), "tcp", l.Addr().String()); err != nil {
					return nil, nil, nil, fmt.Errorf("dial: %w", err)
				}
				if accepted, err = l.Accept(); err != nil {
					_ = dialled.Close()
					return nil, nil, nil, fmt.Errorf("accept: %w", err)
				}
				return dialled, accepted, func() {
					// Some of the tests have closed them.
					_ = dialled.Close()
					_ = accepted.Close()
				}, nil
			})
		})
	})
}
