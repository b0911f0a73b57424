package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

// dial connects from the stack; the connection ends with the test.
func (r *rig) dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := r.DialContext(ctx, network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	setDeadline(t, c)
	return c
}

// listenKernel is a listener of the kernel that ends with the test.
func listenKernel(t *testing.T, f family) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(f.host, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

// serveEchoOn echoes on every connection until l is closed.
func serveEchoOn(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c) // the peer judges what it gets
		}()
	}
}

// echoPackets echoes datagrams until p is closed.
func echoPackets(p net.PacketConn) {
	buf := make([]byte, 65_536)
	for {
		n, from, err := p.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = p.WriteTo(buf[:n], from) // the peer judges what it gets
	}
}

// TestHTTP runs net/http on the stack and moves 16 MiB each way.
func TestHTTP(t *testing.T) {
	const size = 16 << 20
	document := payload(1, size)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /document", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(document) // the client judges
	})
	mux.HandleFunc("POST /digest", func(w http.ResponseWriter, q *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, q.Body)
		fmt.Fprintf(w, "%d %x %v", n, h.Sum(nil), err)
	})
	digest := sha256.Sum256(document)
	forVariants(t, func(t *testing.T, r *rig) {
		l, err := r.Listen("tcp", ":80")
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: mux, ReadHeaderTimeout: patience}
		ended := make(chan error, 1)
		go func() { ended <- server.Serve(l) }()
		t.Cleanup(func() {
			_ = server.Close()
			if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
				t.Errorf("the server ended with %v", err)
			}
		})
		client := &http.Client{Transport: &http.Transport{DisableCompression: true}, Timeout: patience}
		t.Cleanup(client.CloseIdleConnections)
		r.forFamilies(t, func(t *testing.T, f family) {
			url := "http://" + netip.AddrPortFrom(f.self, 80).String()
			answer, err := fetch(client.Get(url + "/document"))
			if err != nil {
				t.Fatal(err)
			}
			if err := same(answer, document); err != nil {
				t.Error(err)
			}
			answer, err = fetch(client.Post(url+"/digest", "application/octet-stream", bytes.NewReader(document)))
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%d %s %v", size, hex.EncodeToString(digest[:]), nil); string(answer) != want {
				t.Errorf("POST: the server read %s, want %s", answer, want)
			}
		})
	})
}

func fetch(answer *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %s", answer.Status)
	}
	return io.ReadAll(answer.Body)
}

// TestDialKernel connects from the stack to sockets of the kernel.
func TestDialKernel(t *testing.T) {
	const flows = 20
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			l := listenKernel(t, f)
			go serveEchoOn(l)
			for i := range flows {
				c := r.dial(t, "tcp", l.Addr().String()).(halfCloser)
				if err := exchange(c, payload(uint64(i), 1+i*20_000)); err != nil {
					t.Errorf("flow %d: %v", i, err)
				}
				_ = c.Close()
			}

			server, err := net.ListenPacket("udp", netip.AddrPortFrom(f.host, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			go echoPackets(server)
			buf := make([]byte, 65_536)
			for i, size := range []int{0, 1, 1400, 5000, 30_000} {
				c := r.dial(t, "udp", server.LocalAddr().String())
				want := payload(uint64(i), size)
				if _, err := c.Write(want); err != nil {
					t.Fatal(err)
				}
				n, err := c.Read(buf)
				if err != nil {
					t.Fatalf("datagram of %d bytes: %v", size, err)
				}
				if err := same(buf[:n], want); err != nil {
					t.Error(err)
				}
				_ = c.Close()
			}
		})
	})
}

// TestDialErrors looks at how a dial fails: callers branch on these.
func TestDialErrors(t *testing.T) {
	r := open(t, variants()[0].config())
	r.forFamilies(t, func(t *testing.T, f family) {
		closed := listenKernel(t, f)
		refusing := closed.Addr().String()
		_ = closed.Close()
		// Linux refuses for a socket that does not exist; an address of the
		// subnet that nobody has is never resolved.
		absent := f.host.Next().Next().Next()
		elsewhere := "192.0.2.1:80"
		if f.self.Is6() {
			elsewhere = "[2001:db8::1]:80"
		}
		for _, test := range []struct {
			name, network, address string
			timeout                time.Duration
			want                   error
		}{
			{"refused", "tcp", refusing, patience, syscall.ECONNREFUSED},
			{"no route", "tcp", elsewhere, patience, syscall.ENETUNREACH},
			{"no route for datagrams", "udp", elsewhere, patience, syscall.ENETUNREACH},
			{"nobody there", "tcp", netip.AddrPortFrom(absent, 80).String(), patience, syscall.EHOSTUNREACH},
			{"no time", "tcp", netip.AddrPortFrom(absent, 80).String(), 50 * time.Millisecond, os.ErrDeadlineExceeded},
		} {
			t.Run(test.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
				defer cancel()
				begin := time.Now()
				c, err := r.DialContext(ctx, test.network, test.address)
				if err == nil {
					_ = c.Close()
				}
				wantOpError(t, err, test.want)
				if took := time.Since(begin); took > test.timeout+patience/4 {
					t.Errorf("it took %v with a timeout of %v", took, test.timeout)
				}
			})
		}
	})
}

// wantOpError checks that err is a *net.OpError around want.
func wantOpError(t *testing.T, err, want error) {
	t.Helper()
	var op *net.OpError
	switch {
	case !errors.Is(err, want):
		t.Errorf("error is %v, want %v", err, want)
	case !errors.As(err, &op):
		t.Errorf("error %v is a %T, want a *net.OpError", err, err)
	}
}

// TestDeadlines lets reads and writes run into deadlines, and go on after.
func TestDeadlines(t *testing.T) {
	r := open(t, variants()[0].config())
	r.forFamilies(t, func(t *testing.T, f family) {
		l := listenKernel(t, f)
		c := r.dial(t, "tcp", l.Addr().String())
		peer := accept(t, l)

		begin := time.Now()
		if err := c.SetReadDeadline(begin.Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := c.Read(make([]byte, 1))
		wantTimeout(t, "read", err, begin)

		// The peer does not read, so at some point nothing more fits.
		begin = time.Now()
		if err := c.SetWriteDeadline(begin.Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		sent, err := c.Write(make([]byte, 64<<20))
		wantTimeout(t, "write", err, begin)

		setDeadline(t, c)
		received := make(chan error, 1)
		go func() {
			_, err := io.CopyN(io.Discard, peer, int64(sent))
			if err == nil {
				_, err = peer.Write([]byte("here"))
			}
			received <- err
		}()
		got := make([]byte, 4)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "here" {
			t.Errorf("after the deadlines: read %q and %v, want what the peer says on receipt of the %d bytes that were taken", got, err, sent)
		}
		if err := <-received; err != nil {
			t.Error(err)
		}
	})
}

func wantTimeout(t *testing.T, what string, err error, begin time.Time) {
	t.Helper()
	wantOpError(t, err, os.ErrDeadlineExceeded)
	var timeout net.Error
	if errors.As(err, &timeout) && !timeout.Timeout() {
		t.Errorf("%s: %v is no timeout", what, err)
	}
	if took := time.Since(begin); took > patience/4 {
		t.Errorf("%s: it took %v", what, took)
	}
}

// TestUseAfterClose uses what was closed, and what is being waited on.
func TestUseAfterClose(t *testing.T) {
	r := open(t, variants()[0].config())
	r.forFamilies(t, func(t *testing.T, f family) {
		l := listenKernel(t, f)
		go serveEchoOn(l)
		c := r.dial(t, "tcp", l.Addr().String())
		waiting := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			waiting <- err
		}()
		time.Sleep(20 * time.Millisecond) // the read waits
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		wantOpError(t, <-waiting, net.ErrClosed)
		_, err := c.Read(make([]byte, 1))
		wantOpError(t, err, net.ErrClosed)
		_, err = c.Write(make([]byte, 1))
		wantOpError(t, err, net.ErrClosed)
		wantOpError(t, c.SetDeadline(time.Now()), net.ErrClosed)
		wantOpError(t, c.Close(), net.ErrClosed)

		ours, err := r.Listen("tcp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := ours.Accept()
			waiting <- err
		}()
		time.Sleep(20 * time.Millisecond) // the accept waits
		if err := ours.Close(); err != nil {
			t.Error(err)
		}
		wantOpError(t, <-waiting, net.ErrClosed)
		_, err = ours.Accept()
		wantOpError(t, err, net.ErrClosed)

		packets, err := r.ListenPacket("udp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		if err := packets.Close(); err != nil {
			t.Error(err)
		}
		_, _, err = packets.ReadFrom(make([]byte, 1))
		wantOpError(t, err, net.ErrClosed)
		_, err = packets.WriteTo(make([]byte, 1), net.UDPAddrFromAddrPort(netip.AddrPortFrom(f.host, 9)))
		wantOpError(t, err, net.ErrClosed)
	})
}

// TestPortInUse listens twice, in all combinations of doors.
func TestPortInUse(t *testing.T) {
	r := open(t, variants()[0].config())
	tcp := map[string]func() (io.Closer, error){
		"HandleTCP": func() (io.Closer, error) { return r.HandleTCP("tcp", ":5000", echo{}) },
		"Listen":    func() (io.Closer, error) { return r.Listen("tcp", ":5000") },
	}
	udp := map[string]func() (io.Closer, error){
		"HandleUDP":    func() (io.Closer, error) { return r.HandleUDP("udp", ":5000", ignoreDatagrams) },
		"ListenPacket": func() (io.Closer, error) { return r.ListenPacket("udp", ":5000") },
	}
	for _, network := range []map[string]func() (io.Closer, error){tcp, udp} {
		for firstName, first := range network {
			for secondName, second := range network {
				t.Run(firstName+" then "+secondName, func(t *testing.T) {
					l, err := first()
					if err != nil {
						t.Fatal(err)
					}
					if extra, err := second(); err == nil {
						t.Errorf("two listeners on one port")
						_ = extra.Close()
					} else {
						wantOpError(t, err, syscall.EADDRINUSE)
					}
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestReset has the peer reset a connection while the stack reads, while it
// writes, and after the peer has half-closed: each must say so, and end.
func TestReset(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			l := listenKernel(t, f)
			for name, use := range map[string]func(c net.Conn) error{
				"read": func(c net.Conn) error {
					_, err := c.Read(make([]byte, 1))
					return err
				},
				"write": func(c net.Conn) error {
					for {
						if _, err := c.Write(make([]byte, 100_000)); err != nil {
							return err
						}
					}
				},
			} {
				t.Run(name, func(t *testing.T) {
					c := r.dial(t, "tcp", l.Addr().String())
					peer := accept(t, l).(*net.TCPConn)
					failed := make(chan error, 1)
					go func() { failed <- use(c) }()
					time.Sleep(20 * time.Millisecond) // it waits
					if err := peer.SetLinger(0); err != nil {
						t.Fatal(err)
					}
					if err := peer.Close(); err != nil {
						t.Fatal(err)
					}
					wantOpError(t, <-failed, syscall.ECONNRESET)
				})
			}
		})
	})
}
