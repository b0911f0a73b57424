package dispatch

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A mark: an Ethernet header, the queue, the cookie of its Marker, its number.
const (
	// etherTypeMarker is for local experiments (IEEE 802, clause 9.2.4). The
	// cookie tells our marks from what others make of it.
	etherTypeMarker = 0x88b5

	markerQueue  = ethernetLen
	markerCookie = markerQueue + 2
	markerNumber = markerCookie + 8
	markerLen    = markerNumber + 8
)

// Marker sends marks through the device from the kernel's side: a mark is a
// frame that the steering program puts into the queue it names. Who reads a
// queue and meets a mark has read everything that the kernel had put there
// before the mark was sent. There is no other way to know: a TAP queue does not
// tell how many frames it holds.
type Marker struct {
	fd     int
	to     unix.SockaddrLinklayer
	cookie [8]byte
	close  sync.Once
}

// OpenMarker returns a Marker for the device. It takes CAP_NET_RAW.
func (d *Device) OpenMarker() (*Marker, error) {
	const nothing = 0 // is what the socket receives
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, nothing)
	if err != nil {
		return nil, fmt.Errorf("packet socket for tap %q: %w", d.name, err)
	}
	m := &Marker{fd: fd, to: unix.SockaddrLinklayer{Ifindex: d.index, Halen: 6}}
	_, _ = rand.Read(m.cookie[:]) // never fails
	return m, nil
}

// Send puts mark number n into a queue, behind what is there. One thread at a
// time may call it.
func (m *Marker) Send(queue int, n uint64) error {
	b := make([]byte, 12, markerLen) // no addresses: it goes nowhere
	b = binary.BigEndian.AppendUint16(b, etherTypeMarker)
	b = binary.BigEndian.AppendUint16(b, uint16(queue))
	b = append(b, m.cookie[:]...)
	b = binary.BigEndian.AppendUint64(b, n)
	return os.NewSyscallError("sendto", unix.Sendto(m.fd, b, unix.MSG_DONTWAIT, &m.to))
}

// Number returns which mark a frame is; false if it is none of this Marker's.
func (m *Marker) Number(frame []byte) (uint64, bool) {
	if len(frame) < markerLen || binary.BigEndian.Uint16(frame[12:]) != etherTypeMarker || [8]byte(frame[markerCookie:]) != m.cookie {
		return 0, false
	}
	return binary.BigEndian.Uint64(frame[markerNumber:]), true
}

// Close releases the socket, once. No other method may be running.
func (m *Marker) Close() (err error) {
	m.close.Do(func() { err = unix.Close(m.fd) })
	return err
}
