package main

import (
	"testing"
	"time"
)

func TestParseCPUUse(t *testing.T) {
	const stat = "cpu  99 99 99 99 99 99 99 99 0 0\n" +
		"cpu0 100 20 3 5000 7 900 80 4 50 60\n" +
		"cpu1 1 1 1 1 1 1 1 1 0 0\n" +
		"cpu10 7 7 7 7 7 7 7 7 0 0\n" +
		"intr 1 2 3\n"
	for _, tt := range []struct {
		cpus []int
		want time.Duration
	}{
		{[]int{0}, 1270 * time.Millisecond},
		{[]int{0, 1}, 1310 * time.Millisecond},
	} {
		if got, err := parseCPUUse([]byte(stat), tt.cpus); err != nil || got != tt.want {
			t.Errorf("CPUs %v: %v, error %v, want %v", tt.cpus, got, err, tt.want)
		}
	}
	if got, err := parseCPUUse([]byte(stat), []int{0, 2}); err == nil {
		t.Errorf("a CPU that is not there: %v, want an error", got)
	}
	if got, err := parseCPUUse([]byte("cpu0 1 1 x 1 1 1 1 1 0 0\n"), []int{0}); err == nil {
		t.Errorf("a word for a count: %v, want an error", got)
	}
}

func TestForeign(t *testing.T) {
	before := cpuUse{at: time.Unix(100, 0), all: 50 * time.Second, own: 5 * time.Second}
	for _, tt := range []struct {
		all, own time.Duration
		want     float64
	}{
		{18, 18, 0},
		{18, 13, 0.25},
		{20, 0, 1},
		{10, 11, 0}, // the kernel counts ticks
	} {
		use := cpuUse{at: time.Unix(110, 0), all: before.all + tt.all*time.Second, own: before.own + tt.own*time.Second}
		if got := use.foreign(before, 2); got != tt.want {
			t.Errorf("%d s of CPU in 10 s on 2 CPUs, %d s of them ours: %v, want %v", tt.all, tt.own, got, tt.want)
		}
	}
}

func TestReadCPUUse(t *testing.T) {
	use, err := readCPUUse(0)
	if err != nil {
		t.Skip(err) // this process may be kept from CPU 0
	}
	if use.all <= 0 || use.own <= 0 {
		t.Errorf("use is %+v, want some", use)
	}
}
