// Bench puts numastack beside the two stacks a Go server would otherwise use:
//
//	numastack   apps/echo on a TAP, one shard
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
//
// # Rows
//
//	bulk_in_1, bulk_in_8     client to the server's discard port, bytes acknowledged, Gbit/s
//	bulk_out_1, bulk_out_8   the server's chargen port to the client, bytes read, Gbit/s
//	pingpong_1               64-byte echo, one connection, median round trip in µs; numastack
//	                         spins instead of sleeping here, the client always sleeps
//	pingpong_64              64-byte echo on 64 connections, requests/s
//	short                    connect, echo 64 bytes once, reset; 8 at a time, connections/s
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
