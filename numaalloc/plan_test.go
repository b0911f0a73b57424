package numaalloc

import (
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// TestScripts runs the files in testdata: blocks of a command, a line "----" and
// what it answers. A machine, described or recorded, comes first; the plans are
// for it, and go by measured costs once some are given: a row of relative ones per
// node.
func TestScripts(t *testing.T) {
	files, err := fs.Glob(testdata, "testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts in testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(path.Base(file), ".txt"), func(t *testing.T) {
			script, err := testdata.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var topology *Topology
			var costs *Costs
			var out strings.Builder
			for i, block := range strings.Split(strings.TrimSpace(string(script)), "\n\n") {
				input, want, _ := strings.Cut(block+"\n", "----\n")
				got, err := runCommand(t, &topology, &costs, input)
				if err != nil {
					got = "error: " + err.Error() + "\n"
				}
				if got != want && !*update {
					t.Errorf("%s\ngot:\n%s\nwant:\n%s", input, got, want)
				}
				if i > 0 {
					out.WriteByte('\n')
				}
				out.WriteString(strings.TrimSuffix(input, "\n") + "\n----\n" + got)
			}
			if *update {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func runCommand(t *testing.T, topology **Topology, costs **Costs, input string) (string, error) {
	t.Helper()
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(input), "\n"), func(line string) bool { return strings.HasPrefix(line, "#") })
	words := strings.Fields(lines[0])
	var err error
	switch words[0] {
	case "costs":
		*costs, err = CostsFromDistances((*topology).CPUNodes(), (*topology).MemoryNodes(), (*topology).Distance)
		if err != nil {
			return "", err
		}
		(*costs).Source = CostsMeasured
		for i, line := range lines[1:] {
			for j, number := range strings.Fields(line) {
				if (*costs).Relative[i][j], err = strconv.ParseFloat(number, 64); err != nil {
					t.Fatal(err)
				}
			}
		}
		return (*costs).String(), nil
	case "machine":
		*costs = nil
		*topology, err = describeMachine(t, lines[1:]).source().read()
	case "recorded":
		*costs = nil
		tree := recordedTree(t, words[1])
		s := source{root: tree}
		// Nothing else than the cpuset limited the recorder.
		s.allowed = func() ([]int, error) {
			list, err := s.line(statusFile, "Cpus_allowed_list:")
			if err != nil {
				return nil, err
			}
			return ParseCPUList(list)
		}
		*topology, err = s.read()
	case "plan":
		if *topology == nil {
			t.Fatalf("%q before a machine that could be read", lines[0])
		}
		p, err := parsePlacement(words[1:])
		if err != nil {
			t.Fatal(err)
		}
		p.Costs = *costs
		plan, err := p.Plan(*topology)
		if err != nil {
			return "", err
		}
		checkPlan(t, *topology, p, plan)
		return plan.String(), nil
	default:
		t.Fatalf("command %q", lines[0])
	}
	if err != nil {
		return "", err
	}
	return detail(*topology), nil
}

// parsePlacement reads arguments such as "profile=NUMA shards=4 nodes=0-1".
func parsePlacement(args []string) (p Placement, err error) {
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		switch name {
		case "profile":
			if n, notNumber := strconv.Atoi(value); notNumber == nil {
				p.Profile = Profile(n)
			} else {
				err = p.Profile.UnmarshalText([]byte(value))
			}
		case "shards":
			p.Shards, err = strconv.Atoi(value)
		case "cpus":
			for number := range strings.SplitSeq(value, ",") {
				cpu, bad := strconv.Atoi(number)
				if bad != nil {
					return p, bad
				}
				p.CPUs = append(p.CPUs, cpu)
			}
		case "base":
			p.BaseCPU, err = strconv.Atoi(value)
		case "max":
			p.MaxCPU, err = strconv.Atoi(value)
		case "nodes":
			p.Nodes, err = ParseCPUList(value)
		case "device":
			p.Device = value
		default:
			err = fmt.Errorf("argument %q", arg)
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// checkPlan holds what is true of every plan.
func checkPlan(t *testing.T, topology *Topology, p Placement, plan *Plan) {
	t.Helper()
	if len(plan.Shards) != p.Shards {
		t.Errorf("%d shards in a plan for %d", len(plan.Shards), p.Shards)
	}
	shards := make(map[int]int) // by CPU
	for i, place := range plan.Shards {
		shards[place.CPU]++
		cpu, ok := topology.CPU(place.CPU)
		switch {
		case place.Shard != i || place.Queue != i:
			t.Errorf("place %d is of shard %d, queue %d", i, place.Shard, place.Queue)
		case !ok || !cpu.Online || !slices.Contains(topology.AllowedCPUs, place.CPU):
			t.Errorf("shard %d is on CPU %d, which is not allowed or not online", i, place.CPU)
		case cpu.Node != place.Node:
			t.Errorf("shard %d: CPU %d is on node %d, not %d", i, place.CPU, cpu.Node, place.Node)
		case place.Memory >= 0 && !slices.Contains(topology.MemoryNodes(), place.Memory):
			t.Errorf("shard %d has memory of node %d, which has none to give", i, place.Memory)
		}
	}
	if len(p.CPUs) > 0 {
		return
	}
	fewest, most := p.Shards, 0
	for _, n := range shards {
		fewest, most = min(fewest, n), max(most, n)
	}
	if most-fewest > 1 {
		t.Errorf("one CPU has %d shards, another %d", most, fewest)
	}
}

// detail prints all of a topology.
func detail(topology *Topology) string {
	var b strings.Builder
	fmt.Fprintln(&b, topology)
	for _, n := range topology.Nodes {
		fmt.Fprintf(&b, "node %d: cpus %q memory %d from %d distances %v\n", n.ID, FormatCPUList(n.CPUs), n.Memory, topology.MemoryNode(n.ID), n.Distances)
	}
	for _, c := range topology.CPUs {
		if !c.Online {
			fmt.Fprintf(&b, "cpu %d: node %d offline\n", c.ID, c.Node)
			continue
		}
		fmt.Fprintf(&b, "cpu %d: node %d package %d core %d siblings %s", c.ID, c.Node, c.Package, c.Core, FormatCPUList(c.Siblings))
		if c.CacheSize > 0 {
			fmt.Fprintf(&b, " cache %d of cpu %d", c.CacheSize, c.CacheCPU)
		}
		b.WriteByte('\n')
	}
	if len(topology.Devices) > 0 {
		fmt.Fprintf(&b, "devices: %v\n", topology.Devices)
	}
	return b.String()
}

func TestProfileText(t *testing.T) {
	for i, name := range []string{"Closest", "ClosestStatic", "NUMA", "NUMAStatic", "Conservative"} {
		var p Profile
		for _, text := range []string{name, strings.ToLower(name)} {
			if err := p.UnmarshalText([]byte(text)); err != nil || p != Profile(i) {
				t.Errorf("%q became %d, %v; want %d", text, p, err, i)
			}
		}
		if b, err := p.MarshalText(); err != nil || string(b) != name {
			t.Errorf("profile %d became %q, %v; want %q", i, b, err, name)
		}
		if p.Static() != strings.HasSuffix(name, "Static") {
			t.Errorf("%s.Static() = %t", name, p.Static())
		}
	}
	p := ProfileNUMA
	if err := p.UnmarshalText([]byte("nearest")); err == nil || !strings.Contains(err.Error(), `"nearest"`) || !strings.Contains(err.Error(), "ClosestStatic") || p != ProfileNUMA {
		t.Errorf("profile nearest: %v, and the profile is %v; want an error that names what is accepted, and NUMA", err, p)
	}
	if s := Profile(7).String(); s != "unknown(7)" {
		t.Errorf("Profile(7) is %q", s)
	}
}

// A topology that somebody wrote by hand may lack anything.
func TestPlanOfPoorTopology(t *testing.T) {
	poor := &Topology{CPUs: []CPU{{ID: 3, Online: true, Node: 1}}, AllowedCPUs: []int{2, 3}}
	for _, profile := range []Profile{ProfileClosest, ProfileNUMA, ProfileConservative} {
		plan, err := Placement{Profile: profile, Shards: 2}.Plan(poor)
		if err != nil || !slices.Equal(plan.CPUs(), []int{3, 3}) || plan.Shards[0].Memory != -1 {
			t.Errorf("%v: plan %+v, %v; want CPU 3 twice, and no memory", profile, plan, err)
		}
	}
	if plan, err := (Placement{Shards: 1}).Plan(&Topology{}); err == nil {
		t.Errorf("plan %+v for a machine without CPUs, want an error", plan)
	}
	if plan, err := (Placement{Shards: 1, CPUs: []int{2}}).Plan(poor); err == nil {
		t.Errorf("plan %+v with a CPU that does not exist, want an error", plan)
	}
}

func TestPlanOutput(t *testing.T) {
	topology, err := describeMachine(t, []string{"node 0 cpus 0-1 memory 1G distances 10"}).source().read()
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Placement{Profile: ProfileNUMAStatic, Shards: 2}.Plan(topology)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if n, err := plan.WriteTo(&b); err != nil || b.String() != plan.String() || n != int64(b.Len()) {
		t.Errorf("WriteTo = %d, %v with %q", n, err, b.String())
	}
	encoded, err := json.Marshal(plan)
	var back Plan
	if err != nil || json.Unmarshal(encoded, &back) != nil || back.String() != plan.String() {
		t.Errorf("%s became\n%s", encoded, &back)
	}
}
