package main

import (
	"bytes"
	"strconv"
)

// encoding is a way to compress a file beforehand: for "page.html" there may
// be a "page.html.br" with the same content.
type encoding struct {
	name   string // in Content-Encoding
	suffix string
	bit    encodingSet
}

// encodingSet is a set of encodings.
type encodingSet uint8

// encodings in the order of preference.
var encodings = []encoding{
	{"br", ".br", 1},
	{"gzip", ".gz", 2},
}

// acceptedEncodings returns which encodings the client takes, according to
// its Accept-Encoding (RFC 9110, section 12.5.3). How much it likes each is
// not looked at: smaller is better for all. It does not allocate.
func acceptedEncodings(header []byte) encodingSet {
	var accepted, named encodingSet
	var others bool
	for item := range bytes.SplitSeq(header, []byte{','}) {
		name, parameters, _ := bytes.Cut(item, []byte{';'})
		name = bytes.TrimSpace(name)
		ok := !refuses(parameters)
		if string(name) == "*" {
			others = ok
			continue
		}
		for _, e := range encodings {
			if !bytes.EqualFold(name, []byte(e.name)) {
				continue
			}
			named |= e.bit
			if ok {
				accepted |= e.bit
			}
		}
	}
	if others {
		for _, e := range encodings {
			accepted |= e.bit &^ named
		}
	}
	return accepted
}

// refuses reports whether the parameters hold a weight of 0.
func refuses(parameters []byte) bool {
	name, value, _ := bytes.Cut(parameters, []byte{'='})
	if !bytes.EqualFold(bytes.TrimSpace(name), []byte{'q'}) {
		return false
	}
	q, err := strconv.ParseFloat(string(bytes.TrimSpace(value)), 32)
	return err != nil || q <= 0
}
