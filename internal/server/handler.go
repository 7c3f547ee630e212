package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/endpoints/responsewriter"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/warning"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
	"aaserver.io/aaserver/registry/target"
)

// secondNames are the subresources of targets that have a second name, by it.
// kube-apiserver lets only attach, exec, proxy, log and portforward run long
// when it proxies, hence these canonical names; people try the others.
var secondNames = map[string]string{
	"logs":         "log",
	"port-forward": "portforward",
}

// longRunning says which requests no timeout applies to. Without our
// subresources in it, the context of a stream would end at the request timeout,
// even after a hijack.
var longRunning = filters.BasicLongRunningRequestCheck(
	sets.NewString("watch", "proxy"),
	sets.NewString("attach", "exec", "proxy", "log", "portforward", "logs", "port-forward"),
)

// buildHandlerChain puts the rewriting of second names before all else, so that
// authorization, admission and audit see one name for one thing. Sessions leave
// it all once they stand.
func buildHandlerChain(api http.Handler, config *genericapiserver.Config) http.Handler {
	if config.AuditBackend != nil {
		held := *config
		held.AuditBackend = target.HoldAudit(config.AuditBackend)
		config = &held
	}
	return target.DetachedSessions(withCanonicalNames(withShortStatuses(genericapiserver.DefaultBuildHandlerChain(withDeprecation(withCreate(api, config.Authorization.Authorizer)), config))))
}

// withDeprecation warns whoever uses v1alpha1, and marks the request in the audit
// log, as kube-apiserver does for its own. The generic server's own warning
// names the version of Kubernetes that a kind is deprecated in, which has no
// meaning for a group of ours, and would be about Scale for scale.
func withDeprecation(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := request.RequestInfoFrom(r.Context())
		if ok && info.IsResourceRequest && info.APIGroup == v1alpha1.GroupName && info.APIVersion == v1alpha1.SchemeGroupVersion.Version && info.Resource == "targets" {
			warning.AddWarning(r.Context(), "", deprecation)
			audit.AddAuditAnnotation(r.Context(), "k8s.io/deprecated", "true")
		}
		next.ServeHTTP(w, r)
	})
}

var deprecation = fmt.Sprintf("%s Target is deprecated; use %s Target", v1alpha1.SchemeGroupVersion, v1.SchemeGroupVersion)

func withCanonicalNames(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path, ok := canonicalPath(r.URL.Path); ok {
			r = r.Clone(r.Context())
			r.URL.Path = path
			r.URL.RawPath = ""
			// The audit log records the request by this.
			r.RequestURI = r.URL.RequestURI()
		}
		next.ServeHTTP(w, r)
	})
}

// canonicalPath returns the path of a target's subresource by its canonical
// name, if path has it by its second one.
func canonicalPath(path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, "/apis/"+v1.GroupName+"/")
	if !ok {
		return "", false
	}
	// However many slashes end it: the router takes them all.
	// <version>/namespaces/<namespace>/targets/<name>/<subresource>
	parts := strings.Split(strings.TrimRight(rest, "/"), "/")
	if len(parts) != 6 || parts[1] != "namespaces" || parts[3] != "targets" {
		return "", false
	}
	canonical, ok := secondNames[parts[5]]
	if !ok {
		return "", false
	}
	parts[5] = canonical
	return "/apis/" + v1.GroupName + "/" + strings.Join(parts, "/"), true
}

// maxStatus is how much of a refused upgrade's answer WebSocket clients built on
// gorilla keep, in bytes: of a longer one, kubectl would show nothing.
const maxStatus = 1024

// withShortStatuses shortens the answers to refused upgrades. Their messages
// repeat what the client sent, and that may be long.
func withShortStatuses(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			next.ServeHTTP(w, r)
			return
		}
		short := &shortStatus{ResponseWriter: w}
		next.ServeHTTP(responsewriter.WrapForHTTP1Or2(short), r)
		short.finish()
	})
}

// shortStatus holds an error's answer back until it is whole. It implements
// responsewriter.UserProvidedDecorator.
type shortStatus struct {
	http.ResponseWriter
	code int // of an error
	body []byte
}

func (w *shortStatus) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *shortStatus) WriteHeader(code int) {
	if code >= http.StatusBadRequest {
		w.code = code
		return
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *shortStatus) Write(p []byte) (int, error) {
	if w.code == 0 {
		return w.ResponseWriter.Write(p)
	}
	w.body = append(w.body, p...)
	return len(p), nil
}

func (w *shortStatus) finish() {
	if w.code == 0 {
		return
	}
	body := shorten(w.body)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.ResponseWriter.WriteHeader(w.code)
	w.ResponseWriter.Write(body)
}

// shorten makes a Status fit, by its message.
func shorten(body []byte) []byte {
	if len(body) <= maxStatus {
		return body
	}
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err != nil || status.Status == "" {
		return body // in protobuf, for a client that asked for that
	}
	// Details repeat the message.
	status.Details = nil
	message := status.Message
	for size := len(message); ; size /= 2 {
		if size < len(message) {
			status.Message = strings.ToValidUTF8(message[:size], "") + "…"
		}
		short, err := json.Marshal(status)
		if err != nil {
			return body[:maxStatus]
		}
		if len(short) <= maxStatus || size == 0 {
			return short
		}
	}
}
