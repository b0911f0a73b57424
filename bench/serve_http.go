package main

import (
	"io"
	"net"
	"net/http"
	"time"

	"github.com/valyala/fasthttp"
)

// What the peers answer to every request, the same as apps/httpd does without -root.
const (
	httpBody = "hello\n"
	httpType = "text/plain; charset=utf-8"
)

// The peers bound the time of clients as apps/httpd does. All else is as it comes.
const (
	httpReadTimeout  = 5 * time.Second
	httpWriteTimeout = 30 * time.Second
	httpIdleTimeout  = time.Minute
)

func serveFastHTTP(l net.Listener) error {
	s := fasthttp.Server{
		ReadTimeout: httpReadTimeout, WriteTimeout: httpWriteTimeout, IdleTimeout: httpIdleTimeout,
		Handler: func(ctx *fasthttp.RequestCtx) {
			ctx.Response.Header.SetContentType(httpType)
			ctx.Response.SetBodyString(httpBody)
		},
	}
	return s.Serve(l)
}

func serveNetHTTP(l net.Listener) error {
	s := http.Server{
		ReadHeaderTimeout: httpReadTimeout, WriteTimeout: httpWriteTimeout, IdleTimeout: httpIdleTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", httpType)
			_, _ = io.WriteString(w, httpBody)
		}),
	}
	return s.Serve(l)
}
