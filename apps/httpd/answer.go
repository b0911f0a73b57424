package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"

	"numastack/stack"
)

// filePiece is how much of a file is read per Offload, in bytes. The change of
// threads costs some 10 µs, a piece from the page cache about 30.
const filePiece = 256 << 10

var filePieces = sync.Pool{New: func() any { return new([filePiece]byte) }}

// answer is the http.ResponseWriter that brings an http.Handler's answer to
// the shard: the handler runs in one Offload, and leaves behind a header with a
// short body, or with a part of a file that is read as the client takes it.
type answer struct {
	header http.Header
	status int    // 0 until the handler sets it
	body   []byte // errors, listings, several ranges: maxMultipart and a bit

	file   *os.File // positioned; nil if body is all there is
	length int64    // of the part of file
}

var (
	_ http.ResponseWriter = (*answer)(nil)
	_ fileKeeper          = (*answer)(nil)
)

// Header implements http.ResponseWriter.
func (a *answer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

// Write implements http.ResponseWriter.
func (a *answer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body = append(a.body, b...)
	return len(b), nil
}

// ReadFrom implements io.ReaderFrom, which http.ServeContent uses to send: a
// part of a file stays where it is.
func (a *answer) ReadFrom(r io.Reader) (int64, error) {
	if part, ok := r.(*io.LimitedReader); ok && a.file == nil && len(a.body) == 0 {
		if f, ok := part.R.(*os.File); ok {
			a.WriteHeader(http.StatusOK)
			a.file, a.length = f, part.N
			part.N = 0
			return a.length, nil
		}
	}
	return io.Copy(struct{ io.Writer }{a}, r)
}

// keeps implements fileKeeper.
func (a *answer) keeps(f *os.File) bool { return a.file == f }

// filePart is the body of an answer that comes from a file. It is used by the
// connection's own code, and goes to the disk by Offload.
type filePart struct {
	conn net.Conn
	file *os.File
	left int64
}

var (
	_ io.WriterTo   = (*filePart)(nil)
	_ io.ReadCloser = (*filePart)(nil)
)

// Read implements io.Reader.
func (p *filePart) Read(b []byte) (n int, err error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.left)]
	stack.Offload(p.conn, func() { n, err = io.ReadFull(p.file, b) })
	p.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the file has shrunk
	}
	return n, err
}

// WriteTo implements io.WriterTo.
func (p *filePart) WriteTo(w io.Writer) (written int64, err error) {
	piece := filePieces.Get().(*[filePiece]byte)
	defer filePieces.Put(piece)
	for p.left > 0 {
		n, err := p.Read(piece[:])
		if err != nil {
			return written, err
		}
		n, err = w.Write(piece[:n])
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// Close implements io.Closer.
func (p *filePart) Close() (err error) {
	stack.Offload(p.conn, func() { err = p.file.Close() })
	return err
}
