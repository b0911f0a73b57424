package main

import (
	"encoding/xml"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPlot(t *testing.T) {
	rep := trafficReport(t)
	rep.Rows[0].Samples["other"] = []float64{5, 5, 5} // a peer that this program does not know
	dir := filepath.Join(t.TempDir(), "plots")
	files, err := rep.plot(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"ratios":              {"bulk_in_1", "idle_net", "/ kernel", "/ gvisor", "/ other", "limit of the device / kernel", "0.50×", "10.0×", "3.33×", "1/2×", "commit 0123456", "Test CPU"},
		"latency-pingpong_64": {"p50", "p99", "max", "µs", "numastack", "kernel", "commit 0123456"},
		"latency-http_net":    {"kernel"},
		"cycles-in":           {"MTU, bytes", "1500", "9000", "cycles per byte", "numastack", "Test CPU"},
	} {
		texts := svgTexts(t, filepath.Join(dir, name+".svg"))
		for _, w := range want {
			if !slices.ContainsFunc(texts, func(s string) bool { return strings.Contains(s, w) }) {
				t.Errorf("%s.svg has no text %q, it has %q", name, w, texts)
			}
		}
		f, err := os.Open(filepath.Join(dir, name+".png"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if img, err := png.Decode(f); err != nil {
			t.Errorf("%s.png: %v", name, err)
		} else if size := img.Bounds().Size(); size.X < 400 || size.Y < 300 {
			t.Errorf("%s.png is of %v pixels", name, size)
		}
	}
	found, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || !slices.Equal(found, slices.Sorted(slices.Values(files))) {
		t.Errorf("the folder has %v, the plot told of %v, error %v", found, files, err)
	}
	if slices.ContainsFunc(files, func(f string) bool { return strings.Contains(f, "cycles-out") }) {
		t.Error("one MTU is drawn as a curve")
	}
}

// svgTexts returns the texts of an SVG file, which has to be well-formed.
func svgTexts(t *testing.T, path string) []string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var texts []string
	dec := xml.NewDecoder(f)
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return texts
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if s, ok := token.(xml.CharData); ok && strings.TrimSpace(string(s)) != "" {
			texts = append(texts, strings.TrimSpace(string(s)))
		}
	}
}

func TestPlotErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := (&report{}).plot(dir); err == nil || !strings.Contains(err.Error(), "neither ratios nor latencies") {
		t.Errorf("nothing to draw: error is %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := testReport().plot(file); err == nil || !strings.Contains(err.Error(), "must be a folder") {
		t.Errorf("a file for a folder: error is %v", err)
	}
}

func TestLatencies(t *testing.T) {
	r := rowReport{
		P50: map[string]float64{peerKernel: 1}, P99: map[string]float64{peerKernel: 2}, Max: map[string]float64{peerKernel: 3},
	}
	if points, us := r.latencies(); !slices.Equal(points, []float64{50, 99, 100}) || !slices.Equal(us[peerKernel], []float64{1, 2, 3}) {
		t.Errorf("latencies are %v at %v", us, points)
	}
	r.CurvePoints, r.Curve = []float64{50, 90}, map[string][]float64{peerKernel: {4, 5}}
	if points, us := r.latencies(); !slices.Equal(points, r.CurvePoints) || !slices.Equal(us[peerKernel], []float64{4, 5}) {
		t.Errorf("with a curve, latencies are %v at %v", us, points)
	}
}
