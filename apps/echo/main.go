// Echo serves three old protocols on a numastack, each on the thread of the
// shard that received the request: echo (RFC 862), discard (RFC 863) and
// character generator (RFC 864, any bytes, as fast as the peer reads).
package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"numastack/apps/internal/cli"
	"numastack/stack"
)

func main() {
	err := run(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	fs := flag.NewFlagSet("echo", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), "Usage: echo [flags]\n\nServes echo (TCP and UDP), discard and chargen (TCP) on a numastack.\nNeeds CAP_NET_ADMIN, or a TAP device made for this user.\n\n")
		fs.PrintDefaults()
	}
	options := cli.Flags(fs)
	ports := servicePorts{7, 9, 19}
	fs.Var(&ports, "ports", "`ports` of echo, discard and chargen; 0 turns one off")
	if err := cli.Parse(fs, args); err != nil {
		return err
	}
	s, err := options.Open(options.Logger(os.Stderr))
	if err != nil {
		return err
	}
	if err := serve(s, ports); err != nil {
		return errors.Join(err, s.Close())
	}
	fmt.Printf("ready: echo on port %d, discard on %d, chargen on %d; offloads %s, %s steering\n",
		ports[0], ports[1], ports[2], s.Offloads(), s.Steering())
	err = cli.Wait(s)
	return errors.Join(err, options.Finish(s, os.Stdout))
}

func serve(s *stack.Stack, ports servicePorts) error {
	for i, h := range []stack.Handler{echo{}, discard{}, chargen{}} {
		if ports[i] == 0 {
			continue
		}
		if _, err := s.HandleTCP("tcp", net.JoinHostPort("", strconv.Itoa(ports[i])), h); err != nil {
			return err
		}
	}
	if ports[0] == 0 {
		return nil
	}
	_, err := s.HandleUDP("udp", net.JoinHostPort("", strconv.Itoa(ports[0])), echoDatagram)
	return err
}

// servicePorts are the ports of echo, discard and chargen.
type servicePorts [3]int

// String implements flag.Value.
func (p *servicePorts) String() string { return fmt.Sprintf("%d,%d,%d", p[0], p[1], p[2]) }

// Set implements flag.Value.
func (p *servicePorts) Set(s string) error {
	parts := strings.Split(s, ",")
	if len(parts) != len(p) {
		return fmt.Errorf("want three ports, as in %v", p)
	}
	for i, part := range parts {
		port, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a port, want 0 to 65535", part)
		}
		p[i] = int(port)
	}
	return nil
}

// echo sends back what it receives. What the send buffer does not take stays
// in the receive buffer, so a peer that does not read holds itself back.
type echo struct{}

func (echo) Open(*stack.Conn) {}

func (echo) Data(c *stack.Conn, b []byte) int {
	n, err := c.Write(b)
	if err != nil {
		c.Close()
		return len(b)
	}
	return n
}

func (echo) Writable(*stack.Conn)     {}
func (echo) Close(*stack.Conn, error) {}

func echoDatagram(s *stack.Socket, b []byte, from netip.AddrPort) {
	_, _ = s.WriteTo(b, from) // UDP: what cannot be sent is lost
}

// discard reads and forgets.
type discard struct{}

func (discard) Open(*stack.Conn)                 {}
func (discard) Data(_ *stack.Conn, b []byte) int { return len(b) }
func (discard) Writable(*stack.Conn)             {}
func (discard) Close(*stack.Conn, error)         {}

// chargen sends until the peer is gone.
type chargen struct{}

// pattern is what chargen sends.
var pattern = stack.NewBlock([]byte(strings.Repeat("!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefg\r\n", 64<<10/73)))

func (g chargen) Open(c *stack.Conn) { g.Writable(c) }

func (chargen) Data(_ *stack.Conn, b []byte) int { return len(b) }

func (chargen) Writable(c *stack.Conn) {
	for {
		n, err := c.WriteBlock(pattern, 0)
		if err != nil || n < pattern.Len() {
			return
		}
	}
}

func (chargen) Close(*stack.Conn, error) {}

// EOF implements stack.HalfCloser: the peer has nothing to say, but listens.
func (chargen) EOF(*stack.Conn) {}
