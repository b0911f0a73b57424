package shard

import (
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkNetConn moves bytes between goroutines and shards: bulk in one
// direction, and a message there and back.
func BenchmarkNetConn(b *testing.B) {
	for _, size := range []int{16 << 10, 256 << 10} {
		b.Run(fmt.Sprintf("bulk/size=%d", size), func(b *testing.B) {
			x, y := startPair(b, nil)
			client, server := netPair(b, x, y)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				buf := make([]byte, size)
				for {
					if _, err := server.Read(buf); err != nil {
						return
					}
				}
			}()
			buf := make([]byte, size)
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, err := client.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = client.Close()
			<-ended
		})
	}
	for _, conns := range []int{1, 16} {
		b.Run(fmt.Sprintf("pingpong/size=64/conns=%d", conns), func(b *testing.B) {
			x, y := startPair(b, nil)
			var clients []net.Conn
			for range conns {
				client, server := netPair(b, x, y)
				clients = append(clients, client)
				go func() { _, _ = io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server}) }()
			}
			buf := make([]byte, 64)
			for b.Loop() {
				for _, c := range clients {
					if _, err := c.Write(buf); err != nil {
						b.Fatal(err)
					}
				}
				for _, c := range clients {
					if _, err := io.ReadFull(c, buf); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
