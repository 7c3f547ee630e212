package main

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "aaserver.io/aaserver"

// layer is a package, or a tree of them with a trailing "/...", and what of
// this module it may import. The first layer that matches a package holds.
type layer struct {
	packages string
	may      []string
	// never names packages that must not be linked, not even indirectly.
	never  []string
	reason string
}

var layers = []layer{
	{packages: "", may: []string{"internal/command"},
		reason: "main only runs the command: everything is wired in one place"},
	{packages: "cmd/kubectl-target", may: []string{"internal/cli"}, never: []string{"k8s.io/apiserver"},
		reason: "the plugin's main is thin"},
	{packages: "internal/command", may: []string{"..."},
		reason: "the composition root may wire everything"},
	{packages: "apis/streaming", may: nil,
		reason: "the hub depends on no version and no server"},
	{packages: "apis/streaming/...", may: []string{"apis/streaming/..."}, never: []string{"k8s.io/apiserver"},
		reason: "the API types are for clients too"},
	{packages: "apis/generated/...", may: []string{"apis/..."}, never: []string{"k8s.io/apiserver"},
		reason: "the generated clients are for clients too"},
	{packages: "registry/table", may: nil,
		reason: "tables are made of objects without knowing what they are"},
	{packages: "registry/...", may: []string{"apis/...", "streaming", "internal/driver", "internal/policy", "internal/session", "registry/table"},
		reason: "the registry knows the contract of drivers, and no driver"},
	{packages: "streaming", may: nil, never: []string{"k8s.io/apiserver"},
		reason: "streaming is a library for other servers too"},
	{packages: "internal/server", may: []string{"..."},
		reason: "the server is assembled from everything that serves"},
	{packages: "internal/admission/...", may: []string{"apis/...", "internal/admission/...", "internal/policy"},
		reason: "admission judges objects: it knows the API and its policy, and nothing that carries it out"},
	{packages: "internal/policy", may: []string{"apis/streaming/v1"}, never: []string{"k8s.io/apiserver"},
		reason: "what a class allows follows from the class: whoever enforces it, on a server or not, judges alike"},
	{packages: "internal/storage", may: nil, never: []string{"github.com/k3s-io/kine/pkg/endpoint"},
		reason: "storage is a backend, not a user of the API; kine's endpoint package links every driver with its server"},
	{packages: "internal/storage/storagetest", may: nil, never: []string{"github.com/k3s-io/kine"},
		reason: "the end-to-end tests start databases by it, and link no storage"},
	{packages: "internal/pki", may: nil,
		reason: "certificates are made of files and time"},
	{packages: "internal/version", may: nil, reason: "everything may ask for the version"},
	{packages: "internal/driver", may: []string{"apis/streaming/v1"}, never: []string{"k8s.io/apiserver"},
		reason: "the contract is a leaf: what a driver imports must not pull in the server"},
	{packages: "internal/driver/process/shim", may: nil, never: []string{"k8s.io/apimachinery"},
		reason: "the shim takes over before the packages that it doesn't import are initialised"},
	{packages: "internal/files", may: nil, never: []string{"k8s.io/apimachinery"},
		reason: "both ends of a copy have it, and the one beside an instance starts before the packages that it doesn't import are initialised"},
	{packages: "internal/driver/process/builtin", may: []string{"internal/files"}, never: []string{"k8s.io/apimachinery"},
		reason: "as the shim, a built-in command takes over before the packages that it doesn't import are initialised"},
	{packages: "internal/driver/process", may: []string{"apis/streaming/v1", "internal/driver", "internal/driver/process/..."}, never: []string{"k8s.io/apiserver"},
		reason: "a driver knows the contract, and no other driver"},
	{packages: "internal/driver/drivertest", may: []string{"apis/streaming/v1", "internal/driver"},
		reason: "the conformance suite knows the contract alone"},
	{packages: "internal/agent", may: []string{"apis/generated/...", "apis/streaming/v1", "internal/driver"}, never: []string{"k8s.io/apiserver"},
		reason: "an agent runs on other machines: it sees the API through clients only"},
	{packages: "internal/recorder", may: []string{"apis/generated/...", "apis/streaming/v1"}, never: []string{"k8s.io/apiserver"},
		reason: "events are written wherever an agent runs: it needs the kinds of objects, and no server"},
	{packages: "internal/session", may: nil,
		reason: "sessions are counted without knowing what they carry"},
	{packages: "internal/cli", may: []string{"apis/generated/...", "apis/streaming/v1", "streaming", "internal/files", "internal/version"}, never: []string{"k8s.io/apiserver"},
		reason: "the plugin is a client: it must stay small and use the public API only"},
	{packages: "hack/bench", may: []string{"apis/generated/clientset/versioned/scheme", "apis/streaming/v1", "streaming"}, never: []string{"k8s.io/apiserver"},
		reason: "the benchmark is a client, which encodes what it sends, and serves streams by the library alone, beside its peer"},
	{packages: "charts", may: nil,
		reason: "the chart's tests run Helm; nothing imports them"},
	{packages: "internal/e2e", may: nil,
		reason: "the end-to-end tests use what users use"},
}

// hubImporters are the only packages that may see the hub types: all else uses
// v1, which is what clients see.
var hubImporters = []string{"apis/", "registry/", "internal/admission/"}

type listedPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func TestImports(t *testing.T) {
	for _, pkg := range listPackages(t) {
		path := strings.TrimPrefix(strings.TrimPrefix(pkg.ImportPath, module), "/")
		i := slices.IndexFunc(layers, func(l layer) bool { return covers(l.packages, path) })
		if i < 0 {
			t.Errorf("%s is in no layer: say in this test what it may import", pkg.ImportPath)
			continue
		}
		rule := layers[i]
		for _, imported := range pkg.Imports {
			local, ok := strings.CutPrefix(imported, module+"/")
			if !ok {
				continue
			}
			if !slices.ContainsFunc(rule.may, func(may string) bool { return covers(may, local) }) {
				t.Errorf("%s may not import %s: %s", pkg.ImportPath, local, rule.reason)
			}
			if local == "apis/streaming" && !slices.ContainsFunc(hubImporters, func(prefix string) bool { return strings.HasPrefix(path, prefix) }) {
				t.Errorf("%s may not import the hub types: only what stores and admits them sees them; use v1", pkg.ImportPath)
			}
		}
		for _, dep := range pkg.Deps {
			for _, never := range rule.never {
				if dep == never || strings.HasPrefix(dep, never+"/") {
					t.Errorf("%s may not link %s: %s", pkg.ImportPath, dep, rule.reason)
				}
			}
		}
	}
}

// TestImportsCatches proves that the rules above refuse something.
func TestImportsCatches(t *testing.T) {
	for _, tt := range []struct {
		pattern, path string
		want          bool
	}{
		{"streaming", "streaming", true},
		{"streaming", "streaming/x", false},
		{"apis/...", "apis/streaming/v1", true},
		{"apis/...", "apisx", false},
		{"...", "internal/driver", true},
		{"", "", true},
		{"", "internal", false},
	} {
		if got := covers(tt.pattern, tt.path); got != tt.want {
			t.Errorf("covers(%q, %q) = %t, want %t", tt.pattern, tt.path, got, tt.want)
		}
	}
}

func covers(pattern, path string) bool {
	if pattern == "..." {
		return true
	}
	if tree, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == tree || strings.HasPrefix(path, tree+"/")
	}
	return pattern == path
}

func listPackages(t *testing.T) []listedPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []listedPackage
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var pkg listedPackage
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, pkg)
	}
	if len(packages) == 0 {
		t.Fatal("go list found no packages")
	}
	return packages
}
