package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/coder/websocket"
)

// TestForeignWebSocket echoes messages, plain and compressed, and ends in order.
func TestForeignWebSocket(t *testing.T) {
	sizes := []int{0, 1, 125, 126, 65_535, 65_536, 1 << 20}
	const largest = 1 << 20
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			served := make(chan error, 1)
			url := serveHTTP(t, d.listen(t), &http.Server{
				ReadHeaderTimeout: patience,
				Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
					served <- echoMessages(w, q, largest)
				}),
			})
			transport := &http.Transport{DialContext: d.dial}
			t.Cleanup(transport.CloseIdleConnections)
			for _, mode := range []websocket.CompressionMode{websocket.CompressionDisabled, websocket.CompressionContextTakeover} {
				t.Run(fmt.Sprintf("compression=%d", mode), func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), transferTime)
					defer cancel()
					c, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{
						HTTPClient:      &http.Client{Transport: transport},
						CompressionMode: mode,
					})
					if err != nil {
						t.Fatal(err)
					}
					defer func() { _ = c.CloseNow() }() // it is over by then, if all went well
					c.SetReadLimit(largest + 1)
					for i, size := range sizes {
						want := payload(uint64(i), size)
						if err := c.Write(ctx, websocket.MessageBinary, want); err != nil {
							t.Fatalf("%d bytes: %v", size, err)
						}
						kind, got, err := c.Read(ctx)
						if err != nil || kind != websocket.MessageBinary {
							t.Fatalf("%d bytes: got a %v and %v", size, kind, err)
						}
						if err := same(got, want); err != nil {
							t.Error(err)
						}
					}
					if err := c.Close(websocket.StatusNormalClosure, "enough"); err != nil {
						t.Errorf("close: %v", err)
					}
					var end websocket.CloseError
					if err := <-served; !errors.As(err, &end) || end.Code != websocket.StatusNormalClosure || end.Reason != "enough" {
						t.Errorf("the server's connection ended with %v", err)
					}
				})
			}
		})
	})
}

// echoMessages answers until the connection ends, and returns how it ended.
func echoMessages(w http.ResponseWriter, q *http.Request, largest int64) error {
	c, err := websocket.Accept(w, q, &websocket.AcceptOptions{CompressionMode: websocket.CompressionContextTakeover})
	if err != nil {
		return err
	}
	defer func() { _ = c.CloseNow() }() // it is over by then
	c.SetReadLimit(largest + 1)
	for {
		kind, b, err := c.Read(q.Context())
		if err != nil {
			return err
		}
		if err := c.Write(q.Context(), kind, b); err != nil {
			return err
		}
	}
}
