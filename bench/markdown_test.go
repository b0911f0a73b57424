package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
)

func TestMarkdownGolden(t *testing.T) {
	var b bytes.Buffer
	if err := trafficReport(t).writeMarkdown(&b, "bench/results/test.json"); err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "report.md", b.Bytes())
}

func TestFillBlocks(t *testing.T) {
	root := t.TempDir()
	f, err := createResult(filepath.Join(root, "r.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	if err := f.write(trafficReport(t)); err != nil {
		t.Fatal(err)
	}
	start := blockStart("r.json", "latency")
	got, err := fillBlocks([]byte("before\n"+start+"\nold\n"+blockEnd+"\nafter\n"), root)
	if err != nil {
		t.Fatal(err)
	}
	text := string(got)
	if !strings.HasPrefix(text, "before\n"+start+"\n**Latency") || !strings.HasSuffix(text, "\n"+blockEnd+"\nafter\n") || strings.Contains(text, "old") {
		t.Errorf("filled is\n%s", text)
	}
	if again, err := fillBlocks(got, root); err != nil || !bytes.Equal(again, got) {
		t.Errorf("filled again, error %v, it is\n%s", err, again)
	}

	for document, want := range map[string]string{
		start + "\n":                                             "no " + blockEnd,
		blockPrefix + "r.json -->\n" + blockEnd:                  "must be like",
		blockStart("none.json", "rows") + "\n" + blockEnd:        "accepted is a file that -out wrote",
		blockStart("r.json", "colours") + "\n" + blockEnd + "\n": "accepted are rows, cpu, latency",
	} {
		if _, err := fillBlocks([]byte(document), root); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error is %v, want one with %q", document, err, want)
		}
	}
}
