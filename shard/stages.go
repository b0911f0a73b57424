package shard

import "numastack/numaalloc"

// A stage is a part of a shard's turn.
type stage int

// In the order in which a frame meets them.
const (
	stageRead        stage = iota // the system calls that read frames from the TAP queue
	stageSteer                    // parse, hash, look up the owner; hand over, take what was handed over
	stageDeliver                  // IP, and queueing segments on their connections
	stageTCP                      // TCP of the connections that got segments, and their acknowledgements
	stageTimers                   // timers of the netstacks, delayed acknowledgements
	stageApplication              // handlers, coroutines, requests of other goroutines; TCP of what they send
	stageFlush                    // the system calls that write frames
	stageWait                     // blocked; spinning is no stage, as it finds no work
	numStages
)

var stageNames = [numStages]string{"read", "steer", "deliver", "tcp", "timers", "application", "flush", "wait"}

// timedTurns is how many turns there are to one whose stages are timed: to look
// at the clock before and after each stage of each turn would cost several
// percent of short ones.
const timedTurns = 16

// StageCounters is how long a stage took in the turns that were timed: one of
// 16 of those that did work. Each wait is timed.
type StageCounters struct {
	Stage string `json:"stage"`
	Count uint64 `json:"count"`    // timed turns in which the stage took any time
	Total uint64 `json:"total_ns"` // in all of them
	Max   uint64 `json:"max_ns"`   // in one of them
}

// Average returns the time in nanoseconds that the stage takes in a turn, or 0
// before the first one.
func (c StageCounters) Average() float64 {
	if c.Count == 0 {
		return 0
	}
	return float64(c.Total) / float64(c.Count)
}

// stageTimes times the stages of a turn. Owned by the shard's thread.
type stageTimes struct {
	turns  uint  // that did work since one was timed
	timing bool  // in this turn
	now    stage // that the turn is in
	since  int64
	turn   [numStages]int64 // in this turn
	sums   [numStages]StageCounters
}

// begin starts a turn at the given time. Whether it does work is not known yet, so
// all are timed until one does.
func (t *stageTimes) begin(at int64) {
	if t.timing = t.turns == timedTurns-1; t.timing {
		t.now, t.since, t.turn = stageRead, at, [numStages]int64{}
	}
}

// enter ends a stage and begins another one. A turn may come back to a stage.
func (s *Shard) enter(next stage) {
	t := &s.stages
	if !t.timing || t.now == next {
		return
	}
	at := s.readClock()
	t.turn[t.now] += at - t.since
	t.now, t.since = next, at
}

// endStages ends a turn. A turn without work does not count.
func (s *Shard) endStages(worked bool) {
	t := &s.stages
	if !worked {
		return
	}
	if !t.timing {
		t.turns++
		return
	}
	t.timing, t.turns = false, 0
	t.turn[t.now] += s.readClock() - t.since
	if numaalloc.CurrentCPU() != s.cpu {
		s.counters.Astray++
	}
	for i, d := range t.turn {
		t.add(stage(i), d)
	}
}

func (t *stageTimes) add(st stage, d int64) {
	if d <= 0 {
		return
	}
	c := &t.sums[st]
	c.Count++
	c.Total += uint64(d)
	c.Max = max(c.Max, uint64(d))
}

// counters copies the sums.
func (t *stageTimes) counters() []StageCounters {
	all := t.sums
	for i := range all {
		all[i].Stage = stageNames[i]
	}
	return all[:]
}
