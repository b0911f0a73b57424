package main

import (
	"errors"
	"fmt"
	"slices"
)

// minShare is what must be left of a ratio to gVisor that a result file has. Hosts differ and
// are shared, so less than half tells of a mistake, and more tells nothing.
const minShare = 0.5

// minShareElsewhere is minShare where the file is of another model of CPU, or of a kernel
// with another bound for its lists of free pages. Caches make bulk rows differ most:
// bulk_out_8 was 83 times as fast as gVisor on an AMD EPYC, and 32 times on an Intel Xeon of
// the same day.
const minShareElsewhere = 0.25

// shortfalls returns the rows whose ratio to gVisor is under minShare of that in base, and why.
// Absolute figures are not looked at.
func (rep *report) shortfalls(base *report) (rows, why []string, err error) {
	share := minShare
	if here, there := rep.Environment, base.Environment; here.CPU != there.CPU || here.PageLists != there.PageLists {
		share = minShareElsewhere
	}
	compared := 0
	for _, r := range rep.Rows {
		i := slices.IndexFunc(base.Rows, func(b rowReport) bool { return b.Name == r.Name && b.Better == r.Better })
		if i < 0 {
			continue
		}
		ratio, want := r.over(peerNumastack, peerGVisor), base.Rows[i].over(peerNumastack, peerGVisor)
		if ratio == nil || want == nil {
			continue
		}
		compared++
		limit, bad := *want*share, *ratio < *want*share
		bound := "at least"
		if r.Better == betterLower {
			limit, bad = *want/share, *ratio > *want/share
			bound = "at most"
		}
		if bad {
			rows = append(rows, r.Name)
			why = append(why, fmt.Sprintf("%s: %.2f× gVisor, must be %s %.2f× (the file has %.2f×)", r.Name, *ratio, bound, limit, *want))
		}
	}
	if compared == 0 {
		return nil, nil, errors.New("-check: no row has samples of numastack and gvisor both here and in the file")
	}
	return rows, why, nil
}
