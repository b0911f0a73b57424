//go:build !linux

package main

import "os"

func beInit() { os.Exit(1) }
