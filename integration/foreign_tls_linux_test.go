package integration

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
)

// TestForeignTLS shakes hands, takes a session up again and echoes, with both
// versions that are in use.
func TestForeignTLS(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				t.Run(tls.VersionName(version), func(t *testing.T) {
					server, client := tlsConfigs(t)
					server.MinVersion, server.MaxVersion = version, version
					client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
					l := d.listen(t)
					wait := each(tls.NewListener(l, server), echoAll)
					defer wait()
					for i := range 3 {
						c := tls.Client(d.connect(t, l), client)
						if err := exchange(c, payload(uint64(i), 100_000)); err != nil {
							t.Fatalf("connection %d: %v", i, err)
						}
						state := c.ConnectionState()
						if state.Version != version || state.DidResume != (i > 0) {
							t.Errorf("connection %d: %s, session taken up again: %v; want %s and %v",
								i, tls.VersionName(state.Version), state.DidResume, tls.VersionName(version), i > 0)
						}
						_ = c.Close() // both sides have said goodbye
					}
				})
			}
		})
	})
}

// echoAll echoes until the peer closes its side, and then closes its own.
func echoAll(c net.Conn) {
	_, _ = io.Copy(c, c) // the peer judges what it gets
}

// TestForeignTLSTransfer sends many bytes over one connection and takes as many.
func TestForeignTLSTransfer(t *testing.T) {
	size := pattern(amount(256<<20, 1<<30))
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			server, client := tlsConfigs(t)
			l := d.listen(t)
			served := make(chan error, 1)
			wait := each(tls.NewListener(l, server), func(c net.Conn) { served <- receiveThenSend(c, size) })
			defer wait()
			c := tls.Client(d.connect(t, l), client)
			if err := sendThenReceive(c, size); err != nil {
				t.Errorf("client: %v", err)
			}
			_ = c.Close() // the other end may have closed
			if err := <-served; err != nil {
				t.Errorf("server: %v", err)
			}
		})
	})
}

// sendThenReceive sends size bytes and the end of them, and receives as many
// and their end.
func sendThenReceive(c net.Conn, size pattern) error {
	if err := size.send(c); err != nil {
		return err
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return fmt.Errorf("close the sending side: %w", err)
	}
	return size.receiveAll(c)
}

// receiveThenSend is the other end of sendThenReceive.
func receiveThenSend(c net.Conn, size pattern) error {
	if err := size.receiveAll(c); err != nil {
		return err
	}
	return size.send(c)
}
