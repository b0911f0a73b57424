package integration

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"testing"

	"github.com/quic-go/quic-go"
)

// TestForeignQUIC moves many bytes each way over one stream of a connection,
// and then opens many small ones.
func TestForeignQUIC(t *testing.T) {
	// The kernel's default limit on socket buffers is smaller than the library
	// likes, and it would say so.
	t.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	const streams = 100
	size := pattern(amount(64<<20, 256<<20) / 2)
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			ctx, cancel := context.WithTimeout(t.Context(), transferTime)
			defer cancel()
			serverTLS, clientTLS := tlsConfigs(t, "numastack")
			server := &quic.Transport{Conn: d.listenPacket(t)}
			client := &quic.Transport{Conn: d.dialPacket(t)}
			l, err := server.Listen(serverTLS, nil)
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- serveQUIC(ctx, l, size, streams) }()
			if err := useQUIC(ctx, client, l, clientTLS, size, streams); err != nil {
				t.Errorf("client: %v", err)
				cancel()
			}
			if err := <-served; err != nil {
				t.Errorf("server: %v", err)
			}
			for _, transport := range []*quic.Transport{client, server} {
				if err := transport.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	})
}

// smallStream is what goes each way over the streams after the first one.
const smallStream = pattern(10_000)

// useQUIC opens a connection and its streams, and says goodbye.
func useQUIC(ctx context.Context, client *quic.Transport, l *quic.Listener, config *tls.Config, size pattern, streams int) error {
	c, err := client.Dial(ctx, l.Addr(), config, nil)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	use := func(size pattern) error {
		s, err := c.OpenStreamSync(ctx)
		if err != nil {
			return fmt.Errorf("open a stream: %w", err)
		}
		if err := size.send(s); err != nil {
			return err
		}
		if err := s.Close(); err != nil { // the sending side
			return err
		}
		return size.receiveAll(s)
	}
	if err := use(size); err != nil {
		return err
	}
	errs := make(chan error, streams)
	for range streams {
		go func() { errs <- use(smallStream) }()
	}
	for range streams {
		err = errors.Join(err, <-errs)
	}
	return errors.Join(err, c.CloseWithError(0, "enough"))
}

// serveQUIC is the other end of useQUIC.
func serveQUIC(ctx context.Context, l *quic.Listener, size pattern, streams int) error {
	c, err := l.Accept(ctx)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	errs := make(chan error, 1+streams)
	for i := range 1 + streams {
		s, err := c.AcceptStream(ctx)
		if err != nil {
			return fmt.Errorf("accept stream %d: %w", i, err)
		}
		go func(size pattern) {
			err := size.receiveAll(s)
			if err == nil {
				err = errors.Join(size.send(s), s.Close())
			}
			if err != nil {
				err = errors.Join(err, c.CloseWithError(1, err.Error())) // the client need not wait
			}
			errs <- err
		}(size)
		size = smallStream
	}
	for range 1 + streams {
		err = errors.Join(err, <-errs)
	}
	<-c.Context().Done()
	var end *quic.ApplicationError
	if cause := context.Cause(c.Context()); !errors.As(cause, &end) || end.ErrorCode != 0 || !end.Remote {
		err = errors.Join(err, fmt.Errorf("the connection ended with %w", cause))
	}
	return err
}
