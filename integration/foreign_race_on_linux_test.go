//go:build race

package integration

// raceFactor is by how much the tests with other people's code do less under
// the race detector: TLS and QUIC are twenty times slower there.
const raceFactor = 16
