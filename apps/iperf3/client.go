package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// Payload sizes used without -l, in bytes.
const (
	defaultBlockLen    = 128 << 10 // TCP, as the original
	defaultDatagramLen = 1448      // UDP when the path's segment size is unknown: fits an MTU of 1500 with IPv6 too
)

// headStart is what the last blocks of a test of a given amount get before TEST_END follows on the other connection.
const headStart = 10 * time.Millisecond

// client runs one test against an iperf3 server.
type client struct {
	net     network
	options *options
	limits  limits
	report  reporter
}

// run dials, follows the server's states and reports. An error says in one line what went wrong.
func (c *client) run(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			c.report.failed(err)
		}
	}()
	dialing, cancel := context.WithTimeout(ctx, c.limits.handshake)
	defer cancel()
	conn, err := c.dial(dialing, "tcp")
	if err != nil {
		return fmt.Errorf("unable to connect to server: %w", err)
	}
	defer conn.Close()
	ctl := &control{Conn: conn, timeout: c.limits.handshake}
	defer context.AfterFunc(ctx, ctl.interrupt)()
	if err = c.conduct(ctx, ctl); err != nil && ctx.Err() != nil {
		ctl.leave(stateClientTerminate)
		return errors.New("interrupted: the client has terminated")
	}
	return err
}

func (c *client) dial(ctx context.Context, protocol string) (net.Conn, error) {
	o := c.options
	return c.net.DialContext(ctx, protocol+o.family(), net.JoinHostPort(o.host, fmt.Sprint(o.port)))
}

// conduct answers one state of the server after the other until the test is over.
func (c *client) conduct(ctx context.Context, ctl *control) error {
	id := newCookie()
	if err := ctl.write("cookie", id[:]); err != nil {
		return err
	}
	p := c.options.params()
	if p.Len == 0 {
		p.Len = defaultDatagramLen
		if mss := pathMSS(ctl.Conn); mss > 0 {
			p.Len = number(mss)
		}
	}
	if err := p.validate(); err != nil {
		return err
	}
	c.report.began(p, id, ctl.LocalAddr(), ctl.RemoteAddr(), c.options.host)
	r := newRun(p, true, c.options.interval, c.limits, c.report)
	defer r.close()

	next, err := ctl.readState()
	for {
		if err != nil {
			return patience(err)
		}
		switch next {
		case stateParamExchange:
			err = ctl.writeJSON("parameters", p)
		case stateCreateStreams:
			if err = c.open(ctx, id, p, r); err == nil {
				c.report.connected(r.streams)
			}
		case stateTestStart:
		case stateTestRunning:
			if next, err = c.measure(ctx, ctl, r); err == nil {
				continue // the next state is here already
			}
		case stateExchangeResults:
			if err = c.exchange(ctl, r); err == nil {
				return nil
			}
		case stateAccessDenied:
			return errBusy
		case stateServerTerminate:
			return errServerTerminated
		case stateServerError:
			return ctl.readError()
		default:
			return fmt.Errorf("control connection: got %v, which no server sends here", next)
		}
		if err == nil {
			next, err = ctl.readState()
		}
	}
}

// patience puts timeouts and closed connections in words.
func patience(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the server did not answer in time: %w", err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("control connection was closed by the server: %w", err)
	default:
		return err
	}
}

// open creates the streams one after the other: the server numbers them in the order in which they come.
func (c *client) open(ctx context.Context, id cookie, p *params, r *run) error {
	if len(r.streams) > 0 {
		return errors.New("control connection: the server asks for the streams twice")
	}
	dialing, cancel := context.WithTimeout(ctx, c.limits.handshake)
	defer cancel()
	for i, sends := range p.directions() {
		conn, err := c.openOne(dialing, id, p)
		if err != nil {
			return fmt.Errorf("open stream %d of %d: %w", i+1, len(p.directions()), err)
		}
		r.streams = append(r.streams, newStream(p, i, sends, conn))
	}
	return nil
}

func (c *client) openOne(ctx context.Context, id cookie, p *params) (net.Conn, error) {
	protocol, hello := "tcp", id[:]
	if p.UDP {
		protocol, hello = "udp", connectMessage[:]
	}
	conn, err := c.dial(ctx, protocol)
	if err != nil {
		return nil, err
	}
	if err := c.greet(ctx, conn, p, hello); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// greet makes conn a stream in the server's eyes.
func (c *client) greet(ctx context.Context, conn net.Conn, p *params, hello []byte) error {
	if err := setWindow(conn, int(p.Window)); err != nil {
		return fmt.Errorf("set socket buffers of %d bytes: %w", p.Window, err)
	}
	if err := setNoDelay(conn, p.NoDelay); err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	if p.UDP {
		// Anything else that arrives is not ours to judge: wait for the answer until the deadline.
		b := make([]byte, maxDatagram)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return fmt.Errorf("no answer to the connect message: %w", err)
			}
			if isConnectReply(b[:n]) {
				break
			}
		}
	}
	stop()
	return conn.SetDeadline(time.Time{})
}

// measure moves blocks until the test is over and returns the state the server sent then.
func (c *client) measure(ctx context.Context, ctl *control, r *run) (state, error) {
	if len(r.streams) == 0 {
		return 0, errors.New("control connection: the server starts the test before its streams")
	}
	heard := awaitState(ctl)
	r.begins()
	end := r.watch(ctx, heard)
	r.halt()
	if ctx.Err() != nil {
		if sum, err := r.summary(nil); err == nil {
			c.report.finished(sum)
		}
		return 0, ctx.Err()
	}
	if end.err != nil {
		return 0, end.err
	}
	if end.state != 0 { // the server ended the test: terminated, or failed
		return end.state, nil
	}
	if p := r.p; p.amount() > 0 && (p.Bidirectional || !p.Reverse) {
		// The original server counts nothing that it reads after TEST_END, which would overtake the last blocks.
		time.Sleep(headStart)
	}
	if err := ctl.writeState(stateTestEnd); err != nil {
		return 0, err
	}
	select {
	case w := <-heard:
		return w.state, w.err
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(c.limits.handshake):
		return 0, fmt.Errorf("the server did not answer %v within %v", stateTestEnd, c.limits.handshake)
	}
}

// exchange swaps results and says goodbye.
func (c *client) exchange(ctl *control, r *run) error {
	if r.final == nil {
		return errors.New("control connection: the server asks for results before the test")
	}
	if err := ctl.writeJSON("results", r.results()); err != nil {
		return err
	}
	var theirs results
	if err := ctl.readJSON("results", &theirs, maxResultsLen); err != nil {
		return patience(err)
	}
	switch next, err := ctl.readState(); {
	case err != nil:
		return patience(err)
	case next != stateDisplayResults:
		return fmt.Errorf("control connection: got %v after the results: want %v", next, stateDisplayResults)
	}
	sum, err := r.summary(&theirs)
	if err != nil {
		return err
	}
	c.report.finished(sum)
	_ = ctl.writeState(stateDone) // we have what we came for
	return nil
}
