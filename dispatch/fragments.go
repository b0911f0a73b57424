package dispatch

import "encoding/binary"

// Limits of Fragments, each for one flow group. At a limit the oldest gives way
// to the newest: who floods us with fragments cannot lock others out for long,
// and a datagram that has waited long has mostly lost a part anyway.
const (
	// MaxFragmentedDatagrams is how many datagrams are remembered whose first
	// fragment has passed: what follows it in a burst does so at once.
	MaxFragmentedDatagrams = 512

	// MaxHeldFragments and MaxHeldBytes are how many fragments may wait for the
	// first one of their datagram, and how much memory may go into copies:
	// enough for five datagrams of 64 KiB in Ethernet frames, in reverse order.
	// Of larger frames fewer may wait.
	MaxHeldFragments = MaxHeldBytes / heldUnit
	MaxHeldBytes     = 512 << 10

	// heldUnit is what the memory of a copy is rounded up to, in bytes, so that
	// one can follow another in the same memory. Ethernet frames fit.
	heldUnit = 2048
)

// How long a datagram is remembered in nanoseconds, from its first fragment if
// that has come, else from the one that came before the others. The time of
// IPv4 is the one of Linux (IP_FRAG_TIME in include/net/ip.h), for which RFC 791
// section 3.2 leaves room; that of IPv6 is from RFC 8200 section 4.5.
const (
	fragmentTime4 = 30_000_000_000
	fragmentTime6 = 60_000_000_000
)

// Fragments sends the fragments of IP datagrams to the flow group of their flow.
//
// Only the first fragment of a datagram has the ports, so the kernel and
// [Toeplitz.Parse] hash every fragment by its addresses. That makes one flow
// group the home of all fragments between two hosts. The Fragments of this
// group learn a datagram's flow from its first fragment, and send the others
// after it:
//
//	fragment                            Steer says
//	first                               go on; then Next has those that waited for it
//	other, the first has passed         go on
//	other, the first is still to come   wait: a copy is held
//
// They do not reassemble and do not judge what reassembly will judge:
// duplicates, overlaps and gaps go on as they are.
//
// A Fragments belongs to a flow group and moves with it: only the thread that
// owns the group calls it. It takes hardly any memory before the first fragment,
// and allocates nothing once it has been at its limits.
type Fragments struct {
	toeplitz *Toeplitz // immutable

	// Datagrams by name and by age, IPv4 and IPv6 apart because their time
	// differs.
	datagrams map[datagramName]*datagram
	known     [2]datagramList // the first fragment has passed: no fragments here
	waiting   [2]datagramList // the first fragment is still to come
	unused    *datagram       // for reuse, linked by newer

	held  int           // fragments of waiting datagrams
	bytes int           // of all copies, wherever they are
	ready heldList      // for Next
	lent  *heldFragment // what Next has returned
	spare heldList      // for reuse

	counters FragmentCounters
}

// FragmentCounters count fragments. Each one that Steer was given is in one of
// Passed, Held and TooSmall; each one in Held is also in one of Released, Full
// and Expired, or still waits.
type FragmentCounters struct {
	Passed   uint64 // went on at once
	Held     uint64 // came before the first fragment
	Released uint64 // went on after the first fragment

	// Dropped, by cause.
	Full     uint64 // held, but gave way to others at a limit
	Expired  uint64 // held, but the first fragment did not come in time
	TooSmall uint64 // first fragment that ends before the ports (RFC 1858, RFC 8200 section 4.5)

	// Forgotten counts datagrams of which the first fragment had passed and which
	// gave way to others at the limit. What may follow waits in vain.
	Forgotten uint64
}

// datagramName tells the datagrams apart that are being reassembled: as RFC 791
// section 3.2 and RFC 8200 section 4.5 have it, with the protocol for IPv4 only.
type datagramName struct {
	src, dst [16]byte
	id       uint32
	proto    uint8
	ipv6     bool
}

type datagram struct {
	name  datagramName
	known bool
	hash  uint32   // if known
	held  heldList // if not
	since int64    // when its time began

	older, newer *datagram
}

// heldFragment is a copy of a frame.
type heldFragment struct {
	parsed Parsed
	frame  []byte
	next   *heldFragment
}

// NewFragments returns an empty memory for fragments of frames parsed by t.
func NewFragments(t *Toeplitz) *Fragments {
	return &Fragments{toeplitz: t, datagrams: make(map[datagramName]*datagram)}
}

// Steer is called in the fragment's home, the owner of the group of p.Hash, with
// a frame and what Parse said about it. It reports whether the frame goes on
// now: p.Hash is then the one of its flow, whose group may have another owner,
// and p.Steered is set, lest that one takes itself for the home. Else the frame
// was copied or dropped and is done with.
//
// What now goes on because of this frame comes from Next; these arrived earlier,
// so deliver them first. Frames that are no fragments just go on.
//
// now is a time stamp in nanoseconds that never goes back.
func (f *Fragments) Steer(frame []byte, p *Parsed, now int64) bool {
	if !p.Fragment || p.Steered {
		return true
	}
	f.Expire(now)
	if f.needsNoPorts(p) {
		f.pass(p, p.Hash)
		return true
	}
	name := nameOf(frame, p)
	d := f.datagrams[name]
	if p.FragmentOffset == 0 {
		hash, ok := f.flowHash(frame, p)
		if !ok {
			f.counters.TooSmall++
			return false
		}
		f.learn(d, name, hash, now)
		f.pass(p, hash)
		return true
	}
	if d != nil && d.known {
		f.pass(p, d.hash)
		return true
	}
	f.counters.Held++
	if !f.hold(frame, p, name, now) {
		f.counters.Full++
	}
	return false
}

// Next returns a fragment that waited and goes on now, in the order of arrival,
// and describes it in p; ok is false if there is none. The frame is valid until
// the next call of Next. It has no vnet header, and the zero one describes it:
// the kernel completes checksums before it makes fragments (skb_checksum_help in
// ip_do_fragment and ip6_fragment).
func (f *Fragments) Next(p *Parsed) (frame []byte, ok bool) {
	if f.lent != nil {
		f.spare.push(f.lent)
		f.lent = nil
	}
	f.lent = f.ready.pop()
	if f.lent == nil {
		return nil, false
	}
	*p = f.lent.parsed
	return f.lent.frame, true
}

// Expire drops what has waited too long. Steer does so too; without fragments,
// calling it now and then only frees memory for others and keeps the counters
// current.
func (f *Fragments) Expire(now int64) {
	for i, age := range [...]int64{fragmentTime4, fragmentTime6} {
		for d := f.known[i].oldest; d != nil && now-d.since >= age; d = f.known[i].oldest {
			f.forget(d, nil)
		}
		for d := f.waiting[i].oldest; d != nil && now-d.since >= age; d = f.waiting[i].oldest {
			f.forget(d, &f.counters.Expired)
		}
	}
}

// Counters returns what was counted since NewFragments.
func (f *Fragments) Counters() FragmentCounters { return f.counters }

// Usage returns how much there is now of what is limited: datagrams whose first
// fragment has passed, fragments that wait for it, and bytes of memory for
// copies.
func (f *Fragments) Usage() (datagrams, held, bytes int) {
	return f.known[0].n + f.known[1].n, f.held, f.bytes
}

// needsNoPorts reports whether all fragments of the datagram, the first as well,
// are where their flow is. Only IPv4 tells the protocol in every fragment.
func (f *Fragments) needsNoPorts(p *Parsed) bool {
	types := f.toeplitz.types
	if p.IPv6 {
		return !types.usePorts(true, protoTCP) && !types.usePorts(true, protoUDP)
	}
	return !types.usePorts(false, p.Proto)
}

func nameOf(frame []byte, p *Parsed) datagramName {
	ip := frame[p.L3:]
	if p.IPv6 {
		return datagramName{src: [16]byte(ip[8:]), dst: [16]byte(ip[24:]), id: p.FragmentID, ipv6: true}
	}
	name := datagramName{id: p.FragmentID, proto: p.Proto}
	copy(name.src[:], ip[12:16])
	copy(name.dst[:], ip[16:20])
	return name
}

// flowHash returns what the unfragmented frames of a first fragment's flow hash
// to. It fails if the fragment ends before the ports or, which only IPv6 can
// tell, before the header that would have them.
func (f *Fragments) flowHash(frame []byte, p *Parsed) (hash uint32, ok bool) {
	if p.L4 == 0 {
		return 0, false
	}
	if p.Proto != protoTCP && p.Proto != protoUDP {
		return p.Hash, true
	}
	if int(p.L4)+portsLen > p.Length {
		return 0, false
	}
	t, ip := f.toeplitz, frame[p.L3:]
	var addrs uint32
	if p.IPv6 {
		addrs = t.addrs6((*[16]byte)(ip[8:]), (*[16]byte)(ip[24:]))
	} else {
		addrs = t.addrs4((*[4]byte)(ip[12:]), (*[4]byte)(ip[16:]))
	}
	return t.byFlow(p.IPv6, p.Proto, addrs, binary.BigEndian.Uint32(frame[p.L4:])), true
}

func (f *Fragments) pass(p *Parsed, hash uint32) {
	p.Hash, p.Steered = hash, true
	f.counters.Passed++
}

// learn takes note of a first fragment. d is what is remembered of the datagram,
// if anything: fragments that wait, or a first fragment. The latter is a
// duplicate or belongs to an older datagram of the same name.
func (f *Fragments) learn(d *datagram, name datagramName, hash uint32, now int64) {
	if d == nil {
		d = f.newDatagram(name)
	} else {
		f.listOf(d).remove(d)
	}
	for h := d.held.pop(); h != nil; h = d.held.pop() {
		h.parsed.Hash, h.parsed.Steered = hash, true
		f.ready.push(h)
		f.held--
		f.counters.Released++
	}
	d.known, d.hash, d.since = true, hash, now
	f.listOf(d).push(d)
	if f.known[0].n+f.known[1].n > MaxFragmentedDatagrams {
		f.forget(oldest(&f.known), nil)
		f.counters.Forgotten++
	}
}

// hold copies a fragment that came before the first one of its datagram, or
// reports that there is no room for it.
func (f *Fragments) hold(frame []byte, p *Parsed, name datagramName, now int64) bool {
	h := f.room(p.Length)
	if h == nil {
		return false
	}
	d := f.datagrams[name] // room may have dropped it
	if d == nil {
		d = f.newDatagram(name)
		d.known, d.since = false, now
		f.listOf(d).push(d)
	}
	h.parsed = *p
	h.frame = append(h.frame[:0], frame[:p.Length]...)
	d.held.push(h)
	f.held++
	return true
}

// room returns memory for a copy of n bytes, and drops for it what has waited
// longest. It returns nil if all there is waits for Next.
func (f *Fragments) room(n int) *heldFragment {
	n = (n + heldUnit - 1) / heldUnit * heldUnit
	for {
		switch h := f.spare.pop(); {
		case h != nil && cap(h.frame) >= n:
			return h
		case h != nil:
			f.bytes -= cap(h.frame)
		case f.bytes+n <= MaxHeldBytes:
			f.bytes += n
			return &heldFragment{frame: make([]byte, 0, n)}
		case f.held == 0:
			return nil
		default:
			f.forget(oldest(&f.waiting), &f.counters.Full)
		}
	}
}

func (f *Fragments) newDatagram(name datagramName) *datagram {
	d := f.unused
	if d == nil {
		d = new(datagram)
	} else {
		f.unused = d.newer
	}
	d.name = name
	f.datagrams[name] = d
	return d
}

// forget drops a datagram and what it holds, and counts the latter.
func (f *Fragments) forget(d *datagram, cause *uint64) {
	for h := d.held.pop(); h != nil; h = d.held.pop() {
		f.spare.push(h)
		f.held--
		*cause++
	}
	f.listOf(d).remove(d)
	delete(f.datagrams, d.name)
	d.newer = f.unused
	f.unused = d
}

// listOf returns the list that a datagram is in, or belongs into.
func (f *Fragments) listOf(d *datagram) *datagramList {
	lists := &f.waiting
	if d.known {
		lists = &f.known
	}
	if d.name.ipv6 {
		return &lists[1]
	}
	return &lists[0]
}

// oldest returns the oldest datagram of both families; there has to be one.
func oldest(lists *[2]datagramList) *datagram {
	a, b := lists[0].oldest, lists[1].oldest
	if a == nil || b != nil && b.since < a.since {
		return b
	}
	return a
}

// datagramList is a list of datagrams in the order in which their time began.
type datagramList struct {
	oldest, newest *datagram
	n              int
}

func (l *datagramList) push(d *datagram) {
	d.older, d.newer = l.newest, nil
	if l.newest == nil {
		l.oldest = d
	} else {
		l.newest.newer = d
	}
	l.newest = d
	l.n++
}

func (l *datagramList) remove(d *datagram) {
	if d.older == nil {
		l.oldest = d.newer
	} else {
		d.older.newer = d.newer
	}
	if d.newer == nil {
		l.newest = d.older
	} else {
		d.newer.older = d.older
	}
	l.n--
}

// heldList is a list of copies, first in, first out.
type heldList struct{ first, last *heldFragment }

func (l *heldList) push(h *heldFragment) {
	h.next = nil
	if l.first == nil {
		l.first = h
	} else {
		l.last.next = h
	}
	l.last = h
}

func (l *heldList) pop() *heldFragment {
	h := l.first
	if h != nil {
		l.first = h.next
	}
	return h
}
