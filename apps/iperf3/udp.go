package main

import (
	"encoding/binary"
	"math"
	"time"
)

// A UDP stream starts with one datagram from the client, answered by one from the server. The four bytes are a number in
// the client's byte order, so each has two spellings; versions before 3.12 used other numbers.
var connectReplies = map[[4]byte][4]byte{
	{'9', '8', '7', '6'}:     {'6', '7', '8', '9'},
	{'6', '7', '8', '9'}:     {'9', '8', '7', '6'},
	{0x15, 0xcd, 0x5b, 0x07}: {0xb1, 0x68, 0xde, 0x3a}, // 123456789 and 987654321, little-endian
	{0x07, 0x5b, 0xcd, 0x15}: {0x3a, 0xde, 0x68, 0xb1}, // the same, big-endian
}

// connectMessage is what our client sends: the spelling of a little-endian machine, which every server answers.
var connectMessage = [4]byte{'9', '8', '7', '6'}

// connectReply returns the answer to a connect message, ok false when b is none.
func connectReply(b []byte) (reply [4]byte, ok bool) {
	if len(b) != 4 {
		return reply, false
	}
	reply, ok = connectReplies[[4]byte(b)]
	return reply, ok
}

// isConnectReply tells whether b answers a connect message.
func isConnectReply(b []byte) bool {
	if len(b) != 4 {
		return false
	}
	for _, reply := range connectReplies {
		if [4]byte(b) == reply {
			return true
		}
	}
	return false
}

// headerLen is the size of the header of each datagram: seconds, microseconds, then the packet's number from 1 on.
func headerLen(wide bool) int {
	if wide {
		return 16
	}
	return 12
}

// putHeader writes the header, big-endian. The clock's epoch is the sender's business: only differences are used.
func putHeader(b []byte, at time.Duration, sequence uint64, wide bool) {
	binary.BigEndian.PutUint32(b, uint32(at/time.Second))
	binary.BigEndian.PutUint32(b[4:], uint32(at%time.Second/time.Microsecond))
	if wide {
		binary.BigEndian.PutUint64(b[8:], sequence)
	} else {
		binary.BigEndian.PutUint32(b[8:], uint32(sequence))
	}
}

// parseHeader reads what putHeader wrote; ok is false for a datagram too short for it or without a valid number.
func parseHeader(b []byte, wide bool) (at time.Duration, sequence uint64, ok bool) {
	if len(b) < headerLen(wide) {
		return 0, 0, false
	}
	at = time.Duration(binary.BigEndian.Uint32(b))*time.Second +
		time.Duration(binary.BigEndian.Uint32(b[4:]))*time.Microsecond
	if wide {
		sequence = binary.BigEndian.Uint64(b[8:])
	} else {
		sequence = uint64(binary.BigEndian.Uint32(b[8:]))
	}
	return at, sequence, sequence > 0 && sequence <= math.MaxInt64
}

// arrivals judges the datagrams of one stream as they come in. Not safe for concurrent use.
type arrivals struct {
	packets    int64 // highest number seen: what the sender has sent as far as we know
	lost       int64 // gaps, less those filled late
	outOfOrder int64
	jitter     float64 // seconds
	transit    float64 // seconds, of the datagram before; the clocks' offset cancels out in differences
	timed      bool    // transit is set
}

// add counts one datagram sent at and received now, both in their own clock. It reports how the jitter estimate of
// RFC 1889 section 6.3.1 moves: a sixteenth of each change in transit time.
func (a *arrivals) add(at, now time.Duration, sequence int64) {
	if sequence > a.packets {
		a.lost += sequence - a.packets - 1
		a.packets = sequence
	} else {
		a.outOfOrder++
		if a.lost > 0 {
			a.lost--
		}
	}
	transit := (now - at).Seconds()
	if a.timed {
		a.jitter += (math.Abs(transit-a.transit) - a.jitter) / 16
	}
	a.transit, a.timed = transit, true
}
