package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// answered is what a client got.
type answered struct {
	*http.Response
	body string
}

// roundTrip sends a request as it is and reads the answer. The last line of the
// header may bring a body with it.
func roundTrip(t *testing.T, c net.Conn, r *bufio.Reader, method, target string, header ...string) answered {
	t.Helper()
	request := strings.Join(append([]string{method + " " + target + " HTTP/1.1", "Host: test"}, header...), "\r\n")
	if !strings.Contains(request, "\r\n\r\n") {
		request += "\r\n\r\n"
	}
	write(t, c, request)
	return read(t, r, method)
}

func read(t *testing.T, r *bufio.Reader, method string) answered {
	t.Helper()
	response, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s: body: %v", method, err)
	}
	return answered{response, string(body)}
}

// large does not fit into the cache, nor into one piece of anything.
var large = strings.Repeat("0123456789abcdef", 3<<20/16)

// TestFiles asks all servers the same. Every request is sent three times on
// one connection: with engine shard the later answers come from memory.
func TestFiles(t *testing.T) {
	dir := tree(t, map[string]string{
		"index.html":          "<p>home",
		"text.txt":            "0123456789",
		"noext":               "<!doctype html><p>sniffed",
		"empty.txt":           "",
		"large.bin":           large,
		"page.html":           "plain page",
		"page.html.br":        "brotli",
		"page.html.gz":        "gzipped",
		"only.css":            "body{}",
		"only.css.gz":         "zip",
		"a b/ü?.txt":          "odd name",
		"sub/index.html":      "<p>sub",
		"bare/one.txt":        "1",
		"bare/two&.txt":       "2",
		"bare/.hidden":        "secret",
		".hidden":             "secret",
		".git/config":         "secret",
		"odd/index.html/file": "index.html is a directory",
	})
	outside := tree(t, map[string]string{"secret": "secret", "dir/secret": "secret"})
	for name, target := range map[string]string{
		"leaves": filepath.Join(outside, "secret"), "leavesdir": outside, "inside": "text.txt", "around": "../" + filepath.Base(outside) + "/secret", "loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	servers := map[string]*server{
		"shard":               start(t, "-engine", "shard", "-root", dir),
		"shard without cache": start(t, "-engine", "shard", "-root", dir, "-cache", "0"),
		"nethttp":             start(t, "-engine", "nethttp", "-root", dir),
	}
	const modified = "Thu, 02 Jan 2020 03:04:05 GMT"
	tag := func(size int) string { return fmt.Sprintf(`"%x-%x"`, past.UnixNano(), size) }
	text := map[string]string{
		"Content-Type": "text/plain; charset=utf-8", "Last-Modified": modified, "Etag": tag(10),
		"Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff", "Vary": "", "Content-Length": "10",
	}
	for _, test := range []struct {
		target string
		header []string
		status int
		want   map[string]string // lines of the header; empty: must not be there
		body   string
	}{
		{"/text.txt", nil, 200, text, "0123456789"},
		{"/text.txt?v=1", nil, 200, text, "0123456789"},
		{"http://test/text.txt", nil, 200, text, "0123456789"},
		{"/inside", nil, 200, map[string]string{"Content-Type": "text/plain; charset=utf-8"}, "0123456789"},
		{"/%74ext.txt", nil, 200, text, "0123456789"},
		{"/noext", nil, 200, map[string]string{"Content-Type": "text/html; charset=utf-8"}, "<!doctype html><p>sniffed"},
		{"/empty.txt", nil, 200, map[string]string{"Content-Length": "0"}, ""},
		{"/large.bin", nil, 200, map[string]string{"Content-Length": fmt.Sprint(len(large)), "Content-Type": "application/octet-stream"}, large},
		{"/a%20b/%C3%BC%3F.txt", nil, 200, nil, "odd name"},

		// Ranges.
		{"/text.txt", []string{"Range: bytes=2-4"}, 206, map[string]string{"Content-Range": "bytes 2-4/10", "Content-Length": "3"}, "234"},
		{"/text.txt", []string{"Range: bytes=-3"}, 206, map[string]string{"Content-Range": "bytes 7-9/10"}, "789"},
		{"/text.txt", []string{"Range: bytes=8-"}, 206, map[string]string{"Content-Range": "bytes 8-9/10"}, "89"},
		{"/text.txt", []string{"Range: bytes=10-"}, 416, map[string]string{"Content-Range": "bytes */10"}, "invalid range: failed to overlap\n"},
		{"/text.txt", []string{"Range: bytes=2-4", "If-Range: " + tag(10)}, 206, nil, "234"},
		{"/text.txt", []string{"Range: bytes=2-4", `If-Range: "other"`}, 200, nil, "0123456789"},
		{"/large.bin", []string{"Range: bytes=2097152-2097155"}, 206, map[string]string{"Content-Range": fmt.Sprintf("bytes 2097152-2097155/%d", len(large))}, "0123"},
		{"/large.bin", []string{"Range: bytes=1-1500000"}, 206, nil, large[1:1500001]},
		{"/large.bin", []string{"Range: bytes=0-0,5-5"}, 200, nil, large},                                                 // too large for several
		{"/noext", []string{"Range: bytes=" + strings.Repeat("0-0,", 16) + "1-1"}, 200, nil, "<!doctype html><p>sniffed"}, // too many

		// Conditions.
		{"/text.txt", []string{"If-None-Match: " + tag(10)}, 304, map[string]string{"Etag": tag(10), "Content-Type": "", "Content-Length": ""}, ""},
		{"/text.txt", []string{`If-None-Match: "other"`}, 200, text, "0123456789"},
		{"/text.txt", []string{"If-Modified-Since: " + modified}, 304, map[string]string{"Etag": tag(10)}, ""},
		{"/text.txt", []string{"If-Modified-Since: Thu, 02 Jan 2020 03:04:04 GMT"}, 200, text, "0123456789"},
		{"/text.txt", []string{`If-Match: "other"`}, 412, nil, ""},
		{"/text.txt", []string{"If-Unmodified-Since: Thu, 02 Jan 2020 03:04:04 GMT"}, 412, nil, ""},
		{"/large.bin", []string{"If-None-Match: " + tag(len(large))}, 304, nil, ""},

		// Compressed beforehand.
		{"/page.html", []string{"Accept-Encoding: gzip, deflate, br"}, 200, map[string]string{
			"Content-Encoding": "br", "Vary": "Accept-Encoding", "Content-Type": "text/html; charset=utf-8", "Content-Length": "6", "Etag": tag(6),
		}, "brotli"},
		{"/page.html", []string{"Accept-Encoding: gzip"}, 200, map[string]string{"Content-Encoding": "gzip", "Vary": "Accept-Encoding", "Content-Length": "7"}, "gzipped"},
		{"/page.html", []string{"Accept-Encoding: br;q=0, *"}, 200, map[string]string{"Content-Encoding": "gzip"}, "gzipped"},
		{"/page.html", nil, 200, map[string]string{"Content-Encoding": "", "Vary": "Accept-Encoding"}, "plain page"},
		{"/page.html", []string{"Accept-Encoding: br;q=0", "Accept-Encoding: gzip"}, 200, map[string]string{"Content-Encoding": "gzip"}, "gzipped"},
		{"/page.html", []string{"Accept-Encoding: br", "If-None-Match: " + tag(6)}, 304, map[string]string{"Vary": "Accept-Encoding"}, ""},
		{"/page.html", []string{"Accept-Encoding: br", "If-None-Match: " + tag(10)}, 200, nil, "brotli"},
		{"/page.html", []string{"Accept-Encoding: br", "Range: bytes=1-2"}, 206, map[string]string{"Content-Range": "bytes 1-2/6", "Content-Encoding": "br"}, "ro"},
		{"/only.css", []string{"Accept-Encoding: br"}, 200, map[string]string{"Content-Encoding": "", "Vary": "Accept-Encoding"}, "body{}"},
		{"/text.txt", []string{"Accept-Encoding: br, gzip"}, 200, text, "0123456789"},

		// Directories.
		{"/", nil, 200, map[string]string{"Content-Type": "text/html; charset=utf-8"}, "<p>home"},
		{"/sub/", nil, 200, nil, "<p>sub"},
		{"/sub?x=y", nil, 301, map[string]string{"Location": "sub/?x=y"}, ""},
		{"/bare/", nil, 404, nil, "404 Not Found\n"},
		{"/odd/", nil, 404, nil, "404 Not Found\n"},
		{"/text.txt/", nil, 404, nil, "404 Not Found\n"},

		// What does not exist, for us.
		{"/none", nil, 404, map[string]string{"Content-Type": "text/plain; charset=utf-8", "Content-Length": "14"}, "404 Not Found\n"},
		{"/.hidden", nil, 404, nil, "404 Not Found\n"},
		{"/%2ehidden", nil, 404, nil, "404 Not Found\n"},
		{"/.git/config", nil, 404, nil, "404 Not Found\n"},
		{"/bare/.hidden", nil, 404, nil, "404 Not Found\n"},
		{"/../" + filepath.Base(outside) + "/secret", nil, 404, nil, "404 Not Found\n"},
		{"/sub/../text.txt", nil, 404, nil, "404 Not Found\n"},
		{"/..%2f" + filepath.Base(outside) + "%2fsecret", nil, 404, nil, "404 Not Found\n"},
		{"//etc/passwd", nil, 404, nil, "404 Not Found\n"},
		{"/text.txt%00", nil, 404, nil, "404 Not Found\n"},
		{"/leaves", nil, 404, nil, "404 Not Found\n"},
		{"/leavesdir/secret", nil, 404, nil, "404 Not Found\n"},
		{"/leavesdir/", nil, 404, nil, "404 Not Found\n"},
		{"/around", nil, 404, nil, "404 Not Found\n"},
		{"/loop", nil, 404, nil, "404 Not Found\n"},
		{"/fifo", nil, 404, nil, "404 Not Found\n"},
		{"/text.txt/more", nil, 404, nil, "404 Not Found\n"},
		{"/" + strings.Repeat("n", 300), nil, 404, nil, "404 Not Found\n"},

		{"/healthz", nil, 200, nil, "ok\n"},
	} {
		t.Run(strings.Join(append([]string{test.target}, test.header...), " "), func(t *testing.T) {
			for name, s := range servers {
				c, r := s.dial(t)
				t.Logf("%s:", name)
				for range 3 {
					got := roundTrip(t, c, r, "GET", test.target, test.header...)
					check(t, got, test.status, test.want, test.body)
					if got.Header.Get("Date") == "" {
						t.Error("no Date")
					}
				}
				// HEAD has the header of GET.
				if test.status == 200 {
					got := roundTrip(t, c, r, "HEAD", test.target, test.header...)
					check(t, got, test.status, test.want, "")
					if got.Header.Get("Content-Length") != fmt.Sprint(len(test.body)) {
						t.Errorf("HEAD: Content-Length %q, want %d", got.Header.Get("Content-Length"), len(test.body))
					}
				}
			}
		})
	}
}

func check(t *testing.T, got answered, status int, header map[string]string, body string) {
	t.Helper()
	if got.StatusCode != status {
		t.Errorf("status %d, want %d", got.StatusCode, status)
	}
	for key, want := range header {
		if v := got.Header.Get(key); v != want {
			t.Errorf("%s: %q, want %q", key, v, want)
		}
	}
	if got.body != body {
		t.Errorf("body of %d bytes, %.60q; want %d bytes, %.60q", len(got.body), got.body, len(body), body)
	}
}

func TestSeveralRanges(t *testing.T) {
	dir := tree(t, map[string]string{"text.txt": "0123456789"})
	bothEngines(t, func(t *testing.T, engine string) {
		c, r := start(t, "-engine", engine, "-root", dir).dial(t)
		for range 3 {
			got := roundTrip(t, c, r, "GET", "/text.txt", "Range: bytes=0-1,8-9")
			if got.StatusCode != 206 || !strings.HasPrefix(got.Header.Get("Content-Type"), "multipart/byteranges; boundary=") {
				t.Fatalf("status %d, %q", got.StatusCode, got.Header.Get("Content-Type"))
			}
			for _, part := range []string{"Content-Range: bytes 0-1/10\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n01\r\n", "\r\n\r\n89\r\n"} {
				if !strings.Contains(got.body, part) {
					t.Errorf("no %q in %q", part, got.body)
				}
			}
		}
	})
}

func TestListing(t *testing.T) {
	dir := tree(t, map[string]string{"b&.txt": "", "a:1": "", ".hidden": "", "sub/x": "", "with/index.html": "index"})
	bothEngines(t, func(t *testing.T, engine string) {
		c, r := start(t, "-engine", engine, "-root", dir, "-list").dial(t)
		got := roundTrip(t, c, r, "GET", "/")
		const list = "<li><a href=\"./a:1\">a:1</a></li>\n<li><a href=\"b&amp;.txt\">b&amp;.txt</a></li>\n<li><a href=\"sub/\">sub/</a></li>\n<li><a href=\"with/\">with/</a></li>\n</ul>\n"
		if got.StatusCode != 200 || !strings.HasSuffix(got.body, list) || got.Header.Get("Content-Type") != "text/html; charset=utf-8" {
			t.Errorf("status %d, %q", got.StatusCode, got.body)
		}
		if head := roundTrip(t, c, r, "HEAD", "/"); head.Header.Get("Content-Length") != fmt.Sprint(len(got.body)) {
			t.Errorf("HEAD: Content-Length %q, want %d", head.Header.Get("Content-Length"), len(got.body))
		}
		check(t, roundTrip(t, c, r, "GET", "/with/"), 200, nil, "index")
	})
}

// TestChangedFile changes files that are in memory, and asks for one of them
// with a condition.
func TestChangedFile(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		dir := tree(t, map[string]string{"plain": "old", "condition": "old"})
		c, r := start(t, "-engine", engine, "-root", dir).dial(t)
		expect := func(status int, body string, header ...string) {
			t.Helper()
			for range 2 {
				check(t, roundTrip(t, c, r, "GET", "/plain"), status, nil, body)
				check(t, roundTrip(t, c, r, "GET", "/condition", header...), status, nil, body)
			}
		}
		expect(200, "old")
		for _, name := range []string{"plain", "condition"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("new"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(freshFor + 100*time.Millisecond)
		expect(200, "new", `If-None-Match: "other"`)
		for _, name := range []string{"plain", "condition"} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(freshFor + 100*time.Millisecond)
		expect(404, "404 Not Found\n", `If-None-Match: "other"`)
	})
}

func TestWithoutRoot(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		c, r := start(t, "-engine", engine).dial(t)
		for range 2 {
			check(t, roundTrip(t, c, r, "GET", "/"), 200, map[string]string{"Content-Type": plainText}, helloText)
			check(t, roundTrip(t, c, r, "GET", "/?q"), 200, nil, helloText)
			check(t, roundTrip(t, c, r, "GET", "http://test/"), 200, nil, helloText)
			check(t, roundTrip(t, c, r, "HEAD", "/"), 200, map[string]string{"Content-Length": fmt.Sprint(len(helloText))}, "")
			check(t, roundTrip(t, c, r, "GET", "/other"), 404, nil, "404 Not Found\n")
		}
		// Several requests at once are answered in order.
		const pipelined = "GET / HTTP/1.1\r\nHost: t\r\n\r\nGET /healthz HTTP/1.1\r\nHost: t\r\n\r\nGET / HTTP/1.1\r\nHost: t\r\n\r\n"
		write(t, c, pipelined)
		for _, want := range []string{helloText, healthText, helloText} {
			check(t, read(t, r, "GET"), 200, nil, want)
		}
		got := roundTrip(t, c, r, "GET", "/whereami")
		var where whereabouts
		if err := json.Unmarshal([]byte(got.body), &where); err != nil {
			t.Fatalf("%v in %q", err, got.body)
		}
		if where.Engine != engine || where.Peer != c.LocalAddr().String() || where.Shard != nil || got.Header.Get("Content-Type") != "application/json" {
			t.Errorf("whereami: %s", got.body)
		}
	})
}

func TestOtherMethods(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine)
		for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"} {
			c, r := s.dial(t)
			got := roundTrip(t, c, r, method, "/", "Content-Length: 4\r\n\r\nbody")
			check(t, got, 405, map[string]string{"Allow": "GET, HEAD"}, "405 Method Not Allowed\n")
		}
	})
}

// TestRefusedUpload goes on sending after the answer has come: a connection
// that is closed at once would reset it.
func TestRefusedUpload(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		c, r := start(t, "-engine", engine).dial(t)
		got := roundTrip(t, c, r, "PUT", "/", "Content-Length: 1000000\r\n\r\n"+strings.Repeat("b", 1000))
		check(t, got, 405, nil, "405 Method Not Allowed\n")
		for range 4 {
			time.Sleep(25 * time.Millisecond)
			write(t, c, "more")
		}
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("%v, want the end", err)
		}
	})
}

// TestLimits sends what is too large or too slow, or comes too often.
func TestLimits(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine, "-max-header", "8192", "-max-body", "100",
			"-header-timeout", "300ms", "-read-timeout", "1200ms", "-idle-timeout", "400ms", "-max-conns", "3")

		c, r := s.dial(t)
		check(t, roundTrip(t, c, r, "GET", "/", "X: "+strings.Repeat("x", 7000)), 200, nil, helloText)
		check(t, roundTrip(t, c, r, "GET", "/", "Content-Length: 100\r\n\r\n"+strings.Repeat("b", 100)), 200, nil, helloText)
		if got := roundTrip(t, c, r, "GET", "/", "Content-Length: 101\r\n\r\n"+strings.Repeat("b", 101)); got.StatusCode != 413 || !got.Close {
			t.Errorf("large body: %d, close %v", got.StatusCode, got.Close)
		}
		c.Close()

		c, r = s.dial(t)
		if got := roundTrip(t, c, r, "GET", "/", "X: "+strings.Repeat("x", 20000)); got.StatusCode != 431 || !got.Close {
			t.Errorf("large header: %d, close %v", got.StatusCode, got.Close)
		}
		c.Close()

		for _, slow := range []struct {
			name, begin string
			drip        string // every 50 ms
			low, high   time.Duration
		}{
			{"silent", "", "", 200 * time.Millisecond, 900 * time.Millisecond},
			{"header never ends", "GET / HTTP/1.1\r\n", "X: y\r\n", 200 * time.Millisecond, 900 * time.Millisecond},
			{"body never ends", "GET / HTTP/1.1\r\nHost: t\r\nContent-Length: 90\r\n\r\n", "b", time.Second, 2500 * time.Millisecond},
			{"no next request", "GET / HTTP/1.1\r\nHost: t\r\n\r\n", "", 300 * time.Millisecond, 1200 * time.Millisecond},
		} {
			c, _ := s.dial(t)
			began := time.Now()
			write(t, c, slow.begin)
			stop := make(chan struct{})
			if slow.drip != "" {
				go func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(50 * time.Millisecond):
							if _, err := io.WriteString(c, slow.drip); err != nil {
								return
							}
						}
					}
				}()
			}
			_, err := io.Copy(io.Discard, c)
			close(stop)
			took := time.Since(began)
			if took < slow.low || took > slow.high {
				t.Errorf("%s: cut off after %v (%v), want %v to %v", slow.name, took, err, slow.low, slow.high)
			}
			c.Close()
		}

		// The fourth connection is one too many.
		waitFor(t, func() bool {
			for range 3 {
				c, r := s.dial(t)
				if roundTrip(t, c, r, "GET", "/").StatusCode != 200 {
					return false
				}
			}
			return true
		})
		c, r = s.dial(t)
		if got := read(t, r, "GET"); got.StatusCode != 503 || !got.Close {
			t.Errorf("fourth connection: %d, close %v", got.StatusCode, got.Close)
		}
		c.Close()
	})
}

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Second); !what(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not happen within 2 s")
		}
	}
}

// TestSlowReader does not take its answer.
func TestSlowReader(t *testing.T) {
	dir := tree(t, map[string]string{"large": strings.Repeat("x", 16<<20)})
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine, "-root", dir, "-write-timeout", "300ms", "-max-conns", "1")
		c, r := s.dial(t)
		if err := c.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		write(t, c, "GET /large HTTP/1.1\r\nHost: t\r\n\r\n")
		began := time.Now()
		if _, err := r.Peek(1); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool { // the connection's place is free again
			c, r := s.dial(t)
			defer c.Close()
			return roundTrip(t, c, r, "GET", "/healthz").StatusCode == 200
		})
		if took := time.Since(began); took < 200*time.Millisecond {
			t.Errorf("cut off after %v, want 300 ms", took)
		}
	})
}

func TestDrain(t *testing.T) {
	dir := tree(t, map[string]string{"large": large + large + large + large})
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine, "-root", dir)
		idle, idleReader := s.dial(t)
		check(t, roundTrip(t, idle, idleReader, "GET", "/healthz"), 200, nil, healthText)
		c, r := s.dial(t)
		write(t, c, "GET /large HTTP/1.1\r\nHost: t\r\n\r\n")
		if _, err := r.Peek(1); err != nil { // it runs
			t.Fatal(err)
		}
		s.stop()
		waitFor(t, func() bool {
			late, err := net.Dial("tcp", s.addr)
			if err == nil {
				late.Close()
			}
			return err != nil
		})
		time.Sleep(50 * time.Millisecond)
		if len(s.done) > 0 {
			t.Error("the server has ended before its request")
		}
		if got := read(t, r, "GET"); len(got.body) != 4*len(large) {
			t.Errorf("%d bytes, want %d", len(got.body), 4*len(large))
		}
		if took := s.ended(t); took > 2*time.Second {
			t.Errorf("ended %v after its last request", took)
		}
		if _, err := idleReader.ReadByte(); err == nil {
			t.Error("idle connection not closed")
		}
	})
}

// TestDrainTimeout has a request that does not end.
func TestDrainTimeout(t *testing.T) {
	dir := tree(t, map[string]string{"large": large + large + large + large})
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine, "-root", dir, "-drain", "300ms")
		c, r := s.dial(t)
		write(t, c, "GET /large HTTP/1.1\r\nHost: t\r\n\r\n")
		if _, err := r.Peek(1); err != nil {
			t.Fatal(err)
		}
		s.stop()
		if took := s.ended(t); took < 250*time.Millisecond || took > 2*time.Second {
			t.Errorf("ended after %v, want 300 ms", took)
		}
		if !strings.Contains(s.stderr.String(), "cut off") {
			t.Errorf("no word about the request: %s", s.stderr)
		}
	})
}

func TestAccessLog(t *testing.T) {
	bothEngines(t, func(t *testing.T, engine string) {
		s := start(t, "-engine", engine, "-access-log")
		c, r := s.dial(t)
		roundTrip(t, c, r, "GET", "/?a=b")
		roundTrip(t, c, r, "HEAD", "/none")
		roundTrip(t, c, r, "PUT", "/x", "Content-Length: 0")
		waitFor(t, func() bool { return strings.Count(s.stdout.String(), "msg=request") == 3 })
		for _, want := range []string{
			"peer=" + c.LocalAddr().String() + ` method=GET path="/?a=b" status=200 bytes=6 took=`,
			"method=HEAD path=/none status=404 bytes=0 ",
			"method=PUT path=/x status=405 bytes=23 ",
		} {
			if !strings.Contains(s.stdout.String(), want) {
				t.Errorf("no %q in\n%s", want, s.stdout)
			}
		}
	})
}

func TestCurl(t *testing.T) {
	dir := tree(t, map[string]string{"text.txt": "0123456789", "large": large, "z.html": "plain", "z.html.gz": string(gzipped(t, "zipped"))})
	upload := filepath.Join(dir, "large")
	bothEngines(t, func(t *testing.T, engine string) {
		for _, scheme := range []string{"http", "https"} {
			args := []string{"-engine", engine, "-root", dir}
			if scheme == "https" {
				args = append(args, "-tls-self-signed")
			}
			url := scheme + "://" + start(t, args...).addr
			version := "1.1"
			if scheme == "https" && engine == engineNetHTTP {
				version = "2"
			}
			for _, test := range []struct {
				args []string
				want string
			}{
				{[]string{url + "/text.txt"}, "0123456789"},
				{[]string{"--http2", "-o", "/dev/null", "-w", "%{http_version} %{http_code} %{size_download}", url + "/large"}, fmt.Sprintf("%s 200 %d", version, len(large))},
				{[]string{"-r", "2-4", url + "/text.txt"}, "234"},
				{[]string{"-C", "7", "-o", "-", url + "/text.txt"}, "789"},
				{[]string{"-z", "1 Jan 2021", "-w", "%{http_code}", url + "/text.txt"}, "304"},
				{[]string{"-I", "-o", "/dev/null", "-w", "%{http_code} %header{content-length}", url + "/large"}, fmt.Sprintf("200 %d", len(large))},
				{[]string{"--compressed", url + "/z.html"}, "zipped"},
				{[]string{"--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", url + "/../../etc/passwd"}, "404"},
				{[]string{"-T", upload, "-o", "/dev/null", "-w", "%{http_code} %header{allow}", url + "/up"}, "405 GET, HEAD"},
				{[]string{"-H", "Expect:", "--data-binary", "@" + upload, "-o", "/dev/null", "-w", "%{http_code}", url + "/up"}, "405"},
				{[]string{url + "/healthz", url + "/healthz", url + "/text.txt"}, "ok\nok\n0123456789"},
			} {
				if got := curl(t, append([]string{"-k"}, test.args...)...); got != test.want {
					t.Errorf("curl %q: %.80q, want %q", test.args, got, test.want)
				}
			}
		}
	})
}

// TestNumastack serves over a TAP device of the test's namespace, with two
// shards on one CPU.
func TestNumastack(t *testing.T) {
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		t.Skipf("needs a TAP device: %v", err)
	} else {
		f.Close()
	}
	dir := tree(t, map[string]string{"text.txt": "0123456789", "large": large})
	bothEngines(t, func(t *testing.T, engine string) {
		s := startOn(t, "-tap", "httpd0", "-shards", "2", "-cpus", "0,0", "-listen", "80", "-engine", engine, "-root", dir)
		const url = "http://10.99.0.2"
		for range 3 {
			if got := curl(t, url+"/text.txt", url+"/healthz", url+"/text.txt"); got != "0123456789ok\n0123456789" {
				t.Errorf("%q", got)
			}
			if got := curl(t, url+"/large"); got != large {
				t.Errorf("%d bytes, want %d", len(got), len(large))
			}
		}
		if got := curl(t, "-r", "0-1,4-5", "-o", "/dev/null", "-w", "%{http_code}", url+"/text.txt"); got != "206" {
			t.Errorf("several ranges: %s", got)
		}
		if got := curl(t, "-T", filepath.Join(dir, "large"), "-o", "/dev/null", "-w", "%{http_code}", url+"/"); got != "405" {
			t.Errorf("upload: %s", got)
		}
		var where whereabouts
		if err := json.Unmarshal([]byte(curl(t, url+"/whereami")), &where); err != nil {
			t.Fatal(err)
		}
		if where.Shard == nil || where.CPU == nil || where.Node == nil || *where.CPU != 0 || *where.Shard > 1 {
			t.Errorf("whereami: %+v", where)
		}

		s.addr = "10.99.0.2:80"
		c, r := s.dial(t)
		write(t, c, "GET /large HTTP/1.1\r\nHost: t\r\n\r\n")
		if _, err := r.Peek(1); err != nil {
			t.Fatal(err)
		}
		s.stop()
		time.Sleep(100 * time.Millisecond)
		if got := read(t, r, "GET"); got.body != large {
			t.Errorf("%d bytes while it drains, want %d", len(got.body), len(large))
		}
		s.ended(t)
	})
	bothEngines(t, func(t *testing.T, engine string) {
		startOn(t, "-tap", "httpd0", "-cpus", "0", "-listen", "443", "-engine", engine, "-root", dir, "-tls-self-signed")
		const url = "https://10.99.0.2"
		if got := curl(t, "-k", url+"/text.txt", url+"/healthz", url+"/large"); got != "0123456789ok\n"+large {
			t.Errorf("TLS: %d bytes, %.30q", len(got), got)
		}
		var where whereabouts
		if err := json.Unmarshal([]byte(curl(t, "-k", url+"/whereami")), &where); err != nil || where.Shard == nil {
			t.Errorf("TLS: whereami: %+v, %v", where, err)
		}
	})
}

// TestUsage refuses command lines with a word about why.
func TestUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"-listen nope", `-listen is ":nope", want a port or host:port`},
		{"-engine x", `-engine is "x", want shard or nethttp`},
		{"-list", "-list needs -root"},
		{"-tls-cert x", "-tls-cert and -tls-key need each other"},
		{"-tls-cert x -tls-key y -tls-self-signed", "-tls-self-signed makes a certificate"},
		{"-idle-timeout 0s", "-idle-timeout is 0s, want more than 0"},
		{"-header-timeout 20s", "-read-timeout is 10s, want at least -header-timeout, 20s"},
		{"-max-header 100", "-max-header is 100, want 4096 to 1048576"},
		{"extra", `unexpected argument "extra"`},
	} {
		var out, errs bytes.Buffer
		if code := command(t.Context(), strings.Fields(test.args), &out, &errs); code != 2 || !strings.Contains(errs.String(), test.want) {
			t.Errorf("%s: exit status %d, %s", test.args, code, errs.String())
		}
	}
	for _, test := range []struct{ args, want string }{
		{"-host-sockets -root /nowhere/at/all", "-root: "},
		{"-host-sockets -tls-cert /nowhere -tls-key /nowhere", "tls certificate: open /nowhere"},
	} {
		var out, errs bytes.Buffer
		if code := command(t.Context(), strings.Fields(test.args), &out, &errs); code != 1 || !strings.Contains(errs.String(), test.want) {
			t.Errorf("%s: exit status %d, %s", test.args, code, errs.String())
		}
	}
}
