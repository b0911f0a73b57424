//go:build !linux

package main

import (
	"fmt"
	"net"
	"syscall"
	"time"
)

func setMSS(_ syscall.RawConn, mss int) error {
	return fmt.Errorf("set TCP maximum segment size %d: only done on Linux", mss)
}

func pathMSS(net.Conn) int { return 0 }

func senderState(any) (retransmits, window int64, ok bool) { return 0, 0, false }

func cpuTimes() (user, system time.Duration) { return 0, 0 }
