// Bench puts numastack beside the stacks a Go server would otherwise use, and beside what
// the device itself carries:
//
//	numastack   on a TAP, one shard: apps/echo and apps/httpd, and for the rows net, idle and
//	            udp this program, with package stack
//	gvisor      gVisor's netstack on the same kind of TAP through fdbased, one queue,
//	            gonet, one goroutine per connection, every option at its default
//	gvisor_gso  gVisor's netstack as runsc makes it fast: on a packet socket at one end of a
//	            veth pair, with vnet header, GSO, GRO and recvmmsg; else as gvisor
//	kernel      package net on the kernel's TCP and UDP, over a veth pair between two
//	            namespaces
//	limit       no stack: a loop that moves frames between the same kind of TAP and one
//	            buffer, for the rows whose frames it can imitate
//
// # How a row is measured
//
//  1. The command starts itself again in a network namespace of its own. It has no route
//     out, so a load whose device has gone cannot reach a real network.
//  2. For every sample a fresh server process is started on the server's CPU, and a fresh
//     client process on the client's CPU. Both inherit the affinity before their runtime
//     starts its first thread, so the whole process has one core, GOMAXPROCS included.
//  3. The client is the same for all peers and uses kernel sockets, whose congestion control
//     is Reno unless -congestion says otherwise: one that paces measures the client's timers.
//     It warms up, then notes
//     time, bytes or operations, and the server's CPU time at both ends of one window.
//  4. The peers alternate inside every round, and the first one rotates. A row's figure is
//     the median of its rounds: neighbours on a shared host move absolute figures by a
//     third within an hour, so only ratios inside one run mean anything.
//  5. Rows in which a peer does the same, as in bulk_in_1 and net_in_1, share its sample.
//
// # Rows
//
//	bulk_in_1, bulk_in_8     client to the server's discard port, bytes acknowledged, Gbit/s
//	bulk_out_1, bulk_out_8   the server's chargen port to the client, bytes read, Gbit/s;
//	                         numastack's sends a block, without a copy
//	pingpong_1               64-byte echo, one connection, median round trip in µs; numastack
//	                         spins for up to a second before it sleeps, the client always
//	                         sleeps
//	pingpong_64              64-byte echo on 64 connections, requests/s
//	short                    connect, echo 64 bytes once, reset; 8 at a time, connections/s
//	net_in_1, net_out_1      as bulk_in_1 and bulk_out_1, but numastack serves like the peers:
//	                         goroutines that read or write a net.Conn, buffers of 128 KiB
//	net_pingpong_64          as pingpong_64, with a goroutine and a net.Conn per connection
//	http_shard               GET of a few bytes on 64 kept connections, requests/s; numastack:
//	                         apps/httpd -engine shard, peers: fasthttp
//	http_net                 the same with apps/httpd -engine nethttp, peers: net/http
//	idle_events, idle_shard, idle_net
//	                         memory of the server process per idle connection, by door, bytes
//
// And unless -quick is given, or with it by name:
//
//	bulk_*_32, bulk_*_128    as bulk_in_1 and bulk_out_1, with more streams
//	bulk_out_*_copy          as bulk_out_1, 8 and 128, but numastack's chargen copies what it
//	                         sends, like one that has just made it
//	bulk_*_mtu9000, bulk_*_mtu65521
//	                         with 1 and 8 streams and another MTU
//	pingpong_1_sleep         as pingpong_1, but numastack sleeps whenever it has no frame
//	pingpong_*_1b, pingpong_*_1k, pingpong_*_16k
//	                         with messages of 1 byte, 1 KiB and 16 KiB
//	pingpong_512             as pingpong_64 on 512 connections
//	latency_1, latency_64    64-byte echo at half load on 1 and 64 connections, 99th percentile
//	                         in µs, see below
//	udp_in_64, udp_in_gso    datagrams to the server's discard port, as fast as the client
//	                         sends, of 64 bytes (datagrams/s), and of the MTU's size, 44 in a
//	                         frame with segmentation offload (Gbit/s); what the application
//	                         received counts, and at most 1 MiB waits in numastack's TAP
//	udp_out_64, udp_out_gso  the same from the server's chargen port; the client asks for
//	                         bursts so that up to 768 KiB or 1024 datagrams are on their way.
//	                         The kernel's server uses UDP_SEGMENT and UDP_GRO, the others
//	                         send and receive datagram by datagram
//	                         (numastack's stack puts those together that leave at once)
//	shards_1, shards_2, shards_4
//	                         pingpong_64 with so many shards of numastack, all on the server's
//	                         CPU and without spinning, which would take the CPU from each
//	                         other: CPU time per request in µs
//
// The HTTP client is wrk (one thread, whole seconds) where it is installed, after a warm-up
// by this program, and else this program alone. An error or an answer without success fails
// the sample. The peers' HTTP servers have no timeouts set; apps/httpd has.
//
// An idle connection has had one message echoed. Its memory is how much the server's resident
// set grew from before the first connection to when all are open, divided by them, both times
// after a garbage collection that gave free pages back. Handlers of shard, net and the kernel
// hold a buffer of 4 KiB each while they wait, those of events need none. The kernel's figure
// leaves out its own memory of a socket, which numastack's stack has in the process: so this
// row has no target. gVisor has no part in it.
//
// MTU is 1500 unless the row's name has another. TAP and veth keep their default offloads,
// except that fdbased can use none on a TAP: it reads and writes one MTU-sized frame per
// system call. gvisor_gso has no part in udp_in_gso: it would take a frame of many datagrams
// for one.
//
// The CPU columns hold the server process's user and system time. They leave out what the
// kernel does for it in another thread's context: on veth, most of the server's receive path
// runs in the client's send. Compare throughput first and CPU second.
//
// # Latency at half load
//
// A client that waits for its answers sends less while the server stalls, and so leaves out
// most of what a stall costs (coordinated omission). The rows latency therefore have an open
// loop: requests are due at the times of a Poisson process, the same for every peer, and are
// sent whether or not earlier ones were answered. A latency runs from when the request was
// due. The rate is half of what numastack reached, before the first round, with a client that
// waits; all peers get that rate, even one that it overloads. An answer that is missing a
// second after the window counts with the time it has taken so far. The client spins; how
// late it was itself is in the JSON (sent_late_p99_us), and a result where that is not far
// below the latencies says nothing about the server.
//
// # The limit
//
// The column limit holds what the TAP and the client carry without a stack, and "/ limit"
// how much of that numastack reaches. A sender of TCP would want acknowledgements, so the
// frames are UDP, otherwise like TCP's: as many segments of the MTU in a frame as fit into
// 64 KiB, a vnet header, checksums left to the other side; one system call per frame, one
// buffer, spinning as long as a shard by default.
//
//	in     the kernel's client sends (UDP_SEGMENT), the loop reads and forgets. Bytes are those
//	       that were read, by the TAP's own counter. About 1 MiB waits at most, as with
//	       numastack's window; what the client sends beyond that the kernel drops
//	out    the loop writes what the client has asked for, four frames per request, up to
//	       768 KiB on their way, and the client reads whole frames (UDP_GRO)
//
// Its bytes are payload, as in the other columns. Either end may be what is limited: compare
// the CPU columns too. The kernel's own column may exceed it, because on veth nothing is
// copied on the way. The limit does not know streams, so all rows of one direction and MTU
// share its samples.
//
// # Results
//
// -out leaves the result in a file: where and from what it was measured, medians, every
// sample, and what numastack's device carried in each (traffic). Such files are read back:
//
//	-compare OLD NEW   medians, confidence intervals, Mann-Whitney U test, ratios to the kernel
//	-plot DIR FILE     ratios, latencies and cycles per byte, as SVG and PNG
//	-markdown FILE     the tables that README.md and docs/performance.md quote
//	-capacity FILE     what one core carries, how many a link needs, by measured costs
//
// With -check FILE a run fails when a ratio to gVisor is under half of the file's, or
// under a quarter where that is of another model of CPU or has other page lists.
//
// # Demo
//
// With -demo the command runs apps/echo and apps/iperf3 on two shards each, drives them with
// the real iperf3 when it is installed, and prints what the shards counted.
//
// # What is left behind
//
// Nothing. Namespaces and devices live as long as the processes in them; every process has
// a deadline, and the kernel kills it when the process that started it dies.
package main
