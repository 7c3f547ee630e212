package server

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/klog/v2"
	"sigs.k8s.io/yaml"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// validateEtcd says what is wrong with the options of a storage, wherever it
// is: that objects are stored somewhere at all is checked by the caller.
func validateEtcd(o *genericoptions.EtcdOptions) []error {
	anywhere := *o
	anywhere.StorageConfig.Transport.ServerList = []string{"unix:///"}
	errs := anywhere.Validate()
	if err := validateEncryption(o.EncryptionProviderConfigFilepath); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// validateEncryption refuses an encryption configuration that leaves targets in
// plain text, because they aren't named in it: the generic server takes any
// name. What else is wrong with the file is found when it is applied.
func validateEncryption(path string) error {
	if path == "" {
		return nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("--encryption-provider-config: %w", err)
	}
	var config apiserverv1.EncryptionConfiguration
	if err := yaml.Unmarshal(text, &config); err != nil {
		return nil
	}
	const group = "." + v1.GroupName
	encrypting := []string{"targets" + group, "*" + group, "*.*"}
	var found bool
	var others []string
	for _, part := range config.Resources {
		for _, name := range part.Resources {
			switch {
			case slices.Contains(encrypting, name):
				found = true
			case !strings.HasSuffix(name, group) && name != "events" && name != "*.":
				others = append(others, name)
			}
		}
	}
	if !found && len(config.Resources) > 0 {
		return fmt.Errorf("--encryption-provider-config %s: targets aren't named in it, and would be stored in plain text: name %s under resources, or %s", path, encrypting[0], strings.Join(encrypting[1:], " or "))
	}
	if len(others) > 0 {
		klog.InfoS("The encryption configuration names resources that this server doesn't have", "file", path, "resources", others)
	}
	return nil
}

// explainEncrypted says what to do about objects that can't be decrypted.
func explainEncrypted(err error) error {
	// That is all that there is of what the storage says.
	if !strings.Contains(err.Error(), "not transformable") {
		return err
	}
	return fmt.Errorf("objects can't be decrypted: give the --encryption-provider-config that they were written with: %w", err)
}

// explainEncryption adds to an error of the storage's options which file it is
// about.
func explainEncryption(o *genericoptions.EtcdOptions, err error) error {
	// The generic server's own prefix, whatever the error is.
	text, ok := strings.CutPrefix(err.Error(), "error while parsing file: ")
	if !ok {
		return err
	}
	text = strings.TrimPrefix(text, "error while loading file: ")
	return errors.New("--encryption-provider-config " + o.EncryptionProviderConfigFilepath + ": " + text)
}
