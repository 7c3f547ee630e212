//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestMedian(t *testing.T) {
	for name, tt := range map[string]struct {
		values []float64
		want   float64
	}{
		"the middle of an odd number":            {[]float64{9, 1, 5}, 5},
		"between the middle two of an even one":  {[]float64{9, 1, 5, 7}, 6},
		"one value is its own":                   {[]float64{3}, 3},
		"an outlier moves it no further than by": {[]float64{1, 2, 1000}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			if got := median(tt.values); got != tt.want {
				t.Errorf("median(%v) = %v, want %v", tt.values, got, tt.want)
			}
		})
	}
}

func TestRatio(t *testing.T) {
	if got, want := ratio(ratios([]float64{2, 6, 4}, []float64{4, 2, 4})), "1.00 (0.50–3.00)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNumber(t *testing.T) {
	got := map[float64]string{}
	for _, value := range []float64{1234.5, 12.345, 1.2345, 0.12345} {
		got[value] = number(value)
	}
	want := map[float64]string{1234.5: "1234", 12.345: "12.3", 1.2345: "1.23", 0.12345: "0.123"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseCPU(t *testing.T) {
	fields := strings.Fields("S 1 2 3 4 5 6 7 8 9 10 150 25 11 12")
	for name, tt := range map[string]struct {
		stat    string
		want    time.Duration
		wantErr bool
	}{
		"user and system time":                        {"42 (bench) " + strings.Join(fields, " "), 1750 * time.Millisecond, false},
		"a name with parentheses, spaces and numbers": {"42 (a) b 1 2 (3) " + strings.Join(fields, " "), 1750 * time.Millisecond, false},
		"too few fields":                              {"42 (bench) S 1 2", 0, true},
		"no number":                                   {"42 (bench) " + strings.Replace(strings.Join(fields, " "), "150", "x", 1), 0, true},
		"nothing":                                     {"", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseCPU([]byte(tt.stat))
			if got != tt.want || (err != nil) != tt.wantErr {
				t.Errorf("parseCPU(%q) = %v, %v, want %v and an error: %t", tt.stat, got, err, tt.want, tt.wantErr)
			}
		})
	}
}

func TestMetric(t *testing.T) {
	text := []byte("# HELP heap_bytes What it is.\nheap_bytes_total 1\nheap_bytes 2.5e+07\nVmRSS:\t  512 kB\n")
	for name, want := range map[string]float64{"heap_bytes": 2.5e7, "VmRSS:": 512} {
		if got, err := metric(text, name); got != want || err != nil {
			t.Errorf("metric(%q) = %v, %v, want %v", name, got, err, want)
		}
	}
	if got, err := metric(text, "other"); err == nil {
		t.Errorf("a metric that isn't there is %v", got)
	}
}

func TestEvents(t *testing.T) {
	// Longer than what is read at once.
	long := strings.Repeat("x", 200<<10)
	want := []string{`{"type":"ADDED"}`, `{"object":"` + long + `"}`, `{"type":"BOOKMARK"}`}
	for mediaType, encode := range map[string]func(string) []byte{
		runtime.ContentTypeJSON: func(event string) []byte { return []byte(event + "\n") },
		runtime.ContentTypeProtobuf: func(event string) []byte {
			return append(binary.BigEndian.AppendUint32(nil, uint32(len(event))), event...)
		},
	} {
		t.Run(mediaType, func(t *testing.T) {
			var stream []byte
			for _, event := range want {
				stream = append(stream, encode(event)...)
			}
			events := newEvents(bytes.NewReader(stream), mediaType)
			for i, event := range want {
				if err := events.next(); err != nil {
					t.Fatalf("event %d: %v", i, err)
				}
				if got := strings.TrimSuffix(string(events.last), "\n"); got != event {
					t.Errorf("event %d is %.50q (%d bytes), want %.50q (%d bytes)", i, got, len(got), event, len(event))
				}
			}
			if err := events.next(); err == nil {
				t.Error("an event after the last one")
			}
			events = newEvents(bytes.NewReader(stream[:len(stream)-2]), mediaType)
			var err error
			for range want {
				err = events.next()
			}
			if err == nil {
				t.Error("an event that was cut off was taken for whole")
			}
		})
	}
	events := newEvents(bytes.NewReader([]byte{0xff, 0, 0, 0}), runtime.ContentTypeProtobuf)
	if err := events.next(); err == nil || !strings.Contains(err.Error(), "4278190080") {
		t.Errorf("an event of 4 GiB: %v", err)
	}
}

func TestListMeta(t *testing.T) {
	list := &v1.TargetList{
		ListMeta: metav1.ListMeta{ResourceVersion: "71", Continue: "more"},
		Items:    []v1.Target{{ObjectMeta: metav1.ObjectMeta{Name: "web", ResourceVersion: "70"}}},
	}
	for _, mediaType := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
		t.Run(mediaType, func(t *testing.T) {
			info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), mediaType)
			if !ok {
				t.Fatalf("no %s", mediaType)
			}
			body, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, v1.SchemeGroupVersion), list)
			if err != nil {
				t.Fatal(err)
			}
			got, err := listMeta(body, mediaType)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(list.ListMeta, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if _, err := listMeta([]byte(`{"kind":"Status"}`), mediaType); err == nil {
				t.Error("a Status was taken for a list")
			}
		})
	}
}

// TestObjects proves that all kinds can be sent and read back, and that padding
// is as long as it should be.
func TestObjects(t *testing.T) {
	for name, tt := range map[string]struct {
		resource resource
		padded   bool
	}{
		"small targets":     {targets{}, true},
		"realistic targets": {targets{realistic: true}, false},
		"the peer's":        {flunders{}, true},
	} {
		t.Run(name, func(t *testing.T) {
			size := func(padding int) int {
				body, err := tt.resource.encode(tt.resource.object("a", padding), runtime.ContentTypeJSON)
				if err != nil {
					t.Fatal(err)
				}
				list := append(append([]byte(`{"items":[`), body...), `]}`...)
				objects, err := tt.resource.decodeList(list)
				if err != nil {
					t.Fatal(err)
				}
				if len(objects) != 1 || objects[0].GetName() != "a" || objects[0].GetAnnotations()[changedKey] == "" {
					t.Errorf("read back as %+v", objects)
				}
				return len(body)
			}
			want := 0
			if tt.padded {
				want = 100
			}
			if got := size(100) - size(0); got != want {
				t.Errorf("padding of 100 bytes makes an object larger by %d, want %d", got, want)
			}
		})
	}
}
