package stack_test

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"

	"numastack/stack"
)

// An HTTP server whose connections come from a numastack.
func ExampleStack_Listen() {
	s, err := stack.New(stack.Config{
		Addrs:     []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24")},
		HostAddrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24")},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	l, err := s.Listen("tcp", ":80")
	if err != nil {
		log.Print(err)
		return
	}
	err = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello")
	}))
	log.Print(err)
}

// upper answers in capital letters, on the shard's thread.
type upper struct{}

func (upper) Open(c *stack.Conn) {
	fmt.Println("connection from", c.RemoteAddr(), "on NUMA node", c.NUMANode())
}

func (upper) Data(c *stack.Conn, b []byte) int {
	answer := make([]byte, len(b))
	for i, x := range b {
		if 'a' <= x && x <= 'z' {
			x -= 'a' - 'A'
		}
		answer[i] = x
	}
	n, err := c.Write(answer)
	if err != nil {
		c.Close()
	}
	return n // what the send buffer did not take stays in the receive buffer
}

func (upper) Writable(*stack.Conn)     {}
func (upper) Close(*stack.Conn, error) {}

// A server that runs on the shard.
func ExampleStack_HandleTCP() {
	s, err := stack.New(stack.Config{Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24")}})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	var l net.Listener
	if l, err = s.HandleTCP("tcp", ":7", upper{}); err != nil {
		log.Print(err)
		return
	}
	fmt.Println("listening on", l.Addr())
	<-s.Done()
}
