package dispatch

import (
	"encoding/binary"
	"math/bits"
)

const (
	// maxInput is the longest hash input in bytes: two IPv6 addresses and two
	// ports.
	maxInput = 36

	// Where the ports follow the addresses in the hash input, in bytes.
	portsAt4 = 8
	portsAt6 = 32
)

// Toeplitz computes the RSS hash by table: one look-up per input byte instead
// of one test per bit. It also holds the hash types, so that all who steer by it
// agree: [Toeplitz.Parse], [Toeplitz.HashTuple], [Fragments] and [Program]. It
// is immutable after [NewToeplitz] and may be used by any number of goroutines.
//
// The tables are 36 KiB, of which IPv4 touches the first 12.
type Toeplitz struct {
	types  HashTypes
	tables [maxInput][256]uint32
}

// NewToeplitz expands a key into tables, for all hash types. It does not check
// the key.
func NewToeplitz(k Key) *Toeplitz { return NewToeplitzTypes(k, HashAll) }

// NewToeplitzTypes is [NewToeplitz] for some hash types.
func NewToeplitzTypes(k Key, types HashTypes) *Toeplitz {
	t := &Toeplitz{types: types}
	for i := range t.tables {
		for v := 1; v < 256; v++ {
			lowest := bits.TrailingZeros8(uint8(v))
			t.tables[i][v] = t.tables[i][v&(v-1)] ^ k.window(i*8+7-lowest)
		}
	}
	return t
}

// Types returns the hash types.
func (t *Toeplitz) Types() HashTypes { return t.types }

// Hash returns the RSS hash of b: addresses and ports in network order, source
// first. It looks at no hash type and panics if b is longer than 36 bytes.
func (t *Toeplitz) Hash(b []byte) uint32 {
	// By words: four look-ups at a time do not wait for each other's sum.
	tables := t.tables[:len(b)]
	var h uint32
	for len(b) >= 4 && len(tables) >= 4 {
		h ^= tables[0][b[0]] ^ tables[1][b[1]] ^ tables[2][b[2]] ^ tables[3][b[3]]
		b, tables = b[4:], tables[4:]
	}
	for i, v := range b {
		h ^= tables[i][v]
	}
	return h
}

// word returns what the four input bytes from at on add to the hash. With a
// constant at it is inlined without bounds checks.
func (t *Toeplitz) word(at int, w uint32) uint32 {
	return t.tables[at][byte(w>>24)] ^ t.tables[at+1][byte(w>>16)] ^
		t.tables[at+2][byte(w>>8)] ^ t.tables[at+3][byte(w)]
}

// addrs4 hashes an IPv4 2-tuple.
func (t *Toeplitz) addrs4(src, dst *[4]byte) uint32 {
	return t.word(0, binary.BigEndian.Uint32(src[:])) ^ t.word(4, binary.BigEndian.Uint32(dst[:]))
}

// addrs6 hashes an IPv6 2-tuple.
func (t *Toeplitz) addrs6(src, dst *[16]byte) uint32 {
	return t.word(0, binary.BigEndian.Uint32(src[0:])) ^
		t.word(4, binary.BigEndian.Uint32(src[4:])) ^
		t.word(8, binary.BigEndian.Uint32(src[8:])) ^
		t.word(12, binary.BigEndian.Uint32(src[12:])) ^
		t.word(16, binary.BigEndian.Uint32(dst[0:])) ^
		t.word(20, binary.BigEndian.Uint32(dst[4:])) ^
		t.word(24, binary.BigEndian.Uint32(dst[8:])) ^
		t.word(28, binary.BigEndian.Uint32(dst[12:]))
}

// byAddrs returns the hash of packets hashed by their addresses alone.
func (t *Toeplitz) byAddrs(ipv6 bool, addrs uint32) uint32 {
	if t.types&hashType(ipv6, 0) == 0 {
		return 0
	}
	return addrs
}

// byFlow returns the hash of packets with ports.
func (t *Toeplitz) byFlow(ipv6 bool, proto uint8, addrs, ports uint32) uint32 {
	if !t.types.usePorts(ipv6, proto) {
		return t.byAddrs(ipv6, addrs)
	}
	return addrs ^ t.ports(ipv6, ports)
}

// ports returns what source and destination port, as the halves of one word,
// add to the hash of the addresses.
func (t *Toeplitz) ports(ipv6 bool, ports uint32) uint32 {
	if ipv6 {
		return t.word(portsAt6, ports)
	}
	return t.word(portsAt4, ports)
}
