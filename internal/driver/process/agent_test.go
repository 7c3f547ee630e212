package process

import "os"

const envHelperAgent = "X"

func helperAgent() { os.Exit(0) }
