package main

import (
	"bytes"
	"os"
	"testing"
)

// Documents quote results by marked tables; -update writes them anew.
func TestDocuments(t *testing.T) {
	blocks := 0
	for _, path := range []string{"../README.md", "../docs/performance.md"} {
		document, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		blocks += bytes.Count(document, []byte(blockPrefix))
		filled, err := fillBlocks(document, "..")
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if bytes.Equal(filled, document) {
			continue
		}
		if !*update {
			t.Errorf("%s: its tables are not those of the result files it names: go test ./bench -run TestDocuments -update", path)
		} else if err := os.WriteFile(path, filled, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if blocks == 0 {
		t.Error("no document has a marked table")
	}
}
