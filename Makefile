# `make` lists the targets. Needed beforehand: Go, git and make. What else a
# target uses, it installs through apt-get when run as root, and names when not.

GO       ?= go
FUZZTIME ?= 20s
# How long each soak test puts load on a stack.
SOAK     ?= 10s
# More flags for one run: make test TESTFLAGS=-v, make bench BENCHFLAGS=-help,
# make numa GUESTFLAGS=-v.
TESTFLAGS  ?=
BENCHFLAGS ?=
GUESTFLAGS ?=

# The kernel of the guests, outside the tree: clones share it, clean leaves it.
GUEST_KERNEL := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/numastack-guest

# The linter is built once per version and Go release, outside the module, so
# that its dependencies stay out of go.sum. One built by an older Go than go.mod
# asks for refuses to run, hence the release in the name.
GOLANGCI_VERSION := v2.15.0
GOLANGCI_DIR     := $(shell $(GO) env GOPATH 2>/dev/null)/bin/golangci-lint-$(GOLANGCI_VERSION)-$(shell $(GO) env GOVERSION 2>/dev/null)
GOLANGCI         := $(GOLANGCI_DIR)/golangci-lint

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
# Debian keeps ip and tc out of an ordinary user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets at once would share the cores that tests and measurements pin.
.NOTPARALLEL:
.PHONY: help build test unit integration race numa fuzz bench bench-check bench-report pgo demo lint fmt clean setup setup-race setup-numa

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

build: ## compile everything, programs into bin/
	$(GO) build -trimpath -o bin/ ./...

test: unit integration ## run the unit tests, then the integration tests

# Without -buildvcs=false, go list fails for root in a checkout of another user.
# -pgo=off, here and below: with a profile, each program compiles all it imports anew.
unit: setup ## run the tests beside the code
	$(GO) list -buildvcs=false ./... | { grep -v '/integration\(/\|$$\)' || true; } | xargs -r $(GO) test -pgo=off -shuffle=on $(TESTFLAGS)

# One package at a time: these tests load both ends of a connection.
integration: setup ## run the tests with real TAP devices and real clients
	NUMASTACK_SOAK=$(SOAK) $(GO) test -p 1 -timeout 20m -shuffle=on $(TESTFLAGS) ./integration/...

# One package at a time: pinned threads of two packages would wait for each other.
# The short versions: the detector makes the long ones take a quarter of an hour.
race: setup setup-race ## run all tests, in their short versions, under the race detector
	$(GO) test -p 1 -race -short -pgo=off -shuffle=on $(TESTFLAGS) ./...

# Without cgo because the program is the guest's first process, too. A machine
# that has no QEMU, or no Debian to get it and the kernel from, is no failure.
numa: ## run the tests of placement in throw-away guests with several NUMA nodes
	@if ! $(MAKE) --no-print-directory setup-numa; then \
		echo "make $@: SKIPPED: no QEMU or no kernel for a guest, see above"; \
		exit 0; \
	fi; \
	CGO_ENABLED=0 GOAMD64=v1 $(GO) run ./integration/guest -kernel $(GUEST_KERNEL) $(GUESTFLAGS) \
		-programs ./apps/echo ./numaalloc ./integration=TestNodes

# `go test -fuzz` takes one target of one package, so list them first.
fuzz: ## run each fuzz target for FUZZTIME (20s)
	@$(GO) test -list '^Fuzz' ./... | \
	awk '/^Fuzz/ { names[++n] = $$1 } /^ok/ { for (i = 1; i <= n; i++) print $$2, names[i]; n = 0 }' | \
	while read -r package name; do \
		echo "== $$package $$name"; \
		$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null; \
	done

bench: setup ## measure against the peers, short version
	$(GO) run ./bench -quick $(BENCHFLAGS)

# Rows and peers as in the file, so that a slow machine slows both sides of a ratio.
CHECK_ROWS := bulk_in_1,bulk_in_8,bulk_out_1,bulk_out_8,pingpong_1,pingpong_64,short,net_in_1,net_out_1,net_pingpong_64
bench-check: setup ## fail when a ratio to gVisor is under half of that in bench/results/quick.json
	$(GO) run -pgo=off ./bench -quick -check bench/results/quick.json -peers numastack,gvisor \
		-rows $(CHECK_ROWS) -rounds 2 -duration 500ms $(BENCHFLAGS)

# The rows by the program that serves them. The peers serve in the bench; what they
# do in the rows PGO_BENCH are samples of the others.
PGO_ECHO  := bulk_in_1 bulk_in_8 bulk_out_1 bulk_out_8 pingpong_64 short
PGO_HTTPD := http_shard http_net
PGO_BENCH := net_in_1 net_out_1 net_pingpong_64 udp_in_64 udp_in_gso udp_out_64 udp_out_gso
pgo: setup ## profile the programs under load, for the compiler (default.pgo)
	dir=$$(mktemp -d); \
	trap 'rm -rf "$$dir"' EXIT; \
	rows() { local row; for row in $$2; do echo "$$dir/$$row-$$1.pprof"; done; }; \
	shared='$(PGO_ECHO) $(PGO_HTTPD)'; \
	all="$$shared $(PGO_BENCH)"; \
	$(GO) run ./bench -quick -rounds 1 -duration 3s -peers numastack,gvisor,kernel -rows "$${all// /,}" -cpuprofile "$$dir"; \
	$(GO) tool pprof -proto $$(rows numastack '$(PGO_ECHO)') >apps/echo/default.pgo; \
	$(GO) tool pprof -proto $$(rows numastack '$(PGO_HTTPD)') >apps/httpd/default.pgo; \
	$(GO) tool pprof -proto $$(rows numastack '$(PGO_BENCH)') $$(rows gvisor "$$shared") $$(rows kernel "$$shared") >bench/default.pgo

bench-report: ## draw bench/results/full.json, and fill in the tables that documents quote
	$(GO) run -pgo=off ./bench -plot bench/results/full bench/results/full.json
	$(GO) test -pgo=off ./bench -run '^TestDocuments$$' -update

demo: setup ## show the stack at work
	$(GO) run ./bench -demo $(BENCHFLAGS)

lint: $(GOLANGCI) ## check go.mod, vet, fix, format and lint; change nothing
	$(GO) mod tidy -diff
	$(GO) vet ./...
	$(GO) fix -diff ./...
	$(GOLANGCI) fmt --diff
	$(GOLANGCI) run

fmt: $(GOLANGCI) ## format the code
	$(GOLANGCI) fmt

clean: ## remove what the other targets wrote
	rm -rf bin bench/tmp coverage*
	find . -type f \( -name '*.test' -o -name '*.out' -o -name '*.prof' \) -not -path './.git/*' -delete

$(GOLANGCI):
	GOBIN=$(GOLANGCI_DIR) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)

# $(call need,WHAT:PACKAGE ...) installs the Debian package of every command or
# file WHAT that is not there. It costs nothing when all of them are.
define need
@missing=; \
for pair in $(1); do \
	what=$${pair%%:*}; \
	command -v "$$what" >/dev/null || [ -e "$$what" ] || missing+=" $${pair#*:}"; \
done; \
if [ -z "$$missing" ]; then exit 0; fi; \
if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	echo "make $@: not installed:$$missing; as root: apt-get install$$missing" >&2; exit 1; \
fi; \
echo "make $@: installing$$missing"; \
apt-get update -qq; \
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing
endef

setup: # the clients that tests and measurements start, and the TAP driver
	$(call need,iperf3:iperf3 ip:iproute2 curl:curl wrk:wrk h2load:nghttp2-client redis-benchmark:redis-tools)
	@[ -c /dev/net/tun ] || modprobe tun 2>/dev/null || \
		echo "make $@: no /dev/net/tun and no module tun: tests that need a TAP device will skip" >&2

setup-race: # the race detector is linked through cgo
	$(call need,gcc:gcc /usr/include/stdlib.h:libc6-dev)

setup-numa: # what emulates the guests, and their kernel
	$(call need,qemu-system-x86_64:qemu-system-x86)
	@integration/guest/fetch-kernel $(GUEST_KERNEL)
