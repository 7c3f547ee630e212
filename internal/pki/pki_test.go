package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	testingclock "k8s.io/utils/clock/testing"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

const day = 24 * time.Hour

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func ensure(t *testing.T, dir string, opts Options) *Files {
	t.Helper()
	f, err := Ensure(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// contents returns the files of a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		got[e.Name()] = readString(t, filepath.Join(dir, e.Name()))
	}
	return got
}

func readString(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// changed returns the names of the files that aren't what they were.
func changed(before, after map[string]string) []string {
	var names []string
	for name := range after {
		if before[name] != after[name] {
			names = append(names, name)
		}
	}
	for name := range before {
		if _, ok := after[name]; !ok {
			names = append(names, name+" removed")
		}
	}
	slices.Sort(names)
	return names
}

func read(t *testing.T, path string) *pair {
	t.Helper()
	p, err := readPair(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCertificates(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	f := ensure(t, dir, Options{
		Hosts: []string{"Example.com.", "10.0.0.7", "[fd00::7]", "0.0.0.0", "::", "localhost", "127.0.0.1", "*.example.com"},
		Clock: testingclock.NewFakeClock(begin),
	})

	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info.Mode(), err)
	}
	var names []string
	for name := range contents(t, dir) {
		names = append(names, name)
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"admin.pem", "ca.crt", "ca.pem", "serving.pem"}, names); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if data := contents(t, dir)["ca.crt"]; strings.Contains(data, "KEY") {
		t.Error("ca.crt holds a key")
	}

	type facts struct {
		Subject   string
		NotBefore time.Time
		NotAfter  time.Time
		CA        bool
		Usage     []x509.ExtKeyUsage
		DNS       []string
		IPs       []string
	}
	factsOf := func(path string) facts {
		c := read(t, path).cert
		got := facts{Subject: c.Subject.String(), NotBefore: c.NotBefore, NotAfter: c.NotAfter, CA: c.IsCA, Usage: c.ExtKeyUsage, DNS: c.DNSNames}
		for _, ip := range c.IPAddresses {
			got.IPs = append(got.IPs, ip.String())
		}
		if c.PublicKeyAlgorithm != x509.ECDSA || read(t, path).key.Curve.Params().BitSize != 256 {
			t.Errorf("%s has another kind of key", path)
		}
		return got
	}
	hour := time.Hour
	for path, want := range map[string]facts{
		f.ca:      {Subject: "CN=aaserver-ca@1772366400", NotBefore: begin.Add(-hour), NotAfter: begin.Add(3650 * day), CA: true},
		f.Serving: {Subject: "CN=aaserver", NotBefore: begin.Add(-hour), NotAfter: begin.Add(365 * day), Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNS: []string{"localhost", "example.com", "*.example.com"}, IPs: []string{"127.0.0.1", "::1", "10.0.0.7", "fd00::7"}},
		f.Admin:   {Subject: "CN=aaserver-admin,O=system:masters", NotBefore: begin.Add(-hour), NotAfter: begin.Add(365 * day), Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
	} {
		if diff := cmp.Diff(want, factsOf(path)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
}

func TestRenewal(t *testing.T) {
	for name, tc := range map[string]struct {
		after       time.Duration
		hosts       []string
		do          func(t *testing.T, f *Files)
		wantChanged []string
	}{
		"the next day, nothing is done":                    {after: day},
		"with more than a third left, nothing is done":     {after: 243 * day},
		"with less than a third left, leaves are issued":   {after: 244 * day, wantChanged: []string{"admin.pem", "serving.pem"}},
		"after they ran out, leaves are issued":            {after: 400 * day, wantChanged: []string{"admin.pem", "serving.pem"}},
		"with more than a fifth left, the CA is as it was": {after: 8*365*day - day, wantChanged: []string{"admin.pem", "serving.pem"}},
		"with less than a fifth left, the CA is renewed":   {after: 8*365*day + day, wantChanged: []string{"admin.pem", "ca.crt", "ca.pem", "serving.pem"}},
		"after it ran out, the CA is renewed":              {after: 11 * 365 * day, wantChanged: []string{"admin.pem", "ca.crt", "ca.pem", "serving.pem"}},
		"a clock that was ahead is no harm":                {after: -20 * 365 * day, wantChanged: []string{"admin.pem", "ca.crt", "ca.pem", "serving.pem"}},
		"other hosts need another certificate":             {hosts: []string{"example.com"}, wantChanged: []string{"serving.pem"}},
		"a missing leaf is issued": {
			do:          func(t *testing.T, f *Files) { unlink(t, f.Serving) },
			wantChanged: []string{"serving.pem"},
		},
		"a missing copy of the CA is made": {
			do: func(t *testing.T, f *Files) { unlink(t, f.CACert) },
		},
		"what a crash left unfinished is cleared away": {
			after: 300 * day,
			do: func(t *testing.T, f *Files) {
				for _, path := range []string{f.Serving, f.Admin} {
					if err := os.WriteFile(path+".new", []byte("half a"), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			},
			wantChanged: []string{"admin.pem", "serving.pem"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			clock := testingclock.NewFakeClock(begin)
			f := ensure(t, dir, Options{Clock: clock})
			before := contents(t, dir)
			ca := read(t, f.ca)
			if tc.do != nil {
				tc.do(t, f)
			}
			clock.SetTime(begin.Add(tc.after))
			f = ensure(t, dir, Options{Clock: clock, Hosts: tc.hosts})
			after := contents(t, dir)
			if diff := cmp.Diff(tc.wantChanged, changed(before, after)); diff != "" {
				t.Errorf("changed files (-want +got):\n%s", diff)
			}
			// Clients that knew the CA before, while its certificate is valid,
			// and those that learn of it now trust what is there now.
			roots := x509.NewCertPool()
			roots.AddCert(read(t, f.ca).cert)
			if now := clock.Now(); now.After(ca.cert.NotBefore) && now.Before(ca.cert.NotAfter) {
				roots = x509.NewCertPool()
				roots.AddCert(ca.cert)
			}
			for _, path := range []string{f.Serving, f.Admin} {
				if _, err := read(t, path).cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: clock.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
			if !read(t, f.ca).key.Equal(ca.key) {
				t.Error("the CA's key was replaced")
			}
			ensure(t, dir, Options{Clock: clock, Hosts: tc.hosts})
			if diff := cmp.Diff([]string(nil), changed(after, contents(t, dir))); diff != "" {
				t.Errorf("a second time, files changed: %s", diff)
			}
		})
	}
}

func unlink(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestOldClientsTrustTheRenewedCA(t *testing.T) {
	dir := t.TempDir()
	clock := testingclock.NewFakeClock(begin)
	f := ensure(t, dir, Options{Clock: clock})
	oldCA, oldLeaf := read(t, f.ca).cert, read(t, f.Serving).cert
	clock.SetTime(begin.Add(9 * 365 * day))
	f = ensure(t, dir, Options{Clock: clock})
	newCA, newLeaf := read(t, f.ca).cert, read(t, f.Serving).cert
	if oldCA.Equal(newCA) {
		t.Fatal("the CA wasn't renewed")
	}
	for name, tc := range map[string]struct {
		ca, leaf *x509.Certificate
		at       time.Time
	}{
		"old CA, new leaf": {oldCA, newLeaf, clock.Now()},
		"new CA, new leaf": {newCA, newLeaf, clock.Now()},
		// The leaf is long expired: what counts is that the signature holds.
		"new CA, old leaf": {newCA, oldLeaf, time.Time{}},
	} {
		roots := x509.NewCertPool()
		roots.AddCert(tc.ca)
		if tc.at.IsZero() {
			if err := tc.leaf.CheckSignatureFrom(tc.ca); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if _, err := tc.leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: tc.at, DNSName: "localhost"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	write := func(name string, data func(all map[string]string) string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data(contents(t, dir))), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	const keyStart = "-----BEGIN EC PRIVATE KEY"
	certOf := func(s string) string { return s[:strings.Index(s, keyStart)] }
	keyOf := func(s string) string { return s[strings.Index(s, keyStart):] }
	for name, tc := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   string // DIR stands for the directory
	}{
		"no certificate": {
			write("serving.pem", func(all map[string]string) string { return keyOf(all["serving.pem"]) }),
			"DIR/serving.pem holds no certificate; delete it to have it issued anew",
		},
		"no key": {
			write("admin.pem", func(all map[string]string) string { return certOf(all["admin.pem"]) }),
			"DIR/admin.pem holds no private key; delete it to have it issued anew",
		},
		"an empty file": {
			write("serving.pem", func(map[string]string) string { return "" }),
			"DIR/serving.pem holds no certificate; delete it to have it issued anew",
		},
		"another's key": {
			write("serving.pem", func(all map[string]string) string { return certOf(all["serving.pem"]) + keyOf(all["admin.pem"]) }),
			"DIR/serving.pem holds a private key that isn't its certificate's; delete it to have it issued anew",
		},
		"a CA with another's key": {
			write("ca.pem", func(all map[string]string) string { return certOf(all["ca.pem"]) + keyOf(all["admin.pem"]) }),
			"DIR/ca.pem holds a private key that isn't its certificate's; restore it from a backup, or delete the directory DIR to start with a new CA, which every client has to be told of",
		},
		"a leaf as the CA": {
			write("ca.pem", func(all map[string]string) string { return all["admin.pem"] }),
			"DIR/ca.pem isn't a CA; restore it from a backup, or delete the directory DIR to start with a new CA, which every client has to be told of",
		},
		"no CA, but what it has issued": {
			func(t *testing.T, dir string) {
				unlink(t, filepath.Join(dir, "ca.pem"))
				unlink(t, filepath.Join(dir, "ca.crt"))
			},
			"DIR/ca.pem is missing, but DIR/serving.pem is there; restore the former from a backup, or delete DIR/ca.crt, DIR/serving.pem and DIR/admin.pem to start with a new CA",
		},
		"another CA's leaf": {
			func(t *testing.T, dir string) {
				other := t.TempDir()
				ensure(t, other, Options{})
				write("serving.pem", func(map[string]string) string { return contents(t, other)["serving.pem"] })(t, dir)
			},
			"DIR/serving.pem wasn't issued by the CA in DIR/ca.pem; delete the former to have it issued anew",
		},
		"another CA's certificate": {
			func(t *testing.T, dir string) {
				other := t.TempDir()
				ensure(t, other, Options{})
				write("ca.crt", func(map[string]string) string { return contents(t, other)["ca.crt"] })(t, dir)
			},
			"DIR/ca.crt isn't the certificate in DIR/ca.pem; restore the one that is wrong from a backup, or delete DIR/ca.crt if that is",
		},
		"a damaged copy of the CA": {
			write("ca.crt", func(map[string]string) string { return "x" }),
			"DIR/ca.crt is damaged; delete it to have it written anew from DIR/ca.pem",
		},
		"a file without end": {
			write("serving.pem", func(map[string]string) string { return strings.Repeat("x", maxFile+1) }),
			"DIR/serving.pem is larger than 1048576 bytes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ensure(t, dir, Options{})
			tc.damage(t, dir)
			before := contents(t, dir)
			_, err := Ensure(dir, Options{})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if diff := cmp.Diff(strings.ReplaceAll(tc.want, "DIR", dir), err.Error()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff([]string(nil), changed(before, contents(t, dir))); diff != "" {
				t.Errorf("files changed: %s", diff)
			}
		})
	}
	for _, host := range []string{"", "not a name", "under_score", "a/b", "https://x"} {
		if _, err := Ensure(t.TempDir(), Options{Hosts: []string{host}}); err == nil || !strings.Contains(err.Error(), "neither a DNS name nor an IP address") {
			t.Errorf("host %q: %v", host, err)
		}
	}
}

// serve is a server with the certificates, as the generic server uses them. It
// answers with who its client is.
func serve(t *testing.T, f *Files) string {
	t.Helper()
	serving, err := dynamiccertificates.NewDynamicServingContentFromFiles("serving", f.Serving, f.Serving)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := dynamiccertificates.NewDynamicCAContentFromFile("ca", f.CACert)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { serving.Run(ctx, 1) })
	wg.Go(func() { ca.Run(ctx, 1) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, chain := range r.TLS.VerifiedChains {
			io.WriteString(w, chain[0].Subject.String())
		}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pair, err := tls.X509KeyPair(serving.CurrentCertKeyContent())
		if err != nil {
			return nil, err
		}
		opts, _ := ca.VerifyOptions()
		return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: opts.Roots, ClientAuth: tls.VerifyClientCertIfGiven}, nil
	}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func TestHandshake(t *testing.T) {
	dir := t.TempDir()
	f := ensure(t, filepath.Join(dir, "pki"), Options{})
	url := serve(t, f)
	path := filepath.Join(dir, "kubeconfig")
	if err := f.WriteKubeconfig(path, url); err != nil {
		t.Fatal(err)
	}
	whoami := func(config *rest.Config) (string, error) {
		client, err := rest.HTTPClientFor(config)
		if err != nil {
			t.Fatal(err)
		}
		defer client.CloseIdleConnections()
		resp, err := client.Get(config.Host)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1", "localhost"} {
		_, port, err := net.SplitHostPort(strings.TrimPrefix(url, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		config.Host = "https://" + net.JoinHostPort(host, port)
		if got, err := whoami(config); err != nil || got != "CN=aaserver-admin,O=system:masters" {
			t.Errorf("%s: the server sees %q, %v", host, got, err)
		}
	}
	// A running server takes up what is renewed by itself.
	ensure(t, filepath.Join(dir, "pki"), Options{Hosts: []string{"example.com"}})
	config.ServerName = "example.com"
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := whoami(config); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("with a renewed certificate: %v", err)
		}
	}
	// Another installation's CA doesn't trust this server, and isn't trusted.
	other := ensure(t, t.TempDir(), Options{})
	stranger := rest.CopyConfig(config)
	stranger.CAData, err = os.ReadFile(other.CACert)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := whoami(stranger); !errors.As(err, new(x509.UnknownAuthorityError)) {
		t.Errorf("with another CA: %v", err)
	}
	stranger = rest.CopyConfig(config)
	if stranger.CertData, err = os.ReadFile(other.Admin); err != nil {
		t.Fatal(err)
	}
	stranger.KeyData = stranger.CertData
	if got, err := whoami(stranger); err == nil {
		t.Errorf("with another's certificate, the server sees %q", got)
	}
}

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kubeconfig")
	clock := testingclock.NewFakeClock(begin)
	f := ensure(t, filepath.Join(dir, "pki"), Options{Clock: clock})
	writeConfig := func(f *Files, server string) os.FileInfo {
		t.Helper()
		if err := f.WriteKubeconfig(path, server); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("mode %v", info.Mode())
		}
		return info
	}
	first := writeConfig(f, "https://127.0.0.1:6443")
	config, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c := config.Contexts[config.CurrentContext]
	if config.CurrentContext != "aaserver" || c.Namespace != "default" {
		t.Errorf("context %q: %v", config.CurrentContext, c)
	}
	if got := config.Clusters[c.Cluster].Server; got != "https://127.0.0.1:6443" {
		t.Errorf("server %q", got)
	}

	if !os.SameFile(first, writeConfig(f, "https://127.0.0.1:6443")) {
		t.Error("written again though nothing had changed")
	}
	if os.SameFile(first, writeConfig(f, "https://127.0.0.1:7443")) {
		t.Error("not written though the server had changed")
	}

	// A user's own settings stay.
	config, err = clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	config.Contexts["aaserver"].Namespace = "shop"
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	clock.Step(300 * day)
	f = ensure(t, filepath.Join(dir, "pki"), Options{Clock: clock})
	writeConfig(f, "https://127.0.0.1:7443")
	now, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := now.Contexts["aaserver"].Namespace; got != "shop" {
		t.Errorf("namespace %q", got)
	}
	if string(now.AuthInfos["aaserver"].ClientCertificateData) == string(config.AuthInfos["aaserver"].ClientCertificateData) {
		t.Error("the renewed certificate isn't in it")
	}

	if err := os.WriteFile(path, []byte("not: [a kubeconfig"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteKubeconfig(path, "https://127.0.0.1:7443"); err == nil || err.Error() != path+" isn't a kubeconfig; delete it to have it written anew" {
		t.Errorf("with another file in its place: %v", err)
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kubeconfig")
	clock := testingclock.NewFakeClock(begin)
	f := ensure(t, filepath.Join(dir, "pki"), Options{Clock: clock})
	if err := f.WriteKubeconfig(path, "https://127.0.0.1:6443"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.Run(ctx) }()
	defer func() { cancel(); <-done }()

	eventually := func(what string, cond func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}
	// step lets one check happen: when it is over, the clock is waited for.
	step := func(d time.Duration) {
		t.Helper()
		eventually("Run waits", clock.HasWaiters)
		clock.Step(d)
		eventually("Run waits again", clock.HasWaiters)
	}
	before := contents(t, f.dir())
	config := readString(t, path)
	step(2 * time.Hour)
	if got := changed(before, contents(t, f.dir())); got != nil {
		t.Errorf("after two hours, these changed: %v", got)
	}
	if readString(t, path) != config {
		t.Error("after two hours, the kubeconfig changed")
	}

	// A directory in its place keeps a file from being written.
	if err := os.Mkdir(f.Serving+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.Serving+".new", "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	step(300 * day)
	if err := os.RemoveAll(f.Serving + ".new"); err != nil {
		t.Fatal(err)
	}
	if got := changed(before, contents(t, f.dir())); got != nil {
		t.Errorf("these changed though it failed: %v", got)
	}
	step(2 * time.Hour)
	if diff := cmp.Diff([]string{"admin.pem", "serving.pem"}, changed(before, contents(t, f.dir()))); diff != "" {
		t.Errorf("renewed (-want +got):\n%s", diff)
	}
	kubeconfig, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(contents(t, f.dir())["admin.pem"], string(kubeconfig.AuthInfos["aaserver"].ClientCertificateData)) {
		t.Error("the kubeconfig doesn't hold the renewed certificate")
	}
}

func (f *Files) dir() string { return filepath.Dir(f.Serving) }
