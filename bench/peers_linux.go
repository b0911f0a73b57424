package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// mtu of every TAP and veth, in bytes.
const mtu = 1500

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
)

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
	c := command{path: self, args: []string{roleServe, name}, cpu: b.serverCPU, deadline: b.serverDeadline(r)}
	s := &server{}
	switch name {
	case peerNumastack:
		s.addr = numastackServer
		c.path, c.args = b.numastackCommand(self, r)
	case peerGVisor:
		s.addr = gvisorServer
	case peerKernel:
		s.addr, s.link = kernelServer, kernelClientLink
		c.ownNetwork = true
		c.beforeReady = connectKernelPeer
	default:
		return nil, fmt.Errorf("unknown peer %q", name)
	}
	if s.process, err = start(ctx, c); err != nil {
		return nil, errors.Join(fmt.Errorf("start peer %s: %w", name, err), s.removeLink())
	}
	return s, nil
}

// connectKernelPeer joins this namespace and the child's with a veth pair. The child
// waits for a byte on stdin before it looks for its end.
func connectKernelPeer(pid int, stdin io.Writer) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = kernelClientLink, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: kernelServerLink, PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make a veth pair into the namespace of process %d: %w", pid, err)
	}
	if err := addressLink(kernelClientLink, "10.97.0.1/24"); err != nil {
		return err
	}
	if _, err := stdin.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("tell process %d that its link is there: %w", pid, err)
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
func serveRole(ctx context.Context, peer string) error {
	ready := func() { fmt.Println("ready") }
	if d, ok := strings.CutPrefix(peer, peerNumastack+"-"); ok {
		return serveNumastack(ctx, door(d), ready)
	}
	switch peer {
	case peerGVisor:
		return serveGVisor(ctx, ready)
	case peerKernel:
		return serveKernel(ctx, ready)
	default:
		return fmt.Errorf("%s %q: accepted are %s, %s and %s-<door>", roleServe, peer, peerGVisor, peerKernel, peerNumastack)
	}
}
