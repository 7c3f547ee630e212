#!/usr/bin/env bash
# Runs a real control plane with our server behind its kube-aggregator, to try
# things by hand. Interrupt it to stop everything; the directory keeps the
# cluster for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=${1:-.cluster}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
rm -f "$dir/control/controlplane.json"

pids=()
stop() {
  trap - EXIT INT TERM
  # The server first: it ends its own processes, and needs the cluster for that.
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    kill "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'exit 0' INT TERM

# In sessions of their own: an interrupt from the terminal is for this script,
# which stops them in order.
setsid bin/controlplane/controlplane up --dir "$dir/control" >"$dir/controlplane.log" 2>&1 &
pids+=($!)
until [ -f "$dir/control/controlplane.json" ]; do
  kill -0 "${pids[0]}" 2>/dev/null || { cat "$dir/controlplane.log" >&2; exit 1; }
  sleep 0.2
done

export KUBECONFIG="$dir/control/admin.kubeconfig"
kubectl=bin/controlplane/kubectl
port=7444

# kube-apiserver reaches a server outside the cluster through a Service of type
# ExternalName. Its certificate is made anew at each start, hence not verified:
# charts/aaserver shows how it is done for others than oneself.
$kubectl apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Namespace
metadata: {name: aaserver}
---
apiVersion: v1
kind: Service
metadata: {name: aaserver, namespace: aaserver}
spec:
  type: ExternalName
  externalName: localhost
  ports: [{port: $port}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.streaming.aaserver.io}
spec:
  group: streaming.aaserver.io
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 100
  insecureSkipTLSVerify: true
  service: {name: aaserver, namespace: aaserver, port: $port}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1alpha1.streaming.aaserver.io}
spec:
  group: streaming.aaserver.io
  version: v1alpha1
  groupPriorityMinimum: 1000
  versionPriority: 50
  insecureSkipTLSVerify: true
  service: {name: aaserver, namespace: aaserver, port: $port}
YAML

setsid bin/aaserver serve --kubeconfig "$KUBECONFIG" --bind-address 127.0.0.1 --secure-port $port \
  --data-dir "$dir/data" --storage-endpoint "sqlite://$dir/data/state.db" --embedded-agent local \
  >"$dir/aaserver.log" 2>&1 &
pids+=($!)
$kubectl wait --for=condition=Available --timeout=60s apiservice/v1.streaming.aaserver.io >/dev/null || {
  tail -n 5 "$dir/aaserver.log" >&2
  exit 1
}

# Without a class, targets may do nothing.
$kubectl apply -f - >/dev/null <<YAML
apiVersion: streaming.aaserver.io/v1
kind: TargetClass
metadata: {name: standard, annotations: {streaming.aaserver.io/is-default-class: "true"}}
spec: {sources: [process], agents: [local], agentUser: true}
---
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: clock}
spec:
  agentName: local
  process: {command: [sh, -c, 'while :; do date; sleep 1; done']}
YAML

cat <<TEXT

A control plane runs, with aaserver behind it and one target, clock.

  export KUBECONFIG=$KUBECONFIG
  export PATH=$PWD/bin:$PWD/bin/controlplane:\$PATH

  kubectl get apiservices v1.streaming.aaserver.io
  kubectl get targets,namespaces
  kubectl target logs -f clock
  kubectl target exec -it clock -- sh
  kubectl auth can-i create targets/exec --as jane

Logs are in $dir. Interrupt this to stop everything.
TEXT
wait "${pids[@]}"
