package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// maxUndecided bounds the connections that have not shown their cookie yet; more are closed at once.
const maxUndecided = 256

// server runs tests for iperf3 clients, one at a time.
type server struct {
	// Immutable after newServer.
	net     network
	family  string // "", "4" or "6"
	port    int
	options *options
	limits  limits
	out     io.Writer // reports; one test writes at a time
	errors  io.Writer // one line per failed test

	datagrams *datagrams

	mu        sync.Mutex
	test      *session // the running test, nil: none
	undecided int
	tests     int // begun so far

	accepted uint64         // connections so far; only the accept loop counts
	conns    sync.WaitGroup // goroutines of connections and tests
}

// session is the server's side of one test.
type session struct {
	cookie  cookie
	control *control
	joining chan joined // TCP streams, room for all that may come
	left    int         // streams still missing; guarded by server.mu
	leaving bool        // only the goodbye is missing; guarded by server.mu
	over    chan struct{}
}

// joined is a TCP stream and its place in the order of acceptance: the client numbers its streams in the order in which
// it connects, but cookies are read in parallel.
type joined struct {
	conn  net.Conn
	order uint64
}

func newServer(n network, o *options, out, errors io.Writer) *server {
	return &server{net: n, family: o.family(), port: o.port, options: o, limits: defaultLimits, out: out, errors: errors}
}

// serve listens and runs tests until ctx ends (nil), the one-off test is over (its error) or the network fails.
// When it returns, every goroutine it started has ended.
func (s *server) serve(ctx context.Context) error {
	address := net.JoinHostPort("", fmt.Sprint(s.port))
	listener, err := s.net.Listen("tcp"+s.family, address)
	if err != nil {
		return err
	}
	defer listener.Close()
	if s.port == 0 {
		_, s.port = splitAddr(listener.Addr())
		address = net.JoinHostPort("", fmt.Sprint(s.port))
	}
	packets, err := s.net.ListenPacket("udp"+s.family, address)
	if err != nil {
		return err
	}
	defer packets.Close()
	return s.serveOn(ctx, listener, packets)
}

// serveOn is serve on sockets that exist. It closes them.
func (s *server) serveOn(ctx context.Context, listener net.Listener, packets net.PacketConn) error {
	s.datagrams = newDatagrams(packets)
	ctx, cancel := context.WithCancelCause(ctx)
	defer s.conns.Wait()
	defer cancel(nil)
	s.conns.Go(func() {
		if err := s.datagrams.serve(); ctx.Err() == nil {
			cancel(fmt.Errorf("receive datagrams: %w", err))
		}
	})
	stop := context.AfterFunc(ctx, func() {
		listener.Close()
		packets.Close()
	})
	defer stop()
	defer packets.Close()

	s.announce(1)
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return s.ended(ctx)
		}
		if err != nil {
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
				time.Sleep(10 * time.Millisecond) // passes when connections are closed
				continue
			}
			return fmt.Errorf("accept: %w", err)
		}
		s.accepted++
		order := s.accepted
		s.mu.Lock()
		admitted := s.undecided < maxUndecided
		if admitted {
			s.undecided++
		}
		s.mu.Unlock()
		if !admitted {
			conn.Close()
			continue
		}
		s.conns.Go(func() { s.meet(ctx, cancel, conn, order) })
	}
}

// oneOffError ends the server after its only test; err is how that went.
type oneOffError struct{ err error }

func (e oneOffError) Error() string { return "one test done" }

func (s *server) ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if done, ok := errors.AsType[oneOffError](cause); ok {
		return done.err
	}
	if errors.Is(cause, context.Canceled) {
		return nil
	}
	return cause
}

// meet reads a connection's cookie, which decides what it is: a stream of the running test, a new test, or one too many.
// It is the connection's goroutine, and the test's if it becomes one.
func (s *server) meet(ctx context.Context, cancel context.CancelCauseFunc, conn net.Conn, order uint64) {
	c := &control{Conn: conn, timeout: s.limits.handshake}
	defer context.AfterFunc(ctx, c.interrupt)()
	var shown cookie
	err := c.read("cookie", shown[:])

	s.mu.Lock()
	s.undecided--
	// A test that only waits for the client's goodbye is no reason to send the next client away.
	for s.test != nil && s.test.leaving && err == nil && ctx.Err() == nil {
		over := s.test.over
		s.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
		}
		s.mu.Lock()
	}
	test := s.test
	switch {
	case err != nil || ctx.Err() != nil:
		s.mu.Unlock()
		conn.Close()
	case test == nil:
		s.tests++
		next := s.tests + 1
		test = &session{cookie: shown, control: c, joining: make(chan joined, 2*maxStreams), over: make(chan struct{})}
		s.test = test
		s.mu.Unlock()
		err := s.conduct(ctx, test)
		if s.options.oneOff {
			cancel(oneOffError{err})
		} else if ctx.Err() == nil {
			s.announce(next)
		}
		s.mu.Lock()
		s.test = nil
		s.mu.Unlock()
		close(test.over)
	case test.left > 0 && test.cookie == shown:
		test.left--
		test.joining <- joined{conn, order}
		s.mu.Unlock()
	default:
		s.mu.Unlock()
		_ = c.writeState(stateAccessDenied) // a client that has left needs no answer
		conn.Close()
	}
}

// conduct runs one test from the cookie to the summary.
func (s *server) conduct(ctx context.Context, test *session) error {
	c := test.control
	defer c.Close()
	err := s.steps(ctx, test)
	s.forget(test)
	if err != nil && ctx.Err() != nil {
		c.leave(stateServerTerminate)
		err = errServerTerminated
	}
	if err != nil {
		fmt.Fprintf(s.errors, "iperf3: error - %v\n", err)
	}
	return err
}

// steps follows the protocol; see the picture in the package comment.
func (s *server) steps(ctx context.Context, test *session) (err error) {
	c := test.control
	if err := c.writeState(stateParamExchange); err != nil {
		return err
	}
	var p params
	if err := c.readJSON("parameters", &p, maxParamsLen); err != nil {
		_ = c.writeError(codeParams)
		return err
	}
	if p.Len == 0 && p.TCP {
		p.Len = defaultBlockLen
	}
	if err := p.validate(); err != nil {
		if refused, ok := errors.AsType[*invalid](err); ok {
			_ = c.writeError(refused.code)
		}
		return err
	}

	var output bytes.Buffer
	report := s.reporter(&output, p.GetServerOutput != 0)
	defer func() {
		if err != nil {
			report.failed(err)
		}
	}()
	report.began(&p, test.cookie, c.LocalAddr(), c.RemoteAddr(), "")
	r := newRun(&p, false, s.options.interval, s.limits, report)
	var heard <-chan watched
	if r.streams, heard, err = s.streams(ctx, test, &p, r.received); err != nil {
		return err
	}
	defer s.datagrams.release()
	defer r.close()
	report.connected(r.streams)
	if err := c.writeState(stateTestStart); err != nil {
		return err
	}
	for _, stream := range r.streams {
		if peer, ok := stream.wire.(*peer); ok && !stream.sends {
			peer.amount = r.received
			peer.stream.Store(stream)
		}
	}
	if err := c.writeState(stateTestRunning); err != nil {
		return err
	}
	r.begins()
	end := r.watch(ctx, heard)
	r.halt()

	switch {
	case end.err != nil:
		if ctx.Err() == nil {
			_ = c.writeError(codeStreamFailed)
		}
		return end.err
	case end.state == stateClientTerminate:
		if sum, err := r.summary(nil); err == nil {
			report.finished(sum)
		}
		return errClientTerminated
	case end.state != stateTestEnd:
		return fmt.Errorf("control connection: got %v while the test ran: want %v or %v", end.state, stateTestEnd, stateClientTerminate)
	}
	// The original client reads a stream until it has a whole block, so it may not hear EXCHANGE_RESULTS before the
	// streams are closed.
	r.close()
	return s.exchange(test, r, report, &output)
}

// reporter is where a test's report goes; with keep it is copied to output for the client.
func (s *server) reporter(output *bytes.Buffer, keep bool) reporter {
	w := s.out
	if keep {
		w = io.MultiWriter(s.out, output)
	}
	if s.options.json {
		return &document{w: w}
	}
	return &text{w: w}
}

// streams waits until the client has opened all streams. The returned channel hears the control connection's next state.
func (s *server) streams(ctx context.Context, test *session, p *params, amount *quota) (_ []*stream, heard <-chan watched, err error) {
	clientSends := p.directions()
	want := len(clientSends)
	var opened <-chan *peer
	if p.UDP {
		host, _ := splitAddr(test.control.RemoteAddr())
		from, _ := netip.AddrFromSlice(host)
		opened = s.datagrams.expect(want, from)
	} else {
		s.mu.Lock()
		test.left = want
		s.mu.Unlock()
	}
	if err := test.control.writeState(stateCreateStreams); err != nil {
		return nil, nil, err
	}
	heard = awaitState(test.control)

	var tcp []joined
	var udp []*peer
	defer func() {
		if err != nil {
			for _, j := range tcp {
				j.conn.Close()
			}
			s.datagrams.release()
		}
	}()
	late := time.After(s.limits.handshake)
	for len(tcp)+len(udp) < want {
		select {
		case j := <-test.joining:
			tcp = append(tcp, j)
		case p := <-opened:
			udp = append(udp, p)
		case w := <-heard:
			if w.err == nil && w.state == stateClientTerminate {
				w.err = errClientTerminated
			} else if w.err == nil {
				w.err = fmt.Errorf("control connection: got %v while streams were opened", w.state)
			}
			return nil, nil, w.err
		case <-late:
			return nil, nil, fmt.Errorf("the client opened %d of %d streams within %v", len(tcp)+len(udp), want, s.limits.handshake)
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}

	var streams []*stream
	slices.SortFunc(tcp, func(a, b joined) int { return int(int64(a.order - b.order)) })
	for i, j := range tcp {
		_ = setWindow(j.conn, int(p.Window)) // a wish: the stack has its own limits too
		_ = setNoDelay(j.conn, p.NoDelay)
		_ = j.conn.SetDeadline(time.Time{})
		streams = append(streams, newStream(p, i, !clientSends[i], j.conn))
	}
	for i, peer := range udp {
		peer.amount = amount
		streams = append(streams, newStream(p, i, !clientSends[i], peer))
	}
	return streams, heard, nil
}

// exchange ends a test that went well: results both ways, then the client says goodbye.
func (s *server) exchange(test *session, r *run, report reporter, output *bytes.Buffer) error {
	c := test.control
	if err := c.writeState(stateExchangeResults); err != nil {
		return err
	}
	var theirs results
	if err := c.readJSON("results", &theirs, maxResultsLen); err != nil {
		return err
	}
	sum, err := r.summary(nil)
	if err != nil {
		return err
	}
	report.finished(sum)
	ours := r.results()
	if output.Len() > 0 {
		if s.options.json {
			ours.ServerOutputJSON = output.Bytes()
		} else {
			ours.ServerOutputText = output.String()
		}
	}
	if err := c.writeJSON("results", ours); err != nil {
		return err
	}
	s.mu.Lock()
	test.leaving = true
	s.mu.Unlock()
	if err := c.writeState(stateDisplayResults); err != nil {
		return err
	}
	// The test is complete: a client that leaves without a word has everything it needs.
	if bye, err := c.readState(); err == nil && bye != stateDone {
		return fmt.Errorf("control connection: got %v after the results: want %v", bye, stateDone)
	}
	return nil
}

// forget closes streams that joined but were not taken, and lets no more in.
func (s *server) forget(test *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	test.left = 0
	for {
		select {
		case j := <-test.joining:
			j.conn.Close()
		default:
			return
		}
	}
}

// announce says that a client may come.
func (s *server) announce(test int) {
	if !s.options.json {
		rule := strings.Repeat("-", 59)
		fmt.Fprintf(s.out, "%s\nServer listening on %d (test #%d)\n%s\n", rule, s.port, test, rule)
	}
}
