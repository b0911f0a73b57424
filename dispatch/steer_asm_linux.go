package dispatch

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf/asm"
)

// tablesLen is the length in bytes of the hash tables: [maxInput][256]uint32.
const tablesLen = maxInput * tableLen

// tableLen is the length in bytes of the table of one input byte.
const tableLen = 256 * 4

// Offsets in struct __sk_buff (include/uapi/linux/bpf.h).
const (
	skbLen         = 0
	skbVLANPresent = 20
)

// The program's stack, as offsets from the frame pointer. The hash input is
// built in place: a header is loaded so far below it that its addresses land at
// the start of the input, and the transport header so that its ports follow
// them. Everything is aligned to eight bytes.
const (
	stackInput   = -64  // 36 bytes, and room for a transport header behind
	stackHeader4 = -76  // IPv4 header: addresses at byte 12
	stackHeader6 = -72  // IPv6 header: addresses at byte 8
	stackQuote   = -120 // 40 bytes: a quoted IP header
	stackChain   = -128 // 8 bytes: where a chain of extension headers has to end
	stackScratch = -136 // 8 bytes: an extension header, or quoted ports
)

// Registers that keep their meaning through the whole program; R0 to R5 do not
// survive a call.
const (
	regSKB   = asm.R6
	regL4    = asm.R7 // offset in the frame of the header to look at
	regEnd   = asm.R8 // where the IP packet ends; first the frame's length
	regProto = asm.R9 // protocol of the header at regL4; later the input's length
)

// Labels of the ways out.
const (
	labelBucket0 = "bucket0" // hash 0, or not to be classified
	labelQueue   = "queue"   // the hash is in R0
)

// family is what differs between IPv4 and IPv6 once the packet's own header is
// behind us.
type family struct {
	name string
	ipv6 bool
	icmp int32 // protocol number

	// Lengths in bytes: an IP header, an address, the hash input without and
	// with ports.
	header, addr, addrs, tuple int

	// Where the addresses of a quoted header are.
	quoted int
}

var (
	family4 = family{
		name: "ip4", icmp: protoICMP,
		header: ipv4Len, addr: 4, addrs: portsAt4, tuple: portsAt4 + portsLen, quoted: stackQuote + 12,
	}
	family6 = family{
		name: "ip6", ipv6: true, icmp: protoICMPv6,
		header: ipv6Len, addr: 16, addrs: portsAt6, tuple: portsAt6 + portsLen, quoted: stackQuote + 8,
	}
)

// label makes a name of the program unique to the family.
func (f family) label(name string) string { return f.name + "." + name }

// steeringInstructions assembles the steering program. It follows Parse, step
// by step; a test runs both on the same frames. There are no loops: the chain of
// extension headers and the hash are unrolled, so the length of the way through
// is bounded by construction and the verifier meets nothing it has to guess. Nor
// does the program look at hash types: it is made for them.
//
// The context is an skb that starts at its Ethernet header. Its bytes may be
// spread over pages, so they are copied by bpf_skb_load_bytes, the only helper
// used.
func steeringInstructions(types HashTypes, tablesFD, retaFD int) asm.Instructions {
	a := &assembler{types: types}
	a.ethernet()
	a.ipv4()
	a.transport(family4)
	a.ipv6()
	a.transport(family6)
	a.hash(tablesFD)
	a.queue(retaFD)
	return a.insns
}

// assembler collects instructions. A label given to at belongs to the next one.
type assembler struct {
	types HashTypes
	insns asm.Instructions
	label string
}

func (a *assembler) add(insns ...asm.Instruction) {
	for _, ins := range insns {
		if a.label != "" {
			ins = ins.WithSymbol(a.label)
			a.label = ""
		}
		a.insns = append(a.insns, ins)
	}
}

func (a *assembler) at(label string) { a.label = label }

// usePorts reports whether packets of this protocol are hashed by ports too.
func (a *assembler) usePorts(f family, proto uint8) bool { return a.types.usePorts(f.ipv6, proto) }

// byAddrs is where to hash by addresses.
func (a *assembler) byAddrs(f family) string {
	if a.types&hashType(f.ipv6, 0) == 0 {
		return labelBucket0
	}
	return hashLabel(f.addrs)
}

// byFlow is where to hash what belongs to a flow of this protocol.
func (a *assembler) byFlow(f family, proto uint8) string {
	if !a.usePorts(f, proto) {
		return a.byAddrs(f)
	}
	return hashLabel(f.tuple)
}

// hashLabel is where so many bytes of input are hashed.
func hashLabel(n int) string { return fmt.Sprintf("hash%d", n) }

// used reports whether an instruction so far goes to a label. The verifier
// refuses code that is not reached.
func (a *assembler) used(label string) bool {
	return slices.ContainsFunc(a.insns, func(ins asm.Instruction) bool { return ins.Reference() == label })
}

// load copies n bytes from the frame at regL4 to the stack, or goes to fail.
func (a *assembler) load(stack int32, n int32, fail string) {
	a.add(asm.Mov.Reg(asm.R2, regL4))
	a.loadAtR2(stack, n, fail)
}

// loadFixed is load from a fixed offset, or goes to bucket 0.
func (a *assembler) loadFixed(offset, stack, n int32) {
	a.add(asm.Mov.Imm(asm.R2, offset))
	a.loadAtR2(stack, n, labelBucket0)
}

func (a *assembler) loadAtR2(stack, n int32, fail string) {
	a.add(
		asm.Mov.Reg(asm.R1, regSKB),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, stack),
		asm.Mov.Imm(asm.R4, n),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, fail),
	)
}

// load8 reads a byte from the stack.
func (a *assembler) load8(dst asm.Register, stack int) {
	a.add(asm.LoadMem(dst, asm.RFP, int16(stack), asm.Byte))
}

// load16 reads a number in network order from the stack into R1.
func (a *assembler) load16(stack int) {
	a.add(
		asm.LoadMem(asm.R1, asm.RFP, int16(stack), asm.Half),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
	)
}

// within goes to fail unless n bytes from regL4 on belong to the packet.
func (a *assembler) within(n int32, fail string) {
	a.add(
		asm.Mov.Reg(asm.R2, regL4),
		asm.Add.Imm(asm.R2, n),
		asm.JGT.Reg(asm.R2, regEnd, fail),
	)
}

func (a *assembler) ethernet() {
	a.add(
		asm.Mov.Reg(regSKB, asm.R1),
		// A tag that the kernel still carries beside the frame; user space will
		// read it inside the frame.
		asm.LoadMem(asm.R0, regSKB, skbVLANPresent, asm.Word),
		asm.JNE.Imm(asm.R0, 0, labelBucket0),
		asm.LoadMem(regEnd, regSKB, skbLen, asm.Word),
	)
	a.loadFixed(12, stackScratch, 2)
	a.load16(stackScratch)
	a.add(
		asm.JEq.Imm(asm.R1, etherTypeIPv4, "ip4"),
		asm.JEq.Imm(asm.R1, etherTypeIPv6, "ip6"),
		asm.JNE.Imm(asm.R1, etherTypeMarker, labelBucket0),
	)
	// A mark names its queue.
	a.loadFixed(markerQueue, stackScratch, 2)
	a.load16(stackScratch)
	a.add(
		asm.Mov.Reg(asm.R0, asm.R1),
		asm.Return(),
	)
}

func (a *assembler) ipv4() {
	a.at("ip4")
	a.loadFixed(ethernetLen, stackHeader4, ipv4Len)
	a.load8(asm.R1, stackHeader4)
	a.add(
		asm.Mov.Reg(regL4, asm.R1),
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 4, labelBucket0),
		asm.And.Imm(regL4, 0xf),
		asm.LSh.Imm(regL4, 2),
		asm.JLT.Imm(regL4, ipv4Len, labelBucket0),
	)
	a.load16(stackHeader4 + 2)
	a.add(
		asm.JLT.Reg(asm.R1, regL4, labelBucket0), // total < header
		asm.Add.Imm(asm.R1, ethernetLen),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0), // total > frame
		asm.Mov.Reg(regEnd, asm.R1),
		asm.Add.Imm(regL4, ethernetLen),
	)
	a.load16(stackHeader4 + 6)
	a.add(
		asm.And.Imm(asm.R1, ipv4FragmentBits),
		asm.JNE.Imm(asm.R1, 0, a.byAddrs(family4)),
	)
	a.load8(regProto, stackHeader4+9)
	a.add(asm.JEq.Imm(regProto, protoIGMP, labelBucket0))
}

func (a *assembler) ipv6() {
	a.at("ip6")
	a.loadFixed(ethernetLen, stackHeader6, ipv6Len)
	a.load8(asm.R1, stackHeader6)
	a.add(
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 6, labelBucket0),
	)
	a.load16(stackHeader6 + 4)
	a.add(
		asm.Add.Imm(asm.R1, ethernetLen+ipv6Len),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0), // total > frame
		asm.Mov.Reg(regEnd, asm.R1),
		asm.Mov.Imm(regL4, ethernetLen+ipv6Len),
	)
	a.load8(regProto, stackHeader6+6)
	a.extensions(family6.label("outer"), ipv6FragmentBits, a.byAddrs(family6), labelBucket0)
}

// extensions moves regL4 and regProto behind the IPv6 extension headers. It
// goes to fragment at a fragment header with some of these bits, and to fail if
// the chain leaves the packet or is too long.
func (a *assembler) extensions(name string, fragmentBits int32, fragment, fail string) {
	a.add( // as far as the packet goes, but no more than MaxExtensionBytes
		asm.Mov.Reg(asm.R1, regL4),
		asm.Add.Imm(asm.R1, MaxExtensionBytes),
		asm.JLE.Reg(asm.R1, regEnd, name+".bounded"),
		asm.Mov.Reg(asm.R1, regEnd),
	)
	a.at(name + ".bounded")
	a.add(asm.StoreMem(asm.RFP, stackChain, asm.R1, asm.DWord))
	for n := range MaxExtensionHeaders {
		a.extension(fmt.Sprintf("%s%d", name, n), name, fragmentBits, fragment, fail)
	}
	for _, kind := range extensionKinds {
		a.add(asm.JEq.Imm(regProto, kind, fail))
	}
	a.at(name)
}

// extensionKinds are the types of headers for which isExtension holds.
var extensionKinds = [...]int32{protoHopByHop, protoRouting, protoDestination, protoAuth, protoFragment}

// extension moves regL4 and regProto behind one extension header, or goes to
// done if there is none.
func (a *assembler) extension(name, done string, fragmentBits int32, fragment, fail string) {
	for _, kind := range extensionKinds {
		a.add(asm.JEq.Imm(regProto, kind, name))
	}
	a.add(asm.Ja.Label(done))

	a.at(name)
	a.add(
		asm.Mov.Reg(asm.R2, regL4),
		asm.Add.Imm(asm.R2, extensionLen),
		asm.LoadMem(asm.R1, asm.RFP, stackChain, asm.DWord),
		asm.JGT.Reg(asm.R2, asm.R1, fail),
	)
	a.load(stackScratch, extensionLen, fail)
	a.load8(asm.R1, stackScratch+1) // length in units of eight bytes
	a.add(
		asm.LSh.Imm(asm.R1, 3),
		asm.JEq.Imm(regProto, protoFragment, name+".fragment"),
		asm.JNE.Imm(regProto, protoAuth, name+".next"),
		asm.RSh.Imm(asm.R1, 1), // in units of four
		asm.Ja.Label(name+".next"),
	)
	a.at(name + ".fragment")
	a.load16(stackScratch + 2)
	a.add(
		asm.And.Imm(asm.R1, fragmentBits),
		asm.JNE.Imm(asm.R1, 0, fragment),
		asm.Mov.Imm(asm.R1, 0),
	)
	a.at(name + ".next")
	a.add(
		asm.Add.Reg(regL4, asm.R1),
		asm.Add.Imm(regL4, extensionLen),
		asm.LoadMem(asm.R1, asm.RFP, stackChain, asm.DWord),
		asm.JGT.Reg(regL4, asm.R1, fail),
	)
	a.load8(regProto, stackScratch)
}

// transport reads the ports of a whole packet, or has icmp find the flow that
// an error is about.
func (a *assembler) transport(f family) {
	a.add(
		asm.JEq.Imm(regProto, protoTCP, f.label("tcp")),
		asm.JEq.Imm(regProto, protoUDP, f.label("udp")),
		asm.JEq.Imm(regProto, f.icmp, f.label("icmp")),
		asm.Ja.Label(a.byAddrs(f)),
	)
	a.tcp(f)
	a.udp(f)
	a.icmp(f)
}

// A transport header that is long enough and ends inside the packet is there:
// in tcp and udp, the checks of the lengths are checks of the bounds.

func (a *assembler) tcp(f family) {
	portsAt := stackInput + f.addrs
	a.at(f.label("tcp"))
	a.load(int32(portsAt), 13, labelBucket0) // up to the data offset
	a.load8(asm.R1, portsAt+12)
	a.add(
		asm.RSh.Imm(asm.R1, 4),
		asm.LSh.Imm(asm.R1, 2),
		asm.JLT.Imm(asm.R1, tcpLen, labelBucket0),
		asm.Add.Reg(asm.R1, regL4),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0),
		asm.Ja.Label(a.byFlow(f, protoTCP)),
	)
}

func (a *assembler) udp(f family) {
	portsAt := stackInput + f.addrs
	a.at(f.label("udp"))
	a.load(int32(portsAt), 6, labelBucket0) // up to the length
	a.load16(portsAt + 4)
	a.add(
		asm.JLT.Imm(asm.R1, udpLen, labelBucket0),
		asm.Add.Reg(asm.R1, regL4),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0),
		asm.Ja.Label(a.byFlow(f, protoUDP)),
	)
}

func (a *assembler) icmp(f family) {
	a.at(f.label("icmp"))
	a.within(icmpLen, labelBucket0)
	a.load(stackScratch, 1, labelBucket0)
	a.load8(asm.R1, stackScratch)
	if f.ipv6 {
		a.add(
			asm.JLT.Imm(asm.R1, icmpv6FirstInformational, f.label("error")),
			asm.JEq.Imm(asm.R1, mldReport2, labelBucket0),
			asm.JLT.Imm(asm.R1, mldFirst, a.byAddrs(f)),
			asm.JGT.Imm(asm.R1, ndpLast, a.byAddrs(f)),
			asm.Ja.Label(labelBucket0),
		)
	} else {
		for kind := range 256 {
			if icmpv4Error(uint8(kind)) {
				a.add(asm.JEq.Imm(asm.R1, int32(kind), f.label("error")))
			}
		}
		a.add(asm.Ja.Label(a.byAddrs(f)))
	}

	a.at(f.label("error"))
	a.add(asm.Add.Imm(regL4, icmpLen))
	a.within(int32(f.header), a.byAddrs(f))
	a.load(stackQuote, int32(f.header), a.byAddrs(f))
	if f.ipv6 {
		a.quoted6()
	} else {
		a.quoted4()
	}
	a.quotedFlow(f)
}

// quoted4 finds the transport header of a quoted packet, or goes to the hash of
// the error's own addresses.
func (a *assembler) quoted4() {
	fail := a.byAddrs(family4)
	a.load8(asm.R1, stackQuote)
	a.add(
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.RSh.Imm(asm.R2, 4),
		asm.JNE.Imm(asm.R2, 4, fail),
		asm.And.Imm(asm.R1, 0xf),
		asm.LSh.Imm(asm.R1, 2),
		asm.JLT.Imm(asm.R1, ipv4Len, fail),
		asm.Add.Reg(regL4, asm.R1),
	)
	a.load16(stackQuote + 6)
	a.add(
		asm.And.Imm(asm.R1, ipv4FragmentOffset),
		asm.JNE.Imm(asm.R1, 0, fail),
	)
	a.load8(regProto, stackQuote+9)
}

// quoted6 is quoted4 for IPv6.
func (a *assembler) quoted6() {
	fail := a.byAddrs(family6)
	a.load8(asm.R1, stackQuote)
	a.add(
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 6, fail),
		asm.Add.Imm(regL4, ipv6Len),
	)
	a.load8(regProto, stackQuote+6)
	a.extensions(family6.label("quoted"), ipv6FragmentOffset, fail, fail)
}

// quotedFlow hashes the exchanged addresses and, where they count, ports of a
// quoted packet.
func (a *assembler) quotedFlow(f family) {
	ports := f.label("ports")
	for _, proto := range [...]uint8{protoTCP, protoUDP} {
		if a.usePorts(f, proto) {
			a.add(asm.JEq.Imm(regProto, int32(proto), ports))
		}
	}
	a.exchange(f.quoted, stackInput, f.addr)
	a.add(asm.Ja.Label(a.byAddrs(f)))

	if a.used(ports) {
		a.at(ports)
		a.within(portsLen, a.byAddrs(f))
		a.load(stackScratch, portsLen, a.byAddrs(f))
		a.exchange(f.quoted, stackInput, f.addr)
		a.exchange(stackScratch, stackInput+f.addrs, portsLen/2)
		a.add(asm.Ja.Label(hashLabel(f.tuple)))
	}
}

// exchange copies a pair of items of n bytes each, the second first.
func (a *assembler) exchange(from, to, n int) {
	size, step := asm.Half, 2
	switch {
	case n%8 == 0:
		size, step = asm.DWord, 8
	case n%4 == 0:
		size, step = asm.Word, 4
	}
	for i := 0; i < 2*n; i += step {
		a.add(
			asm.LoadMem(asm.R1, asm.RFP, int16(from+i), size),
			asm.StoreMem(asm.RFP, int16(to+(i+n)%(2*n)), asm.R1, size),
		)
	}
}

// hash computes the hash of the input into R0. The four lengths share one run
// of look-ups and leave it at different points.
func (a *assembler) hash(tablesFD int) {
	for _, n := range [...]int{family4.addrs, family4.tuple, family6.addrs, family6.tuple} {
		if a.used(hashLabel(n)) {
			a.at(hashLabel(n))
			a.add(
				asm.Mov.Imm(regProto, int32(n)),
				asm.Ja.Label("hash"),
			)
		}
	}
	if !a.used("hash") {
		return // no hash type is on
	}
	a.at("hash")
	a.add(asm.Mov.Imm(asm.R0, 0))
	var base int
	for i := range maxInput {
		if i == family4.addrs || i == family4.tuple || i == family6.addrs {
			a.add(asm.JEq.Imm(regProto, int32(i), labelQueue))
		}
		// An instruction's offset has 16 bits with a sign: it reaches 32 tables.
		if i%32 == 0 {
			base = i * tableLen
			a.add(asm.LoadMapValue(asm.R2, tablesFD, uint32(base)))
		}
		a.load8(asm.R1, stackInput+i) // a byte: the index needs no mask
		a.add(
			asm.LSh.Imm(asm.R1, 2),
			asm.Add.Reg(asm.R1, asm.R2),
			asm.LoadMem(asm.R1, asm.R1, int16(i*tableLen-base), asm.Word),
			asm.Xor.Reg(asm.R0, asm.R1),
		)
	}
	a.add(asm.Ja.Label(labelQueue))
}

// queue returns the queue of the bucket of the hash in R0.
func (a *assembler) queue(retaFD int) {
	a.at(labelBucket0)
	a.add(asm.Mov.Imm(asm.R0, 0))
	a.at(labelQueue)
	a.add(
		asm.LoadMapValue(asm.R1, retaFD, 0),
		asm.And.Imm(asm.R0, Buckets-1),
		asm.LSh.Imm(asm.R0, 2),
		asm.Add.Reg(asm.R1, asm.R0),
		asm.LoadMem(asm.R0, asm.R1, 0, asm.Word),
		asm.Return(),
	)
}
