//go:build linux

package stack_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"numastack/stack"
)

// The stack's address, and the kernel's on its side of the TAP device.
var config = stack.Config{
	Addrs:     []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24")},
	HostAddrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24")},
}

// ask sends a line by way of the kernel and prints the one that comes back.
func ask(network, address, question string) {
	c, err := net.Dial(network, address)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintln(c, question)
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(answer)
}

// upper answers in capital letters, on the shard's thread.
type upper struct{}

func (upper) Open(*stack.Conn) {}

func (upper) Data(c *stack.Conn, b []byte) int {
	n, err := c.Write(bytes.ToUpper(b))
	if err != nil {
		c.Close()
	}
	return n // what the send buffer did not take stays in the receive buffer
}

func (upper) Writable(*stack.Conn)     {}
func (upper) Close(*stack.Conn, error) {}

// Events on the shard.
func ExampleStack_HandleTCP() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	if _, err := s.HandleTCP("tcp", ":7", upper{}); err != nil {
		log.Fatal(err)
	}
	ask("tcp", "10.99.0.2:7", "hello")
	// Output: HELLO
}

// Datagrams on the shard.
func ExampleStack_HandleUDP() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	if _, err := s.HandleUDP("udp", ":7", func(p *stack.Socket, b []byte, from netip.AddrPort) {
		if _, err := p.WriteTo(bytes.ToUpper(b), from); err != nil {
			log.Print(err)
		}
	}); err != nil {
		log.Fatal(err)
	}
	ask("udp", "10.99.0.2:7", "hello")
	// Output: HELLO
}

// Blocking code on the shard. What takes long is done elsewhere.
func ExampleStack_Serve() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Serve("tcp", ":7", func(c net.Conn) {
		defer c.Close()
		for lines := bufio.NewScanner(c); lines.Scan(); {
			var answer string
			stack.Offload(c, func() {
				time.Sleep(20 * time.Millisecond) // a database, for one
				answer = "you said " + lines.Text()
			})
			fmt.Fprintln(c, answer)
		}
	}); err != nil {
		log.Fatal(err)
	}
	ask("tcp", "10.99.0.2:7", "hello")
	// Output: you said hello
}

// Work of any goroutine, near a connection.
func ExampleStack_NodePool() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	l, err := s.Listen("tcp", ":7")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		defer c.Close()
		line, _ := bufio.NewReader(c).ReadBytes('\n') // what is missing is not echoed
		pool, err := s.NodePool(c.(stack.Where).NUMANode())
		if err != nil {
			log.Fatal(err)
		}
		if err := pool.Do(context.Background(), func(t *stack.PoolThread) {
			line = append(append(t.Scratch()[:0], "you said "...), line...) // memory of the connection's node
			_, _ = c.Write(line)
		}); err != nil {
			log.Fatal(err)
		}
	}()
	ask("tcp", "10.99.0.2:7", "hello")
	// Output: you said hello
}

// An HTTP server of package net/http.
func ExampleStack_Listen() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	l, err := s.Listen("tcp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, "hello from", r.Host)
		})) // until the stack is closed
	}()

	answer, err := http.Get("http://10.99.0.2/")
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		log.Fatal(err)
	}
	// Output: hello from 10.99.0.2
}

// Datagrams for any goroutine.
func ExampleStack_ListenPacket() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	p, err := s.ListenPacket("udp", ":7")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := p.ReadFrom(b)
			if err != nil {
				return // the stack is closed
			}
			if _, err := p.WriteTo(bytes.ToUpper(b[:n]), from); err != nil {
				log.Print(err)
			}
		}
	}()
	ask("udp", "10.99.0.2:7", "hello")
	// Output: HELLO
}

// An HTTP client of package net/http, and a server of the kernel.
func ExampleStack_DialContext() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	kernel, err := net.Listen("tcp", "10.99.0.1:80")
	if err != nil {
		log.Fatal(err)
	}
	defer kernel.Close()
	go func() {
		_ = http.Serve(kernel, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintln(w, "hello,", host)
		}))
	}()

	client := http.Client{Transport: &http.Transport{DialContext: s.DialContext}}
	answer, err := client.Get("http://10.99.0.1/")
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		log.Fatal(err)
	}
	// Output: hello, 10.99.0.2
}

// Datagrams to a multicast group.
func ExampleStack_ListenMulticastUDP() {
	s, err := stack.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	group := &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3), Port: 5000}
	p, err := s.ListenMulticastUDP("udp", group)
	if err != nil {
		log.Fatal(err)
	}
	kernel, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 99, 0, 1)}, group)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = kernel.Close() }()
	fmt.Fprint(kernel, "hello, group")

	b := make([]byte, 1500)
	n, _, err := p.ReadFrom(b)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", b[:n])
	// Output: hello, group
}
