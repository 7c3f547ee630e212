package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/audit"
	genericfilters "k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
)

func TestSecondNamesAreRewritten(t *testing.T) {
	const targets = "/apis/streaming.aaserver.io/v1/namespaces/shop/targets"
	for path, want := range map[string]string{
		targets + "/web/logs":            targets + "/web/log",
		targets + "/web/logs/":           targets + "/web/log",
		targets + "/web/logs//":          targets + "/web/log",
		targets + "/web/port-forward///": targets + "/web/portforward",
		targets + "/web/port-forward":    targets + "/web/portforward",
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

func TestRefusedUpgradesAnswerShortly(t *testing.T) {
	long := strings.Repeat("é<", 3000)
	status := apierrors.NewNotFound(schema.GroupResource{Group: "streaming.aaserver.io", Resource: "targets"}, long).Status()
	body, err := json.Marshal(status)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(upgrade string) *httptest.ResponseRecorder {
		request := httptest.NewRequest("GET", "/", nil)
		if upgrade != "" {
			request.Header.Set("Upgrade", upgrade)
		}
		recorder := httptest.NewRecorder()
		withShortStatuses(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			w.Write(body)
		})).ServeHTTP(recorder, request)
		return recorder
	}
	got := answer("websocket")
	var short metav1.Status
	if err := json.Unmarshal(got.Body.Bytes(), &short); err != nil {
		t.Fatalf("%v in %s", err, got.Body)
	}
	if got.Code != http.StatusNotFound || got.Body.Len() > maxStatus || short.Code != http.StatusNotFound || short.Reason != metav1.StatusReasonNotFound {
		t.Errorf("got %d, %d bytes, status %+v", got.Code, got.Body.Len(), short)
	}
	if !strings.HasPrefix(short.Message, `targets.streaming.aaserver.io "é<é<`) || !strings.HasSuffix(short.Message, "…") {
		t.Errorf("message %q", short.Message)
	}
	if plain := answer(""); plain.Body.String() != string(body) {
		t.Error("what is no upgrade was shortened too")
	}
}

func TestDeprecatedVersionsWarn(t *testing.T) {
	const want = `299 - "streaming.aaserver.io/v1alpha1 Target is deprecated; use streaming.aaserver.io/v1 Target"`
	for path, warns := range map[string]bool{
		"/apis/streaming.aaserver.io/v1alpha1/targets":                           true,
		"/apis/streaming.aaserver.io/v1alpha1/targets?watch=true":                true,
		"/apis/streaming.aaserver.io/v1alpha1/watch/targets":                     true,
		"/apis/streaming.aaserver.io/v1alpha1/namespaces/shop/targets/web":       true,
		"/apis/streaming.aaserver.io/v1alpha1/namespaces/shop/targets/web/scale": true,
		"/apis/streaming.aaserver.io/v1alpha1/namespaces/shop/targets/web/exec":  true,
		"/apis/streaming.aaserver.io/v1alpha1":                                   false,
		"/apis/streaming.aaserver.io/v1alpha1/others":                            false,
		"/apis/streaming.aaserver.io/v1/namespaces/shop/targets/web":             false,
		"/apis/example.com/v1alpha1/namespaces/shop/targets/web":                 false,
		"/openapi/v3/apis/streaming.aaserver.io/v1alpha1":                        false,
	} {
		config := &genericapiserver.Config{LegacyAPIGroupPrefixes: sets.NewString("/api")}
		handler := withDeprecation(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
		handler = genericfilters.WithWarningRecorder(handler)
		handler = genericfilters.WithRequestInfo(handler, genericapiserver.NewRequestInfoResolver(config))
		recorder := httptest.NewRecorder()
		request := httptest.NewRequest("GET", path, nil)
		ctx := audit.WithAuditContext(request.Context())
		handler.ServeHTTP(recorder, request.WithContext(ctx))
		if mark, marked := audit.AuditContextFrom(ctx).GetEventAnnotation("k8s.io/deprecated"); marked != warns || marked && mark != "true" {
			t.Errorf("%s: audit marks it as %q, %t", path, mark, marked)
		}
		got := recorder.Result().Header.Values("Warning")
		if warns && !slices.Equal(got, []string{want}) || !warns && len(got) > 0 {
			t.Errorf("%s: warnings %q", path, got)
		}
	}
}
