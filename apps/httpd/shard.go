package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"numastack/stack"
)

// drainPoll is how often a drain looks whether all requests are answered.
const drainPoll = 10 * time.Millisecond

// writeBuffer holds an answer of the usual size with its header, in bytes, so
// that it goes out in one write. Every open connection has one.
const writeBuffer = 16 << 10

// shardEngine serves with fasthttp's request loop, which runs in the
// connection's coroutine and blocks in nothing but the connection: no pool of
// goroutines, no temporary files, no compression. TLS handshakes run on the
// shard as well.
type shardEngine struct {
	*app
	server   *fasthttp.Server
	caches   []*cache // by shard
	listener net.Listener
	hosted   bool // on host sockets
	draining atomic.Bool
}

func newShardEngine(a *app, shards int) *shardEngine {
	e := &shardEngine{app: a, caches: make([]*cache, max(shards, 1))}
	for i := range e.caches {
		e.caches[i] = newCache(int64(a.cacheMB) << 20 / int64(len(e.caches)))
	}
	e.server = &fasthttp.Server{
		Handler:        e.handle,
		ErrorHandler:   e.refuseRequest,
		HeaderReceived: e.headerReceived,
		ConnState:      connState,
		// The peers count the connections and limit the writes, see there.
		Concurrency:        a.maxConns + 1,
		ReadTimeout:        a.headerTimeout,
		IdleTimeout:        a.idleTimeout,
		ReadBufferSize:     a.maxHeader,
		WriteBufferSize:    writeBuffer,
		MaxRequestBodySize: a.maxBody,
		// Refuses other methods by their header, before a body is read.
		GetOnly: true,
		// Would write uploads to temporary files.
		DisablePreParseMultipartForm: true,
		// Types are set where they are known, and an answer without a body
		// has none.
		NoDefaultContentType:  true,
		NoDefaultServerHeader: true,
		// Would give the read buffer back between requests, for a read of one
		// byte and an allocation with every request.
		ReduceMemoryUsage:     false,
		SecureErrorLogMessage: true,
		Logger:                quiet{},
	}
	return e
}

// quiet is fasthttp's logger: what a client does wrong is the client's
// business, and a shard does not wait for a log.
type quiet struct{}

// Printf implements fasthttp.Logger.
func (quiet) Printf(string, ...any) {}

// start implements engine.
func (e *shardEngine) start(n network) (net.Addr, error) {
	_, e.hosted = n.(host)
	var err error
	if e.listener, err = n.Serve("tcp", e.listen, e.serve); err != nil {
		return nil, err
	}
	return e.listener.Addr(), nil
}

// serve runs in the connection's coroutine.
func (e *shardEngine) serve(c net.Conn) {
	p := e.peers.admit(c)
	if p == nil {
		refuse(c, e.tls == nil)
		return
	}
	defer func() { _ = p.Close() }() // after a panic
	if e.tls != nil {
		_ = e.server.ServeConn(tls.Server(p, e.tls)) // the client knows
		return
	}
	_ = e.server.ServeConn(p)
}

// drain implements engine. The connections of a numastack are left to the end
// of the stack: nobody else may touch them.
func (e *shardEngine) drain(ctx context.Context) error {
	e.draining.Store(true)
	err := e.listener.Close()
	for e.peers.busy() > 0 && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(drainPoll):
		}
	}
	if e.peers.busy() > 0 {
		err = errors.Join(err, ctx.Err())
	}
	if e.hosted {
		e.peers.closeAll()
	}
	return err
}

// headerReceived gives a request with a body the time for it.
func (e *shardEngine) headerReceived(h *fasthttp.RequestHeader) fasthttp.RequestConfig {
	if h.ContentLength() == 0 || h.ContentLength() == noBody {
		return fasthttp.RequestConfig{}
	}
	return fasthttp.RequestConfig{ReadTimeout: e.readTimeout}
}

// noBody is what fasthttp's ContentLength returns for a request that has
// neither Content-Length nor Transfer-Encoding.
const noBody = -2

// connState notes when the answer of a connection is written.
func connState(c net.Conn, state fasthttp.ConnState) {
	p := peerOf(c)
	switch state {
	case fasthttp.StateActive:
		// It comes for a new connection before there is a request; for the
		// next ones there may be no Read, with pipelining.
		if p.answered {
			p.busy.Store(true)
		}
	case fasthttp.StateIdle:
		p.answered = true
		p.busy.Store(false)
	case fasthttp.StateNew, fasthttp.StateHijacked, fasthttp.StateClosed:
	}
}

// handle answers a request.
func (e *shardEngine) handle(ctx *fasthttp.RequestCtx) {
	if e.draining.Load() {
		ctx.SetConnectionClose()
	}
	path, _, _ := bytes.Cut(ctx.Request.Header.RequestURI(), []byte{'?'})
	if len(path) == 0 || path[0] != '/' {
		path = ctx.URI().PathOriginal() // it came as a whole URL, as to a proxy
	}
	switch e.route(path) {
	case routeHello:
		ctx.Response.Header.SetContentType(plainText)
		ctx.Response.SetBodyString(helloText)
	case routeHealth:
		ctx.Response.Header.SetContentType(plainText)
		ctx.Response.SetBodyString(healthText)
	case routeWhere:
		ctx.Response.Header.SetContentType("application/json")
		if b, err := json.Marshal(e.whereabouts(ctx.Conn())); err == nil {
			ctx.Response.SetBodyRaw(append(b, '\n'))
		}
	case routeFile:
		e.handleFile(ctx, path)
	case routeNone:
		setError(ctx, http.StatusNotFound)
	}
	e.logRequest(ctx, ctx.Time())
}

// handleFile answers with a file: from memory if it can, else by Offload.
func (e *shardEngine) handleFile(ctx *fasthttp.RequestCtx, path []byte) {
	c := ctx.Conn()
	terms := readTerms(&ctx.Request.Header)
	cache := e.caches[max(shardOf(c), 0)%len(e.caches)]
	var known *entry
	if terms.cacheable {
		var fresh bool
		if known, fresh = cache.get(path, terms.accepted, ctx.Time()); fresh {
			if terms.conditional {
				known.serveIf(ctx)
			} else {
				known.serve(ctx)
			}
			return
		}
	}
	r, err := newRequest(ctx)
	if err != nil {
		setError(ctx, http.StatusBadRequest)
		return
	}
	a := &answer{header: make(http.Header)}
	keep := terms.cacheable && !terms.conditional && cache.limit > 0
	var read *entry
	stack.Offload(c, func() {
		e.site.ServeHTTP(a, r)
		if keep {
			read = a.entry(known)
		}
	})
	switch {
	case read != nil:
		cache.put(cacheKey{string(path), terms.accepted}, read, ctx.Time())
		read.serve(ctx)
		return
	case known != nil && a.header.Get("ETag") != known.etag:
		// This was the request that looked whether the entry is still good.
		cache.drop(cacheKey{string(path), terms.accepted})
	}
	a.serve(ctx)
}

// terms is what a request's header says about the answer.
type terms struct {
	accepted    encodingSet
	conditional bool // has If-... or a Range
	cacheable   bool // memory alone can answer
}

// readTerms looks at the header once. It does not allocate.
func readTerms(h *fasthttp.RequestHeader) terms {
	t := terms{cacheable: true}
	encodings := 0
	for key, value := range h.All() {
		switch {
		case len(key) > 3 && key[0] == 'I' && key[1] == 'f' && key[2] == '-':
			t.conditional = true
		case string(key) == "Range":
			t.conditional = true
			// Several ranges make http.ServeContent use a pipe between
			// goroutines, which a shard must not wait for.
			t.cacheable = t.cacheable && !bytes.ContainsRune(value, ',')
		case string(key) == "Accept-Encoding":
			encodings++
			t.accepted = acceptedEncodings(value)
		}
	}
	t.cacheable = t.cacheable && encodings <= 1
	return t
}

// newRequest translates what an http.Handler of files looks at.
func newRequest(ctx *fasthttp.RequestCtx) (*http.Request, error) {
	u, err := url.ParseRequestURI(string(ctx.Request.Header.RequestURI()))
	if err != nil {
		return nil, err
	}
	r := &http.Request{Method: string(ctx.Method()), URL: u, Header: make(http.Header), Body: http.NoBody}
	for key, value := range ctx.Request.Header.All() {
		if string(key) == "Range" || string(key) == "Accept-Encoding" || bytes.HasPrefix(key, []byte("If-")) {
			r.Header.Add(string(key), string(value))
		}
	}
	return r, nil
}

// serve hands the answer to fasthttp.
func (a *answer) serve(ctx *fasthttp.RequestCtx) {
	ctx.SetStatusCode(max(a.status, http.StatusOK))
	h := &ctx.Response.Header
	for key, values := range a.header {
		for _, v := range values {
			h.Add(key, v)
		}
	}
	if a.file != nil {
		ctx.Response.SetBodyStream(&filePart{ctx.Conn(), a.file, a.length}, int(a.length))
		return
	}
	ctx.Response.SetBodyRaw(a.body)
}

// entry turns the answer to a plain GET into an entry of the cache, or returns
// nil if it is not one for it. It may wait for a disk. If the file is still
// that of the known entry, it is not read again.
func (a *answer) entry(known *entry) *entry {
	if a.status != http.StatusOK || a.file == nil || a.length > maxCached {
		return nil
	}
	e := &entry{etag: a.header.Get("ETag")}
	e.modified, _ = http.ParseTime(a.header.Get("Last-Modified")) // else zero, as for http.ServeContent
	if known != nil && known.etag == e.etag {
		e.body = known.body
	} else {
		e.body = make([]byte, a.length)
		if _, err := io.ReadFull(a.file, e.body); err != nil {
			_, _ = a.file.Seek(0, io.SeekStart) // filePart will meet the error
			return nil
		}
	}
	for key, values := range a.header {
		if key == "Content-Length" {
			continue
		}
		for _, v := range values {
			e.header = append(e.header, field{[]byte(key), []byte(v)})
		}
	}
	_ = a.file.Close()
	a.file = nil
	return e
}

// serve answers a plain request. It does not allocate.
func (e *entry) serve(ctx *fasthttp.RequestCtx) {
	h := &ctx.Response.Header
	for _, f := range e.header {
		h.SetBytesKV(f.key, f.value)
	}
	h.SetContentLength(len(e.body)) // for HEAD; fasthttp knows it for GET
	ctx.Response.SetBodyRaw(e.body)
}

// serveIf answers a request with conditions or one range.
func (e *entry) serveIf(ctx *fasthttp.RequestCtx) {
	r, err := newRequest(ctx)
	if err != nil {
		setError(ctx, http.StatusBadRequest)
		return
	}
	a := &answer{header: make(http.Header)}
	for _, f := range e.header {
		a.header.Set(string(f.key), string(f.value))
	}
	serveContent(a, r, e.modified, int64(len(e.body)), bytes.NewReader(e.body))
	a.serve(ctx)
}

// refuseRequest answers what cannot be read as a GET or HEAD; the connection
// ends then.
func (e *shardEngine) refuseRequest(ctx *fasthttp.RequestCtx, err error) {
	var tooBig *fasthttp.ErrSmallBuffer
	var network net.Error
	status := http.StatusBadRequest
	switch {
	case errors.Is(err, fasthttp.ErrGetOnly):
		status = http.StatusMethodNotAllowed
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		status = http.StatusRequestEntityTooLarge
	case errors.As(err, &tooBig):
		status = http.StatusRequestHeaderFieldsTooLarge
	case errors.As(err, &network) && network.Timeout():
		status = http.StatusRequestTimeout
	}
	setError(ctx, status)
	if status == http.StatusMethodNotAllowed {
		ctx.Response.Header.Set("Allow", allowed)
	}
	if p := peerOf(ctx.Conn()); p != nil {
		p.linger = status != http.StatusRequestTimeout
	}
	e.logRequest(ctx, time.Now())
}

// setError makes the answer that of fail.
func setError(ctx *fasthttp.RequestCtx, status int) {
	ctx.Response.Reset()
	ctx.SetStatusCode(status)
	ctx.Response.Header.SetContentType(plainText)
	ctx.Response.Header.Set("X-Content-Type-Options", "nosniff")
	ctx.Response.SetBodyString(errorText(status) + "\n")
}

func (e *shardEngine) logRequest(ctx *fasthttp.RequestCtx, at time.Time) {
	if e.log == nil {
		return
	}
	length := int64(ctx.Response.Header.ContentLength())
	if !ctx.Response.IsBodyStream() {
		length = int64(len(ctx.Response.Body()))
	}
	if ctx.IsHead() {
		length = 0
	}
	e.log.add(request{
		at: at, took: time.Since(at), peer: ctx.RemoteAddr().String(),
		method: string(ctx.Method()), path: string(ctx.Request.Header.RequestURI()),
		status: ctx.Response.StatusCode(), bytes: length, shard: shardOf(ctx.Conn()),
	})
}
