// Package dispatch carries frames between a TAP device and the shards, and
// decides which shard a frame belongs to. It knows Ethernet, IP headers and
// ports, and no protocol state.
//
//	kernel peer
//	    │ frame
//	    ▼
//	steering program (kernel)  hash → bucket → queue          Program
//	    ▼
//	TAP queue of a shard       vnet header, frame             Device, Queue
//	    ▼
//	parse                      class, offsets, hash           Toeplitz.Parse
//	    ▼
//	indirection table          bucket → flow group → shard    RETA
//	    │              │
//	    ▼ mine         ▼ another's
//	my flow group      ring to the owner ─▶ its flow group    Ring
//
// The way of a frame:
//
//  1. The kernel runs the steering program on the frame and puts it into the
//     queue of a shard. All shards' queues fill in parallel.
//  2. The shard's thread reads the frame, behind its virtio-net header, into a
//     buffer of its own.
//  3. Toeplitz.Parse classifies the frame and hashes it as the kernel did. The
//     kernel cannot hand its hash over, and computing it takes nanoseconds.
//  4. RETA names the flow group and the shard that owns it now. Mostly that is
//     the shard that asks: kernel and user space use one key and one table.
//     Frames that differ were queued before a group moved.
//  5. A frame of another shard goes to its owner over a Ring.
//
// What decides the group of a frame, by [Toeplitz.Parse]:
//
//	TCP, UDP, unfragmented          addresses and ports
//	fragment                        addresses; then Fragments finds its flow
//	ICMP error                      the quoted packet's flow
//	other ICMP, other IP protocols  addresses
//	ARP, NDP, IGMP, MLD             none: all groups learn, one answers
//	everything else                 none: dropped and counted by class
//
// The hash is RSS's Toeplitz hash with a key drawn at start. [HashTypes] says
// which headers it looks at. A bucket is the low seven bits of the hash, and a
// bucket's flow group never changes; only the shard that owns the group does.
//
// A fragment takes one more step. Its addresses lead it to a group that serves
// as home of all fragments between two hosts. There the [Fragments] of the group
// learn the flow of each datagram from its first fragment, hold those that came
// before it, and send them all to the flow's group.
//
// # Who may call what
//
// A shard's thread reads and writes its Queue, is the only consumer of its
// rings and the only producer of the rings that lead away from it. Toeplitz is
// immutable and shared by all. RETA is read by all shards and written by the
// control plane, as is Program. Fragments belong to a flow group and to the
// thread that owns it. Nothing here starts a goroutine.
//
// # Limits
//
// 128 buckets, at most 128 flow groups and as many shards, 8 IPv6 extension
// headers of 1240 bytes, 256 queues, rings of at most 2^20 frames, per flow group
// 512 fragmented datagrams and 256 fragments held in 512 KiB. Parsing, hashing,
// looking up and the rings allocate nothing.
//
// # What it does not do
//
// VLAN tags, frames that are not Ethernet, IPv6 jumbo payloads, checksums,
// reassembly.
package dispatch
