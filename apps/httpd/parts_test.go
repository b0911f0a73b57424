package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func gzipped(t *testing.T, s string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.WriteString(z, s); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tree makes a directory of files for a test, with a time in the past.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, past, past); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// past is when the files of tree were changed.
var past = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)

func TestAcceptedEncodings(t *testing.T) {
	const br, gz = 1, 2
	for _, test := range []struct {
		header string
		want   encodingSet
	}{
		{"", 0},
		{"gzip", gz},
		{"br", br},
		{"gzip, deflate, br, zstd", br | gz},
		{"GZIP;q=0.5,BR;q=1.0", br | gz},
		{"gzip;q=0", 0},
		{"gzip; Q = 0.000", 0},
		{"gzip;q=x", 0},
		{"*", br | gz},
		{"*;q=0", 0},
		{"*, br;q=0", gz},
		{"br;q=0, *;q=0.1", gz},
		{"gzip, *;q=0", gz},
		{"brotli, gzipped", 0},
		{",,;,", 0},
	} {
		if got := acceptedEncodings([]byte(test.header)); got != test.want {
			t.Errorf("%q: %b, want %b", test.header, got, test.want)
		}
	}
}

func TestFileName(t *testing.T) {
	for path, want := range map[string]string{
		"/": ".", "/a": "a", "/a/": "a", "/a/b.c": "a/b.c", "/a..b": "a..b", "/a b": "a b",
		"": "", "a": "", "//": "", "//a": "", "/a//b": "", "/a//": "", "/.": "", "/..": "", "/a/..": "", "/a/./b": "", "/.a/b": "", "/a/.b/": "", "/a\x00b": "", "*": "",
	} {
		if got, ok := fileName(path); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v; want %q", path, got, ok, want)
		}
	}
}

func TestCache(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newCache(3 * (entryCost + 100))
	put := func(path string) { c.put(cacheKey{path, 0}, &entry{body: make([]byte, 100)}, now) }
	has := func(path string) bool { e, _ := c.get([]byte(path), 0, now); return e != nil }
	put("a")
	put("b")
	put("c")
	has("a") // now b is the oldest
	put("d")
	for path, want := range map[string]bool{"a": true, "b": false, "c": true, "d": true} {
		if has(path) != want {
			t.Errorf("%s: %v, want %v", path, !want, want)
		}
	}
	put("a") // in place of the old one
	if c.used != 3*(entryCost+100) || len(c.entries) != 3 || c.recent.Len() != 3 {
		t.Errorf("%d bytes, %d entries, %d in order", c.used, len(c.entries), c.recent.Len())
	}
	c.put(cacheKey{"huge", 0}, &entry{body: make([]byte, 4*entryCost)}, now)
	if has("huge") || !has("a") {
		t.Error("an entry larger than the cache drove others out")
	}
	if e, _ := c.get([]byte("a"), 1, now); e != nil {
		t.Error("an entry for other encodings")
	}

	// One of those who find it too old has to look.
	later := now.Add(freshFor)
	if e, fresh := c.get([]byte("a"), 0, later); e == nil || fresh {
		t.Errorf("%p, fresh %v after %v", e, fresh, freshFor)
	}
	if e, fresh := c.get([]byte("a"), 0, later); e == nil || !fresh {
		t.Errorf("%p, fresh %v for the second", e, fresh)
	}
	c.drop(cacheKey{"a", 0})
	c.drop(cacheKey{"a", 0})
	if has("a") || c.used != 2*(entryCost+100) {
		t.Errorf("dropped, but %d bytes", c.used)
	}
}

// TestAccessLogLoses writes to a log that stands still.
func TestAccessLogLoses(t *testing.T) {
	r, w := io.Pipe()
	l := newAccessLog(slog.NewTextHandler(w, nil))
	const sent = logBacklog + 100
	for range sent {
		l.add(request{shard: -1}) // must not wait
	}
	lines := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		lines <- string(b)
	}()
	l.close()
	l.add(request{}) // nor after the end
	_ = w.Close()
	var lost int
	got := <-lines
	if _, after, ok := strings.Cut(got, "requests="); ok {
		_, _ = fmt.Sscan(after, &lost)
	}
	if written := strings.Count(got, "msg=request"); written+lost != sent || lost == 0 {
		t.Errorf("%d lines and %d lost, want %d together", written, lost, sent)
	}
}

// script is a connection whose client sends the same request again and again.
type script struct {
	request []byte
	left    int    // requests
	rest    []byte // of the present one
}

func (c *script) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		if c.left == 0 {
			return 0, io.EOF
		}
		c.left--
		c.rest = c.request
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (*script) Write(b []byte) (int, error)        { return len(b), nil }
func (*script) Close() error                       { return nil }
func (*script) LocalAddr() net.Addr                { return &net.TCPAddr{} }
func (*script) RemoteAddr() net.Addr               { return &net.TCPAddr{} }
func (*script) SetDeadline(time.Time) error        { return nil }
func (*script) SetReadDeadline(t time.Time) error  { return nil }
func (*script) SetWriteDeadline(t time.Time) error { return nil }

// shardUnderTest is engine shard without a network.
func shardUnderTest(tb testing.TB, args ...string) *shardEngine {
	tb.Helper()
	var o options
	fs, _ := newFlags(&o, io.Discard)
	if err := fs.Parse(args); err != nil {
		tb.Fatal(err)
	}
	a := &app{options: &o, peers: newPeers(o.maxConns, o.writeTimeout)}
	if o.root != "" {
		var err error
		if a.site, err = openSite(o.root, false, slog.New(slog.DiscardHandler)); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(a.site.close)
	}
	return newShardEngine(a, 1)
}

const browserRequest = " HTTP/1.1\r\nHost: 10.99.0.2\r\nUser-Agent: Mozilla/5.0\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate, br, zstd, and some more\r\nConnection: keep-alive\r\n\r\n"

// TestAllocations bounds what a request costs the collector, with engine shard.
func TestAllocations(t *testing.T) {
	dir := tree(t, map[string]string{"a/rather/long/path/of/a/small/file.txt": "0123456789"})
	for _, test := range []struct {
		name, target string
		args         []string
	}{
		{"hello", "/", nil},
		{"cached file", "/a/rather/long/path/of/a/small/file.txt", []string{"-root", dir}},
	} {
		e := shardUnderTest(t, test.args...)
		request := []byte("GET " + test.target + browserRequest)
		perConn := func(requests int) float64 {
			return testing.AllocsPerRun(5, func() { e.serve(&script{request: request, left: requests}) })
		}
		const requests = 1000
		if got := (perConn(requests+1) - perConn(1)) / requests; got > 0.05 {
			t.Errorf("%s: %.2f allocations per request", test.name, got)
		}
	}
}

// TestCachedFiles looks at what a request leaves in memory.
func TestCachedFiles(t *testing.T) {
	dir := tree(t, map[string]string{"small": strings.Repeat("s", maxCached), "large": strings.Repeat("l", maxCached+1)})
	for _, test := range []struct {
		request string
		want    int64 // bytes
	}{
		{"GET /small", maxCached + entryCost},
		{"GET /small?query", maxCached + entryCost},
		{"HEAD /small", 0},
		{"GET /large", 0},
		{"GET /none", 0},
		{"GET /", 0},
	} {
		e := shardUnderTest(t, "-root", dir)
		e.serve(&script{request: []byte(test.request + browserRequest), left: 2})
		if got := e.caches[0].used; got != test.want {
			t.Errorf("%s: %d bytes, want %d", test.request, got, test.want)
		}
	}
}

// BenchmarkShard is a keep-alive request without the network below.
func BenchmarkShard(b *testing.B) {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, indexFile), make([]byte, 4<<10), 0o644); err != nil {
		b.Fatal(err)
	}
	for _, bench := range []struct {
		name string
		args []string
	}{
		{"hello", nil},
		{"file=4k/cached", []string{"-root", dir}},
		{"file=4k/read", []string{"-root", dir, "-cache", "0"}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			e := shardUnderTest(b, bench.args...)
			b.ReportAllocs()
			b.ResetTimer()
			e.serve(&script{request: []byte("GET /" + browserRequest), left: b.N})
		})
	}
}
