// Package integration proves the whole stack against the real thing: the
// kernel's TCP/IP, its tools and Go's own net package as peers, over a real TAP
// device. It holds tests only.
//
//	net.Dial, AF_PACKET, ping, iperf3 ── kernel ── TAP ── numastack in this
//	                                                      process, or in an
//	                                                      application built
//	                                                      from apps/
//
// The test binary runs itself again in a network namespace that has nothing but
// a loopback device, so no frame can leave it, whatever a test does. Each test
// opens a stack on a device and in subnets of its own, and ends by looking at
// what was left: connections, receive buffers, descriptors, goroutines.
//
// It takes root, or a user namespace that the system allows, and /dev/net/tun;
// a test that misses something is skipped and says what. Two settings change how
// much is run: -short runs fewer combinations, and the environment variable
// NUMASTACK_SOAK says how long the soak tests run, such as 60s; without it, 3 s.
package integration
