//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// cluster is our server behind a real kube-apiserver, with an agent of its own.
type cluster struct {
	dir    string
	plane  *process
	info   *controlPlane
	server *server
	// client asks kube-apiserver.
	client *client
	// backend is what is forwarded to.
	backend *v1.Target
}

const (
	clusterAgent     = "bench"
	clusterNamespace = "default"
)

// startCluster starts all of it, and the backend as a target.
func startCluster(ctx context.Context, o options, dir string) (_ *cluster, err error) {
	plane, info, err := startControlPlane(ctx, filepath.Join(o.bin, "controlplane", "controlplane"), dir)
	if err != nil {
		return nil, err
	}
	c := &cluster{dir: dir, plane: plane, info: info}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	if c.client, err = newClient(info.APIServerURL, info.ClusterCA.CertFile, info.Admin); err != nil {
		return nil, err
	}
	c.server = &server{
		name: "aaserver", program: filepath.Join(o.bin, "aaserver"), plane: info, dir: dir,
		args: []string{"serve", "--data-dir=" + filepath.Join(dir, "data"), "--embedded-agent=" + clusterAgent},
	}
	if err := c.server.start(ctx); err != nil {
		return nil, err
	}
	if err := c.register(ctx); err != nil {
		return nil, err
	}
	return c, c.runBackend(ctx)
}

// register puts the server behind kube-aggregator, and makes a class that
// allows all that is measured.
func (c *cluster) register(ctx context.Context) error {
	if err := c.aggregate(ctx, v1.GroupName, c.server.client.base); err != nil {
		return err
	}
	return c.plane.wait(ctx, func(ctx context.Context) error {
		return c.create(ctx, "/targetclasses", class())
	})
}

// aggregate has kube-apiserver send the requests for a group's v1 to a server on
// loopback.
func (c *cluster) aggregate(ctx context.Context, group, address string) error {
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	service := strings.ReplaceAll(group, ".", "-")
	for _, object := range []struct{ collection, body string }{
		{"/api/v1/namespaces/" + clusterNamespace + "/services", fmt.Sprintf(
			`{"apiVersion":"v1","kind":"Service","metadata":{"name":%q},"spec":{"type":"ExternalName","externalName":"localhost","ports":[{"port":%s}]}}`, service, u.Port())},
		{"/apis/apiregistration.k8s.io/v1/apiservices", fmt.Sprintf(
			`{"apiVersion":"apiregistration.k8s.io/v1","kind":"APIService","metadata":{"name":"v1.%s"},"spec":{"group":%[1]q,"version":"v1","groupPriorityMinimum":1000,"versionPriority":100,"insecureSkipTLSVerify":true,"service":{"namespace":%q,"name":%q,"port":%s}}}`,
			group, clusterNamespace, service, u.Port())},
	} {
		if err := c.client.drop(ctx, request{method: http.MethodPost, path: object.collection, body: []byte(object.body), mediaType: runtime.ContentTypeJSON}); err != nil {
			return err
		}
	}
	return c.plane.wait(ctx, func(ctx context.Context) error {
		return c.client.drop(ctx, request{path: "/apis/" + group + "/v1"})
	})
}

// create creates an object of our group through kube-apiserver. One that is
// there already was created by an attempt that seemed to fail.
func (c *cluster) create(ctx context.Context, collection string, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	err = c.client.drop(ctx, request{
		method: http.MethodPost, path: "/apis/" + v1.SchemeGroupVersion.String() + collection, body: body, mediaType: runtime.ContentTypeJSON,
	})
	if status, ok := errors.AsType[*statusError](err); ok && status.code == http.StatusConflict {
		return nil
	}
	return err
}

func targetPath(name string) string {
	return "/apis/" + v1.SchemeGroupVersion.String() + "/namespaces/" + clusterNamespace + "/targets/" + name
}

// run creates a target and waits until all its instances run.
func (c *cluster) run(ctx context.Context, name string, spec v1.TargetSpec) (*v1.Target, error) {
	spec.AgentName = clusterAgent
	target := &v1.Target{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.SchemeGroupVersion.String(), Kind: "Target"},
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       spec,
	}
	if err := c.create(ctx, "/namespaces/"+clusterNamespace+"/targets", target); err != nil {
		return nil, err
	}
	err := c.server.wait(ctx, func(ctx context.Context) error {
		body, err := c.client.do(ctx, request{path: targetPath(name), accept: runtime.ContentTypeJSON})
		if err != nil {
			return err
		}
		target = &v1.Target{}
		if err := json.Unmarshal(body, target); err != nil {
			return err
		}
		wanted := int32(1)
		if target.Spec.Replicas != nil {
			wanted = *target.Spec.Replicas
		}
		if target.Status.ReadyReplicas < wanted {
			return fmt.Errorf("%d of %d instances of target %s run", target.Status.ReadyReplicas, wanted, name)
		}
		return nil
	})
	return target, err
}

// runBackend starts the service that is forwarded to, as a target.
func (c *cluster) runBackend(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c.backend, err = c.run(ctx, backendName, v1.TargetSpec{
		Process: &v1.ProcessSource{Command: []string{self, "role-backend"}, Args: []string{"--listen=127.0.0.1:$(AASERVER_PORT_DATA)"}},
		Ports:   []v1.TargetPort{{Name: "data", Port: backendPort}},
	})
	return err
}

func (c *cluster) stop() {
	if c.server != nil {
		c.server.stop()
	}
	if c.client != nil {
		c.client.http.CloseIdleConnections()
	}
	c.plane.stop()
}
