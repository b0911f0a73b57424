package stack

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"testing"
)

// placedConn is a connection that lives on CPU 7.
type placedConn struct{ net.Conn }

func (placedConn) Shard() int    { return 3 }
func (placedConn) CPU() int      { return 7 }
func (placedConn) NUMANode() int { return 1 }

// oneConn is a listener that accepts one connection.
type oneConn chan net.Conn

func (l oneConn) Accept() (net.Conn, error) {
	c, ok := <-l
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (l oneConn) Close() error   { return nil }
func (l oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// A handler of net/http learns where its connection lives.
func TestConnContext(t *testing.T) {
	client, peer := net.Pipe()
	l := make(oneConn, 1)
	l <- placedConn{peer}
	server := &http.Server{
		ConnContext: ConnContext,
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			w, ok := WhereFrom(r.Context())
			if !ok || w.Shard() != 3 || w.CPU() != 7 || w.NUMANode() != 1 {
				t.Errorf("WhereFrom is %v, %v; want shard 3, CPU 7, node 1", w, ok)
			}
		}),
	}
	ended := make(chan error)
	go func() { ended <- server.Serve(l) }()
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return client, nil }}
	response, err := (&http.Client{Transport: transport}).Get("http://pipe/")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	close(l)
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
}

func TestWhereOf(t *testing.T) {
	pipe, _ := net.Pipe()
	for _, test := range []struct {
		name   string
		conn   net.Conn
		placed bool
	}{
		{"the stack's", placedConn{}, true},
		{"below TLS", tls.Server(placedConn{}, nil), true},
		{"below two of them", tls.Server(tls.Server(placedConn{}, nil), nil), true},
		{"another", pipe, false},
		{"another below TLS", tls.Server(pipe, nil), false},
		{"TLS on nothing", tls.Client(nil, nil), false},
	} {
		if w, ok := WhereFrom(ConnContext(t.Context(), test.conn)); ok != test.placed || ok && w.CPU() != 7 {
			t.Errorf("%s: %v, %v; want %v", test.name, w, ok, test.placed)
		}
	}
}

// movingConn is a connection that can tell of its moves.
type movingConn struct {
	net.Conn
	told *func(shard, cpu, node int)
}

func (c movingConn) OnMove(f func(shard, cpu, node int)) { *c.told = f }

// TestOnMove: the function reaches the connection of the stack, wherever it is.
func TestOnMove(t *testing.T) {
	pipe, _ := net.Pipe()
	var told func(shard, cpu, node int)
	conn := movingConn{pipe, &told}
	for _, c := range []net.Conn{conn, tls.Server(conn, nil)} {
		at := 0
		if !OnMove(c, func(shard, cpu, node int) { at = shard + 10*cpu + 100*node }) {
			t.Errorf("OnMove of %T did not find the connection", c)
		}
		if told(1, 2, 3); at != 321 {
			t.Errorf("the function was told of %d, want shard 1, CPU 2, node 3", at)
		}
		if !OnMove(c, nil) || told != nil {
			t.Errorf("OnMove(%T, nil) did not end the calls", c)
		}
	}
	if OnMove(pipe, func(int, int, int) {}) || OnMove(tls.Server(pipe, nil), func(int, int, int) {}) {
		t.Error("OnMove of a pipe says that it will tell")
	}
}
