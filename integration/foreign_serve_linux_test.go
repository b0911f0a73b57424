package integration

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/valyala/fasthttp"
)

// servePort is where the tests of Serve listen.
const servePort = 443

// serve runs h on the shards and returns the addresses of the service, one for
// each family.
func (r *rig) serve(t *testing.T, h func(net.Conn)) (addrs []string) {
	t.Helper()
	l, err := r.Serve("tcp", ":"+itoa(servePort), h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for _, f := range r.families() {
		addrs = append(addrs, netip.AddrPortFrom(f.self, servePort).String())
	}
	return addrs
}

// dialKernel connects from the kernel, with time for a large transfer.
func dialKernel(t *testing.T, address string) net.Conn {
	t.Helper()
	return dialLong(t, new(net.Dialer).DialContext, address)
}

// TestForeignFasthttp runs a server of fasthttp on the shards, under curl and
// wrk.
func TestForeignFasthttp(t *testing.T) {
	const size = pattern(8 << 20)
	var failed atomic.Int64
	server := &fasthttp.Server{
		// The default date comes from a goroutine that never ends.
		NoDefaultDate:      true,
		MaxRequestBodySize: int(2 * size),
		Logger:             countLines{&failed},
		Handler: func(ctx *fasthttp.RequestCtx) {
			switch {
			case ctx.IsPost():
				ctx.SetBody(ctx.PostBody())
			case ctx.QueryArgs().Has("n"):
				n := pattern(ctx.QueryArgs().GetUintOrZero("n"))
				ctx.SetBodyStream(n.reader(), int(n))
			default:
				ctx.SetBodyString("hello")
			}
		},
	}
	forForeign(t, 4, func(t *testing.T, r *rig) {
		addrs := r.serve(t, func(c net.Conn) {
			if err := server.ServeConn(c); err != nil && !errors.Is(err, io.EOF) {
				failed.Add(1)
			}
		})
		for i, f := range r.families() {
			curl := newCurl(t, f.self)
			url := curl.named("http://" + addrs[i])
			for _, args := range [][]string{
				{url + "/?n=" + itoa(int(size))},
				{"--data-binary", "@" + curl.upload(size), url},
			} {
				report, body := curl.run(t, append(args, "--http1.1")...)
				if report != "1.1 200 1" {
					t.Errorf("protocol, status and connections are %q, want 1.1 200 1", report)
				}
				if err := size.receiveAll(body); err != nil {
					t.Error(err)
				}
			}
			if n := failed.Load(); n != 0 {
				t.Errorf("%d connections of curl failed on the server's side", n)
			}
			if f == r.oneFamily() {
				wrk(t, "http://"+addrs[i]+"/", 50)
				failed.Store(0) // wrk hangs up in the middle of its last requests
			}
		}
	})
}

// countLines is a logger that counts.
type countLines struct{ lines *atomic.Int64 }

// Printf implements fasthttp.Logger.
func (l countLines) Printf(string, ...any) { l.lines.Add(1) }

// TestForeignServeTLS echoes over TLS that runs on the shards.
func TestForeignServeTLS(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		serverTLS, clientTLS := tlsConfigs(t)
		clientTLS.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		addrs := r.serve(t, func(c net.Conn) {
			secured := tls.Server(c, serverTLS)
			echoAll(secured)
			_ = secured.Close() // the client judges
		})
		for i := range 20 {
			c := tls.Client(dialKernel(t, addrs[i%len(addrs)]), clientTLS)
			if err := exchange(c, payload(uint64(i), i*100_000)); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
			if resumed := c.ConnectionState().DidResume; resumed != (i > 0) {
				t.Errorf("connection %d: session taken up again: %v, want %v", i, resumed, i > 0)
			}
			_ = c.Close() // both sides have said goodbye
		}
	})
}

// TestForeignServeLines runs a server that is written as in a textbook: lines
// in, lines out. The client sends many lines before it reads the first answer.
func TestForeignServeLines(t *testing.T) {
	const lines = 20_000
	forForeign(t, 4, func(t *testing.T, r *rig) {
		addrs := r.serve(t, func(c net.Conn) {
			in, out := bufio.NewScanner(c), bufio.NewWriter(c)
			for in.Scan() {
				fmt.Fprintf(out, "%s!\n", strings.ToUpper(in.Text()))
			}
			_ = out.Flush() // the client judges
		})
		for _, addr := range addrs {
			c := dialKernel(t, addr).(halfCloser)
			var question, want bytes.Buffer
			for i := range lines {
				fmt.Fprintf(&question, "line %d\n", i)
				fmt.Fprintf(&want, "LINE %d!\n", i)
			}
			sent := make(chan error, 1)
			go func() {
				for question.Len() > 0 { // in pieces that end anywhere
					if _, err := c.Write(question.Next(997)); err != nil {
						sent <- err
						return
					}
				}
				sent <- c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil {
				t.Error(err)
			}
			if err := same(got, want.Bytes()); err != nil {
				t.Error(err)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		}
	})
}

// TestForeignServeTransfer moves many bytes to a handler, and as many back.
func TestForeignServeTransfer(t *testing.T) {
	size := pattern(amount(256<<20, 1<<30))
	forForeign(t, 4, func(t *testing.T, r *rig) {
		served := make(chan error, 1)
		addrs := r.serve(t, func(c net.Conn) { served <- receiveThenSend(c, size) })
		if err := sendThenReceive(dialKernel(t, addrs[r.cfg.Shards%len(addrs)]), size); err != nil {
			t.Errorf("client: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("handler: %v", err)
		}
	})
}
