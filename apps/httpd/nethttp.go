package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"
)

// connKey is the key of the connection in a request's context.
type connKey struct{}

// netEngine serves with net/http over the network's listener.
type netEngine struct {
	*app
	server *http.Server
	logger *slog.Logger
}

func newNetEngine(a *app, logger *slog.Logger) *netEngine {
	e := &netEngine{app: a, logger: logger}
	e.server = &http.Server{
		Handler:           e,
		ReadHeaderTimeout: a.headerTimeout,
		ReadTimeout:       a.readTimeout,
		IdleTimeout:       a.idleTimeout,
		// No WriteTimeout: it would end a long download that goes on well. The
		// peers limit the time per piece, respond that of HTTP/2's streams.
		MaxHeaderBytes: max(a.maxHeader-4096, 1), // net/http allows 4096 more
		TLSConfig:      a.tls,
		ErrorLog:       slog.NewLogLogger(logger.Handler(), slog.LevelDebug), // what clients do wrong
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	return e
}

// start implements engine.
func (e *netEngine) start(n network) (net.Addr, error) {
	l, err := n.Listen("tcp", e.listen)
	if err != nil {
		return nil, err
	}
	limited := peerListener{l, e.peers, e.tls == nil}
	go func() {
		var err error
		if e.tls != nil {
			err = e.server.ServeTLS(limited, "", "")
		} else {
			err = e.server.Serve(limited)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			e.logger.Error("the server has ended", "error", err)
		}
	}()
	return l.Addr(), nil
}

// drain implements engine.
func (e *netEngine) drain(ctx context.Context) error {
	err := e.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, e.server.Close())
	}
	return err
}

// peerListener accepts as long as there is room among the peers.
type peerListener struct {
	net.Listener
	peers *peers
	plain bool
}

// Accept implements net.Listener.
func (l peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if p := l.peers.admit(c); p != nil {
			return p, nil
		}
		refuse(c, l.plain)
	}
}

// ServeHTTP implements http.Handler.
func (e *netEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	re := &respond{ResponseWriter: w}
	if r.ProtoMajor >= 2 {
		re.stream, re.timeout = http.NewResponseController(w), e.writeTimeout
	}
	e.handle(re, r)
	if e.log != nil {
		c, _ := r.Context().Value(connKey{}).(net.Conn)
		if r.Method == http.MethodHead {
			re.bytes = 0 // written, but not sent
		}
		e.log.add(request{
			at: began, took: time.Since(began), peer: r.RemoteAddr, method: r.Method, path: r.RequestURI,
			status: max(re.status, http.StatusOK), bytes: re.bytes, shard: shardOf(c),
		})
	}
}

func (e *netEngine) handle(w *respond, r *http.Request) {
	h := w.Header()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", allowed)
		w.reject(r, http.StatusMethodNotAllowed)
		return
	}
	if r.ContentLength != 0 {
		if _, err := io.Copy(io.Discard, http.MaxBytesReader(w.ResponseWriter, r.Body, int64(e.maxBody))); err != nil {
			h.Set("Connection", "close")
			w.reject(r, http.StatusRequestEntityTooLarge)
			return
		}
	}
	switch e.route([]byte(r.URL.Path)) {
	case routeHello:
		w.text(plainText, helloText)
	case routeHealth:
		w.text(plainText, healthText)
	case routeWhere:
		c, _ := r.Context().Value(connKey{}).(net.Conn)
		if b, err := json.Marshal(e.whereabouts(c)); err == nil {
			w.text("application/json", string(b)+"\n")
		}
	case routeFile:
		e.site.ServeHTTP(w, r)
	case routeNone:
		fail(w, http.StatusNotFound)
	}
}

// respond notes what is answered, and gives the streams of HTTP/2 time piece
// by piece: they wait for the client's window, not for the connection.
type respond struct {
	http.ResponseWriter
	status int
	bytes  int64

	stream  *http.ResponseController // nil for HTTP/1
	timeout time.Duration
}

// text answers with a short body.
func (w *respond) text(contentType, body string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = io.WriteString(w, body) // net/http leaves it out for HEAD
}

// reject answers with an error, maybe before the body has come. A stream of
// HTTP/2 that ends before its body is reset (RFC 9113, section 8.1), and some
// clients, curl 7.88 among them, then drop an answer they have not read yet.
// So the answer goes first, and the client gets lingerTime to end the stream.
// lingerBytes is no limit here: it is less than a stream's window.
func (w *respond) reject(r *http.Request, status int) {
	fail(w, status)
	if w.stream == nil || w.stream.Flush() != nil || w.stream.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
}

// WriteHeader implements http.ResponseWriter.
func (w *respond) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *respond) Write(b []byte) (int, error) {
	if w.stream != nil {
		if err := w.stream.SetWriteDeadline(time.Now().Add(w.timeout)); err != nil {
			return 0, err
		}
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// ReadFrom implements io.ReaderFrom, for sendfile(2) with HTTP/1.
func (w *respond) ReadFrom(r io.Reader) (int64, error) {
	if w.stream != nil {
		return io.Copy(struct{ io.Writer }{w}, r)
	}
	n, err := io.Copy(w.ResponseWriter, r)
	w.bytes += n
	return n, err
}
