package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// job is what the guest's first process is to do.
type job struct {
	Modules []string      // to load, in order
	Tests   [][]string    // command lines
	Limit   time.Duration // for all of them
}

const jobFile = "/job.json"

// writeInitramfs writes an archive with the files, from their paths in the guest
// to those here, and with the job. The format is the newc one of cpio(5), as in
// the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
func writeInitramfs(name string, work job, files map[string]string) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if closed := f.Close(); err == nil {
			err = closed
		}
	}()
	a := archive{w: bufio.NewWriter(f), dirs: make(map[string]bool)}
	a.dir("/dev")
	a.header("/dev/console", 0o020600, 0, 5, 1) // for what the first process has to say before it can mount anything
	content, err := json.Marshal(work)
	if err != nil {
		return err
	}
	if err := a.file(jobFile, strings.NewReader(string(content)), int64(len(content))); err != nil {
		return err
	}
	for _, inside := range slices.Sorted(maps.Keys(files)) {
		if err := a.copy(inside, files[inside]); err != nil {
			return err
		}
	}
	a.header("TRAILER!!!", 0, 0, 0, 0)
	return a.w.Flush()
}

type archive struct {
	w    *bufio.Writer // keeps the first error
	n    int64         // bytes written
	ino  int
	dirs map[string]bool
}

func (a *archive) header(name string, mode int, size int64, major, minor int) {
	a.ino++
	name = strings.TrimPrefix(name, "/")
	n, _ := fmt.Fprintf(a.w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	a.n += int64(n)
	a.pad()
}

func (a *archive) pad() {
	for ; a.n%4 != 0; a.n++ {
		_ = a.w.WriteByte(0)
	}
}

func (a *archive) dir(name string) {
	if name == "/" || a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.header(name, 0o040755, 0, 0, 0)
}

func (a *archive) file(name string, content io.Reader, size int64) error {
	a.dir(path.Dir(name))
	a.header(name, 0o100755, size, 0, 0)
	n, err := io.CopyN(a.w, content, size)
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	a.n += n
	a.pad()
	return nil
}

func (a *archive) copy(inside, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return a.file(inside, f, info.Size())
}
