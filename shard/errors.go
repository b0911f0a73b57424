package shard

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// errno translates an error of gVisor into the one that the kernel's sockets
// report in the same case.
func errno(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrClosedForReceive:
		return io.EOF
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrConnectionReset, *tcpip.ErrAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrPortInUse:
		return syscall.EADDRINUSE
	case *tcpip.ErrBadLocalAddress, *tcpip.ErrNoPortAvailable, *tcpip.ErrBadAddress:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE
	case *tcpip.ErrNotPermitted:
		return syscall.EPERM
	case *tcpip.ErrBroadcastDisabled:
		return syscall.EACCES
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	case *tcpip.ErrNotConnected:
		return syscall.ENOTCONN
	case *tcpip.ErrAlreadyConnected:
		return syscall.EISCONN
	case *tcpip.ErrNotSupported, *tcpip.ErrUnknownProtocolOption:
		return syscall.EOPNOTSUPP
	case *tcpip.ErrWouldBlock:
		return syscall.EAGAIN
	default:
		return syscall.EINVAL
	}
}

// opError gives err the shape that package net's connections give theirs.
func opError(op, network string, source, addr netip.AddrPort, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if e, ok := err.(syscall.Errno); ok { // only a bare one is wrapped
		err = os.NewSyscallError(op, e)
	}
	return &net.OpError{Op: op, Net: network, Source: netAddr(network, source), Addr: netAddr(network, addr), Err: err}
}

func netAddr(network string, a netip.AddrPort) net.Addr {
	switch {
	case !a.IsValid():
		return nil
	case network[0] == 'u':
		return net.UDPAddrFromAddrPort(a)
	default:
		return net.TCPAddrFromAddrPort(a)
	}
}
