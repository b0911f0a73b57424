package shard

import (
	"context"
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

// opError gives err the shape that package net's connections give theirs. A
// nil error and io.EOF stay what they are.
func opError(op, network string, source, addr netip.AddrPort, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if e, ok := err.(syscall.Errno); ok { // only a bare one is wrapped
		err = os.NewSyscallError(systemCall(op, network), e)
	}
	return &net.OpError{Op: op, Net: network, Source: netAddr(network, source), Addr: netAddr(network, addr), Err: err}
}

// systemCall returns the call that reports an operation's errors on a kernel's
// socket.
func systemCall(op, network string) string {
	switch {
	case op == "dial":
		return "connect"
	case op == "listen":
		return "bind"
	case op == "set":
		return "setsockopt"
	case op == "close":
		return "shutdown" // close itself does not fail
	case op == "readfrom":
		return "write"
	case op == "writeto":
		return "read"
	case network[0] == 'u' && op == "read":
		return "recvfrom"
	case network[0] == 'u' && op == "write":
		return "sendto"
	default:
		return op
	}
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

// ContextError translates the error of a context that has ended into the one
// that net.Dialer gives: it matches the context's, and a timeout is a net.Error
// and matches os.ErrDeadlineExceeded too.
func ContextError(err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return canceledError{}
	case errors.Is(err, context.DeadlineExceeded):
		return timeoutError{}
	default:
		return err
	}
}

// canceledError says that a context was canceled before an operation was done.
type canceledError struct{}

func (canceledError) Error() string        { return "operation was canceled" }
func (canceledError) Is(target error) bool { return target == context.Canceled }

// timeoutError says that a context's deadline has passed. It implements
// net.Error.
type timeoutError struct{}

func (timeoutError) Error() string   { return "i/o timeout" }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }
func (timeoutError) Is(target error) bool {
	return target == context.DeadlineExceeded || target == os.ErrDeadlineExceeded
}
