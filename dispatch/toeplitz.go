package dispatch

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

const (
	// keyLen is the length in bytes of an RSS hash key: the longest input plus
	// the 32 bits of the last window.
	keyLen = 40

	// maxInput is the longest hash input in bytes: two IPv6 addresses and two
	// ports.
	maxInput = 36

	// Where the ports follow the addresses in the hash input, in bytes.
	portsAt4 = 8
	portsAt6 = 32

	// maxKeyDraws bounds the search of NewKey. About one key in 85 passes, so
	// this many failures mean a broken random source, not bad luck.
	maxKeyDraws = 100_000
)

// Key is the hash key of receive-side scaling, most significant bit first.
//
// The Toeplitz hash is linear: whoever knows the key can choose tuples that
// share a bucket and so load one shard alone. Draw a key with [NewKey] at every
// start and keep it out of logs.
type Key [keyLen]byte

// VerificationKey is the key of Microsoft's RSS verification suite. It is
// public: use it to check a hash, never to steer.
var VerificationKey = Key{
	0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2,
	0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
	0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4,
	0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
	0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
}

// NewKey draws a random key for which [Key.ReachesAllBuckets] holds. It fails
// only if the random source does.
func NewKey() (Key, error) { return drawKey(rand.Reader) }

func drawKey(random io.Reader) (Key, error) {
	var k Key
	for range maxKeyDraws {
		if _, err := io.ReadFull(random, k[:]); err != nil {
			return Key{}, fmt.Errorf("draw hash key: %w", err)
		}
		if k.ReachesAllBuckets() {
			return k, nil
		}
	}
	return Key{}, fmt.Errorf("draw hash key: none of %d keys reaches every bucket, want about one in 85: the random source is broken", maxKeyDraws)
}

// ReachesAllBuckets reports whether [Buckets] consecutive ports, counted from a
// multiple of their number, fall into all buckets, one each, whatever the rest
// of the tuple is. It asks this of the source and the destination port, of
// IPv4 and IPv6, and of steps of one and of two: Linux gives outgoing
// connections ports of one parity (__inet_hash_connect in
// net/ipv4/inet_hashtables.c).
//
// Half of all random keys fail each single one of these questions, and the
// flows of a client then gather in a part of the shards.
func (k Key) ReachesAllBuckets() bool {
	for _, at := range [...]int{portsAt4, portsAt4 + 2, portsAt6, portsAt6 + 2} {
		for _, step := range [...]int{1, 2} {
			if !k.portsReachAllBuckets(at, step) {
				return false
			}
		}
	}
	return true
}

// portsReachAllBuckets looks at the port that starts at byte at of the input.
// The rest of the tuple adds a constant to the hash, by exclusive or, which
// permutes the buckets; so one choice of the rest stands for all.
func (k Key) portsReachAllBuckets(at, step int) bool {
	var seen [Buckets]bool
	for i := range Buckets {
		var h uint32
		for port := uint16(i * step); port != 0; port &= port - 1 {
			h ^= k.window(at*8 + 15 - bits.TrailingZeros16(port))
		}
		bucket := h % Buckets
		if seen[bucket] {
			return false
		}
		seen[bucket] = true
	}
	return true
}

// window returns the 32 bits of the key that start at the given bit: what one
// set input bit at this place adds to the hash.
func (k *Key) window(bit int) uint32 {
	b := k[bit/8:]
	forty := uint64(binary.BigEndian.Uint32(b))<<8 | uint64(b[4])
	return uint32(forty >> (8 - bit%8))
}

// Toeplitz computes the RSS hash by table: one look-up per input byte instead
// of one test per bit. It is immutable after [NewToeplitz] and may be used by
// any number of goroutines.
//
// The tables are 36 KiB, of which IPv4 touches the first 12.
type Toeplitz struct {
	tables [maxInput][256]uint32
}

// NewToeplitz expands a key into tables.
func NewToeplitz(k Key) *Toeplitz {
	t := new(Toeplitz)
	for i := range t.tables {
		for v := 1; v < 256; v++ {
			lowest := bits.TrailingZeros8(uint8(v))
			t.tables[i][v] = t.tables[i][v&(v-1)] ^ k.window(i*8+7-lowest)
		}
	}
	return t
}

// Hash returns the RSS hash of b: addresses and ports in network order, source
// first. It panics if b is longer than 36 bytes.
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

// ports returns what source and destination port, as the halves of one word,
// add to the hash of the addresses.
func (t *Toeplitz) ports(ipv6 bool, ports uint32) uint32 {
	if ipv6 {
		return t.word(portsAt6, ports)
	}
	return t.word(portsAt4, ports)
}
