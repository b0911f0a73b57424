package stack

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestConfigDefaults(t *testing.T) {
	cfg, err := Config{Addrs: prefixes("10.0.0.2/24"), Shards: 2}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Device != DefaultDevice || cfg.MTU != DefaultMTU || cfg.Spin != DefaultSpin || cfg.Groups != 32 {
		t.Errorf("defaults are %+v", cfg)
	}
	if plan, err := Plan(cfg); err != nil || len(plan.Shards) != 2 {
		t.Errorf("plan of two shards: %v, %v", plan, err)
	}
	for shards, groups := range map[int]int{1: 32, 8: 32, 9: 36, 32: 128, 40: 128, 128: 128} {
		cfg, err := Config{Addrs: prefixes("10.0.0.2/24"), Shards: shards}.withDefaults()
		if err != nil || cfg.Groups != groups {
			t.Errorf("%d shards have %d groups, %v; want %d", shards, cfg.Groups, err, groups)
		}
	}
	if cfg, err := (Config{Addrs: prefixes("10.0.0.2/24"), Spin: -1}).withDefaults(); err != nil || cfg.Spin != 0 {
		t.Errorf("negative Spin became %v, %v; want 0", cfg.Spin, err)
	}
}

// Every error names the field and says what it accepts.
func TestConfigErrors(t *testing.T) {
	valid := Config{Addrs: prefixes("10.0.0.2/24", "fd00::2/64"), HostAddrs: prefixes("10.0.0.1/24")}
	if _, err := valid.withDefaults(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		field string
		want  string
		spoil func(*Config)
	}{
		{"Shards", "1 to 128", func(c *Config) { c.Shards = -1 }},
		{"Shards", "1 to 128", func(c *Config) { c.Shards = 129 }},
		{"Groups", "4 to 128", func(c *Config) { c.Shards, c.Groups = 4, 3 }},
		{"Groups", "4 to 128", func(c *Config) { c.Shards, c.Groups = 4, 129 }},
		{"MTU", "1280 to 65521", func(c *Config) { c.MTU = 1279 }},
		{"MTU", "576 to 65521", func(c *Config) { c.Addrs, c.MTU = prefixes("10.0.0.2/24"), 575 }},
		{"MTU", "1280 to 65521", func(c *Config) { c.MTU = 65522 }},
		{"Backlog", "1 to", func(c *Config) { c.Backlog = -1 }},
		{"MaxConns", "1 to", func(c *Config) { c.MaxConns = -1 }},
		{"OffloadThreads", "to 1024", func(c *Config) { c.OffloadThreads = -1 }},
		{"OffloadThreads", "to 1024", func(c *Config) { c.OffloadThreads = 1025 }},
		{"NodeScratch", "to 1073741824", func(c *Config) { c.NodeScratch = -1 }},
		{"RxBuffers", "1 to", func(c *Config) { c.RxBuffers = -1 }},
		{"CongestionControl", "cubic", func(c *Config) { c.CongestionControl = 2 }},
		{"SendBuffer", "4096 to", func(c *Config) { c.SendBuffer = 100 }},
		{"ReceiveBuffer", "4096 to", func(c *Config) { c.ReceiveBuffer = 100 }},
		{"Spin", "at most 1s", func(c *Config) { c.Spin = 2 * time.Second }},
		{"Steering", "kernel", func(c *Config) { c.Steering = 9 }},
		{"Offload", "off", func(c *Config) { c.Offload = 9 }},
		{"CPUs", "may use", func(c *Config) { c.CPUs = []int{0, 99999} }},
		{"Profile", "Closest", func(c *Config) { c.Profile = 77 }},
		{"BaseCPU, MaxCPU", "", func(c *Config) { c.BaseCPU = 99999 }},
		{"Nodes", "", func(c *Config) { c.Nodes = []int{77} }},
		{"Rebalance", "conserve", func(c *Config) { c.Rebalance = 9 }},
		{"HashTypes", "TCP_IPV4", func(c *Config) { c.HashTypes = 0x80 }},
		{"HashKey", "all bytes are 0", func(c *Config) { c.HashKey = new(HashKey) }},
		{"SymmetricHash", "false", func(c *Config) { c.HashKey, c.SymmetricHash = &VerificationKey, true }},
		{"Addrs", "at least one", func(c *Config) { c.Addrs = nil }},
		{"Addrs", "such as", func(c *Config) { c.Addrs = []netip.Prefix{{}} }},
		{"Addrs", "unicast", func(c *Config) { c.Addrs = prefixes("224.0.0.1/24") }},
		{"Addrs", "unicast", func(c *Config) { c.Addrs = prefixes("127.0.0.1/8") }},
		{"Addrs", "first and last", func(c *Config) { c.Addrs = prefixes("10.0.0.0/24") }},
		{"Addrs", "first and last", func(c *Config) { c.Addrs = prefixes("10.0.3.255/22") }},
		{"Addrs", "already", func(c *Config) { c.Addrs = prefixes("10.0.0.2/24", "10.0.0.2/16") }},
		{"HostAddrs", "Addrs already", func(c *Config) { c.HostAddrs = prefixes("10.0.0.2/24") }},
		{"Gateways", "subnet", func(c *Config) { c.Gateways = []netip.Addr{netip.MustParseAddr("192.0.2.1")} }},
		{"Gateways", "one per", func(c *Config) {
			c.Gateways = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.3")}
		}},
	} {
		cfg := valid
		test.spoil(&cfg)
		_, err := Plan(cfg)
		if err == nil || !strings.HasPrefix(err.Error(), "stack config: "+test.field+": ") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("error %v, want one that begins with %q and contains %q", err, test.field, test.want)
		}
	}
}

func TestPointToPointAddresses(t *testing.T) {
	cfg := Config{Addrs: prefixes("10.0.0.0/31"), HostAddrs: prefixes("10.0.0.1/31")} // RFC 3021
	if _, err := cfg.withDefaults(); err != nil {
		t.Error(err)
	}
}

func TestEnumText(t *testing.T) {
	for _, s := range []Steering{SteeringAuto, SteeringKernel, SteeringUser} {
		var back Steering
		b, err := s.MarshalText()
		if err != nil || back.UnmarshalText(b) != nil || back != s {
			t.Errorf("%v became %v by way of %q", s, back, b)
		}
	}
	for _, c := range []CongestionControl{CongestionReno, CongestionCubic} {
		var back CongestionControl
		b, err := c.MarshalText()
		if err != nil || back.UnmarshalText(b) != nil || back != c {
			t.Errorf("%v became %v by way of %q", c, back, b)
		}
	}
	var o OffloadMode
	if err := o.UnmarshalText([]byte("on")); err == nil || !strings.Contains(err.Error(), "auto") {
		t.Errorf("offload %q: error %v, want one that names what is accepted", "on", err)
	}
}
