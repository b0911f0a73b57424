package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
)

// memory is what a Go process occupies, or by how much that grew; in bytes.
type memory struct {
	RSS    int64 `json:"rss"`    // pages present, shared ones included
	Heap   int64 `json:"heap"`   // live objects
	Stacks int64 `json:"stacks"` // spans of goroutine stacks, those of coroutines included
}

func (m memory) minus(before memory) memory {
	return memory{RSS: m.RSS - before.RSS, Heap: m.Heap - before.Heap, Stacks: m.Stacks - before.Stacks}
}

// takeMemory collects garbage, gives free pages back to the kernel and returns what is
// left in this process.
func takeMemory() (memory, error) {
	runtime.GC()         // moves pooled objects to the pools' victims,
	debug.FreeOSMemory() // which its own collection then frees
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	rss, err := residentBytes()
	return memory{RSS: rss, Heap: int64(stats.HeapAlloc), Stacks: int64(stats.StackInuse)}, err
}

// residentBytes reads the exact sum; statm's counters may lag by some pages per CPU
// (linux/Documentation/filesystems/proc.rst).
func residentBytes() (int64, error) {
	const path = "/proc/self/smaps_rollup"
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read the resident memory: %w", err)
	}
	return parseRSS(content)
}

func parseRSS(rollup []byte) (int64, error) {
	for line := range bytes.Lines(rollup) {
		var kib int64
		if _, err := fmt.Sscanf(string(line), "Rss: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("no line \"Rss: ... kB\" in %q", rollup)
}

// tellMemory writes this process's memory as JSON and ends the connection.
func tellMemory(c net.Conn) {
	m, err := takeMemory()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return // the client misses its answer
	}
	_ = json.NewEncoder(c).Encode(m) // the client misses it as well
}
