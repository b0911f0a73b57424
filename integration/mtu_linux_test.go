package integration

import (
	"testing"

	"numastack/stack"
)

// TestMTU echoes streams and datagrams at every size of link, looking at each
// frame that crosses: its length, and the checksums of what the stack sent.
func TestMTU(t *testing.T) {
	const ethernetLen = 14
	mtus := []int{576, 1280, 1500, 9000, 65_521}
	if testing.Short() {
		mtus = []int{576, 9000}
	}
	for _, mtu := range mtus {
		for _, offload := range []stack.OffloadMode{stack.OffloadAuto, stack.OffloadOff} {
			v := variant{2, stack.SteeringAuto, offload}
			cfg := v.config()
			cfg.MTU = mtu
			t.Run(v.String()+"/mtu="+itoa(mtu), func(t *testing.T) {
				r := open(t, cfg)
				r.serveEcho(t, nil)
				c := captureDevice(t, r.device)
				r.forFamilies(t, func(t *testing.T, f family) {
					for i, size := range []int{1, mtu - 100, mtu, 3 * mtu, 1 << 20} {
						if err := exchange(dialTCP(t, f.self, echoPort), payload(uint64(i), size)); err != nil {
							t.Errorf("%d bytes: %v", size, err)
						}
					}
					const ip4UDP, ip6UDP = 20 + 8, 40 + 8
					for _, size := range []int{1, mtu - ip6UDP, mtu - ip6UDP + 1, mtu - ip4UDP, mtu - ip4UDP + 1, 3 * mtu} {
						if size <= 65_487 {
							echoDatagrams(t, f, size)
						}
					}
				})
				frames := c.end(t)

				checked := 0
				for i := range frames {
					if !frames[i].ours {
						continue
					}
					transport, err := frames[i].verify()
					if err != nil {
						t.Fatalf("frame %d, which the stack sent, %d bytes: %v\n% x", i, len(frames[i].bytes), err, frames[i].bytes[:min(len(frames[i].bytes), 100)])
					}
					if transport {
						checked++
					}
					if n := frames[i].wireLen(); n > mtu+ethernetLen {
						t.Fatalf("frame %d of the stack is %d bytes long when it is cut, want at most %d", i, n, mtu+ethernetLen)
					}
					if offload == stack.OffloadOff && frames[i].partial {
						t.Fatalf("frame %d of the stack has a partial checksum, with offload off", i)
					}
				}
				// The SYN-ACKs alone are as many.
				if checked < 5 {
					t.Errorf("only %d of %d frames of the stack had a checksum to verify, want at least 5", checked, len(frames))
				}
				ours, kernels := longest(frames)
				switch limit := mtu + ethernetLen; {
				case offload == stack.OffloadOff && (ours > limit || kernels > limit):
					t.Errorf("frames of up to %d bytes from the stack and %d from the kernel, want at most %d", ours, kernels, limit)
				case offload == stack.OffloadAuto && mtu <= 9000 && (ours <= limit || kernels <= limit):
					t.Errorf("frames of up to %d bytes from the stack and %d from the kernel: no offload took place", ours, kernels)
				}
			})
		}
	}
}
