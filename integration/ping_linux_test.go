package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// ICMP echo (RFC 792, RFC 4443 section 4).
const (
	icmpHeaderLen  = 8
	echoRequest4   = 8
	echoReply4     = 0
	echoRequest6   = 128
	echoReply6     = 129
	pingGroupRange = "/proc/sys/net/ipv4/ping_group_range"
)

// TestPing sends echo requests of several sizes, the larger ones in fragments.
func TestPing(t *testing.T) {
	needNetwork(t)
	if err := os.WriteFile(pingGroupRange, []byte("0 0"), 0o644); err != nil {
		t.Skipf("needs ping sockets: %v", err)
	}
	forVariants(t, func(t *testing.T, r *rig) {
		r.forFamilies(t, func(t *testing.T, f family) {
			for seq, size := range []int{0, 1, 56, 1452, 1473, 8000, 60_000} {
				if err := ping(f.self, uint16(seq), payload(uint64(seq), size)); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
		})
	})
}

// ping sends one echo request and checks the answer. The kernel fills in
// identifier and checksum (net/ipv4/ping.c).
func ping(to netip.Addr, seq uint16, content []byte) error {
	domain, proto, request, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(echoRequest4), byte(echoReply4)
	if to.Is6() {
		domain, proto, request, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, echoRequest6, echoReply6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return fmt.Errorf("open a ping socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	if to.Is6() {
		err = unix.Connect(fd, &unix.SockaddrInet6{Addr: to.As16()})
	} else {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()})
	}
	if err != nil {
		return fmt.Errorf("connect a ping socket: %w", err)
	}
	message := make([]byte, icmpHeaderLen, icmpHeaderLen+len(content))
	message[0] = request
	binary.BigEndian.PutUint16(message[6:], seq)
	if _, err := unix.Write(fd, append(message, content...)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	buf := make([]byte, 65_536)
	n, err := unix.Read(fd, buf)
	for errors.Is(err, unix.EINTR) { // a call with a time limit is not begun again by itself (signal(7))
		n, err = unix.Read(fd, buf)
	}
	switch {
	case err != nil:
		return fmt.Errorf("no answer: %w", err)
	case n < icmpHeaderLen || buf[0] != reply || binary.BigEndian.Uint16(buf[6:]) != seq:
		return fmt.Errorf("the answer is % x, want type %d and sequence number %d", buf[:min(n, icmpHeaderLen)], reply, seq)
	}
	return same(buf[icmpHeaderLen:n], content)
}
