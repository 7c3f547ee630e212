//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// client is a connection to one server, as client-go has it: TLS with a client
// certificate, HTTP/2. What it decodes of the answers is as little as can be:
// it shares its processors with the servers.
type client struct {
	base string
	tls  *tls.Config
	http *http.Client
}

func newClient(base, caFile string, admin keyPair) (*client, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate in PEM", caFile)
	}
	cert, err := tls.LoadX509KeyPair(admin.CertFile, admin.KeyFile)
	if err != nil {
		return nil, err
	}
	c := &client{base: base, tls: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}}
	c.http = c.connection()
	return c, nil
}

// connection returns a client with a connection of its own.
func (c *client) connection() *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:     c.tls.Clone(),
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 1,
		// What is asked for is said in each request.
		DisableCompression: true,
	}}
}

type request struct {
	method string // GET, if empty
	path   string
	body   []byte
	// mediaType is that of the body and, unless accept is set, of the answer.
	mediaType string
	accept    string
	gzip      bool
}

// open sends a request. An answer other than 2xx is an error.
func (c *client) open(ctx context.Context, via *http.Client, r request) (*http.Response, error) {
	method := r.method
	if method == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+r.path, bytes.NewReader(r.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "bench")
	if r.mediaType != "" {
		req.Header.Set("Content-Type", r.mediaType)
		req.Header.Set("Accept", r.mediaType)
	}
	if r.accept != "" {
		req.Header.Set("Accept", r.accept)
	}
	if r.gzip {
		req.Header.Set("Accept-Encoding", "gzip")
	}
	response, err := via.Do(req)
	if err != nil {
		return nil, err
	}
	if response.StatusCode/100 != 2 {
		defer response.Body.Close()
		const most = 1 << 10
		text, _ := io.ReadAll(io.LimitReader(response.Body, most))
		return nil, &statusError{response.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, r.path, response.Status, text)}
	}
	if r.gzip && response.Header.Get("Content-Encoding") != "gzip" {
		response.Body.Close()
		return nil, fmt.Errorf("%s %s: the answer isn't compressed", method, r.path)
	}
	return response, nil
}

type statusError struct {
	code    int
	message string
}

func (e *statusError) Error() string { return e.message }

// do returns the answer's body.
func (c *client) do(ctx context.Context, r request) ([]byte, error) {
	response, err := c.open(ctx, c.http, r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

// drop reads the answer's body and forgets it.
func (c *client) drop(ctx context.Context, r request) error {
	response, err := c.open(ctx, c.http, r)
	if err != nil {
		return err
	}
	return discard(response)
}

// events reads the events of a watch without decoding them.
type events struct {
	reader   *bufio.Reader
	protobuf bool
	last     []byte
}

func newEvents(body io.Reader, mediaType string) *events {
	return &events{reader: bufio.NewReaderSize(body, 64<<10), protobuf: mediaType == runtime.ContentTypeProtobuf}
}

// maxEvent bounds an event, in bytes: no object is larger than what etcd takes.
const maxEvent = 4 << 20

// next reads one event into last. In JSON each stands in a line of its own, in
// protobuf its length comes first, in four bytes.
func (e *events) next() error {
	if e.protobuf {
		var size [4]byte
		if _, err := io.ReadFull(e.reader, size[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(size[:]))
		if n > maxEvent {
			return fmt.Errorf("an event of %d bytes", n)
		}
		if cap(e.last) < n {
			e.last = make([]byte, n)
		}
		e.last = e.last[:n]
		_, err := io.ReadFull(e.reader, e.last)
		return err
	}
	e.last = e.last[:0]
	for {
		part, err := e.reader.ReadSlice('\n')
		e.last = append(e.last, part...)
		switch {
		case err == nil:
			return nil
		case err != bufio.ErrBufferFull:
			return err
		case len(e.last) > maxEvent:
			return fmt.Errorf("an event of more than %d bytes", maxEvent)
		}
	}
}

// listMeta returns a list's metadata, without decoding its items.
func listMeta(body []byte, mediaType string) (metav1.ListMeta, error) {
	if mediaType == runtime.ContentTypeProtobuf {
		return protobufListMeta(body)
	}
	var meta metav1.ListMeta
	head, _, ok := bytes.Cut(body, []byte(`"items":`))
	if !ok {
		return meta, fmt.Errorf("no list: %.100q", body)
	}
	meta.ResourceVersion = jsonString(head, "resourceVersion")
	meta.Continue = jsonString(head, "continue")
	return meta, nil
}

// jsonString returns the value of a key, if it is a string without escapes.
func jsonString(text []byte, key string) string {
	_, rest, ok := strings.Cut(string(text), `"`+key+`":"`)
	if !ok {
		return ""
	}
	value, _, _ := strings.Cut(rest, `"`)
	return value
}

// protobufPrefix begins what Kubernetes encodes as protobuf.
var protobufPrefix = []byte{'k', '8', 's', 0}

// protobufListMeta reads the first field of a list, which is its metadata in
// every kind of list.
func protobufListMeta(body []byte) (metav1.ListMeta, error) {
	var meta metav1.ListMeta
	body, ok := bytes.CutPrefix(body, protobufPrefix)
	if !ok {
		return meta, fmt.Errorf("not protobuf: %.100q", body)
	}
	var unknown runtime.Unknown
	if err := unknown.Unmarshal(body); err != nil {
		return meta, err
	}
	const firstBytesField = 1<<3 | 2
	if len(unknown.Raw) == 0 || unknown.Raw[0] != firstBytesField {
		return meta, fmt.Errorf("no list: %.100q", unknown.Raw)
	}
	size, n := binary.Uvarint(unknown.Raw[1:])
	if n <= 0 || size > uint64(len(unknown.Raw)-1-n) {
		return meta, fmt.Errorf("no list: %.100q", unknown.Raw)
	}
	err := meta.Unmarshal(unknown.Raw[1+n:][:size])
	return meta, err
}
