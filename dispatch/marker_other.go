//go:build !linux

package dispatch

import "errors"

// Marker is for Linux only.
type Marker struct{}

// OpenMarker is never called.
func (d *Device) OpenMarker() (*Marker, error) { return nil, errors.ErrUnsupported }

// Send is never called.
func (m *Marker) Send(int, uint64) error { return errors.ErrUnsupported }

// Number is never called.
func (m *Marker) Number([]byte) (uint64, bool) { return 0, false }

// Close is never called.
func (m *Marker) Close() error { return errors.ErrUnsupported }
