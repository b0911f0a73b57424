//go:build !linux

package dispatch

import (
	"errors"
	"fmt"
	"net"
	"runtime"
)

// Device cannot be had: TAP devices with several queues exist on Linux only.
type Device struct{}

// Queue cannot be had either. Its methods are on Linux only, since their
// errno and vector types are; so are its users.
type Queue struct{}

// OpenDevice is refused.
func OpenDevice(cfg DeviceConfig) (*Device, error) {
	return nil, fmt.Errorf("open tap %q: %w on %s; want Linux", cfg.Name, errors.ErrUnsupported, runtime.GOOS)
}

// Name is never called, like all that follow: there is no Device.
func (d *Device) Name() string { return "" }

// MTU is never called.
func (d *Device) MTU() int { return 0 }

// HostMAC is never called.
func (d *Device) HostMAC() net.HardwareAddr { return nil }

// Offloads is never called.
func (d *Device) Offloads() Offloads { return 0 }

// TxQueueLen is never called.
func (d *Device) TxQueueLen() int { return 0 }

// Created is never called.
func (d *Device) Created() bool { return false }

// Queues is never called.
func (d *Device) Queues() int { return 0 }

// Queue is never called.
func (d *Device) Queue(int) *Queue { return nil }

// AttachSteering is never called.
func (d *Device) AttachSteering(int) error { return errors.ErrUnsupported }

// Discard is never called.
func (d *Device) Discard() {}

// DetachSteering is never called.
func (d *Device) DetachSteering() error { return errors.ErrUnsupported }

// Dropped is never called.
func (d *Device) Dropped() (uint64, error) { return 0, errors.ErrUnsupported }

// Close is never called.
func (d *Device) Close() error { return errors.ErrUnsupported }
