package shard

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"numastack/dispatch"
)

// nicID is the only network device of a group's netstack.
const nicID tcpip.NICID = 1

// answerer is the group that answers ARP requests, neighbor solicitations and
// queries for multicast members, for all of them.
const answerer = 0

// Group is a flow group: one gVisor netstack with its device, its clock, its
// listeners and its connections. Which frames belong to it is fixed for life
// by the hash; which shard owns it may change.
//
// Everything in it is touched by the owner's thread alone.
type Group struct {
	id     int
	set    *Set
	shard  *Shard                // owner
	at     atomic.Pointer[Shard] // the same, for other threads
	memory int                   // the node whose memory its netstack was made in
	stack  *stack.Stack
	link   link
	clock  clock
	tcp    *inlineTCP
	active bool // in shard.active

	conns      connList
	flows      map[uint32]*Conn // open connections by the hash of their frames
	listeners  map[*listenerPart]struct{}
	sockets    map[tcpip.Endpoint]*Socket
	ports      map[netip.AddrPort]*Socket // by local address: those that share it with no other
	transport  stack.TransportDispatcher  // the netstack above IP
	hops       map[hopKey]*hop
	lastHop    *hop
	frames     uint64 // delivered
	bytes      uint64 // the same, from the Ethernet header on
	outOfOrder uint64 // segments that came before an earlier one of their flow
	weight     uint64 // of the frames up to the last settling of accounts
	busy       uint64 // nanoseconds; see Shard.settle
	served     int    // handlers of Serve that have not ended

	timeouts  uint64 // of retransmission timers, up to the last look for black holes
	stuck     map[*tcp.Endpoint]stuck
	fragments *dispatch.Fragments // nil before the first one
	arrivals  *arrivals           // nil: the kernel knows the queues

	load atomic.Int32 // connections, and dials on their way; the owner and Dial write, Dial reads
}

func newGroup(id int, s *Shard, start time.Time) (*Group, error) {
	cfg := &s.set.cfg
	g := &Group{
		id:        id,
		set:       s.set,
		shard:     s,
		memory:    s.memory,
		flows:     make(map[uint32]*Conn),
		listeners: make(map[*listenerPart]struct{}),
		sockets:   make(map[tcpip.Endpoint]*Socket),
		ports:     make(map[netip.AddrPort]*Socket),
		hops:      make(map[hopKey]*hop),
	}
	g.at.Store(s)
	g.clock = clock{start: start, now: &s.now, earliest: &s.earliest}
	g.link = link{
		g:     g,
		mtu:   uint32(cfg.MTU),
		mac:   tcpip.LinkAddress(cfg.MAC),
		gso:   cfg.Offloads.TCP,
		muted: id != answerer,
	}
	if cfg.Program == nil && len(s.set.shards) > 1 {
		g.arrivals = &arrivals{queues: cfg.Queues}
	}
	g.conns.init()
	g.stack = stack.New(stack.Options{
		Clock: &g.clock,
		// A connection to an address of our own never leaves the group.
		HandleLocal: true,
		NetworkProtocols: []stack.NetworkProtocolFactory{
			// One group tells switches and routers what all of them have joined.
			g.errorsAtHome(ipv4.NewProtocolWithOptions(ipv4.Options{IGMP: ipv4.IGMPOptions{Enabled: id == answerer}})),
			// The addresses are given, not negotiated: no duplicate address
			// detection (it would trip over the other groups), no router
			// advertisements, no link-local address.
			g.errorsAtHome(ipv6.NewProtocolWithOptions(ipv6.Options{
				NDPConfigs: ipv6.NDPConfigurations{HandleRAs: ipv6.HandlingRAsDisabled},
				DADConfigs: stack.DADConfigurations{DupAddrDetectTransmits: 0},
				MLD:        ipv6.MLDOptions{Enabled: id == answerer},
			})),
			arp.NewProtocol,
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			func(st *stack.Stack) stack.TransportProtocol {
				g.tcp = newInlineTCP(g, st)
				return g.tcp
			},
			udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	g.tcp.stats = g.stack.Stats().TCP
	if err := g.setBuffers(cfg.SendBuffer, cfg.ReceiveBuffer); err != nil {
		return nil, fmt.Errorf("size buffers of group %d: %s", id, err)
	}
	if control := tcpip.CongestionControlOption(cfg.Congestion); control != "" {
		if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &control); err != nil {
			return nil, fmt.Errorf("set congestion control %q of group %d: %s", control, id, err)
		}
	}
	if err := g.stack.CreateNICWithOptions(nicID, &g.link, stack.NICOptions{Name: "tap", QDisc: &g.link}); err != nil {
		return nil, fmt.Errorf("create device of group %d: %s", id, err)
	}
	var routes []tcpip.Route
	for _, p := range cfg.Addrs {
		addr := tcpip.ProtocolAddress{
			Protocol:          networkProtocol(p.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpipAddress(p.Addr()), PrefixLen: p.Bits()},
		}
		if err := g.stack.AddProtocolAddress(nicID, addr, stack.AddressProperties{}); err != nil {
			return nil, fmt.Errorf("add address %v to group %d: %s", p, id, err)
		}
		routes = append(routes, tcpip.Route{Destination: addr.AddressWithPrefix.Subnet(), NIC: nicID})
	}
	for _, gw := range cfg.Gateways {
		destination := header.IPv4EmptySubnet
		if gw.Is6() {
			destination = header.IPv6EmptySubnet
		}
		routes = append(routes, tcpip.Route{Destination: destination, Gateway: tcpipAddress(gw), NIC: nicID})
	}
	g.stack.SetRouteTable(routes)
	return g, nil
}

// errorsAtHome makes a network protocol tell endpoints their errors on the
// owner's thread. gVisor gives up the oldest of more than 64 neighbors it waits
// for in a goroutine of its own (packetsPendingLinkResolution.enqueue).
func (g *Group) errorsAtHome(f stack.NetworkProtocolFactory) stack.NetworkProtocolFactory {
	return func(s *stack.Stack) stack.NetworkProtocol { return homeProtocol{f(s), g} }
}

type homeProtocol struct {
	stack.NetworkProtocol
	g *Group
}

// NewEndpoint implements stack.NetworkProtocol.
func (p homeProtocol) NewEndpoint(nic stack.NetworkInterface, d stack.TransportDispatcher) stack.NetworkEndpoint {
	p.g.transport = d
	return p.g.withShortWay(p.NetworkProtocol.NewEndpoint(nic, homeDispatcher{d.(stack.TransportDispatcherWithDefaultHandlerResult), p.g}))
}

type homeDispatcher struct {
	stack.TransportDispatcherWithDefaultHandlerResult
	g *Group
}

// DeliverTransportError implements stack.TransportDispatcher.
func (d homeDispatcher) DeliverTransportError(local, remote tcpip.Address, network tcpip.NetworkProtocolNumber, transport tcpip.TransportProtocolNumber, err stack.TransportError, pkt *stack.PacketBuffer) {
	pkt.IncRef()
	_, _ = d.g.post(func(g *Group) error {
		defer pkt.DecRef()
		quote, ok := pkt.Data().PullUp(minQuote)
		if id := (stack.TransportEndpointID{LocalAddress: local, RemoteAddress: remote}); !ok || !g.transportError(id, network, transport, err, quote) {
			return nil
		}
		d.TransportDispatcherWithDefaultHandlerResult.DeliverTransportError(local, remote, network, transport, err, pkt)
		return nil
	})
}

// maxAutoBuffer is the size in bytes up to which gVisor may grow the buffers of
// a connection to a far peer by itself.
const maxAutoBuffer = 4 << 20

// setBuffers sets the sizes that connections start with.
func (g *Group) setBuffers(send, receive int) tcpip.Error {
	s := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: send, Max: max(send, maxAutoBuffer)}
	if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &s); err != nil {
		return err
	}
	r := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: min(receive, firstReceiveBuffer), Max: max(receive, maxAutoBuffer)}
	return g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &r)
}

// activate puts the group on the shard's list of groups whose TCP has work.
func (g *Group) activate() {
	if !g.active {
		g.active = true
		g.shard.active = append(g.shard.active, g)
	}
}

// deliver hands one received frame to the netstack. frame begins with the
// Ethernet header; when holder is not nil, frame lies in it from offset on and
// a large payload is lent to the netstack instead of copied.
func (g *Group) deliver(vnet *dispatch.VnetHeader, p *dispatch.Parsed, frame []byte, holder *buffer.View, offset int) {
	g.frames++
	g.bytes += uint64(p.Length)
	var packet buffer.Buffer
	if payload := p.Length - int(p.Payload); p.Payload != 0 && payload > rxCopyLimit {
		// gVisor copies a shared view when it parses headers in it, so they
		// get a small one of their own.
		packet = buffer.MakeWithView(fullViewOf(frame[ethernetLen:p.Payload]))
		var rest *buffer.View
		if holder != nil {
			rest = holder.Clone()
			rest.TrimFront(offset + int(p.Payload))
			rest.CapLength(payload)
		} else {
			rest = viewOf(frame[p.Payload:p.Length])
		}
		_ = packet.Append(rest) // fails only when it copies
	} else {
		packet = buffer.MakeWithView(viewOf(frame[ethernetLen:p.Length]))
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: packet})
	g.link.vouched = vnet.Flags&(dispatch.VnetNeedsCsum|dispatch.VnetDataValid) != 0
	switch c := g.flowOf(p, frame); {
	case c != nil:
		g.deliverSegment(c, p, frame, pkt)
	case g.needsNoIP(p, frame):
		if g.consumeHeaders(p, pkt) {
			g.transport.DeliverTransportPacket(header.TCPProtocolNumber, pkt)
		}
	default:
		g.link.dispatcher.DeliverNetworkPacket(protocolOf(frame), pkt)
	}
	pkt.DecRef()
}

// protocolOf returns the EtherType of a frame that was parsed before.
func protocolOf(frame []byte) tcpip.NetworkProtocolNumber {
	return header.Ethernet(frame).Type()
}

func networkProtocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func networkHeaderLen(a netip.Addr) int {
	if a.Is4() {
		return header.IPv4MinimumSize
	}
	return header.IPv6MinimumSize
}

func tcpipAddress(a netip.Addr) tcpip.Address {
	switch {
	case !a.IsValid():
		return tcpip.Address{}
	case a.Is4():
		return tcpip.AddrFrom4(a.As4())
	default:
		return tcpip.AddrFrom16(a.As16())
	}
}

func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	addr := tcpipAddress(a.Addr())
	if a.Addr().IsUnspecified() {
		addr = tcpip.Address{}
	}
	return tcpip.FullAddress{Addr: addr, Port: a.Port()}
}

func addrPort(a tcpip.FullAddress) netip.AddrPort {
	return netip.AddrPortFrom(netipAddr(a.Addr), a.Port)
}

// netipAddr is the inverse of tcpipAddress.
func netipAddr(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}

// counters copies what the netstack has counted.
func (g *Group) counters() GroupCounters {
	stats := g.stack.Stats()
	return GroupCounters{
		Group:          g.id,
		Memory:         g.memory,
		Frames:         g.frames,
		Bytes:          g.bytes,
		Sent:           g.link.sent,
		Busy:           g.busy,
		Conns:          g.load.Load(),
		Served:         g.served,
		OutOfOrder:     g.outOfOrder,
		Connected:      stats.TCP.CurrentConnected.Value(),
		ChecksumErrors: stats.TCP.ChecksumErrors.Value(),
		Retransmits:    stats.TCP.Retransmits.Value(),
		SegmentsLost:   stats.DroppedPackets.Value(),
	}
}
