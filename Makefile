# `make help` lists the targets. Needs Go and git; what else a target needs,
# .ci/tools builds or installs.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BINARY ?= bin/unitmeter
TESTFLAGS ?=
PKG ?= ./...
export FUZZTIME

# Where the tests can run, a skipped test is a failed one.
CAN_RUN_ALL := $(shell [ "$$(uname)" = Linux ] && [ "$$(id -u)" = 0 ] && grep -qs ' cgroup2 ' /proc/mounts && echo 1)
TESTENV = $(if $(CAN_RUN_ALL),UNITMETER_TEST_NO_SKIP=1)

.DEFAULT_GOAL := build
.NOTPARALLEL:
.PHONY: build test demo lint fmt fuzz bench conformance test-matrix test-kernels tools shell clean help

build: ## build bin/unitmeter, a static binary
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -tags grpcnotrace -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) ./cmd/unitmeter

# The race detector needs cgo. `make lint` has vetted already. The timeout is for
# each package.
test: tools lint build ## lint, then run all tests; PKG=./config TESTFLAGS=-run=X for some
	$(TESTENV) CGO_ENABLED=1 go test -race -vet=off -timeout 30m $(TESTFLAGS) $(PKG)

demo: ## meter a NATS server under load in a throwaway systemd (root; changes nothing on the host)
	.ci/tools demo
	$(MAKE) --no-print-directory build
	go run ./examples/otel-collector/demo

lint: ## gofmt, go vet for Linux and macOS, staticcheck, golangci-lint, govulncheck, and that generated files are current
	.ci/tools lint
	.ci/lint

fmt: ## format all Go files
	gofmt -w .

fuzz: ## run each fuzz target for FUZZTIME (default 30s), one after the other; PKG=./config for some
	.ci/fuzz $(PKG)

# BenchmarkIdle takes ten minutes by itself. The flags are last: go takes what
# follows a flag that is the test's own for the test's as well.
bench: build ## run all benchmarks but BenchmarkIdle, one package after the other; PKG and BENCH=regexp for some
	.ci/tools bench
	$(TESTENV) go test -run '^$$' -bench '$(or $(BENCH),.)' $(if $(BENCH),,-skip BenchmarkIdle) -benchmem -p 1 -timeout 3h $(PKG) $(TESTFLAGS)

conformance: ## verdict per scenario for UNITMETER_BINARY, or for this tree (root)
	.ci/tools
	$(TESTENV) go test ./cmd/unitmeter/e2e -run TestConformance -v -count=1 -timeout 60m

test-matrix: tools ## conformance suite on systemd 247 to 26x (root; fetches five Debian trees once)
	.ci/matrix

test-kernels: ## eBPF meter on four kernels of Debian, in virtual machines without KVM (root; half an hour or more)
	nice .ci/kernels

tools: ## build the pinned programs that the tests run, install Debian packages they need
	.ci/tools

shell: tools ## start a shell with the pinned programs on its path, as the tests have them
	$(TESTENV) PATH="$(CURDIR)/.tools/bin:$$PATH" "$${SHELL:-/bin/sh}"

clean: ## remove what make has built, except the tools' cache in the home directory
	rm -rf bin dist .tools

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
