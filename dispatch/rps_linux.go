package dispatch

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hostCPUChanges has the kernel go on with what we send on cpus: receive packet
// steering, for which each of our queues has a mask
// (Documentation/networking/scaling.rst). The changes use sys.
func (d *Device) hostCPUChanges(sys *os.Root, cpus []int) (changes []change, err error) {
	want := new(big.Int)
	for _, cpu := range cpus {
		want.SetBit(want, cpu, 1)
	}
	for i := range d.queues {
		file := maskFile(d.name, i)
		present, err := readMask(sys, file)
		if err != nil {
			return nil, err
		}
		if present.Cmp(want) == 0 {
			continue
		}
		changes = append(changes, change{
			command: fmt.Sprintf("echo %s > /sys/%s", formatMask(want), file),
			do: func() error {
				err := writeMask(sys, file, want)
				if err == nil {
					err = checkMask(sys, file, want)
				}
				if err != nil {
					_ = writeMask(sys, file, present) // the error that matters is the first one
				}
				if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOVERFLOW) {
					err = fmt.Errorf("HostCPUs: %w; want CPUs that are online and not isolated", err)
				}
				return err
			},
			undo: func() error { return writeMask(sys, file, present) },
		})
	}
	return changes, nil
}

// checkMask reads back what the kernel made of a mask: it leaves out CPUs that
// are offline or isolated from its work (isolcpus).
func checkMask(sys *os.Root, file string, want *big.Int) error {
	got, err := readMask(sys, file)
	if err == nil && got.Cmp(want) != 0 {
		err = fmt.Errorf("%w: of CPUs %s the kernel took %s", unix.EINVAL, formatMask(want), formatMask(got))
	}
	return err
}

// maskFile is the file of a queue's mask in sysfs.
func maskFile(device string, queue int) string {
	return fmt.Sprintf("class/net/%s/queues/rx-%d/rps_cpus", device, queue)
}

func readMask(sys *os.Root, file string) (*big.Int, error) {
	b, err := sys.ReadFile(file)
	if err != nil {
		return nil, err
	}
	mask, ok := new(big.Int).SetString(strings.ReplaceAll(string(bytes.TrimSpace(b)), ",", ""), 16)
	if !ok {
		return nil, fmt.Errorf("%s has %q; want a mask of CPUs", file, b)
	}
	return mask, nil
}

func writeMask(sys *os.Root, file string, mask *big.Int) error {
	err := sys.WriteFile(file, []byte(formatMask(mask)), 0)
	if path, ok := errors.AsType[*os.PathError](err); ok {
		err = path.Err // it would name our descriptor
	}
	return err
}

// formatMask writes hexadecimal digits, with commas between each 8 as the
// kernel wants them (bitmap_parse of lib/bitmap-str.c).
func formatMask(mask *big.Int) string {
	s := mask.Text(16)
	for i := len(s) - 8; i > 0; i -= 8 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// openSysfs opens a sysfs that shows tap. /sys is that of the network namespace
// it was mounted in, so a new one is made, which nobody else sees; where that is
// not permitted, /sys has to do.
func openSysfs(tap *netlink.Tuntap) (*os.Root, error) {
	sys, err := mountSysfs()
	if err != nil {
		if sys, err = os.OpenRoot("/sys"); err != nil {
			return nil, err
		}
	}
	address, err := sys.ReadFile("class/net/" + tap.Name + "/address")
	if err == nil && string(bytes.TrimSpace(address)) != tap.HardwareAddr.String() {
		err = errors.New("another device has its name in /sys")
	}
	if err != nil {
		_ = sys.Close()
		return nil, fmt.Errorf("%w; want a sysfs of the device's network namespace at /sys, or CAP_SYS_ADMIN to make one", err)
	}
	return sys, nil
}

// mountSysfs makes a sysfs of this thread's network namespace, attached nowhere
// (fsmount(2), Linux 5.2).
func mountSysfs() (*os.Root, error) {
	fs, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, err
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(mount) }()
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", mount))
}
