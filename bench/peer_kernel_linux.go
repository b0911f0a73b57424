package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strconv"

	"golang.org/x/sys/unix"
)

// serveKernel serves with package net in the namespace that this process was started in.
func serveKernel(ctx context.Context, mtu int, ready func()) error {
	if err := awaitVeth(kernelServerLink); err != nil {
		return err
	}
	if err := addressLink(kernelServerLink, kernelServer+"/24", mtu); err != nil {
		return err
	}
	var lc net.ListenConfig
	address := func(port uint16) string { return net.JoinHostPort(kernelServer, strconv.Itoa(int(port))) }
	return serve(ctx, allServices, opener{
		stream: func(port uint16) (net.Listener, error) { return lc.Listen(ctx, "tcp4", address(port)) },
		datagrams: func(port uint16) (net.PacketConn, error) {
			c, err := lc.ListenPacket(ctx, "udp4", address(port))
			if err != nil {
				return nil, err
			}
			return newSegmentConn(c.(*net.UDPConn))
		},
	}, ready)
}

// segmentConn is a UDP socket with the kernel's segmentation and receive offload (UDP_SEGMENT
// and UDP_GRO of udp(7)).
type segmentConn struct {
	*net.UDPConn
	size int // of the datagrams that the socket cuts what is written into; 0: it does not
	oob  [64]byte
}

var _ segmenter = (*segmentConn)(nil)

func newSegmentConn(c *net.UDPConn) (*segmentConn, error) {
	s := &segmentConn{UDPConn: c}
	return s, s.set(unix.UDP_GRO, 1)
}

func (s *segmentConn) set(option, value int) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), unix.SOL_UDP, option, value) }); err != nil {
		return err
	}
	if optErr != nil {
		return fmt.Errorf("set UDP option %d to %d: %w", option, value, optErr)
	}
	return nil
}

// readSegments implements segmenter.
func (s *segmentConn) readSegments(b []byte) (n, datagrams int, err error) {
	n, oobn, _, _, err := s.ReadMsgUDPAddrPort(b, s.oob[:])
	if err != nil || oobn == 0 {
		return n, 1, err
	}
	messages, err := unix.ParseSocketControlMessage(s.oob[:oobn])
	if err != nil {
		return n, 0, fmt.Errorf("control message: %w", err)
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_UDP && m.Header.Type == unix.UDP_GRO && len(m.Data) >= 4 {
			size := int(binary.NativeEndian.Uint32(m.Data))
			return n, (n + size - 1) / max(size, 1), nil
		}
	}
	return n, 1, nil
}

// writeSegments implements segmenter. The last datagram may be shorter.
func (s *segmentConn) writeSegments(b []byte, size int, to net.Addr) error {
	if size != s.size {
		if err := s.set(unix.UDP_SEGMENT, size); err != nil {
			return err
		}
		s.size = size
	}
	_, err := s.WriteTo(b, to)
	return err
}
