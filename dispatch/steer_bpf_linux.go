package dispatch

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// maxQueues is how many queues a TAP can have (MAX_TAP_QUEUES in
// drivers/net/tun.c).
const maxQueues = 256

// Program is the steering program: it runs in the kernel once per frame that a
// peer sends to the TAP, and picks the queue by the same hash and the same
// bucket as [Toeplitz.Parse] and [RETA]. Give FD to TUNSETSTEERINGEBPF; the
// device holds a reference of its own.
//
// For every frame whose class is [ClassFlow] the queue is the one of the
// frame's bucket. Everything else goes to the queue of bucket 0: ARP and
// neighbor discovery, which user space hands to all groups, and what user space
// will drop. The shard behind that queue sees the noise of the network.
//
// What the kernel does not do:
//   - Tell anybody the hash or the class. User space computes both again.
//   - Keep the fragments of a datagram with its flow. They go by addresses, all
//     to one queue; [Fragments] takes it from there.
//   - Follow a move at once. Frames queued under the old table stay where they
//     are.
//   - Count. A frame for a full queue is gone; the interface's tx_dropped knows.
//
// Until SetQueues is called, all frames go to queue 0. The kernel takes the
// queue modulo the number of queues attached, so a bucket that points to a
// queue that is gone still reaches a queue, though a wrong one: user space has
// to forward.
//
// SetQueues, SetQueue and Close may be called from any goroutine.
type Program struct {
	prog   *ebpf.Program // immutable after NewProgram
	tables *ebpf.Map     // immutable after NewProgram; the kernel only reads it
	reta   *ebpf.Map     // immutable after NewProgram

	mu     sync.Mutex
	queues [Buckets]uint32 // guarded by mu: what reta holds
}

// NewProgram builds the steering program for a hash key and its hash types, and
// has the kernel check it. The error matches [os.ErrPermission] if the process may not load programs:
// CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN, would do. It needs Linux 5.3;
// before 5.11 its 40 KiB count against RLIMIT_MEMLOCK.
func NewProgram(t *Toeplitz) (_ *Program, err error) {
	p := new(Program)
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	p.tables, err = ebpf.NewMap(&ebpf.MapSpec{
		Name:       "steer_tables",
		Type:       ebpf.Array,
		KeySize:    4,
		ValueSize:  tablesLen,
		MaxEntries: 1,
		Flags:      unix.BPF_F_RDONLY_PROG,
		Contents:   []ebpf.MapKV{{Key: uint32(0), Value: &t.tables}},
	})
	if err != nil {
		return nil, fmt.Errorf("create steering hash tables: %w", err)
	}
	if err := p.tables.Freeze(); err != nil {
		return nil, fmt.Errorf("freeze steering hash tables: %w", err)
	}
	p.reta, err = ebpf.NewMap(&ebpf.MapSpec{
		Name:       "steer_reta",
		Type:       ebpf.Array,
		KeySize:    4,
		ValueSize:  Buckets * 4,
		MaxEntries: 1,
		Flags:      unix.BPF_F_RDONLY_PROG,
	})
	if err != nil {
		return nil, fmt.Errorf("create steering indirection table: %w", err)
	}
	p.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "steer",
		Type:         ebpf.SocketFilter,
		Instructions: steeringInstructions(t.types, p.tables.FD(), p.reta.FD()),
		// The helpers we call are open to programs of any licence; this is the
		// one of the project.
		License: "Apache-2.0",
	})
	if err != nil {
		return nil, loadError(err)
	}
	return p, nil
}

// loadError keeps the verifier's EACCES, which says that the program is bad,
// from looking like the lack of a permission. Only the verifier writes a log.
func loadError(err error) error {
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) && len(refused.Log) > 0 {
		return fmt.Errorf("load steering program: the verifier refuses it: %s", err.Error())
	}
	return fmt.Errorf("load steering program: %w", err)
}

// FD returns the file descriptor of the program, valid until Close.
func (p *Program) FD() int { return p.prog.FD() }

// SetQueues replaces the whole indirection table of the kernel. Frames that the
// kernel steers meanwhile see some buckets of the old and some of the new table.
func (p *Program) SetQueues(queues [Buckets]uint32) error {
	for b, q := range queues {
		if q >= maxQueues {
			return fmt.Errorf("steer bucket %d to queue %d, want a queue below %d", b, q, maxQueues)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.write(queues)
}

// SetQueue points one bucket at a queue.
func (p *Program) SetQueue(bucket int, queue uint32) error {
	if bucket < 0 || bucket >= Buckets || queue >= maxQueues {
		return fmt.Errorf("steer bucket %d to queue %d, want a bucket below %d and a queue below %d", bucket, queue, Buckets, maxQueues)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	queues := p.queues
	queues[bucket] = queue
	return p.write(queues)
}

// write stores the table as one map value. The kernel copies it without a lock;
// that a queue number fits into one byte keeps a reader from seeing half of it.
func (p *Program) write(queues [Buckets]uint32) error {
	if err := p.reta.Put(uint32(0), &queues); err != nil {
		return fmt.Errorf("write steering indirection table: %w", err)
	}
	p.queues = queues
	return nil
}

// Close lets go of the program and its tables. A device that the program is
// attached to keeps steering by the last table. Further calls do nothing.
func (p *Program) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.prog.Close(), p.reta.Close(), p.tables.Close())
}
