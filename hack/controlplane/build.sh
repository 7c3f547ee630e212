#!/usr/bin/env bash
# Builds the local control plane from the modules in go.mod.
#
#   hack/controlplane/build.sh [-o DIR] [COMPONENT…]
#
# COMPONENT is etcd, kube-apiserver, kube-controller-manager, kubectl or
# controlplane, the launcher, which looks for the others beside itself; all of
# them by default. DIR is bin/controlplane in the repository by default, so the
# launcher is bin/controlplane/controlplane. The first build of everything takes
# some ten minutes on two cores; what is up to date already costs a second.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$root/bin/controlplane
if [ "${1:-}" = -o ]; then
	[ $# -ge 2 ] || { echo "build.sh: -o needs a directory" >&2; exit 2; }
	out=$2
	shift 2
fi
[ $# -gt 0 ] || set -- etcd kube-apiserver kube-controller-manager kubectl controlplane
for component; do
	case $component in
	etcd | kube-apiserver | kube-controller-manager | kubectl | controlplane) ;;
	*)
		echo "build.sh: unknown component $component; there are etcd, kube-apiserver, kube-controller-manager, kubectl and controlplane" >&2
		exit 2
		;;
	esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

cd "$root/hack/controlplane"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=

# Without a version, kubectl can't parse what the server says of itself.
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
IFS=. read -r major minor _ <<<"${version#v}"
ldflags="-s -w"
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	ldflags+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor -X $package.gitTreeState=clean"
done

for component; do
	case $component in
	etcd) package=go.etcd.io/etcd/server/v3 ;;
	controlplane) package=. ;;
	*) package=k8s.io/kubernetes/cmd/$component ;;
	esac
	go build -trimpath -ldflags "$ldflags" -o "$out/$component" "$package"
done
