package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
)

// maxSecretKeys bounds the keys of a Secret in files. Their size together is
// bounded as a cluster bounds it.
const maxSecretKeys = 64

// secretFiles are Secrets where there is no cluster to keep them: the key KEY of
// the Secret NAME in the namespace NS is the file NS/NAME/KEY below a directory.
type secretFiles string

// get reads a Secret as it is now. Its type follows from its keys.
func (dir secretFiles) get(_ context.Context, namespace, name string) (*corev1.Secret, error) {
	place := filepath.Join(string(dir), namespace, name)
	// A name with a slash or dots would be another's.
	if len(validation.IsDNS1123Label(namespace)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 {
		return nil, fmt.Errorf("%s/%s is no name of a Secret", namespace, name)
	}
	// What a link leads to outside of the directory isn't read.
	root, err := os.OpenRoot(place)
	if err != nil {
		return nil, fmt.Errorf("make the directory %s, with a file for each key: %w", place, errors.Unwrap(err))
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	if len(entries) > maxSecretKeys {
		return nil, fmt.Errorf("%s has %d files, more than %d", place, len(entries), maxSecretKeys)
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Type:       corev1.SecretTypeOpaque,
		Data:       map[string][]byte{},
	}
	left := int64(corev1.MaxSecretSize)
	for _, entry := range entries {
		key := entry.Name()
		if len(validation.IsConfigMapKey(key)) > 0 {
			continue // an editor's, for example
		}
		value, err := readKey(root, key, left)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(place, key), err)
		}
		left -= int64(len(value))
		secret.Data[key] = value
	}
	for _, t := range []struct {
		kind corev1.SecretType
		keys []string
	}{
		{corev1.SecretTypeSSHAuth, []string{corev1.SSHAuthPrivateKey}},
		{corev1.SecretTypeBasicAuth, []string{corev1.BasicAuthUsernameKey, corev1.BasicAuthPasswordKey}},
	} {
		if slices.ContainsFunc(t.keys, func(key string) bool { return secret.Data[key] != nil }) {
			secret.Type = t.kind
			break
		}
	}
	return secret, nil
}

// readKey reads a file of at most so many bytes. It doesn't wait for what is no
// file: a pipe, for example.
func readKey(root *os.Root, key string, most int64) ([]byte, error) {
	info, err := root.Stat(key)
	switch {
	case err != nil:
		return nil, errors.Unwrap(err)
	case !info.Mode().IsRegular():
		return nil, errors.New("it is no regular file")
	}
	file, err := root.Open(key)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	defer file.Close()
	value, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(value)) > most {
		err = fmt.Errorf("the keys of a Secret have at most %d bytes together", corev1.MaxSecretSize)
	}
	return value, err
}

// mainSecrets reads Secrets of the main API as they are now.
func mainSecrets(main kubernetes.Interface) func(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	return func(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
		return main.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	}
}
