package shard

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"numastack/dispatch"
)

// segment describes a TCP packet that a stack sends.
type segment struct {
	port    uint16 // of the peer
	seq     uint32
	ack     uint32
	flags   header.TCPFlags
	payload int
	options []byte
}

var (
	timestamp = append([]byte{header.TCPOptionNOP, header.TCPOptionNOP}, header.TCPOptionTS, header.TCPOptionTSLength, 0, 0, 0, 1, 0, 0, 0, 2)
	sackBlock = []byte{header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionSACK, 10, 0, 0, 0, 5, 0, 0, 0, 9}
)

func (s segment) packet() *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: 128,
		Payload:            buffer.MakeWithData(make([]byte, s.payload)),
	})
	tcp := header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize + len(s.options)))
	tcp.Encode(&header.TCPFields{
		SrcPort: 7, DstPort: s.port, SeqNum: s.seq, AckNum: s.ack, Flags: s.flags,
		DataOffset: uint8(header.TCPMinimumSize + len(s.options)),
	})
	copy(tcp[header.TCPMinimumSize:], s.options)
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	ip := header.IPv4(pkt.NetworkHeader().Push(header.IPv4MinimumSize))
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(pkt.Size()), Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: tcpipAddress(addrA), DstAddr: tcpipAddress(netip.MustParseAddr("10.1.0.9")),
	})
	pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
	header.Ethernet(pkt.LinkHeader().Push(ethernetLen)).Encode(&header.EthernetFields{Type: header.IPv4ProtocolNumber})
	return pkt
}

func TestSupersededACKs(t *testing.T) {
	const ack = header.TCPFlagAck
	for _, test := range []struct {
		name string
		sent []segment
		want []int // which of them leave
	}{
		{"answer after its ACK", []segment{{ack: 5, flags: ack}, {ack: 5, flags: ack | header.TCPFlagPsh, payload: 3}}, []int{1}},
		{"with timestamps", []segment{{ack: 5, flags: ack, options: timestamp}, {ack: 5, flags: ack, payload: 3, options: timestamp}}, []int{1}},
		{"later ACK", []segment{{ack: 5, flags: ack}, {ack: 6, flags: ack}, {ack: 7, flags: ack}}, []int{2}},
		{"later ACK beyond the wrap", []segment{{ack: 1<<32 - 1, flags: ack}, {ack: 3, flags: ack}}, []int{1}},
		{"earlier ACK does not supersede", []segment{{ack: 6, flags: ack}, {ack: 5, flags: ack, payload: 3}}, []int{0, 1}},
		{"duplicate ACKs tell of a loss", []segment{{ack: 5, flags: ack}, {ack: 5, flags: ack}, {ack: 5, flags: ack}}, []int{0, 1, 2}},
		{"SACK blocks tell of a loss", []segment{{ack: 5, flags: ack, options: sackBlock}, {ack: 6, flags: ack, payload: 3}}, []int{0, 1}},
		{"FIN is no pure ACK", []segment{{ack: 5, flags: ack | header.TCPFlagFin}, {ack: 6, flags: ack}}, []int{0, 1}},
		{"data is no pure ACK", []segment{{ack: 5, flags: ack, payload: 1}, {ack: 6, flags: ack}}, []int{0, 1}},
		{"RST without ACK", []segment{{ack: 5, flags: ack}, {ack: 9, flags: header.TCPFlagRst}}, []int{0, 1}},
		{"ECN echo is kept", []segment{{ack: 5, flags: ack | header.TCPFlags(0x40)}, {ack: 6, flags: ack, payload: 1}}, []int{0, 1}},
		{"the probe of a closed window", []segment{{seq: 9, ack: 5, flags: ack}, {seq: 8, ack: 5, flags: ack, payload: 1}}, []int{0, 1}},
		{"a retransmission", []segment{{seq: 2, ack: 6, flags: ack}, {seq: 1<<32 - 1, ack: 6, flags: ack, payload: 3}}, []int{0, 1}},
		{"another flow", []segment{{port: 1, ack: 5, flags: ack}, {port: 2, ack: 6, flags: ack, payload: 1}}, []int{0, 1}},
		{"another flow in the same slot", []segment{{port: 1, ack: 5, flags: ack}, {port: 1 + ackSlots, ack: 6, flags: ack, payload: 1}}, []int{0, 1}},
		{"two flows at once", []segment{
			{port: 1, ack: 5, flags: ack},
			{port: 2, ack: 5, flags: ack},
			{port: 1, ack: 5, flags: ack, payload: 1},
			{port: 2, ack: 5, flags: ack, payload: 1},
		}, []int{2, 3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fds[0]) //nolint:errcheck // a socket of the test
			defer unix.Close(fds[1]) //nolint:errcheck // a socket of the test
			var counters Counters
			tx := newTxQueue(dispatch.NewQueue(fds[0]), Offloads{TCP: true, UDP: true}, &counters)
			for i, s := range test.sent {
				pkt := s.packet()
				header.TCP(pkt.TransportHeader().Slice()).SetWindowSize(uint16(i)) // tells them apart
				tx.push(pkt, nil)
				pkt.DecRef()
			}
			tx.flush()
			var left []int
			b := make([]byte, 2048)
			for {
				n, err := unix.Read(fds[1], b)
				if err != nil {
					break
				}
				frame := b[dispatch.VnetHeaderLen:n]
				left = append(left, int(header.TCP(frame[ethernetLen+header.IPv4MinimumSize:]).WindowSize()))
			}
			if len(left) != len(test.want) {
				t.Fatalf("segments %v left, want %v", left, test.want)
			}
			for i := range left {
				if left[i] != test.want[i] {
					t.Fatalf("segments %v left, want %v", left, test.want)
				}
			}
			if want := uint64(len(test.sent) - len(test.want)); counters.AcksSuperseded != want {
				t.Errorf("counted %d superseded ACKs, want %d", counters.AcksSuperseded, want)
			}
		})
	}
}

// TestOneFramePerAnswer: the ACK of a request rides on the answer.
func TestOneFramePerAnswer(t *testing.T) {
	a, b := steppedPair(t)
	listenStepped(t, b, 7, echoHandler())
	client := dialStepped(t, a, netip.AddrPortFrom(addrB, 7), &testHandler{})
	settle(t, a, b)
	before := b.counters.TxFrames
	const requests = 50
	for range requests {
		if _, err := client.Write([]byte("request")); err != nil {
			t.Fatal(err)
		}
		settle(t, a, b)
	}
	if sent := b.counters.TxFrames - before; sent != requests {
		t.Errorf("%d frames for %d answers", sent, requests)
	}
}
