// Package stack is a userspace TCP/IP stack for Go servers that keeps a
// connection at home: on one core of one NUMA node, from the frame that arrives
// to the ACK and the answer that leave.
//
//	kernel peer ── TAP, one queue per shard: the kernel picks the queue with our
//	     │         eBPF program: hash(tuple) → bucket → flow group → shard
//	     ▼
//	shard thread (locked OS thread, pinned CPU, one NUMA node)
//	  read → steer → deliver → TCP → timers → application → flush → wait
//
// [New] opens a TAP device and starts the shards. The application then has
// three doors:
//
//   - Events on the shard: [Stack.HandleTCP] and [Stack.HandleUDP] call a
//     [Handler] on the thread that received the bytes, without a copy. Fastest;
//     the handler must not block.
//   - Blocking code on the shard: [Stack.Serve] runs a func(net.Conn) as a
//     coroutine of that thread. Waiting for the peer lets the shard go on; other
//     work that blocks goes through [Offload].
//   - Any goroutine: [Stack.Listen], [Stack.ListenPacket] and
//     [Stack.DialContext] give a net.Listener, net.PacketConn and net.Conn;
//     [Stack.ListenMulticastUDP] a net.PacketConn in a multicast group.
//
// Flow groups move between shards with their live connections: by
// [Stack.Move], [Stack.SetRETA] and [Stack.Drain], or by load ([Rebalance]).
//
// Every connection tells the shard, the CPU and the NUMA node where its
// segments are processed; see [Where] and [OnMove]. [Stack.NodePool] runs
// functions of any goroutine on a node, and [Stack.Costs] says what memory of
// another node costs.
//
// The methods of Stack may be called from any goroutine except from a
// Handler's events, unless they say otherwise. Only Linux is supported.
package stack
