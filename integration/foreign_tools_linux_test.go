package integration

import (
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/tidwall/redcon"
)

// TestForeignCurl asks net/http on the stack with curl.
func TestForeignCurl(t *testing.T) {
	const size = pattern(10 << 20)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		f := r.oneFamily()
		plainURL := serveHTTP(t, listenOn(t, r.Listen, f.self), &http.Server{Handler: site(), ReadHeaderTimeout: patience})
		serverTLS, _ := tlsConfigs(t)
		secureURL := serveHTTP(t, listenOn(t, r.Listen, f.self), &http.Server{Handler: site(), ReadHeaderTimeout: patience, TLSConfig: serverTLS})
		curl := newCurl(t, f.self)
		for _, version := range []struct{ name, flag, reports, url string }{
			{"HTTP 1.1", "--http1.1", "1.1", plainURL},
			{"HTTP 1.1 with TLS", "--http1.1", "1.1", secureURL},
			{"HTTP 2", "--http2", "2", secureURL},
		} {
			t.Run(version.name, func(t *testing.T) {
				url := curl.named(version.url)
				sized := url + "/bytes?n=" + itoa(int(size))
				for _, test := range []struct {
					name string
					args []string
					want string // protocol, status, connections opened
					from int64  // of the pattern, is in the file
					to   int64
				}{
					{"download", []string{sized}, "200 1", 0, int64(size)},
					{"chunks", []string{url + "/chunks?n=3000000"}, "200 1", 0, 3_000_000},
					{"range", []string{"--range", "1000000-7654321", sized}, "206 1", 1_000_000, 7_654_322},
					{"end", []string{"--range", "-1000", sized}, "206 1", int64(size) - 1000, int64(size)},
					// A large PUT asks with Expect: 100-continue first.
					{"upload", []string{"--upload-file", curl.upload(size), sized}, "204 1", 0, 0},
					{"echo", []string{"--data-binary", "@" + curl.upload(size), url + "/echo"}, "200 1", 0, int64(size)},
				} {
					t.Run(test.name, func(t *testing.T) {
						got, body := curl.run(t, append([]string{version.flag}, test.args...)...)
						if want := version.reports + " " + test.want; got != want {
							t.Errorf("protocol, status and connections are %q, want %q", got, want)
						}
						if err := pattern(test.to).receiveFrom(test.from, body); err != nil {
							t.Error(err)
						}
					})
				}
			})
		}
	})
}

// receiveFrom is receiveAll for what begins in the middle.
func (p pattern) receiveFrom(from int64, r io.Reader) error {
	got, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	want, err := io.ReadAll(io.NewSectionReader(p, from, int64(p)-from))
	if err != nil {
		return err
	}
	return same(got, want)
}

// curl runs curl against a server that it knows by name and trusts.
type curl struct {
	dir, ca string
	addr    netip.Addr
}

func newCurl(t *testing.T, addr netip.Addr) *curl {
	t.Helper()
	cert, err := certificate()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := &curl{dir: dir, ca: filepath.Join(dir, "ca.pem"), addr: addr}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	if err := os.WriteFile(c.ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// host is the address as a URL has it.
func (c *curl) host() string {
	if c.addr.Is6() {
		return "[" + c.addr.String() + "]"
	}
	return c.addr.String()
}

// named returns url with serverName for the address.
func (c *curl) named(url string) string {
	return strings.Replace(url, c.host(), serverName, 1)
}

// upload returns the name of a file with the pattern.
func (c *curl) upload(size pattern) string {
	name := filepath.Join(c.dir, "upload-"+itoa(int(size)))
	if _, err := os.Stat(name); err == nil {
		return name
	}
	content, err := io.ReadAll(size.reader())
	if err == nil {
		err = os.WriteFile(name, content, 0o600)
	}
	if err != nil {
		return err.Error() // curl will not find it
	}
	return name
}

// run returns what curl reports, and the body it got.
func (c *curl) run(t *testing.T, args ...string) (report string, body *os.File) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "body")
	args = append([]string{
		"--silent", "--show-error", "--fail", "--noproxy", "*", "--output", out,
		"--write-out", "%{http_version} %{response_code} %{num_connects}",
		"--cacert", c.ca, "--connect-to", serverName + "::" + c.host() + ":",
	}, args...)
	report = tool(t, "curl", "curl", args...)
	body, err := os.OpenFile(out, os.O_RDONLY|os.O_CREATE, 0o600) // no file when there was no body
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = body.Close() })
	return report, body
}

// TestForeignWrk puts net/http on the stack under wrk: not one request may fail.
func TestForeignWrk(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		l := listenOn(t, r.Listen, r.oneFamily().self)
		wrk(t, serveHTTP(t, l, &http.Server{Handler: site(), ReadHeaderTimeout: patience})+"/bytes?n=1000", 50)
	})
}

var wrkRequests = regexp.MustCompile(`(\d+) requests in`)

// wrk asks for url for a second, over conns connections.
func wrk(t *testing.T, url string, conns int) {
	t.Helper()
	out := tool(t, "wrk", "wrk", "-t1", "-c"+itoa(conns), "-d"+itoa(int(max(amount(1, 3), 1)))+"s", "--timeout", "5s", url)
	requests := wrkRequests.FindStringSubmatch(out)
	switch {
	case requests == nil, requests[1] == "0":
		t.Errorf("wrk made no request:\n%s", out)
	case strings.Contains(out, "Socket errors"), strings.Contains(out, "Non-2xx"):
		t.Errorf("wrk had errors:\n%s", out)
	default:
		t.Logf("%s: %s requests", url, requests[1])
	}
}

// TestForeignH2load puts HTTP/2 of net/http on the stack under h2load: every
// request succeeds.
func TestForeignH2load(t *testing.T) {
	const conns, streams = 10, 20
	requests := amount(5000, 40_000)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		for _, f := range r.families() {
			serverTLS, _ := tlsConfigs(t)
			url := serveHTTP(t, listenOn(t, r.Listen, f.self), &http.Server{Handler: site(), ReadHeaderTimeout: patience, TLSConfig: serverTLS})
			out := tool(t, "nghttp2-client", "h2load", "-n"+itoa(int(requests)), "-c"+itoa(conns), "-m"+itoa(streams), url+"/bytes?n=1000")
			for _, want := range []string{
				"Application protocol: h2\n",
				fmt.Sprintf("%d succeeded, 0 failed, 0 errored, 0 timeout\n", requests),
				fmt.Sprintf("status codes: %d 2xx, 0 3xx, 0 4xx, 0 5xx\n", requests),
			} {
				if !strings.Contains(out, want) {
					t.Errorf("h2load does not say %q:\n%s", want, out)
				}
			}
		}
	})
}

// TestForeignRedis puts a server that speaks Redis's protocol under
// redis-benchmark, with and without pipelining, and counts what arrives.
func TestForeignRedis(t *testing.T) {
	const conns = 50
	// The program rounds up to what goes into its pipelines.
	requests := amount(12_800, 64_000)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		store := &redisStore{values: make(map[string][]byte), calls: make(map[string]int64)}
		host, port := serveRedis(t, listenOn(t, r.Listen, r.oneFamily().self), store)
		for _, pipeline := range []int{1, 16} {
			// CONFIG, which the program asks for first, gets an error.
			out := tool(t, "redis-tools", "redis-benchmark", "-h", host, "-p", port, "-q",
				"-t", "ping_mbulk,set,get", "-n", itoa(int(requests)), "-c", itoa(conns), "-P", itoa(pipeline), "-d", "100")
			t.Logf("pipeline of %d:\n%s", pipeline, out[strings.LastIndex(out, "\r")+1:])
		}
		for _, name := range []string{"ping", "set", "get"} {
			if n := store.count(name); n != 2*requests {
				t.Errorf("%d commands %q arrived, want %d", n, name, 2*requests)
			}
		}
	})
}

// redisStore is the little of Redis that the benchmark asks for.
type redisStore struct {
	mu     sync.Mutex
	values map[string][]byte // guarded by mu
	calls  map[string]int64  // guarded by mu
}

func (s *redisStore) count(name string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[name]
}

func (s *redisStore) command(c redcon.Conn, cmd redcon.Command) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := strings.ToLower(string(cmd.Args[0]))
	s.calls[name]++
	switch {
	case name == "ping":
		c.WriteString("PONG")
	case name == "set" && len(cmd.Args) == 3:
		s.values[string(cmd.Args[1])] = cmd.Args[2]
		c.WriteString("OK")
	case name == "get" && len(cmd.Args) == 2:
		c.WriteBulk(s.values[string(cmd.Args[1])])
	default:
		c.WriteError("ERR unknown command")
	}
}

// serveRedis runs the store on l until the test ends.
func serveRedis(t *testing.T, l net.Listener, store *redisStore) (host, port string) {
	t.Helper()
	server := redcon.NewServer("", store.command, func(redcon.Conn) bool { return true }, nil)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		_ = l.Close()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	host, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return host, port
}
