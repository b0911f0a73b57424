package dispatch

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

func randomKey(t *testing.T) Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// symmetricKey repeats a pattern of 16 bits.
func symmetricKey(pattern uint16) (k Key) {
	for i := range k {
		k[i] = byte(pattern >> (8 * (1 - i%2)))
	}
	return k
}

// spread counts what falls into each bucket of n consecutive source ports,
// destination ports, source addresses and destination addresses, in this order.
func spread(k Key, v6 bool, n, step int) (counts [4][Buckets]int) {
	toeplitz := NewToeplitz(k)
	addrs := [2]netip.Addr{peer4, us4}
	if v6 {
		addrs = [2]netip.Addr{peer6, us6}
	}
	// count returns addrs[at] with i in its low bits.
	count := func(at, i int) netip.Addr {
		b := addrs[at].AsSlice()
		b[len(b)-1], b[len(b)-2] = byte(i), byte(i>>8)
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	const first = 3 << 12
	for i := range n {
		port, i := uint16(first+i*step), i*step
		for what, flow := range [4]Tuple{
			{addrs[0], addrs[1], port, 443, 0},
			{addrs[0], addrs[1], 443, port, 0},
			{count(0, i), addrs[1], 1, 2, 0},
			{addrs[0], count(1, i), 1, 2, 0},
		} {
			counts[what][toeplitz.HashTuple(flow)%Buckets]++
		}
	}
	return counts
}

// checkByCounting is Key.Check by trying it out.
func checkByCounting(k Key, n int) bool {
	for _, v6 := range []bool{false, true} {
		for step := 1; step <= 2; step++ {
			counts := spread(k, v6, n, step)
			for what := range counts {
				for _, c := range counts[what] {
					if c == 0 && (what < 2 || step == 1) { // addresses count by one
						return false
					}
				}
			}
		}
	}
	return true
}

func TestNewKey(t *testing.T) {
	for name, draw := range map[string]func() (Key, error){"random": NewKey, "symmetric": NewSymmetricKey} {
		seen := map[Key]bool{}
		for range 20 { // so that none passes by luck
			k, err := draw()
			if err != nil {
				t.Fatal(err)
			}
			seen[k] = true
			if !checkByCounting(k, Buckets) {
				t.Fatalf("%s key: 128 consecutive values miss a bucket, key %x", name, k)
			}
			if err := k.Check(); err != nil {
				t.Errorf("%s key: %v, key %x", name, err, k)
			}
		}
		if len(seen) < 15 {
			t.Errorf("%s: only %d different keys of 20", name, len(seen))
		}
	}
}

func TestNewSymmetricKey(t *testing.T) {
	k, err := NewSymmetricKey()
	if err != nil {
		t.Fatal(err)
	}
	toeplitz := NewToeplitz(k)
	for _, v := range vectors {
		there := Tuple{v.src.Addr(), v.dst.Addr(), v.src.Port(), v.dst.Port(), 0}
		back := Tuple{v.dst.Addr(), v.src.Addr(), v.dst.Port(), v.src.Port(), 0}
		if a, b := toeplitz.HashTuple(there), toeplitz.HashTuple(back); a != b {
			t.Errorf("%s: %08x there, %08x back", v.src, a, b)
		}
	}
	var passes int // the entropy that the documentation claims
	for pattern := range 1 << 16 {
		if symmetricKey(uint16(pattern)).check(drawnRunBits) == nil {
			passes++
		}
	}
	if passes != 21844 {
		t.Errorf("%d patterns pass, want 21844", passes)
	}
}

func TestCheckKey(t *testing.T) {
	good := randomKey(t)
	spoiled := good
	clear(spoiled[38:]) // these decide the bucket for the IPv6 destination port alone
	for _, c := range []struct {
		name string
		b    []byte
		want string // what the error says, empty: none
	}{
		{"drawn", good[:], ""},
		{"verification key", VerificationKey[:], ""},
		{"symmetric", bytes.Repeat([]byte{0x6d, 0x5a}, 20), ""},
		{"empty", nil, "0 bytes, want 40"},
		{"short", good[:39], "39 bytes, want 40"},
		{"long", append(good[:], 1), "41 bytes, want 40"},
		{"zero", make([]byte, 40), "all bytes are 0"},
		{"ones", bytes.Repeat([]byte{0xff}, 40), "IPv4 source addresses in steps of 1 reach 2 of 128"},
		{"without its last bytes", spoiled[:], "IPv6 destination ports"},
	} {
		k, err := CheckKey(c.b)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
		if err == nil && !bytes.Equal(k[:], c.b) {
			t.Errorf("%s: key %x, want %x", c.name, k, c.b)
		}
	}
}

func TestCheckMatchesCounting(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{7})
	passed := 0
	for range 600 {
		var k Key
		if _, err := rng.Read(k[:]); err != nil {
			t.Fatal(err)
		}
		got, want := k.Check() == nil, checkByCounting(k, 2*Buckets)
		if got != want {
			t.Fatalf("Check passes: %t, want %t, key %x", got, want, k)
		}
		if got {
			passed++
		}
	}
	if passed < 10 || passed > 100 {
		t.Errorf("%d of 600 random keys pass, want about one in sixteen", passed)
	}
}

func TestDrawKey(t *testing.T) {
	// The first key is useless and has to be drawn again.
	good := randomKey(t)
	got, err := drawKey(bytes.NewReader(append(make([]byte, keyLen), good[:]...)), keyLen)
	if err != nil || got != good {
		t.Errorf("drawKey = %x, %v, want the second key %x", got, err, good)
	}
	if _, err := drawKey(zeros{}, keyLen); err == nil {
		t.Error("drawKey accepted a source of zeros")
	}
	if _, err := drawKey(bytes.NewReader(nil), keyLen); !errors.Is(err, io.EOF) {
		t.Errorf("drawKey from an empty source: error %v, want the reader's", err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func BenchmarkNewKey(b *testing.B) {
	for b.Loop() {
		if _, err := NewKey(); err != nil {
			b.Fatal(err)
		}
	}
}
