//go:build !unix

package files

import (
	"errors"
	"io/fs"
	"os"
	"time"
)

var errQuota = errors.New("quota exceeded")

const openFlags = 0

const renamesOpen = false

// lock does nothing: where a file that is open can't be renamed, two that write
// one don't end well anyway, but with an error.
func lock(*os.File) (bool, error) { return true, nil }

func private(fs.FileInfo) bool { return true }

func setLinkTime(*os.Root, string, time.Time) error { return nil }
