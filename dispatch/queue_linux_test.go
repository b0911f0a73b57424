package dispatch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The two ends of the link in these tests.
var (
	tapHostAddr = netip.MustParsePrefix("192.0.2.1/24")
	tapIP       = net.IPv4(192, 0, 2, 2)
	tapMAC      = net.HardwareAddr{0x02, 0, 0, 0, 0, 2}
)

const (
	tapPort     = 7777
	tapReadWait = 2 * time.Second
	udp4Len     = ethernetLen + 20 + 8 // headers of UDP over IPv4 without options
)

// sendUDP lets the kernel send payload to us from a new socket; with
// segmentSize not 0 as a UDP_SEGMENT send (udp(7)).
func sendUDP(t *testing.T, d *Device, segmentSize int, payload []byte) {
	t.Helper()
	// A static neighbour: nobody answers ARP here.
	err := netlink.NeighSet(&netlink.Neigh{
		LinkIndex: d.index, State: netlink.NUD_PERMANENT, IP: tapIP, HardwareAddr: tapMAC,
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: tapIP, Port: tapPort})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if segmentSize != 0 {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var optErr error
		err = raw.Control(func(fd uintptr) {
			optErr = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, segmentSize)
		})
		if err := errors.Join(err, optErr); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Write(payload); err != nil {
		t.Fatal(err)
	}
}

// nextUDP returns the next UDP frame for tapPort and the queue it came on,
// and passes over what the kernel sends on its own (MLD, router solicitation).
func nextUDP(t *testing.T, d *Device) (queue int, header VnetHeader, frame []byte) {
	t.Helper()
	buf := make([]byte, VnetHeaderLen+MaxFrameLen)
	fds := make([]unix.PollFd, d.Queues())
	for i := range fds {
		fds[i] = unix.PollFd{Fd: int32(d.Queue(i).FD()), Events: unix.POLLIN}
	}
	for deadline := time.Now().Add(tapReadWait); time.Now().Before(deadline); {
		for i := range fds {
			n, errno := d.Queue(i).Read(buf)
			if errno == unix.EAGAIN {
				continue
			}
			if errno != 0 {
				t.Fatalf("read queue %d: %v", i, errno)
			}
			header.Decode(buf[:n])
			frame = buf[VnetHeaderLen:n]
			if err := header.Valid(len(frame)); err != nil {
				t.Fatalf("queue %d: %+v with %d bytes: %v", i, header, len(frame), err)
			}
			isUDP := len(frame) >= udp4Len && frame[12] == 8 && frame[13] == 0 && frame[ethernetLen+9] == unix.IPPROTO_UDP
			if isUDP && binary.BigEndian.Uint16(frame[ethernetLen+22:]) == tapPort {
				return i, header, frame
			}
		}
		if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
	}
	t.Fatalf("no frame within %v", tapReadWait)
	return 0, VnetHeader{}, nil
}

// frameFor returns a vnet header and a UDP frame for the host's port.
func frameFor(t *testing.T, d *Device, port int, header VnetHeader, payload []byte) []byte {
	t.Helper()
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP,
		SrcIP: tapIP, DstIP: tapHostAddr.Addr().AsSlice(),
	}
	udp := &layers.UDP{SrcPort: tapPort, DstPort: layers.UDPPort(port)}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: tapMAC, DstMAC: d.HostMAC(), EthernetType: layers.EthernetTypeIPv4},
		ip, udp, gopacket.Payload(payload))
	if err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, VnetHeaderLen, VnetHeaderLen+len(buf.Bytes()))
	header.Encode(frame)
	frame = append(frame, buf.Bytes()...)
	if header.Flags&VnetNeedsCsum != 0 {
		// Only the sum of the pseudo header: addresses, protocol, UDP length.
		f := frame[VnetHeaderLen:]
		sum := uint32(unix.IPPROTO_UDP) + uint32(binary.BigEndian.Uint16(f[ethernetLen+24:]))
		for at := ethernetLen + 12; at < ethernetLen+20; at += 2 {
			sum += uint32(binary.BigEndian.Uint16(f[at:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(f[ethernetLen+26:], uint16(sum&0xffff+sum>>16))
	}
	return frame
}

func TestQueueReadsPlainFrame(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{Name: "ns-test", Queues: 4, HostAddrs: []netip.Prefix{tapHostAddr}})
	payload := []byte("one datagram")
	sendUDP(t, d, 0, payload)
	_, header, frame := nextUDP(t, d)

	if header != (VnetHeader{}) {
		t.Errorf("vnet header = %+v, want nothing left to do without offloads", header)
	}
	packet := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if err := packet.ErrorLayer(); err != nil {
		t.Fatal(err.Error())
	}
	eth := packet.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	if !bytes.Equal(eth.SrcMAC, d.HostMAC()) || !bytes.Equal(eth.DstMAC, tapMAC) {
		t.Errorf("frame goes from %v to %v, want %v to %v", eth.SrcMAC, eth.DstMAC, d.HostMAC(), tapMAC)
	}
	udp := packet.Layer(layers.LayerTypeUDP).(*layers.UDP)
	if !bytes.Equal(udp.Payload, payload) {
		t.Errorf("payload = %q, want %q", udp.Payload, payload)
	}
	if udp.Checksum == 0 {
		t.Error("no checksum, although nothing was offloaded")
	}
}

func TestQueueReadsSuperFrame(t *testing.T) {
	const segments, segmentSize = 30, 1000
	payload := bytes.Repeat([]byte("0123456789"), segments*segmentSize/10)

	t.Run("offload", func(t *testing.T) {
		tapNetns(t)
		d := openForTest(t, DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{tapHostAddr}, Offload: true})
		if d.Offloads()&OffloadUSO == 0 {
			t.Skipf("the kernel grants %v: USO needs Linux 6.2", d.Offloads())
		}
		sendUDP(t, d, segmentSize, payload)
		_, header, frame := nextUDP(t, d)
		if len(frame) != udp4Len+len(payload) || !bytes.Equal(frame[udp4Len:], payload) {
			t.Errorf("frame of %d bytes, want all %d in one", len(frame), udp4Len+len(payload))
		}
		want := VnetHeader{
			Flags: VnetNeedsCsum, GSOType: VnetGSOUDPL4, HdrLen: header.HdrLen,
			GSOSize: segmentSize, CsumStart: ethernetLen + 20, CsumOffset: 6,
		}
		if header != want {
			t.Errorf("vnet header = %+v, want %+v", header, want)
		}
		if header.HdrLen < udp4Len {
			t.Errorf("header length %d, want at least %d", header.HdrLen, udp4Len)
		}
	})

	t.Run("no offload", func(t *testing.T) {
		tapNetns(t)
		// What an earlier owner asked for must not stay on.
		earlier := openForTest(t, DeviceConfig{Name: "ns-test", Persist: true, Offload: true})
		if err := earlier.Close(); err != nil {
			t.Fatal(err)
		}
		d := openForTest(t, DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{tapHostAddr}})
		sendUDP(t, d, segmentSize, payload)
		var got []byte
		for range segments {
			_, header, frame := nextUDP(t, d)
			if len(frame) > ethernetLen+d.MTU() || header != (VnetHeader{}) {
				t.Fatalf("frame of %d bytes with %+v, want at most %d bytes and nothing to do", len(frame), header, ethernetLen+d.MTU())
			}
			got = append(got, frame[udp4Len:]...)
		}
		if !bytes.Equal(got, payload) {
			t.Error("the frames do not add up to what was sent")
		}
	})
}

func TestQueueWrites(t *testing.T) {
	big := bytes.Repeat([]byte("abcdefgh"), 300)
	tests := []struct {
		name    string
		header  VnetHeader
		payload []byte
		want    [][]byte // datagrams that the kernel's socket gets
	}{
		{"complete", VnetHeader{}, []byte("hello"), [][]byte{[]byte("hello")}},
		{
			"partial checksum",
			VnetHeader{Flags: VnetNeedsCsum, CsumStart: ethernetLen + 20, CsumOffset: 6},
			[]byte("hello"),
			[][]byte{[]byte("hello")},
		},
		{
			"segments",
			VnetHeader{
				Flags: VnetNeedsCsum, GSOType: VnetGSOUDPL4, HdrLen: udp4Len,
				GSOSize: 1000, CsumStart: ethernetLen + 20, CsumOffset: 6,
			},
			big,
			[][]byte{big[:1000], big[1000:2000], big[2000:]},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tapNetns(t)
			d := openForTest(t, DeviceConfig{Name: "ns-test", Queues: 2, HostAddrs: []netip.Prefix{tapHostAddr}})
			conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: tapHostAddr.Addr().AsSlice()})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			frame := frameFor(t, d, conn.LocalAddr().(*net.UDPAddr).Port, test.header, test.payload)

			writes := []struct {
				name  string
				write func() syscall.Errno
			}{
				{"Write", func() syscall.Errno { return d.Queue(1).Write(frame) }},
				{"Writev", func() syscall.Errno {
					// Headers and payload apart, as a stack has them.
					iov := []unix.Iovec{{Base: &frame[0]}, {Base: &frame[VnetHeaderLen+udp4Len]}}
					iov[0].SetLen(VnetHeaderLen + udp4Len)
					iov[1].SetLen(len(frame) - VnetHeaderLen - udp4Len)
					n, errno := d.Queue(1).Writev(iov)
					if errno == 0 && n != len(frame) {
						t.Errorf("Writev = %d bytes, want %d", n, len(frame))
					}
					return errno
				}},
			}
			for _, w := range writes {
				if errno := w.write(); errno != 0 {
					t.Fatalf("%s: %v", w.name, errno)
				}
				for i, want := range test.want {
					if err := conn.SetReadDeadline(time.Now().Add(tapReadWait)); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 4000)
					n, from, err := conn.ReadFromUDP(buf)
					if err != nil {
						t.Fatalf("%s: datagram %d: %v", w.name, i, err)
					}
					if !bytes.Equal(buf[:n], want) || !from.IP.Equal(tapIP) {
						t.Errorf("%s: datagram %d has %d bytes from %v, want %d from %v", w.name, i, n, from, len(want), tapIP)
					}
				}
			}
		})
	}
}

// TestQueueErrnos pins down the table in the comment of Queue.
func TestQueueErrnos(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{tapHostAddr}})
	q := d.Queue(0)
	frame := frameFor(t, d, 9, VnetHeader{}, []byte("discard"))
	wrongHeader := frameFor(t, d, 9, VnetHeader{GSOType: 77, GSOSize: 1}, []byte("discard"))
	buf := make([]byte, VnetHeaderLen+MaxFrameLen)

	read := func() syscall.Errno {
		for range 100 { // what the kernel sent on its own
			if _, errno := q.Read(buf); errno != 0 {
				return errno
			}
		}
		t.Fatal("the queue does not run empty")
		return 0
	}
	expect := func(state string, wantRead, wantWrite syscall.Errno) {
		t.Helper()
		if got := read(); got != wantRead {
			t.Errorf("%s: Read = %v, want %v", state, got, wantRead)
		}
		if got := q.Write(frame); got != wantWrite {
			t.Errorf("%s: Write = %v, want %v", state, got, wantWrite)
		}
		iov := []unix.Iovec{{Base: &frame[0]}}
		iov[0].SetLen(len(frame))
		if _, got := q.Writev(iov); got != wantWrite {
			t.Errorf("%s: Writev = %v, want %v", state, got, wantWrite)
		}
	}

	expect("up", unix.EAGAIN, 0)
	for name, bad := range map[string][]byte{
		"empty":              {},
		"vnet header alone":  make([]byte, VnetHeaderLen),
		"13 bytes":           make([]byte, VnetHeaderLen+13),
		"wrong vnet header":  wrongHeader,
		"less than a header": make([]byte, VnetHeaderLen-1),
	} {
		if got := q.Write(bad); got != unix.EINVAL {
			t.Errorf("Write of %s = %v, want EINVAL", name, got)
		}
	}

	link := readLink(t, "ns-test")
	if err := netlink.LinkSetDown(link); err != nil {
		t.Fatal(err)
	}
	expect("down", unix.EAGAIN, unix.EIO)
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	expect("up again", unix.EAGAIN, 0)

	if err := netlink.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	expect("deleted", unix.EBADFD, unix.EBADFD)
	fds := []unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 0); n != 1 || err != nil || fds[0].Revents&unix.POLLERR == 0 {
		t.Errorf("deleted: poll = %d, %v with events %#x, want POLLERR", n, err, fds[0].Revents)
	}
	if _, err := d.Dropped(); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("deleted: Dropped error = %v, want one that says not found", err)
	}

	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	expect("closed", unix.EBADF, unix.EBADF)
}

func TestQueueAllocatesNothing(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{Name: "ns-test", HostAddrs: []netip.Prefix{tapHostAddr}})
	q := d.Queue(0)
	frame := frameFor(t, d, 9, VnetHeader{}, []byte("discard"))
	buf := make([]byte, VnetHeaderLen+MaxFrameLen)
	iov := []unix.Iovec{{Base: &frame[0]}}
	iov[0].SetLen(len(frame))
	allocs := testing.AllocsPerRun(50, func() {
		_, _ = q.Read(buf)
		if errno := q.Write(frame); errno != 0 {
			t.Errorf("write: %v", errno)
		}
		if _, errno := q.Writev(iov); errno != 0 {
			t.Errorf("writev: %v", errno)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations, want none", allocs)
	}
}

// What the kernel put into the queues before it steered is thrown away; what
// comes later is not.
func TestDiscard(t *testing.T) {
	tapNetns(t)
	d := openForTest(t, DeviceConfig{
		Name: "tap0", HostAddrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}, Queues: 2,
	})
	for range 3 {
		sendUDP(t, d, 0, []byte("early"))
	}
	d.Discard()
	sendUDP(t, d, 0, []byte("late"))
	if _, _, frame := nextUDP(t, d); !bytes.HasSuffix(frame, []byte("late")) {
		t.Errorf("read %q after Discard, want what was sent later", frame)
	}
}
