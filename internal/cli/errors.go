package cli

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/tools/clientcmd"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/streaming/pkg/httpstream"
	utilexec "k8s.io/utils/exec"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// errFailed ends a command whose errors have been printed already.
var errFailed = errors.New("failed")

// maxStatusSize bounds what is read of the response to a failed upgrade.
const maxStatusSize = 64 << 10

// describe returns what to print for an error, worded as kubectl does, and the
// exit code.
func describe(err error) (message string, code int) {
	if err == nil {
		return "", 0
	}
	if errors.Is(err, errFailed) {
		return "", 1
	}
	var output *outputError
	if errors.As(err, &output) && errors.Is(err, syscall.EPIPE) {
		// Whoever read the output has had enough.
		return "", 128 + int(syscall.SIGPIPE)
	}
	var aggregate utilerrors.Aggregate
	if errors.As(err, &aggregate) && len(aggregate.Errors()) == 1 {
		err = aggregate.Errors()[0]
	}
	var exit utilexec.ExitError
	if errors.As(err, &exit) {
		return exit.Error(), exit.ExitStatus()
	}
	var broken *brokenError
	if errors.As(err, &broken) {
		return "error: " + broken.Error(), exitBroken
	}
	if clientcmd.IsConfigurationInvalid(err) {
		return cmdutil.MultilineError("Error in configuration: ", err), 1
	}
	// kubectl's wording looks at the error itself, not at what it wraps.
	var status *apierrors.StatusError
	var request *url.Error
	switch {
	case errors.As(err, &status):
		err = status
	case errors.As(err, &request):
		err = request
	}
	if message, ok := cmdutil.StandardErrorMessage(err); ok {
		return message, 1
	}
	message = err.Error()
	if !strings.HasPrefix(message, "error: ") {
		message = "error: " + message
	}
	return message, 1
}

// upgradeError gives the error of an upgraded request the form that errors of
// every other request have. client-go hides the server's Status behind the
// failed handshake, and returns the errors of dialling bare.
func upgradeError(host string, err error) error {
	if err == nil {
		return nil
	}
	if status := refusal(err); status != nil {
		return status
	}
	var request *url.Error
	if errors.As(err, &request) {
		return err
	}
	if neverSent(err) {
		return &url.Error{Op: "Get", URL: host, Err: err}
	}
	return err
}

// neverSent says whether a request failed before the server could have read it.
func neverSent(err error) bool {
	var operation *net.OpError
	var name *net.DNSError
	var verification *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var record tls.RecordHeaderError
	return errors.As(err, &operation) && operation.Op == "dial" ||
		errors.As(err, &name) ||
		errors.As(err, &verification) ||
		errors.As(err, &authority) ||
		errors.As(err, &hostname) ||
		errors.As(err, &record)
}

// refusal returns the Status with which the server refused to upgrade, or nil
// if the upgrade didn't fail or nobody said why in a Status.
func refusal(err error) *apierrors.StatusError {
	var status *apierrors.StatusError
	if errors.As(err, &status) {
		return status
	}
	var upgrade *httpstream.UpgradeFailureError
	if errors.As(err, &upgrade) && errors.As(upgrade.Cause, &status) {
		return status
	}
	return nil
}

// fallBack says whether to try SPDY after a WebSocket failed. What is in the
// way of WebSockets may let SPDY through. A Status isn't in the way: it is the
// server's answer, which SPDY wouldn't change, but for the one that GET is
// forbidden where POST may not be.
func fallBack(err error) bool {
	if status := refusal(err); status != nil {
		return apierrors.IsForbidden(status)
	}
	return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
}

// responseError turns a response that isn't an upgrade into the error that it
// tells. The server's own sentence is a Status; a proxy on the way may answer
// with anything.
func responseError(resp *http.Response, target string) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatusSize))
	if err != nil {
		return fmt.Errorf("reading the server's refusal (%s): %w", resp.Status, err)
	}
	var status metav1.Status
	if json.Unmarshal(body, &status) == nil && status.Kind == "Status" && status.Status != metav1.StatusSuccess && status.Message != "" {
		return &apierrors.StatusError{ErrStatus: status}
	}
	text := strings.TrimSpace(string(body))
	if resp.StatusCode < http.StatusBadRequest {
		return fmt.Errorf("the server answered %q instead of upgrading the connection", resp.Status)
	}
	generic := apierrors.NewGenericServerResponse(resp.StatusCode, "connect", v1.Resource("targets"), target, text, 0, true)
	if text != "" && !strings.Contains(generic.ErrStatus.Message, text) {
		generic.ErrStatus.Message += ": " + text
	}
	return generic
}

// transient says whether trying again may help: the server wasn't reached,
// isn't up to it now, or what it sent or took broke off.
func transient(err error) bool {
	var status *apierrors.StatusError
	if !errors.As(err, &status) {
		return true
	}
	switch code := status.ErrStatus.Code; code {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooManyRequests:
		return true
	default:
		return code >= http.StatusInternalServerError
	}
}
