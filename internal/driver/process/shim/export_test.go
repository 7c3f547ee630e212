package shim

// Tests of this package are outside of it: what a file in here imports, package
// testing too, is initialised before the shim.

var (
	Encode = (*Command).encode
	Decode = decodeCommand
)
