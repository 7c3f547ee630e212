package e2e

import (
	"io"
	"net"
)

// echoPort, in the environment of the test's binary, makes it a server that
// echoes on that port, over TCP and UDP: what targets run to be forwarded to.
const echoPort = "AASERVER_PORT_ECHO"

func echo(port string) error {
	address := net.JoinHostPort("127.0.0.1", port)
	packets, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			packets.WriteTo(buf[:n], from)
		}
	}()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			io.Copy(conn, conn)
		}()
	}
}
