package dispatch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// piece is a fragment to be made.
type piece struct {
	v6       bool
	proto    uint8
	id       uint32
	offset   int // in units of eight bytes
	more     bool
	chain    []byte // IPv6: extension headers behind the fragment header, ending in proto
	first    uint8  // IPv6: type of the first of these, if there are any
	payload  []byte
	peerPort uint16 // in the payload of the first one
}

const (
	firstLen = 16 // payload bytes of the first fragment, in which the ports are
	restLen  = 24 // of the others
)

// frame returns the fragment as it arrives.
func (f piece) frame() []byte {
	payload := slices.Clone(f.payload)
	if f.offset == 0 && len(payload) >= portsLen {
		binary.BigEndian.PutUint16(payload, f.peerPort)
		binary.BigEndian.PutUint16(payload[2:], ourPort)
	}
	if f.v6 {
		next := f.proto
		if f.chain != nil {
			next = f.first
		}
		fragment := fragmentHeader(next, uint16(f.offset), f.more)
		binary.BigEndian.PutUint32(fragment[4:], f.id)
		payload = slices.Concat(fragment, f.chain, payload)
		b := make([]byte, ipv6Len)
		b[0], b[6] = 0x60, protoFragment
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		copy(b[8:], peer6.AsSlice())
		copy(b[24:], us6.AsSlice())
		return ethernet(etherTypeIPv6, append(b, payload...))
	}
	b := make([]byte, ipv4Len)
	b[0], b[9] = 0x45, f.proto
	binary.BigEndian.PutUint16(b[2:], uint16(ipv4Len+len(payload)))
	binary.BigEndian.PutUint16(b[4:], uint16(f.id))
	field := uint16(f.offset)
	if f.more {
		field |= 0x2000
	}
	binary.BigEndian.PutUint16(b[6:], field)
	copy(b[12:], peer4.AsSlice())
	copy(b[16:], us4.AsSlice())
	return ethernet(etherTypeIPv4, append(b, payload...))
}

// The datagrams of the scripts in TestFragments. Each has four fragments, 0 to
// 3, all between the same two hosts of its family.
var scriptDatagrams = map[byte]piece{
	'A': {proto: protoUDP, id: 7, peerPort: 1000},
	'B': {proto: protoUDP, id: 8, peerPort: 2000},
	'C': {proto: protoTCP, id: 7, peerPort: 3000},
	'R': {proto: protoUDP, id: 7, peerPort: 4000}, // reuses the name of A
	'P': {proto: protoICMP, id: 7},
	'V': {v6: true, proto: protoUDP, id: 7, peerPort: 1000},
	'W': {v6: true, proto: protoUDP, id: 7 | 1<<16, peerPort: 2000},
	'X': {v6: true, proto: protoTCP, id: 9, peerPort: 3000, first: protoDestination, chain: extension(protoTCP, 1)},
	'Q': {v6: true, proto: protoICMPv6, id: 10},
}

// scriptFragment returns the fragment of a word such as A2. What follows the
// digit changes it: "'" moves it back by eight bytes, so that it overlaps; "-"
// takes all but three bytes of its payload away; "!" cuts it in its extension
// headers; "." pads the frame.
func scriptFragment(t *testing.T, word string) []byte {
	t.Helper()
	f, ok := scriptDatagrams[word[0]]
	if !ok || len(word) < 2 {
		t.Fatalf("no fragment is called %q", word)
	}
	n := int(word[1] - '0')
	f.more = n < 3
	f.payload = bytes.Repeat([]byte(word[:2]), firstLen/2)
	if n > 0 {
		f.offset = (firstLen + (n-1)*restLen + len(f.chain)) / 8
		f.payload = bytes.Repeat([]byte(word[:2]), restLen/2)
		if f.v6 {
			f.proto, f.chain = 59, nil // only the first fragment's word counts (RFC 8200)
		}
	}
	switch word[2:] {
	case "'":
		f.offset--
	case "-":
		f.payload = f.payload[:3]
	case "!":
		f.payload, f.chain = nil, f.chain[:8]
	case ".":
		return append(f.frame(), make([]byte, 10)...)
	}
	return f.frame()
}

func TestFragments(t *testing.T) {
	for _, c := range []struct {
		name, arrive string
		want         string // what goes on at each step, "-" for nothing
		counters     FragmentCounters
		types        HashTypes // 0: all
	}{
		{
			name: "in order", arrive: "A0 A1 A2 A3", want: "A0 | A1 | A2 | A3",
			counters: FragmentCounters{Passed: 4},
		},
		{
			name: "in order, IPv6", arrive: "V0 V1 V2 V3", want: "V0 | V1 | V2 | V3",
			counters: FragmentCounters{Passed: 4},
		},
		{
			name: "reversed", arrive: "A3 A2 A1 A0", want: "- | - | - | A3 A2 A1 A0",
			counters: FragmentCounters{Passed: 1, Held: 3, Released: 3},
		},
		{
			name: "reversed, IPv6", arrive: "X3 X2 X1 X0", want: "- | - | - | X3 X2 X1 X0",
			counters: FragmentCounters{Passed: 1, Held: 3, Released: 3},
		},
		{
			name: "first in the middle", arrive: "A2 A0 A3 A1", want: "- | A2 A0 | A3 | A1",
			counters: FragmentCounters{Passed: 3, Held: 1, Released: 1},
		},
		{
			name: "interleaved", arrive: "A1 B0 V1 A0 B1 W1 V0 A3 W0 B2", want: "- | B0 | - | A1 A0 | B1 | - | V1 V0 | A3 | W1 W0 | B2",
			counters: FragmentCounters{Passed: 7, Held: 3, Released: 3},
		},
		{
			name: "same ID, other protocol", arrive: "A1 C0 A0 C1", want: "- | C0 | A1 A0 | C1",
			counters: FragmentCounters{Passed: 3, Held: 1, Released: 1},
		},
		{
			name: "duplicates", arrive: "A1 A1 A0 A0 A1 A3 A3", want: "- | - | A1 A1 A0 | A0 | A1 | A3 | A3",
			counters: FragmentCounters{Passed: 5, Held: 2, Released: 2},
		},
		{
			name: "overlapping", arrive: "A2' A2 A0 A1' A1 A3", want: "- | - | A2' A2 A0 | A1' | A1 | A3",
			counters: FragmentCounters{Passed: 4, Held: 2, Released: 2},
		},
		{
			name: "name reused by another flow", arrive: "A0 A1 R0 R1 R2", want: "A0 | A1 | R0 | R1 | R2",
			counters: FragmentCounters{Passed: 5},
		},
		{
			name: "padding is not kept", arrive: "A1. A0 A2.", want: "- | A1 A0 | A2.",
			counters: FragmentCounters{Passed: 2, Held: 1, Released: 1},
		},
		{
			name: "IPv4 without ports goes on at once", arrive: "P1 P0 P2", want: "P1 | P0 | P2",
			counters: FragmentCounters{Passed: 3},
		},
		{
			name: "IPv6 without ports has to wait for who says so", arrive: "Q1 Q0 Q2", want: "- | Q1 Q0 | Q2",
			counters: FragmentCounters{Passed: 2, Held: 1, Released: 1},
		},
		{
			name: "first missing", arrive: "A1 A2 +29999 A3 +1 B0", want: "- | - | - | B0",
			counters: FragmentCounters{Passed: 1, Held: 3, Expired: 3},
		},
		{
			name: "first in time", arrive: "A1 +29999 A0", want: "- | A1 A0",
			counters: FragmentCounters{Passed: 1, Held: 1, Released: 1},
		},
		{
			name: "first too late", arrive: "A1 +30000 A0 A2", want: "- | A0 | A2",
			counters: FragmentCounters{Passed: 2, Held: 1, Expired: 1},
		},
		{
			name: "first in time, IPv6", arrive: "V1 +59999 V0", want: "- | V1 V0",
			counters: FragmentCounters{Passed: 1, Held: 1, Released: 1},
		},
		{
			name: "first too late, IPv6", arrive: "V1 +60000 V0 V2", want: "- | V0 | V2",
			counters: FragmentCounters{Passed: 2, Held: 1, Expired: 1},
		},
		{
			name: "IPv4 does not wait for IPv6", arrive: "V1 A1 +30000 A0 V0", want: "- | - | A0 | V1 V0",
			counters: FragmentCounters{Passed: 2, Held: 2, Released: 1, Expired: 1},
		},
		{
			name: "others too late", arrive: "A0 V0 +29999 A1 +1 A2 V1 +30000 V2", want: "A0 | V0 | A1 | - | V1 | -",
			counters: FragmentCounters{Passed: 4, Held: 2, Expired: 1},
		},
		{
			name: "a new first restarts the time", arrive: "A0 +20000 A0 +20000 A1", want: "A0 | A0 | A1",
			counters: FragmentCounters{Passed: 3},
		},
		{
			name: "first too small", arrive: "A1 A0- A2 A0", want: "- | - | - | A1 A2 A0",
			counters: FragmentCounters{Passed: 1, Held: 2, Released: 2, TooSmall: 1},
		},
		{
			name: "first too small, IPv6", arrive: "V1 V0- X0! X1", want: "- | - | - | -",
			counters: FragmentCounters{Held: 2, TooSmall: 2},
		},
		{
			name: "without the UDP type", arrive: "A1 A0 C1 V1 C0", want: "A1 | A0 | - | - | C1 C0", types: HashAll &^ HashUDPIPv4,
			counters: FragmentCounters{Passed: 3, Held: 2, Released: 1},
		},
		{
			name: "without the TCP type of IPv6", arrive: "X1 X0 V1 V0", want: "- | X1 X0 | - | V1 V0", types: HashAll &^ HashTCPIPv6,
			counters: FragmentCounters{Passed: 2, Held: 2, Released: 2},
		},
		{
			name: "without the types of IPv6", arrive: "X1 X0 V1 A1", want: "X1 | X0 | V1 | -", types: HashAll &^ (HashTCPIPv6 | HashUDPIPv6),
			counters: FragmentCounters{Passed: 3, Held: 1},
		},
		{
			name: "without the type of IP", arrive: "A1 A0 A2 P0", want: "- | A1 A0 | A2 | P0", types: HashAll &^ HashIPv4,
			counters: FragmentCounters{Passed: 3, Held: 1, Released: 1},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.types == 0 {
				c.types = HashAll
			}
			toeplitz := NewToeplitzTypes(randomKey(t), c.types)
			f := NewFragments(toeplitz)
			now := int64(time.Hour)
			var steps []string
			for word := range strings.FieldsSeq(c.arrive) {
				if after, ok := strings.CutPrefix(word, "+"); ok {
					ms, err := time.ParseDuration(after + "ms")
					if err != nil {
						t.Fatal(err)
					}
					now += int64(ms)
					continue
				}
				var on []string
				check := func(frame []byte, p Parsed) {
					t.Helper()
					word := checkSteered(t, toeplitz, frame, p)
					on = append(on, word)
				}
				frame := scriptFragment(t, word)
				var p, held Parsed
				toeplitz.Parse(frame, &p)
				ok := f.Steer(frame, &p, now)
				if !ok {
					clear(frame) // whoever read it uses the buffer again
				}
				for b, ok := f.Next(&held); ok; b, ok = f.Next(&held) {
					check(b, held)
				}
				if ok {
					check(frame, p)
				}
				if on == nil {
					on = []string{"-"}
				}
				steps = append(steps, strings.Join(on, " "))
			}
			if got := strings.Join(steps, " | "); got != c.want {
				t.Errorf("%s:\ngot  %s\nwant %s", c.arrive, got, c.want)
			}
			if got := f.Counters(); got != c.counters {
				t.Errorf("counters %+v, want %+v", got, c.counters)
			}
		})
	}
}

// checkSteered finds out which fragment of the scripts went on, and checks what
// is said about it.
func checkSteered(t *testing.T, toeplitz *Toeplitz, frame []byte, p Parsed) string {
	t.Helper()
	for letter, f := range scriptDatagrams {
		for n := range 4 {
			for _, change := range []string{"", "'", "."} {
				word := fmt.Sprintf("%c%d%s", letter, n, change)
				if !bytes.Equal(scriptFragment(t, word), frame) {
					continue
				}
				want := Tuple{peer4, us4, f.peerPort, ourPort, f.proto}
				if f.v6 {
					want.Src, want.Dst = peer6, us6
				}
				var again Parsed
				toeplitz.Parse(frame, &again)
				again.Hash, again.Steered = toeplitz.HashTuple(want), true
				if p != again {
					t.Errorf("%s goes on as %+v, want %+v", word, p, again)
				}
				return word
			}
		}
	}
	t.Fatalf("what goes on is none of the fragments: %x", frame)
	return ""
}

// A flow's fragments meet its other frames, which is what all this is for.
func TestFragmentsMeetTheirFlow(t *testing.T) {
	toeplitz := NewToeplitz(randomKey(t))
	f := NewFragments(toeplitz)
	whole := raw6(t, protoUDP, []byte{0x9c, 0x40, 0x01, 0xbb, 0, 16, 0, 0}, make([]byte, 8))
	first := raw6(t, protoFragment, fragmentHeader(protoUDP, 0, true), whole[ethernetLen+ipv6Len:])
	atomic := raw6(t, protoFragment, fragmentHeader(protoUDP, 0, false), whole[ethernetLen+ipv6Len:])
	var p, want Parsed
	toeplitz.Parse(whole, &want)
	for name, frame := range map[string][]byte{"whole": whole, "first fragment": first, "atomic fragment": atomic} {
		toeplitz.Parse(frame, &p)
		if !f.Steer(frame, &p, 1) || p.Hash != want.Hash {
			t.Errorf("%s hashes to %08x, want %08x", name, p.Hash, want.Hash)
		}
		again := p
		if !f.Steer(frame, &again, 1) || again != p {
			t.Errorf("%s, steered again: %+v, want %+v", name, again, p)
		}
	}
	if got := (FragmentCounters{Passed: 1}); f.Counters() != got {
		t.Errorf("counters %+v, want %+v: only one was a fragment", f.Counters(), got)
	}
}

// feeder gives fragments of one host to a Fragments.
type feeder struct {
	t        testing.TB
	f        *Fragments
	toeplitz *Toeplitz
	now      int64
}

func newFeeder(t testing.TB) *feeder {
	toeplitz := NewToeplitz(VerificationKey)
	return &feeder{t: t, f: NewFragments(toeplitz), toeplitz: toeplitz}
}

func (s *feeder) steer(f piece) bool {
	frame := f.frame()
	var p Parsed
	s.toeplitz.Parse(frame, &p)
	return s.f.Steer(frame, &p, s.now)
}

// released counts what Next has.
func (s *feeder) released() (n int) {
	var p Parsed
	for _, ok := s.f.Next(&p); ok; _, ok = s.f.Next(&p) {
		n++
	}
	return n
}

func (s *feeder) usage(datagrams, held, bytes int) {
	s.t.Helper()
	if d, h, b := s.f.Usage(); d != datagrams || h != held || b != bytes {
		s.t.Errorf("usage: %d datagrams, %d held, %d bytes, want %d, %d, %d", d, h, b, datagrams, held, bytes)
	}
	s.checkMemory()
}

// checkMemory looks whether copies take the memory that is accounted for them.
func (s *feeder) checkMemory() {
	s.t.Helper()
	total := 0
	sum := func(h *heldFragment) {
		for ; h != nil; h = h.next {
			total += cap(h.frame)
		}
	}
	for _, d := range s.f.datagrams {
		sum(d.held.first)
	}
	sum(s.f.ready.first)
	sum(s.f.spare.first)
	if h := s.f.lent; h != nil {
		total += cap(h.frame)
	}
	if total != s.f.bytes {
		s.t.Fatalf("copies take %d bytes, %d are accounted", total, s.f.bytes)
	}
}

func udpFirst(id int) piece {
	return piece{proto: protoUDP, id: uint32(id), more: true, peerPort: peerPort, payload: make([]byte, firstLen)}
}

func udpOther(id, n int) piece {
	return piece{proto: protoUDP, id: uint32(id), more: true, offset: 2, payload: make([]byte, n)}
}

func TestFragmentsLimits(t *testing.T) {
	t.Run("held fragments", func(t *testing.T) {
		s := newFeeder(t)
		for id := range MaxHeldFragments {
			s.now++
			s.steer(udpOther(id, restLen))
		}
		s.usage(0, MaxHeldFragments, MaxHeldBytes)
		s.steer(udpOther(1, restLen)) // not the oldest, but one more
		s.usage(0, MaxHeldFragments, MaxHeldBytes)
		for id, want := range map[int]int{0: 0, 1: 2, 2: 1} {
			if s.steer(udpFirst(id)); s.released() != want {
				t.Errorf("datagram %d: not %d fragments released", id, want)
			}
		}
		if got := s.f.Counters().Full; got != 1 {
			t.Errorf("%d fragments gave way, want 1", got)
		}
	})
	t.Run("one datagram alone", func(t *testing.T) {
		s := newFeeder(t)
		for range MaxHeldFragments + 1 {
			s.steer(udpOther(1, restLen))
		}
		s.usage(0, 1, MaxHeldBytes)
		if got := s.f.Counters().Full; got != MaxHeldFragments {
			t.Errorf("%d fragments gave way, want %d", got, MaxHeldFragments)
		}
		s.steer(udpFirst(1))
		s.usage(1, 0, MaxHeldBytes)
		if got := s.released(); got != 1 {
			t.Errorf("%d fragments released, want 1", got)
		}
	})
	t.Run("held bytes", func(t *testing.T) {
		s := newFeeder(t)
		const large = 60000 // rounded up to 61,440: eight fit
		for id := range 9 {
			s.steer(udpOther(id, large))
		}
		s.usage(0, 8, 8*61440)
		if got := s.f.Counters().Full; got != 1 {
			t.Errorf("%d fragments gave way, want 1", got)
		}
		// The memory of the large ones serves small ones, and large ones again.
		for id := range 40 {
			s.steer(udpOther(100+id, restLen))
		}
		for id := range 3 {
			s.steer(udpOther(200+id, large))
		}
		s.checkMemory()
		if _, held, bytes := s.f.Usage(); bytes > MaxHeldBytes || held < 8 {
			t.Errorf("%d held, %d bytes, want at least 8 and at most %d bytes", held, bytes, MaxHeldBytes)
		}
	})
	t.Run("the oldest of two families", func(t *testing.T) {
		s := newFeeder(t)
		for id := range MaxHeldFragments {
			f := udpOther(id, restLen)
			f.v6 = id%2 == 0
			s.now++
			s.steer(f)
		}
		s.now++
		s.steer(udpOther(1000, restLen))
		s.steer(udpOther(1001, restLen))
		for id := range 4 {
			f := udpFirst(id)
			f.v6 = id%2 == 0
			s.steer(f)
			if got, want := s.released() == 1, id >= 2; got != want {
				t.Errorf("datagram %d was kept: %t, want %t", id, got, want)
			}
		}
	})
	t.Run("datagrams", func(t *testing.T) {
		s := newFeeder(t)
		for id := range MaxFragmentedDatagrams + 1 {
			s.now++
			s.steer(udpFirst(id))
			s.steer(udpFirst(0)) // again and again: never the oldest
		}
		s.usage(MaxFragmentedDatagrams, 0, 0)
		for id, want := range map[int]bool{0: true, 1: false, 2: true, MaxFragmentedDatagrams: true} {
			if got := s.steer(udpOther(id, restLen)); got != want {
				t.Errorf("datagram %d goes on: %t, want %t", id, got, want)
			}
		}
		if got := s.f.Counters().Forgotten; got != 1 {
			t.Errorf("%d datagrams forgotten, want 1", got)
		}
	})
	t.Run("nobody calls Next", func(t *testing.T) {
		s := newFeeder(t)
		for range MaxHeldFragments {
			s.steer(udpOther(1, restLen))
		}
		s.steer(udpFirst(1))
		s.steer(udpOther(2, restLen))
		s.usage(1, 0, MaxHeldBytes)
		if got := s.f.Counters().Full; got != 1 {
			t.Errorf("%d fragments had no room, want 1", got)
		}
		if got := s.released(); got != MaxHeldFragments {
			t.Errorf("%d released, want %d", got, MaxHeldFragments)
		}
	})
}

func TestFragmentsExpire(t *testing.T) {
	s := newFeeder(t)
	s.steer(udpOther(1, restLen))
	s.steer(udpFirst(2))
	s.now = fragmentTime4 - 1
	s.f.Expire(s.now)
	s.usage(1, 1, heldUnit)
	s.now = fragmentTime4
	s.f.Expire(s.now)
	s.usage(0, 0, heldUnit) // kept for the next
	if got := s.f.Counters().Expired; got != 1 {
		t.Errorf("%d expired, want 1", got)
	}
}

func TestFragmentsAllocs(t *testing.T) {
	for name, order := range map[string][]piece{
		"in order": {udpFirst(0), udpOther(0, restLen), udpOther(0, 1400)},
		"reversed": {udpOther(0, 1400), udpOther(0, restLen), udpFirst(0)},
		"lost":     {udpOther(0, 1400)},
	} {
		s := newFeeder(t)
		frames := make([][]byte, len(order))
		for i, f := range order {
			frames[i] = f.frame()
		}
		var p Parsed
		id := uint16(0)
		datagrams := func() {
			for range 1000 {
				id++
				s.now += 1000
				for _, frame := range frames {
					binary.BigEndian.PutUint16(frame[ethernetLen+4:], id)
					s.toeplitz.Parse(frame, &p)
					s.f.Steer(frame, &p, s.now)
				}
				s.released()
			}
		}
		datagrams() // to the limits
		if n := testing.AllocsPerRun(10, datagrams); n > 5 {
			t.Errorf("%s: %v allocations for 1000 datagrams, want next to none", name, n)
		}
	}
}

// runFragments plays a script of random bytes and checks what has to hold
// always: nothing beyond the limits, nothing twice, nothing lost but counted,
// everything by the flow of the latest first fragment of its name.
func runFragments(t *testing.T, script []byte) {
	s := newFeeder(t)
	type name struct {
		v6    bool
		proto uint8
		id    uint32
	}
	type first struct {
		hash uint32
		at   int64
	}
	var (
		flows   = map[name]first{}
		given   [][]byte // frames by number; nil: went on
		names   []name
		calls   uint64
		emitted uint64
	)
	take := func(frame []byte, p Parsed) int {
		emitted++
		n := int(binary.BigEndian.Uint32(frame[len(frame)-4:]))
		if n >= len(given) || !bytes.Equal(given[n], frame) {
			t.Fatalf("fragment %d of %d went on twice or was changed: %x", n, len(given), frame)
		}
		given[n] = nil
		if want := flows[names[n]].hash; p.Hash != want || !p.Steered || p.Length != len(frame) {
			t.Fatalf("fragment %d goes on as %+v, want hash %08x", n, p, want)
		}
		return n
	}
	step := func(f piece) {
		frame := f.frame()
		n := len(given)
		binary.BigEndian.PutUint32(frame[len(frame)-4:], uint32(n))
		var p, held Parsed
		s.toeplitz.Parse(frame, &p)
		if !p.Fragment {
			t.Fatalf("not a fragment: %+v", p)
		}
		who := name{f.v6, f.proto, f.id}
		if f.v6 {
			who.proto = 0
		} else {
			who.id &= 0xffff
		}
		given, names = append(given, frame), append(names, who)
		calls++
		before := s.f.Counters()
		flow, ok := flows[who]
		switch age := s.now - flow.at; {
		case f.offset == 0 && f.chain == nil:
			hash := s.toeplitz.HashTuple(Tuple{peer4, us4, f.peerPort, ourPort, f.proto})
			if f.v6 {
				hash = s.toeplitz.HashTuple(Tuple{peer6, us6, f.peerPort, ourPort, f.proto})
			}
			flows[who] = first{hash, s.now}
		case f.v6 && age >= fragmentTime6, !f.v6 && age >= fragmentTime4:
			ok = false
			delete(flows, who)
		}
		if !f.v6 && f.proto == protoICMP { // its flow needs no first fragment
			flows[who] = first{s.toeplitz.HashAddrs(peer4, us4), s.now}
			ok = true
		}
		on := s.f.Steer(frame, &p, s.now)
		last := -1
		for b, ok := s.f.Next(&held); ok; b, ok = s.f.Next(&held) {
			if got := take(b, held); got <= last {
				t.Fatalf("fragment %d was released after %d", got, last)
			} else if last = got; names[got] != who {
				t.Fatalf("fragment %d of %v was released by one of %v", got, names[got], who)
			}
		}
		if on {
			take(frame, p)
		}
		c := s.f.Counters()
		tooSmall := f.chain != nil
		switch {
		case tooSmall && (on || c.TooSmall != before.TooSmall+1):
			t.Fatalf("a first fragment too small went on")
		case !tooSmall && f.offset == 0 && !on:
			t.Fatalf("a first fragment did not go on")
		case f.offset != 0 && ok && !on && c.Forgotten == 0:
			t.Fatalf("a fragment did not go on, the first one has: %+v", p)
		case f.offset != 0 && !ok && on:
			t.Fatalf("a fragment went on, but no first one: %+v", p)
		}
		datagrams, waiting, size := s.f.Usage()
		if datagrams > MaxFragmentedDatagrams || waiting > MaxHeldFragments || size > MaxHeldBytes || len(s.f.datagrams) > datagrams+waiting {
			t.Fatalf("beyond the limits: %d datagrams of %d, %d waiting, %d bytes", datagrams, len(s.f.datagrams), waiting, size)
		}
		if c.Passed+c.Held+c.TooSmall != calls || c.Passed+c.Released != emitted || c.Held != c.Released+c.Full+c.Expired+uint64(waiting) {
			t.Fatalf("%d calls, %d went on, %d wait, but counted %+v", calls, emitted, waiting, c)
		}
	}
	for ; len(script) >= 4; script = script[4:] {
		what, id, where, times := script[0], script[1], script[2], script[3]
		f := piece{v6: what&1 != 0, proto: []uint8{protoUDP, protoTCP, protoUDP, protoICMP}[what>>1&3], id: uint32(id)}
		f.offset, f.more = int(where&0xf), where&0x10 != 0 || where&0xf == 0
		f.peerPort = uint16(where >> 5)
		size := firstLen
		if where&0xf > 12 {
			size = []int{1400, 3000, 20000}[where&0xf-13]
		}
		f.payload = make([]byte, size)
		if what&0x39 == 0x39 && f.offset == 0 { // rarely, too small: half an extension header
			f.payload, f.chain, f.first = nil, make([]byte, 4), protoDestination
		}
		if f.v6 && f.proto == protoICMP {
			f.proto = protoUDP
		}
		if what&0xc0 == 0xc0 {
			s.now += int64(times) * int64(100*time.Millisecond)
			times = 0
		}
		if what&0xc0 == 0x80 { // many datagrams
			for range times {
				step(f)
				f.id += 256
			}
			continue
		}
		step(f)
		s.checkMemory()
	}
}

func FuzzFragments(f *testing.F) {
	rng := rand.NewChaCha8([32]byte{1})
	for i := range 20 {
		script := make([]byte, 40*(i+1))
		if _, err := rng.Read(script); err != nil {
			f.Fatal(err)
		}
		f.Add(script)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		runFragments(t, script[:min(len(script), 1000)]) // longer ones find nothing more, only slower
	})
}

func TestFragmentsRandomly(t *testing.T) {
	rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for n := 0; n < soakFrames(); n += 20_000 {
		script := make([]byte, 4*1000)
		for i := range script {
			script[i] = byte(rng.Uint32())
			if i%4 == 1 {
				script[i] %= 8 // few names, so that they meet
			}
		}
		runFragments(t, script)
	}
}

func BenchmarkFragments(b *testing.B) {
	for name, order := range map[string][]piece{
		"in_order": {udpFirst(0), udpOther(0, 1400)},
		"reversed": {udpOther(0, 1400), udpFirst(0)},
	} {
		b.Run("order="+name, func(b *testing.B) {
			s := newFeeder(b)
			frames := [][]byte{order[0].frame(), order[1].frame()}
			var p Parsed
			for id := uint16(0); b.Loop(); id++ {
				for _, frame := range frames {
					binary.BigEndian.PutUint16(frame[ethernetLen+4:], id)
					s.toeplitz.Parse(frame, &p)
					s.f.Steer(frame, &p, s.now)
				}
				for _, ok := s.f.Next(&p); ok; _, ok = s.f.Next(&p) {
				}
				s.now += 1000
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(2*b.N), "ns/fragment")
		})
	}
}
