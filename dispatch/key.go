package dispatch

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
)

const (
	// keyLen is the length in bytes of an RSS hash key: the longest input plus
	// the 32 bits of the last window.
	keyLen = 40

	// maxKeyDraws bounds the search of NewKey. About one key in 1,600 passes, so
	// this many failures mean a broken random source, not bad luck.
	maxKeyDraws = 100_000

	// Of how many consecutive values each bucket must get one, as a power of
	// two: from the keys that we draw, and from those that we are given.
	drawnRunBits = 7
	givenRunBits = 8
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

// NewKey draws a random key that spreads evenly: any 128 consecutive ports or
// addresses, counted from a multiple of 128, fall into the 128 buckets, one
// each. This is twice as strict as [Key.Check]. It fails only if the random
// source does.
func NewKey() (Key, error) { return drawKey(rand.Reader, keyLen) }

// NewSymmetricKey draws a random key with which both directions of a flow have
// the same hash: 16 bits, repeated (Woo and Park, "Scalable TCP Session
// Monitoring with Symmetric Receive-side Scaling", 2012, who use 6d5a). This
// serves who sees both directions, such as a proxy or a monitor.
//
// It is a weak key. Only 21,844 patterns spread as evenly as NewKey asks, which
// makes 14.4 bits of entropy against 309 of NewKey: an attacker who can tell
// that two flows share a shard finds the pattern with a few dozen of them. And
// the hash depends on nothing but the exclusive or of the tuple's 16-bit words.
func NewSymmetricKey() (Key, error) { return drawKey(rand.Reader, 2) }

// drawKey draws n bytes at a time and repeats them.
func drawKey(random io.Reader, n int) (k Key, err error) {
	for range maxKeyDraws {
		if _, err := io.ReadFull(random, k[:n]); err != nil {
			return Key{}, fmt.Errorf("draw hash key: %w", err)
		}
		for i := n; i < keyLen; i++ {
			k[i] = k[i-n]
		}
		if k.check(drawnRunBits) == nil {
			return k, nil
		}
	}
	return Key{}, fmt.Errorf("draw hash key: none of %d keys spreads over all buckets, want about one in 1,600: the random source is broken", maxKeyDraws)
}

// CheckKey returns b as a key, or an error that says what is wrong with it: its
// length is not 40 bytes, or [Key.Check] refuses it.
func CheckKey(b []byte) (Key, error) {
	if len(b) != keyLen {
		return Key{}, fmt.Errorf("hash key: %d bytes, want %d", len(b), keyLen)
	}
	k := Key(b)
	return k, k.Check()
}

// Check returns an error unless 256 consecutive ports or addresses, counted
// from a multiple of 256, reach all buckets, whatever the rest of the tuple is.
// It asks this of source and destination, of IPv4 and IPv6, and for ports in
// steps of one and of two: Linux gives outgoing connections ports of one parity
// (__inet_hash_connect in net/ipv4/inet_hashtables.c).
//
// With a key that fails, the flows of one client or one network gather in half
// of the buckets or less. Fifteen of sixteen random keys fail; the verification
// key passes.
func (k Key) Check() error { return k.check(givenRunBits) }

func (k Key) check(runBits int) error {
	if k == (Key{}) {
		return errors.New("hash key: all bytes are 0, so all frames would go to bucket 0; want random bytes as from NewKey")
	}
	for _, run := range [...]struct {
		name string
		last int // the lowest bit of the number that counts up
		step int
	}{
		{"IPv4 source addresses", 31, 1},
		{"IPv4 destination addresses", 63, 1},
		{"IPv4 source ports", 79, 1},
		{"IPv4 source ports", 79, 2},
		{"IPv4 destination ports", 95, 1},
		{"IPv4 destination ports", 95, 2},
		{"IPv6 source addresses", 127, 1},
		{"IPv6 destination addresses", 255, 1},
		{"IPv6 source ports", 271, 1},
		{"IPv6 source ports", 271, 2},
		{"IPv6 destination ports", 287, 1},
		{"IPv6 destination ports", 287, 2},
	} {
		if n := k.reached(run.last+1-run.step, runBits); n != Buckets {
			return fmt.Errorf("hash key: %d %s in steps of %d reach %d of %d buckets, want all; draw one with NewKey",
				1<<runBits, run.name, run.step, n, Buckets)
		}
	}
	return nil
}

// reached returns how many buckets the 2^n values reach that n bits of the
// input take, the lowest of which is bit last of the input. The hash is linear,
// so these are two to the rank of what the bits add to the bucket, and the rest
// of the input only permutes the buckets.
func (k *Key) reached(last, n int) int {
	var basis [32]uint32 // by highest bit
	reached := 1
	for bit := last; bit > last-n; bit-- {
		v := k.window(bit) % Buckets
		for v != 0 {
			highest := bits.Len32(v) - 1
			if basis[highest] == 0 {
				basis[highest] = v
				reached *= 2
				break
			}
			v ^= basis[highest]
		}
	}
	return reached
}

// window returns the 32 bits of the key that start at the given bit: what one
// set input bit at this place adds to the hash.
func (k *Key) window(bit int) uint32 {
	b := k[bit/8:]
	forty := uint64(binary.BigEndian.Uint32(b))<<8 | uint64(b[4])
	return uint32(forty >> (8 - bit%8))
}
