// Package pki is the certificate authority of a server without a cluster: it
// keeps the server's certificate and the administrator's in a directory of its
// own, and renews them before they run out.
//
//	ca.pem       the CA's certificate and key
//	ca.crt       its certificate alone, for clients
//	serving.pem  the server's certificate and key
//	admin.pem    the administrator's, in the group system:masters
//
// A certificate and its key share a file, because a file can be replaced at
// once and two can't: a crash leaves the old pair or the new one.
//
// The CA is valid for ten years. When less than a fifth of that is left, its
// certificate is issued anew for the same key and name: certificates that it
// has issued go on being valid, and clients that know the old one alone have
// two years to learn of the new one. The key is never replaced: whoever wants
// another CA deletes the directory.
package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

const (
	caValidity   = 10 * 365 * 24 * time.Hour
	leafValidity = 365 * 24 * time.Hour

	// backdate lets clients use a new certificate whose clocks are behind.
	backdate = time.Hour

	// checkInterval is how often Run looks at the certificates. It is short
	// because a clock may be set by years, as on a device that learns the
	// time after its start.
	checkInterval = time.Hour

	// maxFile bounds what is read of a file, in bytes.
	maxFile = 1 << 20
)

// Options of Ensure. The zero value is a server that is reached by loopback.
type Options struct {
	// Hosts are the DNS names and IP addresses of the server, next to
	// localhost, 127.0.0.1 and ::1. Unspecified addresses, 0.0.0.0 and ::, are
	// left out.
	Hosts []string
	// Clock is the real one by default.
	Clock clock.Clock
}

// Files are certificates that exist and are valid. They are replaced in
// place: who uses them reads them again when they change, as the generic
// server does by itself.
type Files struct {
	// CACert is for clients to trust the server by, and for the server to
	// trust the administrator by.
	CACert string
	// Serving and Admin each hold a certificate and its key, and are what is
	// wanted where either is.
	Serving, Admin string

	ca    string
	dns   []string
	ips   []net.IP
	clock clock.Clock

	// mu protects the files, and kubeconfigs: the server of each by path.
	mu          sync.Mutex
	kubeconfigs map[string]string
}

// Ensure creates in dir what is missing, and renews what is not valid for much
// longer or, in the server's certificate, doesn't fit the hosts. It refuses
// files that are damaged or don't belong together, naming them and what to do.
// Two processes must not use a directory at once.
func Ensure(dir string, opts Options) (*Files, error) {
	f := &Files{
		CACert:      filepath.Join(dir, "ca.crt"),
		Serving:     filepath.Join(dir, "serving.pem"),
		Admin:       filepath.Join(dir, "admin.pem"),
		ca:          filepath.Join(dir, "ca.pem"),
		dns:         []string{"localhost"},
		ips:         []net.IP{net.IPv4(127, 0, 0, 1).To4(), net.IPv6loopback},
		clock:       opts.Clock,
		kubeconfigs: map[string]string{},
	}
	if f.clock == nil {
		f.clock = clock.RealClock{}
	}
	for _, host := range opts.Hosts {
		if err := f.addHost(host); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't create the directory for certificates: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't keep other users out of the directory for certificates: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.renew(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *Files) addHost(host string) error {
	if ip := net.ParseIP(strings.Trim(host, "[]")); ip != nil {
		if ip4 := ip.To4(); ip4 != nil {
			ip = ip4
		}
		if !ip.IsUnspecified() && !slices.ContainsFunc(f.ips, ip.Equal) {
			f.ips = append(f.ips, ip)
		}
		return nil
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if len(validation.IsDNS1123Subdomain(name)) > 0 && len(validation.IsWildcardDNS1123Subdomain(name)) > 0 {
		return fmt.Errorf("the host %q is neither a DNS name nor an IP address", host)
	}
	if !slices.Contains(f.dns, name) {
		f.dns = append(f.dns, name)
	}
	return nil
}

// Run renews certificates, and the kubeconfigs that hold them, until ctx ends.
// What goes wrong is logged and tried again an hour later; there are months
// for that.
func (f *Files) Run(ctx context.Context) {
	timer := f.clock.NewTimer(checkInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C():
		}
		if err := f.check(); err != nil {
			klog.FromContext(ctx).Error(err, "Certificates couldn't be renewed; trying again", "after", checkInterval)
		}
		timer.Reset(checkInterval)
	}
}

func (f *Files) check() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.renew(); err != nil {
		return err
	}
	var errs []error
	for path, server := range f.kubeconfigs {
		errs = append(errs, f.writeKubeconfig(path, server))
	}
	return errors.Join(errs...)
}

// renew needs mu.
func (f *Files) renew() error {
	ca, err := f.renewCA()
	if err != nil {
		return err
	}
	if err := f.renewLeaf(ca, f.Serving, x509.Certificate{
		Subject:     pkix.Name{CommonName: "aaserver"},
		DNSNames:    f.dns,
		IPAddresses: f.ips,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}); err != nil {
		return err
	}
	return f.renewLeaf(ca, f.Admin, x509.Certificate{
		Subject:     pkix.Name{CommonName: "aaserver-admin", Organization: []string{"system:masters"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

func (f *Files) renewCA() (*pair, error) {
	ca, err := readPair(f.ca)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// A new CA next to what an old one has issued would lock out whoever
		// trusts that.
		for _, path := range []string{f.CACert, f.Serving, f.Admin} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%s is missing, but %s is there; restore the former from a backup, or delete %s, %s and %s to start with a new CA", f.ca, path, f.CACert, f.Serving, f.Admin)
			}
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		name := pkix.Name{CommonName: fmt.Sprintf("aaserver-ca@%d", f.clock.Now().Unix())}
		if ca, err = f.issueCA(name, key); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case !ca.cert.IsCA:
		return nil, damaged(f.ca, "isn't a CA")
	case f.due(ca.cert, caValidity/5):
		if ca, err = f.issueCA(ca.cert.Subject, ca.key); err != nil {
			return nil, err
		}
	}

	public, err := cert.EncodeCertificates(ca.cert)
	if err != nil {
		return nil, err
	}
	switch old, err := readFile(f.CACert); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case bytes.Equal(old, public):
		return ca, nil
	default:
		certs, err := cert.ParseCertsPEM(old)
		if err != nil {
			return nil, fmt.Errorf("%s is damaged; delete it to have it written anew from %s", f.CACert, f.ca)
		}
		// A crash may have kept us from replacing it.
		if !ca.key.PublicKey.Equal(certs[0].PublicKey) {
			return nil, fmt.Errorf("%s isn't the certificate in %s; restore the one that is wrong from a backup, or delete %s if that is", f.CACert, f.ca, f.CACert)
		}
	}
	return ca, writeFile(f.CACert, public)
}

func (f *Files) issueCA(name pkix.Name, key *ecdsa.PrivateKey) (*pair, error) {
	now := f.clock.Now()
	template := &x509.Certificate{
		Subject:               name,
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caValidity),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	return issue(f.ca, template, template, key, key)
}

// renewLeaf issues a certificate, if there is none that is like want and valid
// for long enough.
func (f *Files) renewLeaf(ca *pair, path string, want x509.Certificate) error {
	have, err := readPair(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case have.cert.CheckSignatureFrom(ca.cert) != nil:
		return fmt.Errorf("%s wasn't issued by the CA in %s; delete the former to have it issued anew", path, f.ca)
	case !f.due(have.cert, leafValidity/3) && alike(have.cert, &want):
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := f.clock.Now()
	want.NotBefore, want.NotAfter = now.Add(-backdate), now.Add(leafValidity)
	want.KeyUsage = x509.KeyUsageDigitalSignature
	want.BasicConstraintsValid = true
	_, err = issue(path, &want, ca.cert, key, ca.key)
	return err
}

// due says that a certificate isn't valid yet, or for less than left.
func (f *Files) due(c *x509.Certificate, left time.Duration) bool {
	now := f.clock.Now()
	return now.Before(c.NotBefore) || c.NotAfter.Sub(now) < left
}

func alike(a, b *x509.Certificate) bool {
	return a.Subject.String() == b.Subject.String() &&
		slices.Equal(a.DNSNames, b.DNSNames) &&
		slices.EqualFunc(a.IPAddresses, b.IPAddresses, net.IP.Equal) &&
		slices.Equal(a.ExtKeyUsage, b.ExtKeyUsage)
}

// pair is a certificate and its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func issue(path string, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) (*pair, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), crypto.Signer(signer))
	if err != nil {
		return nil, fmt.Errorf("issuing the certificate in %s: %w", path, err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	certPEM, err := cert.EncodeCertificates(c)
	if err != nil {
		return nil, err
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return nil, err
	}
	if err := writeFile(path, append(certPEM, keyPEM...)); err != nil {
		return nil, err
	}
	klog.InfoS("Issued a certificate", "file", path, "subject", c.Subject.String(), "notAfter", c.NotAfter)
	return &pair{cert: c, key: key}, nil
}

func readPair(path string) (*pair, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := cert.ParseCertsPEM(data)
	if err != nil {
		return nil, damaged(path, "holds no certificate")
	}
	key, err := keyutil.ParsePrivateKeyPEM(data)
	if err != nil {
		return nil, damaged(path, "holds no private key")
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, damaged(path, "holds a private key of another kind than ECDSA")
	}
	if len(certs) != 1 || !ec.PublicKey.Equal(certs[0].PublicKey) {
		return nil, damaged(path, "holds a private key that isn't its certificate's")
	}
	return &pair{cert: certs[0], key: ec}, nil
}

// damaged is the refusal of a pair. Only for the CA is it much of a loss to
// start anew.
func damaged(path, what string) error {
	if filepath.Base(path) == "ca.pem" {
		return fmt.Errorf("%s %s; restore it from a backup, or delete the directory %s to start with a new CA, which every client has to be told of", path, what, filepath.Dir(path))
	}
	return fmt.Errorf("%s %s; delete it to have it issued anew", path, what)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return data, nil
}

// writeFile replaces a file at once and for good, readable by its owner alone.
func writeFile(path string, data []byte) (err error) {
	// One name is enough, and a crash doesn't leave more than one behind.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
