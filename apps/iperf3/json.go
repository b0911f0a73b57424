package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"runtime"
	"time"
)

// version is what we call ourselves in JSON; programs that read it look for the original's name and number.
const version = "iperf 3.12 (numastack)"

// document reports a test as one JSON object with the original's field names, when it is over.
type document struct {
	w   io.Writer // nil: kept for text
	doc struct {
		Start        docStart        `json:"start"`
		Intervals    []docInterval   `json:"intervals"`
		End          map[string]any  `json:"end"`
		ServerText   string          `json:"server_output_text,omitempty"`
		ServerOutput json.RawMessage `json:"server_output_json,omitempty"`
		Error        string          `json:"error,omitempty"`
	}
	p *params
}

var _ reporter = (*document)(nil)

type docStart struct {
	Connected    []docConnected `json:"connected"`
	Version      string         `json:"version"`
	SystemInfo   string         `json:"system_info"`
	Timestamp    *docTime       `json:"timestamp,omitempty"`
	ConnectingTo *docPeer       `json:"connecting_to,omitempty"`
	AcceptedFrom *docPeer       `json:"accepted_connection,omitempty"`
	Cookie       string         `json:"cookie,omitempty"`
	TestStart    *docTest       `json:"test_start,omitempty"`
}

type docConnected struct {
	Socket     int    `json:"socket"`
	LocalHost  string `json:"local_host"`
	LocalPort  int    `json:"local_port"`
	RemoteHost string `json:"remote_host"`
	RemotePort int    `json:"remote_port"`
}

type docTime struct {
	Time     string `json:"time"`
	Timesecs int64  `json:"timesecs"`
}

type docPeer struct {
	Host string `json:"host"`
	Port int    `json:"port"`
}

type docTest struct {
	Protocol      string `json:"protocol"`
	Streams       number `json:"num_streams"`
	BlockLen      number `json:"blksize"`
	Omit          number `json:"omit"`
	Duration      number `json:"duration"`
	Bytes         number `json:"bytes"`
	Blocks        number `json:"blocks"`
	Reverse       int    `json:"reverse"`
	Bidirectional int    `json:"bidir"`
	TargetBitrate number `json:"target_bitrate"`
}

// docFigures is one sample. The pointers are absent where a protocol or direction has no such figure.
type docFigures struct {
	Socket        int      `json:"socket,omitempty"`
	Start         float64  `json:"start"`
	End           float64  `json:"end"`
	Seconds       float64  `json:"seconds"`
	Bytes         int64    `json:"bytes"`
	BitsPerSecond float64  `json:"bits_per_second"`
	Retransmits   *int64   `json:"retransmits,omitempty"`
	Window        int64    `json:"snd_cwnd,omitempty"`
	JitterMS      *float64 `json:"jitter_ms,omitempty"`
	Lost          *int64   `json:"lost_packets,omitempty"`
	Packets       *int64   `json:"packets,omitempty"`
	LostPercent   *float64 `json:"lost_percent,omitempty"`
	OutOfOrder    *int64   `json:"out_of_order,omitempty"`
	Omitted       *bool    `json:"omitted,omitempty"`
	Sender        bool     `json:"sender"`
}

type docInterval struct {
	Streams []docFigures `json:"streams"`
	Sum     *docFigures  `json:"sum"`
	Reverse *docFigures  `json:"sum_bidir_reverse,omitempty"`
}

func (d *document) began(p *params, c cookie, _, remote net.Addr, asked string) {
	d.p = p
	ip, port := splitAddr(remote)
	now := time.Now()
	start := &d.doc.Start
	start.Version, start.SystemInfo = version, runtime.GOOS+" "+runtime.GOARCH+" "+runtime.Version()
	start.Timestamp = &docTime{now.UTC().Format(time.RFC1123), now.Unix()}
	start.Cookie = c.String()
	if asked != "" {
		start.ConnectingTo = &docPeer{asked, port}
	} else {
		start.AcceptedFrom = &docPeer{ip.String(), port}
	}
	protocol := "TCP"
	if p.UDP {
		protocol = "UDP"
	}
	start.TestStart = &docTest{
		protocol, p.Parallel, p.Len, p.Omit, p.Time, p.Num, p.BlockCount,
		bit(p.Reverse), bit(p.Bidirectional), p.Bandwidth,
	}
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (d *document) connected(streams []*stream) {
	for _, s := range streams {
		localIP, localPort := splitAddr(s.wire.LocalAddr())
		remoteIP, remotePort := splitAddr(s.wire.RemoteAddr())
		d.doc.Start.Connected = append(d.doc.Start.Connected,
			docConnected{s.tag, localIP.String(), localPort, remoteIP.String(), remotePort})
	}
}

func (d *document) interval(samples []sample) {
	var in docInterval
	var sums [2]sample
	for _, s := range samples {
		in.Streams = append(in.Streams, d.figures(s, s.stream.sends))
		sums[bit(s.stream.sends)].add(s)
	}
	for _, sends := range ways(samples[0].stream) {
		sum := sums[bit(sends)]
		if sum.stream == nil {
			continue
		}
		f := d.figures(sum, sends)
		f.Socket, f.Window = 0, 0
		if in.Sum == nil {
			in.Sum = &f
		} else {
			in.Reverse = &f
		}
	}
	for i := range in.Streams {
		in.Streams[i].Omitted = &samples[i].omitted
	}
	d.doc.Intervals = append(d.doc.Intervals, in)
}

// figures converts a sample taken by the sending or the receiving end.
func (d *document) figures(s sample, sender bool) docFigures {
	c := s.counters
	f := docFigures{
		Socket: s.stream.tag, Start: s.from.Seconds(), End: s.to.Seconds(), Seconds: (s.to - s.from).Seconds(),
		Bytes: c.bytes, BitsPerSecond: s.bitsPerSecond(), Sender: s.stream.sends,
	}
	switch {
	case d.p.UDP && sender:
		f.Packets = &c.packets
	case d.p.UDP:
		jitter, lost := c.jitter*1000, percent(c.lost, c.packets)
		f.JitterMS, f.Lost, f.Packets, f.LostPercent, f.OutOfOrder = &jitter, &c.lost, &c.packets, &lost, &c.outOfOrder
	case sender && c.retransmits >= 0:
		f.Retransmits, f.Window = &c.retransmits, c.window
	}
	return f
}

func (d *document) finished(s *summary) {
	end := map[string]any{}
	var streams []map[string]docFigures
	var sums [2][2]sample // our streams receive or send; as received, as sent
	for _, t := range s.totals {
		sent, received := &t.local, t.peer
		if !t.stream.sends {
			sent, received = received, sent
		}
		entry := map[string]docFigures{}
		if sent != nil {
			entry["sender"] = d.figures(*sent, true)
			sums[bit(t.stream.sends)][1].add(*sent)
		}
		if received != nil {
			entry["receiver"] = d.figures(*received, false)
			sums[bit(t.stream.sends)][0].add(*received)
		}
		if d.p.UDP {
			entry = map[string]docFigures{"udp": d.udp(sent, received)}
		}
		streams = append(streams, entry)
	}
	end["streams"] = streams
	suffix := ""
	for _, sends := range ways(s.totals[0].stream) {
		received, sent := &sums[bit(sends)][0], &sums[bit(sends)][1]
		if received.stream == nil && sent.stream == nil {
			continue
		}
		if sent.stream != nil {
			end["sum_sent"+suffix] = total0(d.figures(*sent, true))
		} else {
			sent = nil
		}
		if received.stream != nil {
			end["sum_received"+suffix] = total0(d.figures(*received, false))
		} else {
			received = nil
		}
		if d.p.UDP {
			end["sum"+suffix] = total0(d.udp(sent, received))
		}
		suffix = "_bidir_reverse"
	}
	cpu := map[string]float64{"host_total": s.cpu[0], "host_user": s.cpu[1], "host_system": s.cpu[2]}
	if s.theirs != nil {
		cpu["remote_total"], cpu["remote_user"], cpu["remote_system"] = s.theirs.CPUTotal, s.theirs.CPUUser, s.theirs.CPUSystem
		d.doc.ServerText, d.doc.ServerOutput = s.theirs.ServerOutputText, s.theirs.ServerOutputJSON
	}
	end["cpu_utilization_percent"] = cpu
	d.doc.End = end
	d.print()
}

// udp joins both ends: bytes and rate as sent, loss and jitter as received.
func (d *document) udp(sent, received *sample) docFigures {
	if sent == nil {
		return d.figures(*received, false)
	}
	f := d.figures(*sent, true)
	if received != nil {
		r := d.figures(*received, false)
		f.JitterMS, f.Lost, f.OutOfOrder = r.JitterMS, r.Lost, r.OutOfOrder
		lost := percent(*r.Lost, *f.Packets)
		f.LostPercent = &lost
	}
	return f
}

// total0 takes the stream's number out of a sum.
func total0(f docFigures) docFigures {
	f.Socket, f.Window = 0, 0
	return f
}

func (d *document) failed(err error) {
	d.doc.Error = "error - " + err.Error()
	d.print()
}

func (d *document) print() {
	if d.w == nil {
		return
	}
	if d.doc.Intervals == nil {
		d.doc.Intervals = []docInterval{}
	}
	if d.doc.End == nil {
		d.doc.End = map[string]any{}
	}
	enc := json.NewEncoder(d.w)
	enc.SetIndent("", "\t")
	if err := enc.Encode(&d.doc); err != nil {
		fmt.Fprintf(d.w, "{\"error\": %q}\n", err)
	}
}
