package integration

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"numastack/stack"
)

// multicastPort is where members listen, on both sides.
const multicastPort = 5353

// group returns a multicast group of the family.
func (f family) group() netip.Addr {
	if f.self.Is4() {
		return netip.AddrFrom4([4]byte{239, 255, 1, 2}) // RFC 2365
	}
	return netip.MustParseAddr("ff02::1:2345") // RFC 4291 section 2.7
}

// kernelPorts opens sockets of the kernel whose multicast datagrams leave on a
// device.
func kernelPorts(t *testing.T, f family, name string, n int) (ports []*net.UDPConn) {
	t.Helper()
	device, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(f.host, 0)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		setDeadline(t, c)
		if f.host.Is4() {
			err = ipv4.NewPacketConn(c).SetMulticastInterface(device)
		} else {
			err = ipv6.NewPacketConn(c).SetMulticastInterface(device)
		}
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, c)
	}
	return ports
}

// TestMulticastFromKernel has sockets of the kernel send to a group that the
// stack is in, from so many ports that every shard gets some, small ones and
// some in fragments. After the stack has left, nothing comes.
func TestMulticastFromKernel(t *testing.T) {
	const senders = 32
	sizes := []int{20, 5000}
	forVariants(t, func(t *testing.T, r *rig) {
		p, err := r.ListenPacket("udp", fmt.Sprint(":", multicastPort))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		setPacketDeadline(t, p)
		member := p.(*stack.PacketConn)
		r.forFamilies(t, func(t *testing.T, f family) {
			to, direct := netip.AddrPortFrom(f.group(), multicastPort), netip.AddrPortFrom(f.self, multicastPort)
			kernel := kernelPorts(t, f, r.device, senders)
			if err := member.JoinGroup(f.group()); err != nil {
				t.Fatal(err)
			}
			missteered := r.sum().Missteered
			buf := make([]byte, 65_536)
			for i, c := range kernel {
				for _, size := range sizes {
					want := payload(uint64(i), size)
					if _, err := c.WriteToUDPAddrPort(want, to); err != nil {
						t.Fatal(err)
					}
					n, from, err := member.ReadFromAddrPort(buf)
					if err != nil {
						t.Fatalf("sender %d, %d bytes: %v", i, size, err)
					}
					if err := same(buf[:n], want); err != nil || from.String() != c.LocalAddr().String() {
						t.Errorf("from %v, want %v; %v", from, c.LocalAddr(), err)
					}
				}
			}
			if n := r.sum().Missteered - missteered; n != 0 && r.Steering() == stack.SteeringKernel {
				t.Errorf("%d frames arrived on a wrong queue", n)
			}

			if err := member.LeaveGroup(f.group()); err != nil {
				t.Fatal(err)
			}
			for _, c := range kernel {
				for text, to := range map[string]netip.AddrPort{"to the group": to, "to the stack": direct} {
					if _, err := c.WriteToUDPAddrPort([]byte(text), to); err != nil {
						t.Fatal(err)
					}
				}
			}
			for range kernel {
				n, _, err := member.ReadFromAddrPort(buf)
				if err != nil || string(buf[:n]) != "to the stack" {
					t.Fatalf("after leaving: got %q, %v", buf[:n], err)
				}
			}
			if err := member.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if n, _, err := member.ReadFromAddrPort(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("after leaving: got %q, %v, want nothing", buf[:n], err)
			}
			setPacketDeadline(t, p)
		})
	})
}

func setPacketDeadline(t *testing.T, p net.PacketConn) {
	t.Helper()
	if err := p.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
}

// TestMulticastToKernel sends to a group that a socket of the kernel is in, from
// each door, and looks at the hop limit.
func TestMulticastToKernel(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			to := netip.AddrPortFrom(f.group(), multicastPort)
			kernel := r.kernelMember(t, to)
			p, err := r.ListenPacket("udp", ":0")
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			own := netip.AddrPortFrom(f.self, p.LocalAddr().(*net.UDPAddr).AddrPort().Port())
			dialed := r.dial(t, "udp", to.String())
			for _, size := range []int{1, 1400, 9000} {
				want := payload(uint64(size), size)
				if _, err := p.WriteTo(want, net.UDPAddrFromAddrPort(to)); err != nil {
					t.Fatal(err)
				}
				kernel.wantNext(t, want, 1, own)
				if _, err := dialed.Write(want); err != nil {
					t.Fatal(err)
				}
				kernel.wantNext(t, want, 1, dialed.LocalAddr().(*net.UDPAddr).AddrPort())
			}
			for _, from := range []any{p, dialed} {
				if err := from.(stack.Multicaster).SetMulticastTTL(7); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := p.WriteTo([]byte("far"), net.UDPAddrFromAddrPort(to)); err != nil {
				t.Fatal(err)
			}
			kernel.wantNext(t, []byte("far"), 7, own)
			if _, err := dialed.Write([]byte("far")); err != nil {
				t.Fatal(err)
			}
			kernel.wantNext(t, []byte("far"), 7, dialed.LocalAddr().(*net.UDPAddr).AddrPort())
		})
	})
}

// TestMulticastWhileMoving moves the flow groups from shard to shard while they
// receive, and while a port joins and leaves: each datagram comes, once.
func TestMulticastWhileMoving(t *testing.T) {
	const datagrams = 500
	for _, steering := range []stack.Steering{stack.SteeringKernel, stack.SteeringUser} {
		t.Run(steering.String(), func(t *testing.T) {
			r := open(t, stack.Config{Shards: 2, Groups: 8, Steering: steering})
			p, err := r.ListenPacket("udp", fmt.Sprint(":", multicastPort))
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			setPacketDeadline(t, p)
			f := r.families()[0]
			other := f.group().Next()
			if err := p.(*stack.PacketConn).JoinGroup(f.group()); err != nil {
				t.Fatal(err)
			}
			var busy sync.WaitGroup
			stop := make(chan struct{})
			forever := func(once func(i int) error) {
				busy.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
							if err := once(i); err != nil {
								t.Error(err)
								return
							}
						}
					}
				})
			}
			forever(func(i int) error { return r.Move(i%8, i/8%2) })
			forever(func(int) error {
				return errors.Join(p.(*stack.PacketConn).JoinGroup(other), p.(*stack.PacketConn).LeaveGroup(other))
			})
			kernel := kernelPorts(t, f, r.device, 16)
			buf := make([]byte, 10)
			for i := range datagrams {
				want := fmt.Sprint(i)
				if _, err := kernel[i%len(kernel)].WriteToUDPAddrPort([]byte(want), netip.AddrPortFrom(f.group(), multicastPort)); err != nil {
					t.Fatal(err)
				}
				n, _, err := p.ReadFrom(buf)
				if err != nil || string(buf[:n]) != want {
					t.Errorf("got %q, %v; want %q", buf[:n], err, want)
					break
				}
			}
			close(stop)
			busy.Wait()
		})
	}
}

// kernelMember is a socket of the kernel in a multicast group.
type kernelMember struct {
	read func(b []byte) (n, hops int, from net.Addr, err error)
}

func (r *rig) kernelMember(t *testing.T, group netip.AddrPort) *kernelMember {
	t.Helper()
	device, err := net.InterfaceByName(r.device)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenMulticastUDP("udp", device, net.UDPAddrFromAddrPort(group))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	setDeadline(t, c)
	if group.Addr().Is4() {
		p := ipv4.NewPacketConn(c)
		if err := p.SetControlMessage(ipv4.FlagTTL, true); err != nil {
			t.Fatal(err)
		}
		return &kernelMember{func(b []byte) (int, int, net.Addr, error) {
			n, control, from, err := p.ReadFrom(b)
			if err != nil {
				return 0, 0, nil, err
			}
			return n, control.TTL, from, nil
		}}
	}
	p := ipv6.NewPacketConn(c)
	if err := p.SetControlMessage(ipv6.FlagHopLimit, true); err != nil {
		t.Fatal(err)
	}
	return &kernelMember{func(b []byte) (int, int, net.Addr, error) {
		n, control, from, err := p.ReadFrom(b)
		if err != nil {
			return 0, 0, nil, err
		}
		return n, control.HopLimit, from, nil
	}}
}

// wantNext checks the next datagram, how many hops it may go, and its source.
func (k *kernelMember) wantNext(t *testing.T, want []byte, wantHops int, wantFrom netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 65_536)
	n, hops, from, err := k.read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := same(buf[:n], want); err != nil {
		t.Error(err)
	}
	if hops != wantHops || from.String() != wantFrom.String() {
		t.Errorf("from %v with %d hops to go, want %v and %d", from, hops, wantFrom, wantHops)
	}
}

// TestMulticastQuestion asks a group from the kernel, as service discovery does:
// a handler on the shard and two ports for any goroutine answer, each from the
// stack's address.
func TestMulticastQuestion(t *testing.T) {
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			to := netip.AddrPortFrom(f.group(), multicastPort)
			asker := kernelPorts(t, f, r.device, 1)[0]
			h, err := r.HandleUDP("udp", fmt.Sprint(":", multicastPort+1), func(s *stack.Socket, b []byte, from netip.AddrPort) {
				_, _ = s.WriteTo(append([]byte(s.LocalAddr().String()), b...), from) // the asker judges
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = h.Close() }()
			if err := h.JoinGroup(f.group()); err != nil {
				t.Fatal(err)
			}
			other := netip.AddrPortFrom(f.group(), multicastPort+1)
			answers := ask(t, asker, f, "?", other, 1)
			if want := other.String() + "?"; answers[want] != 1 {
				t.Errorf("the answers are %v, want one %q", answers, want)
			}

			for i := range 2 {
				p, err := r.ListenMulticastUDP("udp", net.UDPAddrFromAddrPort(to))
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				go func() {
					buf := make([]byte, 100)
					for {
						n, from, err := p.ReadFrom(buf)
						if err != nil {
							return
						}
						_, _ = p.WriteTo(fmt.Append(buf[:n], i), from) // the asker judges
					}
				}()
			}
			answers = ask(t, asker, f, "!", to, 2)
			if answers["!0"] != 1 || answers["!1"] != 1 {
				t.Errorf("the answers are %v, want !0 and !1", answers)
			}
		})
	})
}

// ask sends a question and collects n answers, which must come from the stack's
// address.
func ask(t *testing.T, c *net.UDPConn, f family, question string, to netip.AddrPort, n int) map[string]int {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(question), to); err != nil {
		t.Fatal(err)
	}
	answers := make(map[string]int)
	buf := make([]byte, 100)
	for range n {
		size, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("%v; answers so far: %v", err, answers)
		}
		if want := netip.AddrPortFrom(f.self, to.Port()); from.String() != want.String() {
			t.Errorf("an answer from %v, want %v", from, want)
		}
		answers[string(buf[:size])]++
	}
	return answers
}

// TestBroadcastToKernel sends to all hosts of the link and of the subnet, for
// which package net asks no permission either.
func TestBroadcastToKernel(t *testing.T) {
	r := open(t, variants()[0].config())
	kernel, err := net.ListenPacket("udp4", fmt.Sprint(":", multicastPort))
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	setPacketDeadline(t, kernel)
	p, err := r.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	subnet := r.self4.As4()
	subnet[3] = 255
	buf := make([]byte, 100)
	for _, a := range []netip.Addr{netip.AddrFrom4(subnet), netip.AddrFrom4([4]byte{255, 255, 255, 255})} {
		to := netip.AddrPortFrom(a, multicastPort)
		if _, err := p.WriteTo([]byte("to all"), net.UDPAddrFromAddrPort(to)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.dial(t, "udp", to.String()).Write([]byte("to all")); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			n, from, err := kernel.ReadFrom(buf)
			if err != nil {
				t.Fatalf("to %v: %v", to, err)
			}
			if sender := netip.MustParseAddrPort(from.String()).Addr(); string(buf[:n]) != "to all" || sender != r.self4 {
				t.Errorf("to %v: got %q from %v", to, buf[:n], from)
			}
		}
	}
}
