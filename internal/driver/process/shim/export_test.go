package shim

// Tests of this package are outside of it: what a file in here imports, package
// testing too, is initialised before the shim.

var (
	Encode = (*Command).encode
	Decode = decodeCommand
)

// Reserve returns the pid of the shim in reserve, 0 if there is none.
func (s *Starter) Reserve() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve == nil {
		return 0
	}
	return s.reserve.shim.Pid
}

// Shim returns the pid of a command's shim.
func (c *Child) Shim() int { return c.shim.Pid }
