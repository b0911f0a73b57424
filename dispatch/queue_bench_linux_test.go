package dispatch

import (
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// ethertypeExperiment is for local experiments (IEEE 802): the kernel drops such frames
// right behind the device.
const ethertypeExperiment = 0x88b5

// BenchmarkQueue reads and writes frames of a TAP, the vnet header included. What the kernel
// does with them elsewhere is left out: a packet socket makes what is read while the clock
// stands, and what is written has an EtherType that nobody takes.
func BenchmarkQueue(b *testing.B) {
	const name, waiting = "tap0", 256
	tapNetns(b)
	d := openForTest(b, DeviceConfig{
		Name: name, HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}, MTU: maxMTU, TxQueueLen: 2 * waiting,
	})
	d.Discard()
	host, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = unix.Close(host) })
	if err := unix.Bind(host, &unix.SockaddrLinklayer{Ifindex: d.index}); err != nil {
		b.Fatal(err)
	}
	q := d.Queue(0)
	for _, size := range []int{60, 1514, 60_000} {
		frame := make([]byte, VnetHeaderLen+size)
		ethernet := frame[VnetHeaderLen:]
		copy(ethernet, d.HostMAC())
		ethernet[12], ethernet[13] = ethertypeExperiment>>8, ethertypeExperiment&0xff
		b.Run(fmt.Sprintf("write/size=%d", size), func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if errno := q.Write(frame); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
		b.Run(fmt.Sprintf("writev/size=%d", size), func(b *testing.B) {
			iov := []unix.Iovec{{Base: &frame[0]}, {Base: &frame[VnetHeaderLen+ethernetLen]}}
			iov[0].SetLen(VnetHeaderLen + ethernetLen)
			iov[1].SetLen(size - ethernetLen)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, errno := q.Writev(iov); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
		b.Run(fmt.Sprintf("read/size=%d", size), func(b *testing.B) {
			buf := make([]byte, VnetHeaderLen+MaxFrameLen)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			left := 0
			for b.Loop() {
				if left == 0 {
					b.StopTimer()
					d.Discard() // what the kernel itself has to say
					for ; left < waiting; left++ {
						if _, err := unix.Write(host, ethernet); err != nil {
							b.Fatal(err)
						}
					}
					b.StartTimer()
				}
				left--
				if _, errno := q.Read(buf); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
	}
}

// BenchmarkVnetHeader reads, judges and writes a header.
func BenchmarkVnetHeader(b *testing.B) {
	wire := make([]byte, VnetHeaderLen)
	header := VnetHeader{Flags: VnetNeedsCsum, GSOType: VnetGSOTCPv4, HdrLen: 54, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}
	header.Encode(wire)
	b.ReportAllocs()
	for b.Loop() {
		header.Decode(wire)
		if err := header.Valid(MaxFrameLen); err != nil {
			b.Fatal(err)
		}
		header.Encode(wire)
	}
}
