// Command iperf3 measures throughput, loss and jitter with the protocol of the iperf3 tool, as server and as client,
// over numastack or over the kernel's sockets. Either end works with the original iperf3 at the other end.
//
//	client                                server
//	  │── control: cookie ──────────────────▶│  one test at a time; others are told "busy"
//	  │◀─ PARAM_EXCHANGE ─────────────────── │
//	  │── parameters (JSON) ────────────────▶│
//	  │◀─ CREATE_STREAMS ─────────────────── │
//	  │══ data streams, each with the cookie ═▶│  UDP: a connect message, answered
//	  │◀─ TEST_START, TEST_RUNNING ───────── │
//	  │══ blocks, one way or both ═══════════ │
//	  │── TEST_END ─────────────────────────▶│
//	  │◀─ EXCHANGE_RESULTS ───────────────── │
//	  │── results ──▶   ◀── results ──────── │
//	  │◀─ DISPLAY_RESULTS ────────────────── │
//	  │── IPERF_DONE ───────────────────────▶│
//
// Who does what: one goroutine drives a test from its control connection ([server.conduct], [client.conduct]) and owns
// everything that is not a counter. Each stream has one goroutine that sends or receives blocks and only touches its own
// buffer and its own counters. UDP streams of the server share one socket, so there one goroutine receives for all.
//
// Limits: 128 streams, blocks of 1 MiB (TCP) or 65,507 bytes (UDP), one test at a time, a deadline on every step.
// Not done: SCTP, authentication, -F, -Z, -A, TOS and congestion control selection, which the server ignores or refuses.
package main
