//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	kruntime "k8s.io/apimachinery/pkg/runtime"
)

// median is the middle of the values, or between the two that are.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// ratios divides the rounds of one by those of another.
func ratios(a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		out[i] = a[i] / b[i]
	}
	return out
}

// ratio prints the median of ratios, and between which they lie.
func ratio(values []float64) string {
	return fmt.Sprintf("%.2f (%.2f–%.2f)", median(values), slices.Min(values), slices.Max(values))
}

// number prints three digits that say something.
func number(value float64) string {
	switch {
	case value >= 100:
		return strconv.FormatFloat(value, 'f', 0, 64)
	case value >= 10:
		return strconv.FormatFloat(value, 'f', 1, 64)
	case value >= 1:
		return strconv.FormatFloat(value, 'f', 2, 64)
	}
	return strconv.FormatFloat(value, 'f', 3, 64)
}

// table prints rows in Markdown, the first as the heading, aligned for those
// who read it as text.
func table(out io.Writer, rows [][]string) {
	rule := make([]string, len(rows[0]))
	for i := range rule {
		rule[i] = "---"
	}
	writer := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	for _, row := range slices.Insert(slices.Clone(rows), 1, rule) {
		fmt.Fprintf(writer, "| %s\t|\n", strings.Join(row, "\t| "))
	}
	writer.Flush()
	fmt.Fprintln(out)
}

func column(samples []sample, of func(sample) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	return values
}

// report prints everything.
func (b *bench) report(ctx context.Context) error {
	etcd, err := b.etcdVersion(ctx)
	if err != nil {
		return err
	}
	sizes, err := b.sizes(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "%d cores, %s of memory, %s, %s. Medians of %d rounds with %d objects, %d writers and readers. A ratio is ours to the peer's, with the least and the most of the rounds in brackets.\n\n",
		runtime.NumCPU(), totalMemory(), runtime.Version(), etcd, b.rounds, b.objects, clients)
	fmt.Fprintf(b.out, "%s\n\n", sizes)

	for _, g := range []struct {
		title string
		group
	}{
		{fmt.Sprintf("Objects of %d bytes in JSON, all of them padded to that size by an annotation", b.small.size), b.small},
		{fmt.Sprintf("Realistic targets, beside objects of the peer that are padded to their size, %d bytes in JSON", b.realistic.size), b.realistic},
	} {
		fmt.Fprintf(b.out, "%s: how much in a second; a ratio above 1 is faster.\n\n", g.title)
		table(b.out, b.compare(g.group, func(s sample) float64 { return 1 / s.wall }, func(op operation) string { return op.unit }))
		fmt.Fprint(b.out, "Processor time of the server for each of them, in milliseconds; a ratio below 1 is cheaper.\n\n")
		table(b.out, b.compare(g.group, func(s sample) float64 { return s.cpu * 1e3 }, nil))
	}
	b.reportMemory()
	return nil
}

// compare returns the rows of a table. Without unit they have none.
func (b *bench) compare(g group, of func(sample) float64, unit func(operation) string) [][]string {
	head := []string{"operation", "sample-apiserver, JSON"}
	for _, v := range []*variant{g.json, g.protobuf} {
		head = append(head, v.name, "ratio")
	}
	rows := [][]string{head}
	for _, op := range operations {
		base := column(b.samples[op.name][g.peer.name], of)
		name := op.name
		if unit != nil {
			name += ", " + unit(op)
		}
		row := []string{name, number(median(base))}
		for _, v := range []*variant{g.json, g.protobuf} {
			values := column(b.samples[op.name][v.name], of)
			row = append(row, number(median(values)), ratio(ratios(values, base)))
		}
		rows = append(rows, row)
	}
	return rows
}

func (b *bench) reportMemory() {
	const mib = 1 << 20
	at := map[string]map[*server]memory{}
	rows := [][]string{{"memory, MiB", "heap, peer", "heap, ours", "RSS, peer", "RSS, ours", "most RSS, peer", "most RSS, ours"}}
	cell := func(row memoryRow, s *server, of func(memory) float64) string {
		m, ok := row.server[s]
		if !ok {
			return ""
		}
		return number(of(m) / mib)
	}
	for _, row := range b.memory {
		at[row.when] = row.server
		cells := []string{row.when}
		for _, of := range []func(memory) float64{
			func(m memory) float64 { return m.Heap }, func(m memory) float64 { return m.RSS }, func(m memory) float64 { return m.HighWater },
		} {
			cells = append(cells, cell(row, b.peer, of), cell(row, b.ours, of))
		}
		rows = append(rows, cells)
	}
	table(b.out, rows)

	rows = [][]string{{"the watch cache's share of the heap, MiB", "sample-apiserver", "ours", "ratio"}}
	for _, step := range []struct{ name, from, to string }{
		{"small objects", whenEmpty, whenSmall},
		{"small objects, with the events of their creation", whenEmpty, whenWritten},
		{"realistic targets, and objects of their size", whenSmall, whenLarge},
	} {
		peer := at[step.to][b.peer].Heap - at[step.from][b.peer].Heap
		ours := at[step.to][b.ours].Heap - at[step.from][b.ours].Heap
		rows = append(rows, []string{step.name, number(peer / mib), number(ours / mib), fmt.Sprintf("%.2f", ours/peer)})
	}
	table(b.out, rows)
}

// sizes says how large objects are, and whether the peer has protobuf.
func (b *bench) sizes(ctx context.Context) (string, error) {
	var sizes []string
	for _, v := range b.variants {
		body, err := v.server.client.do(ctx, request{path: v.path(v.namespace, objectName(v.objects-1)), accept: v.mediaType})
		if err != nil {
			return "", err
		}
		sizes = append(sizes, fmt.Sprintf("%d (%s)", len(body), v.name))
	}
	text := "Bytes of an object as it is answered: " + strings.Join(sizes, ", ") + "."
	peer := b.variants[0]
	err := peer.server.client.drop(ctx, request{path: peer.path(peer.namespace, objectName(0)), accept: kruntime.ContentTypeProtobuf})
	status, ok := errors.AsType[*statusError](err)
	switch {
	case err == nil:
		text += " The peer has protobuf too, which isn't measured."
	case ok:
		text += fmt.Sprintf(" The peer has no protobuf: asked for it, it answers %d %s. Ours in protobuf is compared with its JSON.", status.code, http.StatusText(status.code))
	default:
		return "", err
	}
	return text, nil
}

// etcdVersion is what etcd says of itself: "etcd Version: 3.7.0".
func (b *bench) etcdVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "controlplane", "etcd"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("etcd --version: %w", err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.Replace(line, " Version:", "", 1), nil
}

func totalMemory() string {
	content, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return "an unknown amount"
	}
	kib, err := metric(content, "MemTotal:")
	if err != nil {
		return "an unknown amount"
	}
	return fmt.Sprintf("%.0f GiB", kib/(1<<20))
}
