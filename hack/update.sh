#!/usr/bin/env bash
# Regenerates everything under apis that is generated. The generators are
# pinned in go.mod's tool block.
set -euo pipefail
cd "$(dirname "$0")/.."

module=aaserver.io/aaserver
header=hack/boilerplate.go.txt
generated=apis/generated

find apis -name 'zz_generated.*' -delete
rm -rf "$generated"
mkdir -p "$generated"

echo "deepcopy, defaults, conversions"
go tool deepcopy-gen --go-header-file "$header" --output-file zz_generated.deepcopy.go \
  ./apis/streaming ./apis/streaming/v1
go tool defaulter-gen --go-header-file "$header" --output-file zz_generated.defaults.go \
  ./apis/streaming/v1
go tool conversion-gen --go-header-file "$header" --output-file zz_generated.conversion.go \
  ./apis/streaming/v1

echo "OpenAPI"
go tool openapi-gen --go-header-file "$header" --output-file zz_generated.openapi.go \
  --output-model-name-file zz_generated.model_name.go \
  --output-dir "$generated/openapi" --output-pkg "$module/$generated/openapi" \
  --report-filename /dev/null \
  --readonly-pkg k8s.io/api/autoscaling/v1 --readonly-pkg k8s.io/api/authorization/v1 \
  --readonly-pkg k8s.io/apimachinery/pkg/api/resource --readonly-pkg k8s.io/apimachinery/pkg/apis/meta/v1 \
  --readonly-pkg k8s.io/apimachinery/pkg/runtime --readonly-pkg k8s.io/apimachinery/pkg/version \
  ./apis/streaming/v1 \
  k8s.io/api/authorization/v1 k8s.io/api/autoscaling/v1 \
  k8s.io/apimachinery/pkg/api/resource k8s.io/apimachinery/pkg/apis/meta/v1 \
  k8s.io/apimachinery/pkg/runtime k8s.io/apimachinery/pkg/version

echo "apply configurations, clientset, listers, informers"
go tool applyconfiguration-gen --go-header-file "$header" \
  --output-dir "$generated/applyconfiguration" --output-pkg "$module/$generated/applyconfiguration" \
  ./apis/streaming/v1
go tool client-gen --go-header-file "$header" \
  --output-dir "$generated/clientset" --output-pkg "$module/$generated/clientset" \
  --clientset-name versioned --apply-configuration-package "$module/$generated/applyconfiguration" \
  --input-base "$PWD/apis" --input streaming/v1
go tool lister-gen --go-header-file "$header" \
  --output-dir "$generated/listers" --output-pkg "$module/$generated/listers" \
  ./apis/streaming/v1
go tool informer-gen --go-header-file "$header" \
  --output-dir "$generated/informers" --output-pkg "$module/$generated/informers" \
  --versioned-clientset-package "$module/$generated/clientset/versioned" \
  --listers-package "$module/$generated/listers" \
  ./apis/streaming/v1
