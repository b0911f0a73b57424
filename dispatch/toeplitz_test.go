package dispatch

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// vector is a case of Microsoft's RSS verification suite.
type vector struct {
	src, dst             netip.AddrPort
	addrsOnly, withPorts uint32
}

var vectors = []vector{
	{netip.MustParseAddrPort("66.9.149.187:2794"), netip.MustParseAddrPort("161.142.100.80:1766"), 0x323e8fc2, 0x51ccc178},
	{netip.MustParseAddrPort("199.92.111.2:14230"), netip.MustParseAddrPort("65.69.140.83:4739"), 0xd718262a, 0xc626b0ea},
	{netip.MustParseAddrPort("24.19.198.95:12898"), netip.MustParseAddrPort("12.22.207.184:38024"), 0xd2d0a5de, 0x5c2b394a},
	{netip.MustParseAddrPort("38.27.205.30:48228"), netip.MustParseAddrPort("209.142.163.6:2217"), 0x82989176, 0xafc7327f},
	{netip.MustParseAddrPort("153.39.163.191:44251"), netip.MustParseAddrPort("202.188.127.2:1303"), 0x5d1809c5, 0x10e828a2},
	{netip.MustParseAddrPort("[3ffe:2501:200:1fff::7]:2794"), netip.MustParseAddrPort("[3ffe:2501:200:3::1]:1766"), 0x2cc18cd5, 0x40207d3d},
	{netip.MustParseAddrPort("[3ffe:501:8::260:97ff:fe40:efab]:14230"), netip.MustParseAddrPort("[ff02::1]:4739"), 0x0f0c461c, 0xdde51bbf},
	{netip.MustParseAddrPort("[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251"), netip.MustParseAddrPort("[fe80::200:f8ff:fe21:67cf]:38024"), 0x4b61e985, 0x02d1feef},
}

// input is the vector as the hash sees it.
func (v vector) input(ports bool) []byte {
	b := append(v.src.Addr().AsSlice(), v.dst.Addr().AsSlice()...)
	if ports {
		b = binary.BigEndian.AppendUint16(b, v.src.Port())
		b = binary.BigEndian.AppendUint16(b, v.dst.Port())
	}
	return b
}

// frame is a TCP frame of the vector's flow, or one of a protocol without ports.
func (v vector) frame(tb testing.TB, ports bool) []byte {
	tb.Helper()
	tcp := &layers.TCP{SrcPort: layers.TCPPort(v.src.Port()), DstPort: layers.TCPPort(v.dst.Port()), SYN: true, Window: 1000}
	proto, rest := layers.IPProtocolTCP, []gopacket.SerializableLayer{tcp, gopacket.Payload("hello")}
	if !ports {
		proto, rest = layers.IPProtocol(253), rest[1:] // for experiments, RFC 3692
	}
	return serialize(tb, ipLayer(v.src.Addr(), v.dst.Addr(), proto), rest...)
}

func TestVectors(t *testing.T) {
	toeplitz := NewToeplitz(VerificationKey)
	for _, v := range vectors {
		for _, ports := range []bool{false, true} {
			want := v.addrsOnly
			if ports {
				want = v.withPorts
			}
			t.Run(fmt.Sprintf("%s/ports=%t", v.src, ports), func(t *testing.T) {
				if got := toeplitz.Hash(v.input(ports)); got != want {
					t.Errorf("Hash %08x, want %08x", got, want)
				}
				if got := VerificationKey.hashBits(v.input(ports)); got != want {
					t.Errorf("model %08x, want %08x", got, want)
				}
				var p Parsed
				toeplitz.Parse(v.frame(t, ports), &p)
				if p.Hash != want || p.Class != ClassFlow {
					t.Errorf("Parse %08x, class %s, want %08x, class flow", p.Hash, p.Class, want)
				}
				got := toeplitz.HashAddrs(v.src.Addr(), v.dst.Addr())
				if ports {
					got = toeplitz.HashTuple(Tuple{v.src.Addr(), v.dst.Addr(), v.src.Port(), v.dst.Port(), 0})
				}
				if got != want {
					t.Errorf("by netip.Addr %08x, want %08x", got, want)
				}
			})
		}
	}
}

func TestHashMatchesModel(t *testing.T) {
	k := randomKey(t)
	toeplitz := NewToeplitz(k)
	var b [maxInput]byte
	for n := range 3000 {
		length := n % (maxInput + 1)
		if _, err := rand.Read(b[:]); err != nil {
			t.Fatal(err)
		}
		if got, want := toeplitz.Hash(b[:length]), k.hashBits(b[:length]); got != want {
			t.Fatalf("Hash(%x) = %08x, want %08x, key %x", b[:length], got, want, k)
		}
	}
}

func TestHashTooLong(t *testing.T) {
	toeplitz := NewToeplitz(VerificationKey)
	defer func() {
		if recover() == nil {
			t.Error("no panic on 37 bytes")
		}
	}()
	toeplitz.Hash(make([]byte, maxInput+1))
}

func TestHashTupleFamilies(t *testing.T) {
	toeplitz := NewToeplitz(VerificationKey)
	v := vectors[0]
	mapped := netip.AddrFrom16(v.src.Addr().As16())
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		want     uint32
	}{
		{"IPv4-mapped counts as IPv4", mapped, v.dst.Addr(), v.withPorts},
		{"two families", netip.MustParseAddr("::1"), v.dst.Addr(), 0},
		{"no source", netip.Addr{}, v.dst.Addr(), 0},
		{"no destination", v.src.Addr(), netip.Addr{}, 0},
	} {
		if got := toeplitz.HashTuple(Tuple{c.src, c.dst, v.src.Port(), v.dst.Port(), 0}); got != c.want {
			t.Errorf("%s: %08x, want %08x", c.name, got, c.want)
		}
	}
	zoned := vectors[7]
	if got := toeplitz.HashTuple(Tuple{zoned.src.Addr(), zoned.dst.Addr().WithZone("tap0"), zoned.src.Port(), zoned.dst.Port(), 0}); got != zoned.withPorts {
		t.Errorf("with a zone: %08x, want %08x", got, zoned.withPorts)
	}
}

func TestHashAllocs(t *testing.T) {
	toeplitz := NewToeplitz(VerificationKey)
	b := make([]byte, maxInput)
	flow := Tuple{vectors[7].src.Addr(), vectors[7].dst.Addr(), 1, 2, 0}
	var sum uint32
	if n := testing.AllocsPerRun(100, func() { sum += toeplitz.Hash(b) + toeplitz.HashTuple(flow) }); n != 0 {
		t.Errorf("%v allocations per run, want 0", n)
	}
}

func BenchmarkHash(b *testing.B) {
	toeplitz := NewToeplitz(VerificationKey)
	for _, n := range []int{12, 36} {
		b.Run(fmt.Sprintf("size=%d", n), func(b *testing.B) {
			in := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			var sum uint32
			for b.Loop() {
				in[n-1]++ // another port each time
				sum += toeplitz.Hash(in)
			}
		})
	}
}
