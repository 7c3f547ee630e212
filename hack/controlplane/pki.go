package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	caLifetime   = 10 * 365 * 24 * time.Hour
	leafLifetime = 365 * 24 * time.Hour
)

// KeyPair names the PEM files of a certificate and its key.
type KeyPair struct {
	CertFile string `json:"certFile"`
	KeyFile  string `json:"keyFile"`
}

// pki is where certificates and keys lie. The authorities and the service
// accounts' key are made once, so that what they signed stays valid; all else
// is signed anew by every up.
type pki string

func (p pki) pair(name string) KeyPair {
	return KeyPair{CertFile: filepath.Join(string(p), name+".crt"), KeyFile: filepath.Join(string(p), name+".key")}
}

func (p pki) cluster() KeyPair          { return p.pair("ca") }
func (p pki) frontProxy() KeyPair       { return p.pair("front-proxy-ca") }
func (p pki) frontProxyClient() KeyPair { return p.pair("front-proxy-client") }

// etcdCA is an authority of its own: etcd lets in whoever has a certificate of
// it, which no user of the cluster may have.
func (p pki) etcdCA() KeyPair            { return p.pair("etcd-ca") }
func (p pki) etcd() KeyPair              { return p.pair("etcd") }
func (p pki) apiserver() KeyPair         { return p.pair("apiserver") }
func (p pki) controllerManager() KeyPair { return p.pair("controller-manager") }
func (p pki) admin() KeyPair             { return p.pair("admin") }
func (p pki) user() KeyPair              { return p.pair("user") }

// serviceAccounts' certificate file is a bare public key.
func (p pki) serviceAccounts() KeyPair {
	return KeyPair{CertFile: filepath.Join(string(p), "sa.pub"), KeyFile: filepath.Join(string(p), "sa.key")}
}

// ensure makes what is missing and signs the certificates.
func (p pki) ensure() error {
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		if err := p.create(); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}

	cluster, err := readAuthority(p.cluster())
	if err != nil {
		return err
	}
	etcd, err := readAuthority(p.etcdCA())
	if err != nil {
		return err
	}
	frontProxy, err := readAuthority(p.frontProxy())
	if err != nil {
		return err
	}
	loopback := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, leaf := range []struct {
		authority authority
		files     KeyPair
		template  x509.Certificate
	}{
		{cluster, p.apiserver(), x509.Certificate{
			Subject:     pkix.Name{CommonName: "kube-apiserver"},
			DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
			IPAddresses: append(loopback, net.IPv4(10, 0, 0, 1)),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}},
		// kube-controller-manager serves its health with the certificate by
		// which kube-apiserver knows it.
		{cluster, p.controllerManager(), x509.Certificate{
			Subject:     pkix.Name{CommonName: "system:kube-controller-manager"},
			DNSNames:    []string{"localhost"},
			IPAddresses: loopback,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}},
		{cluster, p.admin(), x509.Certificate{
			Subject:     pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}},
		{cluster, p.user(), x509.Certificate{
			Subject:     pkix.Name{CommonName: "user"},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}},
		{etcd, p.etcd(), x509.Certificate{
			Subject:     pkix.Name{CommonName: "etcd"},
			DNSNames:    []string{"localhost"},
			IPAddresses: loopback,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}},
		{frontProxy, p.frontProxyClient(), frontProxyClient},
	} {
		cert, key, err := leaf.authority.sign(leaf.template)
		if err != nil {
			return err
		}
		if err := writePair(leaf.files, cert, key); err != nil {
			return err
		}
	}
	return nil
}

// frontProxyName is the one name that servers take the front proxy's headers
// from.
const frontProxyName = "front-proxy-client"

var frontProxyClient = x509.Certificate{
	Subject:     pkix.Name{CommonName: frontProxyName},
	ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
}

// create makes the authorities and the service accounts' key: all of them or
// none, however it ends.
func (p pki) create() error {
	dir, err := os.MkdirTemp(filepath.Dir(string(p)), "pki-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	made := pki(dir)
	for name, files := range map[string]KeyPair{
		"cluster CA":     made.cluster(),
		"front-proxy CA": made.frontProxy(),
		"etcd CA":        made.etcdCA(),
	} {
		_, cert, key, err := newAuthority(name)
		if err != nil {
			return err
		}
		if err := writePair(files, cert, key); err != nil {
			return err
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	if err := writePair(made.serviceAccounts(), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), keyPEM); err != nil {
		return err
	}
	return os.Rename(dir, string(p))
}

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(name string) (a authority, certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, nil, nil, err
	}
	now := time.Now()
	template := x509.Certificate{
		// Two authorities in one bundle need different names.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("%s %s", name, now.UTC().Format(time.RFC3339Nano))},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(caLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return authority{}, nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return authority{}, nil, nil, err
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return authority{}, nil, nil, err
	}
	return authority{cert: cert, key: key}, encodeCert(cert), keyPEM, nil
}

// readAuthority reads the authority that the key belongs to. The certificate's
// file may hold others beside it, as while one replaces another.
func readAuthority(files KeyPair) (authority, error) {
	keyPEM, err := os.ReadFile(files.KeyFile)
	if err != nil {
		return authority{}, err
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return authority{}, fmt.Errorf("%s has no key in PEM", files.KeyFile)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return authority{}, fmt.Errorf("%s: %w", files.KeyFile, err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return authority{}, fmt.Errorf("%s holds a %T, not an ECDSA key", files.KeyFile, parsed)
	}
	certPEM, err := os.ReadFile(files.CertFile)
	if err != nil {
		return authority{}, err
	}
	for block, rest := pem.Decode(certPEM); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return authority{}, fmt.Errorf("%s: %w", files.CertFile, err)
		}
		if key.PublicKey.Equal(cert.PublicKey) {
			return authority{cert: cert, key: key}, nil
		}
	}
	return authority{}, fmt.Errorf("%s has no certificate of the key in %s", files.CertFile, files.KeyFile)
}

func (a authority) sign(template x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	template.NotBefore = now.Add(-time.Hour)
	template.NotAfter = now.Add(leafLifetime)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, &template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, err
	}
	return encodeCert(cert), keyPEM, nil
}

func encodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func writePair(files KeyPair, cert, key []byte) error {
	if err := writeFile(files.KeyFile, key); err != nil {
		return err
	}
	return writeFile(files.CertFile, cert)
}

// writeFile replaces a file at once: who reads it meanwhile sees the old or the
// new content.
func writeFile(name string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// writeKubeconfig writes one that needs no other file.
func writeKubeconfig(name, server, caFile, user string, files KeyPair) error {
	var contents [3][]byte
	for i, file := range []string{caFile, files.CertFile, files.KeyFile} {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		contents[i] = content
	}
	encode := base64.StdEncoding.EncodeToString
	var out bytes.Buffer
	fmt.Fprintf(&out, `apiVersion: v1
kind: Config
clusters:
- name: controlplane
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %[3]s
  user:
    client-certificate-data: %[4]s
    client-key-data: %[5]s
contexts:
- name: controlplane
  context: {cluster: controlplane, user: %[3]s}
current-context: controlplane
`, server, encode(contents[0]), user, encode(contents[1]), encode(contents[2]))
	return writeFile(name, out.Bytes())
}
