package main

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

// krewPlugin is Krew's kind Plugin, version v1alpha2, as far as this one uses it.
type krewPlugin struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name string `json:"name"`
	} `json:"metadata"`
	Spec struct {
		Version          string         `json:"version"`
		Homepage         string         `json:"homepage"`
		ShortDescription string         `json:"shortDescription"`
		Description      string         `json:"description"`
		Caveats          string         `json:"caveats"`
		Platforms        []krewPlatform `json:"platforms"`
	} `json:"spec"`
}

type krewPlatform struct {
	Selector struct {
		MatchLabels map[string]string `json:"matchLabels"`
	} `json:"selector"`
	URI    string `json:"uri"`
	SHA256 string `json:"sha256"`
	Bin    string `json:"bin"`
}

const krewDir = "../../hack/krew/"

func platforms(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(krewDir + "platforms")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text))
}

// TestKrewManifest makes the manifest of archives that are only named like a
// release's.
func TestKrewManifest(t *testing.T) {
	archives := t.TempDir()
	var want []krewPlatform
	for _, platform := range platforms(t) {
		system, arch, _ := strings.Cut(platform, "/")
		name := fmt.Sprintf("kubectl-target_%s_%s.tar.gz", system, arch)
		if err := os.WriteFile(filepath.Join(archives, name), []byte(platform), 0o600); err != nil {
			t.Fatal(err)
		}
		p := krewPlatform{
			URI:    "https://example.com/v1/" + name,
			SHA256: fmt.Sprintf("%x", sha256.Sum256([]byte(platform))),
			Bin:    "kubectl-target",
		}
		p.Selector.MatchLabels = map[string]string{"os": system, "arch": arch}
		if system == "windows" {
			p.Bin += ".exe"
		}
		want = append(want, p)
	}
	out, err := exec.Command(krewDir+"manifest.sh", "1.2.3", "https://example.com/v1/", archives).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, err.(*exec.ExitError).Stderr)
	}
	var got krewPlugin
	if err := yaml.UnmarshalStrict(out, &got); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	if diff := cmp.Diff(want, got.Spec.Platforms); diff != "" {
		t.Errorf("platforms (-want +got):\n%s", diff)
	}
	// Krew's own rules: a version of three parts with a v, names that are safe
	// as those of files, a description of at most fifty characters or so.
	if got.APIVersion != "krew.googlecontainertools.github.com/v1alpha2" || got.Kind != "Plugin" ||
		got.Metadata.Name != "target" || !regexp.MustCompile(`^v\d+\.\d+\.\d+$`).MatchString(got.Spec.Version) ||
		got.Spec.ShortDescription == "" || len(got.Spec.ShortDescription) > 50 || got.Spec.Homepage == "" {
		t.Errorf("manifest %+v", got)
	}
	if want := "store/target/v1.2.3/kubectl_complete-target"; !strings.Contains(got.Spec.Caveats, want) {
		t.Errorf("caveats %q lack %q", got.Spec.Caveats, want)
	}

	if _, err := exec.Command(krewDir+"manifest.sh", "1.2.3", "https://example.com", t.TempDir()).Output(); err == nil {
		t.Error("a manifest was made without archives")
	}
}

func TestReleaseArchivesOfNoVersion(t *testing.T) {
	out := filepath.Join(t.TempDir(), "dist")
	text, err := exec.Command(krewDir+"archives.sh", "43021ab-dirty", "https://example.com", out).CombinedOutput()
	if err == nil || !strings.Contains(string(text), "versions like v1.2.3") {
		t.Errorf("%v: %s", err, text)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("something was made nevertheless")
	}
}

// TestReleaseArchives packs what a fake go builds.
func TestReleaseArchives(t *testing.T) {
	bin := t.TempDir()
	fake := `#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "built for $GOOS/$GOARCH" >"$2"
chmod +x "$2"
`
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte(fake), 0o700); err != nil {
		t.Fatal(err)
	}
	build := func() map[string]string {
		out := t.TempDir()
		cmd := exec.Command(krewDir+"archives.sh", "v1.2.3", "https://example.com", out)
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		files := map[string]string{}
		entries, err := os.ReadDir(out)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			data, err := os.ReadFile(filepath.Join(out, entry.Name()))
			if err != nil {
				t.Fatal(err)
			}
			files[entry.Name()] = string(data)
		}
		return files
	}
	first := build()
	if diff := cmp.Diff(first, build()); diff != "" {
		t.Errorf("a second build differs (-first +second):\n%s", diff)
	}
	if !strings.Contains(first["target.yaml"], "kind: Plugin") {
		t.Errorf("manifest %q", first["target.yaml"])
	}
	for _, platform := range platforms(t) {
		name := "kubectl-target_" + strings.ReplaceAll(platform, "/", "_") + ".tar.gz"
		program := "kubectl-target"
		if strings.HasPrefix(platform, "windows/") {
			program += ".exe"
		}
		if want := fmt.Sprintf("%x  %s\n", sha256.Sum256([]byte(first[name])), name); !strings.Contains(first["SHA256SUMS"], want) {
			t.Errorf("SHA256SUMS lacks %q", want)
		}
		unzipped, err := gzip.NewReader(strings.NewReader(first[name]))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		modes := map[string]string{}
		for archive := tar.NewReader(unzipped); ; {
			header, err := archive.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if header.Typeflag == tar.TypeReg {
				modes[strings.TrimPrefix(header.Name, "./")] = header.FileInfo().Mode().String()
			}
		}
		want := map[string]string{program: "-rwxr-xr-x", "kubectl_complete-target": "-rwxr-xr-x", "LICENSE": "-rw-r--r--"}
		if diff := cmp.Diff(want, modes); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestCompletionScript runs the script beside a plugin, and with one in the PATH.
func TestCompletionScript(t *testing.T) {
	script, err := os.ReadFile("kubectl_complete-target")
	if err != nil {
		t.Fatal(err)
	}
	beside, elsewhere := t.TempDir(), t.TempDir()
	path := filepath.Join(beside, "kubectl_complete-target")
	if err := os.WriteFile(path, script, 0o700); err != nil {
		t.Fatal(err)
	}
	complete := func(where string) {
		t.Helper()
		plugin := filepath.Join(where, "kubectl-target")
		if err := os.WriteFile(plugin, []byte("#!/bin/sh\necho \"$@\"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(path, "logs", "a b", "")
		cmd.Env = []string{"PATH=" + elsewhere + ":" + os.Getenv("PATH")}
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(out), "__complete logs a b \n"; got != want {
			t.Errorf("the plugin was called with %q, want %q", got, want)
		}
		if err := os.Remove(plugin); err != nil {
			t.Fatal(err)
		}
	}
	complete(elsewhere)
	complete(beside)
}
