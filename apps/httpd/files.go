package main

import (
	"errors"
	"fmt"
	"html"
	"io"
	"io/fs"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	indexFile = "index.html"
	// maxListed is how many entries of a directory a listing shows.
	maxListed = 10_000
	// sniffed is how much of a file http.DetectContentType looks at, in bytes.
	sniffed = 512
	// A client that asks for several ranges at a time gets them out of files
	// of at most maxMultipart bytes, and at most maxRanges of them; else it
	// gets the whole file, as RFC 9110, section 14.2 allows. The answer is put
	// together in memory.
	maxMultipart = 1 << 20
	maxRanges    = 16
)

// site is the http.Handler of the files below a directory. It may wait for a
// disk. Its answers are those of http.ServeContent, which knows ranges and
// conditions.
type site struct {
	root   *os.Root // keeps symbolic links inside
	list   bool
	logger *slog.Logger
}

func openSite(dir string, list bool, logger *slog.Logger) (*site, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("-root: %w", err)
	}
	return &site{root: root, list: list, logger: logger}, nil
}

func (s *site) close() { _ = s.root.Close() }

// fileKeeper is an http.ResponseWriter that sends a file after the handler has
// returned, and then closes it.
type fileKeeper interface{ keeps(f *os.File) bool }

// ServeHTTP implements http.Handler for GET and HEAD.
func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name, ok := fileName(r.URL.Path)
	if !ok {
		fail(w, http.StatusNotFound)
		return
	}
	f, info, err := s.open(name)
	isDir := err == nil && info.IsDir()
	if isDir && strings.HasSuffix(r.URL.Path, "/") {
		// Before the index: what follows closes one file only.
		defer f.Close()
		dir := f
		name = path.Join(name, indexFile)
		f, info, err = s.open(name)
		if errors.Is(err, fs.ErrNotExist) && s.list {
			s.serveList(w, r, dir)
			return
		}
	}
	if err != nil {
		s.failOpen(w, name, err)
		return
	}
	defer func() {
		if k, ok := w.(fileKeeper); !ok || !k.keeps(f) {
			_ = f.Close()
		}
	}()
	switch {
	case isDir && !strings.HasSuffix(r.URL.Path, "/"):
		// Relative links of an index resolve only below the slash.
		to := url.URL{Path: path.Base(r.URL.Path) + "/", RawQuery: r.URL.RawQuery}
		w.Header().Set("Location", to.String())
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusMovedPermanently)
	case info.IsDir(), !isDir && strings.HasSuffix(r.URL.Path, "/"):
		fail(w, http.StatusNotFound) // index.html is a directory, or a file is asked for as one
	default:
		s.serveFile(w, r, name, f, info)
	}
}

// fileName translates a URL's path. It refuses names that begin with a dot,
// with them ".." and ".", and empty ones.
func fileName(urlPath string) (string, bool) {
	rest, rooted := strings.CutPrefix(urlPath, "/")
	name := strings.TrimSuffix(rest, "/")
	if !rooted || (name == "" && rest != "") || strings.ContainsRune(name, 0) {
		return "", false
	}
	if name == "" {
		return ".", true
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part[0] == '.' {
			return "", false
		}
	}
	return name, true
}

// open opens a file or a directory; anything else does not exist.
func (s *site) open(name string) (*os.File, fs.FileInfo, error) {
	// Without O_NONBLOCK a FIFO would wait for its other end.
	f, err := s.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// serveFile answers with f or with the variant of it that the client prefers.
func (s *site) serveFile(w http.ResponseWriter, r *http.Request, name string, f *os.File, info fs.FileInfo) {
	h := w.Header()
	h.Set("Content-Type", contentType(name, f))
	h.Set("X-Content-Type-Options", "nosniff")
	wanted := acceptedEncodings([]byte(strings.Join(r.Header.Values("Accept-Encoding"), ",")))
	var chosen encoding
	for _, e := range encodings {
		if v, err := s.root.Stat(name + e.suffix); err != nil || !v.Mode().IsRegular() {
			continue
		}
		h.Set("Vary", "Accept-Encoding")
		if chosen.name == "" && wanted&e.bit != 0 {
			chosen = e
		}
	}
	if chosen.name != "" {
		v, variant, err := s.open(name + chosen.suffix)
		if err == nil && variant.Mode().IsRegular() {
			defer func() {
				if k, ok := w.(fileKeeper); !ok || !k.keeps(v) {
					_ = v.Close()
				}
			}()
			h.Set("Content-Encoding", chosen.name)
			f, info = v, variant
		}
	}
	h.Set("ETag", etag(info))
	serveContent(w, r, info.ModTime(), info.Size(), f)
}

// contentType tells by the name what a file is, or by its first bytes.
func contentType(name string, f *os.File) string {
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		return t
	}
	var head [sniffed]byte
	n, _ := f.ReadAt(head[:], 0) // short at the end of the file
	return http.DetectContentType(head[:n])
}

// etag is a validator as strong as a file system's clock: RFC 9110, 8.8.3.
func etag(info fs.FileInfo) string {
	return fmt.Sprintf(`"%x-%x"`, info.ModTime().UnixNano(), info.Size())
}

// serveContent is http.ServeContent for content whose header is set but for
// what depends on conditions and ranges.
func serveContent(w http.ResponseWriter, r *http.Request, modified time.Time, size int64, content io.ReadSeeker) {
	if commas := strings.Count(r.Header.Get("Range"), ","); commas > 0 && (size > maxMultipart || commas >= maxRanges) {
		r.Header.Del("Range")
	}
	if w.Header().Get("Content-Encoding") != "" {
		w = sized{w, size}
	}
	http.ServeContent(w, r, "", modified, content)
}

// sized sets the length of an encoded file, which http.ServeContent leaves out
// because others encode while they send.
type sized struct {
	http.ResponseWriter
	size int64
}

// WriteHeader implements http.ResponseWriter.
func (s sized) WriteHeader(status int) {
	if status == http.StatusOK {
		s.Header().Set("Content-Length", strconv.FormatInt(s.size, 10))
	}
	s.ResponseWriter.WriteHeader(status)
}

// ReadFrom implements io.ReaderFrom if the http.ResponseWriter does.
func (s sized) ReadFrom(r io.Reader) (int64, error) { return io.Copy(s.ResponseWriter, r) }

// serveList answers with the names in a directory.
func (s *site) serveList(w http.ResponseWriter, r *http.Request, dir *os.File) {
	entries, err := dir.ReadDir(maxListed)
	if err != nil && err != io.EOF {
		s.failOpen(w, dir.Name(), err)
		return
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	var page strings.Builder
	title := html.EscapeString(r.URL.Path)
	fmt.Fprintf(&page, "<!doctype html>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n<title>%s</title>\n<h1>%s</h1>\n<ul>\n", title, title)
	for _, e := range entries {
		name := e.Name()
		if name[0] == '.' {
			continue
		}
		if e.IsDir() {
			name += "/"
		}
		link := url.URL{Path: name} // escapes ? and #, and puts ./ before a colon
		fmt.Fprintf(&page, "<li><a href=\"%s\">%s</a></li>\n", html.EscapeString(link.String()), html.EscapeString(name))
	}
	page.WriteString("</ul>\n")
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(page.Len()))
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, page.String())
	}
}

// failOpen answers for a file that cannot be opened.
func (s *site) failOpen(w http.ResponseWriter, name string, err error) {
	var errno syscall.Errno
	switch {
	case errors.Is(err, fs.ErrPermission):
		fail(w, http.StatusForbidden)
	case errors.As(err, &errno) && slices.Contains([]syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EIO}, errno):
		s.logger.Error("cannot open a file", "name", name, "error", err)
		fail(w, http.StatusInternalServerError)
	default: // not there, not a directory, a name too long, a link that leaves the root
		fail(w, http.StatusNotFound)
	}
}

// fail answers with a status and its name.
func fail(w http.ResponseWriter, status int) { http.Error(w, errorText(status), status) }

// errorText is the body of an error, without the line's end.
func errorText(status int) string { return strconv.Itoa(status) + " " + http.StatusText(status) }
