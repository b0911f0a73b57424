package dispatch

import (
	"bytes"
	"errors"
	"testing"
)

func TestVnetHeaderEncoding(t *testing.T) {
	// The layout of struct virtio_net_hdr, written out by hand.
	wire := []byte{1, 0x81, 0x36, 0x01, 0xb4, 0x05, 0x22, 0x00, 0x10, 0x00}
	header := VnetHeader{
		Flags:      VnetNeedsCsum,
		GSOType:    VnetGSOTCPv4 | VnetGSOECN,
		HdrLen:     0x136,
		GSOSize:    1460,
		CsumStart:  34,
		CsumOffset: 16,
	}

	var decoded VnetHeader
	decoded.Decode(wire)
	if decoded != header {
		t.Errorf("Decode = %+v, want %+v", decoded, header)
	}
	encoded := bytes.Repeat([]byte{0xee}, VnetHeaderLen+1)
	header.Encode(encoded)
	if !bytes.Equal(encoded[:VnetHeaderLen], wire) {
		t.Errorf("Encode = %x, want %x", encoded[:VnetHeaderLen], wire)
	}
	if encoded[VnetHeaderLen] != 0xee {
		t.Error("Encode wrote behind the header")
	}
}

func TestVnetHeaderValid(t *testing.T) {
	const frameLen = 100
	gso := VnetHeader{
		Flags: VnetNeedsCsum, GSOType: VnetGSOTCPv4,
		HdrLen: 54, GSOSize: 1460, CsumStart: 34, CsumOffset: 16,
	}
	tests := []struct {
		name     string
		frameLen int
		edit     func(h *VnetHeader)
		want     error
	}{
		{"plain", frameLen, func(h *VnetHeader) { *h = VnetHeader{} }, nil},
		{"shortest frame", 14, func(h *VnetHeader) { *h = VnetHeader{} }, nil},
		{"frame too short", 13, func(h *VnetHeader) { *h = VnetHeader{} }, errVnetFrameShort},
		{"checked by the sender", frameLen, func(h *VnetHeader) { *h = VnetHeader{Flags: VnetDataValid} }, nil},
		{"flag of a later kernel", frameLen, func(h *VnetHeader) { *h = VnetHeader{Flags: 0x40} }, nil},

		{"tcp4", frameLen, func(*VnetHeader) {}, nil},
		{"tcp4 ecn", frameLen, func(h *VnetHeader) { h.GSOType |= VnetGSOECN }, nil},
		{"tcp6", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSOTCPv6 }, nil},
		{"udp", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSOUDPL4 }, nil},
		{"udp with ecn", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSOUDPL4 | VnetGSOECN }, errVnetGSOType},
		{"udp fragmentation", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSOUDP }, errVnetGSOType},
		{"type 2", frameLen, func(h *VnetHeader) { h.GSOType = 2 }, errVnetGSOType},
		{"ecn alone", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSOECN }, errVnetGSOType},

		{"gso without size", frameLen, func(h *VnetHeader) { h.GSOSize = 0 }, errVnetGSOSize},
		{"size without gso", frameLen, func(h *VnetHeader) { h.GSOType = VnetGSONone }, errVnetGSOSize},
		{"gso without checksum", frameLen, func(h *VnetHeader) { h.Flags = 0 }, errVnetGSOChecksum},

		{"checksum ends with frame", 52, func(h *VnetHeader) { h.HdrLen = 52 }, nil},
		{"checksum behind frame", 51, func(h *VnetHeader) { h.HdrLen = 51 }, errVnetChecksum},
		{"checksum in Ethernet header", frameLen, func(h *VnetHeader) { h.CsumStart = 13 }, errVnetChecksum},
		{"checksum offsets at their largest", frameLen, func(h *VnetHeader) { h.CsumStart, h.CsumOffset = 0xffff, 0xffff }, errVnetChecksum},
		{"header is the frame", frameLen, func(h *VnetHeader) { h.HdrLen = frameLen }, nil},
		{"header longer than frame", frameLen, func(h *VnetHeader) { h.HdrLen = frameLen + 1 }, errVnetHeaderLen},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			header := gso
			test.edit(&header)
			if got := header.Valid(test.frameLen); !errors.Is(got, test.want) {
				t.Errorf("%+v.Valid(%d) = %v, want %v", header, test.frameLen, got, test.want)
			}
		})
	}
}

func TestVnetHeaderAllocatesNothing(t *testing.T) {
	bad := VnetHeader{GSOType: 77}
	wire := make([]byte, VnetHeaderLen)
	allocs := testing.AllocsPerRun(100, func() {
		var h VnetHeader
		bad.Encode(wire)
		h.Decode(wire)
		if h.Valid(60) == nil {
			t.Error("GSO type 77 is valid")
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations, want none", allocs)
	}
}

// FuzzVnetHeaderValid checks the promise of Valid: no accepted header points
// outside the frame.
func FuzzVnetHeaderValid(f *testing.F) {
	f.Add([]byte{1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0}, 60)
	f.Add(make([]byte, VnetHeaderLen), 14)
	f.Fuzz(func(t *testing.T, wire []byte, frameLen int) {
		if len(wire) < VnetHeaderLen || frameLen < 0 || frameLen > MaxFrameLen {
			return
		}
		var h VnetHeader
		h.Decode(wire)
		again := make([]byte, VnetHeaderLen)
		h.Encode(again)
		if !bytes.Equal(again, wire[:VnetHeaderLen]) {
			t.Fatalf("%x became %x", wire[:VnetHeaderLen], again)
		}
		if h.Valid(frameLen) != nil {
			return
		}
		frame := make([]byte, frameLen)
		_ = frame[ethernetLen:]
		_ = frame[:h.HdrLen]
		if h.Flags&VnetNeedsCsum != 0 {
			at := int(h.CsumStart) + int(h.CsumOffset)
			_ = frame[h.CsumStart:][h.CsumOffset : h.CsumOffset+2]
			if at < ethernetLen {
				t.Fatalf("%+v puts a checksum into the Ethernet header", h)
			}
		}
	})
}

func TestOffloadsString(t *testing.T) {
	tests := []struct {
		offloads Offloads
		want     string
	}{
		{0, "none"},
		{OffloadChecksum, "csum"},
		{OffloadChecksum | OffloadUSO, "csum,uso"},
		{OffloadChecksum | OffloadTSO4 | OffloadTSO6 | OffloadECN | OffloadUSO, "csum,tso4,tso6,ecn,uso"},
	}
	for _, test := range tests {
		if got := test.offloads.String(); got != test.want {
			t.Errorf("Offloads(%#x).String() = %q, want %q", uint8(test.offloads), got, test.want)
		}
	}
}
