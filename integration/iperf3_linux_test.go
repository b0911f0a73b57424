package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"numastack/stack"
)

// soakVar makes the soak tests long when it is not empty.
const soakVar = "NUMASTACK_SOAK"

// soakTime is how long a soak test puts load on a stack.
func soakTime() time.Duration {
	soak := os.Getenv(soakVar)
	if d, err := time.ParseDuration(soak); err == nil {
		return d
	}
	return 3 * time.Second
}

// iperf3Server is our iperf3 on a numastack in a process of its own.
type iperf3Server struct {
	*process
	subnet
	stats string // file for the counters
}

func startIperf3(t *testing.T, flags ...string) *iperf3Server {
	t.Helper()
	needNetwork(t)
	if _, err := exec.LookPath("iperf3"); err != nil {
		t.Skipf("needs the original iperf3 as a client: %v", err)
	}
	s := &iperf3Server{subnet: newSubnet(), stats: filepath.Join(t.TempDir(), "stats.json")}
	args := append([]string{"-s", "-stats-json", s.stats, "-tap", s.device}, flags...)
	for _, p := range s.prefixes(s.self4, s.self6, 0) {
		args = append(args, "-addr", p.String())
	}
	for _, p := range s.prefixes(s.host4, s.host6, 0) {
		args = append(args, "-host", p.String())
	}
	s.process = start(t, "", "Server listening", "iperf3", args...)
	return s
}

// figures is what we check of the client's JSON. The sums of a direction that
// a test does not have are missing, and so 0.
type figures struct {
	Error string
	End   struct {
		Sent            sum `json:"sum_sent"`
		Received        sum `json:"sum_received"`
		ReverseSent     sum `json:"sum_sent_bidir_reverse"`
		ReverseReceived sum `json:"sum_received_bidir_reverse"`
		Datagrams       sum `json:"sum"`
	}
}

type sum struct {
	Bytes       float64
	Bits        float64 `json:"bits_per_second"`
	LostPercent float64 `json:"lost_percent"`
}

// client runs the original iperf3.
func (s *iperf3Server) client(t *testing.T, host, args string, limit time.Duration) figures {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iperf3", append([]string{"-J", "-c", host}, strings.Fields(args)...)...)
	out, err := cmd.Output() // the exit status says less than the JSON
	if ctx.Err() != nil {
		t.Fatalf("iperf3 %s is not done after %v", args, limit)
	}
	var f figures
	if jsonErr := json.Unmarshal(out, &f); jsonErr != nil {
		t.Fatalf("iperf3 %s: %v; its JSON: %v\n%s", args, err, jsonErr, out)
	}
	if f.Error != "" || err != nil {
		t.Fatalf("iperf3 %s: %v: %s", args, err, f.Error)
	}
	return f
}

// finish ends the server and checks what it has left.
func (s *iperf3Server) finish(t *testing.T) stack.Stats {
	t.Helper()
	time.Sleep(200 * time.Millisecond) // the last acknowledgements
	s.terminate(t)
	text, err := os.ReadFile(s.stats)
	if err != nil {
		t.Fatal(err)
	}
	var stats stack.Stats
	if err := json.Unmarshal(text, &stats); err != nil {
		t.Fatal(err)
	}
	for _, c := range stats.Shards {
		if c.ConnsOpen != 0 || c.BuffersLent != 0 {
			t.Errorf("shard %d: %d connections open and %d buffers lent at the end, want 0", c.Shard, c.ConnsOpen, c.BuffersLent)
		}
		if c.TxErrors != 0 || c.RingFull != 0 && s.missteers(stats) == 0 {
			t.Errorf("shard %d: %d frames refused by the device, %d lost on full rings", c.Shard, c.TxErrors, c.RingFull)
		}
	}
	return stats
}

func (*iperf3Server) missteers(stats stack.Stats) (n uint64) {
	for _, c := range stats.Shards {
		n += c.Missteered
	}
	return n
}

// TestIperf3 runs the original client in its ways of measuring.
func TestIperf3(t *testing.T) {
	s := startIperf3(t, "-shards", "2")
	const least = 10e6 // bits per second and direction; the machine may be busy
	for _, test := range []struct {
		name, host, args   string
		forward, backwards bool
	}{
		{"TCP", s.self4.String(), "-t 1", true, false},
		{"TCP reverse", s.self4.String(), "-t 1 -R", true, false},
		{"TCP reverse without a copy", s.self4.String(), "-t 1 -R -Z", true, false},
		{"TCP both ways", s.self4.String(), "-t 1 --bidir -P 8", true, true},
		{"TCP IPv6", s.self6.String(), "-t 1 -6", true, false},
		{"TCP IPv6 both ways", s.self6.String(), "-t 1 -6 --bidir -P 4", true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			end := s.client(t, test.host, test.args, patience).End
			if test.forward && (end.Sent.Bits < least || end.Received.Bits < least) {
				t.Errorf("sent %.0f and received %.0f bit/s, want at least %.0f", end.Sent.Bits, end.Received.Bits, least)
			}
			if test.backwards && (end.ReverseSent.Bits < least || end.ReverseReceived.Bits < least) {
				t.Errorf("in reverse sent %.0f and received %.0f bit/s, want at least %.0f", end.ReverseSent.Bits, end.ReverseReceived.Bits, least)
			}
		})
	}
	for _, test := range []struct{ name, host, args string }{
		{"UDP", s.self4.String(), "-u -t 1 -b 50M"},
		{"UDP reverse", s.self4.String(), "-u -t 1 -b 50M -R"},
		{"UDP IPv6", s.self6.String(), "-u -t 1 -b 50M -6"},
	} {
		t.Run(test.name, func(t *testing.T) {
			end := s.client(t, test.host, test.args, patience).End
			// A tenth of what was asked for, and most of it arriving, is far
			// from what works and near to what a busy machine can do.
			if end.Datagrams.Bits < 5e6 || end.Datagrams.LostPercent > 20 {
				t.Errorf("%.0f bit/s with %.1f %% lost, want 50 Mbit/s or near it", end.Datagrams.Bits, end.Datagrams.LostPercent)
			}
		})
	}
	s.finish(t)
}

// TestSoakIperf3 loads two shards in both directions, for long if asked to.
func TestSoakIperf3(t *testing.T) {
	for _, steering := range []stack.Steering{stack.SteeringUser, stack.SteeringKernel} {
		t.Run(steering.String(), func(t *testing.T) {
			if steering == stack.SteeringKernel && os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			s := startIperf3(t, "-shards", "2", "-steering", steering.String())
			seconds := int(soakTime().Seconds())
			end := s.client(t, s.self4.String(), fmt.Sprintf("--bidir -P 8 -t %d", seconds), soakTime()+patience).End
			for name, direction := range map[string]sum{"received": end.Received, "received in reverse": end.ReverseReceived} {
				if direction.Bytes < 1e6*float64(seconds) {
					t.Errorf("%s %.0f bytes in %d s, want more", name, direction.Bytes, seconds)
				}
			}
			stats := s.finish(t)
			t.Logf("%.1f Gbit/s in, %.1f out, kernel dropped %d frames", end.Received.Bits/1e9, end.ReverseReceived.Bits/1e9, stats.KernelDropped)
		})
	}
}

// TestSoakDoor loads the door for any goroutine in both directions, and looks
// for goroutines and buffers that stay.
func TestSoakDoor(t *testing.T) {
	const flows = 8
	for _, steering := range []stack.Steering{stack.SteeringUser, stack.SteeringKernel} {
		t.Run(steering.String(), func(t *testing.T) {
			before := runtime.NumGoroutine()
			r := open(t, stack.Config{Shards: 2, Steering: steering})
			l, err := r.Listen("tcp", ":"+itoa(chargenPort))
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() { soakServer(l, &serving) })

			var clients sync.WaitGroup
			failures := make(chan error, flows)
			families := r.families()
			end := time.Now().Add(soakTime())
			for i := range flows {
				c := dialTCP(t, families[i%len(families)].self, chargenPort)
				if err := c.SetDeadline(end.Add(patience)); err != nil {
					t.Fatal(err)
				}
				clients.Go(func() { failures <- soakClient(c, end) })
			}
			clients.Wait()
			for range flows {
				if err := <-failures; err != nil {
					t.Error(err)
				}
			}
			r.settle(t)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			serving.Wait()
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if err := goroutinesAtMost(before); err != nil {
				t.Error(err)
			}
		})
	}
}

// soakServer sends the chargen stream and discards, on each connection of l.
func soakServer(l net.Listener, serving *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		serving.Go(func() {
			for {
				if _, err := c.Write(chargenBytes); err != nil {
					return
				}
			}
		})
		serving.Go(func() {
			_, _ = io.Copy(io.Discard, c) // ends when the client has gone
			_ = c.Close()
		})
	}
}

// soakClient checks the stream and sends, until the time has come.
func soakClient(c *net.TCPConn, end time.Time) error {
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for {
			if _, err := c.Write(chargenBytes); err != nil {
				return // closed
			}
		}
	}()
	var err error
	pieces := 0
	for err == nil && time.Now().Before(end) {
		err = chargenStream(c, chargenPeriod)
		pieces++
	}
	_ = c.Close()
	<-sent
	if err != nil {
		return fmt.Errorf("after %d pieces of %d bytes: %w", pieces, chargenPeriod, err)
	}
	return nil
}
