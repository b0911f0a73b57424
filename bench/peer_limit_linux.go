package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"numastack/dispatch"
	"numastack/stack"
)

// The limit peer is no stack: it moves frames between the TAP and one buffer, and nothing
// else. Its frames hold UDP instead of TCP, with the sizes, the offloads and the header in
// front of TCP's, because a TCP sender would want answers. So it shows what this kernel's
// TAP and the client carry, one frame per system call, with memory that never leaves the
// cache: what a stack adds to that is its own.
//
// It has a protocol in one place: what comes to chargen's port asks for a burst (see burst),
// so that it sends no more than the client takes, like TCP with its window.

const (
	ethernetLen  = header.EthernetMinimumSize
	frameHeaders = ethernetLen + udpHeaders
	// udpChecksumOffset is where the checksum stands in a UDP header (RFC 768).
	udpChecksumOffset = 6
)

// serveLimit pumps until ctx is done.
func serveLimit(ctx context.Context, spec serverSpec, ready func()) error {
	device, err := dispatch.OpenDevice(dispatch.DeviceConfig{
		Name:       limitTAP,
		HostAddrs:  []netip.Prefix{netip.MustParsePrefix("10.95.0.1/24")},
		MTU:        spec.MTU,
		TxQueueLen: spec.Queue,
		Offload:    true,
	})
	if err != nil {
		return err
	}
	defer func() { _ = device.Close() }()
	if err := announceLimit(); err != nil {
		return err
	}
	ready()
	runtime.LockOSThread() // as a shard does; the thread ends with the process
	return (&pump{queue: device.Queue(0)}).run(ctx)
}

// announceLimit tells the kernel where limitServer is: the pump knows no ARP.
func announceLimit() error {
	link, err := netlink.LinkByName(limitTAP)
	if err != nil {
		return fmt.Errorf("find link %q: %w", limitTAP, err)
	}
	err = netlink.NeighSet(&netlink.Neigh{
		LinkIndex:    link.Attrs().Index,
		State:        netlink.NUD_PERMANENT,
		IP:           net.ParseIP(limitServer),
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1},
	})
	if err != nil {
		return fmt.Errorf("make %s a neighbour on link %q: %w", limitServer, limitTAP, err)
	}
	return nil
}

type pump struct {
	queue *dispatch.Queue
	in    [dispatch.VnetHeaderLen + dispatch.MaxFrameLen]byte
	out   [dispatch.VnetHeaderLen + dispatch.MaxFrameLen]byte
}

// run reads frames until ctx is done. Like a shard it looks for a while before it blocks.
func (p *pump) run(ctx context.Context) error {
	const blockMillis = 100 // then it looks at ctx
	pfd := []unix.PollFd{{Fd: int32(p.queue.FD()), Events: unix.POLLIN}}
	last := time.Now()
	for ctx.Err() == nil {
		n, errno := p.queue.Read(p.in[:])
		switch {
		case errno == 0:
			if err := p.frame(p.in[:n]); err != nil {
				return err
			}
			last = time.Now()
		case errno != unix.EAGAIN && errno != unix.EINTR:
			return fmt.Errorf("read a frame: %w", errno)
		case time.Since(last) > stack.DefaultSpin:
			if _, err := unix.Poll(pfd, blockMillis); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for a frame: %w", err)
			}
			last = time.Now()
		}
	}
	return nil
}

// frame drops what it gets, unless it asks for a burst.
func (p *pump) frame(b []byte) error {
	if len(b) != dispatch.VnetHeaderLen+frameHeaders+burstLen {
		return nil
	}
	frame := b[dispatch.VnetHeaderLen:]
	if header.Ethernet(frame).Type() != header.IPv4ProtocolNumber ||
		header.UDP(frame[ethernetLen+header.IPv4MinimumSize:]).DestinationPort() != portChargen {
		return nil
	}
	ask, err := parseBurst(frame[frameHeaders:])
	if err != nil {
		return nil
	}
	n := 1
	if ask.gso {
		n = ask.perFrame()
	}
	size := p.answer(frame, n, ask)
	for range (ask.count + n - 1) / n {
		// ENOBUFS and the like: a lost frame.
		if errno := p.queue.Write(p.out[:size]); errno == unix.EBADFD || errno == unix.EBADF {
			return fmt.Errorf("write a frame: %w", errno)
		}
	}
	return nil
}

// answer puts a frame of n datagrams into out, for whoever sent the frame that asks, and
// returns its length with the vnet header.
func (p *pump) answer(asks []byte, n int, ask burst) int {
	payload := n * ask.size
	frame := p.out[dispatch.VnetHeaderLen:][:frameHeaders+payload]
	copy(frame[frameHeaders:], chargenBytes)

	eth := header.Ethernet(asks)
	header.Ethernet(frame).Encode(&header.EthernetFields{
		SrcAddr: eth.DestinationAddress(), DstAddr: eth.SourceAddress(), Type: header.IPv4ProtocolNumber,
	})
	from := header.IPv4(asks[ethernetLen:])
	ip := header.IPv4(frame[ethernetLen:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(udpHeaders + payload), TTL: 64, Protocol: uint8(header.UDPProtocolNumber),
		SrcAddr: from.DestinationAddress(), DstAddr: from.SourceAddress(),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	length := uint16(header.UDPMinimumSize + payload)
	port := header.UDP(asks[ethernetLen+header.IPv4MinimumSize:])
	udp := header.UDP(frame[ethernetLen+header.IPv4MinimumSize:])
	udp.Encode(&header.UDPFields{SrcPort: port.DestinationPort(), DstPort: port.SourcePort(), Length: length})

	// The checksum is left to the kernel, as a stack with offloads does.
	udp.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), length))
	vnet := dispatch.VnetHeader{
		Flags: dispatch.VnetNeedsCsum, CsumStart: ethernetLen + header.IPv4MinimumSize, CsumOffset: udpChecksumOffset,
	}
	if n > 1 {
		vnet.GSOType, vnet.GSOSize, vnet.HdrLen = dispatch.VnetGSOUDPL4, uint16(ask.size), frameHeaders
	}
	vnet.Encode(p.out[:])
	return dispatch.VnetHeaderLen + len(frame)
}
