package dispatch

import (
	"fmt"

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
// them. Input and scratch are aligned to eight bytes.
const (
	stackInput   = -64  // 36 bytes, and room for a transport header behind
	stackHeader4 = -76  // IPv4 header: addresses at byte 12
	stackHeader6 = -72  // IPv6 header: addresses at byte 8
	stackScratch = -128 // a quoted header or an extension header
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
	labelBucket0 = "bucket0" // cannot be classified
	labelHash    = "hash%d"  // hash so many bytes of input
	labelQueue   = "queue"   // the hash is in R0
)

// family is what differs between IPv4 and IPv6 once the packet's own header is
// behind us.
type family struct {
	name         string
	addrs, tuple int   // length of the hash input without and with ports
	icmp         int32 // protocol number
}

var (
	family4 = family{name: "ip4", addrs: portsAt4, tuple: portsAt4 + 4, icmp: protoICMP}
	family6 = family{name: "ip6", addrs: portsAt6, tuple: portsAt6 + 4, icmp: protoICMPv6}
)

func (f family) label(name string) string { return f.name + "." + name }
func (f family) hashAddrs() string        { return fmt.Sprintf(labelHash, f.addrs) }
func (f family) hashTuple() string        { return fmt.Sprintf(labelHash, f.tuple) }

// steeringInstructions assembles the steering program. It follows Parse, step
// by step; a test runs both on the same frames. There are no loops: the chain of
// extension headers and the hash are unrolled, so the length of the way through
// is bounded by construction and the verifier meets nothing it has to guess.
//
// The context is an skb that starts at its Ethernet header. Its bytes may be
// spread over pages, so they are copied by bpf_skb_load_bytes, the only helper
// used.
func steeringInstructions(tablesFD, retaFD int) asm.Instructions {
	a := &assembler{}
	a.ethernet()
	a.ipv4()
	a.transport(family4, a.quoted4)
	a.ipv6()
	a.transport(family6, a.quoted6)
	a.hash(tablesFD)
	a.queue(retaFD)
	return a.insns
}

// assembler collects instructions. A label given to at belongs to the next one.
type assembler struct {
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

// load copies n bytes from the frame at regL4 to the stack, or goes to fail.
func (a *assembler) load(stack int32, n int32, fail string) {
	a.add(asm.Mov.Reg(asm.R2, regL4))
	a.loadAtR2(stack, n, fail)
}

// loadFixed is load from a fixed offset.
func (a *assembler) loadFixed(offset, stack, n int32, fail string) {
	a.add(asm.Mov.Imm(asm.R2, offset))
	a.loadAtR2(stack, n, fail)
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
	a.loadFixed(12, stackScratch, 2, labelBucket0)
	a.load16(stackScratch)
	a.add(
		asm.JEq.Imm(asm.R1, etherTypeIPv4, "ip4"),
		asm.JEq.Imm(asm.R1, etherTypeIPv6, "ip6"),
		asm.Ja.Label(labelBucket0),
	)
}

func (a *assembler) ipv4() {
	a.at("ip4")
	a.loadFixed(ethernetLen, stackHeader4, ipv4Len, labelBucket0)
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
		asm.JNE.Imm(asm.R1, 0, family4.hashAddrs()),
	)
	a.load8(regProto, stackHeader4+9)
}

func (a *assembler) ipv6() {
	a.at("ip6")
	a.loadFixed(ethernetLen, stackHeader6, ipv6Len, labelBucket0)
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
	a.extensions(family6.label("outer"), labelBucket0)
}

// extensions moves regL4 and regProto behind the IPv6 extension headers. It
// goes to the hash of the addresses if the packet is a fragment, and to fail if
// the chain leaves the packet or is too long.
func (a *assembler) extensions(name, fail string) {
	done := name + ".done"
	for n := range MaxExtensionHeaders + 1 {
		option, fragment, next := fmt.Sprintf("%s.option%d", name, n), fmt.Sprintf("%s.fragment%d", name, n), fmt.Sprintf("%s.next%d", name, n)
		if n == MaxExtensionHeaders {
			option, fragment = fail, fail
		}
		a.add(
			asm.JEq.Imm(regProto, protoHopByHop, option),
			asm.JEq.Imm(regProto, protoRouting, option),
			asm.JEq.Imm(regProto, protoDestination, option),
			asm.JEq.Imm(regProto, protoFragment, fragment),
			asm.Ja.Label(done),
		)
		if n == MaxExtensionHeaders {
			break
		}
		a.at(option)
		a.within(extensionLen, fail)
		a.load(stackScratch, extensionLen, fail)
		a.load8(regProto, stackScratch)
		a.load8(asm.R1, stackScratch+1)
		a.add(
			asm.Add.Imm(asm.R1, 1),
			asm.LSh.Imm(asm.R1, 3),
			asm.Add.Reg(regL4, asm.R1),
			asm.JGT.Reg(regL4, regEnd, fail),
			asm.Ja.Label(next),
		)
		a.at(fragment)
		a.within(extensionLen, fail)
		a.load(stackScratch, extensionLen, fail)
		a.load8(regProto, stackScratch)
		a.load16(stackScratch + 2)
		a.add(
			asm.And.Imm(asm.R1, ipv6FragmentBits),
			asm.JNE.Imm(asm.R1, 0, family6.hashAddrs()),
			asm.Add.Imm(regL4, extensionLen),
		)
		a.at(next)
	}
	a.at(done)
}

// transport reads the ports of a whole packet, or has quoted find the flow that
// an ICMP error is about.
func (a *assembler) transport(f family, quoted func()) {
	portsAt := stackInput + f.addrs
	a.add(
		asm.JEq.Imm(regProto, protoTCP, f.label("tcp")),
		asm.JEq.Imm(regProto, protoUDP, f.label("udp")),
		asm.JEq.Imm(regProto, f.icmp, f.label("icmp")),
		asm.Ja.Label(f.hashAddrs()),
	)

	// A header that is long enough and ends inside the packet is there: the
	// checks of the lengths are checks of the bounds.
	a.at(f.label("tcp"))
	a.load(int32(portsAt), 13, labelBucket0) // up to the data offset
	a.load8(asm.R1, portsAt+12)
	a.add(
		asm.RSh.Imm(asm.R1, 4),
		asm.LSh.Imm(asm.R1, 2),
		asm.JLT.Imm(asm.R1, tcpLen, labelBucket0),
		asm.Add.Reg(asm.R1, regL4),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0),
		asm.Ja.Label(f.hashTuple()),
	)

	a.at(f.label("udp"))
	a.load(int32(portsAt), 6, labelBucket0) // up to the length
	a.load16(portsAt + 4)
	a.add(
		asm.JLT.Imm(asm.R1, udpLen, labelBucket0),
		asm.Add.Reg(asm.R1, regL4),
		asm.JGT.Reg(asm.R1, regEnd, labelBucket0),
		asm.Ja.Label(f.hashTuple()),
	)

	a.at(f.label("icmp"))
	a.within(icmpLen, labelBucket0)
	a.load(stackScratch, 1, labelBucket0)
	a.load8(asm.R1, stackScratch)
	quoted()
}

// quoted4 has the type of an ICMP message in R1.
func (a *assembler) quoted4() {
	f := family4
	for kind := range 256 {
		if icmpv4Error(uint8(kind)) {
			a.add(asm.JEq.Imm(asm.R1, int32(kind), f.label("error")))
		}
	}
	a.add(asm.Ja.Label(f.hashAddrs()))

	a.at(f.label("error"))
	a.add(asm.Add.Imm(regL4, icmpLen))
	a.within(ipv4Len, f.hashAddrs())
	a.load(stackScratch, ipv4Len, f.hashAddrs())
	a.load8(asm.R1, stackScratch)
	a.add(
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.RSh.Imm(asm.R2, 4),
		asm.JNE.Imm(asm.R2, 4, f.hashAddrs()),
		asm.And.Imm(asm.R1, 0xf),
		asm.LSh.Imm(asm.R1, 2),
		asm.JLT.Imm(asm.R1, ipv4Len, f.hashAddrs()),
		asm.Add.Reg(regL4, asm.R1),
	)
	a.exchange(stackScratch+12, stackInput, 4)
	a.load16(stackScratch + 6)
	a.add(
		asm.And.Imm(asm.R1, ipv4FragmentBits),
		asm.JNE.Imm(asm.R1, 0, f.hashAddrs()),
	)
	a.load8(regProto, stackScratch+9)
	a.quotedPorts(f)
}

// quoted6 has the type of an ICMPv6 message in R1.
func (a *assembler) quoted6() {
	f := family6
	a.add(
		asm.JLT.Imm(asm.R1, icmpv6FirstInformational, f.label("error")),
		asm.JLT.Imm(asm.R1, ndpFirst, f.hashAddrs()),
		asm.JGT.Imm(asm.R1, ndpLast, f.hashAddrs()),
		asm.Ja.Label(labelBucket0),
	)

	a.at(f.label("error"))
	a.add(asm.Add.Imm(regL4, icmpLen))
	a.within(ipv6Len, f.hashAddrs())
	a.load(stackScratch, ipv6Len, f.hashAddrs())
	a.load8(asm.R1, stackScratch)
	a.add(
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 6, f.hashAddrs()),
		asm.Add.Imm(regL4, ipv6Len),
	)
	a.exchange(stackScratch+8, stackInput, 16)
	a.load8(regProto, stackScratch+6)
	a.extensions(f.label("quoted"), f.hashAddrs())
	a.quotedPorts(f)
}

// quotedPorts adds the exchanged ports of a quoted TCP or UDP packet.
func (a *assembler) quotedPorts(f family) {
	ports := f.label("ports")
	a.add(
		asm.JEq.Imm(regProto, protoTCP, ports),
		asm.JEq.Imm(regProto, protoUDP, ports),
		asm.Ja.Label(f.hashAddrs()),
	)
	a.at(ports)
	a.within(4, f.hashAddrs())
	a.load(stackScratch, 4, f.hashAddrs())
	a.exchange(stackScratch, stackInput+f.addrs, 2)
	a.add(asm.Ja.Label(f.hashTuple()))
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
	lengths := [...]int{family4.addrs, family4.tuple, family6.addrs, family6.tuple}
	for _, n := range lengths {
		a.at(fmt.Sprintf(labelHash, n))
		a.add(
			asm.Mov.Imm(regProto, int32(n)),
			asm.Ja.Label("hash"),
		)
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
