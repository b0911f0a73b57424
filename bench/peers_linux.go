package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Each peer has a /24 of its own. Host bits: 1 the client, 2 the server.
const (
	numastackServer = "10.99.0.2"
	numastackClient = "10.99.0.1"
	numastackTAP    = "numa0"

	gvisorServer = "10.98.0.2"
	gvisorTAP    = "gvisor0"

	kernelServer = "10.97.0.2"
	// The two ends of the kernel peer's veth pair.
	kernelClientLink = "kernel0"
	kernelServerLink = "kernel1"

	gvisorGSOServer = "10.96.0.2"
	// The two ends of the veth pair of gVisor with GSO.
	gvisorGSOClientLink = "gvisorgso0"
	gvisorGSOServerLink = "gvisorgso1"

	limitServer = "10.95.0.2"
	limitTAP    = "limit0"
)

// serverSpec tells a server process what to be. It travels as JSON on its command line.
type serverSpec struct {
	Peer string `json:"peer"`
	Door door   `json:"door"` // of numastack
	MTU  int    `json:"mtu"`
	// HostCPUs is for numastack, as in its Config.
	HostCPUs []int `json:"host_cpus"`
	// Queue is how many frames may wait in the TAP for the server; 0: its default.
	Queue int `json:"queue"`
	// Profile is the file for a CPU profile; empty: none.
	Profile string `json:"profile"`
}

// server is a peer that serves, in a process of its own.
type server struct {
	*process
	addr string
	// link, when set, has to be deleted after the process has ended.
	link string
}

// startPeer starts one peer's server for one row.
func startPeer(ctx context.Context, name string, r row, b *bench) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program's file: %w", err)
	}
	spec := serverSpec{Peer: name, Door: r.door, MTU: r.linkMTU(), Queue: r.queueLen(name), Profile: b.profile(name, r)}
	if b.rps {
		spec.HostCPUs = []int{b.clientCPU}
	}
	arg, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("server specification: %w", err)
	}
	c := command{path: self, args: []string{roleServe, string(arg)}, cpu: b.serverCPU, deadline: b.serverDeadline(r)}
	s := &server{}
	switch name {
	case peerNumastack:
		s.addr = numastackServer
		if !r.ownServer() {
			c.path, c.args = b.numastackCommand(r)
		}
	case peerGVisor:
		s.addr = gvisorServer
	case peerGVisorGSO:
		s.addr, s.link = gvisorGSOServer, gvisorGSOClientLink
		c.ownNetwork = true
		c.beforeReady = connectVeth(gvisorGSOClientLink, gvisorGSOServerLink, "10.96.0.1/24", r.linkMTU())
	case peerKernel:
		s.addr, s.link = kernelServer, kernelClientLink
		c.ownNetwork = true
		c.beforeReady = connectVeth(kernelClientLink, kernelServerLink, "10.97.0.1/24", r.linkMTU())
	case peerLimit:
		s.addr = limitServer
	default:
		return nil, fmt.Errorf("unknown peer %q", name)
	}
	if s.process, err = start(ctx, c); err != nil {
		return nil, errors.Join(fmt.Errorf("start peer %s: %w", name, err), s.removeLink())
	}
	return s, nil
}

// profile returns the file for the CPU profile of a peer's server.
func (o options) profile(peer string, r row) string {
	if o.profiles == "" {
		return ""
	}
	return filepath.Join(o.profiles, r.name+"-"+peer+".pprof")
}

// connectVeth joins this namespace and the child's with a veth pair. The child waits for
// a byte on stdin before it looks for its end.
func connectVeth(clientLink, serverLink, prefix string, mtu int) func(pid int, stdin io.Writer) error {
	return func(pid int, stdin io.Writer) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = clientLink, mtu
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: serverLink, PeerNamespace: netlink.NsPid(pid)}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make a veth pair into the namespace of process %d: %w", pid, err)
		}
		if err := addressLink(clientLink, prefix, mtu); err != nil {
			return err
		}
		if _, err := stdin.Write([]byte{'\n'}); err != nil {
			return fmt.Errorf("tell process %d that its link is there: %w", pid, err)
		}
		return nil
	}
}

// awaitVeth is the child's side of connectVeth.
func awaitVeth(link string) error {
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("wait for link %q: %w", link, err)
	}
	return nil
}

// stop ends the server. What it says matters only to whoever wants to know whether the
// server survived its load.
func (s *server) stop() error {
	return errors.Join(s.process.stop(), s.removeLink())
}

// removeLink deletes the veth pair at once: with the namespace alone it would go some time
// after the process, and the next sample's pair needs the name.
func (s *server) removeLink() error {
	if s.link == "" {
		return nil
	}
	link, err := netlink.LinkByName(s.link)
	if err != nil {
		return nil // it was never made, or went with the server's namespace
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %q: %w", s.link, err)
	}
	return nil
}

// serveRole is the child's side: it serves until it is told to stop.
func serveRole(ctx context.Context, argument string) error {
	var spec serverSpec
	if err := json.Unmarshal([]byte(argument), &spec); err != nil {
		return fmt.Errorf("server specification %q: %w", argument, err)
	}
	if err := setTCP(); err != nil {
		return err
	}
	if spec.Profile != "" {
		f, err := os.Create(spec.Profile)
		if err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	ready := func() { fmt.Println("ready") }
	switch spec.Peer {
	case peerNumastack:
		return serveNumastack(ctx, spec, ready)
	case peerGVisor:
		return serveGVisor(ctx, spec.MTU, ready)
	case peerGVisorGSO:
		return serveGVisorGSO(ctx, spec.MTU, ready)
	case peerKernel:
		return serveKernel(ctx, spec.MTU, ready)
	case peerLimit:
		return serveLimit(ctx, spec, ready)
	default:
		return fmt.Errorf("%s: peer %q: accepted are %s", roleServe, spec.Peer, strings.Join(peerOrder, ", "))
	}
}
