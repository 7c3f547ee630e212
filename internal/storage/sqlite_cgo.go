//go:build cgo

package storage

// dataSource is how kine takes a path whatever characters are in it. With cgo,
// it hands the name to mattn/go-sqlite3 as it is.
func dataSource(path string) string { return "file:" + escapePath(path) }
