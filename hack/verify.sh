#!/usr/bin/env bash
# Fails if something generated, formatted or linted is out of date, and says
# what.
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
fail() {
  echo "verify: $*" >&2
  failed=1
}

echo "gofmt"
unformatted=$(git ls-files --cached --others --exclude-standard '*.go' | xargs gofmt -l)
[ -z "$unformatted" ] || fail "not formatted (run gofmt -w): $unformatted"

echo "go mod tidy"
for module in . hack/bench/peer hack/controlplane hack/tools; do
  GOWORK=off go -C "$module" mod tidy -diff >&2 || fail "go.mod or go.sum of $module isn't tidy: run go mod tidy"
done

echo "go vet"
go vet ./... || fail "go vet has complaints"

echo "staticcheck"
go list ./... | grep -v /apis/generated/ | xargs go tool staticcheck || fail "staticcheck has complaints"

# Type-checked with its tests, and not linked: what isn't there on another system
# is found.
echo "the plugin on other systems"
for os in darwin windows; do
  CGO_ENABLED=0 GOOS=$os go vet ./internal/cli/... ./cmd/... || fail "the plugin or its tests don't fit $os"
done

# The generators write into the tree: they run in a copy, so that a stale file
# is reported and not mended on the way.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files --cached --others --exclude-standard -z -- go.mod go.sum apis docs hack | xargs -0 cp --parents -t "$copy"
(cd "$copy" && hack/update.sh) || fail "the generators have failed"
{ diff -r apis "$copy/apis" && diff -r docs "$copy/docs"; } || fail "generated code is stale: run make update"

echo "chart"
go test -count=1 ./charts || fail "the chart's golden files, README or manifest are stale: run make update"

exit $failed
