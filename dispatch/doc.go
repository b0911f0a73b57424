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
//	fragment                        addresses
//	ICMP error                      the quoted packet's flow
//	other ICMP, other IP protocols  addresses
//	ARP, neighbor discovery         none: all groups learn, one answers
//	everything else                 none: dropped and counted by class
//
// The hash is RSS's Toeplitz hash with a key drawn at start. A bucket is the low
// seven bits of the hash, and a bucket's flow group never changes; only the
// shard that owns the group does.
//
// # Who may call what
//
// A shard's thread reads and writes its Queue, is the only consumer of its
// rings and the only producer of the rings that lead away from it. Toeplitz is
// immutable and shared by all. RETA is read by all shards and written by the
// control plane, as is Program. Nothing here starts a goroutine.
//
// # Limits
//
// 128 buckets, at most 128 flow groups and as many shards, 8 IPv6 extension
// headers, 256 queues, rings of at most 2^20 frames. Parsing, hashing, looking
// up and the rings allocate nothing.
//
// # What it does not do
//
// VLAN tags, frames that are not Ethernet, IPv6 jumbo payloads, checksums. It
// does not reassemble: fragments of a datagram meet in one group by addresses.
package dispatch
