#!/usr/bin/env bash
# Regenerates everything under apis and docs that is generated. The generators
# are pinned in the tool blocks of go.mod and hack/tools/go.mod.
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
  ./apis/streaming ./apis/streaming/v1 ./apis/streaming/v1alpha1
go tool defaulter-gen --go-header-file "$header" --output-file zz_generated.defaults.go \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1
go tool conversion-gen --go-header-file "$header" --output-file zz_generated.conversion.go \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1

# The types of other packages that the generator reads have no rules of their
# own for us: their fields are opaque, and validated by hand.
echo "declarative validation"
go tool validation-gen --go-header-file "$header" --output-file zz_generated.validations.go \
  --lint-rules=known-tags-only,require-explicit-disablement \
  --readonly-pkg k8s.io/apimachinery/pkg/types \
  ./apis/streaming/v1

# go-to-protobuf finds packages and writes files by their import paths, below
# one directory, and runs its other parts from the PATH.
echo "protobuf"
command -v protoc >/dev/null || { echo "update: protoc is missing: install it (Debian: protobuf-compiler)" >&2; exit 1; }
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
go build -o "$sources/bin/" k8s.io/code-generator/cmd/go-to-protobuf/protoc-gen-gogo golang.org/x/tools/cmd/goimports
mkdir -p "$sources/$(dirname "$module")"
ln -s "$PWD" "$sources/$module"
for dependency in github.com/gogo/protobuf k8s.io/api k8s.io/apimachinery; do
  mkdir -p "$sources/$(dirname "$dependency")"
  ln -s "$(go list -m -f '{{.Dir}}' "$dependency")" "$sources/$dependency"
done
PATH="$sources/bin:$PATH" go tool go-to-protobuf --go-header-file "$header" \
  --output-dir "$sources" --proto-import "$sources" --proto-import "$sources/github.com/gogo/protobuf/protobuf" \
  --apimachinery-packages "$(printf -- '-%s,' k8s.io/apimachinery/pkg/{util/intstr,api/resource,runtime/schema,runtime,apis/meta/v1} k8s.io/api/core/v1 | sed 's/,$//')" \
  --packages "$module/apis/streaming/v1,$module/apis/streaming/v1alpha1"

echo "OpenAPI"
go tool openapi-gen --go-header-file "$header" --output-file zz_generated.openapi.go \
  --output-model-name-file zz_generated.model_name.go \
  --output-dir "$generated/openapi" --output-pkg "$module/$generated/openapi" \
  --report-filename /dev/null \
  --readonly-pkg k8s.io/api/autoscaling/v1 --readonly-pkg k8s.io/api/authorization/v1 \
  --readonly-pkg k8s.io/apimachinery/pkg/api/resource --readonly-pkg k8s.io/apimachinery/pkg/apis/meta/v1 \
  --readonly-pkg k8s.io/apimachinery/pkg/runtime --readonly-pkg k8s.io/apimachinery/pkg/version \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1 \
  k8s.io/api/authorization/v1 k8s.io/api/autoscaling/v1 \
  k8s.io/apimachinery/pkg/api/resource k8s.io/apimachinery/pkg/apis/meta/v1 \
  k8s.io/apimachinery/pkg/runtime k8s.io/apimachinery/pkg/version

echo "apply configurations, clientset, listers, informers"
go tool applyconfiguration-gen --go-header-file "$header" \
  --output-dir "$generated/applyconfiguration" --output-pkg "$module/$generated/applyconfiguration" \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1
go tool client-gen --go-header-file "$header" \
  --output-dir "$generated/clientset" --output-pkg "$module/$generated/clientset" \
  --clientset-name versioned --prefers-protobuf --apply-configuration-package "$module/$generated/applyconfiguration" \
  --input-base "$PWD/apis" --input streaming/v1 --input streaming/v1alpha1
go tool lister-gen --go-header-file "$header" \
  --output-dir "$generated/listers" --output-pkg "$module/$generated/listers" \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1
go tool informer-gen --go-header-file "$header" \
  --output-dir "$generated/informers" --output-pkg "$module/$generated/informers" \
  --versioned-clientset-package "$module/$generated/clientset/versioned" \
  --listers-package "$module/$generated/listers" \
  ./apis/streaming/v1 ./apis/streaming/v1alpha1

echo "docs of the API"
for version in v1 v1alpha1; do
  page=docs/api-$version.md
  [ $version != v1 ] || page=docs/api.md
  go tool -modfile=hack/tools/go.mod crd-ref-docs --log-level ERROR --renderer markdown \
    --config hack/apidoc/config.yaml --templates-dir hack/apidoc/templates \
    --source-path "apis/streaming/$version" --max-depth 20 --output-path "$page"
  sed -i 's|<br />| |g' "$page"
done
