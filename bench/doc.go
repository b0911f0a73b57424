// Bench puts numastack beside the two stacks a Go server would otherwise use:
//
//	numastack   on a TAP, one shard: apps/echo and apps/httpd, and for the rows net and idle
//	            this program, with package stack
//	gvisor      gVisor's netstack on the same kind of TAP through fdbased, one queue,
//	            gonet, one goroutine per connection, every option at its default
//	kernel      package net on the kernel's TCP, over a veth pair between two namespaces
//
// # How a row is measured
//
//  1. The command starts itself again in a network namespace of its own. It has no route
//     out, so a load whose device has gone cannot reach a real network.
//  2. For every sample a fresh server process is started on the server's CPU, and a fresh
//     client process on the client's CPU. Both inherit the affinity before their runtime
//     starts its first thread, so the whole process has one core, GOMAXPROCS included.
//  3. The client is the same for all peers and uses kernel sockets. It warms up, then notes
//     time, bytes or operations, and the server's CPU time at both ends of one window.
//  4. The peers alternate inside every round, and the first one rotates. A row's figure is
//     the median of its rounds: neighbours on a shared host move absolute figures by a
//     third within an hour, so only ratios inside one run mean anything.
//  5. Rows in which a peer does the same, as in bulk_in_1 and net_in_1, share its sample.
//
// # Rows
//
//	bulk_in_1, bulk_in_8     client to the server's discard port, bytes acknowledged, Gbit/s
//	bulk_out_1, bulk_out_8   the server's chargen port to the client, bytes read, Gbit/s
//	pingpong_1               64-byte echo, one connection, median round trip in µs; numastack
//	                         spins instead of sleeping here, the client always sleeps
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
// MTU is 1500 everywhere. TAP and veth keep their default offloads, except that fdbased
// can use none on a TAP: it reads and writes one MTU-sized frame per system call.
//
// The CPU columns hold the server process's user and system time. They leave out what the
// kernel does for it in another thread's context: on veth, most of the server's receive path
// runs in the client's send. Compare throughput first and CPU second.
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
