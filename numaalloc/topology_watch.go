package numaalloc

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// Watch follows the topology. The kernel does not tell a process without rights
// when a CPU goes offline or its cpuset changes, so ask: Look is made to be
// called every quarter of a second. The zero value is ready; one goroutine at a
// time may use it.
type Watch struct {
	from source // the zero value stands for this machine
	last *Topology
	seen string // the signs that last was read after
}

// signFiles are those of which at least one changes when CPUs or memory come or
// go.
var signFiles = [...]string{cpuDir + "/online", nodeDir + "/has_memory"}

// Look returns the topology, and whether it differs from that of the Look before
// in the sense of Equal; the first one always does. A Look that finds nothing
// new reads three small files and asks for the cpuset: 150 µs.
//
// With an error the topology is the last one, nil if there is none, and the next
// Look tries again.
func (w *Watch) Look() (t *Topology, changed bool, err error) {
	if w.from.root == nil {
		w.from = machine()
	}
	seen, err := w.from.signs()
	if err != nil {
		return w.last, false, fmt.Errorf("topology: %w", err)
	}
	if w.last != nil && seen == w.seen {
		return w.last, false, nil
	}
	if t, err = w.from.read(); err != nil {
		return w.last, false, fmt.Errorf("topology: %w", err)
	}
	// Read before the topology: what changes in between shows next time.
	w.seen = seen
	changed = !t.Equal(w.last)
	w.last = t
	return t, changed, nil
}

// signs returns a text that changes whenever the topology may have.
func (s source) signs() (string, error) {
	allowed, err := s.allowed()
	if err != nil {
		return "", err
	}
	memory, err := s.line(statusFile, memsLabel)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	signs := []string{FormatCPUList(allowed), memory}
	for _, file := range signFiles {
		text, err := s.text(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		signs = append(signs, text)
	}
	return strings.Join(signs, "\n"), nil
}
