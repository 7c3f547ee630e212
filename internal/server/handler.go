package server

import (
	"net/http"
	"strings"

	"k8s.io/apimachinery/pkg/util/sets"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/filters"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
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
// authorization, admission and audit see one name for one thing.
func buildHandlerChain(api http.Handler, config *genericapiserver.Config) http.Handler {
	return withCanonicalNames(genericapiserver.DefaultBuildHandlerChain(api, config))
}

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
	// <version>/namespaces/<namespace>/targets/<name>/<subresource>
	parts := strings.Split(strings.TrimSuffix(rest, "/"), "/")
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
