#!/usr/bin/env bash
# Writes the Krew manifest of a release to the standard output:
#
#   hack/krew/manifest.sh VERSION BASE_URL DIRECTORY
#
# DIRECTORY has the archives that archives.sh makes, and BASE_URL is where they
# will be found. The variable HOMEPAGE, if set, is the plugin's page.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=v${1#v}
base_url=${2%/}
archives=$3

cat <<EOF
apiVersion: krew.googlecontainertools.github.com/v1alpha2
kind: Plugin
metadata:
  name: target
spec:
  version: $version
  homepage: ${HOMEPAGE:-$base_url}
  shortDescription: Logs, exec, attach and port-forward for targets
  description: |
    kubectl target works on the targets of an aaserver: processes, containers,
    SSH hosts and TCP endpoints that aren't pods. It reads their logs, runs
    commands in them, attaches to them, copies files and forwards ports.

    It needs a cluster with aaserver, or a standalone one.
  caveats: |
    To complete "kubectl target …" in your shell, link its completion into the
    PATH, as Krew installs one program of a plugin only:

      ln -s "\${KREW_ROOT:-\$HOME/.krew}/store/target/$version/kubectl_complete-target" "\${KREW_ROOT:-\$HOME/.krew}/bin/"
  platforms:
EOF
while IFS=/ read -r os arch; do
  archive=kubectl-target_${os}_$arch.tar.gz
  bin=kubectl-target
  [ "$os" != windows ] || bin=kubectl-target.exe
  sum=$(sha256sum "$archives/$archive")
  cat <<EOF
    - selector:
        matchLabels:
          os: $os
          arch: $arch
      uri: $base_url/$archive
      sha256: ${sum%% *}
      bin: $bin
EOF
done <hack/krew/platforms
