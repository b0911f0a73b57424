package integration

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"
)

// captured is a frame as a packet socket on the device saw it.
type captured struct {
	bytes   []byte
	ours    bool // sent by the stack, else by the kernel
	partial bool // the transport checksum is left to somebody else
	segment int  // payload bytes of each segment that the frame is to be cut into, or 0
}

// capture collects the frames of a device, in both directions, each as it
// crosses the queue: before the kernel has completed what the stack left open,
// and after it has cut what the stack does not take whole.
type capture struct {
	fd     int
	stop   chan struct{}
	frames chan []captured // one value, when the capture has ended
}

// In front of each frame is a struct virtio_net_hdr (linux/virtio_net.h): flags,
// then at 4 the size of the segments.
const (
	vnetLen           = 10
	vnetNeedsChecksum = 1
)

// captureSocket opens a packet socket for all frames of a device, with their
// vnet headers.
func captureSocket(t *testing.T, device string) (fd, index int) {
	t.Helper()
	fd, index = packetSocket(t, device, unix.ETH_P_ALL)
	for _, option := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256 << 20},
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			t.Fatal(err)
		}
	}
	// Short: when nothing comes for so long, the reader looks for an end.
	timeout := unix.NsecToTimeval(50e6)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	return fd, index
}

// captureDevice begins a capture. It ends with frames.
func captureDevice(t *testing.T, device string) *capture {
	t.Helper()
	fd, index := captureSocket(t, device)
	c := &capture{fd: fd, stop: make(chan struct{}), frames: make(chan []captured, 1)}
	go c.read(index)
	return c
}

func (c *capture) read(index int) {
	var frames []captured
	buf := make([]byte, 1<<17)
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		if err == nil {
			if link, ok := from.(*unix.SockaddrLinklayer); ok && link.Ifindex == index && n >= vnetLen {
				frames = append(frames, captured{
					bytes:   append([]byte(nil), buf[vnetLen:n]...),
					ours:    link.Pkttype != unix.PACKET_OUTGOING,
					partial: buf[0]&vnetNeedsChecksum != 0,
					segment: int(binary.NativeEndian.Uint16(buf[4:])),
				})
			}
			continue
		}
		select {
		case <-c.stop:
			c.frames <- frames
			return
		default:
		}
	}
}

// end stops the capture and returns its frames.
func (c *capture) end(t *testing.T) []captured {
	t.Helper()
	close(c.stop)
	frames := <-c.frames
	if stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil {
		t.Error(err)
	} else if stats.Drops != 0 {
		t.Errorf("the capture lost %d of %d frames", stats.Drops, stats.Packets)
	}
	if len(frames) == 0 {
		t.Error("the capture saw no frame")
	}
	return frames
}

// packetSocket opens a packet socket on a device; protocol 0 only sends.
func packetSocket(t *testing.T, device string, protocol uint16) (fd, index int) {
	t.Helper()
	link, err := net.InterfaceByName(device)
	if err != nil {
		t.Fatal(err)
	}
	// Bound before it receives, so that nothing of other devices comes.
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	network := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, protocol))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: network, Ifindex: link.Index}); err != nil {
		t.Fatal(err)
	}
	return fd, link.Index
}

// longest returns the length of the longest frame of each side in bytes.
func longest(frames []captured) (ours, kernels int) {
	for _, f := range frames {
		if f.ours {
			ours = max(ours, len(f.bytes))
		} else {
			kernels = max(kernels, len(f.bytes))
		}
	}
	return ours, kernels
}

// wireLen is the length in bytes of the frame, or of the longest of those that
// it is to be cut into.
func (f *captured) wireLen() int {
	p := gopacket.NewPacket(f.bytes, layers.LayerTypeEthernet, gopacket.NoCopy)
	if l4 := p.TransportLayer(); f.segment > 0 && l4 != nil {
		return len(f.bytes) - len(l4.LayerPayload()) + min(f.segment, len(l4.LayerPayload()))
	}
	return len(f.bytes)
}

// verify decodes a frame and checks every checksum that should be complete. It
// returns whether there was a transport checksum to check.
func (f *captured) verify() (transport bool, err error) {
	p := gopacket.NewPacket(f.bytes, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true, SkipDecodeRecovery: true})
	if e := p.ErrorLayer(); e != nil {
		return false, fmt.Errorf("does not decode: %w", e.Error())
	}
	var (
		pseudo  []byte // addresses and protocol, as they enter the sum
		segment []byte
		proto   layers.IPProtocol
	)
	switch ip := p.NetworkLayer().(type) {
	case *layers.IPv4:
		if sum := onesComplement(ip.Contents); sum != 0xffff {
			return false, fmt.Errorf("IPv4 header adds up to %#04x, want 0xffff", sum)
		}
		if ip.Flags&layers.IPv4MoreFragments != 0 || ip.FragOffset != 0 {
			return false, nil
		}
		pseudo = append(append(pseudo, ip.SrcIP.To4()...), ip.DstIP.To4()...)
		segment, proto = ip.Payload, ip.Protocol
	case *layers.IPv6:
		pseudo = append(append(pseudo, ip.SrcIP.To16()...), ip.DstIP.To16()...)
		segment, proto = ip.Payload, ip.NextHeader
	default:
		return false, nil // ARP
	}
	switch proto {
	case layers.IPProtocolICMPv4:
		pseudo = nil
	case layers.IPProtocolTCP, layers.IPProtocolUDP, layers.IPProtocolICMPv6:
		pseudo = append(pseudo, byte(len(segment)>>24), byte(len(segment)>>16), byte(len(segment)>>8), byte(len(segment)), 0, 0, 0, byte(proto))
	default:
		return false, nil // an IPv6 fragment, for one
	}
	if f.partial {
		return false, nil
	}
	if sum := onesComplement(append(pseudo, segment...)); sum != 0xffff {
		return true, fmt.Errorf("%v adds up to %#04x, want 0xffff", proto, sum)
	}
	return true, nil
}

// onesComplement is the sum of RFC 1071.
func onesComplement(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		if i%2 == 0 {
			sum += uint32(v) << 8
		} else {
			sum += uint32(v)
		}
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
