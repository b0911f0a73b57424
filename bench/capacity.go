package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// What capacity follows from. A core spends
//
//	CPU time = frames × perFrame + bytes × perByte                               (a)
//
// and two rows with frames of different sizes give both unknowns. On a link of R bit/s,
// frames of s bytes on average come at a rate of at most
//
//	frames/s = R / (8 × (s + wireOverhead))                                      (b)
//
// and so a link needs, and a core carries,
//
//	cores = frames/s × (perFrame + s × perByte)                                  (c)
//	R of one core = 8 × (s + wireOverhead) / (perFrame + s × perByte)            (d)

// wireOverhead is what a frame takes on a wire beside its bytes from the header on:
// preamble and start 8, frame check sequence 4, gap 12 (IEEE 802.3, clause 3 and 4.4.2).
const wireOverhead = 24

// Frames that Ethernet or a TAP carries, in bytes from the Ethernet header on: the least
// without its check sequence, and a GSO frame with the largest IP packet.
const (
	minFrame = 60
	maxFrame = 14 + 65535
)

// linkGbit are the links of the capacity table.
var linkGbit = []float64{10, 25, 40, 100}

// frameMix is a distribution of frame sizes.
type frameMix []frameShare

// frameShare is the share of all frames, 0 to 1, that have bytes, from the Ethernet header on.
type frameShare struct {
	bytes int
	share float64
}

// defaultMixes are: the smallest frame, full ones of MTU 1500 and 9000, and the largest GSO
// frame, which a TAP or a card with TSO and LRO carries whole.
var defaultMixes = []frameMix{{{64, 1}}, {{1514, 1}}, {{9014, 1}}, {{maxFrame, 1}}}

// parseMix reads SIZE:SHARE[,SIZE:SHARE...].
func parseMix(list string) (frameMix, error) {
	bad := func(why string) error {
		return fmt.Errorf("-mix %q: %s: must be SIZE:SHARE,... such as 1514:0.5,64:0.5, sizes %d to %d bytes, shares that add up to 1",
			list, why, minFrame, maxFrame)
	}
	var (
		mix frameMix
		sum float64
	)
	for part := range strings.SplitSeq(list, ",") {
		size, share, ok := strings.Cut(part, ":")
		if !ok {
			return nil, bad(fmt.Sprintf("%q has no colon", part))
		}
		n, err := strconv.Atoi(size)
		if err != nil || n < minFrame || n > maxFrame {
			return nil, bad(fmt.Sprintf("size %q", size))
		}
		f, err := strconv.ParseFloat(share, 64)
		if err != nil || !(f > 0 && f <= 1) {
			return nil, bad(fmt.Sprintf("share %q", share))
		}
		mix = append(mix, frameShare{n, f})
		sum += f
	}
	if math.Abs(sum-1) > 0.001 {
		return nil, bad(fmt.Sprintf("the shares add up to %g", sum))
	}
	return mix, nil
}

// mean returns the average size in bytes.
func (m frameMix) mean() float64 {
	var sum float64
	for _, f := range m {
		sum += float64(f.bytes) * f.share
	}
	return sum
}

func (m frameMix) String() string {
	parts := make([]string, len(m))
	for i, f := range m {
		parts[i] = strconv.Itoa(f.bytes)
		if len(m) > 1 {
			parts[i] += fmt.Sprintf(":%g", f.share)
		}
	}
	return strings.Join(parts, ",")
}

// cost is (a), in seconds of CPU.
type cost struct{ perFrame, perByte float64 }

// fitCost solves (a) for two samples.
func fitCost(large, small traffic) (cost, error) {
	det := small.frames()*large.bytes() - large.frames()*small.bytes()
	c := cost{
		perFrame: (small.CPUSeconds*large.bytes() - large.CPUSeconds*small.bytes()) / det,
		perByte:  (small.frames()*large.CPUSeconds - large.frames()*small.CPUSeconds) / det,
	}
	if !(c.perFrame > 0 && c.perByte > 0) || math.IsInf(c.perFrame+c.perByte, 0) {
		return cost{}, fmt.Errorf("no cost of a frame and a byte fits: %.3g s of CPU for %.0f frames of %.0f bytes, %.3g s for %.0f of %.0f",
			large.CPUSeconds, large.frames(), large.bytes()/large.frames(), small.CPUSeconds, small.frames(), small.bytes()/small.frames())
	}
	return c, nil
}

func (c cost) frame(bytes float64) float64 { return c.perFrame + bytes*c.perByte }

// cores is (c), gbit one core's (d).
func (c cost) cores(linkGbit, bytes float64) float64 {
	return linkGbit * 1e9 / 8 / (bytes + wireOverhead) * c.frame(bytes)
}

func (c cost) gbit(bytes float64) float64 {
	return (bytes + wireOverhead) * 8 / c.frame(bytes) / 1e9
}

// minSpread is how many times as large the frames of one row must be as those of the other
// for their difference to tell the cost of a byte.
const minSpread = 4

// costOf fits the cost of a direction, "_in" or "_out" as the loads are called: its row of
// TCP with the largest frames and its row with the smallest, or requests on many connections
// where it has no small ones. Rows in which the server spins tell no cost, nor do those of other doors than
// events, whose frames cost more.
func (rep *report) costOf(direction string) (c cost, from [2]string, err error) {
	size := func(t *traffic) float64 { return t.bytes() / t.frames() }
	var large, small, requests *traffic
	var smallName, requestsName string
	for _, r := range rep.Rows {
		t := typical(r.Traffic)
		if t == nil || r.Spin || r.Door != doorEvents || !(t.frames() > 0) {
			continue
		}
		if r.Load == loadPingPong && r.Conns > 1 && (requests == nil || size(t) < size(requests)) {
			requests, requestsName = t, r.Name
		}
		if !strings.HasSuffix(string(r.Load), direction) {
			continue
		}
		if r.Load == load("bulk"+direction) && (large == nil || size(t) > size(large)) {
			large, from[0] = t, r.Name
		}
		if small == nil || size(t) < size(small) {
			small, smallName = t, r.Name
		}
	}
	if large != nil && size(large) < minSpread*size(small) {
		small, smallName = requests, requestsName
	}
	if large == nil || small == nil {
		return cost{}, from, fmt.Errorf("needs frame counters of two rows without spinning, a bulk%s and one with frames of under 1/%d of its size, such as pingpong_64",
			direction, minSpread)
	}
	from[1] = smallName
	c, err = fitCost(*large, *small)
	return c, from, err
}

// capacitySheet shows how many cores links need, and what one core carries.
func (rep *report) capacitySheet(mixes []frameMix) (sheet, error) {
	s := sheet{
		name: "capacity", title: "Capacity",
		head: []string{"direction", "frame bytes", "ns/frame", "one core: frames/s", "Gbit/s"},
	}
	for _, l := range linkGbit {
		s.head = append(s.head, fmt.Sprintf("cores for %g Gbit/s", l))
	}
	var errs []error
	for _, direction := range []string{"in", "out"} {
		c, from, err := rep.costOf("_" + direction)
		if err != nil {
			errs = append(errs, fmt.Errorf("direction %s: %w", direction, err))
			continue
		}
		for _, m := range mixes {
			mean := m.mean()
			cells := []string{
				direction, m.String(), whole(c.frame(mean) * 1e9), whole(1 / c.frame(mean)), figure(new(c.gbit(mean))),
			}
			for _, l := range linkGbit {
				cells = append(cells, figure(new(c.cores(l, mean))))
			}
			s.line(cells...)
		}
		s.notes = append(s.notes, fmt.Sprintf("%s: %.0f ns for a frame and %.3f ns for a byte, from rows %s and %s",
			direction, c.perFrame*1e9, c.perByte*1e9, from[0], from[1]))
	}
	p := paperHost
	s.notes = append(s.notes,
		fmt.Sprintf("frame sizes are from the Ethernet header on, on a wire each takes %d bytes more; the other direction's small frames (ACKs, answers) are left out", wireOverhead),
		fmt.Sprintf("the paper's host by the same reckoning: %g cycles/byte × 10 Gbit/s / 8 / %g GHz = %.0f cores",
			p.cyclesPerByte, p.hz/1e9, p.cyclesPerByte*10e9/8/p.hz))
	return s, errors.Join(errs...)
}

// writeCapacity prints that for a terminal. An empty mix means the usual ones.
func (rep *report) writeCapacity(w io.Writer, mix frameMix) error {
	mixes := slices.Clone(defaultMixes)
	if mix != nil {
		mixes = []frameMix{mix}
	}
	s, err := rep.capacitySheet(mixes)
	if len(s.lines) == 0 {
		return err
	}
	return errors.Join(writeSheets(w, rep.Environment.where()+"\n\n", []sheet{s}), err)
}
