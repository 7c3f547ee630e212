package streaming

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"unicode/utf8"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
)

// maxStatus bounds an encoded Status. gorilla's client, and thereby client-go,
// keeps no more than 1,024 bytes of a failed handshake's body.
const maxStatus = 1000

// statusOf says how an error looks to a client of the Kubernetes API.
func statusOf(err error) metav1.Status {
	if err == nil {
		return metav1.Status{Status: metav1.StatusSuccess}
	}
	if exit, ok := errors.AsType[*ExitError](err); ok {
		code := exit.Code
		if code < 0 || code > 255 { // clients parse 8 bits
			code = 255
		}
		if code == 0 {
			return metav1.Status{Status: metav1.StatusSuccess}
		}
		return metav1.Status{
			Status:  metav1.StatusFailure,
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: err.Error(),
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{
				Type:    remotecommand.ExitCodeCauseType,
				Message: strconv.Itoa(code),
			}}},
		}
	}
	if api := apierrors.APIStatus(nil); errors.As(err, &api) {
		status := api.Status()
		if status.Status == "" {
			status.Status = metav1.StatusFailure
		}
		return status
	}
	return metav1.Status{
		Status:  metav1.StatusFailure,
		Reason:  metav1.StatusReasonInternalError,
		Message: err.Error(),
		Code:    http.StatusInternalServerError,
	}
}

// httpErrorf makes an error that is a Status.
func httpErrorf(code int32, reason metav1.StatusReason, format string, args ...any) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    code,
		Reason:  reason,
		Message: fmt.Sprintf(format, args...),
	}}
}

// encodeStatus encodes a Status in at most maxStatus bytes. What doesn't fit
// is left out, the message's end last.
func encodeStatus(status metav1.Status) []byte {
	status.Message = string([]rune(truncate(status.Message, 4*maxStatus))) // valid UTF-8
	data, err := json.Marshal(status)
	if err == nil && len(data) <= maxStatus {
		return data
	}
	if d := status.Details; d != nil && (status.Reason != remotecommand.NonZeroExitCodeReason || len(d.Causes) > 1) {
		status.Details = nil
		if data, err = json.Marshal(status); err == nil && len(data) <= maxStatus {
			return data
		}
	}
	status.TypeMeta = metav1.TypeMeta{Kind: truncate(status.Kind, 64), APIVersion: truncate(status.APIVersion, 64)}
	status.ListMeta = metav1.ListMeta{}
	status.Reason = metav1.StatusReason(truncate(string(status.Reason), 128))
	status.Status = truncate(status.Status, 16)
	// Escapes make up to six bytes of one: cut, measure, cut again.
	message := status.Message
	for limit := maxStatus; ; limit = limit * 3 / 4 {
		status.Message = truncate(message, limit)
		if data, err = json.Marshal(status); err == nil && len(data) <= maxStatus {
			return data
		}
		if limit == 0 {
			return []byte(`{"status":"Failure","reason":"InternalError","code":500}`)
		}
	}
}

// truncate cuts s to at most n bytes, at the border of a rune.
func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const ellipsis = "…"
	if n < len(ellipsis) {
		return ""
	}
	n -= len(ellipsis)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + ellipsis
}

// refuse answers a request that was not upgraded with the error's Status, and
// returns the error.
func refuse(w http.ResponseWriter, err error) error {
	status := statusOf(err)
	if status.Code < 400 {
		status.Code = http.StatusInternalServerError
	}
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(int(status.Code))
	w.Write(encodeStatus(status)) // the client may be gone already; nobody is left to tell
	return err
}
