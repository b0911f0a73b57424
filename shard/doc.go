// Package shard runs the data path: a shard is one locked OS thread that takes
// a frame from its TAP queue through TCP/IP and the application to the answer
// that leaves, and shares nothing with other threads on the way.
//
// One turn of the loop (turn.go), each step on the shard's thread:
//
//  1. read: up to a budget of frames, each into a receive buffer (rx.go)
//  2. steer: parse and hash; the flow's group is mine, or its owner's ring gets
//     the frame
//  3. deliver: a segment of an open connection is queued on its endpoint
//     (flow.go), a datagram for an open port goes to its handler (udpflow.go); for
//     all else the group's gVisor netstack does IP and finds the endpoint
//     (group.go, link.go)
//  4. process: TCP of every endpoint that got segments (inline.go)
//  5. timers: retransmission, keep-alive and the like (clock.go, blackhole.go)
//  6. run: tasks from other goroutines (mail.go), then the application: events
//     of connections and sockets (conn.go, listener.go, udp.go), or blocking
//     handlers that go on as coroutines (coroutine.go, offload.go)
//  7. flush: send what was written (send.go), acknowledge what no answer has
//     (flow.go), make frames of it all (out.go) and write them (tx.go); without
//     kernel steering on the queue where the flow arrives (arrivals.go)
//  8. wait: look for work for a while, then block (Shard.wait)
//
// Who owns what: a [Group] and everything in it (netstack, device, clock,
// connections) belongs to the thread of the shard that owns the group. Other
// goroutines reach it through the shard's mailbox, and a [NetConn]'s bytes pass
// through two single-producer, single-consumer rings (netconn.go, bytering.go).
// Frames for another shard go through a bounded ring per pair of shards. One
// goroutine per [Set] watches for handlers that hold their shard (watchdog.go).
//
// Limits: receive buffers per shard, connections per shard, frames per ring,
// accept backlog per listener and group, datagrams per [NetPacketConn], bytes
// per [NetConn] ring, offloaded functions per shard, fragments that wait, frames
// of a group on its way; each has a counter in [Counters] that says when it was hit, or makes its user wait.
//
// A group moves to another shard as a whole, with what is in it and while its
// connections are busy (move.go, drain.go).
//
// What it does not do: open the device, choose the CPUs, or decide what moves
// (packages dispatch and stack).
//
// This is the only package of the stack that imports gVisor, and
// inline_unsafe.go the only file that reaches into it.
package shard
