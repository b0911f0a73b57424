package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/link/qdisc/fifo"
	"gvisor.dev/gvisor/pkg/tcpip/link/tun"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// serveGVisor serves on gVisor's netstack as its own examples set it up: one TAP queue
// through fdbased, one stack, no option changed.
func serveGVisor(ctx context.Context, mtu int, ready func()) error {
	fd, err := tun.OpenTAP(gvisorTAP)
	if err != nil {
		return fmt.Errorf("open tap %q: %w", gvisorTAP, err)
	}
	if err := addressLink(gvisorTAP, "10.98.0.1/24", mtu); err != nil {
		return err
	}
	return serveNetstack(ctx, gvisorServer, fdbased.Options{FDs: []int{fd}, MTU: uint32(mtu)}, 0, ready)
}

// serveGVisorGSO serves on gVisor's netstack as runsc sets it up for speed
// (runsc/sandbox/network.go, runsc/boot/network.go): a packet socket with a vnet header on
// one end of a veth pair, many frames per system call, super-frames in both directions,
// checksums of what comes left to the kernel, GRO, and a FIFO that sends what is queued by
// one system call.
func serveGVisorGSO(ctx context.Context, mtu int, ready func()) error {
	if err := awaitVeth(gvisorGSOServerLink); err != nil {
		return err
	}
	fd, gsoMaxSize, err := openPacketSocket(gvisorGSOServerLink)
	if err != nil {
		return fmt.Errorf("packet socket on link %q: %w", gvisorGSOServerLink, err)
	}
	return serveNetstack(ctx, gvisorGSOServer, fdbased.Options{
		FDs:                []int{fd},
		MTU:                uint32(mtu),
		PacketDispatchMode: fdbased.RecvMMsg,
		GSOMaxSize:         gsoMaxSize,
		RXChecksumOffload:  true,
		GRO:                true,
	}, fifoLen, ready)
}

// The size in bytes of a packet socket's buffers, and of the FIFO in packets: runsc's.
const (
	packetBuffer = 4 << 20
	fifoLen      = 1000
)

// openPacketSocket returns a packet socket that sees all frames of a link, and the link's
// largest super-frame in bytes. It sets the link up, without an address: the namespace's own
// stack shall not answer.
func openPacketSocket(name string) (fd int, gsoMaxSize uint32, err error) {
	if err := linkUp(name); err != nil {
		return -1, 0, err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return -1, 0, err
	}
	// ETH_P_ALL in network order.
	const everything = unix.ETH_P_ALL << 8
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, everything)
	if err != nil {
		return -1, 0, fmt.Errorf("socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: link.Attrs().Index}); err != nil {
		return fd, 0, fmt.Errorf("bind: %w", err)
	}
	for _, o := range []struct {
		name                 string
		level, option, value int
	}{
		{"PACKET_VNET_HDR", unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{"SO_RCVBUFFORCE", unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, packetBuffer},
		{"SO_SNDBUFFORCE", unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, packetBuffer},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return fd, 0, fmt.Errorf("set %s to %d: %w", o.name, o.value, err)
		}
	}
	return fd, link.Attrs().GSOMaxSize, nil
}

// serveNetstack serves on a gVisor stack with one link, and in front of it a FIFO of so many
// packets; 0: none.
func serveNetstack(ctx context.Context, server string, link fdbased.Options, fifoLen int, ready func()) error {
	address := tcpip.AddrFrom4(netip.MustParseAddr(server).As4())
	s, err := newGVisorStack(address, link, fifoLen)
	if err != nil {
		return err
	}
	at := func(port uint16) tcpip.FullAddress {
		return tcpip.FullAddress{NIC: gvisorNIC, Addr: address, Port: port}
	}
	return serve(ctx, allServices, opener{
		stream: func(port uint16) (net.Listener, error) {
			return gonet.ListenTCP(s, at(port), ipv4.ProtocolNumber)
		},
		datagrams: func(port uint16) (net.PacketConn, error) {
			local := at(port)
			return gonet.DialUDP(s, &local, nil, ipv4.ProtocolNumber)
		},
	}, ready)
}

const gvisorNIC tcpip.NICID = 1

func newGVisorStack(address tcpip.Address, link fdbased.Options, fifoLen int) (*stack.Stack, error) {
	mac := make([]byte, header.EthernetAddressSize)
	_, _ = rand.Read(mac)        // never fails
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	link.EthernetHeader, link.Address = true, tcpip.LinkAddress(mac)
	ep, err := fdbased.New(&link)
	if err != nil {
		return nil, fmt.Errorf("fdbased endpoint: %w", err)
	}

	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	var options stack.NICOptions
	if fifoLen > 0 {
		options.QDisc = fifo.New(ep, runtime.GOMAXPROCS(0), fifoLen)
	}
	if err := s.CreateNICWithOptions(gvisorNIC, ep, options); err != nil {
		return nil, gvisorError("create NIC", err)
	}
	if err := s.AddProtocolAddress(gvisorNIC, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: address, PrefixLen: 24},
	}, stack.AddressProperties{}); err != nil {
		return nil, gvisorError("add address", err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: gvisorNIC}})
	return s, nil
}

// gvisorError makes an error of gVisor's own kind, which is not one.
func gvisorError(doing string, err tcpip.Error) error {
	return fmt.Errorf("gvisor: %s: %w", doing, errors.New(err.String()))
}
