package main

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// logBacklog is how many requests may wait to be written, some 100 bytes each.
const logBacklog = 4096

// request is a line of the access log.
type request struct {
	at           time.Time
	peer         string
	method, path string
	status       int
	bytes        int64 // of the answer's body; with engine shard, its length even if the client left before its end
	took         time.Duration
	shard        int // -1 on host sockets
}

// accessLog writes a line per request. A shard must not wait for a disk or a
// pipe, so a goroutine writes, and what it cannot keep up with is counted
// instead.
type accessLog struct {
	handler slog.Handler
	queue   chan request // never closed: a request that was cut off may end late
	stop    chan struct{}
	lost    atomic.Uint64
	ended   sync.WaitGroup
}

func newAccessLog(h slog.Handler) *accessLog {
	l := &accessLog{handler: h, queue: make(chan request, logBacklog), stop: make(chan struct{})}
	l.ended.Go(func() {
		for {
			select {
			case r := <-l.queue:
				l.write(r)
			case <-l.stop:
				l.writeWaiting()
				return
			}
			if len(l.queue) == 0 {
				l.writeLost()
			}
		}
	})
	return l
}

// add logs r, or counts it if the log is behind. It does not wait.
func (l *accessLog) add(r request) {
	select {
	case l.queue <- r:
	default:
		l.lost.Add(1)
	}
}

func (l *accessLog) write(r request) {
	line := slog.NewRecord(r.at, slog.LevelInfo, "request", 0)
	line.AddAttrs(slog.String("peer", r.peer), slog.String("method", r.method), slog.String("path", r.path),
		slog.Int("status", r.status), slog.Int64("bytes", r.bytes), slog.Duration("took", r.took))
	if r.shard >= 0 {
		line.AddAttrs(slog.Int("shard", r.shard))
	}
	_ = l.handler.Handle(context.Background(), line) // there is nowhere to tell
}

func (l *accessLog) writeLost() {
	if n := l.lost.Swap(0); n > 0 {
		line := slog.NewRecord(time.Now(), slog.LevelWarn, "requests are missing here, the log was behind", 0)
		line.AddAttrs(slog.Uint64("requests", n))
		_ = l.handler.Handle(context.Background(), line)
	}
}

// writeWaiting writes the rest of the queue.
func (l *accessLog) writeWaiting() {
	for {
		select {
		case r := <-l.queue:
			l.write(r)
		default:
			l.writeLost()
			return
		}
	}
}

// close writes what waits. Requests that end later are not logged.
func (l *accessLog) close() {
	close(l.stop)
	l.ended.Wait()
}
