# Every tool that a target needs beside Go is installed by it, or pinned in
# go.mod's tool block.

BIN := $(CURDIR)/bin
# The demo's data; `make run` finds it again the next time.
DATA ?= $(CURDIR)/.aaserver

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS := -X aaserver.io/aaserver/internal/version.version=$(VERSION)

# apimachinery's own tag: objects share the managed fields that they have in
# common, which is a tenth of the watch cache. Everything is built with it, so
# that what is tested is what is shipped.
export GOFLAGS := $(strip $(GOFLAGS) -tags=fieldsv1string)

.PHONY: build run test test-unit controlplane cluster bench soak archives update verify clean

build: ## bin/aaserver and bin/kubectl-target
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/aaserver .
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/kubectl-target ./cmd/kubectl-target
	cp cmd/kubectl-target/kubectl_complete-target $(BIN)/

run: build ## a server without a cluster, with targets to try
	$(BIN)/aaserver standalone --data-dir $(DATA) --demo

test-unit: ## the fast part of the tests
	go test -short $$(go list ./... | grep -v /internal/e2e)

# Where goroutines meet: these run with the race detector, and so does package
# streaming, by itself: it is about time, and a driver's tests fork without end.
RACED := ./registry/... ./internal/agent/... ./internal/driver/... ./internal/policy/... ./internal/recorder/... ./internal/session/...

# The longest package takes some six minutes on two idle cores.
test: controlplane ## all tests
	go test -race -short -timeout 30m ./streaming/...
	go test -race -short -timeout 30m $(RACED)
	go test -timeout 30m $$(go list ./...)
	GOWORK=off go -C hack/controlplane test ./...

controlplane: ## a real kube-apiserver, kube-controller-manager, kubectl and etcd
	hack/controlplane/build.sh

cluster: build controlplane ## that control plane with our server behind it
	hack/cluster.sh

bench: build controlplane ## the benchmarks, ours beside the peers' in one run
	go test -run '^$$' -bench . -benchmem ./streaming/... ./internal/driver/...
	CGO_ENABLED=0 GOWORK=off GOFLAGS= go -C hack/bench/peer build -trimpath -o $(BIN)/bench-sample-apiserver .
	CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./hack/bench
	$(BIN)/bench -bin-dir $(BIN)

soak: build controlplane ## ten minutes of all kinds of sessions, after which nothing may be left
	CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./hack/bench
	$(BIN)/bench -bin-dir $(BIN) soak

archives: ## the plugin for every platform, and its Krew manifest, in dist/; BASE_URL says where they will be
	@test -n "$(BASE_URL)" || { echo "archives: set BASE_URL to where the archives will be found" >&2; exit 1; }
	hack/krew/archives.sh "$(VERSION)" "$(BASE_URL)" dist

update: ## regenerate what is generated
	hack/update.sh
	go test ./charts -update

verify: ## fail if anything generated, formatted or linted is out of date
	hack/verify.sh

clean:
	rm -rf $(BIN) dist
