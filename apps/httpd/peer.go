package main

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// writePiece is how much of a file a client takes per write timeout, in
	// bytes: with the default of 30 s a client slower than 35 KB/s is cut off.
	writePiece = 1 << 20
	// lingerTime and lingerBytes bound how long a connection listens to a
	// client that is still sending when its answer is complete. Closed at
	// once, the rest of the request would be answered by a RST, and that takes
	// the answer out of the client's receive buffer.
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 256 << 10
)

// peers are the open connections. Its methods may be called from any
// goroutine.
type peers struct {
	max          int // connections
	writeTimeout time.Duration

	mu   sync.Mutex
	open map[*peer]struct{} // guarded by mu
}

func newPeers(maxConns int, writeTimeout time.Duration) *peers {
	return &peers{max: maxConns, writeTimeout: writeTimeout, open: make(map[*peer]struct{})}
}

// admit makes c one of the peers, or returns nil when there are too many.
func (p *peers) admit(c net.Conn) *peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.open) >= p.max {
		return nil
	}
	m := &peer{Conn: c, peers: p}
	p.open[m] = struct{}{}
	return m
}

// refuse tells a client in plain HTTP that there are too many, and closes c.
// The answer fits any send buffer, so nothing waits.
func refuse(c net.Conn, plain bool) {
	if plain && c.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
		_, _ = io.WriteString(c, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	}
	_ = c.Close()
}

func (p *peers) leave(m *peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, m)
}

// busy counts the peers whose request is not yet answered.
func (p *peers) busy() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for m := range p.open {
		if m.busy.Load() {
			n++
		}
	}
	return n
}

// closeAll closes the connections below the peers. Only for connections that
// any goroutine may close: not those of a shard.
func (p *peers) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for m := range p.open {
		_ = m.Conn.Close()
	}
}

// peer is a connection with bounds. A client has to take each piece of an
// answer in the write timeout; so a long answer may take its time, as long as
// it goes on.
type peer struct {
	net.Conn
	peers  *peers
	closed atomic.Bool

	// For the drain of engine shard: the first bytes of a request set it, the
	// engine clears it when the answer is written.
	busy atomic.Bool

	// Of the goroutine that serves the connection.
	answered bool // at least one request
	linger   bool // the client may be sending still when the answer is complete
}

// NetConn returns the network's own connection.
func (p *peer) NetConn() net.Conn { return p.Conn }

// Read implements net.Conn.
func (p *peer) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	if n > 0 && !p.busy.Load() {
		p.busy.Store(true)
	}
	return n, err
}

// Write implements net.Conn.
func (p *peer) Write(b []byte) (n int, err error) {
	for {
		piece := b[n:min(n+writePiece, len(b))]
		if err := p.extend(); err != nil {
			return n, err
		}
		done, err := p.Conn.Write(piece)
		n += done
		if err != nil || n == len(b) {
			return n, err
		}
	}
}

// ReadFrom implements io.ReaderFrom, which net/http uses for sendfile(2) where
// the connection has it.
func (p *peer) ReadFrom(r io.Reader) (n int64, err error) {
	to, ok := p.Conn.(io.ReaderFrom)
	all, limited := r.(*io.LimitedReader)
	if !ok || !limited {
		return io.Copy(struct{ io.Writer }{p}, r)
	}
	for all.N > 0 {
		if err := p.extend(); err != nil {
			return n, err
		}
		// sendfile looks below one limit, not two.
		piece := io.LimitedReader{R: all.R, N: min(all.N, writePiece)}
		done, err := to.ReadFrom(&piece)
		n += done
		all.N -= done
		if err != nil || done == 0 {
			return n, err
		}
	}
	return n, nil
}

// extend gives the client new time for the next piece.
func (p *peer) extend() error {
	return p.SetWriteDeadline(time.Now().Add(p.peers.writeTimeout))
}

// CloseWrite sends a FIN and leaves the other direction open, where the
// connection can do that.
func (p *peer) CloseWrite() error {
	if c, ok := p.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// Close implements net.Conn.
func (p *peer) Close() error {
	if p.closed.Swap(true) {
		return net.ErrClosed
	}
	if p.linger && p.CloseWrite() == nil && p.SetReadDeadline(time.Now().Add(lingerTime)) == nil {
		_, _ = io.CopyN(io.Discard, p.Conn, lingerBytes)
	}
	p.peers.leave(p)
	return p.Conn.Close()
}
