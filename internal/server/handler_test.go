package server

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/apiserver/pkg/endpoints/request"
)

func TestSecondNamesAreRewritten(t *testing.T) {
	const targets = "/apis/streaming.aaserver.io/v1/namespaces/shop/targets"
	for path, want := range map[string]string{
		targets + "/web/logs":         targets + "/web/log",
		targets + "/web/logs/":        targets + "/web/log",
		targets + "/web/port-forward": targets + "/web/portforward",
		"/apis/streaming.aaserver.io/v1alpha1/namespaces/shop/targets/web/logs": "/apis/streaming.aaserver.io/v1alpha1/namespaces/shop/targets/web/log",
		targets + "/web/log":           targets + "/web/log",
		targets + "/logs":              targets + "/logs",
		targets + "/port-forward/exec": targets + "/port-forward/exec",
		targets + "/web/logs/more":     targets + "/web/logs/more",
		"/apis/streaming.aaserver.io/v1/namespaces/shop/others/web/logs": "/apis/streaming.aaserver.io/v1/namespaces/shop/others/web/logs",
		"/api/v1/namespaces/shop/pods/web/logs":                          "/api/v1/namespaces/shop/pods/web/logs",
	} {
		var got, uri string
		handler := withCanonicalNames(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			got, uri = r.URL.Path, r.RequestURI
		}))
		handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path+"?follow=true", nil))
		if got != want {
			t.Errorf("%s became %s, want %s", path, got, want)
		}
		if uri != want+"?follow=true" {
			t.Errorf("the URI of %s became %s: audit would record another name, or lose the query", path, uri)
		}
	}
}

func TestLongRunning(t *testing.T) {
	for subresource, want := range map[string]bool{
		"log": true, "logs": true, "exec": true, "attach": true, "portforward": true, "port-forward": true,
		"": false, "status": false, "scale": false,
	} {
		info := &request.RequestInfo{IsResourceRequest: true, Verb: "get", Resource: "targets", Subresource: subresource}
		if got := longRunning(httptest.NewRequest("GET", "/", nil), info); got != want {
			t.Errorf("long-running of %q = %t, want %t", subresource, got, want)
		}
	}
}
