//go:build !cgo

package storage

// dataSource is how kine takes a path whatever characters are in it. Without
// cgo, it makes a URI of the name for modernc.org/sqlite.
func dataSource(path string) string { return escapePath(path) }
