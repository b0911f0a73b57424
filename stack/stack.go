package stack

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"numastack/dispatch"
	"numastack/numaalloc"
	"numastack/shard"
)

// Stack is a running stack: a TAP device and the shards that serve it.
type Stack struct {
	// Immutable after New.
	cfg      Config
	device   *dispatch.Device
	program  *dispatch.Program // nil with user-space steering
	marker   *dispatch.Marker  // nil with user-space steering, or without the right to have one
	set      *shard.Set
	balance  *rebalancer // nil with one shard on one node
	plan     *Placement
	steering Steering

	costs    atomic.Pointer[Costs] // the rebalancer writes
	topology *numaalloc.Topology   // owned by the rebalancer after New
}

// New opens the device and starts the shards. The error says which part of cfg
// or of the machine is in the way.
func New(cfg Config) (_ *Stack, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("stack config: %w", err)
	}
	topology, costs, plan, err := cfg.place()
	if err != nil {
		return nil, err
	}
	cfg.CPUs = plan.CPUs()
	for _, warning := range plan.Warnings {
		cfg.Logger.Warn("placement", "warning", warning)
	}
	toeplitz, err := cfg.toeplitz()
	if err != nil {
		return nil, fmt.Errorf("stack config: %w", err)
	}
	s := &Stack{cfg: cfg, plan: plan, topology: topology}
	s.costs.Store(costs)
	defer func() {
		if err != nil {
			_ = s.release() // the first error is the one to tell
		}
	}()
	if s.device, err = dispatch.OpenDevice(dispatch.DeviceConfig{
		Name:       cfg.Device,
		Persist:    cfg.Persist,
		UID:        cfg.Owner,
		GID:        cfg.Group,
		HostAddrs:  cfg.HostAddrs,
		HostCPUs:   cfg.HostCPUs,
		MTU:        cfg.MTU,
		TxQueueLen: cfg.TxQueueLen,
		Queues:     cfg.Shards,
		Offload:    cfg.Offload == OffloadAuto,
	}); err != nil {
		return nil, err
	}
	queues := make([]*dispatch.Queue, cfg.Shards)
	for i := range queues {
		queues[i] = s.device.Queue(i)
	}
	reta, err := dispatch.NewRETA(cfg.Groups, cfg.Shards)
	if err != nil {
		return nil, err
	}
	// Before the shards begin, so that no frame arrives unsteered.
	if err = s.steer(toeplitz, reta); err != nil {
		return nil, err
	}
	if s.set, err = shard.New(shard.Config{
		Device:         cfg.Device,
		Queues:         queues,
		MTU:            cfg.MTU,
		Offloads:       shard.Offloads{TCP: cfg.Offload == OffloadAuto, UDP: s.device.Offloads()&dispatch.OffloadUSO != 0},
		Topology:       topology,
		Costs:          costs,
		CPUs:           cfg.CPUs,
		MemoryNodes:    memoryNodes(topology, plan),
		RETA:           reta,
		Toeplitz:       toeplitz,
		Program:        s.program,
		Marker:         s.marker,
		QueueLen:       s.device.TxQueueLen(),
		Addrs:          cfg.Addrs,
		Gateways:       cfg.Gateways,
		Spin:           cfg.Spin,
		Congestion:     cfg.CongestionControl.String(),
		SendBuffer:     cfg.SendBuffer,
		ReceiveBuffer:  cfg.ReceiveBuffer,
		RxBuffers:      cfg.RxBuffers,
		HandlerLimit:   cfg.HandlerLimit,
		OffloadThreads: cfg.OffloadThreads,
		NodeScratch:    cfg.NodeScratch,
		MaxConns:       (cfg.MaxConns + cfg.Shards - 1) / cfg.Shards,
		Drain:          cfg.Drain,
		Logger:         cfg.Logger,
	}); err != nil {
		return nil, err
	}
	if cfg.Shards > 1 || len(topology.Nodes) > 1 {
		s.balance = startRebalancer(cfg.rebalance(), s.set, cfg.Logger, s.Costs, s.adapt)
	}
	cfg.Logger.Info("stack is up",
		"device", cfg.Device, "mtu", cfg.MTU, "offloads", s.device.Offloads().String(),
		"addrs", cfg.Addrs, "shards", cfg.Shards, "groups", cfg.Groups, "cpus", cfg.CPUs,
		"steering", s.steering.String(), "profile", cfg.Profile.String(), "rebalance", cfg.rebalance().String())
	if err := s.set.FirstTouch(); err != nil {
		cfg.Logger.Info("buffers lie where they are touched first", "error", err)
	}
	if runtime.GOMAXPROCS(0) <= cfg.Shards {
		cfg.Logger.Warn("GOMAXPROCS should exceed the number of shards, or other goroutines wait behind them",
			"gomaxprocs", runtime.GOMAXPROCS(0), "shards", cfg.Shards)
	}
	return s, nil
}

// toeplitz returns the hash that the configuration asks for.
func (cfg *Config) toeplitz() (*dispatch.Toeplitz, error) {
	var key dispatch.Key
	var err error
	switch {
	case cfg.HashKey != nil:
		key = *cfg.HashKey
	case cfg.SymmetricHash:
		key, err = dispatch.NewSymmetricKey()
	default:
		key, err = dispatch.NewKey()
	}
	if err != nil {
		return nil, err
	}
	return dispatch.NewToeplitzTypes(key, cfg.HashTypes), nil
}

// steer attaches the steering program, or decides to do without.
func (s *Stack) steer(toeplitz *dispatch.Toeplitz, reta *dispatch.RETA) (err error) {
	s.steering = SteeringUser
	if s.cfg.Steering == SteeringUser {
		return nil
	}
	if s.program, err = dispatch.NewProgram(toeplitz); err == nil {
		err = s.program.SetQueues(reta.Queues())
	}
	if err == nil {
		err = s.device.AttachSteering(s.program.FD())
	}
	if err == nil {
		s.steering = SteeringKernel
		s.device.Discard()
		if s.marker, err = s.device.OpenMarker(); err != nil {
			s.cfg.Logger.Info("flow groups leave a busy shard more slowly than they could", "error", err)
		}
		return nil
	}
	if s.cfg.Steering == SteeringKernel {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("kernel steering: %w; it takes CAP_BPF, user-space steering takes nothing", err)
		}
		return fmt.Errorf("kernel steering: %w", err)
	}
	s.cfg.Logger.Warn("no kernel steering, shards hand frames to each other", "error", err)
	if s.program != nil {
		_ = s.program.Close() // it was never used
		s.program = nil
	}
	return nil
}

// release gives back what New took, in any state of it.
func (s *Stack) release() (err error) {
	if s.balance != nil {
		s.balance.close()
	}
	if s.set != nil {
		s.set.Close()
	}
	if s.program != nil {
		err = s.program.Close()
	}
	if s.marker != nil {
		err = errors.Join(err, s.marker.Close())
	}
	if s.device != nil {
		err = errors.Join(err, s.device.Close())
	}
	return err
}

// Close says goodbye to all peers, stops the shards and releases the device,
// which is removed if New created it without Persist. What was written is sent
// first, for at most Config.Drain. It is idempotent.
func (s *Stack) Close() error { return s.release() }

// Done is closed when the stack was closed, or its device was deleted.
func (s *Stack) Done() <-chan struct{} { return s.set.Done() }

// Err returns why Done was closed: nil after Close, else what happened to the
// device. All connections have failed then, and Close is still to be called.
func (s *Stack) Err() error { return s.set.Err() }

// Steering returns who steers: SteeringKernel or SteeringUser.
func (s *Stack) Steering() Steering { return s.steering }

// Offloads names the offloads that the kernel granted, as in
// "csum,tso4,tso6,ecn,uso", or "none".
func (s *Stack) Offloads() string { return s.device.Offloads().String() }

// Stats is a copy of the stack's counters.
type Stats struct {
	Shards []ShardStats `json:"shards"`
	// KernelDropped is how many frames the kernel lost because a shard did not
	// read its queue in time.
	KernelDropped uint64 `json:"kernel_dropped"`

	Rebalance RebalanceStats `json:"rebalance"`

	// Pools are the node pools that were used, by [Offload] too.
	Pools []PoolStats `json:"pools,omitempty"`
}

// ShardStats is what one shard has counted.
type ShardStats = shard.Counters

// Stats returns the counters of all shards; after Close, the last ones. It
// waits for each shard to finish a turn.
func (s *Stack) Stats() Stats {
	stats := Stats{Shards: s.set.Stats(), Pools: s.set.PoolStats()}
	if s.balance != nil {
		stats.Rebalance = s.balance.stats()
	}
	// Zero when the device is gone.
	stats.KernelDropped, _ = s.device.Dropped()
	return stats
}
