package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/link/tun"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// serveGVisor serves on gVisor's netstack as its own examples set it up: one TAP queue
// through fdbased, one stack, no option changed.
func serveGVisor(ctx context.Context, ready func()) error {
	fd, err := tun.OpenTAP(gvisorTAP)
	if err != nil {
		return fmt.Errorf("open tap %q: %w", gvisorTAP, err)
	}
	if err := addressLink(gvisorTAP, "10.98.0.1/24"); err != nil {
		return err
	}
	s, err := newGVisorStack(fd)
	if err != nil {
		return err
	}
	addr := tcpip.FullAddress{NIC: gvisorNIC, Addr: gvisorAddress()}
	return serve(ctx, allServices, func(port uint16) (net.Listener, error) {
		addr.Port = port
		return gonet.ListenTCP(s, addr, ipv4.ProtocolNumber)
	}, ready)
}

const gvisorNIC tcpip.NICID = 1

func gvisorAddress() tcpip.Address {
	return tcpip.AddrFrom4(netip.MustParseAddr(gvisorServer).As4())
}

func newGVisorStack(fd int) (*stack.Stack, error) {
	mac := make([]byte, header.EthernetAddressSize)
	_, _ = rand.Read(mac)        // never fails
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	ep, err := fdbased.New(&fdbased.Options{
		FDs:            []int{fd},
		MTU:            mtu,
		EthernetHeader: true,
		Address:        tcpip.LinkAddress(mac),
	})
	if err != nil {
		return nil, fmt.Errorf("fdbased endpoint: %w", err)
	}

	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := s.CreateNIC(gvisorNIC, ep); err != nil {
		return nil, gvisorError("create NIC", err)
	}
	if err := s.AddProtocolAddress(gvisorNIC, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: gvisorAddress(), PrefixLen: 24},
	}, stack.AddressProperties{}); err != nil {
		return nil, gvisorError("add address "+gvisorServer, err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: gvisorNIC}})
	return s, nil
}

// gvisorError makes an error of gVisor's own kind, which is not one.
func gvisorError(doing string, err tcpip.Error) error {
	return fmt.Errorf("gvisor: %s: %w", doing, errors.New(err.String()))
}
