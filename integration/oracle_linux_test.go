package integration

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"numastack/stack"
)

// oracle says where frames go: the steering table of docs/, once more, from
// nothing but the bytes of a frame. It is slow, knows well-formed IP only, and
// shares no code with package dispatch.
type oracle struct {
	key    stack.HashKey
	groups int

	flows map[string]int    // flow group of a datagram whose first fragment was seen
	early map[string]uint64 // fragments that came before it
}

func newOracle(key stack.HashKey, groups int) *oracle {
	return &oracle{key: key, groups: groups, flows: make(map[string]int), early: make(map[string]uint64)}
}

// tally is how many frames went where.
type tally struct {
	groups []uint64          // delivered, by flow group
	drops  map[string]uint64 // by cause; of fragments none
}

// minus is what was added since b.
func (a tally) minus(b tally) tally {
	d := tally{groups: slices.Clone(a.groups), drops: make(map[string]uint64)}
	for g, n := range b.groups {
		d.groups[g] -= n
	}
	for cause, n := range a.drops {
		if n != b.drops[cause] {
			d.drops[cause] = n - b.drops[cause]
		}
	}
	return d
}

// differs is nil if want is the same.
func (a tally) differs(want tally) error {
	for g, n := range a.groups {
		if n != want.groups[g] {
			return fmt.Errorf("flow group %d got %d frames, want %d; by group\n%v, want\n%v", g, n, want.groups[g], a.groups, want.groups)
		}
	}
	if !maps.Equal(a.drops, want.drops) {
		return fmt.Errorf("frames dropped: %v, want %v", a.drops, want.drops)
	}
	return nil
}

// tally follows the frames that the kernel's side sent.
func (o *oracle) tally(frames []captured) tally {
	t := tally{groups: make([]uint64, o.groups), drops: make(map[string]uint64)}
	for i := range frames {
		if !frames[i].ours {
			o.add(&t, &frames[i])
		}
	}
	return t
}

func (o *oracle) add(t *tally, f *captured) {
	const ethernet = 14
	ip := f.bytes[ethernet:]
	switch binary.BigEndian.Uint16(f.bytes[12:]) {
	case 0x0800, 0x86dd:
	case 0x0806: // ARP
		t.addAll()
		return
	case 0x8100, 0x88a8, 0x9100:
		t.drops["vlan"]++
		return
	default:
		t.drops["unknown_ethertype"]++
		return
	}
	p, _ := dissect(ip)
	switch {
	case p.fragment && p.l4 == nil:
		if g, ok := o.flows[p.id]; ok {
			t.groups[g]++
		} else {
			o.early[p.id]++
		}
	case p.fragment:
		g := o.group(p)
		o.flows[p.id] = g
		t.groups[g] += 1 + o.early[p.id]
		delete(o.early, p.id)
	case p.speaksToAll():
		t.addAll()
	case p.proto == 17 && f.segment > 0: // cut by the stack
		t.groups[o.group(p)] += uint64((len(p.l4) - 8 + f.segment - 1) / f.segment)
	default:
		t.groups[o.group(p)]++
	}
}

func (a *tally) addAll() {
	for g := range a.groups {
		a.groups[g]++
	}
}

// packet is what the steering table looks at.
type packet struct {
	ipv6     bool
	src, dst []byte
	proto    byte
	l4       []byte // nil in fragments but the first
	fragment bool
	id       string // of the datagram that it is a fragment of
}

// dissect reads an IP packet that may be cut short; ok says that its headers
// are there.
func dissect(ip []byte) (p packet, ok bool) {
	if len(ip) >= 20 && ip[0]>>4 == 4 && ip[0]&15 >= 5 {
		p = packet{src: ip[12:16], dst: ip[16:20], proto: ip[9]}
		bits := binary.BigEndian.Uint16(ip[6:])
		p.fragment = bits&0x3fff != 0
		p.id = string(ip[12:20]) + string(ip[4:6]) + string(ip[9:10])
		if bits&0x1fff == 0 {
			p.l4 = ip[min(len(ip), int(ip[0]&15)*4):]
		}
		return p, true
	}
	if len(ip) < 40 || ip[0]>>4 != 6 {
		return p, false
	}
	p = packet{ipv6: true, src: ip[8:24], dst: ip[24:40], proto: ip[6]}
	rest := ip[40:]
	for {
		length := 8
		switch p.proto {
		case 0, 43, 60: // hop-by-hop options, routing, destination options
			if len(rest) >= 2 {
				length += int(rest[1]) * 8
			}
		case 51: // authentication
			if len(rest) >= 2 {
				length += int(rest[1]) * 4
			}
		case 44: // fragment
			if len(rest) < length {
				return p, false
			}
			bits := binary.BigEndian.Uint16(rest[2:])
			if bits&0xfff9 != 0 {
				p.fragment, p.id = true, string(ip[8:40])+string(rest[4:8])
			}
			if bits&0xfff8 != 0 {
				return p, true
			}
		default:
			p.l4 = rest
			return p, true
		}
		if len(rest) < length {
			return p, false
		}
		p.proto, rest = rest[0], rest[length:]
	}
}

// speaksToAll reports whether every flow group learns from a packet: IGMP, MLD,
// NDP.
func (p packet) speaksToAll() bool {
	switch {
	case p.proto == 2 && !p.ipv6:
		return true
	case p.proto == 58 && p.ipv6:
		return p.l4[0] >= 130 && p.l4[0] <= 137 || p.l4[0] == 143
	}
	return false
}

// group returns the flow group of a packet, or of a datagram by its first
// fragment.
func (o *oracle) group(p packet) int {
	switch {
	case p.proto == 6 || p.proto == 17:
		return o.of(p.src, p.dst, p.l4[:4])
	case p.fragment:
	case !p.ipv6 && p.proto == 1 && slices.Contains([]byte{3, 4, 5, 11, 12}, p.l4[0]), // the errors of RFC 792
		p.ipv6 && p.proto == 58 && p.l4[0] < 128: // RFC 4443
		q, ok := dissect(p.l4[8:])
		switch {
		case !ok || q.ipv6 != p.ipv6 || q.l4 == nil:
		case q.proto != 6 && q.proto != 17:
			return o.of(q.dst, q.src)
		case len(q.l4) >= 4:
			return o.of(q.dst, q.src, q.l4[2:4], q.l4[:2])
		}
	}
	return o.of(p.src, p.dst)
}

// of is the Toeplitz hash, bit by bit, through the indirection table.
func (o *oracle) of(fields ...[]byte) int {
	const buckets = 128
	var hash uint32
	for i, b := range slices.Concat(fields...) {
		for bit := range 8 {
			if b&(0x80>>bit) != 0 {
				hash ^= uint32(binary.BigEndian.Uint64(append([]byte{0, 0, 0}, o.key[i:i+5]...)) >> (8 - bit))
			}
		}
	}
	return int(hash % buckets % uint32(o.groups))
}
