#!/usr/bin/env bash
# Builds the plugin for every platform in hack/krew/platforms, packs each with
# its completion and the license, and writes the Krew manifest of the archives:
#
#   hack/krew/archives.sh VERSION BASE_URL DIRECTORY
#
# The same commit makes the same archives, byte by byte, with GNU tar and gzip.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=$1
base_url=$2
out=$3

if ! [[ $version =~ ^v?[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?$ ]]; then
  echo "archives: Krew takes versions like v1.2.3, and this is \"$version\": tag the commit, or set VERSION" >&2
  exit 1
fi

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
while IFS=/ read -r os arch; do
  echo "kubectl-target for $os/$arch"
  dir=$work/$os-$arch
  mkdir "$dir"
  suffix=
  [ "$os" != windows ] || suffix=.exe
  CGO_ENABLED=0 GOOS=$os GOARCH=$arch go build -trimpath \
    -ldflags "-s -w -X aaserver.io/aaserver/internal/version.version=$version" \
    -o "$dir/kubectl-target$suffix" ./cmd/kubectl-target
  cp cmd/kubectl-target/kubectl_complete-target LICENSE "$dir"
  tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --mode=u=rwX,go=rX \
    --directory "$dir" . | gzip -n >"$out/kubectl-target_${os}_$arch.tar.gz"
done <hack/krew/platforms
hack/krew/manifest.sh "$version" "$base_url" "$out" >"$out/target.yaml"
(cd "$out" && sha256sum kubectl-target_*.tar.gz >SHA256SUMS)
echo "see $out"
