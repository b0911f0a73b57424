package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// trafficReport is testReport with frame counters, a peer that only the file knows, and a
// second MTU, as a full run has them.
func trafficReport(t *testing.T) *report {
	t.Helper()
	rep := testReport()
	rep.Environment.GVisor = "v0.0.0-20260101000000-0123456789ab"
	for i := range rep.Rows {
		r := &rep.Rows[i]
		switch r.Name {
		case "bulk_in_1":
			// 40,000 frames in of 60 KB and 40,000 ACKs of 66 bytes: at 2 µs and 0.3 ns they
			// take 0.88079... s.
			r.Traffic = []traffic{
				{Seconds: 1, CPUSeconds: 0.8807920, Payload: 2_400_000_000, RxFrames: 40_000, RxBytes: 2_400_000_000, TxFrames: 40_000, TxBytes: 2_640_000, Turns: 20_000, Wakes: 400, Stages: []stageTime{
					{"read", 1250, 40_000_000, 300_000}, {"tcp", 1000, 10_000_000, 90_000}, {"timers", 0, 0, 0}, {"wait", 500, 70_000_000, 2_000_000},
				}},
				{Seconds: 1, CPUSeconds: 0.5, Payload: 1_000_000_000, RxFrames: 20_000, RxBytes: 1_000_000_000, TxFrames: 20_000, TxBytes: 1_320_000},
				{Seconds: 1, CPUSeconds: 0.9, Payload: 2_600_000_000, RxFrames: 50_000, RxBytes: 2_600_000_000, TxFrames: 40_000, TxBytes: 2_640_000},
			}
			r.Samples[peerLimit] = []float64{60, 60, 60}
		case "bulk_out_1":
			// The same costs for 30,000 frames out of 65,000 bytes and 10,000 ACKs in.
			r.Traffic = []traffic{
				{Seconds: 1, CPUSeconds: 0.6651980, Payload: 1_950_000_000, RxFrames: 10_000, RxBytes: 660_000, TxFrames: 30_000, TxBytes: 1_950_000_000, Wakes: 0},
			}
		case "pingpong_1": // spins, which tells neither costs nor stages
			r.Traffic = []traffic{{
				Seconds: 2, CPUSeconds: 2, RxFrames: 10_000, RxBytes: 1_300_000, TxFrames: 10_000, TxBytes: 1_300_000,
				Stages: []stageTime{{"read", 625, 1_000_000, 2_000}},
			}}
		case "pingpong_64":
			// 100,000 requests of 130 bytes, and as many answers.
			r.Traffic = []traffic{
				{Seconds: 2, CPUSeconds: 0.4078, RxFrames: 100_000, RxBytes: 13_000_000, TxFrames: 100_000, TxBytes: 13_000_000, Wakes: 5},
			}
		case "bulk_in_8":
			r.Name, r.MTU, r.Conns = "bulk_in_1_9000", 9000, 1
		}
	}
	return rep
}

// A file says all that the report said.
func TestResultRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "result.json")
	want := trafficReport(t)
	f, err := createResult(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	if err := f.write(want); err != nil {
		t.Fatal(err)
	}
	f.discard() // has nothing to remove now
	got, err := readResult(path)
	if err != nil {
		t.Fatal(err)
	}
	// Empty maps are left out of files.
	for _, rep := range []*report{got, want} {
		for i := range rep.Rows {
			r := &rep.Rows[i]
			for _, m := range []*map[string]float64{&r.CPU, &r.P50, &r.P99, &r.Max, &r.Heap, &r.Stacks} {
				if len(*m) == 0 {
					*m = nil
				}
			}
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("read\n%+v\nof what was\n%+v", got, want)
	}
}

// A run that does not get to its end leaves the old file alone, and no other.
func TestResultDiscard(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "result.json")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := createResult(path)
	if err != nil {
		t.Fatal(err)
	}
	f.discard()
	if content, err := os.ReadFile(path); err != nil || string(content) != "old" {
		t.Errorf("the old file has %q, error %v", content, err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("the folder has %v, error %v: want the old file alone", files, err)
	}
}

func TestCreateResultError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing", "result.json")
	if _, err := createResult(path); err == nil || !strings.Contains(err.Error(), "must be a file in a folder that exists") {
		t.Errorf("error is %v, want one that says what is accepted", err)
	}
}

func TestParseResultErrors(t *testing.T) {
	tests := []struct{ content, want string }{
		{"", "no result in JSON"},
		{"Gbit/s", "no result in JSON"},
		{`{"rows": {}}`, "no result in JSON"},
		{`{"shards": []}`, `"rows" is missing or empty`},
		{`{"rows": [{"better": "higher"}]}`, `row 0 has no "name"`},
		{`{"rows": [{"name": "a", "better": "more"}]}`, `row "a": "better" is "more": must be higher or lower`},
		{`{"rows": [{"name": "a", "better": "lower"}, {"name": "a", "better": "lower"}]}`, `row "a" is there twice`},
	}
	for _, tt := range tests {
		if _, err := parseResult(strings.NewReader(tt.content)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error is %v, want one with %q", tt.content, err, tt.want)
		}
	}
	if _, err := readResult(filepath.Join(t.TempDir(), "none.json")); err == nil || !strings.Contains(err.Error(), "accepted is a file that -out wrote") {
		t.Errorf("error is %v, want one that says what is accepted", err)
	}
}

// What rows of older files do not say is known from their names.
func TestParseResultOld(t *testing.T) {
	rep, err := parseResult(strings.NewReader(`{
		"environment": {"mtu": 1500},
		"rows": [{"name": "pingpong_1", "better": "lower"}, {"name": "unknown", "better": "higher"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if r := rep.Rows[0]; r.Load != loadPingPong || r.Door != doorEvents || r.Conns != 1 || !r.Spin || r.MTU != 1500 {
		t.Errorf("row %+v is not filled in", r)
	}
	if r := rep.Rows[1]; r.Load != "" || r.MTU != 1500 {
		t.Errorf("an unknown row became %+v", r)
	}
}

// The files that documents quote can be read.
func TestResultFiles(t *testing.T) {
	files, err := filepath.Glob("results/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("results are %v, error %v", files, err)
	}
	for _, f := range files {
		if _, err := readResult(f); err != nil {
			t.Error(err)
		}
	}
}
