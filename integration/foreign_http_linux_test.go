package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// site is the handler that the tests with HTTP ask. n is a number of bytes of
// the pattern.
//
//	GET  /bytes?n=    with its length, and in ranges
//	GET  /chunks?n=   in chunks, with a trailer
//	PUT  /bytes?n=    204 when the body is the pattern
//	POST /refuse      403, without a look at the body
//	POST /echo        the body
//	GET  /hijack      a line, and then an echo of everything
func site() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, q *http.Request) {
		http.ServeContent(w, q, "pattern.bin", time.Time{}, wanted(q).reader())
	})
	mux.HandleFunc("GET /chunks", func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Trailer", "Sent")
		size := wanted(q)
		for at := int64(0); at < int64(size); at += 10_000 {
			// The client judges.
			_, _ = io.Copy(w, io.NewSectionReader(size, at, 10_000))
			_ = http.NewResponseController(w).Flush()
		}
		w.Header().Set("Sent", itoa(int(size)))
	})
	mux.HandleFunc("PUT /bytes", func(w http.ResponseWriter, q *http.Request) {
		if err := wanted(q).receiveAll(q.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /refuse", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
	})
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, q *http.Request) {
		_, _ = io.Copy(w, q.Body) // the client judges
	})
	mux.HandleFunc("GET /hijack", func(w http.ResponseWriter, _ *http.Request) {
		c, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "mine now\n") // the client judges
		_, _ = io.Copy(c, buf)
	})
	return mux
}

// wanted is the pattern of a request's n.
func wanted(q *http.Request) pattern {
	n, err := strconv.ParseInt(q.URL.Query().Get("n"), 10, 64)
	if err != nil {
		return 0 // what follows is not what the client wants
	}
	return pattern(n)
}

// web is a running site with a client for it.
type web struct {
	url    string
	client *http.Client
	dialed *atomic.Int64 // connections of the client
}

// serveSite runs the site at one end of d, with a client at the other. HTTP/2
// takes TLS.
func serveSite(t *testing.T, d direction, http2 bool) web {
	t.Helper()
	w := web{dialed: new(atomic.Int64)}
	server := &http.Server{Handler: site(), ReadHeaderTimeout: patience}
	transport := &http.Transport{
		DisableCompression:    true,
		ExpectContinueTimeout: transferTime,
		ForceAttemptHTTP2:     http2,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			w.dialed.Add(1)
			return d.dial(ctx, network, address)
		},
	}
	if http2 {
		server.TLSConfig, transport.TLSClientConfig = tlsConfigs(t, "h2")
	}
	w.url = serveHTTP(t, d.listen(t), server)
	w.client = &http.Client{Transport: transport, Timeout: transferTime}
	t.Cleanup(w.client.CloseIdleConnections)
	return w
}

// request asks the site, gives the answer to look, and returns an error that
// says what was asked.
func (w web) request(ctx context.Context, method, path string, body io.Reader, look func(*http.Response) error) error {
	q, err := http.NewRequestWithContext(ctx, method, w.url+path, body)
	if err != nil {
		return err
	}
	if section, ok := body.(*io.SectionReader); ok {
		q.ContentLength = section.Size()
	}
	if expect, ok := body.(expecting); ok {
		q.Header.Set("Expect", "100-continue")
		q.ContentLength = expect.Size()
	}
	answer, err := w.client.Do(q)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if err := look(answer); err != nil {
		return fmt.Errorf("%s %s: status %s, %w", method, path, answer.Status, err)
	}
	return nil
}

// expecting is a body that is not sent before the server has asked for it.
type expecting struct{ *io.SectionReader }

// isPattern wants the whole pattern, and headers that fit.
func isPattern(size pattern, chunked bool) func(*http.Response) error {
	return func(answer *http.Response) error {
		length := int64(size)
		if chunked {
			length = -1
		}
		if answer.ContentLength != length {
			return fmt.Errorf("content length %d, want %d", answer.ContentLength, length)
		}
		if answer.StatusCode != http.StatusOK {
			return errors.New("want 200")
		}
		if err := size.receiveAll(answer.Body); err != nil {
			return err
		}
		if sent := answer.Trailer.Get("Sent"); chunked && sent != itoa(int(size)) {
			return fmt.Errorf("trailer says %q bytes, want %d", sent, size)
		}
		return nil
	}
}

func isStatus(want int) func(*http.Response) error {
	return func(answer *http.Response) error {
		if answer.StatusCode != want {
			text, err := io.ReadAll(answer.Body)
			return errors.Join(fmt.Errorf("want %d: %q", want, text), err)
		}
		return nil
	}
}

// TestForeignHTTP asks a server of net/http with its client: once the server is
// on the stack and the client is the kernel's, once the other way round.
func TestForeignHTTP(t *testing.T) {
	large := pattern(amount(64<<20, 512<<20))
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			w := serveSite(t, d, false)
			ask := func(method, path string, body io.Reader, look func(*http.Response) error) {
				t.Helper()
				if err := w.request(t.Context(), method, path, body, look); err != nil {
					t.Error(err)
				}
			}
			for i := range 100 {
				ask("GET", "/bytes?n="+itoa(i*100), nil, isPattern(pattern(i*100), false))
			}
			if n := w.dialed.Load(); n != 1 {
				t.Errorf("%d connections for requests one after the other, want 1", n)
			}
			ask("GET", "/chunks?n=1000000", nil, isPattern(1_000_000, true))
			// A reader whose size the client cannot see goes out in chunks.
			ask("PUT", "/bytes?n=1000000", io.MultiReader(pattern(1_000_000).reader()), isStatus(http.StatusNoContent))
			path := "/bytes?n=" + itoa(int(large))
			ask("GET", path, nil, isPattern(large, false))
			ask("PUT", path, large.reader(), isStatus(http.StatusNoContent))
			t.Run("100-continue", func(t *testing.T) { expectContinue(t, w) })
			t.Run("hijack", func(t *testing.T) { hijack(t, w, d) })
		})
	})
}

// expectContinue sends a body only after the server has asked for it.
func expectContinue(t *testing.T, w web) {
	const size = pattern(1 << 20)
	var asked atomic.Bool
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got100Continue: func() { asked.Store(true) }})
	if err := w.request(ctx, "PUT", "/bytes?n="+itoa(int(size)), expecting{size.reader()}, isStatus(http.StatusNoContent)); err != nil {
		t.Error(err)
	}
	if !asked.Load() {
		t.Error("the server took a body without asking for it")
	}
	body := expecting{size.reader()}
	if err := w.request(t.Context(), "POST", "/refuse", body, isStatus(http.StatusForbidden)); err != nil {
		t.Error(err)
	}
	if at, err := body.Seek(0, io.SeekCurrent); at != 0 || err != nil {
		t.Errorf("the client sent %d bytes that the server did not want, %v", at, err)
	}
}

// hijack takes a connection away from HTTP.
func hijack(t *testing.T, w web, d direction) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := d.dial(ctx, "tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	setDeadline(t, c)
	// The first bytes of the new protocol come right behind the request.
	if _, err := io.WriteString(c, "GET /hijack HTTP/1.1\r\nHost: "+serverName+"\r\n\r\nat once"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	got := make([]byte, len("mine now\nat once"))
	if _, err := io.ReadFull(in, got); err != nil || string(got) != "mine now\nat once" {
		t.Fatalf("read %q and %v", got, err)
	}
	want := payload(1, 300_000)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- errors.Join(err, c.(halfCloser).CloseWrite())
	}()
	all, err := io.ReadAll(in)
	if err != nil {
		t.Error(err)
	}
	if err := same(all, want); err != nil {
		t.Error(err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// TestForeignHTTP2 asks many things at once over one connection with TLS.
func TestForeignHTTP2(t *testing.T) {
	const streams = 50
	large := pattern(amount(64<<20, 512<<20))
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			w := serveSite(t, d, true)
			version := func(answer *http.Response) error {
				if answer.ProtoMajor != 2 {
					return fmt.Errorf("protocol %s, want HTTP/2", answer.Proto)
				}
				return isPattern(0, false)(answer)
			}
			// The first request opens the connection that the others share.
			if err := w.request(t.Context(), "GET", "/bytes?n=0", nil, version); err != nil {
				t.Fatal(err)
			}
			var (
				asking sync.WaitGroup
				mu     sync.Mutex
				errs   []error
			)
			for i := range streams {
				asking.Go(func() {
					body := payload(uint64(i), i*5000)
					err := w.request(t.Context(), "POST", "/echo", bytes.NewReader(body), func(answer *http.Response) error {
						got, err := io.ReadAll(answer.Body)
						if err != nil {
							return err
						}
						return same(got, body)
					})
					mu.Lock()
					defer mu.Unlock()
					errs = append(errs, err)
				})
			}
			asking.Wait()
			if err := errors.Join(errs...); err != nil {
				t.Error(err)
			}
			path := "/bytes?n=" + itoa(int(large))
			if err := w.request(t.Context(), "GET", path, nil, isPattern(large, false)); err != nil {
				t.Error(err)
			}
			if err := w.request(t.Context(), "PUT", path, large.reader(), isStatus(http.StatusNoContent)); err != nil {
				t.Error(err)
			}
			if n := w.dialed.Load(); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
		})
	})
}
