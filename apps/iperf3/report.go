package main

import (
	"fmt"
	"io"
	"net"
	"time"
)

// sample is what one stream moved in one interval, or in the whole test.
type sample struct {
	stream   *stream
	from, to time.Duration // since the part of the test that counts began
	counters counters
	omitted  bool
}

// total is one stream's whole test, from both ends.
type total struct {
	stream *stream
	local  sample
	peer   *sample // nil: not known here
}

// summary is a finished test.
type summary struct {
	p      *params
	totals []total
	theirs *results   // nil: not known here
	cpu    [3]float64 // ours: total, user, system, percent of one CPU
}

// reporter tells the user about one test. The test's goroutine calls it.
type reporter interface {
	// began says with whom, before there are streams; remote is the other end's address, as given or as seen.
	began(p *params, cookie cookie, local, remote net.Addr, asked string)
	connected(streams []*stream)
	interval(samples []sample)
	finished(s *summary)
	failed(err error)
}

// text reports in the layout of the original, which people and scripts know.
type text struct {
	w      io.Writer
	client bool

	p       *params
	counted bool   // some sender's retransmits are known
	local   net.IP // of the control connection: a shared datagram socket has no address of its own
}

var _ reporter = (*text)(nil)

const rule = "- - - - - - - - - - - - - - - - - - - - - - - - -"

func (t *text) began(p *params, _ cookie, local, remote net.Addr, asked string) {
	t.p = p
	t.local, _ = splitAddr(local)
	ip, port := splitAddr(remote)
	if !t.client {
		fmt.Fprintf(t.w, "Accepted connection from %v, port %d\n", ip, port)
		return
	}
	fmt.Fprintf(t.w, "Connecting to host %s, port %d\n", asked, port)
	if p.Reverse {
		fmt.Fprintf(t.w, "Reverse mode, remote host %s is sending\n", asked)
	}
}

func (t *text) connected(streams []*stream) {
	for _, s := range streams {
		localIP, localPort := splitAddr(s.wire.LocalAddr())
		remoteIP, remotePort := splitAddr(s.wire.RemoteAddr())
		if localIP == nil || localIP.IsUnspecified() {
			localIP = t.local
		}
		t.counted = t.counted || s.sends && s.read().retransmits >= 0
		fmt.Fprintf(t.w, "[%3d] local %v port %d connected to %v port %d\n", s.tag, localIP, localPort, remoteIP, remotePort)
	}
	t.header(false)
}

// header names the columns of intervals, or of the summary.
func (t *text) header(final bool) {
	role := ""
	if t.p.Bidirectional {
		role = "[Role]"
	}
	columns := ""
	switch sends := t.client != t.p.Reverse || t.p.Bidirectional; {
	case t.p.UDP && !final && sends && !t.p.Bidirectional:
		columns = "         Total Datagrams"
	case t.p.UDP:
		columns = "         Jitter    Lost/Total Datagrams"
	case t.counted && final:
		columns = "         Retr"
	case t.counted:
		columns = "         Retr  Cwnd"
	}
	fmt.Fprintf(t.w, "[ ID]%s Interval           Transfer     Bitrate%s\n", role, columns)
}

func (t *text) interval(samples []sample) {
	for _, sends := range ways(samples[0].stream) {
		var sum sample
		n := 0
		for _, s := range samples {
			if s.stream.sends != sends {
				continue
			}
			n++
			sum.add(s)
			t.line(fmt.Sprintf("%3d", s.stream.tag), sends, s, t.moment(s))
		}
		if n > 1 {
			sum.counters.window = 0
			t.line("SUM", sends, sum, t.moment(sum))
		}
	}
}

// ways is the order in which directions are reported: that of the first stream comes first.
func ways(first *stream) []bool { return []bool{first.sends, !first.sends} }

// moment is the last columns of an interval line.
func (t *text) moment(s sample) string {
	mark := ""
	if s.omitted {
		mark = "(omitted)"
	}
	c := s.counters
	switch {
	case t.p.UDP && s.stream.sends:
		pad := ""
		if t.p.Bidirectional {
			pad = "          " // below the jitter of the other direction
		}
		return fmt.Sprintf("%s%d  %s", pad, c.packets, mark)
	case t.p.UDP:
		return fmt.Sprintf("%s  %s", loss(c), mark)
	case c.retransmits >= 0 && c.window > 0:
		return fmt.Sprintf("%3d   %-11s  %s", c.retransmits, size(c.window), mark)
	case c.retransmits >= 0:
		return fmt.Sprintf("%3d             %s", c.retransmits, mark)
	default:
		return "                " + mark
	}
}

func (t *text) finished(s *summary) {
	for _, total := range s.totals {
		t.counted = t.counted || total.peer != nil && !total.stream.sends && total.peer.counters.retransmits >= 0
	}
	fmt.Fprintln(t.w, rule)
	t.header(true)
	for _, sends := range ways(s.totals[0].stream) {
		var sumSent, sumReceived sample
		n, known := 0, [2]bool{}
		for _, total := range s.totals {
			if total.stream.sends != sends {
				continue
			}
			n++
			sent, received := &total.local, total.peer
			if !sends {
				sent, received = received, sent
			}
			name := fmt.Sprintf("%3d", total.stream.tag)
			if sent != nil {
				known[0] = true
				sumSent.add(*sent)
				t.line(name, sends, *sent, t.ending(*sent, true))
			}
			if received != nil {
				known[1] = true
				sumReceived.add(*received)
				t.line(name, sends, *received, t.ending(*received, false))
			}
		}
		if n > 1 && known[0] {
			t.line("SUM", sends, sumSent, t.ending(sumSent, true))
		}
		if n > 1 && known[1] {
			t.line("SUM", sends, sumReceived, t.ending(sumReceived, false))
		}
	}
	if s.theirs != nil && t.client {
		if s.theirs.ServerOutputText != "" {
			fmt.Fprintf(t.w, "\nServer output:\n%s\n", s.theirs.ServerOutputText)
		} else if len(s.theirs.ServerOutputJSON) > 0 {
			fmt.Fprintf(t.w, "\nServer JSON output:\n%s\n", s.theirs.ServerOutputJSON)
		}
	}
	if t.client {
		fmt.Fprintln(t.w, "\niperf Done.")
	}
}

// ending is the last columns of a summary line.
func (t *text) ending(s sample, sender bool) string {
	role := "receiver"
	if sender {
		role = "sender"
	}
	c := s.counters
	switch {
	case t.p.UDP && sender:
		return loss(counters{packets: c.packets}) + "  " + role
	case t.p.UDP:
		return loss(c) + "  " + role
	case sender && c.retransmits >= 0:
		return fmt.Sprintf("%3d             %s", c.retransmits, role)
	default:
		return "                " + role
	}
}

// failed leaves the message to main and the server, which know where errors go.
func (*text) failed(error) {}

// line prints one row.
func (t *text) line(name string, sends bool, s sample, rest string) {
	role := ""
	if t.p.Bidirectional {
		side, way := 'S', "RX"
		if t.client {
			side = 'C'
		}
		if sends {
			way = "TX"
		}
		role = fmt.Sprintf("[%s-%c]", way, side)
	}
	fmt.Fprintf(t.w, "[%3s]%s %6.2f-%-6.2f sec  %11s  %10s/sec  %s\n", name, role,
		s.from.Seconds(), s.to.Seconds(), size(s.counters.bytes), rate(s.bitsPerSecond()), rest)
}

// bitsPerSecond is the sample's average rate.
func (s sample) bitsPerSecond() float64 {
	if s.to <= s.from {
		return 0
	}
	return float64(s.counters.bytes) * 8 / (s.to - s.from).Seconds()
}

// add makes s the sum of itself and one more stream's sample; jitter becomes the largest, retransmits stay unknown only
// while all are. The zero sample is the sum of none.
func (s *sample) add(more sample) {
	a, b := &s.counters, more.counters
	if s.stream == nil {
		a.retransmits = -1
	}
	s.stream, s.from, s.to, s.omitted = more.stream, more.from, max(s.to, more.to), more.omitted
	a.bytes += b.bytes
	a.packets += b.packets
	a.lost += b.lost
	a.outOfOrder += b.outOfOrder
	a.jitter = max(a.jitter, b.jitter)
	if b.retransmits >= 0 {
		a.retransmits = max(a.retransmits, 0) + b.retransmits
	}
}

// loss is the columns jitter, lost and total of a UDP line.
func loss(c counters) string {
	return fmt.Sprintf("%5.3f ms  %d/%d (%.2g%%)", c.jitter*1000, c.lost, c.packets, percent(c.lost, c.packets))
}

func percent(part, whole int64) float64 {
	if whole <= 0 {
		return 0
	}
	return 100 * float64(part) / float64(whole)
}

// size prints bytes in powers of 1024, rate bits per second in powers of 1000, both in three digits.
func size(bytes int64) string { return scaled(float64(bytes), 1024, "Bytes") }

func rate(bitsPerSecond float64) string { return scaled(bitsPerSecond, 1000, "bits") }

func scaled(v, step float64, unit string) string {
	prefixes := [...]string{"", "K", "M", "G", "T"}
	i := 0
	for ; v >= step && i < len(prefixes)-1; i++ {
		v /= step
	}
	switch {
	case v < 9.995:
		return fmt.Sprintf("%4.2f %s%s", v, prefixes[i], unit)
	case v < 99.95:
		return fmt.Sprintf("%4.1f %s%s", v, prefixes[i], unit)
	default:
		return fmt.Sprintf("%4.0f %s%s", v, prefixes[i], unit)
	}
}

// splitAddr returns the parts of a TCP or UDP address; both are zero for any other.
func splitAddr(addr net.Addr) (net.IP, int) {
	switch a := addr.(type) {
	case *net.TCPAddr:
		return a.IP, a.Port
	case *net.UDPAddr:
		return a.IP, a.Port
	default:
		return nil, 0
	}
}
