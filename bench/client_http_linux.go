package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// http asks for / on every connection, one request after the other. The warm-up, and
// everything where wrk is not installed, is done by this program itself.
func (s clientSpec) http() (sample, error) {
	port := s.Ports.http(s.Door)
	want := []byte("GET / HTTP/1.1\r\nHost: " + s.Server.String() + "\r\n\r\n")
	get := func() exchange { return &httpRequest{request: want} }
	if s.Wrk == "" {
		return s.exchangeMany(port, get)
	}
	if s.Warmup > 0 {
		warm := s
		warm.Warmup, warm.Duration = 0, s.Warmup
		if _, err := warm.exchangeMany(port, get); err != nil {
			return sample{}, fmt.Errorf("warm-up: %w", err)
		}
	}
	return s.wrk(port)
}

// maxAnswer bounds an HTTP answer in bytes, header and body. Ours have some 150.
const maxAnswer = 4 << 10

// httpRequest is the one outstanding request of an HTTP connection.
type httpRequest struct {
	request []byte
	answer  [maxAnswer]byte
	n       int // bytes of answer that have arrived
}

// send implements exchange. A request always fits: nothing else is in the socket.
func (h *httpRequest) send(fd int, _, _ uint64, _ time.Time) error {
	h.n = 0
	n, err := unix.Write(fd, h.request)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if n != len(h.request) {
		return fmt.Errorf("write took %d of %d bytes", n, len(h.request))
	}
	return nil
}

// receive implements exchange.
func (h *httpRequest) receive(fd int) (complete bool, err error) {
	n, err := unix.Read(fd, h.answer[h.n:])
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read: %w", err)
	case n == 0:
		return false, fmt.Errorf("read: the server closed the connection after %d bytes of an answer", h.n)
	}
	h.n += n
	length, err := answerLength(h.answer[:h.n])
	switch {
	case err != nil:
		return false, err
	case h.n > length && length > 0:
		return false, fmt.Errorf("the answer has %d bytes, %d more than its header says", h.n, h.n-length)
	case h.n == maxAnswer && length != maxAnswer:
		return false, fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	return h.n == length, nil
}

// answerLength returns how many bytes an answer takes that begins with b, or 0 as long as
// its header is not complete. It accepts what a benchmark wants: status 200 and a body whose
// length the header gives (RFC 9112, sections 4 and 6.2).
func answerLength(b []byte) (int, error) {
	header, _, whole := bytes.Cut(b, []byte("\r\n\r\n"))
	if !whole {
		return 0, nil
	}
	status, fields, _ := bytes.Cut(header, []byte("\r\n"))
	if ok := []byte("HTTP/1.1 200 "); !bytes.HasPrefix(status, ok) {
		return 0, fmt.Errorf("the answer is %q, want %q", status, ok)
	}
	for line := range bytes.SplitSeq(fields, []byte("\r\n")) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if !bytes.EqualFold(name, []byte("Content-Length")) {
			continue
		}
		length, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 16)
		if err != nil || length == 0 {
			return 0, fmt.Errorf("the answer's header has %q, want a length of 1 to 65535", line)
		}
		return len(header) + len("\r\n\r\n") + int(length), nil
	}
	return 0, fmt.Errorf("the answer has no Content-Length: %q", header)
}
