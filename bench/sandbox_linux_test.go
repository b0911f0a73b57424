package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
)

// errNoSandbox says why the tests run without a namespace of their own, or is nil.
var errNoSandbox error

// TestMain runs the tests again in a network namespace of their own, as the command does
// with itself. Children that a test starts come here too, in their hidden role.
func TestMain(m *testing.M) {
	if args := os.Args[1:]; len(args) == 2 && (args[0] == roleServe || args[0] == roleClient) {
		os.Exit(mainStatus(args))
	}
	if inSandbox() {
		if err := linkUp("lo"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	err := enterSandbox(context.Background(), os.Args[1:], "")
	if status, ok := errors.AsType[statusError](err); ok {
		os.Exit(int(status))
	}
	if err != nil {
		errNoSandbox = err
		os.Exit(m.Run())
	}
}

// needSandbox skips a test that sends packets where it may not have a namespace for them.
func needSandbox(t *testing.T) {
	t.Helper()
	if errNoSandbox != nil {
		t.Skipf("sends packets, so it needs a network namespace of its own: %v", errNoSandbox)
	}
}
