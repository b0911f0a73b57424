package shard

// Counters is what one shard has counted since it started. The shard's thread
// writes it without synchronisation; others get a copy (Set.Stats).
type Counters struct {
	Shard int `json:"shard"`
	CPU   int `json:"cpu"`
	Node  int `json:"node"` // NUMA node of CPU

	At uint64 `json:"at_ns"` // when the copy was made, since the stack started

	RxFrames uint64 `json:"rx_frames"` // read from the shard's TAP queue
	RxBytes  uint64 `json:"rx_bytes"`  // the same, from the Ethernet header on
	TxFrames uint64 `json:"tx_frames"` // written; a GSO frame counts once
	TxBytes  uint64 `json:"tx_bytes"`
	TxErrors uint64 `json:"tx_errors"` // frames that the TAP refused: lost

	Missteered uint64 `json:"missteered"` // flow frames read here, owned by another shard
	Forwarded  uint64 `json:"forwarded"`  // frames pushed to another shard's ring
	RingFull   uint64 `json:"ring_full"`  // frames lost because that ring was full
	Received   uint64 `json:"received"`   // frames taken from this shard's own rings

	Dropped        uint64            `json:"dropped"` // sum of DroppedByCause
	DroppedByCause map[string]uint64 `json:"dropped_by_cause,omitempty"`

	BlackHoles uint64 `json:"black_holes"` // connections whose segments were made smaller, because large ones were lost without a word

	NarrowPaths    uint64 `json:"narrow_paths"`           // hosts to which the path is known to be narrower than the link now
	PathsForgotten uint64 `json:"narrow_paths_forgotten"` // or not learnt, because there were too many
	ErrorsIgnored  uint64 `json:"icmp_errors_ignored"`    // errors about packets that were not on their way, and sizes that make no sense

	WindowsShrunk uint64 `json:"windows_shrunk"` // connections whose segments were made smaller, because the peer took back a part of its window

	FragmentsHeld uint64 `json:"fragments_held"` // fragments of IP that waited for the first one of their packet

	AcksSuperseded uint64 `json:"acks_superseded"` // pure ACKs that a later segment of the burst made needless

	GroupsAdopted  uint64 `json:"groups_adopted"`    // flow groups that came from other shards
	GroupsFar      uint64 `json:"groups_far"`        // of those, from another NUMA node, where their memory stays
	GroupsReleased uint64 `json:"groups_released"`   // flow groups that went to others
	FramesKept     uint64 `json:"frames_kept"`       // for groups on their way here
	MoveStall      uint64 `json:"move_stall_ns"`     // time that frames of adopted groups were kept, in all
	MoveStallMax   uint64 `json:"move_stall_max_ns"` // the longest

	Busy        uint64 `json:"busy_ns"`      // time in turns that did work
	Turns       uint64 `json:"turns"`        // passes of the loop that did work
	Wakes       uint64 `json:"wakes"`        // returns from a blocking wait
	Spun        uint64 `json:"spun_ns"`      // time in which the shard has looked for work in vain, before those
	Spin        uint64 `json:"spin_ns"`      // for how long it does so now
	TimersFired uint64 `json:"timers_fired"` // netstack timers run
	Astray      uint64 `json:"astray"`       // turns, of one in 16 that is looked at, that another CPU ran: the shard's is offline, or somebody has changed its thread's affinity

	ConnsOpen     uint64 `json:"conns_open"`     // connections that exist now
	ConnsAccepted uint64 `json:"conns_accepted"` // ever
	ConnsDialed   uint64 `json:"conns_dialed"`   // ever
	ConnsRefused  uint64 `json:"conns_refused"`  // reset because a limit was reached

	Offloads      uint64 `json:"offloads"`       // functions that handlers ran elsewhere
	HandlerPanics uint64 `json:"handler_panics"` // handlers that panicked

	DatagramsDropped uint64 `json:"datagrams_dropped"` // UDP, receiver too slow

	Buffers       uint64 `json:"buffers"`        // receive buffers made
	BuffersLent   uint64 `json:"buffers_lent"`   // of those, held by connections now
	MemoryNode    int    `json:"memory_node"`    // that buffers are bound to; -1: there is nothing to choose
	BytesBound    uint64 `json:"bytes_bound"`    // of receive buffers, to that node
	BindFallbacks uint64 `json:"bind_fallbacks"` // buffers that could not be bound; they lie where they were touched first

	BuffersExhausted uint64 `json:"buffers_exhausted"` // large frames copied because no buffer was free

	Stages []StageCounters `json:"stages"` // where the time of a turn goes

	// What was done from a node to the memory of another, beside GroupsFar.
	BuffersFar      uint64 `json:"buffers_far"`      // frames taken from this shard's rings, in buffers of another node
	GroupsAway      uint64 `json:"groups_away"`      // flow groups here now whose netstack is in another node's memory
	OffloadsSpilled uint64 `json:"offloads_spilled"` // offloaded functions that ran on another node

	Groups []GroupCounters `json:"groups"` // flow groups that the shard owns now
}

// GroupCounters is what one flow group's netstack has counted.
type GroupCounters struct {
	Group          int    `json:"group"`
	Memory         int    `json:"memory"`    // NUMA node where its netstack was made
	Frames         uint64 `json:"frames"`    // delivered to the group
	Bytes          uint64 `json:"bytes"`     // the same, from the Ethernet header on
	Sent           uint64 `json:"sent"`      // packets; one that the kernel cuts counts once
	Busy           uint64 `json:"busy_ns"`   // its part of its shards' busy time, by frames and bytes
	Conns          int32  `json:"conns"`     // connections and dials that the application has
	Served         int    `json:"served"`    // handlers of Serve, for which the group stays on its shard
	Connected      uint64 `json:"connected"` // TCP endpoints now, with those that were closed and wait for their peer
	ChecksumErrors uint64 `json:"checksum_errors"`
	Retransmits    uint64 `json:"retransmits"`
	OutOfOrder     uint64 `json:"out_of_order"`     // TCP segments that came before an earlier one of their flow
	SegmentsLost   uint64 `json:"segments_dropped"` // dropped by gVisor, a full receive buffer for one
}

// FramesPerWake is the number of frames that a return from a blocking wait
// brought on average, or 0 before the first one.
func (c *Counters) FramesPerWake() float64 {
	if c.Wakes == 0 {
		return 0
	}
	return float64(c.RxFrames) / float64(c.Wakes)
}
