package numaalloc

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxCPUs bounds the CPU numbers taken from a list, so that a mistyped range
// costs an error and not gigabytes. Linux is built for at most 8192
// (CONFIG_NR_CPUS); this leaves room.
const maxCPUs = 1 << 16

// ParseCPUList reads the kernel's list format, "0-3,8": numbers and ascending
// ranges between commas, blanks around them ignored. The result is ascending
// and without duplicates; an empty list gives an empty result, which is what
// the kernel prints for a node without CPUs. Strides ("0-7:2/4"), which the
// kernel reads but never prints, are refused.
func ParseCPUList(list string) ([]int, error) {
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}

	var cpus []int
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		low, err := parseCPU(list, first)
		if err != nil {
			return nil, err
		}
		high := low
		if isRange {
			if high, err = parseCPU(list, last); err != nil {
				return nil, err
			}
		}
		if high < low {
			return nil, fmt.Errorf("cpu list %q: range %q runs backwards; want the lower number first", list, part)
		}
		for cpu := low; cpu <= high; cpu++ {
			cpus = append(cpus, cpu)
		}
		// Overlapping ranges would otherwise add up to any length.
		if len(cpus) > 2*maxCPUs {
			cpus = sortedUnique(cpus)
		}
	}
	return sortedUnique(cpus), nil
}

// FormatCPUList writes CPU numbers the way ParseCPUList reads them:
// ascending, each once, neighbours joined to a range.
func FormatCPUList(cpus []int) string {
	cpus = sortedUnique(slices.Clone(cpus))

	var list strings.Builder
	for i := 0; i < len(cpus); {
		last := i
		for last+1 < len(cpus) && cpus[last+1] == cpus[last]+1 {
			last++
		}
		if i > 0 {
			list.WriteByte(',')
		}
		list.WriteString(strconv.Itoa(cpus[i]))
		if last > i {
			list.WriteByte('-')
			list.WriteString(strconv.Itoa(cpus[last]))
		}
		i = last + 1
	}
	return list.String()
}

// parseCPU reads one number of list.
func parseCPU(list, number string) (int, error) {
	// ParseUint alone would do, were it not for its error text: it names
	// neither the list nor what is accepted.
	cpu, err := strconv.ParseUint(number, 10, 32)
	if err != nil || cpu >= maxCPUs {
		return 0, fmt.Errorf("cpu list %q: %q is not a CPU number; want 0..%d, as in \"0-3,8\"", list, number, maxCPUs-1)
	}
	return int(cpu), nil
}

// sortedUnique sorts cpus in place and drops repeated numbers.
func sortedUnique(cpus []int) []int {
	slices.Sort(cpus)
	return slices.Compact(cpus)
}
