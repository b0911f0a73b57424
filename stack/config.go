package stack

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"numastack/dispatch"
)

// Defaults and limits of Config.
const (
	DefaultDevice    = "numa0"
	DefaultMTU       = 1500
	DefaultSpin      = 100 * time.Microsecond
	DefaultBacklog   = 1024
	DefaultMaxConns  = 1 << 20
	DefaultRxBuffers = 512
	DefaultDrain     = 500 * time.Millisecond

	DefaultHandlerLimit = 10 * time.Millisecond

	DefaultSendBuffer    = 768 << 10
	DefaultReceiveBuffer = 2 << 20

	minBuffer = 4 << 10
	maxBuffer = 1 << 30

	minMTU     = 576
	minMTUIPv6 = 1280
	maxMTU     = 65521
	maxShards  = dispatch.Buckets
	maxGroups  = dispatch.Buckets
	maxSpin    = time.Second

	// defaultGroups and groupsPerShard: enough groups to even out load by
	// moving them, few enough that a stack of 48 KB each does not matter.
	defaultGroups  = 32
	groupsPerShard = 4
)

// Steering says who picks the queue of a frame.
type Steering int

// The ways of steering.
const (
	// SteeringAuto is SteeringKernel where the kernel permits it, else
	// SteeringUser.
	SteeringAuto Steering = iota
	// SteeringKernel attaches an eBPF program to the device, so that each
	// frame arrives on the queue of the shard that owns its flow. It takes
	// CAP_BPF or CAP_SYS_ADMIN.
	SteeringKernel
	// SteeringUser lets the shard that read a frame hand it to the owner.
	SteeringUser
)

var steeringNames = [...]string{"auto", "kernel", "user"}

// String returns the name that UnmarshalText accepts.
func (s Steering) String() string { return enumName(steeringNames[:], int(s)) }

// MarshalText implements encoding.TextMarshaler.
func (s Steering) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts auto, kernel and user.
func (s *Steering) UnmarshalText(b []byte) error {
	i, err := enumValue(steeringNames[:], string(b))
	*s = Steering(i)
	return err
}

// OffloadMode says whether frames larger than the MTU and partial checksums may
// pass between the kernel and the stack.
type OffloadMode int

// The offload settings.
const (
	// OffloadAuto takes every offload that the kernel grants.
	OffloadAuto OffloadMode = iota
	// OffloadOff passes plain frames of at most the MTU, with checksums.
	OffloadOff
)

var offloadNames = [...]string{"auto", "off"}

// String returns the name that UnmarshalText accepts.
func (o OffloadMode) String() string { return enumName(offloadNames[:], int(o)) }

// MarshalText implements encoding.TextMarshaler.
func (o OffloadMode) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText accepts auto and off.
func (o *OffloadMode) UnmarshalText(b []byte) error {
	i, err := enumValue(offloadNames[:], string(b))
	*o = OffloadMode(i)
	return err
}

// CongestionControl is the algorithm by which TCP senders find how much the way
// to a peer carries.
type CongestionControl int

// The congestion controls.
const (
	// CongestionReno is NewReno (RFC 6582), the smallest and, to peers on the
	// host, as fast as any.
	CongestionReno CongestionControl = iota
	// CongestionCubic is CUBIC (RFC 9438), which comes back sooner from a loss
	// on a long and fast way.
	CongestionCubic
)

var congestionNames = [...]string{"reno", "cubic"}

// String returns the name that UnmarshalText accepts.
func (c CongestionControl) String() string { return enumName(congestionNames[:], int(c)) }

// MarshalText implements encoding.TextMarshaler.
func (c CongestionControl) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText accepts reno and cubic.
func (c *CongestionControl) UnmarshalText(b []byte) error {
	i, err := enumValue(congestionNames[:], string(b))
	*c = CongestionControl(i)
	return err
}

func enumName(names []string, i int) string {
	if i < 0 || i >= len(names) {
		return fmt.Sprintf("unknown(%d)", i)
	}
	return names[i]
}

func enumValue(names []string, s string) (int, error) {
	if i := slices.Index(names, s); i >= 0 {
		return i, nil
	}
	return 0, fmt.Errorf("%q is not one of %q", s, names)
}

// HashKey is a key of the Toeplitz hash, 40 bytes.
type HashKey = dispatch.Key

// ParseHashKey makes a key of 40 bytes; it refuses one that would leave buckets
// of the indirection table empty.
func ParseHashKey(b []byte) (HashKey, error) { return dispatch.CheckKey(b) }

// VerificationKey is the key of Microsoft's verification suite for receive-side
// scaling. It is for comparing hashes: everybody knows it.
var VerificationKey = dispatch.VerificationKey

// HashTypes is a set of RSS hash types, with the names that Windows gives them:
// what the hash of a packet looks at beside its addresses.
type HashTypes = dispatch.HashTypes

// ParseHashTypes makes a set of names as in "IPV4,TCP_IPV4". It refuses the empty
// set, by which all frames would go to one bucket.
func ParseHashTypes(s string) (HashTypes, error) {
	types, err := dispatch.ParseHashTypes(s)
	if err == nil && types == 0 {
		err = fmt.Errorf("hash types %q: want at least one of %s", s, HashAll)
	}
	return types, err
}

// The hash types.
const (
	HashIPv4    = dispatch.HashIPv4
	HashTCPIPv4 = dispatch.HashTCPIPv4
	HashUDPIPv4 = dispatch.HashUDPIPv4
	HashIPv6    = dispatch.HashIPv6
	HashTCPIPv6 = dispatch.HashTCPIPv6
	HashUDPIPv6 = dispatch.HashUDPIPv6
	HashAll     = dispatch.HashAll
)

// Config describes a stack. Only Addrs is required; a zero field means its
// documented default.
type Config struct {
	// Device is the name of the TAP device, 1 to 15 bytes. An existing one is
	// used, else one is created. Default "numa0".
	Device string
	// Persist keeps a created device after Close.
	Persist bool
	// Owner and Group are the numeric user and group that may open a created
	// device. Default: only who may administer the network.
	Owner, Group *int
	// TxQueueLen is how many frames the kernel holds per queue for us before
	// it drops, 1 to 65536. Default: at least 4096.
	TxQueueLen int

	// Addrs are the stack's addresses, each with the length of its subnet.
	Addrs []netip.Prefix
	// Gateways are the next hops of the default routes, at most one per
	// address family, each in the subnet of one of Addrs. Default: none, only
	// the subnets are reached.
	Gateways []netip.Addr
	// HostAddrs are the addresses that the kernel's side of the device gets.
	// Default: leave it as it is.
	HostAddrs []netip.Prefix
	// HostCPUs are the CPUs on which the kernel goes on with the frames that the
	// shards send, by receive packet steering: the part of a local client or of a
	// bridge, which else runs on the shard's CPU, within its writes. It takes
	// another CPU for that, and interrupts between CPUs: docs/performance.md says
	// which loads gain and which lose. Default: leave the device as it is, which is
	// the shard's CPU on a new one.
	HostCPUs []int
	// MTU is the largest IP packet in bytes, 576 to 65521, with IPv6 from 1280.
	// Default 1500.
	MTU int

	// Shards is the number of shards, 1 to 128. Default: the number of CPUs,
	// or 1 less where there are several, so that other goroutines have one.
	Shards int
	// Groups is the number of flow groups, Shards to 128. Default 32, and at
	// least 4 per shard where 128 allow it.
	Groups int

	// Profile says how shards are spread over NUMA nodes and CPUs, by the names
	// and the meaning of Windows' RSS profiles. Default ProfileClosest.
	Profile Profile
	// CPUs are the CPUs that the shards' threads are pinned to, in order; with
	// fewer CPUs than shards they are used round robin. Default: the profile
	// chooses among those that the process may use.
	CPUs []int
	// BaseCPU and MaxCPU are the lowest and the highest CPU that the profile may
	// choose. Default: all.
	BaseCPU, MaxCPU int
	// Nodes are the only NUMA nodes that the profile may choose. Default: all.
	Nodes []int
	// CloseTo is the network device whose NUMA node is the closest one: that of
	// the card the frames come through. Default: the node with most CPUs.
	CloseTo string
	// MeasureCosts has New measure what memory of each node costs each node's
	// CPUs, once per process and topology, so also after CPUs or memory have come
	// or gone: about 0.3 s per pair of nodes, at full load. Placement, rebalancing
	// and node pools go by it. Else they go by the distances that the firmware
	// tells.
	MeasureCosts bool

	// Steering says who picks the queue of a frame. Default SteeringAuto.
	Steering Steering
	// Rebalance says what moves flow groups, with their live connections,
	// between shards. Default RebalanceAuto: what Profile asks for.
	Rebalance Rebalance
	// Offload says whether frames may be larger than the MTU. Default
	// OffloadAuto.
	Offload OffloadMode
	// HashKey is the key of the Toeplitz hash; one that does not reach every
	// bucket is refused. Default: random, because who knows the key can choose
	// the shard of a flow.
	HashKey *HashKey
	// SymmetricHash draws a key by which both directions of a flow have the same
	// hash, for those who look at both. It is easier to guess: it has 14 bits of
	// entropy instead of 309.
	SymmetricHash bool
	// HashTypes says which headers the hash looks at. Default HashAll.
	HashTypes HashTypes

	// Spin is how long a shard without work looks for more before it blocks at
	// most, up to 1 s. It does so only while work comes that soon; then more costs
	// CPU time and shortens latency. Default 100 µs; negative: block at once.
	Spin time.Duration

	// Backlog is how many connections per listener and flow group may wait for
	// the application. Default 1024.
	Backlog int
	// MaxConns is how many connections may exist, spread evenly over the flow
	// groups; a shard resets and counts what is more than its groups' part.
	// Default 1,048,576.
	MaxConns int
	// CongestionControl is that of all TCP connections. Default CongestionReno.
	CongestionControl CongestionControl
	// SendBuffer is how many bytes a TCP connection takes from Write before the
	// peer has acknowledged them, and ReceiveBuffer how many it holds, overhead
	// included, before the application has read them; both 4 KiB to 1 GiB.
	// With a peer farther away than 2 ms they grow, to 4 MiB unless they are
	// larger. Those to nearer peers share what the caches hold: send buffers that
	// are full 32 MiB per shard, but at least 128 KiB each; and receive buffers begin
	// with 256 KiB and grow to a part of ReceiveBuffer, by the number of streams that
	// come in at once. Default 768 KiB and 2 MiB. A connection that is not read holds
	// as much; its large frames stay in the shard's RxBuffers, and when these are all
	// held, others are copied.
	SendBuffer, ReceiveBuffer int
	// RxBuffers is how many receive buffers of 64 KiB a shard makes at most.
	// They are made when needed; without a free one, payload is copied, and
	// counted. Default 512.
	RxBuffers int
	// HandlerLimit is how long a handler may hold its shard before the watchdog
	// logs where it is, once per place. Default 10 ms; negative: no watchdog.
	HandlerLimit time.Duration
	// OffloadThreads is how many functions run at once per NUMA node, those that
	// handlers of Serve offload and those of NodePool together, at most 1024.
	// Default: the number of the node's CPUs that the process may use, at least 2.
	OffloadThreads int
	// NodeScratch is the size in bytes of the scratch memory that a function in a
	// NodePool finds, at most 1 GiB. Default 256 KiB.
	NodeScratch int
	// Drain is how long Close lets connections send what was written. Default
	// 500 ms; negative: do not wait.
	Drain time.Duration

	// Logger gets what happens to the stack as a whole; frames and connections
	// are only counted. Default: slog.Default().
	Logger *slog.Logger
}

// withDefaults returns cfg with its zero fields filled in, or says which field
// is wrong and what it accepts.
func (cfg Config) withDefaults() (Config, error) {
	setDefault(&cfg.Device, DefaultDevice)
	setDefault(&cfg.MTU, DefaultMTU)
	setDefault(&cfg.Spin, DefaultSpin)
	setDefault(&cfg.Backlog, DefaultBacklog)
	setDefault(&cfg.HashTypes, HashAll)
	setDefault(&cfg.MaxConns, DefaultMaxConns)
	setDefault(&cfg.RxBuffers, DefaultRxBuffers)
	setDefault(&cfg.Drain, DefaultDrain)
	setDefault(&cfg.HandlerLimit, DefaultHandlerLimit)
	setDefault(&cfg.SendBuffer, DefaultSendBuffer)
	setDefault(&cfg.ReceiveBuffer, DefaultReceiveBuffer)
	cfg.Spin = max(cfg.Spin, 0)
	cfg.Drain = max(cfg.Drain, 0)
	cfg.HandlerLimit = max(cfg.HandlerLimit, 0)
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Shards == 0 {
		cfg.Shards = min(max(runtime.NumCPU()-1, 1), maxShards)
	}
	setDefault(&cfg.Groups, min(max(defaultGroups, groupsPerShard*cfg.Shards), maxGroups))
	if err := cfg.validate(); err != nil {
		return cfg, err
	}
	return cfg, nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// badField says that a field has a value that it does not accept.
func badField(field string, value any, want string) error {
	return fmt.Errorf("%s: %v, want %s", field, value, want)
}

func (cfg *Config) validate() error {
	inRange := func(name string, value, low, high int) error {
		if value < low || value > high {
			return badField(name, value, fmt.Sprintf("%d to %d", low, high))
		}
		return nil
	}
	lowMTU := minMTU
	for _, p := range cfg.Addrs {
		if p.Addr().Is6() {
			lowMTU = minMTUIPv6 // RFC 8200 section 5
		}
	}
	for _, err := range []error{
		inRange("Shards", cfg.Shards, 1, maxShards),
		inRange("Groups", cfg.Groups, max(cfg.Shards, 1), maxGroups),
		inRange("MTU", cfg.MTU, lowMTU, maxMTU),
		inRange("Backlog", cfg.Backlog, 1, 1<<16-1),
		inRange("MaxConns", cfg.MaxConns, 1, 1<<30),
		inRange("SendBuffer", cfg.SendBuffer, minBuffer, maxBuffer),
		inRange("ReceiveBuffer", cfg.ReceiveBuffer, minBuffer, maxBuffer),
		inRange("OffloadThreads", cfg.OffloadThreads, 0, 1024),
		inRange("NodeScratch", cfg.NodeScratch, 0, maxBuffer),
		inRange("RxBuffers", cfg.RxBuffers, 1, 1<<20),
	} {
		if err != nil {
			return err
		}
	}
	switch {
	case cfg.Spin > maxSpin:
		return badField("Spin", cfg.Spin, "at most "+maxSpin.String())
	case cfg.HashKey != nil && cfg.HashKey.Check() != nil:
		return fmt.Errorf("HashKey: %w", cfg.HashKey.Check())
	case cfg.HashKey != nil && cfg.SymmetricHash:
		return badField("SymmetricHash", cfg.SymmetricHash, "false with a HashKey, which is symmetric or not by itself")
	case cfg.HashTypes&^HashAll != 0:
		return badField("HashTypes", uint8(cfg.HashTypes), "a set of "+HashAll.String())
	case cfg.Rebalance < RebalanceAuto || cfg.Rebalance > RebalanceConserve:
		return badField("Rebalance", cfg.Rebalance, fmt.Sprintf("one of %q", rebalanceNames))
	case cfg.Steering < SteeringAuto || cfg.Steering > SteeringUser:
		return badField("Steering", cfg.Steering, fmt.Sprintf("one of %q", steeringNames))
	case cfg.Offload < OffloadAuto || cfg.Offload > OffloadOff:
		return badField("Offload", cfg.Offload, fmt.Sprintf("one of %q", offloadNames))
	case cfg.CongestionControl < CongestionReno || cfg.CongestionControl > CongestionCubic:
		return badField("CongestionControl", cfg.CongestionControl, fmt.Sprintf("one of %q", congestionNames))
	}
	return cfg.validateAddrs()
}

func (cfg *Config) validateAddrs() error {
	if len(cfg.Addrs) == 0 {
		return badField("Addrs", "empty", "at least one address such as 10.99.0.2/24")
	}
	seen := make(map[netip.Addr]string)
	check := func(field string, prefixes []netip.Prefix) error {
		for _, p := range prefixes {
			a := p.Addr()
			switch {
			case !p.IsValid():
				return badField(field, "not valid", "addresses such as 10.99.0.2/24")
			case a.Is4In6(), a.Zone() != "":
				return badField(field, p, "plain IPv4 or IPv6 addresses")
			case a.IsUnspecified(), a.IsMulticast(), a.IsLoopback():
				return badField(field, p, "the unicast address of a host")
			case a.Is4() && p.Bits() < 31 && (a == p.Masked().Addr() || a == broadcast(p)):
				return badField(field, p, "an address other than the subnet's first and last")
			}
			if other, ok := seen[a]; ok {
				return badField(field, a, "an address that is not in "+other+" already")
			}
			seen[a] = field
		}
		return nil
	}
	if err := check("Addrs", cfg.Addrs); err != nil {
		return err
	}
	if err := check("HostAddrs", cfg.HostAddrs); err != nil {
		return err
	}
	families := make(map[bool]netip.Addr)
	for _, gw := range cfg.Gateways {
		if !slices.ContainsFunc(cfg.Addrs, func(p netip.Prefix) bool { return p.Contains(gw) }) {
			return badField("Gateways", gw, fmt.Sprintf("an address in a subnet of Addrs %v", cfg.Addrs))
		}
		if other, ok := families[gw.Is4()]; ok {
			return badField("Gateways", fmt.Sprintf("%v and %v", other, gw), "one per address family")
		}
		families[gw.Is4()] = gw
	}
	return nil
}

// broadcast returns the last address of an IPv4 subnet.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}
