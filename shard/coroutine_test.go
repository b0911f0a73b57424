package shard

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// serve runs h on b and returns a function that dials it from a.
func serve(t *testing.T, a, b *Set, h func(net.Conn)) (dial func() net.Conn) {
	t.Helper()
	l, err := b.Serve([]netip.Addr{addrB}, 0, 64, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return func() net.Conn {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := a.DialNet(ctx, netip.AddrPort{}, l.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
}

func TestServeRunsOnTheShardsThread(t *testing.T) {
	a, b := startPair(t, nil)
	shardThread, handlerThread := 0, 0
	b.shards[0].do(func(*Shard) { shardThread = gettid() })
	dial := serve(t, a, b, func(c net.Conn) {
		handlerThread = gettid()
		r := bufio.NewReader(c)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if _, err := io.WriteString(c, strings.ToUpper(line)); err != nil {
				return
			}
		}
	})
	c := dial()
	r := bufio.NewReader(c)
	for _, line := range []string{"hello\n", "again\n"} {
		if _, err := io.WriteString(c, line); err != nil {
			t.Fatal(err)
		}
		if got, err := r.ReadString('\n'); got != strings.ToUpper(line) || err != nil {
			t.Fatalf("answer %q, %v", got, err)
		}
	}
	if handlerThread != shardThread {
		t.Errorf("handler ran on thread %d, the shard is %d", handlerThread, shardThread)
	}
}

// While one handler waits for its peer, to write, or sleeps, others go on.
func TestServeHandlersDoNotWaitForEachOther(t *testing.T) {
	a, b := startPair(t, nil)
	dial := serve(t, a, b, func(c net.Conn) {
		kind := make([]byte, 1)
		if _, err := io.ReadFull(c, kind); err != nil {
			return
		}
		switch kind[0] {
		case 'r': // waits for more
			_, _ = io.ReadFull(c, make([]byte, 1))
		case 'w': // nobody reads it
			_, _ = c.Write(make([]byte, 8<<20))
		case 's':
			_ = c.(*ServedConn).Sleep(time.Minute)
		case 'o':
			c.(*ServedConn).Offload(func() { time.Sleep(50 * time.Millisecond) })
			_, _ = c.Write([]byte("done"))
		case 'e':
			_, _ = c.Write([]byte("echo"))
		}
	})
	for _, kind := range "rws" {
		if _, err := dial().Write([]byte(string(kind))); err != nil {
			t.Fatal(err)
		}
	}
	for kind, want := range map[string]string{"e": "echo", "o": "done"} {
		c := dial()
		if _, err := c.Write([]byte(kind)); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != want || err != nil {
			t.Errorf("handler %q answered %q, %v; want %q", kind, got, err, want)
		}
	}
	if n := b.Stats()[0].Offloads; n != 1 {
		t.Errorf("%d offloads counted, want 1", n)
	}
}

func TestServeDeadlinesAndErrors(t *testing.T) {
	a, b := startPair(t, nil)
	failed := make(chan string, 10)
	timedOut := make(chan struct{})
	expect := func(what string, err, want error) {
		if !errors.Is(err, want) {
			failed <- what + ": " + errorString(err) + ", want " + want.Error()
		}
	}
	dial := serve(t, a, b, func(c net.Conn) {
		defer func() { failed <- "" }()
		one := make([]byte, 1)
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := c.Read(one)
		expect("read after its deadline", err, os.ErrDeadlineExceeded)
		_ = c.SetReadDeadline(time.Now().Add(-time.Second))
		_, err = c.Read(one)
		expect("read with a deadline in the past", err, os.ErrDeadlineExceeded)
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond).Round(0))
		_, err = c.Read(one)
		expect("read after a deadline of the wall clock", err, os.ErrDeadlineExceeded)
		close(timedOut)
		_ = c.SetReadDeadline(time.Time{})
		if _, err = c.Read(one); err != nil || one[0] != 'x' {
			failed <- "read without deadline: " + errorString(err)
		}
		_ = c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		n, err := c.Write(make([]byte, 8<<20))
		expect("write to a peer that does not read", err, os.ErrDeadlineExceeded)
		if n == 0 {
			failed <- "nothing was written before the deadline"
		}
		_ = c.Close()
		_, err = c.Read(one)
		expect("read after Close", err, net.ErrClosed)
		_, err = c.Write(one)
		expect("write after Close", err, net.ErrClosed)
		expect("second Close", c.Close(), net.ErrClosed)
	})
	c := dial()
	<-timedOut
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	for msg := range failed {
		if msg == "" {
			break
		}
		t.Error(msg)
	}
}

// A handler outlives its connection.
func TestServeAfterClose(t *testing.T) {
	a, b := startPair(t, nil)
	done := make(chan struct{})
	dial := serve(t, a, b, func(c net.Conn) {
		_ = c.Close()
		_ = c.(*ServedConn).Sleep(time.Millisecond)
		c.(*ServedConn).Offload(func() {})
		close(done)
	})
	dial()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("a handler that closed its connection and slept was never resumed")
	}
}

func TestServePeerEnds(t *testing.T) {
	a, b := startPair(t, nil)
	results := make(chan error, 1)
	dial := serve(t, a, b, func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		results <- err
	})
	c := dial()
	_, _ = c.Write([]byte("bye"))
	_ = c.Close()
	if err := <-results; err != nil {
		t.Errorf("peer closed, handler read until %v, want the end", err)
	}
	n := dial().(*NetConn)
	if _, err := n.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	n.sh.Load().do(func(*Shard) { n.c.Abort() })
	var opErr *net.OpError
	if err := <-results; !errors.As(err, &opErr) {
		t.Errorf("peer reset the connection, handler read until %v, want an error", err)
	}
}

func TestServePanic(t *testing.T) {
	var logged bytes.Buffer
	var mu sync.Mutex
	a, b := startPair(t, func(cfg *Config) {
		cfg.Logger = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return logged.Write(p)
		}), nil))
	})
	dial := serve(t, a, b, func(c net.Conn) {
		b := make([]byte, 1)
		_, _ = c.Read(b)
		switch b[0] {
		case 'p':
			panic("on the shard")
		case 'o':
			c.(*ServedConn).Offload(func() { panic("elsewhere") })
		}
		_, _ = c.Write([]byte("fine"))
	})
	for _, kind := range []string{"p", "o"} {
		c := dial()
		_, _ = c.Write([]byte(kind))
		if got, err := io.ReadAll(c); len(got) != 0 || err == nil {
			t.Errorf("connection of a handler that panicked ended with %q, %v; want a reset", got, err)
		}
	}
	c := dial()
	_, _ = c.Write([]byte("x"))
	if got, _ := io.ReadAll(c); string(got) != "fine" {
		t.Errorf("next connection got %q", got)
	}
	if n := b.Stats()[0].HandlerPanics; n != 2 {
		t.Errorf("%d panics counted, want 2", n)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, want := range []string{"on the shard", "elsewhere", "TestServePanic"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("log does not tell %q:\n%s", want, logged.String())
		}
	}
}

// Closing the stack ends handlers wherever they wait.
func TestServeClose(t *testing.T) {
	before := runtime.NumGoroutine()
	a, b := startPair(t, func(cfg *Config) { cfg.Drain = 10 * time.Millisecond })
	var ended sync.WaitGroup
	dial := serve(t, a, b, func(c net.Conn) {
		defer ended.Done()
		kind := make([]byte, 1)
		_, _ = c.Read(kind)
		_, _ = c.Write(kind)
		switch kind[0] {
		case 'r':
			_, _ = c.Read(kind)
		case 'w':
			_, _ = c.Write(make([]byte, 8<<20))
		case 's':
			_ = c.(*ServedConn).Sleep(time.Hour)
		case 'o':
			c.(*ServedConn).Offload(func() { time.Sleep(20 * time.Millisecond) })
		}
	})
	for _, kind := range "rwso" {
		ended.Add(1)
		c := dial()
		_, _ = c.Write([]byte(string(kind)))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	b.Close()
	ended.Wait()
	a.Close()
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("%d goroutines after Close, %d before New", runtime.NumGoroutine(), before)
}

// TestServeTLS: crypto/tls runs on a coroutine as it is.
func TestServeTLS(t *testing.T) {
	a, b := startPair(t, nil)
	config := &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}}
	const size = 4 << 20
	dial := serve(t, a, b, func(c net.Conn) {
		server := tls.Server(c, config)
		_, _ = io.Copy(server, io.LimitReader(server, size))
		_ = server.Close()
	})
	client := tls.Client(dial(), &tls.Config{InsecureSkipVerify: true})
	sent := make([]byte, size)
	_, _ = rand.Read(sent)
	go func() { _, _ = client.Write(sent) }()
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("echo of %d bytes over TLS brought %d, %v", len(sent), len(got), err)
	}
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func errorString(err error) string {
	if err == nil {
		return "no error"
	}
	return err.Error()
}
