package server

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
)

func TestSecretFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("outside", "not a Secret's")
	write("secrets/shop/key/ssh-privatekey", "key")
	write("secrets/shop/key/known_hosts", "hosts")
	write("secrets/shop/key/a file~", "an editor's")
	write("secrets/shop/password/password", "word")
	write("secrets/shop/other/x", strings.Repeat("x", corev1.MaxSecretSize-1))
	write("secrets/shop/other/y", "y")
	write("secrets/shop/large/x", strings.Repeat("x", corev1.MaxSecretSize))
	write("secrets/shop/large/y", "y")
	for i := range maxSecretKeys + 1 {
		write(fmt.Sprint("secrets/shop/many/", i), "")
	}
	for link, to := range map[string]string{
		"secrets/shop/leaving/key":  "../../../outside",
		"secrets/shop/absolute/key": filepath.Join(dir, "outside"),
		"secrets/shop/broken/key":   "none",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, link)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "secrets/shop/pipe"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "secrets/shop/pipe/key"), 0o600); err != nil {
		t.Fatal(err)
	}

	for what, tt := range map[string]struct {
		namespace, name string
		want            map[string]int // the length of each key
		wantType        corev1.SecretType
		wantErr         string
	}{
		"a key":                            {"shop", "key", map[string]int{"ssh-privatekey": 3, "known_hosts": 5}, corev1.SecretTypeSSHAuth, ""},
		"a password":                       {"shop", "password", map[string]int{"password": 4}, corev1.SecretTypeBasicAuth, ""},
		"as large as may be":               {"shop", "other", map[string]int{"x": corev1.MaxSecretSize - 1, "y": 1}, corev1.SecretTypeOpaque, ""},
		"larger":                           {"shop", "large", nil, "", "at most 1048576 bytes together"},
		"of too many keys":                 {"shop", "many", nil, "", "more than 64"},
		"that isn't there says what to do": {"shop", "none", nil, "", "make the directory " + filepath.Join(dir, "secrets/shop/none") + ", with a file for each key"},
		"in another's place":               {"shop", "../shop/key", nil, "", "is no name of a Secret"},
		"of no namespace":                  {"..", "key", nil, "", "is no name of a Secret"},
		"that leads out of its place":      {"shop", "leaving", nil, "", "escapes"},
		"that leads anywhere":              {"shop", "absolute", nil, "", "escapes"},
		"that links to what isn't there":   {"shop", "broken", nil, "", "no such file"},
		"that is a pipe isn't waited for":  {"shop", "pipe", nil, "", "no regular file"},
	} {
		t.Run(what, func(t *testing.T) {
			secret, err := secretFiles(filepath.Join(dir, "secrets")).get(t.Context(), tt.namespace, tt.name)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got %v, want an error that says %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]int{}
			for key, value := range secret.Data {
				got[key] = len(value)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("keys (-want +got):\n%s", diff)
			}
			if secret.Type != tt.wantType || secret.Name != tt.name || secret.Namespace != tt.namespace {
				t.Errorf("got %s of type %s", secret.Name, secret.Type)
			}
		})
	}
}
