package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"sync/atomic"
)

// received counts what UDP's discard of this process got: nothing tells the client of a
// datagram that was lost.
var received counter

type counter struct{ bytes, datagrams atomic.Int64 }

func (c *counter) add(bytes, datagrams int) {
	c.bytes.Add(int64(bytes))
	c.datagrams.Add(int64(datagrams))
}

// counts is what counter has counted, as tellReceived writes it.
type counts struct {
	Bytes     int64 `json:"bytes"`
	Datagrams int64 `json:"datagrams"`
}

// tellReceived writes what was received so far as JSON whenever the client sends a byte.
func tellReceived(c net.Conn) {
	answer := json.NewEncoder(c)
	for one := make([]byte, 1); ; {
		if _, err := c.Read(one); err != nil {
			return
		}
		if err := answer.Encode(counts{received.bytes.Load(), received.datagrams.Load()}); err != nil {
			return
		}
	}
}

// burst is what a client asks UDP's chargen for in one datagram: so many datagrams of
// so many bytes each. Small requests for large answers are for a namespace of one's own only.
type burst struct {
	count, size int
	// gso asks for frames of many datagrams, from those who can make them.
	gso bool
}

const (
	burstLen        = 5 // bytes of a request
	maxBurstCount   = 1024
	maxDatagramSize = 65535 - udpHeaders
)

func (b burst) append(to []byte) []byte {
	to = binary.BigEndian.AppendUint16(to, uint16(b.count))
	to = binary.BigEndian.AppendUint16(to, uint16(b.size))
	if b.gso {
		return append(to, 1)
	}
	return append(to, 0)
}

func parseBurst(request []byte) (burst, error) {
	if len(request) != burstLen {
		return burst{}, fmt.Errorf("request for a burst: %d bytes, want %d", len(request), burstLen)
	}
	b := burst{int(binary.BigEndian.Uint16(request)), int(binary.BigEndian.Uint16(request[2:])), request[4] == 1}
	if b.count > maxBurstCount || b.size > maxDatagramSize {
		return burst{}, fmt.Errorf("request for a burst: %d datagrams of %d bytes, want at most %d of %d",
			b.count, b.size, maxBurstCount, maxDatagramSize)
	}
	return b, nil
}

// segmenter is a socket that passes many datagrams of one size per system call, as one
// frame where the link offloads segmentation.
type segmenter interface {
	// readSegments reads what waits at once and tells how many datagrams it was.
	readSegments(b []byte) (n, datagrams int, err error)
	// writeSegments sends b as datagrams of so many bytes each.
	writeSegments(b []byte, size int, to net.Addr) error
}

// discardDatagrams counts what it reads.
func discardDatagrams(c net.PacketConn) error {
	buf := make([]byte, maxDatagramSize)
	s, many := c.(segmenter)
	for {
		var (
			n         int
			datagrams = 1
			err       error
		)
		if many {
			n, datagrams, err = s.readSegments(buf)
		} else {
			n, _, err = c.ReadFrom(buf)
		}
		if err != nil {
			return err
		}
		received.add(n, datagrams)
	}
}

// chargenDatagrams answers each request with the burst it asks for. UDP: what cannot be
// sent is lost.
func chargenDatagrams(c net.PacketConn) error {
	buf := make([]byte, burstLen+1) // a longer request shows
	s, many := c.(segmenter)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		ask, err := parseBurst(buf[:n])
		if err != nil {
			continue
		}
		for ask.count > 0 {
			n := 1
			if many && ask.gso {
				n = ask.perFrame()
				_ = s.writeSegments(chargenBytes[:n*ask.size], ask.size, from)
			} else {
				_, _ = c.WriteTo(chargenBytes[:ask.size], from)
			}
			ask.count -= n
		}
	}
}

// maxSegments is how many datagrams the kernel takes in one send: UDP_MAX_SEGMENTS of
// linux/udp.h, as it was before Linux 6.9.
const maxSegments = 64

// perFrame returns how many of the datagrams go into one frame with segmentation offload.
func (b burst) perFrame() int {
	return max(min(b.count, maxDatagramSize/max(b.size, 1), maxSegments), 1)
}
