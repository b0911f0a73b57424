package main

import (
	"io"
	"net"
	"net/http"

	"github.com/valyala/fasthttp"
)

// What the peers answer to every request, the same as apps/httpd does without -root.
const (
	httpBody = "hello\n"
	httpType = "text/plain; charset=utf-8"
)

// serveFastHTTP and serveNetHTTP leave all settings at their defaults, so the peers set no
// deadlines where apps/httpd does.

func serveFastHTTP(l net.Listener) error {
	return fasthttp.Serve(l, func(ctx *fasthttp.RequestCtx) {
		ctx.Response.Header.SetContentType(httpType)
		ctx.Response.SetBodyString(httpBody)
	})
}

func serveNetHTTP(l net.Listener) error {
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", httpType)
		_, _ = io.WriteString(w, httpBody)
	}))
}
