package pki

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// entry names the cluster, the user and the context in a kubeconfig.
const entry = "aaserver"

// WriteKubeconfig makes the administrator's kubeconfig for a server's URL, and
// has Run keep it up to date. The file is left alone if it is already right;
// what a user has changed in it otherwise, the namespace for example, stays.
func (f *Files) WriteKubeconfig(path, server string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.writeKubeconfig(path, server); err != nil {
		return err
	}
	f.kubeconfigs[path] = server
	return nil
}

// writeKubeconfig needs mu.
func (f *Files) writeKubeconfig(path, server string) error {
	ca, err := readFile(f.CACert)
	if err != nil {
		return err
	}
	admin, err := readPair(f.Admin)
	if err != nil {
		return err
	}
	certPEM, err := cert.EncodeCertificates(admin.cert)
	if err != nil {
		return err
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(admin.key)
	if err != nil {
		return err
	}

	config := clientcmdapi.NewConfig()
	old, err := readFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("can't read the kubeconfig: %w", err)
	default:
		if config, err = clientcmd.Load(old); err != nil {
			return fmt.Errorf("%s isn't a kubeconfig; delete it to have it written anew", path)
		}
	}
	cluster := clientcmdapi.NewCluster()
	cluster.Server = server
	cluster.CertificateAuthorityData = ca
	config.Clusters[entry] = cluster
	user := clientcmdapi.NewAuthInfo()
	user.ClientCertificateData = certPEM
	user.ClientKeyData = keyPEM
	config.AuthInfos[entry] = user
	if config.Contexts[entry] == nil {
		context := clientcmdapi.NewContext()
		context.Cluster, context.AuthInfo, context.Namespace = entry, entry, "default"
		config.Contexts[entry] = context
	}
	if config.CurrentContext == "" {
		config.CurrentContext = entry
	}
	data, err := clientcmd.Write(*config)
	if err != nil {
		return fmt.Errorf("can't make the kubeconfig: %w", err)
	}
	if bytes.Equal(old, data) {
		return os.Chmod(path, 0o600)
	}
	if err := writeFile(path, data); err != nil {
		return fmt.Errorf("can't write the kubeconfig: %w", err)
	}
	return nil
}
