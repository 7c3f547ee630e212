package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

const (
	// reloadTimeout bounds how long kube-apiserver may take to take up a file:
	// it looks each minute, if it isn't told of a change.
	reloadTimeout = 90 * time.Second
	// settled is how long the configmap has to stay as it should be.
	settled = 2 * time.Second
)

// rotateFrontProxy replaces the front-proxy CA and the aggregator's certificate
// of a running control plane. With an overlap, which is the time that aggregated
// servers get to notice, both CAs are trusted while the certificate changes; at
// zero everything is replaced at once, as after a theft.
func rotateFrontProxy(ctx context.Context, dir string, overlap time.Duration, out io.Writer) error {
	info, err := readInfo(dir)
	if err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(info.Dir, "rotate.lock"))
	if err != nil {
		return fmt.Errorf("another rotation is under way in %s: %w", info.Dir, err)
	}
	defer unlock()
	admin, err := newProbe(info.ClusterCA.CertFile, info.Admin)
	if err != nil {
		return err
	}
	published := publishedCA{admin, info.APIServerURL + "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"}

	old, err := os.ReadFile(info.FrontProxyCA.CertFile)
	if err != nil {
		return err
	}
	ca, caPEM, caKeyPEM, err := newAuthority("front-proxy CA")
	if err != nil {
		return err
	}
	clientPEM, clientKeyPEM, err := ca.sign(frontProxyClient)
	if err != nil {
		return err
	}

	if overlap > 0 {
		if err := writeFile(info.FrontProxyCA.CertFile, append(bytes.Clone(caPEM), old...)); err != nil {
			return err
		}
		if err := published.waitFor(ctx, func(bundle []byte) (bool, error) { return bytes.Contains(bundle, caPEM), nil }); err != nil {
			return err
		}
		fmt.Fprintln(out, "The new front-proxy CA is trusted beside the old one.")
		if err := sleep(ctx, overlap); err != nil {
			return err
		}
	} else if err := writeFile(info.FrontProxyCA.CertFile, caPEM); err != nil {
		return err
	}
	if err := writeFile(info.FrontProxyCA.KeyFile, caKeyPEM); err != nil {
		return err
	}
	// A reader that meets the new key with the old certificate tries again.
	if err := writePair(info.FrontProxyClient, clientPEM, clientKeyPEM); err != nil {
		return err
	}
	fmt.Fprintln(out, "The aggregator's certificate is one of the new CA.")
	if overlap > 0 {
		if err := sleep(ctx, overlap); err != nil {
			return err
		}
		if err := writeFile(info.FrontProxyCA.CertFile, caPEM); err != nil {
			return err
		}
	}

	// kube-apiserver only ever adds to the configmap, for the sake of others
	// that may have other CAs: what is to be forgotten, an administrator takes
	// out. Before it has reloaded its file, it puts that back.
	var since time.Time
	err = published.waitFor(ctx, func(bundle []byte) (bool, error) {
		if !bytes.Equal(bundle, caPEM) {
			since = time.Time{}
			return false, published.replace(ctx, caPEM)
		}
		if since.IsZero() {
			since = time.Now()
		}
		return time.Since(since) >= settled, nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "The old front-proxy CA is trusted no more.")
	return nil
}

// publishedCA is what aggregated servers read: a configmap that kube-apiserver
// keeps.
type publishedCA struct {
	admin *probe
	url   string
}

const publishedKey = "requestheader-client-ca-file"

func (p publishedCA) read(ctx context.Context) ([]byte, error) {
	content, err := p.admin.do(ctx, http.MethodGet, p.url, "", nil)
	if err != nil {
		return nil, err
	}
	var configmap struct {
		Data map[string]string `json:"data"`
	}
	if err := json.Unmarshal(content, &configmap); err != nil {
		return nil, err
	}
	// As this package writes it, whatever stands between certificates.
	var bundle []byte
	for block, rest := pem.Decode([]byte(configmap.Data[publishedKey])); block != nil; block, rest = pem.Decode(rest) {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	return bundle, nil
}

func (p publishedCA) replace(ctx context.Context, bundle []byte) error {
	patch, err := json.Marshal(map[string]any{"data": map[string]string{publishedKey: string(bundle)}})
	if err != nil {
		return err
	}
	_, err = p.admin.do(ctx, http.MethodPatch, p.url, "application/merge-patch+json", bytes.NewReader(patch))
	return err
}

// waitFor reads until done says that it is.
func (p publishedCA) waitFor(ctx context.Context, done func(bundle []byte) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, reloadTimeout, fmt.Errorf("kube-apiserver hasn't taken up the front-proxy CA within %s: see its log", reloadTimeout))
	defer cancel()
	for {
		bundle, err := p.read(ctx)
		if err == nil {
			var ok bool
			if ok, err = done(bundle); ok && err == nil {
				return nil
			}
		}
		if sleepErr := sleep(ctx, 250*time.Millisecond); sleepErr != nil {
			if err != nil {
				return fmt.Errorf("%w: %w", sleepErr, err)
			}
			return sleepErr
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
