package integration

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A role is what this binary does to its own process, in a mount namespace of
// its own, before it becomes the program of its arguments.
const (
	roleVar = "NUMASTACK_INTEGRATION_ROLE"

	roleNoTun  = "no-tun" // no /dev/net/tun
	roleNobody = "nobody" // no privileges, but may open /dev/net/tun

	roleFailed = 99 // exit status when the role could not be played
	nobody     = 65534
)

// playRole returns only with an error.
func playRole(role string, argv []string) error {
	if err := unix.Mount("none", "/dev/net", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount over /dev/net: %w", err)
	}
	switch role {
	case roleNoTun:
	case roleNobody:
		const tun = "/dev/net/tun"
		if err := unix.Mknod(tun, unix.S_IFCHR, int(unix.Mkdev(10, 200))); err != nil {
			return fmt.Errorf("make %s: %w", tun, err)
		}
		if err := unix.Chmod(tun, 0o666); err != nil { // past the umask
			return fmt.Errorf("make %s: %w", tun, err)
		}
		if err := unix.Setgroups(nil); err != nil {
			return fmt.Errorf("setgroups: %w", err)
		}
		if err := unix.Setresgid(nobody, nobody, nobody); err != nil {
			return fmt.Errorf("setresgid: %w", err)
		}
		if err := unix.Setresuid(nobody, nobody, nobody); err != nil {
			return fmt.Errorf("setresuid: %w", err)
		}
	default:
		return fmt.Errorf("unknown role %q", role)
	}
	return unix.Exec(argv[0], argv, os.Environ())
}
