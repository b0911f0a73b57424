package shard

import (
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

const (
	// watchdogPlaces is how many places in handlers are remembered; each is
	// reported once.
	watchdogPlaces = 256

	// watchdogPause is the least time between two reports: finding out where a
	// handler is stops the world for a moment.
	watchdogPause = time.Second
)

// watchdog looks for handlers that hold their shard. It is a goroutine of the
// Set and reads one number per shard.
type watchdog struct {
	set    *Set
	limit  time.Duration
	places map[string]bool // reported
	last   time.Time       // of the last report
	stop   chan struct{}
	ended  chan struct{}
}

func startWatchdog(set *Set, limit time.Duration) *watchdog {
	w := &watchdog{set: set, limit: limit, places: make(map[string]bool), stop: make(chan struct{}), ended: make(chan struct{})}
	go w.run()
	return w
}

func (w *watchdog) close() {
	close(w.stop)
	<-w.ended
}

func (w *watchdog) run() {
	defer close(w.ended)
	tick := time.NewTicker(w.limit)
	defer tick.Stop()
	seen := make([]uint64, len(w.set.shards))
	for {
		select {
		case <-w.stop:
			return
		case <-tick.C:
		}
		for i, s := range w.set.shards {
			// The same turn as one limit ago, and not waiting: something in
			// the turn takes that long.
			progress := s.progress.Load()
			if progress == seen[i] && !s.parked.Load() {
				w.report(s)
			}
			seen[i] = progress
		}
	}
}

// report logs which handler holds the shard, unless it is known already.
func (w *watchdog) report(s *Shard) {
	now := time.Now() //nolint:forbidigo // not on the data path
	if now.Sub(w.last) < watchdogPause || len(w.places) >= watchdogPlaces {
		return
	}
	stack, place := handlerStack()
	if place == "" || w.places[place] {
		return // the kernel has taken the CPU away, or a shard's own work takes long
	}
	w.places[place] = true
	w.last = now
	w.set.cfg.Logger.Warn("handler holds its shard, other connections wait; Offload is for such work",
		"shard", s.id, "longer_than", w.limit, "place", place, "stack", stack)
}

// handlerStack returns the stack of a handler that is running on a shard now,
// and the line of the application that it is at.
func handlerStack() (stack, place string) {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		header, frames, _ := strings.Cut(g, "\n")
		// In the state "coroutine" are a handler that waits and a shard that
		// runs one.
		if strings.Contains(header, "[coroutine") || !strings.Contains(frames, eventMark) && !strings.Contains(frames, servedMark) {
			continue
		}
		lines := strings.Split(frames, "\n")
		i := 0
		for i+1 < len(lines) && owner(lines[i]) == ownerStandard {
			i += 2
		}
		// Otherwise the stack is at work for the handler, or for itself.
		if i+1 < len(lines) && owner(lines[i]) == ownerApplication {
			place, _, _ = strings.Cut(strings.TrimSpace(lines[i+1]), " ")
			return frames, place
		}
	}
	return "", ""
}

// Functions below every handler: of events, and of coroutines.
const (
	eventMark  = "numastack/shard.(*Shard).runReady("
	servedMark = "numastack/shard.servedHandler.Open.func"
)

type frameOwner int

const (
	ownerStandard frameOwner = iota // the runtime or the standard library
	ownerStack                      // this stack or gVisor
	ownerApplication
)

// owner says whose a function is, from its line in a stack.
func owner(function string) frameOwner {
	if strings.HasPrefix(function, "gvisor.dev/") || strings.HasPrefix(function, "numastack/shard.") || strings.HasPrefix(function, "numastack/stack.") {
		return ownerStack
	}
	module, _, _ := strings.Cut(function, "/")
	if module != function && strings.Contains(module, ".") || strings.HasPrefix(function, "main.") ||
		mainModule != "" && strings.HasPrefix(function, mainModule) {
		return ownerApplication
	}
	return ownerStandard
}

// mainModule is the path of the module that the program was built from: other
// modules have a dot in the first element of theirs, the standard library does
// not.
var mainModule = func() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Path
	}
	return ""
}()
