package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// wrkReport makes wrk print its exact figures: its usual output rounds them, and leaves
// out errors where there are none. Durations are in µs. A script without a request function
// does not run while wrk measures (wrk's SCRIPTING).
const wrkReport = `
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"duration":%d,"p50":%d,"p99":%d,"max":%d,"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    e.connect, e.read, e.write, e.status, e.timeout))
end
`

// wrk runs wrk on this process's CPU for Duration, rounded up to seconds as wrk wants it,
// and notes the server's CPU time around it.
func (s clientSpec) wrk(port uint16) (sample, error) {
	script, err := memoryFile("report.lua", wrkReport)
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = script.Close() }()
	seconds := int((s.Duration + time.Second - 1) / time.Second)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(seconds)*time.Second+stallTimeout)
	defer cancel()
	const scriptFD = 3 // the first of ExtraFiles
	cmd := exec.CommandContext(ctx, s.Wrk, "-t1", "-c"+strconv.Itoa(s.Conns), "-d"+strconv.Itoa(seconds)+"s",
		"-s/proc/self/fd/"+strconv.Itoa(scriptFD),
		"http://"+net.JoinHostPort(s.Server.String(), strconv.Itoa(int(port)))+"/")
	cmd.ExtraFiles = []*os.File{script}
	// The kernel kills wrk when the thread that started it dies.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	before, err := processCPU(s.ServerPID)
	if err != nil {
		return sample{}, err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return sample{}, fmt.Errorf("wrk: %w: %s", err, out)
	}
	after, err := processCPU(s.ServerPID)
	if err != nil {
		return sample{}, err
	}
	result, err := parseWrk(out)
	if err != nil {
		return sample{}, err
	}
	result.CPU = after - before
	return result, nil
}

// parseWrk reads what wrkReport prints at the end of wrk's output. An error that wrk has met
// is an error here.
func parseWrk(out []byte) (sample, error) {
	var r struct {
		Requests, Duration, P50, P99, Max int64
		Errors                            struct{ Connect, Read, Write, Status, Timeout int64 }
	}
	last := out[bytes.LastIndexByte(bytes.TrimSpace(out), '\n')+1:]
	if err := json.Unmarshal(last, &r); err != nil {
		return sample{}, fmt.Errorf("wrk printed %q, which does not end with its figures: %w", out, err)
	}
	switch e := r.Errors; {
	case e.Connect+e.Read+e.Write+e.Status+e.Timeout > 0:
		return sample{}, fmt.Errorf("wrk met errors: %d connect, %d read, %d write, %d timeout, %d answers other than 2xx and 3xx",
			e.Connect, e.Read, e.Write, e.Timeout, e.Status)
	case r.Requests == 0 || r.Duration == 0:
		return sample{}, errors.New("wrk got no answer")
	}
	us := func(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
	return sample{Elapsed: us(r.Duration), Ops: r.Requests, P50: us(r.P50), P99: us(r.P99), Max: us(r.Max)}, nil
}

// memoryFile returns a file that exists only as long as it is open.
func memoryFile(name, content string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteString(content); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write %s: %w", name, err)
	}
	return f, nil
}
