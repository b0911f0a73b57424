//go:build !linux

package main

import (
	"context"
	"errors"
)

// The roles do not exist elsewhere; the names keep main.go the same everywhere.
const (
	roleServe  = "-serve"
	roleClient = "-client"
)

var errNotLinux = errors.New("needs Linux: namespaces, TAP and veth")

func run(context.Context, options, []string) error { return errNotLinux }

func runRole(context.Context, string, string) error { return errNotLinux }
