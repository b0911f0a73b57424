package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// never is longer than any dial in these tests may take.
const never = time.Hour

// outcome is how a dial to one address ends, and when.
type outcome struct {
	after time.Duration
	err   error // nil: a connection
}

// fakeConn is a connection of a fakeNet.
type fakeConn struct {
	net.Conn
	remote netip.AddrPort
	n      *fakeNet
}

func (c *fakeConn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.n.closed = append(c.n.closed, c.remote)
	return nil
}

// fakeNet has one name, and addresses that behave as they are told.
type fakeNet struct {
	names    map[string][]string
	outcomes map[string]outcome
	start    time.Time

	mu     sync.Mutex
	dialed []string // address and when
	closed []netip.AddrPort
}

func (f *fakeNet) dialer() *dialer {
	return &dialer{
		lookup: func(ctx context.Context, network, host string) (addrs []netip.Addr, err error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			list, ok := f.names[host]
			if !ok {
				return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
			}
			for _, s := range list {
				if a := netip.MustParseAddr(s); network == "ip" || network == "ip4" == a.Is4() {
					addrs = append(addrs, a)
				}
			}
			return addrs, nil
		},
		dial: func(ctx context.Context, kind string, remote netip.AddrPort) (net.Conn, error) {
			f.mu.Lock()
			f.dialed = append(f.dialed, fmt.Sprint(remote.Addr(), "@", time.Since(f.start)))
			f.mu.Unlock()
			o := f.outcomes[remote.Addr().String()]
			select {
			case <-time.After(o.after):
			case <-ctx.Done():
				return nil, &net.OpError{Op: "dial", Net: kind, Err: ctx.Err()}
			}
			if o.err != nil {
				return nil, &net.OpError{Op: "dial", Net: kind, Err: o.err}
			}
			return &fakeConn{remote: remote, n: f}, nil
		},
	}
}

func TestDialOrder(t *testing.T) {
	refused := outcome{0, syscall.ECONNREFUSED}
	for _, test := range []struct {
		name     string
		network  string
		addrs    []string // what the name stands for
		outcomes map[string]outcome
		timeout  time.Duration // 0: none
		want     string        // the peer
		err      error
		dialed   []string
		took     time.Duration
	}{
		{
			name: "one address", network: "tcp", addrs: []string{"10.0.0.1"},
			want: "10.0.0.1", dialed: []string{"10.0.0.1@0s"},
		},
		{
			name: "IPv6 is quick", network: "tcp", addrs: []string{"fd00::1", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": {249 * time.Millisecond, nil}},
			want:     "fd00::1", dialed: []string{"fd00::1@0s"}, took: 249 * time.Millisecond,
		},
		{
			name: "IPv6 hangs", network: "tcp", addrs: []string{"fd00::1", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": {never, nil}},
			want:     "10.0.0.1", dialed: []string{"fd00::1@0s", "10.0.0.1@250ms"}, took: fallbackDelay,
		},
		{
			name: "IPv6 fails at once", network: "tcp", addrs: []string{"fd00::1", "fd00::2", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": refused, "fd00::2": refused},
			want:     "10.0.0.1", dialed: []string{"fd00::1@0s", "fd00::2@0s", "10.0.0.1@0s"},
		},
		{
			name: "IPv4 first", network: "tcp", addrs: []string{"10.0.0.1", "fd00::1", "10.0.0.2"},
			outcomes: map[string]outcome{"10.0.0.1": {100 * time.Millisecond, syscall.EHOSTUNREACH}},
			want:     "10.0.0.2", dialed: []string{"10.0.0.1@0s", "10.0.0.2@100ms"}, took: 100 * time.Millisecond,
		},
		{
			name: "the slow one wins, the other is ended", network: "tcp", addrs: []string{"fd00::1", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": {300 * time.Millisecond, nil}, "10.0.0.1": {never, nil}},
			want:     "fd00::1", dialed: []string{"fd00::1@0s", "10.0.0.1@250ms"}, took: 300 * time.Millisecond,
		},
		{
			name: "all fail: the first error", network: "tcp", addrs: []string{"fd00::1", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": refused, "10.0.0.1": {0, syscall.EHOSTUNREACH}},
			err:      syscall.ECONNREFUSED, dialed: []string{"fd00::1@0s", "10.0.0.1@0s"},
		},
		{
			name: "the time is shared", network: "tcp", addrs: []string{"10.0.0.1", "10.0.0.2"}, timeout: 10 * time.Second,
			outcomes: map[string]outcome{"10.0.0.1": {never, nil}},
			want:     "10.0.0.2", dialed: []string{"10.0.0.1@0s", "10.0.0.2@5s"}, took: 5 * time.Second,
		},
		{
			name: "but not into slivers", network: "tcp", addrs: []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, timeout: 3 * time.Second,
			outcomes: map[string]outcome{"10.0.0.1": {never, nil}, "10.0.0.2": {never, nil}, "10.0.0.3": {never, nil}},
			err:      context.DeadlineExceeded, dialed: []string{"10.0.0.1@0s", "10.0.0.2@2s"}, took: 3 * time.Second,
		},
		{
			name: "tcp4", network: "tcp4", addrs: []string{"fd00::1", "10.0.0.1"},
			want: "10.0.0.1", dialed: []string{"10.0.0.1@0s"},
		},
		{
			name: "tcp4 fails", network: "tcp4", addrs: []string{"10.0.0.1"},
			outcomes: map[string]outcome{"10.0.0.1": refused},
			err:      syscall.ECONNREFUSED, dialed: []string{"10.0.0.1@0s"},
		},
		{
			name: "udp does not race", network: "udp", addrs: []string{"fd00::1", "10.0.0.1"},
			outcomes: map[string]outcome{"fd00::1": {0, syscall.ENETUNREACH}},
			want:     "10.0.0.1", dialed: []string{"fd00::1@0s", "10.0.0.1@0s"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeNet{names: map[string][]string{"host": test.addrs}, outcomes: test.outcomes, start: time.Now()}
				ctx := t.Context()
				if test.timeout > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, test.timeout)
					defer cancel()
				}
				c, err := f.dialer().dialContext(ctx, test.network, "host:80")
				if took := time.Since(f.start); took != test.took {
					t.Errorf("took %v, want %v", took, test.took)
				}
				switch op, _ := errors.AsType[*net.OpError](err); {
				case test.err != nil:
					if c != nil || !errors.Is(err, test.err) || op == nil || op.Net != test.network {
						t.Errorf("%v, %v; want a *net.OpError with %v for network %s", c, err, test.err, test.network)
					}
				case err != nil:
					t.Errorf("error %v", err)
				case c.(*fakeConn).remote.Addr().String() != test.want:
					t.Errorf("connected to %v, want %s", c.(*fakeConn).remote, test.want)
				}
				synctest.Wait() // the ones that lost have ended
				if !slices.Equal(f.dialed, test.dialed) {
					t.Errorf("dialled %v, want %v", f.dialed, test.dialed)
				}
				if f.closed != nil {
					t.Errorf("closed %v, want none", f.closed)
				}
			})
		})
	}
}

// Two connections at the same moment: one is returned, the other closed.
func TestDialTie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{
			names:    map[string][]string{"host": {"fd00::1", "10.0.0.1"}},
			outcomes: map[string]outcome{"fd00::1": {fallbackDelay + time.Second, nil}, "10.0.0.1": {time.Second, nil}},
			start:    time.Now(),
		}
		d := f.dialer()
		dial := d.dial
		d.dial = func(_ context.Context, kind string, remote netip.AddrPort) (net.Conn, error) {
			return dial(context.Background(), kind, remote) // one that does not notice its end
		}
		c, err := d.dialContext(t.Context(), "tcp", "host:80")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(f.closed) != 1 || f.closed[0] == c.(*fakeConn).remote {
			t.Errorf("connected to %v, closed %v; want the other one closed", c.(*fakeConn).remote, f.closed)
		}
	})
}

func TestDialResolveErrors(t *testing.T) {
	f := &fakeNet{names: map[string][]string{"four": {"10.0.0.1"}}}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		ctx              context.Context
		network, address string
		match            func(error) bool
	}{
		{t.Context(), "tcp", ":80", isA[*net.AddrError]},
		{t.Context(), "tcp", "0.0.0.0:80", isA[*net.AddrError]},
		{t.Context(), "tcp4", "[fd00::1]:80", isA[*net.AddrError]},
		{t.Context(), "tcp", "10.0.0.1", isA[*net.AddrError]},
		{t.Context(), "tcp", "10.0.0.1:70000", isA[*net.AddrError]},
		{t.Context(), "tcp6", "four:80", isA[*net.AddrError]},
		{t.Context(), "tcp", "nobody:80", isA[*net.DNSError]},
		{t.Context(), "tcp", "four:nonesuch", isA[*net.DNSError]},
		{t.Context(), "unix", "/tmp/x", isA[net.UnknownNetworkError]},
		{canceled, "tcp", "four:80", func(err error) bool { return errors.Is(err, context.Canceled) }},
	} {
		c, err := f.dialer().dialContext(test.ctx, test.network, test.address)
		if op, ok := errors.AsType[*net.OpError](err); c != nil || !ok || op.Op != "dial" || op.Net != test.network || !test.match(err) {
			t.Errorf("dial %s %s: %v, %v (%T)", test.network, test.address, c, err, errors.Unwrap(err))
		}
	}
	if f.dialed != nil {
		t.Errorf("dialled %v", f.dialed)
	}
}

func isA[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}
